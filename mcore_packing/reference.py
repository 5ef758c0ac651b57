"""The eager meaning of every op: what runs on a CPU, and what the kernels are compared with.

Vectorised over tokens, images and sequences. Three maps make up a layout:

* images alone map tokens to the rows of the *unpadded* expanded row:
  ``expanded_start[t] = t + sum of (tokens_per_image - 1) over the placeholders before t``;
* ``row_starts`` cuts the unpadded rows into sequences, the last one being the tail;
* ``cu_seqlens_padded`` says where each of them begins in the physical row.
"""

import ctypes
import sys

import torch
from torch import Tensor

from .errors import INT32_MAX, Fault, Space

# A row that ends in end-of-sequence tokens, padded with the same token: this many of them may be
# real.
MAX_TRAILING_EOS = 8

# ``source`` of an expanded position: t >= 0 is text token t, PAD is a padding row, -2 - r is image
# row r.
PAD = -1

# What Linux calls a huge page, how many of them are worth asking for, and how to ask.
HUGE_PAGE = 2 * 2**20
MANY_PAGES = 4 * HUGE_PAGE
MADV_HUGEPAGE = 14


def layout(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor | None,
    tokens_per_image: Tensor,
    image_token_id: int,
    space: int,
    num_image_rows: int,
    num_rows: int,
    seq_multiple: int,
    truncate: bool,
) -> tuple[Tensor, ...]:
    """Prefix sums over image expansion, the space rule and the boundaries of one packed row.

    Args:
        input_ids: integer ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, real boundaries in collapsed or expanded space.
        cu_seqlens_padded: int32 ``[B + 1]``, their physical offsets in the same space, or None.
        tokens_per_image: integer ``[N]``.
        image_token_id: the placeholder.
        space: a ``Space``.
        num_image_rows: the sum of ``tokens_per_image`` as the host knows it, -1 where it does not.
        num_rows: physical length to lay out; what the sequences leave of it goes to the tail.
        seq_multiple: every sequence is padded to a multiple of it.
        truncate: whether rows beyond ``num_rows`` are cut off (else they are a fault).

    Returns:
        ``expanded_start`` int32 ``[T + 1]``, ``image_begin`` int32 ``[N]`` (the unpadded row where
        each image begins), ``image_start`` int32 ``[N + 1]`` (prefix sums of ``tokens_per_image``),
        ``token_starts`` and ``row_starts`` int32 ``[B + 2]`` (where each sequence begins, in tokens
        and in unpadded rows), ``cu_seqlens_collapsed`` and ``cu_seqlens_expanded`` int32 ``[B +
        1]``, ``cu_seqlens_padded`` int32 ``[B + 2]``, ``status`` int64 ``[5]`` (see
        ``errors.Fault``).
    """
    num_tokens, num_images = input_ids.numel(), tokens_per_image.numel()
    physical = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded

    # Tokens to unpadded rows.
    is_image = input_ids == image_token_id
    placeholders = is_image.nonzero().squeeze(1)
    count = placeholders.numel()
    matched = placeholders[:num_images]
    given = tokens_per_image[:count].long()
    rows = torch.ones(num_tokens, dtype=torch.int64, device=input_ids.device)
    rows[matched] = given.clamp(1, INT32_MAX)
    start = _prefix_sum(rows)
    total = start[-1].clone()
    image_begin = total.repeat(num_images)
    image_begin[: matched.numel()] = start[matched]
    image_start = (total - num_tokens + matched.numel()).repeat(num_images + 1)
    image_start[: matched.numel()] = (
        start[matched] - matched + torch.arange(matched.numel()).to(matched)
    )
    if int(total) > INT32_MAX:
        start.clamp_(max=INT32_MAX)

    # Which space the boundaries are in.
    begin = physical.long()
    end = begin[:-1] + cu_seqlens.long().diff().clamp(min=0)
    found = _find_space(input_ids, is_image, start, int(total), begin, space)

    # Where each sequence begins and really ends, in tokens and in unpadded rows.
    if found == Space.EXPANDED:
        row_begin, row_end = (x.clamp(min=0).minimum(total) for x in (begin, end))
        token_begin, token_end = (torch.searchsorted(start, x) for x in (row_begin, row_end))
    else:
        token_begin, token_end = (x.clamp(0, num_tokens) for x in (begin, end))
        row_begin, row_end = start[token_begin], start[token_end]

    # Where it goes in the physical row.
    length = row_begin.diff().clamp(min=0)
    padded = (length + seq_multiple - 1) // seq_multiple * seq_multiple
    offsets = _prefix_sum(padded)
    needed = offsets[-1] + total - row_begin[-1]
    cu_padded = offsets.clamp(max=num_rows)
    real = (row_end - row_begin[:-1]).clamp(min=0).minimum(cu_padded.diff())

    status = _find_fault(
        cu_seqlens, physical, tokens_per_image, placeholders, given, num_tokens, int(total), found,
        num_image_rows, None if truncate else num_rows, needed,
    )  # fmt: skip
    return (
        start.to(torch.int32),
        _int32(image_begin),
        _int32(image_start),
        _int32(_append(token_begin, num_tokens)),
        _int32(_append(row_begin, total)),
        _int32(_prefix_sum((token_end - token_begin[:-1]).clamp(min=0))),
        _int32(_prefix_sum(real)),
        _int32(_append(cu_padded, num_rows)),
        status,
    )


