"""The eager meaning of every op: what the kernels are compared with, and what runs on a CPU.

Three maps make up a layout:

* images alone move tokens, in the *unpadded* expanded row:
  ``expanded_start[t] = t + sum of (tokens_per_image - 1) over the placeholders before t``;
* ``seq_start_expanded`` cuts that row into sequences, the last one being the tail;
* ``cu_seqlens_padded`` says where each sequence begins in the physical row.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import INT32_MAX, Fault, Status

IGNORE_INDEX = -100  # the label of what is not trained: PyTorch's and Megatron's losses skip it

# What an expanded position takes its embedding from, ``source``: t >= 0 is text token t, PAD is
# padding, FIRST_IMAGE - e is image embedding e.
PAD = -1
FIRST_IMAGE = -2

# A layout is one int32 tensor; in front stand the header, which its owner writes, and the status.
HEADER_SIZE = 28
STATUS_SIZE = 2 * len(Status._fields)

# These take room for one entry more, as parts of about the same size do: kernels find them easily.
_ONE_SHORT = {"cu_seqlens_expanded", "cu_seqlens_collapsed", "input_ids", "image_start"}


@functools.lru_cache
def parts_of(
    num_seqs: int,
    num_tokens: int | None = None,
    num_images: int = 0,
    num_tiles: int | None = None,
    cp_size: int = 0,
) -> dict[str, tuple[int, int]]:
    """Where each part of a layout's tensor begins, and how many int32 it holds.

    Every part begins at a multiple of four: kernels read 16 bytes at a time, and Triton compiles
    another variant for addresses that do not divide.

    Args:
        num_seqs: ``B``.
        num_tokens: ``T``, None for boundaries only: the first parts of the same tensor.
        num_images: ``N``.
        num_tiles: how many tiles the row has, None where they are not shared over ranks.
        cp_size: over how many they are.

    Returns:
        ``{name: (begin, size)}``; "end" is where the tensor ends.
    """
    sizes = {
        "header": HEADER_SIZE,
        "status": STATUS_SIZE,
        "cu_seqlens_expanded": num_seqs + 1,
        "cu_seqlens_padded": num_seqs + 2,
        "seq_start_expanded": num_seqs + 2,
    }
    if num_tokens is not None:
        sizes |= {
            "cu_seqlens_collapsed": num_seqs + 1,
            "seq_start_collapsed": num_seqs + 2,
            "input_ids": num_tokens,
            "expanded_start": num_tokens + 1,
            "image_start": num_images,
            "cu_image_embeddings": num_images + 1,
        }
    if num_tiles is not None:  # behind all that kernels read
        sizes |= {
            "encoder": num_tiles,
            "cu_tile_embeddings": num_tiles + 1,
            "counts": cp_size**2,
        }
    parts, begin = {}, 0
    for name, size in sizes.items():
        parts[name] = begin, size
        begin += -(-(size + (name in _ONE_SHORT)) // 4) * 4
    parts["end"] = begin, 0
    return parts


class Maps(NamedTuple):
    """The parts of a layout's tensor that the kernels of the expansion read.

    Attributes:
        seq_start_expanded: int32 ``[B + 2]``, the position each sequence starts with in the
            unpadded row, and the row's length.
        cu_seqlens_padded: int32 ``[B + 2]``, where each sequence is in the physical row.
        input_ids: int32 ``[T]``.
        expanded_start: int32 ``[T + 1]``, where each token starts in the unpadded row.
        image_start: int32 ``[N]``, the same for the placeholders alone.
        cu_image_embeddings: int32 ``[N + 1]``, prefix sums of ``tokens_per_image``.
    """

    seq_start_expanded: Tensor
    cu_seqlens_padded: Tensor
    input_ids: Tensor
    expanded_start: Tensor
    image_start: Tensor
    cu_image_embeddings: Tensor


def maps_of(layout: Tensor, num_tokens: int, num_images: int, num_seqs: int) -> Maps:
    """Views of a layout's tensor."""
    parts = parts_of(num_seqs, num_tokens, num_images)
    return Maps(*(layout.narrow(0, *parts[name]) for name in Maps._fields))


