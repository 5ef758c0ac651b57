"""Where an image's tokens go in the prompt: into the user's turn, or where its placeholder stands.

A block (begin marker, placeholders, end marker) that stands outside the user's turn, after BOS say,
makes a model answer that it sees no image.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..errors import PackingError, PlaceholderMismatch
from .kinds import (
    as_boundaries,
    as_counts,
    as_ids,
    as_list,
    as_row,
    as_token,
    like,
    like_ids,
    nested,
    shorten,
)

IGNORE_INDEX = -100  # what PyTorch's and Megatron's losses skip


@dataclass(frozen=True, eq=False)
class Placement:
    """A prompt with its image blocks, and everything that had to move with them.

    What was given as a list is a list here, what was given as a tensor is a tensor of its dtype.

    Attributes:
        output_ids: the prompt with all blocks in it.
        insert_at: the index in ``prompt_ids`` that the blocks stand before, an int, where they were
            spliced in one place; otherwise a list with one index per block (packed rows, given
            turns, placeholders expanded in place).
        block_spans: ``[start, stop)`` of every block in ``output_ids``.
        labels: with -100 where they are about a token of a block, None if none were given.
        loss_mask: with 0 there, None if none was given.
        position_ids: restarting in every sequence.
        cu_seqlens: the moved boundaries, None if none were given.
        mm_token_type_ids: 1 at every ``image_token_id``, 0 elsewhere; None where that is unknown.
    """

    output_ids: Any
    insert_at: int | list[int]
    block_spans: list[list[int]]
    labels: Any
    loss_mask: Any
    position_ids: Any
    cu_seqlens: Any
    mm_token_type_ids: Any


def splice_image_blocks(
    prompt_ids: Any,
    blocks: Sequence[Any],
    turn_opener: Any,
    bos_token_id: int | None = None,
) -> Any:
    """Put all image blocks, in order, right after the last user-turn opener.

    Without an opener to be found (empty, absent, longer than the prompt) they go after the first
    token; with ``bos_token_id`` given, after it if the prompt begins with it and else to the front,
    because the first token of a prompt that was cut on the left is nobody's BOS. An empty prompt
    gives the blocks alone.

    Args:
        prompt_ids: token ids ``[T]``: a list, or an integer tensor ``[T]`` or ``[1, T]``.
        blocks: the token ids of each image, begin and end markers included.
        turn_opener: the token ids that open a user's turn, such as ``<|im_start|>user\\n``.
        bos_token_id: the id a whole prompt begins with, where the family has one.

    Returns:
        The prompt with its blocks, of the same kind as ``prompt_ids``.

    Raises:
        PackingError: an argument is not a row of ints.

    Source:
        Chat templates of Gemma 3 and 4, Qwen-VL and InternVL, which all put images inside the turn.

    Example:
        >>> prompt = [2, 105, 2364, 107, 555, 106, 107]
        >>> splice_image_blocks(prompt, [[900, 258880, 901]], [105, 2364, 107])
        [2, 105, 2364, 107, 900, 258880, 901, 555, 106, 107]
    """
    placement = place_image_blocks(prompt_ids, blocks, turn_opener, bos_token_id=bos_token_id)
    return placement.output_ids


def place_image_blocks(
    prompt_ids: Any,
    blocks: Sequence[Any],
    turn_opener: Any,
    *,
    bos_token_id: int | None = None,
    image_token_id: int | None = None,
    images_per_turn: Sequence | None = None,
    blocks_per_seq: Sequence[int] | None = None,
    labels: Any = None,
    loss_mask: Any = None,
    cu_seqlens: Any = None,
    prompt_token_id: int | None = None,
    shifted: bool = False,
) -> Placement:
    """Put every image block where it belongs, and move labels, loss mask and boundaries along.

    Each sequence by itself: where it already holds one placeholder per image, each placeholder
    becomes its block, in place, as Hugging Face processors do it. The markers of a block, where all
    of them already surround its placeholder, are not repeated. A sequence without placeholders gets
    its blocks after the last turn opener, or after the openers that ``images_per_turn`` says, or
    where ``splice_image_blocks`` falls back to.

    Args:
        prompt_ids: token ids ``[T]`` or ``[1, T]``, one prompt or one packed row.
        blocks: the token ids of each image, in the order of the images in the row.
        turn_opener: the token ids that open a user's turn; tool results open user turns too.
        bos_token_id: the id a whole prompt begins with.
        image_token_id: the placeholder. Without it nothing is expanded in place.
        images_per_turn: how many images each user turn holds, one entry for every occurrence of
            the opener; for a packed row all turns of the row, or one list per sequence. Where
            placeholders say where the images are, it is only checked against them.
        blocks_per_seq: how many images each sequence of a packed row has. Left out, it follows from
            ``images_per_turn`` or from the placeholders, if these are one per image.
        labels: ``[T]``, one for every token.
        loss_mask: ``[T]``.
        cu_seqlens: ``[B + 1]``, boundaries of the packed row; tokens past the last one stay last.
        prompt_token_id: what stands for an image in the prompt, where that is another token than
            the placeholder in the blocks (Gemma 3 writes begin-of-image there).
        shifted: labels and loss mask are shifted, as Megatron's are: entry ``t`` is about token
            ``t + 1``. The entry before a block is not trained then, and that of the block's last
            token takes over what stood there: it predicts the same token.

    Returns:
        A ``Placement``.

    Raises:
        PlaceholderMismatch: a sequence has placeholders, but not one per image; or
            ``blocks_per_seq`` or ``images_per_turn`` add up to another number than there are
            blocks.
        PackingError: ``images_per_turn`` has another number of entries than the row has turns; it
            is unknown which sequence a block belongs to; an argument is not a row of ints.

    Example:
        Two turns, one image in the first and two in the second:

        >>> opener, prompt = [5, 6], [5, 6, 10, 5, 6, 20]
        >>> blocks = [[7, 1, 8], [7, 2, 8], [7, 3, 8]]
        >>> placed = place_image_blocks(prompt, blocks, opener, images_per_turn=[1, 2])
        >>> placed.output_ids
        [5, 6, 7, 1, 8, 10, 5, 6, 7, 2, 8, 7, 3, 8, 20]
        >>> placed.insert_at, placed.block_spans
        ([2, 5, 5], [[2, 5], [8, 11], [11, 14]])

        A placeholder wins over the opener:

        >>> place_image_blocks([5, 6, 10, 9], [[7, 9, 9, 8]], opener, image_token_id=9).output_ids
        [5, 6, 10, 7, 9, 9, 8]
    """
    ids = as_ids(prompt_ids, "prompt_ids")
    opener = as_ids([] if turn_opener is None else turn_opener, "turn_opener")
    bos_token_id = as_token(bos_token_id, "bos_token_id")
    image_token_id = as_token(image_token_id, "image_token_id")
    prompt_token_id = as_token(prompt_token_id, "prompt_token_id")
    blocks = [as_ids(one, f"blocks[{i}]") for i, one in enumerate(as_list(blocks, "blocks"))]
    bounds = [0, len(ids)] if cu_seqlens is None else as_boundaries(cu_seqlens, len(ids))
    starts = [*bounds, len(ids)] if bounds[-1] < len(ids) else bounds  # the tail has no images
    seqs = list(pairwise(starts))
    stands_for_image = image_token_id if prompt_token_id is None else prompt_token_id

    turn_ends = [_opener_ends(ids[start:stop], opener, start) for start, stop in seqs]
    placeholders = [_find(ids, stands_for_image, start, stop) for start, stop in seqs]
    num_seqs = len(bounds) - 1
    turns = _turns_per_seq(images_per_turn, turn_ends[:num_seqs], len(blocks))
    counts = _blocks_per_seq(blocks_per_seq, turns, placeholders[:num_seqs], len(blocks))

    edits: list[_Edit] = []
    for seq, (start, stop) in enumerate(seqs):
        num_blocks = counts[seq] if seq < num_seqs else 0
        turn = turns[seq] if seq < num_seqs else None
        mine = range(len(edits), len(edits) + num_blocks)
        found = placeholders[seq]
        if found:
            where = f"sequence {seq}" if seq < num_seqs else "past the last boundary"
            _check_one_per_image(where, len(found), num_blocks, stands_for_image)
            if turn is not None:
                _check_turns(seq, found, turn, turn_ends[seq])
            edits += _expand_in_place(ids, found, blocks, mine, image_token_id, start, stop, seq)
            continue
        if turn is None:
            places = [
                _splice_at(ids, opener, turn_ends[seq], bos_token_id, start, stop)
            ] * num_blocks
        else:
            places = [e for e, n in zip(turn_ends[seq], turn, strict=True) for _ in range(n)]
        edits += [_Edit(at, at, i, seq) for at, i in zip(places, mine, strict=True)]

    insert_at: int | list[int] = [edit.start for edit in edits]
    if num_seqs == len(seqs) == 1 and not placeholders[0] and turns[0] is None:
        insert_at = _splice_at(ids, opener, turn_ends[0], bos_token_id, 0, len(ids))
    output, spans, new_starts = _apply(ids, edits, blocks, starts)
    moved = len(ids), edits, blocks, new_starts, shifted
    positions = [p for start, stop in pairwise(new_starts) for p in range(stop - start)]
    types = None
    if image_token_id is not None:
        types = like_ids(prompt_ids, [int(token == image_token_id) for token in output])
    return Placement(
        output_ids=like_ids(prompt_ids, output),
        insert_at=insert_at,
        block_spans=spans,
        labels=_edit_tokens(labels, "labels", IGNORE_INDEX, *moved),
        loss_mask=_edit_tokens(loss_mask, "loss_mask", 0, *moved),
        position_ids=like(prompt_ids, positions, torch.int64),
        cu_seqlens=None if cu_seqlens is None else like(cu_seqlens, new_starts[: num_seqs + 1]),
        mm_token_type_ids=types,
    )


@dataclass(frozen=True)
class _Edit:
    """``[start, stop)`` of the prompt, in sequence ``seq``, becomes a block."""

    start: int
    stop: int
    block: int
    seq: int


def _opener_ends(ids: list[int], opener: list[int], offset: int) -> list[int]:
    """Where each occurrence of the opener ends, overlapping ones too, in time linear in the row."""
    if not opener:
        return []
    fallback, k = [0], 0  # Knuth-Morris-Pratt: openers such as [7, 7, 7, ...] stay linear
    for token in opener[1:]:
        while k and token != opener[k]:
            k = fallback[k - 1]
        k += token == opener[k]
        fallback.append(k)
    ends, k = [], 0
    for position, token in enumerate(ids, offset + 1):
        while k and (k == len(opener) or token != opener[k]):
            k = fallback[k - 1]
        k += token == opener[k]
        if k == len(opener):
            ends.append(position)
    return ends


def _find(ids: list[int], token_id: int | None, start: int, stop: int) -> list[int]:
    if token_id is None:
        return []
    return [position for position in range(start, stop) if ids[position] == token_id]


def _splice_at(ids, opener, ends, bos_token_id, start, stop) -> int:
    """After the last opener; without one after the first token, or where a BOS says."""
    if ends:
        return ends[-1]
    if start == stop:
        return start
    return start + (bos_token_id is None or ids[start] == bos_token_id)


def _turns_per_seq(images_per_turn, turn_ends, num_blocks) -> list[list[int] | None]:
    """``images_per_turn`` as one list per sequence, None where nothing was said."""
    num_turns = [len(ends) for ends in turn_ends]
    if images_per_turn is None:
        return [None] * len(turn_ends)
    images_per_turn = as_list(images_per_turn, "images_per_turn")
    if not any(entry is None or nested(entry) for entry in images_per_turn):
        flat = as_counts(images_per_turn, "images_per_turn")
        if len(flat) != sum(num_turns):
            raise PackingError(
                f"images_per_turn has {len(flat)} entries, but the turn opener occurs "
                f"{sum(num_turns)} times; pass one for each (tool results open user turns too)"
            )
        stops = [0, *accumulate(num_turns)]
        turns = [flat[start:stop] for start, stop in pairwise(stops)]
    else:
        if len(images_per_turn) != len(turn_ends):
            raise PackingError(
                f"images_per_turn has {len(images_per_turn)} lists, but the row has "
                f"{len(turn_ends)} sequences"
            )
        turns = [
            None if entry is None else as_counts(entry, f"images_per_turn[{seq}]")
            for seq, entry in enumerate(images_per_turn)
        ]
        for seq, turn in enumerate(turns):
            if turn is not None and len(turn) != num_turns[seq]:
                raise PackingError(
                    f"sequence {seq}: images_per_turn has {len(turn)} entries, but the turn opener "
                    f"occurs {num_turns[seq]} times; pass one for each (tool results open user "
                    f"turns too)"
                )
    total = sum(sum(turn) for turn in turns if turn is not None)
    if None not in turns and total != num_blocks:
        raise PlaceholderMismatch(
            actual=num_blocks,
            expected=total,
            message=f"images_per_turn adds up to {total} images, but there are {num_blocks} blocks",
        )
    return turns


def _blocks_per_seq(blocks_per_seq, turns, placeholders, num_blocks) -> list[int]:
    """How many blocks each sequence gets: said, or the only possibility."""
    num_seqs, found = len(placeholders), [len(positions) for positions in placeholders]
    said = [None if turn is None else sum(turn) for turn in turns]
    if blocks_per_seq is not None:
        counts = as_counts(blocks_per_seq, "blocks_per_seq")
        if len(counts) != num_seqs:
            raise PackingError(
                f"blocks_per_seq has {len(counts)} entries, but the row has {num_seqs} sequences"
            )
        if sum(counts) != num_blocks:
            raise PlaceholderMismatch(
                actual=num_blocks,
                expected=sum(counts),
                message=f"blocks_per_seq {shorten(counts)} adds up to {sum(counts)} images, but "
                f"there are {num_blocks} blocks",
            )
    elif num_seqs == 1:
        counts = [num_blocks]
    elif num_seqs and None not in said:
        counts = said
    elif sum(found) == num_blocks:
        counts = found
    elif any(found):
        raise PlaceholderMismatch(
            actual=num_blocks,
            expected=sum(found),
            message=f"the row has {sum(found)} placeholders, {shorten(found)} in its sequences, "
            f"but there are {num_blocks} blocks; pass one for each, or say blocks_per_seq",
        )
    else:
        raise PackingError(
            f"{num_blocks} blocks for a row of {num_seqs} sequences without placeholders; say "
            f"blocks_per_seq"
        )
    for seq, (count, turn) in enumerate(zip(counts, said, strict=True)):
        if turn is not None and turn != count:
            raise PlaceholderMismatch(
                actual=count,
                expected=turn,
                message=f"sequence {seq}: images_per_turn adds up to {turn} images, but the "
                f"sequence has {count} blocks",
            )
    return counts


def _check_one_per_image(where: str, found: int, num_blocks: int, token_id: int) -> None:
    if found != num_blocks:
        raise PlaceholderMismatch(
            actual=num_blocks,
            expected=found,
            message=f"{where}: {found} placeholders (id {token_id}) but {num_blocks} "
            f"blocks; pass one block for each placeholder, or a prompt without placeholders",
        )


def _check_turns(seq: int, placeholders: list[int], turn: list[int], ends: list[int]) -> None:
    """Placeholders say where the images are: ``images_per_turn`` must say the same."""
    found = [0] * len(turn)
    for position in placeholders:
        at = bisect_right(ends, position) - 1
        if at >= 0:
            found[at] += 1
    if found != turn:
        raise PlaceholderMismatch(
            actual=sum(turn),
            expected=sum(found),
            message=f"sequence {seq}: the turns hold {shorten(found)} placeholders, but "
            f"images_per_turn says {shorten(turn)}; leave it out where the prompt has placeholders",
        )


def _expand_in_place(ids, placeholders, blocks, mine, image_token_id, start, stop, seq):
    """Each placeholder becomes its block, together with the markers that already surround it."""
    edits, last = [], start
    limits = [*placeholders[1:], stop]
    for position, limit, i in zip(placeholders, limits, mine, strict=True):
        block = blocks[i]
        first, end = position, position + 1
        if image_token_id in block:
            before = block.index(image_token_id)
            after = block[::-1].index(image_token_id)
            low, high = position - before, position + 1 + after
            inside = low >= last and high <= limit
            same_end = ids[end:high] == block[len(block) - after :]
            if inside and same_end and ids[low:position] == block[:before]:
                first, end = low, high
        edits.append(_Edit(first, end, i, seq))
        last = end
    return edits


def _apply(ids, edits, blocks, starts) -> tuple[list[int], list[list[int]], list[int]]:
    """The edited row, the span of every block in it, and where its sequences now start."""
    output, spans, last = [], [], 0
    lengths = [stop - start for start, stop in pairwise(starts)]
    for edit in edits:
        block = blocks[edit.block]
        output += ids[last : edit.start]
        spans.append([len(output), len(output) + len(block)])
        output += block
        last = edit.stop
        lengths[edit.seq] += len(block) - (edit.stop - edit.start)
    return output + ids[last:], spans, [0, *accumulate(lengths)]


def _edit_tokens(values, name, fill, num_tokens, edits, blocks, new_starts, shifted):
    """A per-token array after the edits, with ``fill`` for every token of a block.

    Shifted, the block's last token predicts what the token before it, or the last one that it
    replaces, predicted; a sequence has no entry about its first token.
    """
    if values is None:
        return None
    row = as_row(values, name, num_tokens)
    output, last = [], 0
    for edit in edits:
        output += row[last : edit.start]
        entries = [fill] * len(blocks[edit.block])
        if shifted:
            begins = len(output) == new_starts[edit.seq]
            before = fill if begins else output.pop()
            entries.append(row[edit.stop - 1] if edit.stop > edit.start else before)
            entries = entries[begins:]
        output += entries
        last = edit.stop
    return like(values, output + row[last:])
