"""Where image and video tokens go in the prompt: into the user's turn, or to their placeholders.

A block (begin marker, placeholders, end marker) that stands outside the user's turn, after BOS say,
makes a model answer that it sees no image.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import torch

from ..errors import PlaceholderMismatch
from ..reference import IGNORE_INDEX
from . import kinds
from .families import Family, resolve
from .kinds import as_boundaries, as_ids, as_list, like, like_ids, require, shorten


@dataclass(frozen=True, eq=False)
class Placement:
    """A prompt with its image blocks, and everything that had to move with them.

    What was given as a list is a list here, what was given as a tensor is a tensor of its dtype.

    Attributes:
        output_ids: the prompt with all blocks in it.
        insert_at: the index in ``prompt_ids`` that the blocks stand before, an int, where they were
            spliced in one place; otherwise a list with one index per block.
        block_spans: ``[start, stop)`` of every block in ``output_ids``.
        labels: with -100 where they are about a token of a block, None if none were given.
        loss_mask: with 0 there, None if none was given.
        position_ids: restarting in every sequence.
        cu_seqlens: the moved boundaries, None if none were given.
        mm_token_type_ids: 1 at placeholders of images, 2 at those of videos, 0 elsewhere; None
            where neither is known.
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
    prompt_ids: Any, blocks: Sequence[Any], turn_opener: Any, bos_token_id: int | None = None
) -> Any:
    """Put all image blocks, in order, right after the last user-turn opener.

    Where there is none they go after the first token; with ``bos_token_id`` given, to the front if
    that is not the first token: of a prompt that was cut on the left, the first token is no BOS.

    Args:
        prompt_ids: token ids ``[T]``: a list, or an integer tensor ``[T]`` or ``[1, T]``.
        blocks: the token ids of each image, begin and end markers included.
        turn_opener: the token ids that open a user's turn, such as ``<|im_start|>user\\n``.
        bos_token_id: the id a whole prompt begins with, where the family has one.

    Returns:
        The prompt with its blocks, as the kind that ``prompt_ids`` is.

    Raises:
        PackingError: an argument is not a row of ints.

    Source:
        Chat templates of Gemma 3 and 4, Qwen-VL and InternVL, which all put images inside the turn.

    Example:
        >>> prompt = [2, 105, 2364, 107, 555, 106, 107]
        >>> splice_image_blocks(prompt, [[900, 258880, 901]], [105, 2364, 107])
        [2, 105, 2364, 107, 900, 258880, 901, 555, 106, 107]
    """
    ids = as_ids(prompt_ids, "prompt_ids")
    opener = as_ids([] if turn_opener is None else turn_opener, "turn_opener")
    bos = None if bos_token_id is None else kinds.as_int(bos_token_id, "bos_token_id")
    ends = _opener_ends(ids, opener, 0, len(ids))
    at = ends[-1] if ends else int(bool(ids) and bos in (None, ids[0]))
    return like_ids(prompt_ids, [*ids[:at], *chain(*_as_blocks(blocks)), *ids[at:]])


