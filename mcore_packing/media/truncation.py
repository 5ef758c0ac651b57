"""Which images survive when a prompt is cut: placeholders vanish, pixel tensors do not."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch

from ..errors import AmbiguousTruncation, PlaceholderMismatch
from . import kinds
from .families import Family, resolve
from .kinds import IGNORE_INDEX, as_flag, as_ids, as_int, as_list, like, require, shorten

_KINDS = ("image", "video")
# What a batch says of its tokens themselves, never of the next one.
_OF_TOKENS = ("input_ids", "tokens", "attention_mask", "mm_token_type_ids", "token_type_ids")
_MAX_CANDIDATES = 8  # an error that lists more helps nobody


@dataclass(frozen=True, eq=False)
class Truncation:
    """What is left of a row, and of everything that belongs to it.

    Positions are those of the row that was given; images (videos) are numbered through all of it.

    Attributes:
        output_ids: the ids that stay, of the same kind as those given.
        keep_positions: where they stood.
        orphan_positions: placeholders and break tokens removed because their image is not whole.
        kept_images, dropped_images, kept_videos, dropped_videos: whose features stay, whose go.
        position_ids: of ``output_ids``, restarting in every sequence.
        cu_seqlens: boundaries of the sequences that still have tokens, None if none were given.
        kept_sequences, max_seqlen: which sequences these are, and the length of the longest.
    """

    output_ids: Any
    keep_positions: list[int]
    orphan_positions: list[int]
    kept_images: list[int]
    dropped_images: list[int]
    kept_videos: list[int]
    dropped_videos: list[int]
    position_ids: Any
    cu_seqlens: Any
    kept_sequences: list[int]
    max_seqlen: int
    _starts: list[int]  # where the sequences, and the tail, began
    _all_sequences: bool  # no boundary is gone: an empty sequence leaves no other trace
    _holes: list[int]  # entries of keep_positions that something inside the cut was removed after
    _shifted: bool  # what the family says of labels

    @property
    def noop(self) -> bool:
        """True where the row stays as it was, with all its images, videos and boundaries."""
        whole = self._all_sequences and len(self.keep_positions) == self._starts[-1]
        return whole and not self.dropped_images and not self.dropped_videos

    def kept_row_ranges(self, rows_per_image: Sequence[int], per: str = "image") -> list[list[int]]:
        """Which rows of a pixel tensor stay: ``[start, stop)`` ranges, adjoining ones merged.

        ``rows_per_image`` has an entry for every image (every video, ``per="video"``) of the row.

        Example:
            >>> cut = truncate([7, 9, 9, 7, 9, 9, 9], [2, 3], 5, 9)
            >>> cut.kept_row_ranges([16, 24])
            [[0, 16]]
        """
        require(per in _KINDS, f"per is {per!r}, expected 'token', 'position', 'image' or 'video'")
        kept, dropped = getattr(self, f"kept_{per}s"), getattr(self, f"dropped_{per}s")
        rows, total = as_ids(rows_per_image, f"rows_per_{per}", 0), len(kept) + len(dropped)
        expected = f"but there were {total} {per}s"
        require(len(rows) == total, f"rows_per_{per} has {len(rows)} entries, {expected}")
        starts = [0, *accumulate(rows)]
        return kinds.merge_spans([starts[item : item + 2] for item in kept])

    def apply(
        self,
        values: Any,
        per: str = "token",
        *,
        rows: Sequence[int] | None = None,
        shifted: bool | None = None,
        fill: Any = None,
        dim: int | None = None,
    ) -> Any:
        """Cut an array as the row was cut.

        Args:
            values: a list, tensor or array with an entry per token, image, video or row; or a dict.
            per: what the first dimension counts: "token", "image" or "video"; or "position" for
                position ids (in a dict known by name), which close up and start at 0 per sequence.
            rows: how many rows of ``values`` each image (each video) has, if not one each.
            shifted: entry ``t`` is about token ``t + 1``, as Megatron's labels; where that was
                removed from inside the row it becomes ``fill``. By default what the family says. In
                a dict this is so of all keys but ids, types, positions and ``attention_mask``.
            fill: by default -100, and 0 for keys with "mask" in them. Floats and unsigned ints,
                such as advantages and masks without a name, need it: 0.
            dim: the dimension of the tokens, where it is neither the first nor the second of
                ``[1, T]``: 1 for the position ids ``[3, T]`` of M-RoPE; -1 where a dict has both.

        Returns:
            What is left, of the same kind; None, and in a dict no key, where no image (no video) or
            no row of one is left: vision encoders do not take zero rows.

        Raises:
            PackingError: ``values`` has another length, holds no signed ints for -100, or looks
                like M-RoPE's position ids, which a mere cut would leave with an offset.

        Example:
            >>> cut = truncate([9, 9, 7, 5, 9, 9], [2, 2], 5, 9, side="left", vision_end_id=7)
            >>> cut.keep_positions, cut.apply({"image_grid_thw": ["first", "second"]}, per="image")
            ([3, 4, 5], {'image_grid_thw': ['second']})
        """
        shifted = self._shifted if shifted is None else as_flag(shifted, "shifted")
        if isinstance(values, Mapping):
            cut = {}
            for key, value in values.items():
                by = "position" if per == "token" and str(key).endswith("position_ids") else per
                zero = 0 if fill is None and "mask" in str(key) else fill
                next_one = shifted and key not in _OF_TOKENS
                if key == "attention_mask":
                    square = [*getattr(value, "shape", ())][-2:] == [self._starts[-1]] * 2 != [1, 1]
                    require(not square, "attention_mask is [T, T]; make one of what is left")
                cut[key] = self.apply(value, by, rows=rows, shifted=next_one, fill=zero, dim=dim)
            return {key: value for key, value in cut.items() if value is not None}
        if values is None:
            return None
        if per in ("token", "position"):
            return self._apply_to_tokens(values, shifted, fill, dim, per == "position")
        require(dim is None, f"dim is for tokens; {per}s are always the first dimension")
        found = kinds.length(values, "values")
        rows = [1] * found if rows is None else as_ids(rows, "rows")
        ranges, expected = self.kept_row_ranges(rows, per), sum(rows)
        require(found == expected, f"values have {found} entries, but {per}s {expected} rows")
        return kinds.take_spans(values, ranges) if ranges else None

    def _apply_to_tokens(self, values, shifted: bool, fill, dim: int | None, positions: bool):
        """``apply`` to what has an entry per token, along any one of its dimensions."""
        kinds.length(values, "values")
        given, ints, total = values, kinds.holds_ints(values), self._starts[-1]
        if isinstance(values, (list, tuple)):
            values = np.fromiter(values, dtype=object, count=len(values))
        shape = values.shape
        if dim is None:  # of [1, 1] the first, unless that is what the ids are
            one_row = len(shape) > 1 and shape[0] == 1
            dim = int(one_row and (total != 1 or getattr(self.output_ids, "ndim", 1) == 2))
        fits = -len(shape) <= as_int(dim, "dim") < len(shape)
        require(fits, f"dim is {dim}, but values have {len(shape)} dimensions")
        found, dim = shape[dim], dim % len(shape)
        where = f" in dimension {dim} of {[*shape]}" if len(shape) > 1 else ""
        expected = f"but the row has {total} tokens"
        require(found == total, f"values have {found} entries{where}, {expected}")
        if positions and dim and shape[0] == 4:  # those of the text, and M-RoPE's three
            both = values[:1], values[1:]
            cut = [self._apply_to_tokens(part, shifted, fill, dim, positions) for part in both]
            return torch.cat(cut) if isinstance(values, torch.Tensor) else np.concatenate(cut)
        before = (slice(None),) * dim
        cut = values[(*before, self.keep_positions)]
        if positions:
            require(ints, "position ids are no ints; pass them as the processor gave them")
            offsets = like(cut.reshape(-1), self._offsets(values, dim))
            cut = cut - offsets.reshape(-1, *[1] * (cut.ndim - dim - 1))
        elif shifted and self._holes:
            known = fill is not None or (ints and "uint" not in str(values.dtype))
            require(known, "values are no signed ints, so they are no labels; pass fill=0")
            fill = IGNORE_INDEX if fill is None else fill
            kinds.check_fits([fill], values.dtype)
            cut[(*before, self._holes)] = fill
        elif dim > 0 and shape[0] in (3, 4) and ints and not shifted:
            moved = any(self._offsets(values, dim))
            require(not moved, 'values look like position ids of M-RoPE; pass per="position"')
        return type(given)(cut.tolist()) if isinstance(given, (list, tuple)) else cut

    def _offsets(self, values, dim: int) -> list[int]:
        """By how much each position that stays moves forward, from all that was removed before."""
        rows = np.asarray(values.cpu() if hasattr(values, "cpu") else values, dtype=np.int64)
        at = rows.min(axis=(*range(dim), *range(dim + 1, rows.ndim)))
        kept, offsets = np.array(self.keep_positions, dtype=np.int64), []
        sequences = np.split(kept, np.searchsorted(kept, self._starts[1:-1]))
        for start, mine in zip(self._starts, sequences, strict=False):
            if len(mine):
                moved = np.cumsum(at[mine] - at[np.concatenate(([start], mine[:-1] + 1))])
                offsets += (moved + (at[mine] - moved).min()).tolist()
        return offsets


def truncate(
    input_ids: Any,
    tokens_per_image: Any,
    max_length: int | Sequence[int],
    image_token_id: int | None = None,
    *,
    side: str | Sequence[str] = "right",
    family: str | Family | None = None,
    tokens_per_video: Any = None,
    cu_seqlens: Any = None,
    **overrides: Any,
) -> Truncation:
    """Cut a row to a length, and drop every image that the cut went through.

    An image whose placeholders all stay is kept, though the cut may have taken its begin marker.

    Args:
        input_ids: the whole row ``[T]`` or ``[1, T]``, one placeholder per feature row.
        tokens_per_image: how many placeholders each image has, in order; the list of its runs
            where they stand in several (runs that adjoin are one): ``[[20, 20]]`` for two frames of
            a video. For a packed row flat ints, or one list per sequence, with runs one level
            deeper: ``[[[2, 2]], [[2, 2]]]``.
        max_length: how many tokens may stay, of the row; or a list, of each sequence.
        side: the side that is cut off: "right" or "left"; one per sequence if ``max_length`` is.
        family: a registered family, or a ``Family``: its placeholders, markers and break tokens.
        tokens_per_video: the same for videos, which stay or go whole, with their timestamps.
        cu_seqlens: ``[B + 1]``, boundaries of a packed row; tokens past the last one stay last.
        image_token_id, **overrides: instead of what the family says, these attributes of
            ``Family``: its ids, ``drop_dangling``, ``shifted``. Or instead of both placeholders
            ``mm_token_type_ids`` ``[T]``: 1 for rows of images, 2 for those of videos, else 0.

    Raises:
        PlaceholderMismatch: the row does not have these placeholders, in number or in order.
        PackingError: an argument makes no sense, a marker or break token is a placeholder, or
            markers stand around placeholders of which nothing was said.

    Example:
        >>> row = [1, 7, 9, 9, 8, 2, 7, 9, 9, 9, 8, 3]
        >>> cut = truncate(row, [2, 3], 9, 9, vision_start_id=7, vision_end_id=8)
        >>> cut.output_ids, cut.kept_images
        ([1, 7, 9, 9, 8, 2], [0])
    """
    row = _Row(input_ids, image_token_id, family, cu_seqlens, overrides)
    streams = row.streams(tokens_per_image, tokens_per_video)
    windows = _windows(row, max_length, _sides(side, row, ("left", "right")))
    return row.result(input_ids, cu_seqlens, streams, windows)


def reconcile(
    input_ids: Any,
    tokens_per_image: Any,
    image_token_id: int | None = None,
    *,
    side: str | Sequence[str | None] | None = None,
    family: str | Family | None = None,
    tokens_per_video: Any = None,
    cu_seqlens: Any = None,
    **overrides: Any,
) -> Truncation:
    """Find out which images survived a cut that somebody else made, and repair the row.

    What is left of the placeholders is a window ``[a, a + n)`` of all of them. Text before, behind
    or between placeholders means that an image, or one of its runs, begins or ends there, and
    ``side`` which end is whole. All windows that agree are tried; an image stays if it lies wholly
    in the window.

    Args:
        input_ids: what is left of the row, ``[T]`` or ``[1, T]``.
        tokens_per_image: the placeholders of all images of the whole row, as for ``truncate``; for
            a packed row one list per sequence.
        side: the side that was cut off, "left" or "right"; None if unknown or both. For a packed
            row also one per sequence.
        cu_seqlens: ``[B + 1]``, boundaries of what is left of a packed row.
        image_token_id, family, tokens_per_video, **overrides: as for ``truncate``. Give
            ``pad_token_id`` where a row was padded after the cut: padding is not its edge.

    Raises:
        PlaceholderMismatch: no window fits; the images are others, or in another order.
        AmbiguousTruncation: more than one set of images, or of orphaned placeholders, fits; the
            first few are its ``candidates``.
        PackingError: an argument makes no sense, as for ``truncate``.

    Example:
        >>> row = [9, 9, 8, 2, 7, 9, 9, 9, 8, 3]
        >>> cut = reconcile(row, [4, 3], 9, side="left", vision_start_id=7, vision_end_id=8)
        >>> cut.kept_images, cut.output_ids
        ([1], [2, 7, 9, 9, 9, 8, 3])
    """
    row = _Row(input_ids, image_token_id, family, cu_seqlens, overrides)
    sides = _sides(side, row, ("left", "right", None))
    streams = row.streams(tokens_per_image, tokens_per_video, sides)
    return row.result(input_ids, cu_seqlens, streams, pairwise(row.starts))


class _Stream:
    """The placeholders of one modality in one sequence, and the images (videos) they are for.

    ``items`` are the runs of each image, ``first_item`` is the number of the first in the whole
    row, and ``starts`` are the numbers of their first placeholders. What the row has of these is
    at ``positions``, beginning with number ``first``; ``cut`` says at which ends some are missing.
    If ``unsure``, several windows fit that keep nothing, and ``first`` and ``cut`` are a guess.
    """

    def __init__(self, row: "_Row", seq: int, kind: str, first_item: int, items: list[list[int]]):
        self.kind, self.first_item, self.items = kind, first_item, items
        self.starts = [0, *accumulate(map(sum, items))]
        self.start, stop = row.spans[seq]
        self.text = row.letters[self.start : stop]
        spans = (m.span() for m in re.finditer(f"{kind[0]}+", self.text))
        self.runs = [range(self.start + first, self.start + last) for first, last in spans]
        self.positions = [*chain(*self.runs)]
        token, found = row.tokens.get(kind), len(self.positions)
        self.name = f"sequence {seq}: {found} {kind} placeholders ({token})"

    def survivors(self, first: int, count: int) -> range:
        """The images that lie wholly in the window of ``count`` placeholders from ``first``."""
        return range(bisect_left(self.starts, first), bisect_right(self.starts, first + count) - 1)

    def align(self, side: str | None, whole: bool) -> None:
        """Find the number of the first placeholder left, from what the row says of boundaries."""
        left, total = len(self.positions), self.starts[-1]
        missing, runs = total - left, [len(run) for run in self.runs]
        gaps = [0, *accumulate(runs)]
        around = zip(gaps, re.split(f"{self.kind[0]}+", self.text), strict=True)
        breaks = [k for k, text in around if text.strip("b")]
        edges, apart = {0, *accumulate(chain(*self.items))}, set(gaps)
        inner = sorted(edges - set(self.starts))  # runs of one image never adjoin

        def fits(first: int) -> bool:
            inside = inner[bisect_right(inner, first) : bisect_left(inner, first + left)]
            at_edges = all(first + k in edges for k in breaks)
            return at_edges and all(edge - first in apart for edge in inside)

        candidates = range(0 if whole and missing else missing + 1)
        if side is not None:
            candidates = candidates[-1:] if side == "left" else candidates[:1]
        elif breaks:
            at_edge = (edge - breaks[0] for edge in sorted(edges))
            candidates = [first for first in at_edge if first in candidates]
        keepers, others = [], []
        for first in filter(fits, candidates):
            (keepers if self.survivors(first, left) else others).append(first)
            if len(keepers) == _MAX_CANDIDATES:
                break
        if not keepers and not others:
            counts = f"tokens_per_{self.kind} {shorten([sum(item) for item in self.items])}"
            found = f"{self.name}, but {counts} adds up to {total}, and runs of {shorten(runs)}"
            cut = f" after a cut on the {side}" if side else ""
            advice = "give every image of the uncut row" if whole else "check the side"
            message = f"{found} are no part of them{cut}; {advice}, and break_token_ids"
            raise PlaceholderMismatch(message, actual=total, expected=left)
        # Two windows differ in what they keep, or in their orphans, unless neither keeps anything.
        if keepers and len(keepers) + len(others) > 1:
            raise self._ambiguous((keepers + others[:1])[:_MAX_CANDIDATES])
        self.first, self.unsure = (keepers or others)[0], len(others) > 1
        self.cut = self.unsure or self.first > 0, self.unsure or self.first < missing

    def _ambiguous(self, candidates: list[int]) -> AmbiguousTruncation:
        """The error for a row that several sets of images explain, with the first few of them."""
        sets, found = [], []
        for first in candidates:
            stay = self.survivors(first, len(self.positions))
            whole = range(self.starts[stay.start], self.starts[stay.stop])
            orphans = [p for k, p in enumerate(self.positions, first) if k not in whole]
            sets.append([self.first_item + item for item in stay])
            found.append({f"kept_{self.kind}s": sets[-1], "orphan_positions": orphans})
        could = f"{self.name} could be of {self.kind}s {' or '.join(map(shorten, sets))}"
        error = AmbiguousTruncation(f"{could}; say which side was cut, or cut with truncate")
        error.candidates = found
        return error


# What each token is, one letter each: "(" and ")" markers, "|" a marker that is both, "<" and ">"
# those of a whole video, "b" a break, "i" and "v" placeholders, "I" those of a lost image, "V" of a
# lost video or image of several runs, "." text. An image is its placeholders with the breaks and
# markers around them; a begin marker may be long: text up to a break.
_CHUNKS = re.compile(
    r"(?:[(|](?:[.b]*b)?|(?<!b)b+)?[iv]+(?:b+[iv]+)*(?:b*[)|])?"
    r"|(?P<lost>(?:[(|](?:[.b]*(?=b))?|(?<!b))b*[IV]+(?:b+[IV]+)*b*(?:\)|\|(?!b*[iv]))?)"
)


class _Row:
    """What each token of a row is, and where its sequences, and behind them its tail, begin."""

    def __init__(self, input_ids, image_token_id, family, cu_seqlens, overrides):
        types = overrides.pop("mm_token_type_ids", None)
        if image_token_id is not None:
            overrides["image_token_id"] = image_token_id
        self.family = one = resolve(family, overrides, ("drop_dangling", "shifted"))
        self.named = family is not None  # then text between the runs of a video is its own
        self.ids = marks = as_ids(input_ids, "input_ids")
        size, by = len(marks), "id"
        known = {one.image_token_id: "image", one.video_token_id: "video"}
        if types is not None:
            told = overrides.get("image_token_id"), overrides.get("video_token_id")
            given = "mm_token_type_ids say where images are; leave out, or pass image_token_id=None"
            require(told == (None, None), given)
            marks, known, by = as_ids(types, "mm_token_type_ids"), {1: "image", 2: "video"}, "type"
            found = f"mm_token_type_ids has {len(marks)} entries, but the row {size} tokens"
            require(len(marks) == size, found)
        both = f"image_token_id and video_token_id are both {one.image_token_id}"
        require(len(known) == 2 or None in known, f"{both}; count all of them as images")
        self.tokens = {kind: f"{by} {mark}" for mark, kind in known.items() if mark is not None}
        pairs = [*zip(self.ids, marks, strict=True)]
        placeholders, said = {*known} - {None}, ""
        if types is not None:
            placeholders = {id for id, mark in pairs if mark in known}
            said = ", says mm_token_type_ids; set it to 0 at markers and breaks"
        bounds = kinds.as_boundaries(cu_seqlens, size)
        self.num_seqs, self.packed = len(bounds) - 1, cu_seqlens is not None
        self.starts = kinds.with_tail(bounds, size)
        self.spans = [self._unpadded(start, stop) for start, stop in pairwise(self.starts)]

        begin, end = one.vision_start_id, one.vision_end_id
        first = begin if one.video_start_id is None else one.video_start_id
        last = end if one.video_end_id is None else one.video_end_id
        others = {"vision_start_id": begin, "vision_end_id": end, "video_start_id": first}
        others |= {"video_end_id": last, "pad_token_id": one.pad_token_id}
        breaks = [("break_token_ids", token) for token in one.break_token_ids]
        for name, token in [*others.items(), *breaks]:
            require(token not in placeholders, f"{name}: {token} is a placeholder{said}")
        letters = {first: "<", last: ">", begin: "(", end: "|" if begin == end else ")"}
        letters |= dict.fromkeys(one.break_token_ids, "b") | {None: "-"}  # which is nowhere
        of_kind = {mark: kind[0] for mark, kind in known.items()}
        self.letters = "".join(of_kind.get(mark) or letters.get(id, ".") for id, mark in pairs)
        # A whole video, from one outer marker, or the edge of the row, to the other; the outer
        # markers may be those around its frames.
        self.clips = re.compile(
            rf"(?P<open>[{letters[first]}]|^)[.b]*(?P<clip>V[V.b]*)?(?P<close>[{letters[last]}]|$)"
        )
        if one.drop_dangling and "video" not in self.tokens and None not in (begin, end):
            self._refuse_unknown_media()

    def _unpadded(self, start: int, stop: int) -> tuple[int, int]:
        """A sequence without the padding at its ends."""
        real = [p for p in range(start, stop) if self.ids[p] != self.family.pad_token_id]
        return (real[0], real[-1] + 1) if real else (stop, stop)

    def _refuse_unknown_media(self) -> None:
        """Markers around one token, repeated, mark an image or video of which nothing was said."""
        for m in re.finditer(r"(?<=[(|])\.{2,}(?=[)|])", self.letters):
            token, *others = {*self.ids[m.start() : m.end()]}
            found = f"position {m.start() - 1}: markers stand around {len(m[0])} tokens of id "
            require(others, f"{found}{token}; for a video pass video_token_id, or its family")

    def streams(self, tokens_per_image, tokens_per_video, sides=None) -> list[list[_Stream]]:
        """The images, and the videos, of every sequence; all of them where no side was cut."""
        streams, whole = [], sides is None
        for kind, spec in zip(_KINDS, (tokens_per_image, tokens_per_video), strict=True):
            counts = [self.letters.count(kind[0], *span) for span in self.spans]
            if tail := sum(counts[self.num_seqs :]):
                past = f"past the last boundary at {self.starts[-2]}, in no sequence"
                message = f"{tail} {kind} placeholders lie {past}"
                raise PlaceholderMismatch(message, actual=0, expected=tail)
            items = self._items(spec, kind, counts[: self.num_seqs], whole)
            items += [[]] * (len(counts) - len(items))  # of the tail
            each = zip(accumulate(map(len, items), initial=0), items, strict=False)
            streams.append([_Stream(self, seq, kind, *one) for seq, one in enumerate(each)])
        for of_kind in streams:
            for seq, stream in enumerate(of_kind):
                stream.align(None if whole else sides[seq], whole)
        return streams

    def _items(self, spec, kind: str, counts: list[int], whole: bool) -> list[list[list[int]]]:
        """The runs of every image of every sequence."""
        name, num_seqs = f"tokens_per_{kind}", len(counts)
        read = as_list if self.packed else kinds.as_row  # a tensor [1, N] is no image of N runs
        entries = [] if spec is None else read(spec, name)
        found = f"{name} is given, but no {kind}_token_id, nor mm_token_type_ids"
        require(kind in self.tokens or not entries, found)
        if self.packed and (not counts or any(e is None or kinds.nested(e) for e in entries)):
            found = f"{name} has {len(entries)} entries, but the row has {num_seqs} sequences"
            require(len(entries) == num_seqs, found)
            lists = ([] if e is None else e for e in entries)
            return [_as_items(e, f"{name}[{seq}]") for seq, e in enumerate(lists)]
        items, split, ends = _as_items(entries, name), [[] for _ in counts], [*accumulate(counts)]
        clear = whole or num_seqs == 1 or not items
        require(clear, f"{name} does not say whose images were cut; pass one list per sequence")
        for item, start in zip(items, accumulate(map(sum, items), initial=0), strict=False):
            # One too many, or an image that its sequence does not fit, is said by align.
            split[min(bisect_right(ends, start), num_seqs - 1)].append(item)
        return split

    def result(self, input_ids, cu_seqlens, streams, windows) -> Truncation:
        """Drop what is not whole inside the windows, with all that belongs to it, and renumber."""
        media = {f"{fate}_{kind}s": [] for fate in ("kept", "dropped") for kind in _KINDS}
        keep, orphans, holes, lengths = [], [], [], []
        for (start, stop), *both in zip(windows, *streams, strict=True):
            lost = []
            for stream in both:
                low, high = (bisect_left(stream.positions, edge) for edge in (start, stop))
                stay = stream.survivors(stream.first + low, high - low)
                gone = [item for item in range(len(stream.items)) if item not in stay]
                media[f"kept_{stream.kind}s"] += [stream.first_item + item for item in stay]
                media[f"dropped_{stream.kind}s"] += [stream.first_item + item for item in gone]
                lost += [(stream, item) for item in gone]
            gone = self._gone(*both, lost) if lost else {}
            left = [p for p in range(start, stop) if p not in gone]
            holes += [len(keep) + n for n, p in enumerate(left) if p + 1 < stop and p + 1 in gone]
            orphans += [p for p in range(start, stop) if gone.get(p, ".") in "bIV"]
            keep += left
            lengths.append(len(left))
        seqs = [seq for seq in range(self.num_seqs) if lengths[seq]]
        bounds = [0, *accumulate(lengths[seq] for seq in seqs)]
        return Truncation(
            output_ids=kinds.like_ids(input_ids, [self.ids[position] for position in keep]),
            keep_positions=keep,
            orphan_positions=orphans,
            position_ids=like(input_ids, [p for n in lengths for p in range(n)], torch.int64),
            cu_seqlens=None if cu_seqlens is None else like(cu_seqlens, bounds),
            kept_sequences=seqs,
            max_seqlen=max(lengths[: self.num_seqs], default=0),
            _starts=self.starts,
            _all_sequences=not self.packed or len(seqs) == self.num_seqs,
            _holes=holes,
            _shifted=self.family.shifted,
            **media,
        )

    def _gone(self, images: _Stream, videos: _Stream, lost: list) -> dict[int, str]:
        """What leaves a sequence with its lost images and videos: positions, and their letters."""
        start, letters, spans = images.start, list(images.text), []
        for stream, item in lost:
            first, last = (edge - stream.first for edge in stream.starts[item : item + 2])
            mine = [p - start for p in stream.positions[max(0, first) : max(0, last)]]
            several = len(stream.items[item]) > 1
            for p in mine:
                letters[p] = "V" if several or stream is videos else "I"
            if self.named and several and mine and not (stream.unsure and len(stream.items) > 1):
                low = 0 if first < 0 and not stream.unsure else mine[0]
                cut = last > len(stream.positions) and not stream.unsure
                spans.append((low, len(letters) if cut else mine[-1]))
        row, size = "".join(letters), len(letters)
        chunks = [*_CHUNKS.finditer(row)]
        spans += [m.span() for m in chunks if m["lost"]]
        stays = {p for m in chunks if not m["lost"] for p in range(*m.span())}
        rest = _CHUNKS.sub(lambda m: ("V" if "V" in m[0] else "x") * len(m[0]), row)
        # What a cut has left, at an edge, of images and videos without any of their placeholders.
        cut_left, cut_right = (any(ends) for ends in zip(images.cut, videos.cut, strict=True))
        low = size - len(rest.lstrip(")|>b")) if cut_left else 0
        high = max(low, len(rest.rstrip("(|<b"))) if cut_right else size
        spans += [(0, low), (high, size)]
        # Whole videos: what stands between two outer markers, or between one and an edge where
        # something was certainly cut. On a guess the markers go, but never the text.
        both = images, videos
        sure_left, sure_right = (any(s.cut[end] and not s.unsure for s in both) for end in (0, 1))
        own = self.family.video_start_id is not None
        several = any(len(stream.items[item]) > 1 for stream, item in lost)
        after = videos.survivors(videos.first, len(videos.positions)).stop
        begun = videos.cut[1] and (own or len(videos.items[after]) > 1)
        begun = begun or bool(self.named and self.family.break_token_ids)
        for m in self.clips.finditer(rest[low:high]):
            opens, closes = bool(m["open"]), bool(m["close"])
            if m["clip"]:
                whole = closes or own or (opens and several)
            else:
                whole = not opens and m["close"] == ">" if closes else opens and begun
            whole = whole and (opens or closes) and (opens or cut_left) and (closes or cut_right)
            if whole and (opens or sure_left) and (closes or sure_right):
                spans.append((low + m.start(), low + m.end()))
            elif whole:
                spans += [
                    (low + first, low + last) for first, last in map(m.span, ("open", "close"))
                ]
            elif m["clip"] and own and not opens and sure_left:  # its last marker alone was cut off
                spans.append((low + m.start(), low + m.start("clip") + m["clip"].rindex("V") + 1))
        all_of_it = self.family.drop_dangling
        found = {p for span in spans for p in range(*span)} - stays  # an image between two frames
        return {start + p: row[p] for p in found if all_of_it or row[p] in "bIV"}


def _as_items(entries, where: str) -> list[list[int]]:
    """The runs of each image, from ints and lists of ints."""
    items = []
    for i, entry in enumerate(as_list(entries, where)):
        name = f"{where}[{i}]"
        runs = as_ids(entry, name, 1) if kinds.nested(entry) else [as_int(entry, name, 1)]
        require(runs, f"{name} is [], expected at least one run")
        items.append(runs)
    return items


def _windows(row: _Row, max_length, sides: list) -> list[tuple[int, int]]:
    """What stays of every sequence, and of the tail, before anything is repaired."""
    if not kinds.nested(max_length):
        limit = min(as_int(max_length, "max_length", minimum=0), len(row.ids))
        require(len({*sides[:-1]}) < 2, "side differs, but max_length is one, of the whole row")
        first = 0 if sides[0] == "right" else len(row.ids) - limit
        return list(pairwise(min(max(first, edge), first + limit) for edge in row.starts))
    limits, seqs = as_ids(max_length, "max_length", minimum=0), list(pairwise(row.starts))
    found = f"max_length has {len(limits)} entries for {row.num_seqs} sequences"
    require(len(limits) == row.num_seqs, found)
    cuts = zip(seqs, limits, sides, strict=False)  # not of the tail
    cut = [(a, min(a + n, b)) if s == "right" else (max(a, b - n), b) for (a, b), n, s in cuts]
    return cut + seqs[row.num_seqs :]


def _sides(side, row: _Row, known: tuple) -> list:
    """The side that was cut off, one for each sequence, and None for the tail."""
    one = side is None or isinstance(side, str)
    sides = [side] * max(row.num_seqs, 1) if one else as_list(side, "side")
    fits = one or len(sides) == row.num_seqs
    require(fits, f"side has {len(sides)} entries for {row.num_seqs} sequences")
    for each in sides:
        fits = (each is None or isinstance(each, str)) and each in known
        require(fits, f"side is {each!r}, expected 'left' or 'right', the side that is cut off")
    return [*sides, None]