def _find_space(input_ids, is_image, start, total, begin, space) -> Space:
    """Whether ``begin`` counts tokens or rows: the seven rules, in order."""
    if space != Space.AUTO:
        return Space(space)
    num_tokens, last = input_ids.numel(), int(begin[-1])
    if total == num_tokens:
        return Space.SAME
    if last > num_tokens:
        return Space.EXPANDED
    vital = (is_image | (input_ids != input_ids[-1])).flip(0)  # what follows may be padding
    num_vital = num_tokens - int(vital.to(torch.uint8).argmax()) if bool(vital.any()) else 0
    vital_rows = int(start[num_vital])
    if last < vital_rows:
        return Space.COLLAPSED
    index = torch.searchsorted(start, begin).clamp(max=num_tokens)
    if not bool((start[index] == begin).all()):
        return Space.COLLAPSED
    surplus = last - vital_rows
    if last == num_tokens and surplus > MAX_TRAILING_EOS:
        return Space.COLLAPSED
    if last != num_tokens and surplus <= MAX_TRAILING_EOS < vital_rows - num_vital:
        return Space.EXPANDED
    return Space.AUTO


def _find_fault(
    cu_seqlens, physical, tokens_per_image, placeholders, given, num_tokens, total, found,
    num_image_rows, num_rows, needed,
) -> Tensor:  # fmt: skip
    """The first thing that is wrong, in the order of ``Fault``, as a status."""
    num_images, count, last = tokens_per_image.numel(), placeholders.numel(), int(physical[-1])
    known_rows = total - num_tokens + min(count, num_images)
    lengths, room = cu_seqlens.long().diff(), physical.long().diff()
    size = num_tokens if found == Space.COLLAPSED else total

    def status(fault, where=0, actual=0, expected=0):
        values = [int(fault), int(found), int(where), int(actual), int(expected)]
        return torch.tensor(values, dtype=torch.int64, device=cu_seqlens.device)

    for cu in (cu_seqlens, physical):
        if int(cu[0]) != 0:
            return status(Fault.START, 0, cu[0], 0)
    for steps in (lengths, room):
        if bool((steps < 0).any()):
            where = int((steps < 0).nonzero()[0])
            return status(Fault.DECREASING, where, steps[where], 0)
    if count > num_images:
        return status(Fault.TOO_FEW_IMAGES, placeholders[num_images], num_images, count)
    if count < num_images:
        return status(Fault.TOO_MANY_IMAGES, 0, num_images, count)
    if bool((given < 1).any()):
        where = int((given < 1).nonzero()[0])
        return status(Fault.TOKENS_PER_IMAGE, where, given[where], 1)
    if total > INT32_MAX:
        return status(Fault.OVERFLOW, 0, total, INT32_MAX)
    if num_image_rows >= 0 and known_rows != num_image_rows:
        return status(Fault.IMAGE_ROWS, 0, known_rows, num_image_rows)
    if found == Space.AUTO:
        return status(Fault.AMBIGUOUS, 0, last, num_tokens)
    if last > size:
        return status(Fault.PAST_END, 0, last, size)
    if bool((lengths > room).any()):
        where = int((lengths > room).nonzero()[0])
        return status(Fault.REAL_LENGTH, where, lengths[where], room[where])
    if num_rows is not None and int(needed) > num_rows:
        return status(Fault.PADDED_ROWS, 0, needed, num_rows)
    return status(Fault.NONE)