def place_image_blocks(
    prompt_ids: Any, blocks: Sequence[Any], turn_opener: Any = None, *,
    family: str | Family | None = None, images_per_turn: Sequence | None = None,
    labels: Any = None, loss_mask: Any = None, cu_seqlens: Any = None, **overrides: Any,
) -> Placement:  # fmt: skip
    """Put every block where it belongs, and move labels, loss mask and boundaries along.

    Each sequence by itself: where it already holds one placeholder per image and video, each
    placeholder becomes its block, in place, as Hugging Face processors do it; markers of a block
    that already surround its placeholder are not repeated. A sequence without placeholders gets its
    blocks after the last turn opener, or after the openers that ``images_per_turn`` says.

    Args:
        prompt_ids: token ids ``[T]`` or ``[1, T]``, one prompt or one packed row.
        blocks: the token ids of each image or video, in their order in the row.
        turn_opener: the token ids that open a user's turn, where no family says them.
        family: a registered family, or a ``Family``: its opener and its placeholders.
        images_per_turn: how many blocks each user turn holds, one entry for every occurrence of
            the opener in the row (tool results open turns too). Placeholders must agree with it.
        labels: ``[T]``, one for every token.
        loss_mask: ``[T]``.
        cu_seqlens: ``[B + 1]``, boundaries of the packed row; tokens past the last one stay last.
        **overrides: instead of what the family says, ``image_token_id``, ``video_token_id``,
            ``prompt_token_id``, ``video_prompt_token_id``; ``shifted=True`` where entry ``t`` of
            labels and loss mask is about token ``t + 1``, as Megatron's: then the entry before a
            block is not trained, and that of its last token predicts what it did. Also
            ``blocks_per_seq``, how many blocks each sequence of a packed row has, where neither
            ``images_per_turn`` nor placeholders say it.

    Raises:
        PlaceholderMismatch: placeholders, ``blocks_per_seq`` or ``images_per_turn`` are for another
            number of blocks.
        PackingError: a sequence has neither placeholders nor the opener, a block is an image where
            the prompt has a video, it is unknown which turn or sequence a block belongs to, or an
            argument is not a row of ints.

    Example:
        >>> prompt, opener, blocks = [5, 6, 10, 5, 6, 20], [5, 6], [[7, 9, 8], [7, 9, 9, 8]]
        >>> placed = place_image_blocks(prompt, blocks, opener, images_per_turn=[1, 1])
        >>> placed.output_ids, placed.insert_at, placed.block_spans
        ([5, 6, 7, 9, 8, 10, 5, 6, 7, 9, 9, 8, 20], [2, 5], [[2, 5], [8, 12]])

        A placeholder wins over the opener:

        >>> place_image_blocks([5, 6, 10, 9], [[7, 9, 9, 8]], opener, image_token_id=9).output_ids
        [5, 6, 10, 7, 9, 9, 8]
    """
    ids, blocks_per_seq = as_ids(prompt_ids, "prompt_ids"), overrides.pop("blocks_per_seq", None)
    opener = {} if turn_opener is None else {"turn_opener": turn_opener}
    known = ("turn_opener", "turn_opener_text", "shifted")
    one, blocks = resolve(family, {**opener, **overrides}, known), _as_blocks(blocks)
    bounds = as_boundaries(cu_seqlens, len(ids))
    seqs = list(pairwise(kinds.with_tail(bounds, len(ids))))  # the tail has no images
    num_seqs, stand_ins = len(bounds) - 1, _stand_ins(one)
    done = {one.image_token_id, one.video_token_id} - {None, *stand_ins} & {*ids}
    found = f"prompt_ids hold {min(done, default=None)}, a row of an image that has its block"
    require(not done, f"{found} already; expected {' or '.join(map(str, stand_ins))} for each")
    turn_ends = [_opener_ends(ids, one.turn_opener, *seq) for seq in seqs]
    places = [[p for p in range(*seq) if ids[p] in stand_ins] for seq in seqs]
    turns = _turns_per_seq(images_per_turn, turn_ends[:num_seqs], len(blocks))
    counts = _blocks_per_seq(blocks_per_seq, turns, places[:num_seqs], len(blocks))

    edits: list[list[_Edit]] = []
    firsts = accumulate([0, *counts])
    plan = zip(seqs, places, turn_ends, firsts, [*counts, 0], [*turns, None], strict=False)
    for seq, (span, found, ends, first, number, turn) in enumerate(plan):
        where = f"sequence {seq}" if seq < num_seqs else "past the last boundary"
        if found:
            message = f"{where}: {len(found)} placeholders (id {ids[found[0]]}) but {number} blocks"
            _agree(len(found), number, f"{message}; pass one for each, or none of these ids")
            _check_turns(where, found, turn, ends)
            edits.append(_expand_in_place(ids, found, blocks, first, one, *span))
        else:
            what = "turn opener does not occur" if one.turn_opener else "no turn opener is known"
            what += f" ({one.turn_opener_text!r} as text)" if one.turn_opener_text else ""
            message = f"{where}: {what}, nor a placeholder; its blocks would go after BOS, outside "
            message += "the user's turn; pass turn_opener, or use splice_image_blocks"
            require(ends or not number, message)
            into = zip(ends, turn, strict=True) if turn else [(end, number) for end in ends[-1:]]
            edits.append([_Edit(end, end) for end, times in into for _ in range(times)])

    output, source, spans, new_starts = _apply(ids, seqs, edits, blocks, one.shifted)
    insert_at: int | list[int] = [edit.start for edit in chain(*edits)]
    if num_seqs == len(seqs) == 1 and not places[0] and turns[0] is None:
        insert_at = turn_ends[0][-1] if turn_ends[0] else 0

    def moved(values, name: str, fill: int):
        if values is None:
            return None
        row = kinds.as_row(values, name)
        right = name != "labels" or kinds.holds_ints(values)
        require(right, "labels hold floats, expected token ids")
        message = f"{name} is {len(row)} entries, but the row has {len(ids)} tokens"
        require(len(row) == len(ids), message)
        return like(values, [fill if at is None else row[at] for at in source])

    positions = [p for start, stop in pairwise(new_starts) for p in range(stop - start)]
    return Placement(
        output_ids=like_ids(prompt_ids, output),
        insert_at=insert_at,
        block_spans=spans,
        labels=moved(labels, "labels", IGNORE_INDEX),
        loss_mask=moved(loss_mask, "loss_mask", 0),
        position_ids=like(prompt_ids, positions, torch.int64),
        cu_seqlens=None if cu_seqlens is None else like(cu_seqlens, new_starts[: num_seqs + 1]),
        mm_token_type_ids=_types(prompt_ids, output, spans, chain(*edits), one),
    )


