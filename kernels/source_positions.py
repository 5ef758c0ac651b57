"""The inverse of expansion: where each text row and each image row stands on a rank."""

import triton
import triton.language as tl

from .search import last_at_or_below, num_steps

_INTEGERS = (
    "num_tokens", "num_image_rows", "num_images", "num_seqs", "image_token_id", "cp_size",
    "cp_rank", "image_steps", "seq_steps",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def source_positions_kernel(
    input_ids_ptr,  # [T]
    expanded_start_ptr,  # [T + 1] int32
    image_begin_ptr,  # [N] int32
    image_start_ptr,  # [N + 1] int32
    row_starts_ptr,  # [B + 2] int32
    cu_padded_ptr,  # [B + 2] int32
    text_position_ptr,  # [T] int32, out
    image_position_ptr,  # [num_image_rows] int32, out
    num_tokens,
    num_image_rows,
    num_images,
    num_seqs,
    image_token_id,
    cp_size,
    cp_rank,
    image_steps,
    seq_steps,
    BLOCK: tl.constexpr,
):
    # Text rows first, then image rows.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_text = index < num_tokens
    image_row = index - num_tokens
    is_image = (index >= num_tokens) & (image_row < num_image_rows)
    ids = tl.load(input_ids_ptr + index, mask=is_text, other=0)
    row = tl.load(expanded_start_ptr + index, mask=is_text, other=0).to(tl.int64)
    if num_images > 0:
        image = last_at_or_below(image_start_ptr, image_row, num_images, image_steps)
        first = tl.load(image_begin_ptr + image).to(tl.int64) - tl.load(image_start_ptr + image)
        row = tl.where(is_image, first + image_row, row)

    seq = last_at_or_below(row_starts_ptr, row, num_seqs + 1, seq_steps)
    begin = tl.load(cu_padded_ptr + seq).to(tl.int64)
    end = tl.load(cu_padded_ptr + seq + 1).to(tl.int64)
    position = begin + row - tl.load(row_starts_ptr + seq)
    here = (position >= begin) & (position < end)
    if cp_size > 1:
        size = tl.maximum((end - begin) // (2 * cp_size), 1)
        offset = position - begin
        chunk = offset // size
        second = chunk == 2 * cp_size - 1 - cp_rank
        here = here & ((chunk == cp_rank) | second)
        position = begin // cp_size + offset % size + tl.where(second, size, 0)
    position = tl.where(here, position, -1).to(tl.int32)
    tl.store(text_position_ptr + index, tl.where(ids == image_token_id, -1, position), mask=is_text)
    tl.store(image_position_ptr + image_row, position, mask=is_image)


def source_positions(
    input_ids,
    expanded_start,
    image_begin,
    image_start,
    row_starts,
    cu_seqlens_padded,
    num_image_rows,
    image_token_id,
    cp_size,
    cp_rank,
):
    """Launch the kernel; arguments and results are those of ``reference.source_positions``."""
    num_tokens, num_images = input_ids.numel(), image_begin.numel()
    num_seqs = row_starts.numel() - 2
    text_position = row_starts.new_empty(num_tokens)
    image_position = row_starts.new_empty(num_image_rows)
    block = 256
    source_positions_kernel[(triton.cdiv(num_tokens + num_image_rows, block),)](
        input_ids,
        expanded_start,
        image_begin,
        image_start,
        row_starts,
        cu_seqlens_padded,
        text_position,
        image_position,
        num_tokens,
        num_image_rows,
        num_images,
        num_seqs,
        image_token_id,
        cp_size,
        cp_rank,
        num_steps(num_images + 1),
        num_steps(num_seqs + 2),
        BLOCK=block,
    )
    return text_position, image_position
