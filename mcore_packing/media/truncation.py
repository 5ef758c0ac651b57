"""Which images survive when a prompt is cut: placeholders vanish, pixel tensors do not."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from ..errors import AmbiguousTruncation, PackingError, PlaceholderMismatch
from .families import Family, resolve
from .kinds import (
    as_boundaries,
    as_counts,
    as_flag,
    as_ids,
    as_int,
    as_list,
    check_fits,
    holds_ints,
    length,
    like,
    like_ids,
    merge_spans,
    nested,
    shorten,
    take,
    take_spans,
)
from .placement import IGNORE_INDEX

_IMAGE, _VIDEO = 1, 2  # as mm_token_type_ids of transformers has them
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
        orphan_positions: placeholders (and break tokens) that were removed because their image or
            video is not whole.
        kept_images, dropped_images: whose features stay, whose go.
        kept_videos, dropped_videos: likewise.
        position_ids: of ``output_ids``, restarting in every sequence.
        cu_seqlens: boundaries of the sequences that still have tokens, None if none were given.
        kept_sequences: which sequences these are.
        max_seqlen: the length of the longest.
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

        Args:
            rows_per_image: how many rows each image (each video) has, for all of them in order.
            per: "image" or "video".

        Returns:
            The ranges, in order.

        Raises:
            PackingError: ``rows_per_image`` has another number of entries than there are images.

        Example:
            >>> cut = truncate([7, 9, 9, 7, 9, 9, 9], [2, 3], 5, 9)
            >>> cut.kept_row_ranges([16, 24])
            [[0, 16]]
        """
        kept, total = self._kept(per)
        rows = as_counts(rows_per_image, f"rows_per_{per}")
        if len(rows) != total:
            raise PackingError(
                f"rows_per_{per} has {len(rows)} entries, but there were {total} {per}s"
            )
        starts = [0, *accumulate(rows)]
        return merge_spans([starts[item : item + 2] for item in kept])

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
                position ids, M-RoPE's too, one for each token: they close up behind what was
                removed, and start at 0 in every sequence. Keys of a dict that end in
                "position_ids" are known by name. Tokens may also be the second dimension of
                ``[1, T]``, or ``dim``.
            rows: how many rows of ``values`` each image (each video) has, if not one each.
            shifted: token ``t + 1`` is what entry ``t`` is about, as with Megatron's labels. Where
                that token was removed from inside the row, the entry becomes ``fill``. Never true
                of an ``attention_mask`` among them.
            fill: left out, -100, and 0 for what has a key with "mask" in it. A loss mask of ints
                that comes without its name cannot be told from labels: give 0 for it, and for
                advantages and log-probabilities.
            dim: the dimension of the tokens, where it is another: 1 for the position ids ``[3, T]``
                of M-RoPE.

        Returns:
            What is left, of the same kind. Where no image (no video), or no row of one, is left,
            None, and in a dict the key is absent: vision encoders do not take zero rows.

        Raises:
            PackingError: ``values`` has another length than the row or the images, or holds no
                signed ints and ``fill`` is left out; or looks like M-RoPE's position ids, which a
                mere cut would leave with an offset.

        Example:
            >>> cut = truncate([9, 9, 7, 5, 9, 9], [2, 2], 5, 9, side="left", vision_end_id=7)
            >>> cut.keep_positions, cut.apply([0, 1, 2, 3, 4, 5])
            ([3, 4, 5], [3, 4, 5])
            >>> cut.apply({"image_grid_thw": ["first", "second"]}, per="image")
            {'image_grid_thw': ['second']}
        """
        if isinstance(values, Mapping):
            cut = {}
            for key, value in values.items():
                its_fill = 0 if fill is None and "mask" in str(key) else fill
                about_next = as_flag(shifted, "shifted") and key != "attention_mask"
                positions = per == "token" and str(key).endswith("position_ids")
                cut[key] = self.apply(
                    value,
                    "position" if positions else per,
                    rows=rows,
                    shifted=about_next and not positions,
                    fill=its_fill,
                    dim=dim,
                )
            return {key: value for key, value in cut.items() if value is not None}
        if values is None:
            return None
        if per in ("token", "position"):
            shifted = as_flag(shifted, "shifted")
            return self._apply_to_tokens(values, shifted, fill, dim, per == "position")
        if dim is not None:
            raise PackingError(f"dim is for tokens; {per}s are always the first dimension")
        _, total = self._kept(per)
        ranges = self.kept_row_ranges([1] * total if rows is None else rows, per)
        expected = total if rows is None else sum(as_counts(rows, "rows"))
        found = length(values, "values")
        if found != expected:
            raise PackingError(
                f"values have {found} entries, but the {total} {per}s have {expected} rows"
            )
        return take_spans(values, ranges) if ranges else None

    def _dim_of_tokens(self, shape, dim: int | None) -> int:
        """Where the tokens are: where that was said, else where the row has them."""
        if dim is None:
            batch_of_one = len(shape) > 1 and shape[0] == 1
            if self._starts[-1] == 1:  # [1, 1] is what the ids are
                batch_of_one = batch_of_one and getattr(self.output_ids, "ndim", 1) == 2
            dim = int(batch_of_one)
        dim = as_int(dim, "dim")
        if not -len(shape) <= dim < len(shape):
            raise PackingError(f"dim is {dim}, but values have {len(shape)} dimensions")
        dim %= len(shape)
        if shape[dim] != self._starts[-1]:
            raise PackingError(
                f"values have {shape[dim]} entries, but the row has {self._starts[-1]} tokens"
            )
        return dim

    def _apply_to_tokens(self, values, shifted: bool, fill, dim: int | None, positions: bool):
        shape = getattr(values, "shape", None)
        dims = (length(values, "values"),) if shape is None or not len(shape) else shape
        dim = self._dim_of_tokens(dims, dim)
        cut = take(values, self.keep_positions, dim)
        if positions or (dim > 0 and dims[0] == 3 and holds_ints(values)):
            offsets = self._offsets(values, dim)
            if positions:
                return self._move(cut, offsets, dim)
            if any(offsets) and not shifted:
                raise PackingError(
                    "values look like position ids of M-RoPE, which would keep an offset where "
                    'tokens were removed; pass per="position", or move the tokens to dimension 0'
                )
        if not shifted or not self._holes:
            return cut
        if fill is None:
            if not holds_ints(values) or "uint" in str(getattr(values, "dtype", "")):
                raise PackingError("values are no signed ints, so they are no labels; pass fill=0")
            fill = IGNORE_INDEX
        check_fits([fill], getattr(values, "dtype", None))
        if shape is None:
            cut = list(cut)
            for hole in self._holes:
                cut[hole] = fill
            return cut if isinstance(values, list) else type(values)(cut)
        cut = cut.clone() if hasattr(cut, "clone") else cut.copy()  # may be a view of the input
        cut[(slice(None),) * dim + (self._holes,)] = fill
        return cut

    def _offsets(self, values, dim: int) -> list[int]:
        """By how much each position that stays moves forward, from all that was removed before."""
        if not holds_ints(values):
            raise PackingError("position ids are no ints; pass them as the processor gave them")
        values = values.cpu() if hasattr(values, "cpu") else values
        rows = np.moveaxis(np.asarray(values), dim, -1).reshape(-1, self._starts[-1])
        at = rows.min(axis=0).tolist() if rows.shape[1] else []
        offsets: list[int] = []
        for start, stop in pairwise(self._starts):
            low, high = (bisect_left(self.keep_positions, edge) for edge in (start, stop))
            mine, expected, offset = [], start, 0
            for position in self.keep_positions[low:high]:
                if position != expected:
                    offset += at[position] - at[expected]
                mine.append(offset)
                expected = position + 1
            kept = zip(self.keep_positions[low:high], mine, strict=True)
            first = min((at[position] - moved for position, moved in kept), default=0)
            offsets += [moved + first for moved in mine]
        return offsets

    def _move(self, cut, offsets: list[int], dim: int):
        if not hasattr(cut, "shape"):
            return type(cut)(p - offset for p, offset in zip(cut, offsets, strict=True))
        shape = [len(offsets)] + [1] * (cut.ndim - dim - 1)
        return cut - like(cut.reshape(-1), offsets).reshape(shape)

    def _kept(self, per: str) -> tuple[list[int], int]:
        if per == "image":
            return self.kept_images, len(self.kept_images) + len(self.dropped_images)
        if per == "video":
            return self.kept_videos, len(self.kept_videos) + len(self.dropped_videos)
        raise PackingError(f"per is {per!r}, expected 'token', 'position', 'image' or 'video'")


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
    mm_token_type_ids: Any = None,
    **overrides: Any,
) -> Truncation:
    """Cut a row to a length, and drop every image that the cut went through.

    Doing the cut itself, it knows what is lost: nothing is ever ambiguous here.

    Args:
        input_ids: the whole row ``[T]`` or ``[1, T]``, one placeholder per feature row.
        tokens_per_image: how many placeholders each image has, in order. An image whose
            placeholders stand in several runs can be given as the list of its runs; runs that
            adjoin are one run: give their sum. For a packed row flat ints, or one such list per
            sequence: there a list among the entries is always a sequence's, never runs, which are
            one level deeper, ``[[[2, 2]], [[2, 2]]]``.
        max_length: how many tokens may stay. For a packed row an int is the length of the whole
            row; a list cuts each sequence to its own length.
        image_token_id: the placeholder, where no family says it.
        side: the side that is cut off: "right" or "left"; one per sequence if ``max_length`` is.
        family: a registered family, or a ``Family``: its placeholders, markers and break tokens.
        tokens_per_video: the same as ``tokens_per_image`` for videos; a video of several runs stays
            or goes whole, with the timestamps between its outer markers.
        cu_seqlens: ``[B + 1]``, boundaries of a packed row; tokens past the last one stay last.
        mm_token_type_ids: ``[T]``, 1 for placeholders of images and 2 for those of videos, over
            what the family says of both.
        **overrides: what to use instead of what the family says: ``video_token_id``,
            ``vision_start_id``, ``vision_end_id``, ``video_start_id``, ``video_end_id``,
            ``break_token_ids``, ``drop_dangling``.

    Returns:
        A ``Truncation``; its row is at most ``max_length`` long.

    Raises:
        PlaceholderMismatch: the whole row does not have the placeholders that ``tokens_per_image``
            says, in number or in order.
        PackingError: an argument makes no sense, a marker or break token is a placeholder, or
            markers stand around placeholders of which nothing was said.

    Example:
        >>> row = [1, 7, 9, 9, 8, 2, 7, 9, 9, 9, 8, 3]
        >>> cut = truncate(row, [2, 3], 9, 9, vision_start_id=7, vision_end_id=8)
        >>> cut.output_ids, cut.kept_images
        ([1, 7, 9, 9, 8, 2], [0])
    """
    row = _Row(input_ids, cu_seqlens, image_token_id, mm_token_type_ids, family, overrides)
    streams = row.streams(tokens_per_image, tokens_per_video, whole=True)
    for stream in streams:
        if len(stream.positions) != stream.total:
            raise _mismatch(stream)
        _align(row, stream, row.starts[stream.seq : stream.seq + 2], None)
    return row.result(input_ids, cu_seqlens, streams, _windows(row, max_length, side))


def reconcile(
    input_ids: Any,
    tokens_per_image: Any,
    image_token_id: int | None = None,
    *,
    side: str | Sequence[str | None] | None = None,
    family: str | Family | None = None,
    tokens_per_video: Any = None,
    cu_seqlens: Any = None,
    mm_token_type_ids: Any = None,
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
        image_token_id: the placeholder, where no family says it.
        side: the side that was cut off, "left" or "right"; None if that is unknown or both were.
            For a packed row also one per sequence.
        family: as for ``truncate``.
        tokens_per_video: as for ``truncate``.
        cu_seqlens: ``[B + 1]``, boundaries of what is left of a packed row.
        mm_token_type_ids: as for ``truncate``.
        **overrides: as for ``truncate``, and ``pad_token_id``: padding at either end of a sequence
            is not its edge, so give it where a row was padded after the cut.

    Returns:
        A ``Truncation``.

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
    row = _Row(input_ids, cu_seqlens, image_token_id, mm_token_type_ids, family, overrides)
    streams = row.streams(tokens_per_image, tokens_per_video, whole=False)
    sides = _per_seq(side, row)
    for stream in streams:
        _align(row, stream, row.bounds(stream.seq), sides[stream.seq])
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
    starts: list[int]  # image boundaries in the whole stream, from 0 to the number of placeholders
    runs: list[int]  # these, and the boundaries of the runs inside images
    positions: list[int]
    first: int = 0
    cut_left: bool = False
    cut_right: bool = False

    @property
    def total(self) -> int:
        return self.starts[-1]

    def survivors(self, first: int, count: int) -> tuple[int, int]:
        """The images ``[i, j)`` that lie wholly in the window of ``count`` from ``first``."""
        i = bisect_left(self.starts, first)
        j = bisect_right(self.starts, first + count) - 1
        return (i, j) if i < j else (0, 0)

    def orphans(self, first: int) -> list[int]:
        """The positions whose image is not whole, were ``first`` the number of the first."""
        i, j = self.survivors(first, len(self.positions))
        if i == j:
            return self.positions
        return self.positions[: self.starts[i] - first] + self.positions[self.starts[j] - first :]

    def of(self, item: int) -> list[int]:
        """What the row has of an image's placeholders."""
        start, stop = (max(0, edge - self.first) for edge in self.starts[item : item + 2])
        return self.positions[start:stop]

    def next_lost(self) -> int:
        """The image behind the last one that the row has whole, or the last of all."""
        after = bisect_right(self.starts, self.first + len(self.positions)) - 1
        return min(after, len(self.starts) - 2)

    def several(self, item: int) -> bool:
        """Whether the image was given as more than one run."""
        return bisect_left(self.runs, self.starts[item + 1]) > 1 + bisect_left(
            self.runs, self.starts[item]
        )


