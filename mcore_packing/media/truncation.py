"""Which images survive when a prompt is cut: placeholders vanish, pixel tensors do not."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..errors import AmbiguousTruncation, PackingError, PlaceholderMismatch
from .kinds import (
    as_boundaries,
    as_counts,
    as_ids,
    as_int,
    as_list,
    as_token,
    check_fits,
    holds_ints,
    length,
    like,
    like_ids,
    nested,
    shorten,
    take,
    take_spans,
)
from .placement import IGNORE_INDEX

_SIDES = ("left", "right")
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
    _num_tokens: int
    _all_sequences: bool  # no boundary is gone: an empty sequence leaves no other trace
    _holes: list[int]  # entries of keep_positions that something inside the cut was removed after

    @property
    def noop(self) -> bool:
        """True where the row stays as it was, with all its images, videos and boundaries."""
        whole = self._all_sequences and len(self.keep_positions) == self._num_tokens
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
        ranges: list[list[int]] = []
        for item in kept:
            if ranges and ranges[-1][1] == starts[item]:
                ranges[-1][1] = starts[item + 1]
            else:
                ranges.append([starts[item], starts[item + 1]])
        return ranges

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
            per: what the first dimension counts: "token", "image" or "video". Tokens may also be
                the second dimension of ``[1, T]``, or ``dim``.
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
                signed ints and ``fill`` is left out.

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
                about_next = shifted and key != "attention_mask"
                cut[key] = self.apply(
                    value, per, rows=rows, shifted=about_next, fill=its_fill, dim=dim
                )
            return {key: value for key, value in cut.items() if value is not None}
        if values is None:
            return None
        if per == "token":
            return self._apply_to_tokens(values, shifted, fill, dim)
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
        if all(start == stop for start, stop in ranges):
            return None
        return take_spans(values, ranges)

    def _dim_of_tokens(self, shape) -> int:
        batch_of_one = len(shape) > 1 and shape[0] == 1
        if self._num_tokens == 1:  # [1, 1] is what the ids are
            batch_of_one = batch_of_one and getattr(self.output_ids, "ndim", 1) == 2
        return int(batch_of_one)

    def _apply_to_tokens(self, values, shifted: bool, fill, dim: int | None):
        shape = getattr(values, "shape", None)
        dims = (length(values, "values"),) if shape is None or not len(shape) else shape
        dim = self._dim_of_tokens(dims) if dim is None else as_int(dim, "dim")
        if not -len(dims) <= dim < len(dims):
            raise PackingError(f"dim is {dim}, but values have {len(dims)} dimensions")
        dim, found = dim % len(dims), dims[dim]
        if found != self._num_tokens:
            raise PackingError(
                f"values have {found} entries, but the row has {self._num_tokens} tokens"
            )
        cut = take(values, self.keep_positions, dim)
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

    def _kept(self, per: str) -> tuple[list[int], int]:
        if per == "image":
            return self.kept_images, len(self.kept_images) + len(self.dropped_images)
        if per == "video":
            return self.kept_videos, len(self.kept_videos) + len(self.dropped_videos)
        raise PackingError(f"per is {per!r}, expected 'token', 'image' or 'video'")


def truncate(
    input_ids: Any,
    tokens_per_image: Any,
    max_length: int | Sequence[int],
    image_token_id: int | None,
    *,
    side: str | Sequence[str] = "right",
    vision_start_id: int | None = None,
    vision_end_id: int | None = None,
    drop_dangling: bool = True,
    break_token_ids: Sequence[int] = (),
    tokens_per_video: Any = None,
    video_token_id: int | None = None,
    mm_token_type_ids: Any = None,
    cu_seqlens: Any = None,
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
        image_token_id: the placeholder; None where ``mm_token_type_ids`` say it.
        side: the side that is cut off: "right" or "left"; one per sequence if ``max_length`` is.
        vision_start_id: the marker in front of an image.
        vision_end_id: the marker behind an image.
        drop_dangling: also drop a begin marker that no kept placeholder follows, and an end marker
            that follows none.
        break_token_ids: tokens that stand between the placeholders of one image (Pixtral's
            ``[IMG_BREAK]``); they go with their image.
        tokens_per_video: the same as ``tokens_per_image`` for videos; a video of several runs stays
            or goes whole.
        video_token_id: their placeholder. Needed wherever the row has videos and markers.
        mm_token_type_ids: ``[T]``, 1 for placeholders of images and 2 for those of videos, instead
            of their ids.
        cu_seqlens: ``[B + 1]``, boundaries of a packed row; tokens past the last one stay last.

    Returns:
        A ``Truncation``; its row is at most ``max_length`` long.

    Raises:
        PlaceholderMismatch: the whole row does not have the placeholders that ``tokens_per_image``
            says, in number or in order.
        PackingError: an argument makes no sense, or a marker or break token is a placeholder.

    Example:
        >>> row = [1, 7, 9, 9, 8, 2, 7, 9, 9, 9, 8, 3]
        >>> cut = truncate(row, [2, 3], 9, 9, vision_start_id=7, vision_end_id=8)
        >>> cut.output_ids, cut.kept_images
        ([1, 7, 9, 9, 8, 2], [0])
    """
    row = _Row.parse(input_ids, cu_seqlens, image_token_id, video_token_id, mm_token_type_ids)
    row.read_options(break_token_ids, vision_start_id, vision_end_id, drop_dangling, None)
    streams = row.streams(tokens_per_image, tokens_per_video, whole=True)
    windows = _windows(row, max_length, side)
    for stream in streams:
        start, stop = row.bounds(stream.seq)
        if len(stream.positions) != stream.total:
            raise _mismatch(stream)
        _align(row, stream, start, stop, None)  # the whole row has them in the order given
        low, high = (bisect_left(stream.positions, edge) for edge in windows[stream.seq])
        stream.first, stream.positions = low, stream.positions[low:high]
    return row.result(input_ids, cu_seqlens, streams, windows)


