"""Where every token, image and sequence of a packed row goes, in one launch.

One CTA walks the row with a carry: over its tokens, its images, its tokens again, its boundaries.
Whatever the inputs hold, it stays in bounds and terminates. ``reference.layout`` says the same in
plain torch: read it first.

Two outputs serve as scratch until their own pass writes them:

    buffer           after tokens              after images               after tokens again
    expanded_start   placeholders before t     the same                   where token t starts
    cu_image_rows    the token of each image   image rows before each     the same
"""

import torch
import triton
import triton.language as tl

from .search import lower_bound, num_steps

INT32_MAX = tl.constexpr(2**31 - 1)

# What can be wrong, in the order in which it is reported: the numbers of ``faults.Fault``.
START, DECREASING, TOO_FEW_IMAGES, TOO_MANY_IMAGES, TOKENS_PER_IMAGE, OVERFLOW = (
    tl.constexpr(fault) for fault in range(1, 7)
)
IMAGE_ROWS, OTHER_SPACE, PAST_END, REAL_LENGTH, NO_ROOM = (
    tl.constexpr(fault) for fault in range(7, 12)
)


@triton.jit
def _int32(value):
    return tl.minimum(value, INT32_MAX).to(tl.int32)


@triton.jit
def _count_placeholders(
    input_ids_ptr, count_ptr, placeholder_ptr, num_tokens, num_images, image_token_id,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write how many placeholders precede each token, and the token of each of the first N + 1;
    return how many there are, and the end of the last one."""
    count = tl.full([], 0, tl.int32)
    images_end = tl.zeros([BLOCK], tl.int32)
    token = tl.arange(0, BLOCK)
    ids = tl.load(input_ids_ptr + token, mask=token < num_tokens, other=0)
    for begin in range(0, num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        live = token < num_tokens
        following = token + BLOCK  # the next block is on its way while this one is counted
        next_ids = tl.load(input_ids_ptr + following, mask=following < num_tokens, other=0)
        is_image = live & (ids == image_token_id)
        one = is_image.to(tl.int32)
        before = count + tl.cumsum(one, 0) - one
        tl.store(count_ptr + token, before, mask=live)
        tl.store(placeholder_ptr + before, token, mask=is_image & (before <= num_images))
        images_end = tl.maximum(images_end, tl.where(is_image, token + 1, 0))
        count += tl.sum(one, 0)
        ids = next_ids
    return count, tl.max(images_end, 0)


@triton.jit
def _place_images(
    tokens_per_image_ptr, placeholder_ptr, image_start_ptr, num_images, count, BLOCK: tl.constexpr
):
    """Write where each image starts; overwrite its placeholder's token with how many image rows are
    before it. Return how many image rows there are, and the first image that has none."""
    image_rows = tl.full([], 0, tl.int64)
    empty = tl.full([], 0, tl.int32) + num_images
    for begin in range(0, num_images, BLOCK):
        image = begin + tl.arange(0, BLOCK)
        matched = image < tl.minimum(count, num_images)
        token = tl.load(placeholder_ptr + image, mask=matched, other=0)
        given = tl.load(tokens_per_image_ptr + image, mask=matched, other=1).to(tl.int64)
        empty = tl.minimum(empty, tl.min(tl.where(given < 1, image, num_images), 0))
        rows = tl.where(matched, tl.minimum(tl.maximum(given, 1), INT32_MAX), 0)
        before = image_rows + tl.cumsum(rows, 0) - rows
        tl.store(image_start_ptr + image, _int32(token + before - image), mask=matched)
        tl.store(placeholder_ptr + image, _int32(before), mask=matched)
        image_rows += tl.sum(rows, 0)
    return image_rows, empty


@triton.jit
def _place_tokens(
    count_ptr, image_start_ptr, cu_image_rows_ptr, num_tokens, num_images, count, image_rows, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write where each token starts, over its count; images without a placeholder hold no rows."""
    for begin in range(0, num_images + 1, BLOCK):
        image = begin + tl.arange(0, BLOCK)
        spare = image >= tl.minimum(count, num_images)
        tl.store(image_start_ptr + image, _int32(total), mask=spare & (image < num_images))
        tl.store(cu_image_rows_ptr + image, _int32(image_rows), mask=spare & (image <= num_images))
    tl.debug_barrier()
    for begin in range(0, num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        live = token < num_tokens
        images = tl.minimum(tl.load(count_ptr + token, mask=live, other=0), num_images)
        rows = tl.load(cu_image_rows_ptr + images, mask=live, other=0).to(tl.int64)
        tl.store(count_ptr + token, _int32(token - images + rows), mask=live)
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
    longest_row,
    num_rows,
    seq_multiple,
    token_steps,
    EXPANDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write every boundary; return the length of all padded sequences, the longest of them with the
    tail, and the first boundary that lies inside an image."""
    padded_rows = tl.full([], 0, tl.int64)
    real_rows = tl.full([], 0, tl.int64)
    real_tokens = tl.full([], 0, tl.int64)
    longest = tl.full([], 0, tl.int64)
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
            between = live & ((is_start | (edge == longest_row)) == 0)
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
        done = padded_rows + tl.cumsum(padded, 0)
        first = tl.minimum(done - padded, num_rows)
        room = tl.minimum(done, num_rows) - first
        longest = tl.maximum(longest, tl.max(room, 0))
        rows = tl.where(has_end, tl.minimum(tl.maximum(real_end - start, 0), room), 0)
        tokens = tl.where(has_end, tl.maximum(token_end - token, 0), 0)
        tl.store(cu_padded_ptr + seq, _int32(first), mask=live)
        tl.store(cu_expanded_ptr + seq, _int32(real_rows + tl.cumsum(rows, 0) - rows), mask=live)
        before = real_tokens + tl.cumsum(tokens, 0) - tokens
        tl.store(cu_collapsed_ptr + seq, _int32(before), mask=live)
        padded_rows += tl.sum(padded, 0)
        real_rows += tl.sum(rows, 0)
        real_tokens += tl.sum(tokens, 0)
    tl.store(seq_start_collapsed_ptr + num_seqs + 1, num_tokens)
    tl.store(seq_start_expanded_ptr + num_seqs + 1, _int32(total))
    tl.store(cu_padded_ptr + num_seqs + 1, num_rows)
    tail = num_rows - tl.minimum(padded_rows, num_rows)
    return padded_rows, tl.maximum(longest, tail), inside_image


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
    "num_tokens", "num_seqs", "num_images", "image_token_id", "num_image_rows", "longest_row",
    "num_rows", "seq_multiple", "token_steps", "strict", "truncate",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def layout_kernel(
    input_ids_ptr,  # [T]
    cu_seqlens_ptr,  # [B + 1] int32, real
    cu_physical_ptr,  # [B + 1] int32, physical offsets in the same space
    tokens_per_image_ptr,  # [N]
    expanded_start_ptr,  # [T + 1] int32, out
    image_start_ptr,  # [N] int32, out
    cu_image_rows_ptr,  # [N + 1] int32, out
    seq_start_collapsed_ptr,  # [B + 2] int32, out
    seq_start_expanded_ptr,  # [B + 2] int32, out
    cu_collapsed_ptr,  # [B + 1] int32, out
    cu_expanded_ptr,  # [B + 1] int32, out
    cu_padded_ptr,  # [B + 2] int32, out
    status_ptr,  # [6] int64, out: fault, where, found, expected, max_seqlen, num_image_rows
    num_tokens,
    num_seqs,
    num_images,
    image_token_id,
    num_image_rows,  # -1: not known
    longest_row,  # where the data path cut its row: a boundary there may lie in an image; -1: none
    num_rows,  # to lay out
    seq_multiple,  # every sequence is padded to a multiple of it
    token_steps,  # halvings of a search over tokens
    strict,  # whether boundaries that are unlikely in their space are a fault
    truncate,  # whether sequences beyond num_rows are cut off, else a fault
    EXPANDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # Every barrier is there because other threads of this CTA wrote what comes next.
    count, images_end = _count_placeholders(
        input_ids_ptr, expanded_start_ptr, cu_image_rows_ptr, num_tokens, num_images,
        image_token_id, BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()
    unmatched = tl.load(cu_image_rows_ptr + num_images)
    image_rows, empty = _place_images(
        tokens_per_image_ptr, cu_image_rows_ptr, image_start_ptr, num_images, count, BLOCK_B
    )
    total = image_rows + num_tokens - tl.minimum(count, num_images)
    tl.debug_barrier()
    _place_tokens(
        expanded_start_ptr, image_start_ptr, cu_image_rows_ptr, num_tokens, num_images, count,
        image_rows, total, BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()
    negative, shrinking, longer = _check_lengths(cu_seqlens_ptr, cu_physical_ptr, num_seqs, BLOCK_B)
    padded_rows, longest, inside_image = _place_sequences(
        cu_seqlens_ptr, cu_physical_ptr, expanded_start_ptr,
        seq_start_collapsed_ptr, seq_start_expanded_ptr,
        cu_collapsed_ptr, cu_expanded_ptr, cu_padded_ptr,
        num_tokens, num_seqs, total, longest_row, num_rows, seq_multiple, token_steps,
        EXPANDED, BLOCK_B,
    )  # fmt: skip

    # Whether boundaries could count what they are said to count: see ``space.find_space``.
    zero = tl.full([], 0, tl.int64)
    last = tl.load(cu_physical_ptr + num_seqs).to(tl.int64)
    could_be_collapsed = (last <= num_tokens) & (last >= images_end)
    if EXPANDED:
        end = total
        covers = (last >= tl.load(expanded_start_ptr + images_end)) | (last == longest_row)
        fits = covers & (inside_image > num_seqs)
        is_other = (fits == 0) & ((strict != 0) | could_be_collapsed)
    else:
        end = zero + num_tokens
        is_other = (strict != 0) & (last < images_end)

    # The first fault, in the order of ``faults.Fault``.
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
    known = zero + num_image_rows
    differs = (known >= 0) & (image_rows != known)
    fault = _report(status_ptr, fault, differs, IMAGE_ROWS, zero, image_rows, known)
    fault = _report(status_ptr, fault, is_other, OTHER_SPACE, inside_image, last, zero + images_end)
    fault = _report(status_ptr, fault, last > end, PAST_END, zero, last, end)
    length = _length(cu_seqlens_ptr, longer, num_seqs)
    room = _length(cu_physical_ptr, longer, num_seqs)
    fault = _report(status_ptr, fault, longer < num_seqs, REAL_LENGTH, longer, length, room)
    rows = zero + num_rows
    overflows = (padded_rows > rows) & (truncate == 0)
    fault = _report(status_ptr, fault, overflows, NO_ROOM, zero, padded_rows, rows)
    tl.store(status_ptr, fault)
    tl.store(status_ptr + 4, longest)
    tl.store(status_ptr + 5, image_rows)


def layout(
    input_ids,
    cu_seqlens,
    cu_seqlens_padded,
    tokens_per_image,
    image_token_id,
    expanded,
    strict,
    num_image_rows,
    longest_row,
    num_rows,
    seq_multiple,
    truncate,
    block_t=4096,
    block_b=1024,
):
    """Launch ``layout_kernel``; arguments and results are those of ``reference.layout``."""
    num_tokens, num_seqs = input_ids.numel(), cu_seqlens.numel() - 1
    num_images = tokens_per_image.numel()
    sizes = (
        num_tokens + 1, num_images, num_images + 1, num_seqs + 2, num_seqs + 2, num_seqs + 1,
        num_seqs + 1, num_seqs + 2,
    )  # fmt: skip
    outputs = *map(cu_seqlens.new_empty, sizes), cu_seqlens.new_empty(6, dtype=torch.int64)
    with torch.cuda.device_of(input_ids):
        layout_kernel[(1,)](
            input_ids,
            cu_seqlens,
            cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded,
            tokens_per_image,
            *outputs,
            num_tokens,
            num_seqs,
            num_images,
            image_token_id,
            num_image_rows,
            longest_row,
            num_rows,
            seq_multiple,
            num_steps(num_tokens + 1),
            int(strict),
            int(truncate),
            EXPANDED=expanded,
            BLOCK_T=block_t,
            BLOCK_B=block_b,
            num_warps=16,
        )
    return outputs
