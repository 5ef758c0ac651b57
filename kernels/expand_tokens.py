"""What stands at every position of a rank: its source, position id, token, label, loss mask."""

import torch
import triton
import triton.language as tl

from . import parts
from .search import last_at_or_below, lower_bound, num_steps

PAD = tl.constexpr(-1)
FIRST_IMAGE = tl.constexpr(-2)
IGNORE_INDEX = tl.constexpr(-100)

_INTEGERS = (
    "num_tokens", "num_images", "num_seqs", "image_token_id", "num_positions", "cp_size", "cp_rank",
    "image_steps", "seq_steps",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def expand_tokens_kernel(
    layout_ptr,  # int32, the parts of a layout
    labels_ptr,  # [T] or unused
    loss_mask_ptr,  # [T] or unused
    source_ptr,  # [P] int32, out
    position_ids_ptr,  # [P] int64, out
    token_ids_ptr,  # [P] int64, out
    new_labels_ptr,  # [P] or unused, out
    new_loss_mask_ptr,  # [P] or unused, out
    num_tokens,
    num_images,
    num_seqs,
    image_token_id,
    num_positions,
    cp_size,
    cp_rank,
    image_steps,
    seq_steps,
    HAS_LABELS: tl.constexpr,
    HAS_LOSS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    input_ids_ptr = parts.input_ids(layout_ptr, num_seqs)
    image_start_ptr = parts.image_start(layout_ptr, num_seqs, num_tokens)
    cu_image_ptr = parts.cu_image_embeddings(layout_ptr, num_seqs, num_tokens, num_images)
    seq_start_ptr = parts.seq_start_expanded(layout_ptr, num_seqs)
    cu_padded_ptr = parts.cu_seqlens_padded(layout_ptr, num_seqs)
    local = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = local < num_positions // cp_size

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
    until = tl.load(cu_image_ptr + image).to(tl.int64)  # embeddings of all images up to that one
    has_image = image > 0
    start = tl.load(image_start_ptr + image - 1, mask=has_image, other=0).to(tl.int64)
    embedding = tl.load(cu_image_ptr + image - 1, mask=has_image, other=0) + unpadded - start
    is_image = has_image & (embedding < until)
    token = tl.where(is_image, unpadded - embedding + image - 1, unpadded - until + image)
    token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
    source = tl.where(is_image, FIRST_IMAGE - embedding, token)
    is_text = (is_image | is_pad) == 0
    tl.store(source_ptr + local, tl.where(is_pad, PAD, source).to(tl.int32), mask=live)
    tl.store(position_ids_ptr + local, position - begin, mask=live)
    ids = tl.load(input_ids_ptr + token, mask=live & is_text, other=0)
    tl.store(token_ids_ptr + local, ids.to(tl.int64), mask=live)

    # The last position of a token predicts the next one, unless that is an image of the same
    # sequence.
    next_start = tl.load(image_start_ptr + image, mask=image < num_images, other=-1).to(tl.int64)
    before_image = (next_start == unpadded + 1) & (unpadded + 1 < seq_end)
    trains = (before_image | is_pad) == 0
    if HAS_LABELS:
        is_last = (is_image == 0) | (embedding == until - 1)
        label = tl.load(labels_ptr + token, mask=live & trains & is_last, other=IGNORE_INDEX)
        # A row-wide shift made this one: the next sequence begins with an image.
        leaked = (label == image_token_id) & (unpadded + 1 == seq_end) & (token + 1 < num_tokens)
        trains = trains & (leaked == 0)
        tl.store(new_labels_ptr + local, tl.where(leaked, IGNORE_INDEX, label), mask=live)
    if HAS_LOSS_MASK:
        keep = live & trains & is_text
        tl.store(
            new_loss_mask_ptr + local, tl.load(loss_mask_ptr + token, mask=keep, other=0), mask=live
        )


def expand_tokens(
    layout,
    labels,
    loss_mask,
    num_tokens,
    num_images,
    num_seqs,
    image_token_id,
    num_positions,
    cp_size,
    cp_rank,
):
    """Launch the kernel; arguments and results are those of ``reference.expand_tokens``."""
    size = num_positions // cp_size
    source = layout.new_empty(size)
    position_ids = layout.new_empty(size, dtype=torch.int64)
    token_ids = layout.new_empty(size, dtype=torch.int64)
    of_none = layout.new_empty(0, dtype=torch.int64)
    new_labels = of_none if labels is None else labels.new_empty(size)
    new_loss_mask = of_none.clone() if loss_mask is None else loss_mask.new_empty(size)
    block = 256
    with torch.cuda.device_of(layout):
        expand_tokens_kernel[(triton.cdiv(size, block),)](
            layout,
            layout if labels is None else labels,
            layout if loss_mask is None else loss_mask,
            source,
            position_ids,
            token_ids,
            new_labels,
            new_loss_mask,
            num_tokens,
            num_images,
            num_seqs,
            image_token_id,
            num_positions,
            cp_size,
            cp_rank,
            num_steps(num_images),
            num_steps(num_seqs + 2),
            HAS_LABELS=labels is not None,
            HAS_LOSS_MASK=loss_mask is not None,
            BLOCK=block,
        )
    return source, position_ids, token_ids, new_labels, new_loss_mask