def reconcile(
    input_ids: Any,
    tokens_per_image: Any,
    image_token_id: int | None,
    *,
    side: str | Sequence[str | None] | None = None,
    vision_start_id: int | None = None,
    vision_end_id: int | None = None,
    drop_dangling: bool = True,
    break_token_ids: Sequence[int] = (),
    tokens_per_video: Any = None,
    video_token_id: int | None = None,
    mm_token_type_ids: Any = None,
    pad_token_id: int | None = None,
    cu_seqlens: Any = None,
) -> Truncation:
    """Find out which images survived a cut that somebody else made, and repair the row.

    What is left of the placeholders is a window ``[a, a + n)`` of all of them. A row that does not
    begin (end) with a placeholder, every break between two runs, and a given side each say where
    image boundaries are. An image stays only if its whole range lies in the window.

    Args:
        input_ids: what is left of the row, ``[T]`` or ``[1, T]``.
        tokens_per_image: the placeholders of all images of the whole row, as for ``truncate``:
            runs that adjoin are one run, give their sum. For a packed row one list per sequence; a
            list among its entries is always a sequence's, never runs, which are one level deeper,
            ``[[[2, 2]], [[2, 2]]]``.
        image_token_id: the placeholder; None where ``mm_token_type_ids`` say it.
        side: the side that was cut off, "left" or "right"; None if that is unknown or both were.
            For a packed row also one per sequence.
        vision_start_id, vision_end_id, drop_dangling, break_token_ids: as for ``truncate``.
        tokens_per_video, video_token_id, mm_token_type_ids: as for ``truncate``.
        pad_token_id: padding at either end of a sequence is not its edge: give it where a row was
            padded after the cut.
        cu_seqlens: ``[B + 1]``, boundaries of what is left of a packed row.

    Returns:
        A ``Truncation``.

    Raises:
        PlaceholderMismatch: no window fits; the images are others, or in another order.
        AmbiguousTruncation: more than one set of images, or of orphaned placeholders, fits. The
            attribute ``candidates`` lists the first few. Say ``side``, or cut with ``truncate``.
        PackingError: an argument makes no sense, or a marker, break token or padding is a
            placeholder.

    Example:
        The cut went through the first image; counting from the front would keep it:

        >>> left = [9, 9, 8, 7, 9, 9, 9, 8, 3]
        >>> found = reconcile(left, [4, 3], 9, vision_start_id=7, vision_end_id=8)
        >>> found.kept_images, found.output_ids
        ([1], [7, 9, 9, 9, 8, 3])
    """
    row = _Row.parse(input_ids, cu_seqlens, image_token_id, video_token_id, mm_token_type_ids)
    row.read_options(break_token_ids, vision_start_id, vision_end_id, drop_dangling, pad_token_id)
    streams = row.streams(tokens_per_image, tokens_per_video, whole=False)
    sides = _per_seq(side, row)
    for stream in streams:
        start, stop = row.bounds(stream.seq)
        stream.first = _align(row, stream, start, stop, sides[stream.seq])
    windows = list(pairwise(row.starts))
    return row.result(input_ids, cu_seqlens, streams, windows)


