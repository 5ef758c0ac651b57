"""Prefix sums over image expansion, the space rule and a row's boundaries, in one launch.

One CTA walks the row with a carry: over its tokens, its images, its tokens again, its boundaries.
Whatever the inputs hold, it stays in bounds and terminates.
"""

import torch
import triton
import triton.language as tl

from .search import lower_bound, num_steps

INT32_MAX = tl.constexpr(2**31 - 1)
MAX_TRAILING_EOS = tl.constexpr(8)
AUTO, COLLAPSED, EXPANDED, SAME = (tl.constexpr(space) for space in range(4))


@triton.jit
def _int32(value):
    return tl.minimum(value, INT32_MAX).to(tl.int32)


@triton.jit
def _count_placeholders(
    input_ids_ptr, rank_ptr, token_ptr, num_tokens, num_images, image_token_id, BLOCK: tl.constexpr
):
    """Write how many placeholders precede each token, and the token of each of the first N + 1;
    return how many there are, and the end of what cannot be trailing padding."""
    last_id = tl.load(input_ids_ptr + num_tokens - 1)
    count = tl.full([], 0, tl.int32)
    vital_end = tl.zeros([BLOCK], tl.int32)
    token = tl.arange(0, BLOCK)
    ids = tl.load(input_ids_ptr + token, mask=token < num_tokens, other=0)
    for begin in range(0, num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        live = token < num_tokens
        following = token + BLOCK  # the next block is on its way while this one is counted
        next_ids = tl.load(input_ids_ptr + following, mask=following < num_tokens, other=0)
        is_image = live & (ids == image_token_id)
        one = is_image.to(tl.int32)
        rank = count + tl.cumsum(one, 0) - one
        tl.store(rank_ptr + token, rank, mask=live)
        tl.store(token_ptr + rank, token, mask=is_image & (rank <= num_images))
        vital = is_image | (live & (ids != last_id))
        vital_end = tl.maximum(vital_end, tl.where(vital, token + 1, 0))
        count += tl.sum(one, 0)
        ids = next_ids
    return count, tl.max(vital_end, 0)


@triton.jit
def _sum_images(
    tokens_per_image_ptr, image_begin_ptr, image_start_ptr, num_images, count, BLOCK: tl.constexpr
):
    """Turn placeholder tokens into the rows where images begin, and prefix sums over their rows;
    return the sum and the first entry that is not positive."""
    total = tl.full([], 0, tl.int64)
    bad = tl.full([], 0, tl.int32) + num_images
    for begin in range(0, num_images, BLOCK):
        image = begin + tl.arange(0, BLOCK)
        matched = image < tl.minimum(count, num_images)
        token = tl.load(image_start_ptr + image, mask=matched, other=0)
        given = tl.load(tokens_per_image_ptr + image, mask=matched, other=1).to(tl.int64)
        bad = tl.minimum(bad, tl.min(tl.where(given < 1, image, num_images), 0))
        rows = tl.where(matched, tl.minimum(tl.maximum(given, 1), INT32_MAX), 0)
        start = total + tl.cumsum(rows, 0) - rows
        tl.store(image_begin_ptr + image, _int32(token + start - image), mask=matched)
        tl.store(image_start_ptr + image, _int32(start), mask=matched)
        total += tl.sum(rows, 0)
    return total, bad


@triton.jit
def _expand_starts(
    rank_ptr, image_begin_ptr, image_start_ptr, num_tokens, num_images, count, image_rows, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn ranks into expanded starts, in place; entries without a placeholder hold no rows."""
    for begin in range(0, num_images + 1, BLOCK):
        image = begin + tl.arange(0, BLOCK)
        spare = image >= tl.minimum(count, num_images)
        tl.store(image_begin_ptr + image, _int32(total), mask=spare & (image < num_images))
        tl.store(image_start_ptr + image, _int32(image_rows), mask=spare & (image <= num_images))
    tl.debug_barrier()
    for begin in range(0, num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        live = token < num_tokens
        rank = tl.minimum(tl.load(rank_ptr + token, mask=live, other=0), num_images)
        start = tl.load(image_start_ptr + rank, mask=live, other=0).to(tl.int64)
        tl.store(rank_ptr + token, _int32(start + token - rank), mask=live)
    tl.store(rank_ptr + num_tokens, _int32(total))


@triton.jit
def _check_boundaries(cu_seqlens_ptr, physical_ptr, num_seqs, BLOCK: tl.constexpr):
    """Return the first sequence of negative length, of negative room, of more length than room."""
    negative = tl.full([], 0, tl.int32) + num_seqs
    shrinking = negative
    longer = negative
    for begin in range(0, num_seqs, BLOCK):
        seq = begin + tl.arange(0, BLOCK)
        live = seq < num_seqs
        room = tl.load(physical_ptr + seq + 1, mask=live, other=0).to(tl.int64)
        room -= tl.load(physical_ptr + seq, mask=live, other=0)
        length = tl.load(cu_seqlens_ptr + seq + 1, mask=live, other=0).to(tl.int64)
        length -= tl.load(cu_seqlens_ptr + seq, mask=live, other=0)
        negative = tl.minimum(negative, tl.min(tl.where(length < 0, seq, num_seqs), 0))
        shrinking = tl.minimum(shrinking, tl.min(tl.where(room < 0, seq, num_seqs), 0))
        longer = tl.minimum(longer, tl.min(tl.where(length > room, seq, num_seqs), 0))
    return negative, shrinking, longer


@triton.jit
def _count_illegal(
    physical_ptr, expanded_start_ptr, num_tokens, num_seqs, token_steps, BLOCK: tl.constexpr
):
    """Return how many boundaries are no value of ``expanded_start``."""
    illegal = tl.full([], 0, tl.int32)
    for begin in range(0, num_seqs + 1, BLOCK):
        seq = begin + tl.arange(0, BLOCK)
        live = seq <= num_seqs
        edge = tl.load(physical_ptr + seq, mask=live, other=0).to(tl.int64)
        token = lower_bound(expanded_start_ptr, edge, num_tokens + 1, token_steps)
        start = tl.load(expanded_start_ptr + tl.minimum(token, num_tokens)).to(tl.int64)
        illegal += tl.sum((live & (start != edge)).to(tl.int32), 0)
    return illegal


@triton.jit
def _find_space(last, num_tokens, total, vital_rows, num_vital, illegal):
    """The seven rules, from the last to the first."""
    surplus = last - vital_rows
    space = tl.full([], 0, tl.int32)
    few = (last != num_tokens) & (surplus <= MAX_TRAILING_EOS)
    space = tl.where(few & (vital_rows - num_vital > MAX_TRAILING_EOS), EXPANDED, space)
    space = tl.where((last == num_tokens) & (surplus > MAX_TRAILING_EOS), COLLAPSED, space)
    space = tl.where(illegal > 0, COLLAPSED, space)
    space = tl.where(last < vital_rows, COLLAPSED, space)
    space = tl.where(last > num_tokens, EXPANDED, space)
    return tl.where(total == num_tokens, SAME, space)


@triton.jit
def _place_sequences(
    cu_seqlens_ptr,
    physical_ptr,
    expanded_start_ptr,
    token_starts_ptr,
    row_starts_ptr,
    cu_collapsed_ptr,
    cu_expanded_ptr,
    cu_padded_ptr,
    num_tokens,
    num_seqs,
    total,
    space,
    num_rows,
    seq_multiple,
    token_steps,
    BLOCK: tl.constexpr,
):
    """Write every boundary; return how many physical rows the row asks for."""
    padded_rows = tl.full([], 0, tl.int64)
    real_rows = tl.full([], 0, tl.int64)
    real_tokens = tl.full([], 0, tl.int64)
    tail = tl.full([], 0, tl.int64)
    for begin in range(0, num_seqs + 1, BLOCK):
        seq = begin + tl.arange(0, BLOCK)
        live = seq <= num_seqs
        inside = seq < num_seqs
        edge = tl.load(physical_ptr + seq, mask=live, other=0).to(tl.int64)
        following = tl.load(physical_ptr + seq + 1, mask=inside, other=0).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + seq + 1, mask=inside, other=0).to(tl.int64)
        length -= tl.load(cu_seqlens_ptr + seq, mask=inside, other=0).to(tl.int64)
        end = edge + tl.maximum(length, 0)
        if space == EXPANDED:
            row = tl.minimum(tl.maximum(edge, 0), total)
            row_end = tl.minimum(tl.maximum(end, 0), total)
            next_row = tl.minimum(tl.maximum(following, 0), total)
            token = lower_bound(expanded_start_ptr, row, num_tokens + 1, token_steps)
            token_end = lower_bound(expanded_start_ptr, row_end, num_tokens + 1, token_steps)
        else:
            token = tl.minimum(tl.maximum(edge, 0), num_tokens)
            token_end = tl.minimum(tl.maximum(end, 0), num_tokens)
            next_token = tl.minimum(tl.maximum(following, 0), num_tokens)
            row = tl.load(expanded_start_ptr + token).to(tl.int64)
            row_end = tl.load(expanded_start_ptr + token_end).to(tl.int64)
            next_row = tl.load(expanded_start_ptr + next_token).to(tl.int64)
        tl.store(token_starts_ptr + seq, token.to(tl.int32), mask=live)
        tl.store(row_starts_ptr + seq, _int32(row), mask=live)
        tail += tl.sum(tl.where(seq == num_seqs, total - row, 0), 0)

        width = tl.maximum(next_row - row, 0)
        padded = tl.where(inside, (width + seq_multiple - 1) // seq_multiple * seq_multiple, 0)
        first = tl.minimum(padded_rows + tl.cumsum(padded, 0) - padded, num_rows)
        room = tl.minimum(padded_rows + tl.cumsum(padded, 0), num_rows) - first
        rows = tl.where(inside, tl.minimum(tl.maximum(row_end - row, 0), room), 0)
        tokens = tl.where(inside, tl.maximum(token_end - token, 0), 0)
        tl.store(cu_padded_ptr + seq, _int32(first), mask=live)
        tl.store(cu_expanded_ptr + seq, _int32(real_rows + tl.cumsum(rows, 0) - rows), mask=live)
        done = real_tokens + tl.cumsum(tokens, 0) - tokens
        tl.store(cu_collapsed_ptr + seq, _int32(done), mask=live)
        padded_rows += tl.sum(padded, 0)
        real_rows += tl.sum(rows, 0)
        real_tokens += tl.sum(tokens, 0)
    tl.store(token_starts_ptr + num_seqs + 1, num_tokens)
    tl.store(row_starts_ptr + num_seqs + 1, _int32(total))
    tl.store(cu_padded_ptr + num_seqs + 1, num_rows)
    return padded_rows + tail


@triton.jit
def _note(old_fault, old_where, old_found, old_expected, applies, fault, where, found, expected):
    """The first fault stays."""
    new = (old_fault == 0) & applies
    return (
        tl.where(new, fault, old_fault),
        tl.where(new, where, old_where),
        tl.where(new, found, old_found),
        tl.where(new, expected, old_expected),
    )


@triton.jit
def _difference(ptr, index, size):
    """ptr[index + 1] - ptr[index], in bounds for any index."""
    index = tl.minimum(index, size - 1)
    return tl.load(ptr + index + 1).to(tl.int64) - tl.load(ptr + index).to(tl.int64)


_INTEGERS = (
    "num_tokens", "num_seqs", "num_images", "image_token_id", "space", "num_image_rows", "num_rows",
    "seq_multiple", "token_steps",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def layout_kernel(
    input_ids_ptr,  # [T]
    cu_seqlens_ptr,  # [B + 1] int32, real
    physical_ptr,  # [B + 1] int32, physical offsets in the same space
    tokens_per_image_ptr,  # [N]
    expanded_start_ptr,  # [T + 1] int32, out
    image_begin_ptr,  # [N] int32, out
    image_start_ptr,  # [N + 1] int32, out
    token_starts_ptr,  # [B + 2] int32, out
    row_starts_ptr,  # [B + 2] int32, out
    cu_collapsed_ptr,  # [B + 1] int32, out
    cu_expanded_ptr,  # [B + 1] int32, out
    cu_padded_ptr,  # [B + 2] int32, out
    status_ptr,  # [5] int64, out
    num_tokens,
    num_seqs,
    num_images,
    image_token_id,
    space,
    num_image_rows,
    num_rows,
    seq_multiple,
    token_steps,
    TRUNCATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # Tokens to rows. Every barrier is there because other threads of this CTA wrote what comes
    # next.
    count, num_vital = _count_placeholders(
        input_ids_ptr, expanded_start_ptr, image_start_ptr, num_tokens, num_images, image_token_id,
        BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()
    unmatched = tl.load(image_start_ptr + num_images)
    image_rows, bad = _sum_images(
        tokens_per_image_ptr, image_begin_ptr, image_start_ptr, num_images, count, BLOCK_B
    )
    total = image_rows + num_tokens - tl.minimum(count, num_images)
    tl.debug_barrier()
    _expand_starts(
        expanded_start_ptr, image_begin_ptr, image_start_ptr, num_tokens, num_images, count,
        image_rows, total, BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()

    # Boundaries.
    negative, shrinking, longer = _check_boundaries(cu_seqlens_ptr, physical_ptr, num_seqs, BLOCK_B)
    last = tl.load(physical_ptr + num_seqs).to(tl.int64)
    if space == AUTO:
        vital_rows = tl.load(expanded_start_ptr + num_vital).to(tl.int64)
        illegal = tl.full([], 0, tl.int32)
        if (last <= num_tokens) & (last >= vital_rows):
            illegal = _count_illegal(
                physical_ptr, expanded_start_ptr, num_tokens, num_seqs, token_steps, BLOCK_B
            )
        space = _find_space(last, num_tokens, total, vital_rows, num_vital, illegal)
    needed = _place_sequences(
        cu_seqlens_ptr, physical_ptr, expanded_start_ptr, token_starts_ptr, row_starts_ptr,
        cu_collapsed_ptr, cu_expanded_ptr, cu_padded_ptr,
        num_tokens, num_seqs, total, space, num_rows, seq_multiple, token_steps, BLOCK_B,
    )  # fmt: skip

    # The first fault, in the order of errors.Fault.
    zero = tl.full([], 0, tl.int64)
    f, w, a, e = zero, zero, zero, zero  # fault, where, found (actual), expected
    start = tl.load(cu_seqlens_ptr).to(tl.int64)
    f, w, a, e = _note(f, w, a, e, start != 0, 1, 0, start, 0)
    start = tl.load(physical_ptr).to(tl.int64)
    f, w, a, e = _note(f, w, a, e, start != 0, 1, 0, start, 0)
    length = _difference(cu_seqlens_ptr, negative, num_seqs)
    f, w, a, e = _note(f, w, a, e, negative < num_seqs, 2, negative, length, 0)
    room = _difference(physical_ptr, shrinking, num_seqs)
    f, w, a, e = _note(f, w, a, e, shrinking < num_seqs, 2, shrinking, room, 0)
    f, w, a, e = _note(f, w, a, e, count > num_images, 3, unmatched, num_images, count)
    f, w, a, e = _note(f, w, a, e, count < num_images, 4, 0, num_images, count)
    given = zero
    if bad < num_images:
        given = tl.load(tokens_per_image_ptr + bad).to(tl.int64)
    f, w, a, e = _note(f, w, a, e, bad < num_images, 5, bad, given, 1)
    f, w, a, e = _note(f, w, a, e, total > INT32_MAX, 6, 0, total, INT32_MAX)
    known = (num_image_rows >= 0) & (image_rows != num_image_rows)
    f, w, a, e = _note(f, w, a, e, known, 7, 0, image_rows, num_image_rows)
    f, w, a, e = _note(f, w, a, e, space == AUTO, 8, 0, last, num_tokens)
    size = tl.where(space == COLLAPSED, num_tokens, total)
    f, w, a, e = _note(f, w, a, e, last > size, 9, 0, last, size)
    length = _difference(cu_seqlens_ptr, longer, num_seqs)
    room = _difference(physical_ptr, longer, num_seqs)
    f, w, a, e = _note(f, w, a, e, longer < num_seqs, 10, longer, length, room)
    if not TRUNCATE:
        f, w, a, e = _note(f, w, a, e, needed > num_rows, 11, 0, needed, num_rows)
    tl.store(status_ptr, f)
    tl.store(status_ptr + 1, space.to(tl.int64))
    tl.store(status_ptr + 2, w)
    tl.store(status_ptr + 3, a)
    tl.store(status_ptr + 4, e)


def layout(
    input_ids,
    cu_seqlens,
    cu_seqlens_padded,
    tokens_per_image,
    image_token_id,
    space,
    num_image_rows,
    num_rows,
    seq_multiple,
    truncate,
    block_t=4096,
    block_b=1024,
):
    """Launch ``layout_kernel``; arguments and results are those of ``reference.layout``."""
    num_tokens, num_seqs = input_ids.numel(), cu_seqlens.numel() - 1
    num_images = tokens_per_image.numel()
    int32 = lambda size: cu_seqlens.new_empty(size)  # noqa: E731
    outputs = (
        int32(num_tokens + 1), int32(num_images), int32(num_images + 1),
        int32(num_seqs + 2), int32(num_seqs + 2), int32(num_seqs + 1), int32(num_seqs + 1),
        int32(num_seqs + 2), cu_seqlens.new_empty(5, dtype=torch.int64),
    )  # fmt: skip
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
        space,
        num_image_rows,
        num_rows,
        seq_multiple,
        num_steps(num_tokens + 1),
        TRUNCATE=truncate,
        BLOCK_T=block_t,
        BLOCK_B=block_b,
        num_warps=16,
    )
    return outputs
