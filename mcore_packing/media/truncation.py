"""Which images survive when a prompt is cut: placeholders vanish, pixel tensors do not."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import torch

from ..errors import AmbiguousTruncation, PackingError, PlaceholderMismatch
from . import kinds
from .families import Family, resolve
from .kinds import IGNORE_INDEX, as_flag, as_ids, as_int, as_list, like, require, shorten

_KINDS = ("image", "video")
_MAX_CANDIDATES = 8  # an error that lists more helps nobody
_CUT, _KEPT, _ORPHAN, _DANGLING = range(4)  # what became of a token


@dataclass(frozen=True, eq=False)
class Truncation:
    """What is left of a row, and of everything that belongs to it.

    Positions are those of the row that was given; images and videos are numbered through all of
    ``tokens_per_image`` and ``tokens_per_video``.

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
        shifted: bool = False,
        fill: Any = None,
        dim: int | None = None,
    ) -> Any:
        """Cut an array as the row was cut.

        Args:
            values: a list, tensor or array with one entry per token, image, video or row; or a dict
                of them.
            per: what the first dimension counts: "token", "image" or "video"; or "position" for
                position ids, M-RoPE's too: they close up behind what was removed, and start at 0 in
                every sequence. Keys of a dict that end in "position_ids" are known by name.
            rows: how many rows of ``values`` each image (each video) has, if not one each.
            shifted: token ``t + 1`` is what entry ``t`` is about, as with Megatron's labels. Where
                that token was removed from inside the row, the entry becomes ``fill``. Never true
                of an ``attention_mask`` among them.
            fill: left out, -100, and 0 for what has a key with "mask" in it. Say 0 for a loss mask
                without its name, and for advantages.
            dim: the dimension of the tokens, where it is neither the first nor the second of
                ``[1, T]``: 1 for the position ids ``[3, T]`` of M-RoPE.

        Returns:
            What is left, of the same kind; None, and in a dict no key, where no image (no video) or
            no row of one is left: vision encoders do not take zero rows.

        Raises:
            PackingError: ``values`` has another length than the row or the images, holds no signed
                ints for -100, or looks like M-RoPE's position ids, which a mere cut would leave
                with an offset.

        Example:
            >>> cut = truncate([9, 9, 7, 5, 9, 9], [2, 2], 5, 9, side="left", vision_end_id=7)
            >>> cut.keep_positions, cut.apply({"image_grid_thw": ["first", "second"]}, per="image")
            ([3, 4, 5], {'image_grid_thw': ['second']})
        """
        shifted = as_flag(shifted, "shifted")
        if isinstance(values, Mapping):
            cut = {}
            for key, value in values.items():
                by = "position" if per == "token" and str(key).endswith("position_ids") else per
                zero = 0 if fill is None and "mask" in str(key) else fill
                next_one = shifted and key != "attention_mask"
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
        kinds.length(values, "values")
        given, ints = values, kinds.holds_ints(values)
        if isinstance(values, (list, tuple)):
            values = np.fromiter(values, dtype=object, count=len(values))
        shape, total = values.shape, self._starts[-1]
        if dim is None:  # of [1, 1] the first, unless that is what the ids are
            dim = int(len(shape) > 1 and shape[0] == 1)
            dim = dim if total != 1 or getattr(self.output_ids, "ndim", 1) == 2 else 0
        fits = -len(shape) <= as_int(dim, "dim") < len(shape)
        require(fits, f"dim is {dim}, but values have {len(shape)} dimensions")
        found, dim = shape[dim], dim % len(shape)
        require(found == total, f"values have {found} entries, but the row has {total} tokens")
        before = (slice(None),) * dim
        cut = values[(*before, self.keep_positions)]
        if positions or (dim > 0 and shape[0] == 3 and ints):
            require(ints, "position ids are no ints; pass them as the processor gave them")
            offsets = self._offsets(values, dim)
            message = "values look like position ids of M-RoPE, which would keep an offset where "
            message += 'tokens were removed; pass per="position", or move the tokens to dimension 0'
            require(positions or shifted or not any(offsets), message)
            if positions:
                cut = cut - like(cut.reshape(-1), offsets).reshape(-1, *[1] * (cut.ndim - dim - 1))
        if shifted and self._holes and not positions:
            known = fill is not None or (ints and "uint" not in str(values.dtype))
            require(known, "values are no signed ints, so they are no labels; pass fill=0")
            fill = IGNORE_INDEX if fill is None else fill
            kinds.check_fits([fill], values.dtype)
            cut[(*before, self._holes)] = fill
        return type(given)(cut.tolist()) if isinstance(given, (list, tuple)) else cut

    def _offsets(self, values, dim: int) -> list[int]:
        """By how much each position that stays moves forward, from all that was removed before."""
        if not self.keep_positions:
            return []
        rows = np.asarray(values.cpu() if hasattr(values, "cpu") else values, dtype=np.int64)
        at = np.moveaxis(rows, dim, 0).reshape(self._starts[-1], -1).min(axis=1)
        kept, offsets = np.array(self.keep_positions, dtype=np.int64), []
        for start, stop in pairwise(self._starts):
            mine = kept[np.searchsorted(kept, start) : np.searchsorted(kept, stop)]
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

    Doing the cut itself, it knows what is lost: nothing is ever ambiguous here.

    Args:
        input_ids: the whole row ``[T]`` or ``[1, T]``, one placeholder per feature row.
        tokens_per_image: how many placeholders each image has, in order; for an image whose
            placeholders stand in several runs the list of its runs (runs that adjoin are one). For
            a packed row flat ints, or one list per sequence: there a list is always a sequence's,
            and runs are one level deeper, ``[[[2, 2]], [[2, 2]]]``.
        max_length: how many tokens may stay, of the whole row; a list cuts each sequence of a
            packed row to its own length.
        side: the side that is cut off: "right" or "left"; one per sequence if ``max_length`` is.
        family: a registered family, or a ``Family``: its placeholders, markers and break tokens.
        tokens_per_video: the same as ``tokens_per_image``; a video of several runs stays or goes
            whole, with the timestamps between its outer markers.
        cu_seqlens: ``[B + 1]``, boundaries of a packed row; tokens past the last one stay last.
        image_token_id, **overrides: instead of what the family says, ``image_token_id``,
            ``video_token_id``, ``vision_start_id``, ``vision_end_id``, ``video_start_id``,
            ``video_end_id``, ``break_token_ids``, ``drop_dangling``; or ``mm_token_type_ids``
            ``[T]`` instead of both placeholders, 1 for images, 2 for videos.

    Returns:
        A ``Truncation``; its row is at most ``max_length`` long.

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
    streams = row.streams(tokens_per_image, tokens_per_video, whole=True)
    for stream in streams:
        stream.align(row, None, whole=True)
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

    What is left of the placeholders is a window ``[a, a + n)`` of all of them. A row that does not
    begin (end) with a placeholder, every break between two runs, and a given side each say where
    image boundaries are. An image stays only if its whole range lies in the window.

    Args:
        input_ids: what is left of the row, ``[T]`` or ``[1, T]``.
        tokens_per_image: the placeholders of all images of the whole row, as for ``truncate``; for
            a packed row one list per sequence.
        side: the side that was cut off, "left" or "right"; None if that is unknown or both were.
            For a packed row also one per sequence.
        cu_seqlens: ``[B + 1]``, boundaries of what is left of a packed row.
        image_token_id, family, tokens_per_video, **overrides: as for ``truncate``, and
            ``pad_token_id``: padding at either end of a sequence is not its edge, so give it where
            a row was padded after the cut.

    Raises:
        PlaceholderMismatch: no window fits; the images are others, or in another order.
        AmbiguousTruncation: more than one set of images, or of orphaned placeholders, fits. The
            first few are in its ``candidates``.
        PackingError: an argument makes no sense, as for ``truncate``.

    Example:
        >>> row = [9, 9, 8, 2, 7, 9, 9, 9, 8, 3]
        >>> cut = reconcile(row, [4, 3], 9, side="left", vision_start_id=7, vision_end_id=8)
        >>> cut.kept_images, cut.output_ids
        ([1], [2, 7, 9, 9, 9, 8, 3])
    """
    row = _Row(input_ids, image_token_id, family, cu_seqlens, overrides)
    streams = row.streams(tokens_per_image, tokens_per_video, whole=False)
    sides = _sides(side, row, ("left", "right", None))
    for stream in streams:
        stream.align(row, sides[stream.seq])
    return row.result(input_ids, cu_seqlens, streams, None)


@dataclass
class _Stream:
    """The placeholders of one modality in one sequence, and the images (videos) they are for.

    What the row has of them is ``positions``, beginning with number ``first`` of the whole stream.
    """

    seq: int
    kind: str
    token: str
    first_item: int  # number of the first image in the whole row
    items: list[list[int]]  # the runs of every image
    positions: list[int]
    first: int = 0
    unsure: bool = False  # nothing says which end was cut

    def __post_init__(self):
        self.starts = [0, *accumulate(sum(runs) for runs in self.items)]

    def survivors(self, first: int, count: int) -> tuple[int, int]:
        """The images ``[i, j)`` that lie wholly in the window of ``count`` from ``first``."""
        i, j = bisect_left(self.starts, first), bisect_right(self.starts, first + count) - 1
        return (i, j) if i < j else (0, 0)

    def of(self, item: int) -> list[int]:
        """What the row has of an image's placeholders."""
        start, stop = (max(0, edge - self.first) for edge in self.starts[item : item + 2])
        return self.positions[start:stop]

    @property
    def cut(self) -> tuple[bool, bool]:
        """Whether placeholders are, or may be, missing on the left and on the right."""
        missing = self.starts[-1] - self.first - len(self.positions)
        return self.unsure or self.first > 0, self.unsure or missing > 0

    @property
    def next_lost(self) -> list[int]:
        """The runs of the image behind the last one that the row has whole, or of the last."""
        after = bisect_right(self.starts, self.first + len(self.positions)) - 1
        return self.items[min(after, len(self.items) - 1)]

    def align(self, row: "_Row", side: str | None, whole: bool = False) -> None:
        """Find the number of the first placeholder left, from what the row says of boundaries."""
        positions, left, total = self.positions, len(self.positions), self.starts[-1]
        if left > total or (whole and left < total):
            raise self._mismatch("; pass the images of this row, all of them")
        gaps = [k for k in range(1, left) if positions[k] - positions[k - 1] > 1]
        start, stop = row.bounds(self.seq)
        ends = [start - 1, *positions, stop]  # a break before the first and behind the last, too
        asked = (0, *gaps, left) if left else ()
        breaks = [k for k in asked if not row.only_breaks(ends[k] + 1, ends[k + 1])]
        edges, apart = {0, *accumulate(run for runs in self.items for run in runs)}, set(gaps)
        inner = sorted(edges - set(self.starts))  # runs of one image never adjoin

        def fits(first: int) -> bool:
            between = inner[bisect_right(inner, first) : bisect_left(inner, first + left)]
            at_edges = all(first + k in edges for k in breaks)
            return at_edges and all(edge - first in apart for edge in between)

        candidates = range(total - left + 1)
        if side is not None or not left:
            candidates = candidates[-1:] if side == "left" else candidates[:1]
        keepers, others = [], []
        for first in filter(fits, candidates):
            i, j = self.survivors(first, left)
            (keepers if i < j else others).append(first)
            if len(keepers) == _MAX_CANDIDATES:
                break
        if not keepers and not others:
            runs = [stop - start for start, stop in pairwise([0, *gaps, left])]
            cut = f" after a cut on the {side}" if side else ""
            why = f", and runs of {shorten(runs)} are no part of them{cut}; check the images, the "
            why += "side, break_token_ids, and that an image of several runs is a list of them"
            raise self._mismatch(why)
        # Two windows differ in what they keep, or in their orphans, unless neither keeps anything.
        if keepers and len(keepers) + len(others) > 1:
            raise self._ambiguous((keepers + others[:1])[:_MAX_CANDIDATES])
        self.first = (keepers or others)[0]
        self.unsure = side is None and total > 0 and (not left or len(others) > 1)

    def _mismatch(self, why: str) -> PlaceholderMismatch:
        """The error for placeholders that cannot come from these images."""
        found, total = len(self.positions), self.starts[-1]
        message = f"sequence {self.seq}: {found} {self.kind} placeholders ({self.token}), but "
        message += f"tokens_per_{self.kind} {shorten([sum(runs) for runs in self.items])} adds up "
        return PlaceholderMismatch(f"{message}to {total}{why}", actual=total, expected=found)

    def _ambiguous(self, candidates: list[int]) -> AmbiguousTruncation:
        """The error for a row that several sets of images explain, with the first few of them."""
        found, size = [], len(self.positions)
        for first in candidates:
            i, j = self.survivors(first, size)
            low, high = (self.starts[i] - first, self.starts[j] - first) if i < j else (size, size)
            kept = list(range(self.first_item + i, self.first_item + j))
            orphans = self.positions[:low] + self.positions[high:]
            found.append({f"kept_{self.kind}s": kept, "orphan_positions": orphans})
        sets = " or ".join(shorten(one[f"kept_{self.kind}s"]) for one in found)
        message = f"sequence {self.seq}: what is left, {size} {self.kind} placeholders of "
        message += f"{self.starts[-1]} ({self.token}), could be of {self.kind}s {sets}; say which "
        error = AmbiguousTruncation(f"{message}side was cut, or cut with truncate")
        error.candidates = found
        return error


