"""What stands at every position of a rank: source row, position id, token, label, loss mask."""

import torch
import triton
import triton.language as tl

from .search import last_at_or_below, lower_bound, num_steps

PAD = tl.constexpr(-1)
IGNORE = tl.constexpr(-100)

_INTEGERS = (
    "num_tokens", "num_images", "num_seqs", "image_token_id", "num_rows", "cp_size", "cp_rank",
    "image_steps", "seq_steps",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def expand_tokens_kernel(
    input_ids_ptr,  # [T]
    labels_ptr,  # [T] or unused
    loss_mask_ptr,  # [T] or unused
    image_begin_ptr,  # [N] int32
    image_start_ptr,  # [N + 1] int32
    row_starts_ptr,  # [B + 2] int32
    cu_padded_ptr,  # [B + 2] int32
    source_ptr,  # [P] int32, out
    position_ids_ptr,  # [P] int64, out
    token_ids_ptr,  # [P], out
    new_labels_ptr,  # [P] or unused, out
    new_loss_mask_ptr,  # [P] or unused, out
    num_tokens,
    num_images,
    num_seqs,
    image_token_id,
    num_rows,
    cp_size,
    cp_rank,
    image_steps,
    seq_steps,
    HAS_LABELS: tl.constexpr,
    HAS_LOSS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    local = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = local < num_rows // cp_size

    # This rank's position: each sequence is cut into 2 * cp_size chunks, one from either end is
    # ours.
    position = local
    seq = last_at_or_below(cu_padded_ptr, local * cp_size, num_seqs + 1, seq_steps)
    begin = tl.load(cu_padded_ptr + seq).to(tl.int64)
    if cp_size > 1:
        stop = tl.load(cu_padded_ptr + seq + 1).to(tl.int64)
        half = (stop // cp_size - begin // cp_size) // 2
        offset = local - begin // cp_size
        chunk = tl.where(offset < half, cp_rank, 2 * (cp_size - 1) - cp_rank)
        position = begin + offset + half * chunk
    first_row = tl.load(row_starts_ptr + seq).to(tl.int64)
    end = tl.load(row_starts_ptr + seq + 1).to(tl.int64)
    row = first_row + position - begin
    is_pad = row >= end

    # The last image that begins at or before the row decides what the row is.
    image = lower_bound(image_begin_ptr, row + 1, num_images, image_steps)
    stop = tl.load(image_start_ptr + image).to(tl.int64)
    has_image = image > 0
    image_first = tl.load(image_begin_ptr + image - 1, mask=has_image, other=0).to(tl.int64)
    image_row = tl.load(image_start_ptr + image - 1, mask=has_image, other=0) + row - image_first
    is_image = has_image & (image_row < stop)
    token = tl.where(is_image, row - image_row + image - 1, row - stop + image)
    token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
    source = tl.where(is_image, -2 - image_row, token)
    is_text = (is_image | is_pad) == 0
    tl.store(source_ptr + local, tl.where(is_pad, PAD, source).to(tl.int32), mask=live)
    tl.store(position_ids_ptr + local, position - begin, mask=live)
    ids = tl.load(input_ids_ptr + token, mask=live & is_text, other=0)
    tl.store(token_ids_ptr + local, ids, mask=live)

    # A token's last row predicts the next token, unless that is an image of the same sequence.
    next_image = tl.load(image_begin_ptr + image, mask=image < num_images, other=-1).to(tl.int64)
    trains = (((next_image == row + 1) & (row + 1 < end)) | is_pad) == 0
    if HAS_LABELS:
        is_last_row = (is_image == 0) | (image_row == stop - 1)
        label = tl.load(labels_ptr + token, mask=live & trains & is_last_row, other=IGNORE)
        leaked = (label == image_token_id) & (row + 1 == end) & (token + 1 < num_tokens)
        trains = trains & (leaked == 0)
        tl.store(new_labels_ptr + local, tl.where(leaked, IGNORE, label), mask=live)
    if HAS_LOSS_MASK:
        keep = live & trains & is_text
        tl.store(
            new_loss_mask_ptr + local, tl.load(loss_mask_ptr + token, mask=keep, other=0), mask=live
        )


def expand_tokens(
    input_ids,
    labels,
    loss_mask,
    image_begin,
    image_start,
    row_starts,
    cu_seqlens_padded,
    image_token_id,
    num_rows,
    cp_size,
    cp_rank,
):
    """Launch the kernel; arguments and results are those of ``reference.expand_tokens``."""
    size = num_rows // cp_size
    num_images, num_seqs = image_begin.numel(), row_starts.numel() - 2
    source = row_starts.new_empty(size)
    position_ids = row_starts.new_empty(size, dtype=torch.int64)
    token_ids = input_ids.new_empty(size)
    new_labels = input_ids.new_empty(0) if labels is None else labels.new_empty(size)
    new_loss_mask = input_ids.new_empty(0) if loss_mask is None else loss_mask.new_empty(size)
    block = 256
    expand_tokens_kernel[(triton.cdiv(size, block),)](
        input_ids,
        input_ids if labels is None else labels,
        input_ids if loss_mask is None else loss_mask,
        image_begin,
        image_start,
        row_starts,
        cu_seqlens_padded,
        source,
        position_ids,
        token_ids,
        new_labels,
        new_loss_mask,
        input_ids.numel(),
        num_images,
        num_seqs,
        image_token_id,
        num_rows,
        cp_size,
        cp_rank,
        num_steps(num_images),
        num_steps(num_seqs + 2),
        HAS_LABELS=labels is not None,
        HAS_LOSS_MASK=loss_mask is not None,
        BLOCK=block,
    )
    return source, position_ids, token_ids, new_labels, new_loss_mask
