"""Where every token, image and sequence of a packed row goes, in one launch.

One CTA walks the row with a carry: over its tokens, its images, its tokens again, its boundaries.
Whatever the inputs hold, it stays in bounds and terminates. ``reference.layout`` says the same in
plain NumPy: read it first.

The part ``expanded_start`` serves as scratch: it holds how many placeholders precede each token
until its own pass makes that the position where the token starts.
"""

import torch
import triton
import triton.language as tl

from . import parts
from .search import lower_bound, num_steps

INT32_MAX = tl.constexpr(2**31 - 1)

# What can be wrong, in the order in which it is reported: the numbers of ``errors.Fault``.
START, DECREASING, TOO_FEW_IMAGES, TOO_MANY_IMAGES, TOKENS_PER_IMAGE, OVERFLOW = (
    tl.constexpr(fault) for fault in range(1, 7)
)
IMAGE_EMBEDDINGS, OTHER_SPACE, PAST_END, REAL_LENGTH, NO_ROOM = (
    tl.constexpr(fault) for fault in range(7, 12)
)


@triton.jit
def _int32(value):
    return tl.minimum(value, INT32_MAX).to(tl.int32)


@triton.jit
def _count_block(ids, count, image_token_id):
    """How many placeholders precede each token of a block, and are there up to its end."""
    one = (ids == image_token_id).to(tl.int32)
    upto = tl.cumsum(one, 0)
    return count + upto - one, count + tl.sum(one, 0)


@triton.jit
def _count_placeholders(
    input_ids_ptr, copy_ptr, count_ptr, num_tokens, image_token_id, BLOCK: tl.constexpr
):
    """Copy the ids; write how many placeholders precede each token, and the end of the row; return
    how many there are."""
    count = tl.full([], 0, tl.int32)
    whole = num_tokens // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    if whole > 0:
        ids = tl.load(input_ids_ptr + lane)
        for begin in range(0, whole, BLOCK):
            following = tl.minimum(begin + BLOCK, whole - BLOCK)
            next_ids = tl.load(input_ids_ptr + following + lane)  # under way while this is counted
            before, count = _count_block(ids, count, image_token_id)
            tl.store(count_ptr + begin + lane, before)
            tl.store(copy_ptr + begin + lane, ids.to(tl.int32))
            ids = next_ids
    if whole < num_tokens:
        token = whole + lane
        live = token < num_tokens
        ids = tl.load(input_ids_ptr + token, mask=live, other=0)
        one = (live & (ids == image_token_id)).to(tl.int32)
        tl.store(count_ptr + token, count + tl.cumsum(one, 0) - one, mask=live)
        tl.store(copy_ptr + token, ids.to(tl.int32), mask=live)
        count += tl.sum(one, 0)
    tl.store(count_ptr + num_tokens, count)
    return count


@triton.jit
def _token_behind(count_ptr, images, num_tokens, token_steps):
    """The token behind the last of the first so many placeholders, 0 for none."""
    return lower_bound(count_ptr, images.to(tl.int64), num_tokens + 1, token_steps)