class _Row:
    """A row as lists: what each token is, and where its sequences (and its tail) begin."""

    def __init__(self, input_ids, cu_seqlens, image_token_id, types, family, overrides):
        if image_token_id is not None:
            overrides = {"image_token_id": image_token_id, **overrides}
        given = overrides.keys() & {"image_token_id", "video_token_id"}
        if types is not None and any(overrides[name] is not None for name in given):
            raise PackingError("pass image_token_id=None where mm_token_type_ids are given")
        self.named = family is not None  # its family is known, so text inside a video is too
        self.family = one = resolve(family, overrides)
        self.ids = ids = as_ids(input_ids, "input_ids")
        if types is not None:
            self.kinds = as_ids(types, "mm_token_type_ids")
            if len(self.kinds) != len(ids):
                raise PackingError(
                    f"mm_token_type_ids has {len(self.kinds)} entries, but the row {len(ids)} "
                    f"tokens"
                )
            self.tokens = {kind: f"type {kind}" for kind in (_IMAGE, _VIDEO)}
            placeholders = {ids[p] for p, kind in enumerate(self.kinds) if kind in self.tokens}
        else:
            found = {_IMAGE: one.image_token_id, _VIDEO: one.video_token_id}
            found = {kind: token for kind, token in found.items() if token is not None}
            placeholders = set(found.values())
            if len(placeholders) < len(found):
                raise PackingError(
                    f"image_token_id and video_token_id are both {one.image_token_id}; count their "
                    f"images and videos in tokens_per_image, in their order in the row"
                )
            kind_of = {token: kind for kind, token in found.items()}
            self.kinds = [kind_of.get(token, 0) for token in ids]
            self.tokens = {kind: f"id {token}" for kind, token in found.items()}
        bounds = [0, len(ids)] if cu_seqlens is None else as_boundaries(cu_seqlens, len(ids))
        self.starts = [*bounds, len(ids)] if bounds[-1] < len(ids) else bounds
        self.num_seqs, self.packed = len(bounds) - 1, cu_seqlens is not None

        self.begin, self.end = one.vision_start_id, one.vision_end_id
        self.outer = (
            self.begin if one.video_start_id is None else one.video_start_id,
            self.end if one.video_end_id is None else one.video_end_id,
        )
        self.breaks = set(one.break_token_ids)
        self.markers = {self.begin, self.end, *self.outer} - {None}
        self.special = [k > 0 or t in self.markers for k, t in zip(self.kinds, ids, strict=True)]
        for name, tokens in (
            ("break_token_ids", self.breaks),
            ("vision_start_id", {self.begin, self.outer[0]}),
            ("vision_end_id", {self.end, self.outer[1]}),
            ("pad_token_id", {one.pad_token_id}),
        ):
            for token in tokens & placeholders:
                raise PackingError(f"{name}: {token} is a placeholder")
        if one.drop_dangling and _VIDEO not in self.tokens:
            self._refuse_unknown_media()

    def _refuse_unknown_media(self) -> None:
        """Markers around one token, repeated, mark an image or video of which nothing was said."""
        if self.begin is None or self.end is None:
            return
        for start in (p for p, token in enumerate(self.ids) if token == self.begin):
            stop = start + 1
            while stop < len(self.ids) and self.ids[stop] == self.ids[start + 1]:
                stop += 1
            inside = stop - start - 1
            if inside < 2 or self.special[start + 1] or self.ids[stop - 1] in self.breaks:
                continue
            if stop < len(self.ids) and self.ids[stop] == self.end:
                raise PackingError(
                    f"position {start}: markers stand around {inside} tokens of id "
                    f"{self.ids[stop - 1]}, which is no image_token_id; a video needs "
                    f"video_token_id and tokens_per_video, or its family"
                )

    def bounds(self, seq: int) -> tuple[int, int]:
        """Where a sequence begins and ends, padding at its ends left out."""
        (start, stop), pad = self.starts[seq : seq + 2], self.family.pad_token_id
        while pad is not None and start < stop and self.ids[start] == pad:
            start += 1
        while pad is not None and start < stop and self.ids[stop - 1] == pad:
            stop -= 1
        return start, stop

    def only_breaks(self, start: int, stop: int) -> bool:
        """Whether nothing but break tokens stands in ``[start, stop)``."""
        return all(self.ids[position] in self.breaks for position in range(start, stop))

    def streams(self, tokens_per_image, tokens_per_video, whole: bool) -> list[_Stream]:
        """One stream for each modality of each sequence."""
        streams = []
        for kind, name, spec in (
            (_IMAGE, "image", tokens_per_image),
            (_VIDEO, "video", tokens_per_video),
        ):
            positions: list[list[int]] = []
            for start, stop in pairwise(self.starts):
                positions.append([p for p in range(start, stop) if self.kinds[p] == kind])
            tail = sum(len(found) for found in positions[self.num_seqs :])
            if tail:
                raise PlaceholderMismatch(
                    actual=0,
                    expected=tail,
                    message=f"{tail} {name} placeholders ({self.tokens[kind]}) lie past the last "
                    f"boundary at {self.starts[self.num_seqs]}, in no sequence",
                )
            counts = [len(found) for found in positions[: self.num_seqs]]
            first_item = 0
            for seq, items in enumerate(self._items(spec, kind, name, counts, whole)):
                starts, runs = [0], [0]
                for item in items:
                    runs += [runs[-1] + stop for stop in accumulate(item)]
                    starts.append(runs[-1])
                token = self.tokens.get(kind, "")
                streams.append(_Stream(seq, name, token, first_item, starts, runs, positions[seq]))
                first_item += len(items)
        return streams

    def _items(self, spec, kind: int, name: str, counts: list[int], whole: bool) -> list[list]:
        """The runs of every image of every sequence."""
        where = f"tokens_per_{name}"
        entries = [] if spec is None else as_list(spec, where)
        if entries and kind not in self.tokens:
            raise PackingError(
                f"{where} is given, but no {name}_token_id to find them by; a family that writes "
                f"its videos with the image's needs mm_token_type_ids"
            )
        if not self.packed:
            return [_as_items(entries, where)]
        if not entries:
            return [[] for _ in counts]
        if any(entry is None or nested(entry) for entry in entries) or not counts:
            if len(entries) != len(counts):
                raise PackingError(
                    f"{where} has {len(entries)} entries, but the row has {len(counts)} sequences"
                )
            return [
                _as_items([] if entry is None else entry, f"{where}[{seq}]")
                for seq, entry in enumerate(entries)
            ]
        items = _as_items(entries, where)
        if len(counts) == 1:
            return [items]
        if not whole:
            raise PackingError(
                f"{where} is one list for {len(counts)} sequences, and what was cut off does not "
                f"say whose images they were; pass one list per sequence"
            )
        split, at = [], 0
        for count in counts:
            first = at
            while at < len(items) and count > 0:
                count -= sum(items[at])
                at += 1
            split.append(items[first:at])
        split[-1] += items[at:]  # one too many, or a sequence that does not fit: said below
        return split

    def result(self, input_ids, cu_seqlens, streams, windows) -> Truncation:
        """Drop what is not whole inside the windows, with all that belongs to it, and renumber."""
        seen = windows or list(pairwise(self.starts))
        state = bytearray(len(self.ids))  # _CUT
        for start, stop in seen:
            state[start:stop] = bytes([_KEPT]) * (stop - start)
        kept: dict[str, list[int]] = {"image": [], "video": []}
        dropped: dict[str, list[int]] = {"image": [], "video": []}
        survives, going = bytearray(len(self.ids) + 1), []
        for stream in streams:
            low, high = (bisect_left(stream.positions, edge) for edge in seen[stream.seq])
            i, j = stream.survivors(stream.first + low, high - low)
            numbers = range(len(stream.starts) - 1)
            kept[stream.kind] += [stream.first_item + item for item in numbers[i:j]]
            lost = [*numbers[:i], *numbers[j:]]
            dropped[stream.kind] += [stream.first_item + item for item in lost]
            for item in numbers[i:j]:
                for position in stream.of(item):
                    survives[position] = 1
            going += [(stream, item) for item in lost]
        gone = [piece for stream, item in going for piece in self._pieces(stream, item, survives)]
        if windows is None:
            for seq in {stream.seq for stream, _ in going}:
                gone += self._debris([s for s in streams if s.seq == seq], survives)
        for position, what in gone:
            if state[position] == _KEPT and (what == _ORPHAN or self.family.drop_dangling):
                state[position] = what

        lengths = [state.count(_KEPT, start, stop) for start, stop in pairwise(self.starts)]
        keep = [position for position, what in enumerate(state) if what == _KEPT]
        seqs = [seq for seq in range(self.num_seqs) if lengths[seq]]
        bounds = [0, *accumulate(lengths[seq] for seq in seqs)]
        ends = {stop - 1 for _, stop in seen}
        holes = [
            entry
            for entry, position in enumerate(keep)
            if position not in ends and state[position + 1] != _KEPT
        ]
        positions = [p for number in lengths for p in range(number)]
        return Truncation(
            output_ids=like_ids(input_ids, [self.ids[position] for position in keep]),
            keep_positions=keep,
            orphan_positions=[p for p, what in enumerate(state) if what == _ORPHAN],
            kept_images=kept["image"],
            dropped_images=dropped["image"],
            kept_videos=kept["video"],
            dropped_videos=dropped["video"],
            position_ids=like(input_ids, positions, torch.int64),
            cu_seqlens=None if cu_seqlens is None else like(cu_seqlens, bounds),
            kept_sequences=seqs,
            max_seqlen=max(lengths[: self.num_seqs], default=0),
            _starts=[0] if len(self.starts) == 1 else self.starts,
            _all_sequences=cu_seqlens is None or len(seqs) == self.num_seqs,
            _holes=holes,
        )

    def _pieces(self, stream: _Stream, item: int, survives) -> Iterator[tuple[int, int]]:
        """All of a dropped image or video that the row has: placeholders, breaks, markers, text."""
        mine, ids = stream.of(item), self.ids
        if not mine:
            return
        start, stop = self.bounds(stream.seq)
        yield from ((position, _ORPHAN) for position in mine)
        spans: list[list[int]] = []  # its runs, each with the breaks and the markers around it
        for position in mine:
            if spans and self.only_breaks(spans[-1][1], position):
                yield from ((p, _ORPHAN) for p in range(spans[-1][1], position))
                spans[-1][1] = position + 1
            else:
                spans.append([position, position + 1])
        for span in spans:
            low, high = span
            while low > start and ids[low - 1] in self.breaks:
                low -= 1
            while high < stop and ids[high] in self.breaks:
                high += 1
            yield from ((p, _ORPHAN) for p in (*range(low, span[0]), *range(span[1], high)))
            before = self._special_before(low, start) if low < span[0] else low - 1
            if before >= start and ids[before] == self.begin and not survives[before - 1]:
                yield from ((p, _DANGLING) for p in range(before, low))
                low = before
            if high < stop and ids[high] == self.end and not survives[high + 1]:
                yield high, _DANGLING
                high += 1
            span[:] = low, high
        if self.named:
            yield from ((p, _DANGLING) for p in range(spans[0][0], spans[-1][1]))
        if stream.kind == "video" or stream.several(item):
            whole = self._outer(stream, item, spans[0][0], spans[-1][1], start, stop)
            yield from ((p, _DANGLING) for p in range(*whole))

    def _special_before(self, position: int, start: int) -> int:
        """The last placeholder or marker before a position, or ``start - 1``."""
        return next((p for p in range(position - 1, start - 1, -1) if self.special[p]), start - 1)

    def _outer(self, stream, item, low, high, start, stop) -> tuple[int, int]:
        """From the outer begin marker of a video to its outer end, timestamps and all.

        Where one of them was cut off, the video reaches to the edge of the row.
        """
        before = self._special_before(low, start)
        after = high
        if self.outer[1] != self.end:  # a timestamp may stand in front of a marker of its own
            after = next((p for p in range(high, stop) if self.special[p]), stop)
        opens = before >= start and self.ids[before] == self.outer[0]
        closes = after < stop and self.ids[after] == self.outer[1]
        own = self.family.video_start_id is not None
        unsure = stream.cut_left and stream.cut_right  # then at an edge of the row, either may be
        lost_left = stream.starts[item] < stream.first or (
            unsure and not any(self.kinds[start:low])
        )
        lost_right = stream.starts[item + 1] > stream.first + len(stream.positions) or (
            unsure and not any(self.kinds[high:stop])
        )
        if opens and closes:
            return before, after + 1
        if opens and lost_right and (own or stream.several(item)):
            return before, stop
        if lost_left and (closes or own):
            return start, after + 1 if closes else (stop if lost_right else high)
        return low, low

    def _debris(self, streams: list[_Stream], survives) -> Iterator[tuple[int, int]]:
        """At a cut edge: the breaks and markers of an image of which nothing else is left."""
        ids, (start, stop) = self.ids, self.bounds(streams[0].seq)
        if any(stream.cut_left for stream in streams):
            at, closing = start, {self.end, self.outer[1]} - {None} | self.breaks
            while at < stop and ids[at] in closing and not survives[at + 1]:
                yield at, _ORPHAN if ids[at] in self.breaks else _DANGLING
                at += 1
            after = next((p for p in range(at, stop) if self.special[p]), stop)
            own = self.family.video_end_id is not None and self.outer[1] != self.end
            if own and after < stop and ids[after] == self.outer[1]:
                yield from ((p, _DANGLING) for p in range(at, after + 1))
        if any(stream.cut_right for stream in streams):
            at, opening = stop, {self.begin, self.outer[0]} - {None} | self.breaks
            while at > start and ids[at - 1] in opening and not survives[at - 2]:
                at -= 1
                yield at, _ORPHAN if ids[at] in self.breaks else _DANGLING
            before = self._special_before(at, start)
            begins = before >= start and ids[before] in {self.begin, self.outer[0]} - {self.end}
            own = self.family.video_start_id is not None
            lost = any(
                s.cut_right and s.kind == "video" and (own or s.several(s.next_lost()))
                for s in streams
            )
            if begins and (lost or (self.named and self.breaks)):  # of a video, or of a long marker
                yield from ((p, _DANGLING) for p in range(before, stop))