@dataclass
class _Stream:
    """The placeholders of one modality in one sequence, and the images (videos) they are for.

    What is left of them is ``positions``, beginning with number ``first`` of the whole stream.
    """

    seq: int
    kind: str
    token: str
    first_item: int  # number of the first image in the whole row
    starts: list[int]  # image boundaries in the whole stream, from 0 to the number of placeholders
    runs: list[int]  # these, and the boundaries of the runs inside images
    positions: list[int]
    first: int = 0

    @property
    def total(self) -> int:
        return self.starts[-1]

    def survivors(self, first: int) -> tuple[int, int]:
        """The images ``[i, j)`` that lie wholly in the window that begins at ``first``."""
        i = bisect_left(self.starts, first)
        j = bisect_right(self.starts, first + len(self.positions)) - 1
        return (i, j) if i < j else (0, 0)

    def orphans(self, first: int) -> list[int]:
        """The positions of that window whose image is not whole."""
        i, j = self.survivors(first)
        if i == j:
            return self.positions
        return self.positions[: self.starts[i] - first] + self.positions[self.starts[j] - first :]


@dataclass
class _Row:
    """A row as lists: what kind each token is, and where its sequences (and its tail) begin."""

    ids: list[int]
    kinds: list[int]  # 0 for text, _IMAGE and _VIDEO for placeholders
    starts: list[int]
    num_seqs: int  # without the tail
    packed: bool
    tokens: dict[int, str]
    placeholders: set[int]
    breaks: list[int] | None = None  # how many break tokens stand before each position
    vision_start_id: int | None = None
    vision_end_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def parse(cls, input_ids, cu_seqlens, image_token_id, video_token_id, mm_token_type_ids):
        ids = as_ids(input_ids, "input_ids")
        if mm_token_type_ids is not None:
            if image_token_id is not None or video_token_id is not None:
                raise PackingError("pass image_token_id=None where mm_token_type_ids are given")
            kinds = as_ids(mm_token_type_ids, "mm_token_type_ids")
            if len(kinds) != len(ids):
                raise PackingError(
                    f"mm_token_type_ids has {len(kinds)} entries, but the row {len(ids)} tokens"
                )
            tokens = {kind: f"type {kind}" for kind in (_IMAGE, _VIDEO)}
            placeholders = {ids[p] for p, kind in enumerate(kinds) if kind in tokens}
        else:
            modality = {}
            for kind, name, token_id in (
                (_IMAGE, "image_token_id", image_token_id),
                (_VIDEO, "video_token_id", video_token_id),
            ):
                if token_id is not None:
                    modality[as_int(token_id, name)] = kind
            if image_token_id is not None and image_token_id == video_token_id:
                raise PackingError(
                    f"image_token_id and video_token_id are both {image_token_id}; count their "
                    f"images and videos in tokens_per_image, in their order in the row"
                )
            kinds = [modality.get(token, 0) for token in ids]
            tokens = {kind: f"id {token}" for token, kind in modality.items()}
            placeholders = set(modality)
        bounds = [0, len(ids)] if cu_seqlens is None else as_boundaries(cu_seqlens, len(ids))
        starts = [*bounds, len(ids)] if bounds[-1] < len(ids) else bounds
        num_seqs, packed = len(bounds) - 1, cu_seqlens is not None
        return cls(ids, kinds, starts, num_seqs, packed, tokens, placeholders)

    def read_options(self, break_ids, vision_start_id, vision_end_id, drop_dangling, pad_token_id):
        inside = set(as_ids(break_ids, "break_token_ids"))
        if inside:
            self.breaks = [0, *accumulate(token in inside for token in self.ids)]
        vision_start_id = as_token(vision_start_id, "vision_start_id")
        vision_end_id = as_token(vision_end_id, "vision_end_id")
        if drop_dangling:
            self.vision_start_id, self.vision_end_id = vision_start_id, vision_end_id
        self.pad_token_id = as_token(pad_token_id, "pad_token_id")
        for name, tokens in (
            ("break_token_ids", inside),
            ("vision_start_id", {vision_start_id}),
            ("vision_end_id", {vision_end_id}),
            ("pad_token_id", {self.pad_token_id}),
        ):
            for token in tokens & self.placeholders:
                raise PackingError(f"{name}: {token} is a placeholder")

    def bounds(self, seq: int) -> tuple[int, int]:
        """Where a sequence begins and ends, padding at its ends left out."""
        start, stop = self.starts[seq], self.starts[seq + 1]
        if self.pad_token_id is not None:
            while start < stop and self.ids[start] == self.pad_token_id:
                start += 1
            while start < stop and self.ids[stop - 1] == self.pad_token_id:
                stop -= 1
        return start, stop

    def only_breaks(self, start: int, stop: int) -> bool:
        """Whether nothing but break tokens stands in ``[start, stop)``."""
        if start == stop or self.breaks is None:
            return start == stop
        return self.breaks[stop] - self.breaks[start] == stop - start

    def streams(self, tokens_per_image, tokens_per_video, whole: bool) -> list[_Stream]:
        """One stream for each modality of each sequence that has any."""
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

    def _items(
        self, spec, kind: int, name: str, counts: list[int], whole: bool
    ) -> list[list[list[int]]]:
        """The runs of every image of every sequence."""
        where = f"tokens_per_{name}"
        entries = [] if spec is None else as_list(spec, where)
        if entries and kind not in self.tokens:
            raise PackingError(f"{where} is given, but no {name}_token_id to find them by")
        flat = not any(entry is None or nested(entry) for entry in entries)
        if not self.packed:
            return [_as_items(entries, where)]
        if not entries:
            return [[] for _ in counts]
        if not flat or not counts:
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
        """Drop orphans and dangling markers inside the windows, and renumber what is left."""
        state = bytearray(len(self.ids))  # _CUT
        for start, stop in windows:
            state[start:stop] = bytes([_KEPT]) * (stop - start)
        kept: dict[str, list[int]] = {"image": [], "video": []}
        dropped: dict[str, list[int]] = {"image": [], "video": []}
        survives = bytearray(len(self.ids) + 1)  # one more: nothing survives behind the row
        for stream in streams:
            i, j = stream.survivors(stream.first)
            numbers = range(stream.first_item, stream.first_item + len(stream.starts) - 1)
            kept[stream.kind] += numbers[i:j]
            dropped[stream.kind] += [*numbers[:i], *numbers[j:]]
            for position in stream.positions:
                survives[position] = 1
            for position in stream.orphans(stream.first):
                survives[position], state[position] = 0, _ORPHAN
            for position in self._orphaned_breaks(stream, state, *windows[stream.seq]):
                state[position] = _ORPHAN
        for start, stop in windows:
            self._drop_dangling(state, survives, start, stop)

        lengths = [state.count(_KEPT, start, stop) for start, stop in pairwise(self.starts)]
        keep = [position for position, what in enumerate(state) if what == _KEPT]
        seqs = [seq for seq in range(self.num_seqs) if lengths[seq]]
        bounds = [0, *accumulate(lengths[seq] for seq in seqs)]
        ends = {stop - 1 for _, stop in windows}
        holes = [
            entry
            for entry, position in enumerate(keep)
            if position not in ends and state[position + 1] != _KEPT
        ]
        return Truncation(
            output_ids=like_ids(input_ids, [self.ids[position] for position in keep]),
            keep_positions=keep,
            orphan_positions=[p for p, what in enumerate(state) if what == _ORPHAN],
            kept_images=kept["image"],
            dropped_images=dropped["image"],
            kept_videos=kept["video"],
            dropped_videos=dropped["video"],
            position_ids=like(
                input_ids, [p for number in lengths for p in range(number)], torch.int64
            ),
            cu_seqlens=None if cu_seqlens is None else like(cu_seqlens, bounds),
            kept_sequences=seqs,
            max_seqlen=max(lengths[: self.num_seqs], default=0),
            _num_tokens=len(self.ids),
            _all_sequences=cu_seqlens is None or len(seqs) == self.num_seqs,
            _holes=holes,
        )

    def _orphaned_breaks(self, stream: _Stream, state: bytearray, start: int, stop: int):
        """Break tokens between orphans, or between an orphan and the cut."""
        if self.breaks is None or not stream.positions:
            return
        inner_start, inner_stop = self.bounds(stream.seq)
        start, stop = max(start, inner_start), min(stop, inner_stop)
        for before, after in pairwise([start - 1, *stream.positions, stop]):
            if after - before < 2 or not self.only_breaks(before + 1, after):
                continue
            beside = [p for p in (before, after) if start <= p < stop]
            if all(state[p] == _ORPHAN for p in beside):
                yield from range(before + 1, after)

    def _drop_dangling(self, state: bytearray, survives: bytearray, start: int, stop: int) -> None:
        """Begin markers that no surviving placeholder follows, end markers that follow none."""
        markers = (self.vision_start_id, self.vision_end_id)
        if markers == (None, None):
            return
        left = [position for position in range(start, stop) if state[position] == _KEPT]
        beyond = len(self.ids)
        around = zip([beyond, *left], left, [*left[1:], beyond], strict=False)
        for before, position, after in around:
            begins, ends = (self.ids[position] == marker for marker in markers)
            if not begins and not ends:
                continue
            if not (begins and survives[after]) and not (ends and survives[before]):
                state[position] = _DANGLING


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
    sides = (
        [side] * row.num_seqs if side is None or isinstance(side, str) else as_list(side, "side")
    )
    if len(sides) != row.num_seqs:
        raise PackingError(f"side has {len(sides)} entries for {row.num_seqs} sequences")
    return sides


