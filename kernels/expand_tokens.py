"""What stands at every position of a rank: source row, position id, token, label, loss mask."""

import torch
import triton
import triton.language as tl

from .search import last_at_or_below, lower_bound, num_steps

PAD = tl.constexpr(-1)
FIRST_IMAGE_ROW = tl.constexpr(-2)
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
    image_start_ptr,  # [N] int32
    cu_image_rows_ptr,  # [N + 1] int32
    seq_start_ptr,  # [B + 2] int32, in the unpadded row
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
    unpadded = tl.load(seq_start_ptr + seq).to(tl.int64) + position - begin
    seq_end = tl.load(seq_start_ptr + seq + 1).to(tl.int64)
    is_pad = unpadded >= seq_end

    # The last image that starts at or before a position decides what stands there.
    image = lower_bound(image_start_ptr, unpadded + 1, num_images, image_steps)
    rows_before = tl.load(cu_image_rows_ptr + image).to(tl.int64)  # of all images up to that one
    has_image = image > 0
    start = tl.load(image_start_ptr + image - 1, mask=has_image, other=0).to(tl.int64)
    image_row = tl.load(cu_image_rows_ptr + image - 1, mask=has_image, other=0) + unpadded - start
    is_image = has_image & (image_row < rows_before)
    token = tl.where(is_image, unpadded - image_row + image - 1, unpadded - rows_before + image)
    token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
    source = tl.where(is_image, FIRST_IMAGE_ROW - image_row, token)
    is_text = (is_image | is_pad) == 0
    tl.store(source_ptr + local, tl.where(is_pad, PAD, source).to(tl.int32), mask=live)
    tl.store(position_ids_ptr + local, position - begin, mask=live)
    ids = tl.load(input_ids_ptr + token, mask=live & is_text, other=0)
    tl.store(token_ids_ptr + local, ids, mask=live)

    # The last row of a token predicts the next one, unless that is an image of the same sequence.
    next_start = tl.load(image_start_ptr + image, mask=image < num_images, other=-1).to(tl.int64)
    before_image = (next_start == unpadded + 1) & (unpadded + 1 < seq_end)
    trains = (before_image | is_pad) == 0
    if HAS_LABELS:
        is_last_row = (is_image == 0) | (image_row == rows_before - 1)
        label = tl.load(labels_ptr + token, mask=live & trains & is_last_row, other=IGNORE)
        # A row-wide shift made this one: the next sequence begins with an image.
        leaked = (label == image_token_id) & (unpadded + 1 == seq_end) & (token + 1 < num_tokens)
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
    expanded_start,
    image_start,
    cu_image_rows,
    seq_start_expanded,
    cu_seqlens_padded,
    image_token_id,
    num_rows,
    cp_size,
    cp_rank,
):
    """Launch the kernel; arguments and results are those of ``reference.expand_tokens``."""
    size = num_rows // cp_size
    num_images, num_seqs = image_start.numel(), seq_start_expanded.numel() - 2
    source = cu_seqlens_padded.new_empty(size)
    position_ids = cu_seqlens_padded.new_empty(size, dtype=torch.int64)
    token_ids = input_ids.new_empty(size)
    new_labels = input_ids.new_empty(0) if labels is None else labels.new_empty(size)
    new_loss_mask = input_ids.new_empty(0) if loss_mask is None else loss_mask.new_empty(size)
    block = 256
    with torch.cuda.device_of(input_ids):
        expand_tokens_kernel[(triton.cdiv(size, block),)](
            input_ids,
            input_ids if labels is None else labels,
            input_ids if loss_mask is None else loss_mask,
            image_start,
            cu_image_rows,
            seq_start_expanded,
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