def _as_items(entries, where: str) -> list[list[int]]:
    """The runs of each image, from ints and lists of ints."""
    items = []
    for i, entry in enumerate(as_list(entries, where)):
        name = f"{where}[{i}]"
        runs = as_ids(entry, name) if nested(entry) else [as_int(entry, name)]
        if not runs or min(runs) < 1:
            raise PackingError(
                f"{where}[{i}] is {entry}, expected at least 1; leave out an image that has no "
                f"placeholders"
            )
        items.append(runs)
    return items


def _windows(row: _Row, max_length, side) -> list[tuple[int, int]]:
    """What stays of every sequence, and of the tail, before anything is repaired."""
    seqs = list(pairwise(row.starts))
    if not nested(max_length):
        limit = min(as_int(max_length, "max_length", minimum=0), len(row.ids))
        first = 0 if _as_side(side) == "right" else len(row.ids) - limit
        last = first + limit
        return [(min(max(first, a), last), max(min(last, b), first)) for a, b in seqs]
    limits = as_counts(max_length, "max_length")
    if len(limits) != row.num_seqs:
        raise PackingError(f"max_length has {len(limits)} entries for {row.num_seqs} sequences")
    windows = []
    for (start, stop), limit, one_side in zip(seqs, limits, _per_seq(side, row), strict=False):
        limit = min(limit, stop - start)
        right = _as_side(one_side) == "right"
        windows.append((start, start + limit) if right else (stop - limit, stop))
    return windows + seqs[row.num_seqs :]