def _as_side(side) -> str:
    if not isinstance(side, str) or side not in _SIDES:
        raise PackingError(
            f"side is {side!r}, expected 'left' or 'right', the side that is cut off"
        )
    return side


def _align(row: _Row, stream: _Stream, start: int, stop: int, side: str | None) -> int:
    """The number of the first placeholder left, from all that the row says about boundaries.

    Candidates are the bits of one int, and every constraint is a shift and an AND, so that a row of
    many images costs words, not candidates times constraints.
    """
    if side is not None:
        _as_side(side)
    positions, total = stream.positions, stream.total
    left = len(positions)
    if left > total:
        raise _mismatch(stream)
    if not left:
        return 0
    gaps = [k for k in range(1, left) if positions[k] - positions[k - 1] > 1]
    breaks = [k for k in gaps if not row.only_breaks(positions[k - 1] + 1, positions[k])]
    if not row.only_breaks(start, positions[0]):
        breaks.append(0)
    if not row.only_breaks(positions[-1] + 1, stop):
        breaks.append(left)

    candidates = (1 << (total - left + 1)) - 1
    if side == "right":
        candidates = 1
    elif side == "left":
        candidates = 1 << (total - left)
    if candidates & (candidates - 1) == 0:  # one window: ask it, in time linear in the row
        first = candidates.bit_length() - 1
        if not _fits(stream, first, left, breaks, gaps):
            raise _mismatch(stream, positions, gaps, side)
        return first
    boundaries = _bits(stream.runs, total + 1)
    for offset in breaks:
        candidates &= boundaries >> offset
        if not candidates:
            raise _mismatch(stream, positions, gaps, side)

    # Runs of one image never adjoin: where they would, the candidate is wrong.
    inner = sorted(set(stream.runs) - set(stream.starts))
    if inner:
        adjoin = set(range(1, left)) - set(gaps)
        mirrored = _bits([left - offset for offset in adjoin], left)
        for boundary in inner:
            at = boundary - left
            candidates &= ~(mirrored << at if at >= 0 else mirrored >> -at)
        if not candidates:
            raise _mismatch(stream, positions, gaps, side)

    lowest = (candidates & -candidates).bit_length() - 1
    if candidates == 1 << lowest:
        return lowest
    # Two windows differ in what they keep, or in their orphans, unless neither keeps anything.
    keeps = _keeping(stream, left)
    if candidates & keeps:
        raise _ambiguous(stream, candidates, keeps)
    return lowest


