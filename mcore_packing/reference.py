"""The eager meaning of every op: what the kernels are compared with, and what runs on a CPU.

Three maps make up a layout:

* images alone move tokens, in the *unpadded* expanded row:
  ``expanded_start[t] = t + sum of (tokens_per_image - 1) over the placeholders before t``;
* ``seq_start_expanded`` cuts that row into sequences, the last one being the tail;
* ``cu_seqlens_padded`` says where each sequence begins in the physical row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import INT32_MAX
from .faults import Fault, Status

# What an expanded position takes its row from, ``source``: t >= 0 is text token t, PAD is padding,
# FIRST_IMAGE_ROW - r is image row r.
PAD = -1
FIRST_IMAGE_ROW = -2


class LayoutMaps(NamedTuple):
    """What the layout op gives.

    Attributes:
        expanded_start: int32 ``[T + 1]``, where each token starts in the unpadded row.
        image_start: int32 ``[N]``, the same for the placeholders alone.
        cu_image_rows: int32 ``[N + 1]``, prefix sums of ``tokens_per_image``.
        seq_start_collapsed: int32 ``[B + 2]``, the token each sequence starts with, and ``T``.
        seq_start_expanded: int32 ``[B + 2]``, the same in the unpadded row, and its length.
        cu_seqlens_collapsed: int32 ``[B + 1]``, real boundaries in tokens.
        cu_seqlens_expanded: int32 ``[B + 1]``, real boundaries in rows.
        cu_seqlens_padded: int32 ``[B + 2]``, where each sequence is in the physical row.
        status: int64 ``[6]``, see ``faults.Status``.
    """

    expanded_start: Tensor
    image_start: Tensor
    cu_image_rows: Tensor
    seq_start_collapsed: Tensor
    seq_start_expanded: Tensor
    cu_seqlens_collapsed: Tensor
    cu_seqlens_expanded: Tensor
    cu_seqlens_padded: Tensor
    status: Tensor


def layout(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor | None,
    tokens_per_image: Tensor,
    image_token_id: int,
    expanded: bool,
    strict: bool,
    num_image_rows: int,
    longest_row: int,
    num_rows: int,
    seq_multiple: int,
    truncate: bool,
) -> LayoutMaps:
    """Where every token, image and sequence of one packed row goes.

    Args:
        input_ids: integer ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, real boundaries in either space.
        cu_seqlens_padded: int32 ``[B + 1]``, their physical offsets in the same space, or None.
        tokens_per_image: integer ``[N]``.
        image_token_id: the placeholder.
        expanded: whether boundaries are in expanded space.
        strict: whether boundaries that are unlikely to be in their space are a fault; otherwise
            only those are that could be in the other.
        num_image_rows: the sum of ``tokens_per_image`` as the host knows it, -1 where it does not.
        longest_row: an expanded boundary that may lie inside an image, because the data path cut
            its row there; -1 where there is none.
        num_rows: physical length to lay out; what the sequences leave of it goes to the tail.
        seq_multiple: every sequence is padded to a multiple of it.
        truncate: whether sequences beyond ``num_rows`` are cut off (else they are a fault).

    Returns:
        ``LayoutMaps``.
    """
    num_tokens, num_images = input_ids.numel(), tokens_per_image.numel()
    physical = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded

    # Tokens to the unpadded row.
    placeholders = (input_ids == image_token_id).nonzero().squeeze(1)
    count = placeholders.numel()
    matched, given = placeholders[:num_images], tokens_per_image[:count].long()
    width = torch.ones(num_tokens, dtype=torch.int64, device=input_ids.device)
    width[matched] = given.clamp(1, INT32_MAX)
    start = _prefix_sum(width)
    total = start[-1].clone()
    start.clamp_(max=INT32_MAX)
    image_start = total.repeat(num_images)  # an image without a placeholder is at the end
    image_start[: matched.numel()] = start[matched]
    cu_image_rows = (total - num_tokens + matched.numel()).repeat(num_images + 1)
    cu_image_rows[: matched.numel()] = _prefix_sum(width[matched])[:-1]

    # Where each sequence begins and really ends, in tokens and in the unpadded row.
    begin = physical.long()
    end = begin[:-1] + cu_seqlens.long().diff().clamp(min=0)
    if expanded:
        seq_start, seq_end = (x.clamp(min=0).minimum(total) for x in (begin, end))
        token_begin, token_end = (torch.searchsorted(start, x) for x in (seq_start, seq_end))
    else:
        token_begin, token_end = (x.clamp(0, num_tokens) for x in (begin, end))
        seq_start, seq_end = start[token_begin], start[token_end]  # <- a boundary moves

    # Where it goes in the physical row.
    length = seq_start.diff().clamp(min=0)
    padded = _prefix_sum((length + seq_multiple - 1) // seq_multiple * seq_multiple)
    cu_padded = _append(padded.clamp(max=num_rows), num_rows)
    real = (seq_end - seq_start[:-1]).clamp(min=0).minimum(cu_padded.diff()[:-1])

    fault = _find_fault(
        cu_seqlens, physical, start, int(total), placeholders, tokens_per_image, expanded, strict,
        num_image_rows, longest_row, int(padded[-1]), None if truncate else num_rows,
    )  # fmt: skip
    status = Status(*fault, int(cu_padded.diff().max()), int(cu_image_rows[-1]))
    return LayoutMaps(
        _int32(start),
        _int32(image_start),
        _int32(cu_image_rows),
        _int32(_append(token_begin, num_tokens)),
        _int32(_append(seq_start, total)),
        _int32(_prefix_sum((token_end - token_begin[:-1]).clamp(min=0))),
        _int32(_prefix_sum(real)),
        _int32(cu_padded),
        torch.tensor(status, dtype=torch.int64, device=cu_seqlens.device),
    )


def _find_fault(
    cu_seqlens, physical, start, total, placeholders, tokens_per_image, expanded, strict,
    num_image_rows, longest_row, padded_rows, num_rows,
) -> tuple[int, int, int, int]:  # fmt: skip
    """``fault, where, found, expected``: the first that applies, in the order of ``Fault``."""
    num_tokens, num_images, count = (
        start.numel() - 1,
        tokens_per_image.numel(),
        placeholders.numel(),
    )
    for cu in (cu_seqlens, physical):
        if int(cu[0]) != 0:
            return Fault.START, 0, int(cu[0]), 0
    lengths, room = cu_seqlens.long().diff(), physical.long().diff()
    for steps in (lengths, room):
        if (seq := _first(steps < 0)) is not None:
            return Fault.DECREASING, seq, int(steps[seq]), 0
    if count > num_images:
        return Fault.TOO_FEW_IMAGES, int(placeholders[num_images]), num_images, count
    if count < num_images:
        return Fault.TOO_MANY_IMAGES, 0, num_images, count
    if (image := _first(tokens_per_image < 1)) is not None:
        return Fault.TOKENS_PER_IMAGE, image, int(tokens_per_image[image]), 1
    if total > INT32_MAX:
        return Fault.OVERFLOW, 0, total, INT32_MAX
    image_rows = total - num_tokens + num_images
    if num_image_rows not in (-1, image_rows):
        return Fault.IMAGE_ROWS, 0, image_rows, num_image_rows

    last = int(physical[-1])
    images_end = int(placeholders[-1]) + 1 if count else 0
    could_be_collapsed = images_end <= last <= num_tokens
    inside_image = None
    if expanded:
        is_start = torch.isin(physical, start) | (physical == longest_row)
        inside_image = _first(~is_start)
        covers = last >= int(start[images_end]) or last == longest_row
        is_other = not (covers and inside_image is None) and (strict or could_be_collapsed)
    else:
        is_other = strict and last < images_end
    if is_other:
        where = physical.numel() if inside_image is None else inside_image
        return Fault.OTHER_SPACE, where, last, images_end
    row_end = total if expanded else num_tokens
    if last > row_end:
        return Fault.PAST_END, 0, last, row_end
    if (seq := _first(lengths > room)) is not None:
        return Fault.REAL_LENGTH, seq, int(lengths[seq]), int(room[seq])
    if num_rows is not None and padded_rows > num_rows:
        return Fault.NO_ROOM, 0, padded_rows, num_rows
    return Fault.NONE, 0, 0, 0


def _first(wrong: Tensor) -> int | None:
    """Index of the first entry that is true."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def _prefix_sum(lengths: Tensor) -> Tensor:
    """int64 ``[n + 1]``: the exclusive prefix sums of ``[n]`` and their total."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _append(values: Tensor, last) -> Tensor:
    return torch.cat([values, torch.as_tensor(last).to(values).reshape(1)])


def _int32(values: Tensor) -> Tensor:
    return values.clamp(max=INT32_MAX).to(torch.int32)


def last_at_or_below(starts: Tensor, value: Tensor) -> Tensor:
    """Index of the last start at or below ``value``: what ``value`` lies in."""
    return (torch.searchsorted(starts, value, right=True) - 1).clamp(0, starts.numel() - 2)


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


class ExpandedTokens(NamedTuple):
    """What stands at each of a rank's positions ``[P]``, with ``P = num_rows / cp_size``.

    Attributes:
        source: int32, a text token, ``PAD``, or ``FIRST_IMAGE_ROW - r`` for image row ``r``.
        position_ids: int64, restarting in every sequence.
        token_ids: like ``input_ids``, 0 where no text token stands.
        labels: like ``labels``, -100 where nothing is predicted; empty where none were given.
        loss_mask: like ``loss_mask``, 0 where nothing is predicted; empty where none was given.
    """

    source: Tensor
    position_ids: Tensor
    token_ids: Tensor
    labels: Tensor
    loss_mask: Tensor


def expand_tokens(
    input_ids: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    expanded_start: Tensor,
    image_start: Tensor,
    cu_image_rows: Tensor,
    seq_start_expanded: Tensor,
    cu_seqlens_padded: Tensor,
    image_token_id: int,
    num_rows: int,
    cp_size: int,
    cp_rank: int,
) -> ExpandedTokens:
    """Find the token that each of a rank's positions belongs to, and which of its rows it is.

    Returns:
        ``ExpandedTokens``.

    Source:
        ``LLaVAModel._preprocess_data`` of Megatron-Core 0.16.1 for labels and loss mask within a
        sequence, and of main for ``token_ids``.
    """
    num_images = image_start.numel()
    cu, seq_start = cu_seqlens_padded.long(), seq_start_expanded.long()
    position = local_positions(cu_seqlens_padded, num_rows, cp_size, cp_rank)
    seq = last_at_or_below(cu, position)
    unpadded, seq_end = seq_start[seq] + position - cu[seq], seq_start[seq + 1]
    is_pad = unpadded >= seq_end

    starts = expanded_start.long()
    token = last_at_or_below(starts, unpadded)
    row = unpadded - starts[token]
    is_placeholder = torch.isin(expanded_start, image_start)
    is_image = is_placeholder[token] & ~is_pad
    is_text = ~is_image & ~is_pad
    source = torch.where(is_pad, PAD, token)
    if num_images:
        image = torch.searchsorted(image_start, starts[token].int()).clamp(max=num_images - 1)
        source = torch.where(is_image, FIRST_IMAGE_ROW - cu_image_rows[image] - row, source)
    token_ids = torch.where(is_text, input_ids[token], 0)

    # The last row of a token predicts the next one, unless that is an image of the same sequence.
    last_row = unpadded + 1 == starts[token + 1]
    before_image = is_placeholder[token + 1] & last_row & (unpadded + 1 < seq_end)
    new_labels, new_loss_mask = input_ids.new_empty(0), input_ids.new_empty(0)
    trains = ~before_image & ~is_pad
    if labels is not None or loss_mask is not None:
        if labels is not None:
            label = labels[token]
            # A row-wide shift made this one: the next sequence begins with an image.
            leaked = (label == image_token_id) & (unpadded + 1 == seq_end)
            trains = trains & ~(leaked & (token + 1 < input_ids.numel()))
            new_labels = torch.where(trains & last_row, label, -100)
        if loss_mask is not None:
            new_loss_mask = loss_mask[token].where(trains & is_text, loss_mask.new_zeros(()))
    return ExpandedTokens(source.int(), position - cu[seq], token_ids, new_labels, new_loss_mask)


class SourcePositions(NamedTuple):
    """The inverse of ``source``, -1 for what is not on this rank (a placeholder, a row that was cut
    off, a row of another rank).

    Attributes:
        text: int32 ``[T]``, where the row of each text token went.
        images: int32 ``[num_image_rows]``, where each image row went.
    """

    text: Tensor
    images: Tensor


def source_positions(
    expanded_start: Tensor,
    image_start: Tensor,
    cu_image_rows: Tensor,
    seq_start_expanded: Tensor,
    cu_seqlens_padded: Tensor,
    num_image_rows: int,
    cp_size: int,
    cp_rank: int,
) -> SourcePositions:
    """Invert ``source``.

    Said here as what it is, a scatter; the kernel searches, so that it writes every entry once.

    Returns:
        ``SourcePositions``.
    """
    num_tokens = expanded_start.numel() - 1
    input_ids = expanded_start.new_zeros(num_tokens)
    source = expand_tokens(
        input_ids, None, None, expanded_start, image_start, cu_image_rows, seq_start_expanded,
        cu_seqlens_padded, 0, int(cu_seqlens_padded[-1]), cp_size, cp_rank,
    ).source.long()  # fmt: skip
    position = torch.arange(source.numel(), dtype=torch.int32, device=source.device)
    text = position.new_full((num_tokens,), -1)
    images = position.new_full((num_image_rows,), -1)
    image_row = FIRST_IMAGE_ROW - source
    is_text, is_image = source >= 0, (source < PAD) & (image_row < num_image_rows)
    text[source[is_text]] = position[is_text]
    images[image_row[is_image]] = position[is_image]
    return SourcePositions(text, images)


def expand_rows(
    text: Tensor,
    images: Tensor | None,
    source: Tensor,
    text_position: Tensor | None = None,
    image_position: Tensor | None = None,
) -> Tensor:
    """Fill every expanded row, ``[P, H]``, from text ``[T, H]`` and images ``[L, tiles, H]``.

    An index over a concatenated table. The positions, which only the gradient needs, are those of
    ``source_positions``.
    """
    num_tokens, width = text.shape
    table = [text, text.new_zeros(1, width)]
    if images is not None:
        table.append(images.transpose(0, 1).reshape(-1, width))  # tile by tile
    index = source.long()
    index = torch.where(index < 0, num_tokens + PAD - index, index)
    return torch.cat(table)[index]


def collect_rows(grad: Tensor, index: Tensor, length: int, tiles: int) -> Tensor:
    """The adjoint of ``expand_rows`` for one source: ``[length, tiles, H]`` from ``[P, H]``.

    Row ``r`` of the source, counted tile by tile, takes ``grad[index[r]]``, or zero where that is
    -1.
    """
    num_rows, width = grad.shape
    table = torch.cat([grad, grad.new_zeros(1, width)])
    rows = table[torch.where(index < 0, num_rows, index.long())]
    return rows.view(tiles, length, width).transpose(0, 1).contiguous()