def _per_seq(side, row: _Row) -> list:
    one = side is None or isinstance(side, str)
    sides = [side] * row.num_seqs if one else as_list(side, "side")
    if len(sides) != row.num_seqs:
        raise PackingError(f"side has {len(sides)} entries for {row.num_seqs} sequences")
    return sides


def _as_side(side) -> str:
    if not isinstance(side, str) or side not in ("left", "right"):
        raise PackingError(
            f"side is {side!r}, expected 'left' or 'right', the side that is cut off"
        )
    return side


def _align(row: _Row, stream: _Stream, bounds: Sequence[int], side: str | None) -> None:
    """Find the number of the first placeholder left, from all that the row says of boundaries."""
    if side is not None:
        _as_side(side)
    positions, left, last = stream.positions, len(stream.positions), stream.total
    if left > last:
        raise _mismatch(stream)
    gaps = [k for k in range(1, left) if positions[k] - positions[k - 1] > 1]
    breaks = [k for k in gaps if not row.only_breaks(positions[k - 1] + 1, positions[k])]
    if left and not row.only_breaks(bounds[0], positions[0]):
        breaks.append(0)
    if left and not row.only_breaks(positions[-1] + 1, bounds[1]):
        breaks.append(left)
    edges, apart = set(stream.runs), set(gaps)
    inner = sorted(edges - set(stream.starts))  # runs of one image never adjoin

    def fits(first: int) -> bool:
        if not all(first + k in edges for k in breaks):
            return False
        low, high = bisect_right(inner, first), bisect_left(inner, first + left)
        return all(inner[i] - first in apart for i in range(low, high))

    candidates = range(last - left + 1)
    candidates = candidates[:1] if side == "right" else candidates
    candidates = candidates[-1:] if side == "left" else candidates
    keepers, others = [], []
    for first in candidates if left else candidates[-1:] if side == "left" else candidates[:1]:
        if fits(first):
            i, j = stream.survivors(first, left)
            (keepers if i < j else others).append(first)
            if len(keepers) == _MAX_CANDIDATES:
                break
    if not keepers and not others:
        raise _mismatch(stream, gaps, side)
    # Two windows differ in what they keep, or in their orphans, unless neither keeps anything.
    if keepers and len(keepers) + len(others) > 1:
        raise _ambiguous(stream, (keepers + others[:1])[:_MAX_CANDIDATES])
    unsure = side is None and (not left or len(others) > 1)
    stream.first = (keepers or others)[0]
    stream.cut_left = unsure or stream.first > 0
    stream.cut_right = unsure or stream.first + left < last