# What each token is, one letter each: "(" and ")" markers, "|" a marker that is both, "<" and ">"
# those of a whole video, "b" a break, "p" a placeholder that stays, "l" one that is lost, "v" one
# of a lost video, "." text. An image is its placeholders with the breaks and markers around them;
# a begin marker may be long: text up to a break.
_CHUNKS = re.compile(
    r"(?:[(|](?:[.b]*b)?|b+)?p+(?:b+p+)*(?:b*[)|])?"
    r"|(?P<lost>(?:[(|](?:[.b]*(?=b))?)?b*[lv]+(?:b+[lv]+)*b*(?:\)|\|(?!b*p))?)"
)


class _Row:
    """A row as lists: what each token is, and where its sequences (and its tail) begin."""

    def __init__(self, input_ids, image_token_id, family, cu_seqlens, overrides):
        types = overrides.pop("mm_token_type_ids", None)
        if image_token_id is not None:
            overrides = {"image_token_id": image_token_id, **overrides}
        self.family = one = resolve(family, overrides)
        self.named = family is not None  # its family is known, so text inside a video is too
        self.ids = ids = as_ids(input_ids, "input_ids")
        known = {one.image_token_id: "image", one.video_token_id: "video"}
        if types is None:
            same = one.image_token_id is not None and one.image_token_id == one.video_token_id
            found = f"image_token_id and video_token_id are both {one.image_token_id}; count their "
            require(not same, f"{found}images and videos together, in their order in the row")
            self.tokens = {kind: f"id {id}" for id, kind in known.items() if id is not None}
            types = ids
        else:
            told = {overrides.get("image_token_id"), overrides.get("video_token_id")}
            require(told == {None}, "pass image_token_id=None where mm_token_type_ids are given")
            types, known = as_ids(types, "mm_token_type_ids"), {1: "image", 2: "video"}
            found = f"mm_token_type_ids has {len(types)} entries, but the row {len(ids)} tokens"
            require(len(types) == len(ids), found)
            self.tokens = {kind: f"type {number}" for number, kind in known.items()}
        self.kinds = [known.get(what) for what in types]
        placeholders = {token for token, kind in zip(ids, self.kinds, strict=True) if kind}
        placeholders |= {*known} - {None} if types is ids else set()
        bounds = kinds.as_boundaries(cu_seqlens, len(ids))
        self.starts = [*bounds, len(ids)] if bounds[-1] < len(ids) else bounds
        self.num_seqs, self.packed = len(bounds) - 1, cu_seqlens is not None

        begin, end = one.vision_start_id, one.vision_end_id
        first = begin if one.video_start_id is None else one.video_start_id
        last = end if one.video_end_id is None else one.video_end_id
        others = {"vision_start_id": (begin, first), "vision_end_id": (end, last)}
        others |= {"break_token_ids": one.break_token_ids, "pad_token_id": (one.pad_token_id,)}
        for name, tokens in others.items():
            both = placeholders.intersection(tokens)
            require(not both, f"{name}: {min(both, default=None)} is a placeholder")
        letters = {first: "<", last: ">", begin: "(", end: "|" if begin == end else ")"}
        letters |= dict.fromkeys(one.break_token_ids, "b") | {None: "."}
        marked = zip(ids, self.kinds, strict=True)
        self.letters = ["p" if kind else letters.get(token, ".") for token, kind in marked]
        # A whole video, from one outer marker, or the edge of the row, to the other; the outer
        # markers may be those around its frames.
        opens, closes = ("(?!)" if m is None else re.escape(letters[m]) for m in (first, last))
        self.clips = re.compile(rf"(?P<open>{opens}|^)[.b]*(?P<clip>v[v.b]*)?(?P<close>{closes}|$)")
        if one.drop_dangling and "video" not in self.tokens and None not in (begin, end):
            self._refuse_unknown_media(begin, end)

    def _refuse_unknown_media(self, begin: int, end: int) -> None:
        """Markers around one token, repeated, mark an image or video of which nothing was said."""
        runs, position = [(token, len([*same])) for token, same in groupby(self.ids)], 0
        for (left, size), (token, times), (right, _) in zip(runs, runs[1:], runs[2:], strict=False):
            position += size
            if (left, right) == (begin, end) and times > 1 and self.letters[position] == ".":
                found = f"position {position - 1}: markers stand around {times} tokens of id "
                why = f"{token}, which is no image_token_id; a video needs video_token_id and "
                raise PackingError(f"{found}{why}tokens_per_video, or its family")

    def bounds(self, seq: int) -> tuple[int, int]:
        """Where a sequence begins and ends, padding at its ends left out."""
        start, stop = self.starts[seq : seq + 2]
        real = [p for p in range(start, stop) if self.ids[p] != self.family.pad_token_id]
        return (real[0], real[-1] + 1) if real else (stop, stop)

    def only_breaks(self, start: int, stop: int) -> bool:
        """Whether nothing but break tokens stands in ``[start, stop)``."""
        return all(letter == "b" for letter in self.letters[start:stop])

    def streams(self, tokens_per_image, tokens_per_video, whole: bool) -> list[_Stream]:
        """One stream for each modality of each sequence."""
        streams = []
        for kind, spec in zip(_KINDS, (tokens_per_image, tokens_per_video), strict=True):
            token, first = self.tokens.get(kind, ""), 0
            spans = (range(start, stop) for start, stop in pairwise(self.starts))
            positions = [[p for p in span if self.kinds[p] == kind] for span in spans]
            if tail := sum(map(len, positions[self.num_seqs :])):
                message = f"{tail} {kind} placeholders ({token}) lie past the last boundary at "
                message += f"{self.starts[self.num_seqs]}, in no sequence"
                raise PlaceholderMismatch(message, actual=0, expected=tail)
            counts = [len(mine) for mine in positions[: self.num_seqs]]
            for seq, items in enumerate(self._items(spec, kind, counts, whole)):
                streams.append(_Stream(seq, kind, token, first, items, positions[seq]))
                first += len(items)
        return streams

    def _items(self, spec, kind: str, counts: list[int], whole: bool) -> list[list]:
        """The runs of every image of every sequence."""
        where, num_seqs = f"tokens_per_{kind}", len(counts)
        entries = [] if spec is None else as_list(spec, where)
        message = f"{where} is given, but no {kind}_token_id to find them by; where that is the "
        require(not entries or kind in self.tokens, f"{message}image's, give mm_token_type_ids")
        if not self.packed:
            return [_as_items(entries, where)]
        if any(e is None or kinds.nested(e) for e in entries) or (entries and not counts):
            message = f"{where} has {len(entries)} entries, but the row has {num_seqs} sequences"
            require(len(entries) == num_seqs, message)
            named = (([] if e is None else e, f"{where}[{seq}]") for seq, e in enumerate(entries))
            return [_as_items(*one) for one in named]
        items, split = _as_items(entries, where), [[] for _ in counts]
        found = f"{where} is one list for {num_seqs} sequences, and a cut row does not say whose"
        require(not items or num_seqs == 1 or whole, f"{found}; pass one list per sequence")
        seq = 0
        for item in items:  # one too many, or a sequence that it does not fit, is said by align
            while seq < num_seqs - 1 and counts[seq] <= 0:
                seq += 1
            split[seq].append(item)
            counts[seq] -= sum(item)
        return split

    def result(self, input_ids, cu_seqlens, streams, windows) -> Truncation:
        """Drop what is not whole inside the windows, with all that belongs to it, and renumber."""
        seen = windows or list(pairwise(self.starts))
        kept, dropped = ({kind: [] for kind in _KINDS} for _ in range(2))
        lost: dict[int, list[tuple[_Stream, int]]] = {}
        for stream in streams:
            low, high = (bisect_left(stream.positions, edge) for edge in seen[stream.seq])
            i, j = stream.survivors(stream.first + low, high - low)
            for item, runs in enumerate(stream.items):
                stays = i <= item < j
                (kept if stays else dropped)[stream.kind].append(stream.first_item + item)
                if not stays:
                    lost.setdefault(stream.seq, []).append((stream, item))
                    for position in stream.of(item):
                        clip = stream.kind == "video" or len(runs) > 1
                        self.letters[position] = "v" if clip else "l"
        state = bytearray(len(self.ids))  # _CUT
        for start, stop in seen:
            state[start:stop] = bytes([_KEPT]) * (stop - start)
        for seq, items in lost.items():
            at_edges = [s for s in streams if s.seq == seq] if windows is None else []
            for position in self._gone(seq, items, at_edges):
                orphan = self.letters[position] in "lvb"
                if state[position] == _KEPT and (orphan or self.family.drop_dangling):
                    state[position] = _ORPHAN if orphan else _DANGLING

        lengths = [state.count(_KEPT, start, stop) for start, stop in pairwise(self.starts)]
        keep = [position for position, what in enumerate(state) if what == _KEPT]
        seqs = [seq for seq in range(self.num_seqs) if lengths[seq]]
        bounds = [0, *accumulate(lengths[seq] for seq in seqs)]
        ends = {stop - 1 for _, stop in seen}
        return Truncation(
            output_ids=kinds.like_ids(input_ids, [self.ids[position] for position in keep]),
            keep_positions=keep,
            orphan_positions=[p for p, what in enumerate(state) if what == _ORPHAN],
            **{f"kept_{kind}s": kept[kind] for kind in _KINDS},
            **{f"dropped_{kind}s": dropped[kind] for kind in _KINDS},
            position_ids=like(input_ids, [p for n in lengths for p in range(n)], torch.int64),
            cu_seqlens=None if cu_seqlens is None else like(cu_seqlens, bounds),
            kept_sequences=seqs,
            max_seqlen=max(lengths[: self.num_seqs], default=0),
            _starts=self.starts,
            _all_sequences=cu_seqlens is None or len(seqs) == self.num_seqs,
            _holes=[n for n, p in enumerate(keep) if p not in ends and state[p + 1] != _KEPT],
        )

    def _gone(self, seq: int, items, at_edges: list[_Stream]) -> Iterator[int]:
        """The positions of all that belongs to the lost images and videos of a sequence.

        ``at_edges`` are its streams where the row is what somebody else's cut has left: then an
        image may be known by its last marker alone, and a video reach to the edge of the row.
        """
        start, stop = self.bounds(seq)
        row = "".join(self.letters[start:stop])
        chunks = [m.span() for m in _CHUNKS.finditer(row) if m["lost"]]
        rest = _CHUNKS.sub(lambda m: "xv"[bool(m["lost"]) and "v" in m[0]] * len(m[0]), row)
        spans, size = [*chunks], len(row)
        for stream, item in items if self.named else ():  # then text between two runs is a label
            mine = [position - start for position in stream.of(item)]
            if mine and (not stream.unsure or len(stream.items) == 1):
                edges = (chunks[bisect_left(chunks, (p + 1,)) - 1] for p in (mine[0], mine[-1]))
                (low, _), (_, high) = edges
                if at_edges and len(stream.items[item]) > 1 and not stream.unsure:
                    first, last = stream.starts[item : item + 2]
                    low = 0 if first < stream.first else low
                    high = size if last > stream.first + len(stream.positions) else high
                spans.append((low, high))

        # What a cut has left, at an edge, of images and videos without any of their placeholders.
        cut = [any(stream.cut[side] for stream in at_edges) for side in (0, 1)]
        low = re.match(r"[)|>b]*", rest).end() if cut[0] else 0
        high = size - re.match(r"[(|<b]*", rest[low:][::-1]).end() if cut[1] else size
        spans += [(0, low), (high, size)]
        # Whole videos, from one outer marker to the other, or to an edge that was cut.
        own = self.family.video_start_id is not None
        several = own or any(len(stream.items[item]) > 1 for stream, item in items)
        begun = (self.named and self.family.break_token_ids) or any(
            s.cut[1] and s.kind == "video" and (own or len(s.next_lost) > 1) for s in at_edges
        )
        for m in self.clips.finditer(rest[low:high]):
            opens, closes = bool(m["open"]), bool(m["close"])
            if m["clip"]:
                whole = closes or own or (opens and several)
            else:
                whole = not opens and m["close"] == ">" if closes else opens and begun
            if whole and (opens or cut[0]) and (closes or cut[1]):
                spans.append((low + m.start(), low + m.end()))
            elif m["clip"] and own and not opens and cut[0]:  # its last marker alone was cut off
                spans.append((low + m.start(), low + m.start("clip") + m["clip"].rindex("v") + 1))
        return (start + position for low, high in spans for position in range(low, high))