@triton.jit
def _place_images(
    tokens_per_image_ptr, count_ptr, image_start_ptr, cu_image_ptr, num_tokens, num_images, count,
    token_steps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write where each image starts, and how many embeddings are before it; return how many there
    are, and the first image that has none."""
    embeddings = tl.full([], 0, tl.int64)
    empty = tl.full([], 0, tl.int32) + num_images
    for begin in range(0, num_images, BLOCK):
        image = begin + tl.arange(0, BLOCK)
        matched = image < tl.minimum(count, num_images)
        token = _token_behind(count_ptr, image + 1, num_tokens, token_steps) - 1
        given = tl.load(tokens_per_image_ptr + image, mask=image < num_images, other=1).to(tl.int64)
        wrong = matched & (given < 1)
        empty = tl.minimum(empty, tl.min(tl.where(wrong, image, num_images), 0))
        width = tl.where(matched, tl.minimum(tl.maximum(given, 1), INT32_MAX), 0)
        before = embeddings + tl.cumsum(width, 0) - width
        tl.store(image_start_ptr + image, _int32(token + before - image), mask=matched)
        tl.store(cu_image_ptr + image, _int32(before), mask=matched)
        embeddings += tl.sum(width, 0)
    return embeddings, empty


@triton.jit
def _fill_up_images(
    image_start_ptr, cu_image_ptr, num_images, count, embeddings, total, BLOCK: tl.constexpr
):
    """Images without a placeholder hold nothing, at the end of the row."""
    for begin in range(0, num_images + 1, BLOCK):
        image = begin + tl.arange(0, BLOCK)
        spare = image >= tl.minimum(count, num_images)
        tl.store(image_start_ptr + image, _int32(total), mask=spare & (image < num_images))
        tl.store(cu_image_ptr + image, _int32(embeddings), mask=spare & (image <= num_images))


@triton.jit
def _place_tokens(count_ptr, cu_image_ptr, num_tokens, num_images, total, BLOCK: tl.constexpr):
    """Write where each token starts, over its count."""
    whole = num_tokens // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for begin in range(0, whole, BLOCK):
        images = tl.minimum(tl.load(count_ptr + begin + lane), num_images)
        embeddings = tl.load(cu_image_ptr + images).to(tl.int64)
        tl.store(count_ptr + begin + lane, _int32(begin + lane - images + embeddings))
    if whole < num_tokens:
        token = whole + lane
        live = token < num_tokens
        images = tl.minimum(tl.load(count_ptr + token, mask=live, other=0), num_images)
        embeddings = tl.load(cu_image_ptr + images, mask=live, other=0).to(tl.int64)
        tl.store(count_ptr + token, _int32(token - images + embeddings), mask=live)
    tl.store(count_ptr + num_tokens, _int32(total))


@triton.jit
def _check_lengths(cu_seqlens_ptr, cu_physical_ptr, num_seqs, BLOCK: tl.constexpr):
    """Return the first sequence whose real length is negative, the first whose padded length is,
    and the first whose real length is more than its padded one."""
    negative = tl.full([], 0, tl.int32) + num_seqs
    shrinking = negative
    longer = negative
    for begin in range(0, num_seqs, BLOCK):
        seq = begin + tl.arange(0, BLOCK)
        live = seq < num_seqs
        room = tl.load(cu_physical_ptr + seq + 1, mask=live, other=0).to(tl.int64)
        room -= tl.load(cu_physical_ptr + seq, mask=live, other=0)
        length = tl.load(cu_seqlens_ptr + seq + 1, mask=live, other=0).to(tl.int64)
        length -= tl.load(cu_seqlens_ptr + seq, mask=live, other=0)
        negative = tl.minimum(negative, tl.min(tl.where(length < 0, seq, num_seqs), 0))
        shrinking = tl.minimum(shrinking, tl.min(tl.where(room < 0, seq, num_seqs), 0))
        longer = tl.minimum(longer, tl.min(tl.where(length > room, seq, num_seqs), 0))
    return negative, shrinking, longer


@triton.jit
def _place_sequences(
    cu_seqlens_ptr,
    cu_physical_ptr,
    expanded_start_ptr,
    seq_start_collapsed_ptr,
    seq_start_expanded_ptr,
    cu_collapsed_ptr,
    cu_expanded_ptr,
    cu_padded_ptr,
    num_tokens,
    num_seqs,
    total,
    cut_at,
    num_positions,
    seq_multiple,
    token_steps,
    EXPANDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write every boundary; return the length of all padded sequences, the longest of them with the
    tail, and the first boundary that lies inside an image."""
    padded_length = tl.full([], 0, tl.int64)
    real_length = tl.full([], 0, tl.int64)
    real_tokens = tl.full([], 0, tl.int64)
    max_seqlen = tl.full([], 0, tl.int64)
    inside_image = tl.full([], 0, tl.int32) + num_seqs + 1
    for begin in range(0, num_seqs + 1, BLOCK):
        seq = begin + tl.arange(0, BLOCK)
        live = seq <= num_seqs
        has_end = seq < num_seqs  # the last one has a begin only: the tail's
        edge = tl.load(cu_physical_ptr + seq, mask=live, other=0).to(tl.int64)
        next_edge = tl.load(cu_physical_ptr + seq + 1, mask=has_end, other=0).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + seq + 1, mask=has_end, other=0).to(tl.int64)
        length -= tl.load(cu_seqlens_ptr + seq, mask=has_end, other=0).to(tl.int64)
        end = edge + tl.maximum(length, 0)
        if EXPANDED:
            start = tl.minimum(tl.maximum(edge, 0), total)
            real_end = tl.minimum(tl.maximum(end, 0), total)
            next_start = tl.minimum(tl.maximum(next_edge, 0), total)
            token = lower_bound(expanded_start_ptr, start, num_tokens + 1, token_steps)
            token_end = lower_bound(expanded_start_ptr, real_end, num_tokens + 1, token_steps)
            is_start = tl.load(expanded_start_ptr + tl.minimum(token, num_tokens)) == edge
            between = live & ((is_start | (edge == cut_at)) == 0)
            inside_image = tl.minimum(inside_image, tl.min(tl.where(between, seq, num_seqs + 1), 0))
        else:
            token = tl.minimum(tl.maximum(edge, 0), num_tokens)
            token_end = tl.minimum(tl.maximum(end, 0), num_tokens)
            next_token = tl.minimum(tl.maximum(next_edge, 0), num_tokens)
            start = tl.load(expanded_start_ptr + token).to(tl.int64)  # <- a boundary moves
            real_end = tl.load(expanded_start_ptr + token_end).to(tl.int64)
            next_start = tl.load(expanded_start_ptr + next_token).to(tl.int64)
        tl.store(seq_start_collapsed_ptr + seq, token.to(tl.int32), mask=live)
        tl.store(seq_start_expanded_ptr + seq, _int32(start), mask=live)

        width = tl.maximum(next_start - start, 0)
        padded = tl.where(has_end, (width + seq_multiple - 1) // seq_multiple * seq_multiple, 0)
        done = padded_length + tl.cumsum(padded, 0)
        first = tl.minimum(done - padded, num_positions)
        room = tl.minimum(done, num_positions) - first
        max_seqlen = tl.maximum(max_seqlen, tl.max(room, 0))
        real = tl.where(has_end, tl.minimum(tl.maximum(real_end - start, 0), room), 0)
        tokens = tl.where(has_end, tl.maximum(token_end - token, 0), 0)
        tl.store(cu_padded_ptr + seq, _int32(first), mask=live)
        tl.store(cu_expanded_ptr + seq, _int32(real_length + tl.cumsum(real, 0) - real), mask=live)
        before = real_tokens + tl.cumsum(tokens, 0) - tokens
        tl.store(cu_collapsed_ptr + seq, _int32(before), mask=live)
        padded_length += tl.sum(padded, 0)
        real_length += tl.sum(real, 0)
        real_tokens += tl.sum(tokens, 0)
    tl.store(seq_start_collapsed_ptr + num_seqs + 1, num_tokens)
    tl.store(seq_start_expanded_ptr + num_seqs + 1, _int32(total))
    tl.store(cu_padded_ptr + num_seqs + 1, num_positions)
    tail = num_positions - tl.minimum(padded_length, num_positions)
    return padded_length, tl.maximum(max_seqlen, tail), inside_image


@triton.jit
def _report(status_ptr, earlier, applies, fault, where, found, expected):
    """Write a fault, unless there was an earlier one; return the earliest."""
    new = applies & (earlier == 0)
    tl.store(status_ptr + 1, where.to(tl.int64), mask=new)
    tl.store(status_ptr + 2, found.to(tl.int64), mask=new)
    tl.store(status_ptr + 3, expected.to(tl.int64), mask=new)
    return tl.where(new, fault, earlier)


@triton.jit
def _length(cu_ptr, seq, num_seqs):
    """cu[seq + 1] - cu[seq], in bounds for any ``seq``."""
    seq = tl.minimum(seq, num_seqs - 1)
    return tl.load(cu_ptr + seq + 1).to(tl.int64) - tl.load(cu_ptr + seq).to(tl.int64)


_INTEGERS = (
    "num_tokens", "num_seqs", "num_images", "image_token_id", "num_image_embeddings", "cut_at",
    "num_positions", "seq_multiple", "token_steps", "truncate",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def layout_kernel(
    input_ids_ptr,  # [T]
    cu_seqlens_ptr,  # [B + 1] int32, real
    cu_physical_ptr,  # [B + 1] int32, physical offsets in the same space
    tokens_per_image_ptr,  # [N]
    layout_ptr,  # int32, out: the parts of a layout, but its header
    status_ptr,  # [6] int64, out: the status among them
    num_tokens,
    num_seqs,
    num_images,
    image_token_id,
    num_image_embeddings,  # -1: not known
    cut_at,  # where the data path cut its row: a boundary there may lie in an image; -1: none
    num_positions,  # to lay out
    seq_multiple,  # every sequence is padded to a multiple of it
    token_steps,  # halvings of a search over tokens
    truncate,  # whether sequences beyond num_positions are cut off, else a fault
    EXPANDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    start_ptr = parts.expanded_start(layout_ptr, num_seqs, num_tokens)
    image_start_ptr = parts.image_start(layout_ptr, num_seqs, num_tokens)
    cu_image_ptr = parts.cu_image_embeddings(layout_ptr, num_seqs, num_tokens, num_images)

    # Every barrier is there because other threads of this CTA wrote what comes next.
    count = _count_placeholders(
        input_ids_ptr, parts.input_ids(layout_ptr, num_seqs), start_ptr, num_tokens, image_token_id,
        BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()
    images_end = _token_behind(start_ptr, count, num_tokens, token_steps)
    unmatched = _token_behind(start_ptr, count * 0 + num_images + 1, num_tokens, token_steps) - 1
    embeddings, empty = _place_images(
        tokens_per_image_ptr, start_ptr, image_start_ptr, cu_image_ptr, num_tokens, num_images,
        count, token_steps, BLOCK_B,
    )  # fmt: skip
    total = embeddings + num_tokens - tl.minimum(count, num_images)
    _fill_up_images(image_start_ptr, cu_image_ptr, num_images, count, embeddings, total, BLOCK_B)
    tl.debug_barrier()
    _place_tokens(start_ptr, cu_image_ptr, num_tokens, num_images, total, BLOCK_T)
    tl.debug_barrier()
    negative, shrinking, longer = _check_lengths(cu_seqlens_ptr, cu_physical_ptr, num_seqs, BLOCK_B)
    padded_length, max_seqlen, inside_image = _place_sequences(
        cu_seqlens_ptr, cu_physical_ptr, start_ptr,
        parts.seq_start_collapsed(layout_ptr, num_seqs),
        parts.seq_start_expanded(layout_ptr, num_seqs),
        parts.cu_seqlens_collapsed(layout_ptr, num_seqs),
        parts.cu_seqlens_expanded(layout_ptr),
        parts.cu_seqlens_padded(layout_ptr, num_seqs),
        num_tokens, num_seqs, total, cut_at, num_positions, seq_multiple, token_steps,
        EXPANDED, BLOCK_B,
    )  # fmt: skip

    # Expanded boundaries are taken at their word, unless they can only be collapsed: see
    # ``reference.spaces_of``.
    zero = tl.full([], 0, tl.int64)
    last = tl.load(cu_physical_ptr + num_seqs).to(tl.int64)
    end = zero + num_tokens
    is_other = zero != 0
    if EXPANDED:
        end = total
        could_be_collapsed = (last <= num_tokens) & (last >= images_end)
        covers = (last >= tl.load(start_ptr + images_end)) | (last == cut_at)
        is_other = could_be_collapsed & ((covers & (inside_image > num_seqs)) == 0)

    # The first fault, in the order of ``errors.Fault``.
    tl.store(status_ptr + 1, zero)
    tl.store(status_ptr + 2, zero)
    tl.store(status_ptr + 3, zero)
    given = zero
    if empty < num_images:
        given = tl.load(tokens_per_image_ptr + empty).to(tl.int64)
    start = tl.load(cu_seqlens_ptr).to(tl.int64)
    fault = _report(status_ptr, zero, start != 0, START, zero, start, zero)
    start = tl.load(cu_physical_ptr).to(tl.int64)
    fault = _report(status_ptr, fault, start != 0, START, zero, start, zero)
    length = _length(cu_seqlens_ptr, negative, num_seqs)
    fault = _report(status_ptr, fault, negative < num_seqs, DECREASING, negative, length, zero)
    length = _length(cu_physical_ptr, shrinking, num_seqs)
    fault = _report(status_ptr, fault, shrinking < num_seqs, DECREASING, shrinking, length, zero)
    too_few, too_many = count > num_images, count < num_images
    images = zero + num_images
    fault = _report(status_ptr, fault, too_few, TOO_FEW_IMAGES, unmatched, images, count)
    fault = _report(status_ptr, fault, too_many, TOO_MANY_IMAGES, zero, images, count)
    fault = _report(status_ptr, fault, empty < num_images, TOKENS_PER_IMAGE, empty, given, zero + 1)
    fault = _report(status_ptr, fault, total > INT32_MAX, OVERFLOW, zero, total, zero + INT32_MAX)
    known = zero + num_image_embeddings
    differs = (known >= 0) & (embeddings != known)
    fault = _report(status_ptr, fault, differs, IMAGE_EMBEDDINGS, zero, embeddings, known)
    fault = _report(status_ptr, fault, is_other, OTHER_SPACE, inside_image, last, images_end)
    fault = _report(status_ptr, fault, last > end, PAST_END, zero, last, end)
    length = _length(cu_seqlens_ptr, longer, num_seqs)
    room = _length(cu_physical_ptr, longer, num_seqs)
    fault = _report(status_ptr, fault, longer < num_seqs, REAL_LENGTH, longer, length, room)
    positions = zero + num_positions
    overflows = (padded_length > positions) & (truncate == 0)
    fault = _report(status_ptr, fault, overflows, NO_ROOM, zero, padded_length, positions)
    tl.store(status_ptr, fault)
    tl.store(status_ptr + 4, max_seqlen)
    tl.store(status_ptr + 5, embeddings)


def layout(
    input_ids,
    cu_seqlens,
    cu_seqlens_padded,
    tokens_per_image,
    image_token_id,
    expanded,
    num_image_embeddings,
    cut_at,
    num_positions,
    seq_multiple,
    truncate,
    block_t=4096,
    block_b=1024,
):
    """Launch ``layout_kernel``; arguments and result are those of ``reference.layout``."""
    num_tokens, num_seqs = input_ids.numel(), cu_seqlens.numel() - 1
    num_images = tokens_per_image.numel()
    out = cu_seqlens.new_empty(parts.size(num_seqs, num_tokens, num_images))
    status = out[parts.HEADER_SIZE.value :][: parts.STATUS_SIZE.value].view(torch.int64)
    with torch.cuda.device_of(input_ids):
        layout_kernel[(1,)](
            input_ids,
            cu_seqlens,
            cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded,
            tokens_per_image,
            out,
            status,
            num_tokens,
            num_seqs,
            num_images,
            image_token_id,
            num_image_embeddings,
            cut_at,
            num_positions,
            seq_multiple,
            num_steps(num_tokens + 1),
            int(truncate),
            EXPANDED=expanded,
            BLOCK_T=block_t,
            BLOCK_B=block_b,
            num_warps=16,
        )
    return out