def _prefix_sum(lengths: Tensor) -> Tensor:
    """int64 ``[n + 1]``: the exclusive prefix sums of ``[n]`` and their total."""
    sums = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=sums[1:])
    return sums


def _append(values: Tensor, last) -> Tensor:
    return torch.cat([values, torch.as_tensor(last).to(values).reshape(1)])


def _int32(values: Tensor) -> Tensor:
    return values.clamp(max=INT32_MAX).to(torch.int32)


def local_positions(cu_seqlens_padded: Tensor, num_rows: int, cp_size: int, cp_rank: int) -> Tensor:
    """The physical positions that a context-parallel rank owns, int64 ``[num_rows / cp_size]``.

    Every sequence is cut into ``2 * cp_size`` chunks; rank ``r`` owns the ``r``-th from either end.

    Source:
        ``thd_partition_indices_kernel`` of Transformer Engine 2.x.
    """
    local = torch.arange(num_rows // cp_size, device=cu_seqlens_padded.device)
    if cp_size == 1:
        return local
    cu = cu_seqlens_padded.long()
    begin = cu // cp_size
    seq = last_at_or_below(begin, local)
    half = (begin[seq + 1] - begin[seq]) // 2
    offset = local - begin[seq]
    chunk = torch.where(offset < half, cp_rank, 2 * (cp_size - 1) - cp_rank)
    return cu[seq] + offset + half * chunk


def expand_tokens(
    input_ids: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    image_begin: Tensor,
    image_start: Tensor,
    row_starts: Tensor,
    cu_seqlens_padded: Tensor,
    image_token_id: int,
    num_rows: int,
    cp_size: int,
    cp_rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What stands at each of a rank's positions ``[P]``, with ``P = num_rows / cp_size``.

    Returns:
        ``source`` int32 (a token, ``PAD`` or ``-2 - r`` for image row ``r``), ``position_ids``
        int64, ``token_ids`` (0 where no text token stands), ``labels`` (-100 where nothing is
        predicted) and ``loss_mask``; the last two are empty where they were not given.

    Source:
        ``LLaVAModel._preprocess_data`` of Megatron-Core 0.16.1 for labels and loss mask within a
        sequence, and of main for ``token_ids``.
    """
    num_tokens, num_images = input_ids.numel(), image_begin.numel()
    cu, starts = cu_seqlens_padded.long(), row_starts.long()
    position = local_positions(cu_seqlens_padded, num_rows, cp_size, cp_rank)
    seq = last_at_or_below(cu, position)
    row, end = starts[seq] + position - cu[seq], starts[seq + 1]
    is_pad = row >= end

    # The last image that begins at or before the row decides what the row is.
    image = torch.searchsorted(image_begin, row.int(), right=True)
    previous = (image - 1).clamp(min=0)
    stop = image_start[image].long()
    if num_images:
        image_row = image_start[previous] + row - image_begin[previous]
        is_image = (image > 0) & (image_row < stop)
    else:
        image_row, is_image = row, torch.zeros_like(is_pad)
    token = torch.where(is_image, row - image_row + previous, row - stop + image)
    token = token.clamp(0, num_tokens - 1)
    source = torch.where(is_image, -2 - image_row, token)
    source = torch.where(is_pad, PAD, source).int()
    is_text = ~is_image & ~is_pad
    token_ids = torch.where(is_text, input_ids[token], 0)

    new_labels, new_loss_mask = input_ids.new_empty(0), input_ids.new_empty(0)
    if labels is not None or loss_mask is not None:
        # A token's last row predicts the next token, unless that is an image of the same sequence.
        begins = _append(image_begin, -1)[image] == row + 1
        trains = ~(begins & (row + 1 < end)) & ~is_pad
        if labels is not None:
            label = labels[token]
            leaked = (label == image_token_id) & (row + 1 == end) & (token + 1 < num_tokens)
            trains &= ~leaked
            is_last_row = ~is_image | (image_row == stop - 1)
            new_labels = torch.where(trains & is_last_row, label, -100)
        if loss_mask is not None:
            new_loss_mask = loss_mask[token].where(trains & is_text, loss_mask.new_zeros(()))
    return source, position - cu[seq], token_ids, new_labels, new_loss_mask


def source_positions(
    input_ids: Tensor,
    expanded_start: Tensor,
    image_begin: Tensor,
    image_start: Tensor,
    row_starts: Tensor,
    cu_seqlens_padded: Tensor,
    num_image_rows: int,
    image_token_id: int,
    cp_size: int,
    cp_rank: int,
) -> tuple[Tensor, Tensor]:
    """The inverse of ``source``: where each text row and each image row went.

    Said here as what it is, a scatter; the kernel searches, so that it writes every entry once.

    Returns:
        int32 ``[T]`` and int32 ``[num_image_rows]``: positions on this rank, -1 for what is not
        here (a placeholder, a row that was cut off, a row of another rank).
    """
    source = expand_tokens(
        input_ids, None, None, image_begin, image_start, row_starts, cu_seqlens_padded,
        image_token_id, int(cu_seqlens_padded[-1]), cp_size, cp_rank,
    )[0].long()  # fmt: skip
    position = torch.arange(source.numel(), dtype=torch.int32, device=source.device)
    text = position.new_full((input_ids.numel(),), -1)
    images = position.new_full((num_image_rows,), -1)
    is_text, is_image = source >= 0, (source < PAD) & (source >= -1 - num_image_rows)
    text[source[is_text]] = position[is_text]
    images[-2 - source[is_image]] = position[is_image]
    return text, images


def expand_rows(
    text: Tensor,
    images: Tensor | None,
    source: Tensor,
    status: Tensor,
    text_position: Tensor | None = None,
    image_position: Tensor | None = None,
) -> Tensor:
    """Fill every expanded row: ``[P, H]`` from text ``[T, H]`` and images ``[L, tiles, H]``.

    Copies runs of rows, which is several times faster on a CPU than an indexed copy of rows. A row
    that is not sound (see ``status``) becomes NaN. The positions, which only the gradient needs,
    are those of ``source_positions``.
    """
    out = _on_huge_pages(text.new_empty(source.numel(), text.shape[1]))
    if int(status[0]):
        return out.fill_(torch.nan)
    length = images.shape[0] if images is not None else 1
    begins_tile = (source < PAD) & ((-2 - source) % max(length, 1) == 0)
    for begin, end, first in _runs(source, begins_tile):
        if first >= 0:
            out[begin:end] = text[first : first + end - begin]
        elif first == PAD:
            out[begin:end] = 0
        else:
            tile, row = divmod(-2 - first, length)
            out[begin:end] = images[row : row + end - begin, tile]
    return out


def collect_rows(grad: Tensor, index: Tensor, length: int, tiles: int) -> Tensor:
    """The adjoint of ``expand_rows`` for one source: ``[length, tiles, H]`` from ``[P, H]``.

    Row ``r`` of the source, counted tile by tile, takes ``grad[index[r]]``, or zero where that is
    -1.
    """
    out = _on_huge_pages(grad.new_empty(length, tiles, grad.shape[1]))
    begins_tile = torch.arange(index.numel()) % max(length, 1) == 0
    for begin, end, first in _runs(index, begins_tile):
        tile, row = divmod(begin, length)
        rows = out[row : row + end - begin, tile]
        if first == PAD:
            rows.zero_()
        else:
            rows.copy_(grad[first : first + end - begin])
    return out


def _runs(index: Tensor, begins_tile: Tensor) -> list[tuple[int, int, int]]:
    """``(begin, end, index[begin])`` of every run that one slice can copy.

    Text rows and positions count up by one, image rows (below ``PAD``) count down, padding stays.
    """
    kind = (index - PAD).sign()
    goes_on = (kind[1:] == kind[:-1]) & (index.diff() == kind[1:]) & ~begins_tile[1:]
    begins = [0, *((~goes_on).nonzero().squeeze(1) + 1).tolist()] if index.numel() else []
    firsts = index[begins].tolist()
    return list(zip(begins, [*begins[1:], index.numel()], firsts, strict=True)) if begins else []


def _on_huge_pages(out: Tensor) -> Tensor:
    """Ask Linux to back a large new tensor with huge pages: the first touch of small ones takes
    twice as long as the copy itself."""
    if sys.platform == "linux" and out.nbytes >= MANY_PAGES:
        begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
        begin, end = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        advise = ctypes.CDLL(None).madvise  # a hint: what it returns does not matter
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    return out


def last_at_or_below(starts: Tensor, value: Tensor) -> Tensor:
    """Index of the last start at or below ``value``: the sequence that ``value`` lies in."""
    return (torch.searchsorted(starts, value, right=True) - 1).clamp(0, starts.numel() - 2)
