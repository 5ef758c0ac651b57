"""The inverse of expansion: where each text and each image embedding stands on a rank."""

import torch
import triton
import triton.language as tl

from . import parts
from .search import last_at_or_below, lower_bound, num_steps

_INTEGERS = (
    "num_tokens", "num_image_embeddings", "num_images", "num_seqs", "cp_size", "cp_rank",
    "image_steps", "embedding_steps", "seq_steps",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def source_positions_kernel(
    layout_ptr,  # int32, the parts of a layout
    text_position_ptr,  # [T] int32, out
    image_position_ptr,  # [num_image_embeddings] int32, out
    num_tokens,
    num_image_embeddings,
    num_images,
    num_seqs,
    cp_size,
    cp_rank,
    image_steps,
    embedding_steps,
    seq_steps,
    BLOCK: tl.constexpr,
):
    expanded_start_ptr = parts.expanded_start(layout_ptr, num_seqs, num_tokens)
    image_start_ptr = parts.image_start(layout_ptr, num_seqs, num_tokens)
    cu_image_ptr = parts.cu_image_embeddings(layout_ptr, num_seqs, num_tokens, num_images)
    seq_start_ptr = parts.seq_start_expanded(layout_ptr, num_seqs)
    cu_padded_ptr = parts.cu_seqlens_padded(layout_ptr, num_seqs)

    # Text first, then images.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_token = index < num_tokens
    embedding = index - num_tokens
    is_image = (index >= num_tokens) & (embedding < num_image_embeddings)
    unpadded = tl.load(expanded_start_ptr + index, mask=is_token, other=0).to(tl.int64)
    is_placeholder = is_token & (index < 0)
    if num_images > 0:
        found = lower_bound(image_start_ptr, unpadded, num_images, image_steps)
        start = tl.load(image_start_ptr + found, mask=found < num_images, other=-1).to(tl.int64)
        is_placeholder = is_token & (start == unpadded)
        image = last_at_or_below(cu_image_ptr, embedding, num_images, embedding_steps)
        start = tl.load(image_start_ptr + image).to(tl.int64)
        start -= tl.load(cu_image_ptr + image).to(tl.int64)
        unpadded = tl.where(is_image, start + embedding, unpadded)

    seq = last_at_or_below(seq_start_ptr, unpadded, num_seqs + 1, seq_steps)
    begin = tl.load(cu_padded_ptr + seq).to(tl.int64)
    end = tl.load(cu_padded_ptr + seq + 1).to(tl.int64)
    position = begin + unpadded - tl.load(seq_start_ptr + seq)
    here = (position >= begin) & (position < end) & (is_placeholder == 0)
    if cp_size > 1:
        size = tl.maximum((end - begin) // (2 * cp_size), 1)
        offset = position - begin
        chunk = offset // size
        second = chunk == 2 * cp_size - 1 - cp_rank
        here = here & ((chunk == cp_rank) | second)
        position = begin // cp_size + offset % size + tl.where(second, size, 0)
    position = tl.where(here, position, -1).to(tl.int32)
    tl.store(text_position_ptr + index, position, mask=is_token)
    tl.store(image_position_ptr + embedding, position, mask=is_image)


def source_positions(
    layout, num_tokens, num_images, num_seqs, num_image_embeddings, cp_size, cp_rank
):
    """Launch the kernel; arguments and results are those of ``reference.source_positions``."""
    text_position = layout.new_empty(num_tokens)
    image_position = layout.new_empty(num_image_embeddings)
    block = 256
    with torch.cuda.device_of(layout):
        source_positions_kernel[(triton.cdiv(num_tokens + num_image_embeddings, block),)](
            layout,
            text_position,
            image_position,
            num_tokens,
            num_image_embeddings,
            num_images,
            num_seqs,
            cp_size,
            cp_rank,
            num_steps(num_images),
            num_steps(num_images + 1),
            num_steps(num_seqs + 2),
            BLOCK=block,
        )
    return text_position, image_position