class _Edit(NamedTuple):
    """``[start, stop)`` of the prompt becomes the next block."""

    start: int
    stop: int
    video: bool = False


def _agree(expected: int, actual: int, message: str) -> None:
    if expected != actual:
        raise PlaceholderMismatch(message, actual=actual, expected=expected)


def _as_blocks(blocks) -> list[list[int]]:
    return [as_ids(one, f"blocks[{i}]") for i, one in enumerate(as_list(blocks, "blocks"))]


def _stand_ins(one: Family) -> dict[int, bool]:
    """What stands for an image or a video in the prompt, and whether it is a video."""
    image = one.image_token_id if one.prompt_token_id is None else one.prompt_token_id
    video = one.video_token_id if one.video_prompt_token_id is None else one.video_prompt_token_id
    return {token: kind for token, kind in ((video, True), (image, False)) if token is not None}


def _opener_ends(ids: list[int], opener: Sequence[int], start: int, stop: int) -> list[int]:
    """Where each occurrence of the opener in ``[start, stop)`` ends, overlapping ones too."""
    opener, size = list(opener), len(opener)
    starts = range(start, stop - size + 1) if size else ()
    return [at + size for at in starts if ids[at : at + size] == opener]


def _turns_per_seq(images_per_turn, turn_ends, num_blocks: int) -> list[list[int] | None]:
    """``images_per_turn`` as one list per sequence, None where nothing was said."""
    if images_per_turn is None:
        return [None] * len(turn_ends)
    flat = as_ids(as_list(images_per_turn, "images_per_turn"), "images_per_turn", minimum=0)
    stops = [0, *accumulate(len(ends) for ends in turn_ends)]
    found = f"images_per_turn has {len(flat)} entries"
    require(len(flat) == stops[-1], f"{found}, but the turn opener occurs {stops[-1]} times")
    found = f"images_per_turn adds up to {sum(flat)} images"
    _agree(sum(flat), num_blocks, f"{found}, but there are {num_blocks} blocks")
    return [flat[start:stop] for start, stop in pairwise(stops)]


def _blocks_per_seq(blocks_per_seq, turns, places, num_blocks: int) -> list[int]:
    """How many blocks each sequence gets: said, or the only possibility."""
    num_seqs, said = len(places), [sum(turn) for turn in turns if turn is not None]
    if blocks_per_seq is not None:
        counts, name = as_ids(blocks_per_seq, "blocks_per_seq", minimum=0), "blocks_per_seq"
        found = f"blocks_per_seq has {len(counts)} entries"
        require(len(counts) == num_seqs, f"{found}, but the row has {num_seqs} sequences")
    elif said or num_seqs == 1:
        return said or [num_blocks]
    else:
        counts, name = [len(found) for found in places], "placeholders of the sequences"
        found = f"{num_blocks} blocks for {num_seqs} sequences without placeholders"
        require(any(counts) or not num_blocks, f"{found}; say blocks_per_seq")
    found = f"{name} {shorten(counts)} add up to {sum(counts)}"
    _agree(sum(counts), num_blocks, f"{found}, but there are {num_blocks} blocks")
    for seq, (count, turn) in enumerate(zip(counts, said, strict=False)):
        _agree(turn, count, f"sequence {seq}: images_per_turn says {turn}, blocks_per_seq {count}")
    return counts