def _as_items(entries, where: str) -> list[list[int]]:
    """The runs of each image, from ints and lists of ints."""
    items = []
    for i, entry in enumerate(as_list(entries, where)):
        name = f"{where}[{i}]"
        items.append(as_ids(entry, name) if kinds.nested(entry) else [as_int(entry, name)])
        fits = items[-1] and min(items[-1]) > 0  # an image without placeholders is left out
        require(fits, f"{name} is {entry}, expected at least 1")
    return items


def _windows(row: _Row, max_length, sides: list) -> list[tuple[int, int]]:
    """What stays of every sequence, and of the tail, before anything is repaired."""
    seqs = list(pairwise(row.starts))
    if not kinds.nested(max_length):
        limit = min(as_int(max_length, "max_length", minimum=0), len(row.ids))
        first = 0 if sides[0] == "right" else len(row.ids) - limit
        last = first + limit
        return [(min(max(first, a), last), max(min(last, b), first)) for a, b in seqs]
    limits = as_ids(max_length, "max_length", minimum=0)
    message = f"max_length has {len(limits)} entries for {row.num_seqs} sequences"
    require(len(limits) == row.num_seqs, message)
    cuts = zip(seqs, limits, sides, strict=False)  # not of the tail
    cut = [(a, min(a + n, b)) if s == "right" else (max(a, b - n), b) for (a, b), n, s in cuts]
    return cut + seqs[row.num_seqs :]


def _sides(side, row: _Row, known: tuple) -> list:
    """The side that was cut off, one for each sequence."""
    one = side is None or isinstance(side, str)
    sides = [side] * max(row.num_seqs, 1) if one else as_list(side, "side")
    found = f"side has {len(sides)} entries for {row.num_seqs} sequences"
    require(one or len(sides) == row.num_seqs, found)
    for each in sides:
        fits = (each is None or isinstance(each, str)) and each in known
        require(fits, f"side is {each!r}, expected 'left' or 'right', the side that is cut off")
    return sides
