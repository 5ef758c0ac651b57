"""The inverse of expansion: where each text row and each image row stands on a rank."""

import torch
import triton
import triton.language as tl

from .search import last_at_or_below, lower_bound, num_steps

_INTEGERS = (
    "num_tokens", "num_image_rows", "num_images", "num_seqs", "cp_size", "cp_rank", "image_steps",
    "row_steps", "seq_steps",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def source_positions_kernel(
    expanded_start_ptr,  # [T + 1] int32
    image_start_ptr,  # [N] int32
    cu_image_rows_ptr,  # [N + 1] int32
    seq_start_ptr,  # [B + 2] int32, in the unpadded row
    cu_padded_ptr,  # [B + 2] int32
    text_position_ptr,  # [T] int32, out
    image_position_ptr,  # [num_image_rows] int32, out
    num_tokens,
    num_image_rows,
    num_images,
    num_seqs,
    cp_size,
    cp_rank,
    image_steps,
    row_steps,
    seq_steps,
    BLOCK: tl.constexpr,
):
    # Text rows first, then image rows.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_token = index < num_tokens
    image_row = index - num_tokens
    is_image = (index >= num_tokens) & (image_row < num_image_rows)
    unpadded = tl.load(expanded_start_ptr + index, mask=is_token, other=0).to(tl.int64)
    is_placeholder = is_token & (index < 0)
    if num_images > 0:
        found = lower_bound(image_start_ptr, unpadded, num_images, image_steps)
        start = tl.load(image_start_ptr + found, mask=found < num_images, other=-1).to(tl.int64)
        is_placeholder = is_token & (start == unpadded)
        image = last_at_or_below(cu_image_rows_ptr, image_row, num_images, row_steps)
        start = tl.load(image_start_ptr + image).to(tl.int64)
        start -= tl.load(cu_image_rows_ptr + image).to(tl.int64)
        unpadded = tl.where(is_image, start + image_row, unpadded)

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
    tl.store(image_position_ptr + image_row, position, mask=is_image)


def source_positions(
    expanded_start,
    image_start,
    cu_image_rows,
    seq_start_expanded,
    cu_seqlens_padded,
    num_image_rows,
    cp_size,
    cp_rank,
):
    """Launch the kernel; arguments and results are those of ``reference.source_positions``."""
    num_tokens, num_images = expanded_start.numel() - 1, image_start.numel()
    num_seqs = seq_start_expanded.numel() - 2
    text_position = expanded_start.new_empty(num_tokens)
    image_position = expanded_start.new_empty(num_image_rows)
    block = 256
    with torch.cuda.device_of(expanded_start):
        source_positions_kernel[(triton.cdiv(num_tokens + num_image_rows, block),)](
            expanded_start,
            image_start,
            cu_image_rows,
            seq_start_expanded,
            cu_seqlens_padded,
            text_position,
            image_position,
            num_tokens,
            num_image_rows,
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