def layout(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor | None,
    tokens_per_image: Tensor,
    image_token_id: int,
    expanded: bool,
    num_image_embeddings: int,
    cut_at: int,
    num_positions: int,
    seq_multiple: int,
    truncate: bool,
) -> Tensor:
    """Where every token, image and sequence of one packed row goes.

    Args:
        input_ids: integer ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, real boundaries in either space.
        cu_seqlens_padded: int32 ``[B + 1]``, their physical offsets in the same space, or None.
        tokens_per_image: integer ``[N]``.
        image_token_id: the placeholder.
        expanded: whether boundaries are in expanded space.
        num_image_embeddings: the sum of ``tokens_per_image`` as the host knows it, -1 where it does
            not.
        cut_at: an expanded boundary that may lie inside an image, because the data path cut its
            row there; -1 where there is none.
        num_positions: physical length to lay out; what the sequences leave of it goes to the tail.
        seq_multiple: every sequence is padded to a multiple of it.
        truncate: whether sequences beyond ``num_positions`` are cut off (else they are a fault).

    Returns:
        int32, the parts that ``parts_of`` names: all but the header, which is left to be written.
    """
    ids, counts = input_ids.numpy(), tokens_per_image.numpy()
    given = cu_seqlens.numpy().astype(np.int64)
    physical = given
    if cu_seqlens_padded is not None:
        physical = cu_seqlens_padded.numpy().astype(np.int64)
    num_tokens, num_images = ids.size, counts.size

    # Tokens to the unpadded row.
    placeholders = (ids == image_token_id).nonzero()[0]
    unlimited = expanded_starts(num_tokens, placeholders, counts)
    start, total = np.minimum(unlimited, INT32_MAX), int(unlimited[-1])
    matched = placeholders[:num_images]
    image_token = np.full(num_images + 1, num_tokens)  # of an image without a placeholder: the end
    image_token[: matched.size] = matched
    images_before = np.minimum(np.arange(num_images + 1), matched.size)
    cu_image_embeddings = unlimited[image_token] - image_token + images_before

    # Where each sequence begins and really ends, in tokens and in the unpadded row.
    begin, end = physical, physical[:-1] + np.maximum(steps_of(given), 0)
    if expanded:
        seq_start, seq_end = _within(begin, total), _within(end, total)
        token_begin, token_end = start.searchsorted(seq_start), start.searchsorted(seq_end)
    else:
        token_begin, token_end = _within(begin, num_tokens), _within(end, num_tokens)
        seq_start, seq_end = start[token_begin], start[token_end]  # <- a boundary moves

    # Where it goes in the physical row.
    lengths = np.maximum(steps_of(seq_start), 0)
    padded = prefix_sum(-(-lengths // seq_multiple) * seq_multiple)
    cu_padded = _followed_by(np.minimum(padded, num_positions), num_positions)
    rooms = steps_of(cu_padded)
    real = np.minimum(np.maximum(seq_end - seq_start[:-1], 0), rooms[:-1])

    fault = _find_fault(
        given, physical, start, total, placeholders, counts, expanded, num_image_embeddings,
        cut_at, int(padded[-1]), None if truncate else num_positions,
    )  # fmt: skip
    status = Status(*fault, int(rooms.max()), int(cu_image_embeddings[-1]))

    parts = parts_of(given.size - 1, num_tokens, num_images)
    out = np.zeros(parts["end"][0], dtype=np.int32)
    for name, value in {
        "status": np.array(status, dtype=np.int64).view(np.int32),
        "cu_seqlens_expanded": prefix_sum(real),
        "cu_seqlens_padded": cu_padded,
        "seq_start_expanded": _followed_by(seq_start, min(total, INT32_MAX)),
        "cu_seqlens_collapsed": prefix_sum(np.maximum(token_end - token_begin[:-1], 0)),
        "seq_start_collapsed": _followed_by(token_begin, num_tokens),
        "input_ids": ids,
        "expanded_start": start,
        "image_start": start[image_token[:-1]],
        "cu_image_embeddings": np.minimum(cu_image_embeddings, INT32_MAX),
    }.items():
        begin, size = parts[name]
        out[begin : begin + size] = value
    return torch.from_numpy(out)


def expanded_starts(num_tokens: int, placeholders: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 ``[T + 1]``, ``expanded_start`` without a limit; placeholders and entries without each
    other are one position wide."""
    both = min(placeholders.size, counts.size)
    width = np.ones(num_tokens + 1, dtype=np.int64)  # of the token before each
    width[0] = 0
    width[placeholders[:both] + 1] = _within(counts[:both].astype(np.int64), INT32_MAX, 1)
    return width.cumsum(out=width)


class Spaces(NamedTuple):
    """Which spaces boundaries can be in.

    A space belongs to a data path, not to a row, and most rows could be in either. So the rule is
    plain, and what it does not decide is left open.

    Attributes:
        collapsed: the last is at most ``T``, and behind the last placeholder.
        expanded: each is where some token starts in the expanded row, and the last is at or behind
            the end of the last image; one that was cut at the model's maximum counts as both.
        inside_image: the first boundary that lies inside an image, None where there is none.
    """

    collapsed: bool
    expanded: bool
    inside_image: int | None


def spaces_of(edges: np.ndarray, start: np.ndarray, images_end: int, cut_at: int) -> Spaces:
    """Ask the values of boundaries.

    Args:
        edges: ``[B + 1]``, physical boundaries, never decreasing.
        start: int64 ``[T + 1]``, ``expanded_start``.
        images_end: the token behind the last placeholder.
        cut_at: the model's maximum, -1 where there is none.
    """
    num_tokens, last = start.size - 1, int(edges[-1])
    token = start.searchsorted(edges).clip(max=num_tokens)
    inside_image = _first((start[token] != edges) & (edges != cut_at))
    covers = last >= start[images_end] or last == cut_at
    is_expanded = bool(covers) and inside_image is None
    return Spaces(images_end <= last <= num_tokens, is_expanded, inside_image)


def _find_fault(
    given, physical, start, total, placeholders, counts, expanded, num_image_embeddings, cut_at,
    padded_length, room,
) -> tuple[int, int, int, int]:  # fmt: skip
    """``fault, where, found, expected``: the first that applies, in the order of ``Fault``."""
    num_tokens, num_images, found = start.size - 1, counts.size, placeholders.size
    edges = [given] if physical is given else [given, physical]
    for cu in edges:
        if cu[0] != 0:
            return Fault.START, 0, int(cu[0]), 0
    steps = [steps_of(cu) for cu in edges]
    for lengths in steps:
        if (seq := _first(lengths < 0)) is not None:
            return Fault.DECREASING, seq, int(lengths[seq]), 0
    if found > num_images:
        return Fault.TOO_FEW_IMAGES, int(placeholders[num_images]), num_images, found
    if found < num_images:
        return Fault.TOO_MANY_IMAGES, 0, num_images, found
    if (image := _first(counts < 1)) is not None:
        return Fault.TOKENS_PER_IMAGE, image, int(counts[image]), 1
    if total > INT32_MAX:
        return Fault.OVERFLOW, 0, total, INT32_MAX
    embeddings = total - num_tokens + num_images
    if num_image_embeddings not in (-1, embeddings):
        return Fault.IMAGE_EMBEDDINGS, 0, embeddings, num_image_embeddings

    last = int(physical[-1])
    if expanded:  # taken at their word, unless they can only be collapsed
        images_end = int(placeholders[-1]) + 1 if found else 0
        spaces = spaces_of(physical, start, images_end, cut_at)
        if spaces.collapsed and not spaces.expanded:
            where = physical.size if spaces.inside_image is None else spaces.inside_image
            return Fault.OTHER_SPACE, where, last, images_end
    end = total if expanded else num_tokens
    if last > end:
        return Fault.PAST_END, 0, last, end
    lengths, widths = steps[0], steps[-1]
    if (seq := _first(lengths > widths)) is not None:
        return Fault.REAL_LENGTH, seq, int(lengths[seq]), int(widths[seq])
    if room is not None and padded_length > room:
        return Fault.NO_ROOM, 0, padded_length, room
    return Fault.NONE, 0, 0, 0


def stage_status(
    cu_seqlens: Tensor,
    physical: Tensor,
    room: Tensor,
    length: int,
    seq_multiple: int,
    truncate: bool,
) -> Tensor:
    """The status of boundaries on a stage without tokens, int64 ``[6]``, computed where they are.

    Args:
        cu_seqlens: int32 ``[B + 1]``, real boundaries, expanded.
        physical: int32 ``[B + 1]``, padded ones.
        room: int32 ``[B + 1]``, the positions of each sequence and of the tail.
        length: how many positions the stage has.
        seq_multiple: what the length of every sequence has to divide by.
        truncate: whether boundaries may lie beyond ``length``.
    """
    lengths, widths = cu_seqlens.diff(), physical.diff()
    last = physical[-1]

    def at_first(values, wrong):
        index = wrong.int().argmax(0, keepdim=True)
        return wrong.any(), index.squeeze(0), values.index_select(0, index).squeeze(0)

    zero = torch.zeros_like(last)
    narrowest = lengths.minimum(widths)
    any_negative, negative, by = at_first(narrowest, narrowest < 0)
    any_uneven, uneven, width = at_first(widths, widths % seq_multiple != 0)
    starts_late = (cu_seqlens[0] != 0) | (physical[0] != 0)
    too_long = (last > length) & (not truncate)
    faults = (
        (Fault.START, starts_late, zero, torch.maximum(cu_seqlens[0], physical[0]), zero),
        (Fault.DECREASING, any_negative, negative, by, zero),
        (Fault.STAGE_LENGTH, too_long, zero, last, zero + length),
        (Fault.STAGE_MULTIPLE, any_uneven, uneven, width, zero + seq_multiple),
    )
    status = torch.zeros(4, dtype=torch.int64, device=last.device)
    for fault, applies, *place in reversed(faults):
        words = torch.stack([zero + int(fault), *place]).long()
        status = torch.where(applies, words, status)
    return torch.cat([status, torch.stack([room.max(), zero]).long()])


def _first(wrong: np.ndarray) -> int | None:
    """Index of the first entry that is true."""
    return int(wrong.argmax()) if wrong.any() else None


def steps_of(edges: np.ndarray) -> np.ndarray:
    """``np.diff``, in a third of its time."""
    return edges[1:] - edges[:-1]


def _within(values: np.ndarray, most: int, least: int = 0) -> np.ndarray:
    """``np.clip``, in a third of its time."""
    return np.minimum(np.maximum(values, least), most)


def _followed_by(values: np.ndarray, last: int) -> np.ndarray:
    """``np.append``, in a third of its time."""
    longer = np.empty(values.size + 1, dtype=np.int64)
    longer[:-1], longer[-1] = values, last
    return longer


def prefix_sum(lengths: np.ndarray) -> np.ndarray:
    """int64 ``[n + 1]``: the exclusive prefix sums of ``[n]`` and their total."""
    sums = np.zeros(lengths.size + 1, dtype=np.int64)
    lengths.cumsum(out=sums[1:])
    return sums


def last_at_or_below(starts: Tensor, value: Tensor) -> Tensor:
    """Index of the last start at or below ``value``: what ``value`` lies in."""
    return (torch.searchsorted(starts, value, right=True) - 1).clamp(0, starts.numel() - 2)


def local_positions(
    cu_seqlens_padded: Tensor, num_positions: int, cp_size: int, cp_rank: int
) -> Tensor:
    """The physical positions that a context-parallel rank owns, int64 ``[S / cp_size]``.

    Every sequence is cut into ``2 * cp_size`` chunks; rank ``r`` owns the ``r``-th from either end.

    Source:
        ``thd_partition_indices_kernel`` of Transformer Engine 2.x.
    """
    local = torch.arange(num_positions // cp_size, device=cu_seqlens_padded.device)
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
    """What stands at each of a rank's positions ``[P]``, with ``P = num_positions / cp_size``.

    Attributes:
        source: int32, a text token, ``PAD``, or ``FIRST_IMAGE - e`` for image embedding ``e``.
        position_ids: int64, restarting in every sequence.
        token_ids: int64, 0 where no text token stands.
        labels: like ``labels``, -100 where nothing is predicted; empty where none were given.
        loss_mask: like ``loss_mask``, 0 where nothing is predicted; empty where none was given.
    """

    source: Tensor
    position_ids: Tensor
    token_ids: Tensor
    labels: Tensor
    loss_mask: Tensor


def expand_tokens(
    layout: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    num_tokens: int,
    num_images: int,
    num_seqs: int,
    image_token_id: int,
    num_positions: int,
    cp_size: int,
    cp_rank: int,
) -> ExpandedTokens:
    """Find the token that each of a rank's positions belongs to, and which of its positions it is.

    Returns:
        ``ExpandedTokens``.

    Source:
        ``LLaVAModel._preprocess_data`` of Megatron-Core 0.16.1 for labels and loss mask within a
        sequence, and of main for ``token_ids``.
    """
    seq_start, cu, input_ids, expanded_start, image_start, cu_image_embeddings = maps_of(
        layout, num_tokens, num_images, num_seqs
    )
    cu, seq_start, starts = cu.long(), seq_start.long(), expanded_start.long()
    position = local_positions(cu, num_positions, cp_size, cp_rank)
    seq = last_at_or_below(cu, position)
    unpadded, seq_end = seq_start[seq] + position - cu[seq], seq_start[seq + 1]
    is_pad = unpadded >= seq_end

    token = last_at_or_below(starts, unpadded)
    within = unpadded - starts[token]
    is_placeholder = torch.isin(expanded_start, image_start)
    is_image = is_placeholder[token] & ~is_pad
    is_text = ~is_image & ~is_pad
    source = torch.where(is_pad, PAD, token)
    if num_images:
        image = torch.searchsorted(image_start, starts[token].int()).clamp(max=num_images - 1)
        source = torch.where(is_image, FIRST_IMAGE - cu_image_embeddings[image] - within, source)
    token_ids = torch.where(is_text, input_ids[token], 0).long()

    # The last position of a token predicts the next one, unless that is an image of the same
    # sequence.
    is_last = unpadded + 1 == starts[token + 1]
    before_image = is_placeholder[token + 1] & is_last & (unpadded + 1 < seq_end)
    new_labels, new_loss_mask = token_ids.new_empty(0), token_ids.new_empty(0)
    trains = ~before_image & ~is_pad
    if labels is not None or loss_mask is not None:
        if labels is not None:
            label = labels[token]
            # A row-wide shift made this one: the next sequence begins with an image.
            leaked = (label == image_token_id) & (unpadded + 1 == seq_end)
            trains = trains & ~(leaked & (token + 1 < num_tokens))
            new_labels = torch.where(trains & is_last, label, IGNORE_INDEX)
        if loss_mask is not None:
            new_loss_mask = loss_mask[token].where(trains & is_text, loss_mask.new_zeros(()))
    return ExpandedTokens(source.int(), position - cu[seq], token_ids, new_labels, new_loss_mask)


class SourcePositions(NamedTuple):
    """The inverse of ``source``, -1 for what is not on this rank (a placeholder, what was cut off,
    what another rank owns).

    Attributes:
        text: int32 ``[T]``, where the embedding of each text token went.
        images: int32 ``[num_image_embeddings]``, where each image embedding went.
    """

    text: Tensor
    images: Tensor


def source_positions(
    layout: Tensor,
    num_tokens: int,
    num_images: int,
    num_seqs: int,
    num_image_embeddings: int,
    cp_size: int,
    cp_rank: int,
) -> SourcePositions:
    """Invert ``source``.

    Said here as what it is, a scatter; the kernel searches, so that it writes every entry once.

    Returns:
        ``SourcePositions``.
    """
    num_positions = int(maps_of(layout, num_tokens, num_images, num_seqs).cu_seqlens_padded[-1])
    source = expand_tokens(
        layout, None, None, num_tokens, num_images, num_seqs, 0, num_positions, cp_size, cp_rank
    ).source.long()
    position = torch.arange(source.numel(), dtype=torch.int32, device=source.device)
    text = position.new_full((num_tokens,), -1)
    images = position.new_full((num_image_embeddings,), -1)
    embedding = FIRST_IMAGE - source
    is_text, is_image = source >= 0, (source < PAD) & (embedding < num_image_embeddings)
    text[source[is_text]] = position[is_text]
    images[embedding[is_image]] = position[is_image]
    return SourcePositions(text, images)


def expand_embeddings(
    text: Tensor,
    images: Tensor | None,
    source: Tensor,
    text_position: Tensor | None = None,
    image_position: Tensor | None = None,
) -> Tensor:
    """Fill every position, ``[P, H]``, from text ``[T, H]`` and images ``[L, tiles, H]``.

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


def collect_gradients(grad: Tensor, index: Tensor, length: int, tiles: int) -> Tensor:
    """The adjoint of ``expand_embeddings`` for one source: ``[length, tiles, H]`` from ``[P, H]``.

    Vector ``e`` of the source, counted tile by tile, takes ``grad[index[e]]``, or zero where there
    is no such position, -1.
    """
    num_positions, width = grad.shape
    table = torch.cat([grad, grad.new_zeros(1, width)])
    vectors = table[torch.where(index < 0, num_positions, index.long())]
    return vectors.view(tiles, length, width).transpose(0, 1).contiguous()