def _mismatch(stream: _Stream, gaps=None, side=None) -> PlaceholderMismatch:
    """The error for placeholders that cannot come from these images."""
    found, total = len(stream.positions), stream.total
    sizes = [stop - start for start, stop in pairwise(stream.starts)]
    message = (
        f"sequence {stream.seq}: {found} {stream.kind} placeholders ({stream.token}), but "
        f"tokens_per_{stream.kind} {shorten(sizes)} adds up to {total}"
    )
    if gaps is not None:
        runs = [stop - start for start, stop in pairwise([0, *gaps, found])]
        cut = f" after a cut on the {side}" if side else ""
        message += (
            f", and runs of {shorten(runs)} are no part of them{cut}; check which images "
            f"belong to this row, their order and the side; give one that stands in several runs "
            f"as the list of its runs, or say break_token_ids"
        )
    else:
        message += "; pass the images of this row, all of them"
    return PlaceholderMismatch(actual=total, expected=found, message=message)


def _ambiguous(stream: _Stream, candidates: list[int]) -> AmbiguousTruncation:
    """The error for a row that several sets of images explain, with the first few of them."""
    found = []
    for first in candidates:
        i, j = stream.survivors(first, len(stream.positions))
        kept = list(range(stream.first_item + i, stream.first_item + j))
        orphans = stream.orphans(first)
        found.append({f"kept_{stream.kind}s": kept, "orphan_positions": orphans})
    sets = " or ".join(shorten(one[f"kept_{stream.kind}s"]) for one in found)
    error = AmbiguousTruncation(
        f"sequence {stream.seq}: what is left, {len(stream.positions)} {stream.kind} placeholders "
        f"({stream.token}) of {stream.total}, could be of {stream.kind}s {sets}; say which side "
        f"was cut, or cut with truncate"
    )
    error.candidates = found
    return error