def _fits(stream: _Stream, first: int, left: int, breaks: list[int], gaps: list[int]) -> bool:
    """Whether the ``left`` placeholders from number ``first`` on break where the row breaks."""
    runs = set(stream.runs)
    adjoin = set(range(1, left)) - set(gaps)
    inner = runs - set(stream.starts)
    return runs.issuperset(first + offset for offset in breaks) and adjoin.isdisjoint(
        boundary - first for boundary in inner
    )


def _bits(numbers, size: int) -> int:
    """An int with these bits set, in time linear in its size."""
    digits = bytearray(b"0") * (size + 1)
    for number in numbers:
        digits[size - number] = ord("1")
    return int(digits, 2)


def _keeping(stream: _Stream, left: int) -> int:
    """The windows of ``left`` placeholders that hold at least one whole image, as bits."""
    edges = [0] * (stream.total + 2)
    for start, stop in pairwise(stream.starts):
        if stop - start <= left:
            edges[max(0, stop - left)] += 1
            edges[start + 1] -= 1
    return _bits((a for a, depth in enumerate(accumulate(edges)) if depth), stream.total + 1)


def _mismatch(stream: _Stream, positions=None, gaps=(), side=None) -> PlaceholderMismatch:
    """The error for placeholders that cannot come from these images."""
    found, total = len(stream.positions), stream.total
    sizes = [stop - start for start, stop in pairwise(stream.starts)]
    message = (
        f"sequence {stream.seq}: {found} {stream.kind} placeholders ({stream.token}), but "
        f"tokens_per_{stream.kind} {shorten(sizes)} adds up to {total}"
    )
    if positions is not None:
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


def _ambiguous(stream: _Stream, candidates: int, keeps: int) -> AmbiguousTruncation:
    """The error for a row that several sets of images explain, with the first few of them."""
    found = []
    for some in (candidates & keeps, candidates & ~keeps):
        limit = _MAX_CANDIDATES if some & keeps else 1  # all that keep nothing are the same
        while some and limit and len(found) < _MAX_CANDIDATES:
            lowest = some & -some
            first = lowest.bit_length() - 1
            i, j = stream.survivors(first)
            found.append(
                {
                    f"kept_{stream.kind}s": list(
                        range(stream.first_item + i, stream.first_item + j)
                    ),
                    "orphan_positions": stream.orphans(first),
                }
            )
            some, limit = some ^ lowest, limit - 1
    sets = " or ".join(shorten(one[f"kept_{stream.kind}s"]) for one in found)
    error = AmbiguousTruncation(
        f"sequence {stream.seq}: what is left, {len(stream.positions)} {stream.kind} placeholders "
        f"({stream.token}) of {stream.total}, could be of {stream.kind}s {sets}; say which side "
        f"was cut, or cut with truncate"
    )
    error.candidates = found
    return error