def _check_turns(where: str, places: list[int], turn: list[int] | None, ends: list[int]) -> None:
    """Placeholders say where the images are: ``images_per_turn`` must say the same."""
    at = [bisect_right(ends, position) - 1 for position in places]
    found = [at.count(number) for number in range(len(ends))]
    if turn not in (None, found):
        message = f"{where}: the turns hold {shorten(found)} placeholders, but images_per_turn "
        message += f"says {shorten(turn)}"
        raise PlaceholderMismatch(message, actual=sum(turn), expected=sum(found))


def _expand_in_place(
    ids, places, blocks, first: int, one: Family, start: int, stop: int
) -> list[_Edit]:
    """Each placeholder becomes its block, together with the markers that already surround it."""
    stand_ins, edits = _stand_ins(one), []
    for i, (position, limit) in enumerate(pairwise([*places, stop]), first):
        video, wanted, other = stand_ins[ids[position]], one.image_token_id, one.video_token_id
        if video and other is not None:
            wanted, other = other, wanted
        there, here = ("a video", "an image") if video else ("an image", "a video")
        fits = other not in blocks[i] or wanted in blocks[i]
        message = f"blocks[{i}] holds {here} (id {other}), but the prompt has {there} there"
        require(fits, f"{message}; pass images and videos in their order in the row")
        low, high = _surrounded(ids, blocks[i], position, wanted)
        if low < start or high > limit:  # a marker of another placeholder, or of another sequence
            low, high = position, position + 1
        edits.append(_Edit(low, high, video))
        start = high
    return edits


def _surrounded(ids: list[int], block: list[int], position: int, token: int | None):
    """What a block replaces: its placeholder, and either all of its markers or the outermost."""
    if token in block:
        before, after = block.index(token), block[::-1].index(token)
        for left, right in ((before, after), (min(before, 1), min(after, 1))):
            low, high = position - left, position + 1 + right
            same_end = ids[position + 1 : high] == block[len(block) - right :]
            if low >= 0 and same_end and ids[low:position] == block[:left] and left + right:
                return low, high
    return position, position + 1


def _apply(ids: list[int], seqs, edits: list[list[_Edit]], blocks: list[list[int]], shifted: bool):
    """The row, where each entry about it comes from (None: nowhere), spans of blocks, starts."""
    output, source, spans, starts, rest = [], [], [], [0], iter(blocks)
    for (first, end), mine in zip(seqs, edits, strict=True):
        inside, last = [], first
        for edit in mine:
            block = next(rest)
            output += ids[last : edit.start] + block
            inside += [*range(last, edit.start)] + [None] * len(block)
            spans.append([len(output) - len(block), len(output)])
            last = edit.stop
        output += ids[last:end]
        inside += range(last, end)
        if shifted:  # the entry about a token stands before it; about the first there is none
            about = [*inside[1:], end][: len(inside)]
            inside = [None if at in (None, first) else at - 1 for at in about]
        source += inside
        starts.append(len(output))
    return output, source, spans, starts


def _types(prompt_ids, output, spans, edits, family: Family) -> Any:
    """1 for images and 2 for videos; a video may be written with the image's placeholder."""
    of_token = {family.video_token_id: 2, family.image_token_id: 1, None: 0}
    if len(of_token) == 1:
        return None
    types = [of_token.get(token, 0) for token in output]
    own_marker = {family.video_start_id} - {family.vision_start_id, None}
    for edit, (start, stop) in zip(edits, spans, strict=True):
        if edit.video or own_marker & set(output[start:stop]):
            types[start:stop] = [2 if kind else 0 for kind in types[start:stop]]
    return like_ids(prompt_ids, types)
