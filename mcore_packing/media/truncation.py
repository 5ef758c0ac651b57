"""Which images survive when a prompt is cut: placeholders vanish, pixel tensors do not."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch

from ..errors import AmbiguousTruncation, PlaceholderMismatch
from ..inputs import as_choice
from ..reference import IGNORE_INDEX
from ..space import SPACES
from . import kinds
from .families import Family, resolve
from .kinds import as_flag, as_ids, as_int, as_list, like, require, shorten

_KINDS = ("image", "video")
# What a batch says of its tokens themselves, never of the next one: keys, or ends of keys.
_OF_TOKENS = ("input_ids", "tokens", "attention_mask", "token_type_ids")
_NO_POSITIONS = (*_OF_TOKENS, "labels", "mask")
_MAX_CANDIDATES = 8  # an error that lists more helps nobody


@dataclass(frozen=True, eq=False)
class Truncation:
    """What is left of a row, and of everything that belongs to it.

    Positions are those of the row that was given, so tokens of a collapsed one; images (videos) are
    numbered through all of it.

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
        """Which entries of a pixel tensor stay: ``[start, stop)`` ranges, adjoining ones merged.

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
            values: a list, tensor or array with an entry per token, image, video or patch; or a
                dict.
            per: what the first dimension counts: "token", "image" or "video"; or "position" for
                position ids (in a dict known by name), which close up and start at 0 per sequence.
            rows: how many entries of ``values`` each image (each video) has, if not one each.
            shifted: entry ``t`` is about token ``t + 1``, as Megatron's labels; where that was
                removed from inside the row it becomes ``fill``. By default what the family says. In
                a dict this is so of all keys but ids, types, positions and ``attention_mask``.
            fill: by default -100, and 0 for keys with "mask" in them. Floats and unsigned ints,
                such as advantages and masks without a name, need it: 0.
            dim: the dimension of the tokens, where it is neither the first nor the second of
                ``[1, T]``: 1 for the position ids ``[3, T]`` of M-RoPE; -1 where a dict has both.

        Returns:
            What is left, of the same kind; None, and in a dict no key, where no image (no video) or
            no entry of one is left: vision encoders do not take none.

        Raises:
            PackingError: ``values`` has another length, holds no signed ints for -100, looks like
                M-RoPE's position ids, which a mere cut would leave with an offset, or is cut as
                position ids, but cannot be any: it is negative somewhere, or goes back.

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
                fits = by != "position" or not str(key).endswith(_NO_POSITIONS)
                require(fits, f'{key} are no position ids; leave per="position" out')
                zero = 0 if fill is None and "mask" in str(key) else fill
                next_one = shifted and not str(key).endswith(_OF_TOKENS)
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
        require(found == expected, f"values have {found} entries, but {per}s {expected}")
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
            self._check_positions(values)
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

    def _check_positions(self, values) -> None:
        """Refuse what no position ids are, such as labels, which would be renumbered as if."""
        rows = _on_host(values)
        advice = 'which position ids never do; leave per="position" out for all else'
        if rows.size:
            require(rows.min() >= 0, f"values hold {rows.min()}, {advice}")
        if rows.size != self._starts[-1]:
            return  # M-RoPE's go back inside of a video
        row = rows.reshape(-1)
        back = np.flatnonzero(np.diff(row) < 0) + 1
        back = back[row[back] > 1]  # 0 begins a sequence, and padding is 0 or 1
        back = np.setdiff1d(back, self._starts)
        if len(back):
            found = f"values go back from {row[back[0] - 1]} to {row[back[0]]} at token {back[0]}"
            require(False, f"{found}, {advice}")

    def _offsets(self, values, dim: int) -> list[int]:
        """By how much each position that stays moves forward, from all that was removed before."""
        rows = _on_host(values)
        at = rows.min(axis=(*range(dim), *range(dim + 1, rows.ndim)))
        kept, offsets = np.array(self.keep_positions, dtype=np.int64), []
        sequences = np.split(kept, np.searchsorted(kept, self._starts[1:-1]))
        for start, mine in zip(self._starts, sequences, strict=False):
            if len(mine):
                moved = np.cumsum(at[mine] - at[np.concatenate(([start], mine[:-1] + 1))])
                offsets += (moved + (at[mine] - moved).min()).tolist()
        return offsets


def _on_host(values) -> np.ndarray:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values, dtype=np.int64)


def truncate(
    input_ids: Any,
    tokens_per_image: Any,
    max_length: int | Sequence[int],
    image_token_id: int | None = None,
    *,
    space: str = "expanded",
    side: str | Sequence[str] = "right",
    family: str | Family | None = None,
    tokens_per_video: Any = None,
    cu_seqlens: Any = None,
    **overrides: Any,
) -> Truncation:
    """Cut a row to a length, and drop every image that the cut went through.

    An image whose placeholders all stay is kept, though the cut may have taken its begin marker.

    Args:
        input_ids: the whole row ``[T]`` or ``[1, T]``, one placeholder per image embedding, or per
            image, as ``space`` says.
        tokens_per_image: how many placeholders each image has, in order; the list of its runs
            where they stand in several (runs that adjoin are one): ``[[20, 20]]`` for two frames of
            a video. For a packed row flat ints, or one list per sequence, with runs one level
            deeper: ``[[[2, 2]], [[2, 2]]]``. Of a collapsed row, how many positions each
            placeholder becomes.
        max_length: how many positions may stay, of the row; or a list, of each sequence.
        space: "expanded", or "collapsed" where each image, and each video, is one placeholder, as
            ``mp.data.pack`` takes it for ``LLaVAModel``; then ``cu_seqlens`` count tokens too.
        side: the side that is cut off: "right" or "left"; one per sequence if ``max_length`` is.
        family: a registered family, or a ``Family``: its placeholders, markers and break tokens.
        tokens_per_video: the same for videos, which stay or go whole, with their timestamps.
        cu_seqlens: ``[B + 1]``, boundaries of a packed row; tokens past the last one stay last.
        image_token_id, **overrides: instead of what the family says, these attributes of
            ``Family``: its ids, ``drop_dangling``, ``shifted``. Or instead of both placeholders
            ``mm_token_type_ids`` ``[T]``: 1 for what stands for images, 2 for videos, else 0.

    Raises:
        PlaceholderMismatch: the row does not have these placeholders, in number or in order.
        PackingError: an argument makes no sense, a marker or break token is a placeholder, or
            markers stand around placeholders of which nothing was said.

    Example:
        >>> row = [1, 7, 9, 9, 8, 2, 7, 9, 9, 9, 8, 3]
        >>> cut = truncate(row, [2, 3], 9, 9, vision_start_id=7, vision_end_id=8)
        >>> cut.output_ids, cut.kept_images
        ([1, 7, 9, 9, 8, 2], [0])
        >>> truncate([1, 9, 9, 2], [2, 3], 5, 9, space="collapsed").output_ids
        [1, 9]
    """
    row = _Row(input_ids, image_token_id, family, cu_seqlens, overrides)
    counts = tokens_per_image, tokens_per_video
    if as_choice(space, "space", SPACES) == "collapsed":
        counts = row.lengthen(counts)
    streams = row.streams(*counts)
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


def collapse(
    input_ids: Any,
    tokens_per_image: Sequence[int],
    image_token_id: int | None = None,
    *,
    family: str | Family | None = None,
) -> list[int]:
    """Which tokens of a row stay where each image becomes one placeholder, its first.

    For ids that a processor expanded, and a model that expands them itself. Images that adjoin stay
    as many.

    Args:
        input_ids: ``[T]`` or ``[1, T]``, one placeholder per image embedding.
        tokens_per_image: how many each image has, in order.
        image_token_id: the placeholder; by default that of ``family``.

    Returns:
        Where they stand: ``[ids[at] for at in kept]``, or ``ids[kept]`` of a tensor; labels and
        masks of the row likewise.

    Raises:
        PlaceholderMismatch: the row does not have these placeholders.

    Example:
        >>> collapse([1, 9, 9, 9, 9, 9, 2], [2, 3], 9)
        [0, 1, 3, 6]
    """
    row = _Row(input_ids, image_token_id, family, None, {})
    counts = as_ids(tokens_per_image, "tokens_per_image", 1)
    [stream], _ = row.streams(counts, None)
    keep = np.ones(len(row.ids), dtype=bool)
    keep[stream.positions] = False
    keep[stream.positions[stream.starts[:-1]]] = True
    return np.flatnonzero(keep).tolist()


# How a cut is explained: `_Row` reads what each token is, `_Stream` finds which placeholders of
# which images are left (`align`) and so which images are whole (`cut_to`), `_Removal` finds what
# goes with the others, and `_Row.result` takes it out.
#
# The role of a token is one character that says what it is. A row of roles is a picture in which
# patterns can be matched: "..(i)..<.(v).(v)>." has an image, and a video of two frames with text
# before each.
_TEXT, _BREAK = ".b"
_BEGIN, _END, _BEGIN_AND_END = "()|"  # the markers of an image, or of a frame
_VIDEO_BEGIN, _VIDEO_END = "<>"  # those of a whole video
_PLACEHOLDERS = {"image": "i", "video": "v"}
_LOST_IMAGE, _LOST_VIDEO = "IV"  # placeholders; an image of several runs is lost as a video is
_NEVER, _SETTLED = "-x"  # what no token is, and what has been dealt with

# What belongs to one run of placeholders: of a whole image, or of a lost one.
_BLOCK = re.compile(
    r"""(?: [(|] (?: [.b]*b )?    # its begin marker, which may be long: text up to a break (Kimi)
        | (?<!b)b+ )?             # or all the breaks in front of it
        [iv]+ (?: b+[iv]+ )*      # its placeholders, and the breaks between them
        (?: b*[)|] )?             # its end marker
    | (?P<lost>
        (?: [(|] (?: [.b]*(?=b) )? | (?<!b) )
        b*[IV]+ (?: b+[IV]+ )*b*  # the breaks behind them go too
        (?: [)] | [|](?!b*[iv]) )?  # not the marker that opens the whole image behind it
    )""",
    re.VERBOSE,
)


def _in_pieces(roles: np.ndarray, spans: list) -> Iterator[tuple[str, list[int]]]:
    """Each span as a picture in which a run of text, or of placeholders, is one piece.

    Beside it is where each piece begins, and the last one ends: what walks through pieces need not
    walk through tokens.
    """
    begins = np.ones(len(roles) + 1, dtype=bool)
    begins[1:-1] = (roles[1:] != roles[:-1]) | ~np.isin(roles[1:], [*b".ivIV"])
    begins[[*chain(*spans)]] = True
    edges = np.flatnonzero(begins)
    picture, edges = roles[edges[:-1]].tobytes().decode(), edges.tolist()
    for start, stop in spans:
        first, last = bisect_left(edges, start), bisect_left(edges, stop)
        yield picture[first:last], edges[first : last + 1]


class _Stream:
    """The placeholders of one modality in one sequence, and the images (videos) they are for.

    ``items`` are the runs of each image, ``first_item`` is the number of the first in the whole
    row, and ``starts`` are the numbers of their first placeholders. What the row has of these is
    at ``positions``, beginning with number ``first``; ``cut`` says at which ends some are missing.
    If ``unsure``, several windows fit that keep nothing, and ``first`` and ``cut`` are a guess.
    What is left of each image lies between two ``edges`` in ``positions``. The images that stay are
    ``kept``, the others ``lost``.
    """

    def __init__(self, kind: str, name: str, positions: np.ndarray, first_item: int, items: list):
        self.kind, self.name, self.positions = kind, name, positions
        self.first_item, self.items = first_item, items
        self.starts = [0, *accumulate(map(sum, items))]

    def survivors(self, first: int, count: int) -> range:
        """The images that lie wholly in the window of ``count`` placeholders from ``first``."""
        return range(bisect_left(self.starts, first), bisect_right(self.starts, first + count) - 1)

    def align(self, picture: str, piece_edges: list[int], side: str | None, whole: bool) -> None:
        """Find the number of the first placeholder left, from what the row says of boundaries."""
        runs, breaks = self._boundaries(picture, piece_edges)
        left, missing = len(self.positions), self.starts[-1] - len(self.positions)
        candidates = range(0 if whole and missing else missing + 1)
        if side is not None:
            candidates = candidates[-1:] if side == "left" else candidates[:1]
        keepers, others = [], []
        for first in self._fitting(candidates, runs, breaks):
            (keepers if self.survivors(first, left) else others).append(first)
            if len(keepers) == _MAX_CANDIDATES:
                break
        if not keepers and not others:
            raise self._mismatch(runs, side, whole)
        # Two windows differ in what they keep, or in their orphans, unless neither keeps anything.
        if keepers and len(keepers) + len(others) > 1:
            raise self._ambiguous((keepers + others[:1])[:_MAX_CANDIDATES])
        self.first, self.unsure = (keepers or others)[0], len(others) > 1
        self.cut = self.unsure or self.first > 0, self.unsure or self.first < missing
        self.edges = [min(max(0, start - self.first), left) for start in self.starts]

    def _boundaries(self, picture: str, piece_edges: list[int]) -> tuple[list[int], list[int]]:
        """How long each run is, and how many placeholders stand before each boundary.

        Breaks alone are none: they stand inside an image.
        """
        mine, pieces = _PLACEHOLDERS[self.kind], zip(picture, pairwise(piece_edges), strict=True)
        runs = [stop - start for role, (start, stop) in pieces if role == mine]
        around = zip(accumulate(runs, initial=0), picture.split(mine), strict=True)
        return runs, [before for before, between in around if between.strip(_BREAK)]

    def _fitting(self, candidates: range, runs: list[int], breaks: list[int]) -> Iterator[int]:
        """Those with which each boundary is between two runs, as are any two runs of an image."""
        edges, apart = {0, *accumulate(chain(*self.items))}, {0, *accumulate(runs)}
        inner = sorted(edges - set(self.starts))  # runs of one image never adjoin
        if breaks and candidates[1:]:
            at_edge = (edge - breaks[0] for edge in sorted(edges))
            candidates = [first for first in at_edge if first in candidates]
        for first in candidates:
            last = first + len(self.positions)
            inside = inner[bisect_right(inner, first) : bisect_left(inner, last)]
            at_edges = all(first + k in edges for k in breaks)
            if at_edges and all(edge - first in apart for edge in inside):
                yield first

    def _mismatch(self, runs: list[int], side: str | None, whole: bool) -> PlaceholderMismatch:
        """The error for a row that no window of the images explains."""
        left, total = len(self.positions), self.starts[-1]
        counts = f"tokens_per_{self.kind} {shorten([sum(item) for item in self.items])}"
        found = f"{self.name}, but {counts} adds up to {total}, and runs of {shorten(runs)}"
        cut = f" after a cut on the {side}" if side else ""
        advice = "give every image of the uncut row" if whole else "check the side"
        message = f"{found} are no part of them{cut}; {advice}, and break_token_ids"
        return PlaceholderMismatch(message, actual=total, expected=left)

    def _ambiguous(self, candidates: list[int]) -> AmbiguousTruncation:
        """The error for a row that several sets of images explain, with the first few of them."""
        sets, found, positions = [], [], self.positions.tolist()
        for first in candidates:
            stay = self.survivors(first, len(positions))
            whole = range(self.starts[stay.start], self.starts[stay.stop])
            orphans = [p for k, p in enumerate(positions, first) if k not in whole]
            sets.append([self.first_item + item for item in stay])
            found.append({f"kept_{self.kind}s": sets[-1], "orphan_positions": orphans})
        could = f"{self.name} could be of {self.kind}s {' or '.join(map(shorten, sets))}"
        error = AmbiguousTruncation(f"{could}; say which side was cut, or cut with truncate")
        error.candidates = found
        return error

    def cut_to(self, start: int, stop: int) -> None:
        """Find the images that lie wholly in a window of the row, and those that do not."""
        low, high = (bisect_left(self.positions, edge) for edge in (start, stop))
        self.kept = self.survivors(self.first + low, high - low)
        self.lost = [item for item in range(len(self.items)) if item not in self.kept]

    def mark_lost(self, roles: np.ndarray) -> None:
        """Give the placeholders of lost images and videos roles of their own."""
        new = [ord(_PLACEHOLDERS[self.kind])] * len(self.items)
        for item in self.lost:
            video = self.kind == "video" or len(self.items[item]) > 1
            new[item] = ord(_LOST_VIDEO if video else _LOST_IMAGE)
        roles[self.positions] = np.repeat(np.array(new, dtype=np.uint8), np.diff(self.edges))


class _Row:
    """What each token of a row is, and where its sequences, and behind them its tail, begin."""

    def __init__(self, input_ids, image_token_id, family, cu_seqlens, overrides):
        types = overrides.pop("mm_token_type_ids", None)
        if image_token_id is not None:
            overrides["image_token_id"] = image_token_id
        self.family = one = resolve(family, overrides, ("drop_dangling", "shifted"))
        self.named = family is not None  # then text between the runs of a video is its own
        self.ids = marks = kinds.as_id_array(input_ids, "input_ids")
        size, by = len(marks), "id"
        known = {one.image_token_id: "image", one.video_token_id: "video"}
        if types is not None:
            told = overrides.get("image_token_id"), overrides.get("video_token_id")
            given = "mm_token_type_ids say where images are; leave out, or pass image_token_id=None"
            require(told == (None, None), given)
            marks = kinds.as_id_array(types, "mm_token_type_ids")
            known, by = {1: "image", 2: "video"}, "type"
            found = f"mm_token_type_ids has {len(marks)} entries, but the row {size} tokens"
            require(len(marks) == size, found)
        both = f"image_token_id and video_token_id are both {one.image_token_id}"
        require(len(known) == 2 or None in known, f"{both}; count all of them as images")
        self.tokens = {kind: f"{by} {mark}" for mark, kind in known.items() if mark is not None}
        bounds = kinds.as_boundaries(cu_seqlens, size)
        self.num_seqs, self.packed = len(bounds) - 1, cu_seqlens is not None
        self.starts = kinds.with_tail(bounds, size)
        self.edges = range(size + 1)  # where each token begins, in positions
        self.spans = [self._unpadded(start, stop) for start, stop in pairwise(self.starts)]
        self._read_roles(marks, known)
        self._refuse_two_roles(known, types is not None)
        if self.family.drop_dangling and "video" not in self.tokens:
            self._refuse_unknown_media()

    def _unpadded(self, start: int, stop: int) -> tuple[int, int]:
        """A sequence without the padding at its ends."""
        pad = self.family.pad_token_id
        if pad is None:
            return start, stop
        real = start + np.flatnonzero(self.ids[start:stop] != pad)
        return (int(real[0]), int(real[-1]) + 1) if len(real) else (stop, stop)

    def _read_roles(self, marks: np.ndarray, known: dict) -> None:
        """Say of each token what it is, and what a whole video of such tokens looks like."""
        one = self.family
        begin, end = one.vision_start_id, one.vision_end_id
        first = begin if one.video_start_id is None else one.video_start_id
        last = end if one.video_end_id is None else one.video_end_id
        self.markers = {"vision_start_id": begin, "vision_end_id": end}
        self.markers |= {"video_start_id": first, "video_end_id": last}
        role_of = {first: _VIDEO_BEGIN, last: _VIDEO_END, begin: _BEGIN}
        role_of |= {end: _BEGIN_AND_END if begin == end else _END}
        role_of |= dict.fromkeys(one.break_token_ids, _BREAK) | {None: _NEVER}
        told = [(self.ids, token, role) for token, role in role_of.items()]
        told += [(marks, mark, _PLACEHOLDERS[kind]) for mark, kind in known.items()]
        self.roles = np.full(len(self.ids), ord(_TEXT), dtype=np.uint8)
        for values, value, role in told:
            if value is not None:  # a comparison with None would be one of objects
                self.roles[values == value] = ord(role)
        # From one outer marker, or the edge of the row, to the other; those around its frames may
        # be outer markers too.
        opens, closes = role_of[first], role_of[last]
        self.clips = re.compile(
            rf"(?P<open>[{opens}]|^)[.b]*(?P<clip>V[V.b]*)?(?P<close>[{closes}]|$)"
        )

    def _refuse_two_roles(self, known: dict, by_type: bool) -> None:
        """A marker, break or padding that is a placeholder would go although its image stays."""
        placeholders, said = known, ""
        if by_type:
            placeholders = self.ids[np.isin(self.roles, [*b"iv"])]
            said = ", says mm_token_type_ids; set it to 0 at markers and breaks"
        others = self.markers | {"pad_token_id": self.family.pad_token_id}
        breaks = [("break_token_ids", token) for token in self.family.break_token_ids]
        for name, token in [*others.items(), *breaks]:
            free = token is None or token not in placeholders
            require(free, f"{name}: {token} is a placeholder{said}")

    def _refuse_unknown_media(self) -> None:
        """Markers around one token, repeated, mark an image or video of which nothing was said."""
        if None in (self.family.vision_start_id, self.family.vision_end_id):
            return
        [(picture, edges)] = _in_pieces(self.roles, [(0, len(self.roles))])
        for m in re.finditer(r"(?<=[(|])[.](?=[)|])", picture):
            start, stop = edges[m.start()], edges[m.end()]
            token, *others = {*self.ids[start:stop].tolist()}
            found = f"position {start - 1}: markers stand around {stop - start} tokens of id "
            fits = others or stop - start == 1
            require(fits, f"{found}{token}; for a video pass video_token_id, or its family")

    def lengthen(self, counts: Sequence) -> list:
        """Make every placeholder as long as the image that it stands for; what is left to count of
        each image is one placeholder."""
        lengths, left = np.ones(len(self.ids), dtype=np.int64), []
        for kind, spec in zip(_KINDS, counts, strict=True):
            name, read = f"tokens_per_{kind}", as_list if self.packed else kinds.as_row
            entries = [] if spec is None else read(spec, name)
            each = self.packed and any(e is None or kinds.nested(e) for e in entries)
            lists = [[] if e is None else e for e in entries] if each else [entries]
            given = [as_ids(one, name, 1) for one in lists]
            positions = [*chain(*given)]
            places = np.flatnonzero(self.roles == ord(_PLACEHOLDERS[kind]))
            if len(places) != len(positions):
                token = self.tokens.get(kind)
                found = f"{len(places)} {kind} placeholders ({token}), but {name} has"
                message = f"{found} {len(positions)} entries; a collapsed row has one for each"
                raise PlaceholderMismatch(message, actual=len(positions), expected=len(places))
            lengths[places] = positions
            ones = [[1] * len(one) for one in given]
            left.append(ones if each else ones[0])
        self.edges = [0, *lengths.cumsum().tolist()]
        return left

    def streams(self, tokens_per_image, tokens_per_video, sides=None) -> list[list[_Stream]]:
        """The images, and the videos, of every sequence; all of them where no side was cut."""
        streams, whole = [], sides is None
        spans = np.array(self.spans, dtype=np.int64).reshape(-1, 2)
        for kind, spec in zip(_KINDS, (tokens_per_image, tokens_per_video), strict=True):
            places = np.flatnonzero(self.roles == ord(_PLACEHOLDERS[kind]))
            parts = np.searchsorted(places, spans).tolist()
            counts = [last - first for first, last in parts]
            if tail := sum(counts[self.num_seqs :]):
                past = f"past the last boundary at {self.starts[-2]}, in no sequence"
                message = f"{tail} {kind} placeholders lie {past}"
                raise PlaceholderMismatch(message, actual=0, expected=tail)
            items = self._items(spec, kind, counts[: self.num_seqs], whole)
            items += [[]] * (len(counts) - len(items))  # of the tail
            streams.append([])
            firsts, token = accumulate(map(len, items), initial=0), self.tokens.get(kind)
            for seq, (part, first, mine) in enumerate(zip(parts, firsts, items, strict=False)):
                name = f"sequence {seq}: {counts[seq]} {kind} placeholders ({token})"
                streams[-1].append(_Stream(kind, name, places[slice(*part)], first, mine))
        for of_kind in streams:
            pieces = _in_pieces(self.roles, self.spans)
            for seq, (stream, one) in enumerate(zip(of_kind, pieces, strict=True)):
                stream.align(*one, None if whole else sides[seq], whole)
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
        edges, roles = np.array([*windows], dtype=np.int64).reshape(-1, 2), self.roles.copy()
        inside = np.zeros(len(roles), dtype=bool)
        for (start, stop), *both in zip(edges.tolist(), *streams, strict=True):
            inside[start:stop] = True
            for stream in both:
                stream.cut_to(start, stop)
                if stream.lost:
                    stream.mark_lost(roles)
                for fate, items in (("kept", stream.kept), ("dropped", stream.lost)):
                    media[f"{fate}_{stream.kind}s"] += [stream.first_item + item for item in items]
        gone = inside & self._gone(streams, roles)
        orphans = gone & np.isin(roles, [*b"bIV"])
        gone = gone if self.family.drop_dangling else orphans
        keep = np.flatnonzero(inside & ~gone)
        before, behind = np.searchsorted(keep, edges.T)
        lengths = (behind - before).tolist()
        seqs = [seq for seq in range(self.num_seqs) if lengths[seq]]
        bounds = [0, *accumulate(lengths[seq] for seq in seqs)]
        positions = np.arange(len(keep)) - np.repeat(before, behind - before)
        hole_next = np.append(gone, False)
        hole_next[edges[:, 0]] = False  # what begins a window follows nothing in it
        return Truncation(
            output_ids=kinds.like_ids(input_ids, self.ids[keep]),
            keep_positions=keep.tolist(),
            orphan_positions=np.flatnonzero(orphans).tolist(),
            position_ids=like(input_ids, positions, torch.int64),
            cu_seqlens=None if cu_seqlens is None else like(cu_seqlens, bounds),
            kept_sequences=seqs,
            max_seqlen=max(lengths[: self.num_seqs], default=0),
            _starts=self.starts,
            _all_sequences=not self.packed or len(seqs) == self.num_seqs,
            _holes=np.flatnonzero(hole_next[keep + 1]).tolist(),
            _shifted=self.family.shifted,
            **media,
        )

    def _gone(self, streams: list[list[_Stream]], roles: np.ndarray) -> np.ndarray:
        """Which tokens belong to lost images and videos, whose placeholders have roles by now."""
        gone = np.zeros(len(roles), dtype=bool)
        if any(stream.lost for stream in chain(*streams)):
            for pieces, *both in zip(_in_pieces(roles, self.spans), *streams, strict=True):
                if any(stream.lost for stream in both):
                    lost, whole = _Removal(self, *both, *pieces).spans()
                    for goes, spans in ((True, lost), (False, whole)):
                        for start, stop in spans:
                            gone[start:stop] = goes
        return gone


class _Removal:
    """What leaves a sequence with its lost images and videos.

    ``cut`` says at which ends of the sequence something is missing, ``sure`` where that is no
    guess. Spans are ``[first, last)`` of its pieces, or ``[start, stop)`` of the row.
    """

    def __init__(self, row: _Row, images: _Stream, videos: _Stream, picture: str, edges: list[int]):
        self.row, self.videos, self.both = row, videos, (images, videos)
        self.picture, self.edges = picture, edges
        self.cut = [any(ends) for ends in zip(images.cut, videos.cut, strict=True)]
        self.sure = [any(one.cut[end] and not one.unsure for one in self.both) for end in (0, 1)]
        self.several = any(len(one.items[item]) > 1 for one in self.both for item in one.lost)
        self.outer = row.family.video_start_id is not None  # markers that only a video has

    def spans(self) -> tuple[list, list]:
        """What goes, and what does not though it is inside: a whole image between two frames."""
        lost, whole, rest = self._blocks()
        low, high = self._without_ends(rest)
        lost += [(0, low), (high, len(rest)), *self._whole_videos(rest, low, high)]
        gone, stays = ([[self.edges[p] for p in span] for span in some] for some in (lost, whole))
        return [*gone, *chain(*map(self._between_runs, self.both))], stays

    def _blocks(self) -> tuple[list, list, str]:
        """Lost blocks, whole ones, and the picture with nothing but lost videos left of either."""
        lost, whole = [], []

        def settle(m: re.Match) -> str:
            (lost if m["lost"] else whole).append(m.span())
            return (_LOST_VIDEO if _LOST_VIDEO in m[0] else _SETTLED) * len(m[0])

        return lost, whole, _BLOCK.sub(settle, self.picture)

    def _without_ends(self, rest: str) -> tuple[int, int]:
        """The pieces but for what a cut has left at an edge of images without any placeholder."""
        low = len(rest) - len(rest.lstrip(")|>b")) if self.cut[0] else 0
        return low, max(low, len(rest.rstrip("(|<b"))) if self.cut[1] else len(rest)

    def _whole_videos(self, rest: str, low: int, high: int) -> Iterator[tuple[int, int]]:
        """From one outer marker of lost videos to the other; on a guess these, but never text."""
        for m in self.row.clips.finditer(rest[low:high]):
            opens, closes, spans = bool(m["open"]), bool(m["close"]), []
            if self._is_lost(m, opens, closes):
                sure = (opens or self.sure[0]) and (closes or self.sure[1])
                spans = [m.span()] if sure else [m.span("open"), m.span("close")]
            elif m["clip"] and self.outer and not opens and self.sure[0]:
                # Its last marker alone was cut off.
                spans = [(m.start(), m.start("clip") + m["clip"].rindex(_LOST_VIDEO) + 1)]
            yield from ((low + first, low + last) for first, last in spans)

    def _is_lost(self, m: re.Match, opens: bool, closes: bool) -> bool:
        """Whether that is a lost video, or what is left of one at an edge that was cut."""
        if not (opens or closes) or not (opens or self.cut[0]) or not (closes or self.cut[1]):
            return False
        if m["clip"]:
            return closes or self.outer or self.several
        if closes:  # no frame is left: only from the edge to a marker that no image has
            return not opens and m["close"] == _VIDEO_END
        return self._has_begun()

    def _has_begun(self) -> bool:
        """Whether text before the right edge may be that of a frame, or of a long marker."""
        videos, family = self.videos, self.row.family
        behind = videos.survivors(videos.first, len(videos.positions)).stop
        cut = videos.cut[1] and (self.outer or len(videos.items[behind]) > 1)
        return cut or bool(self.row.named and family.break_token_ids)

    def _between_runs(self, stream: _Stream) -> Iterator[tuple[int, int]]:
        """From the first run of each lost video to its last: the labels between them are its own.

        They reach to the edge where it was cut through. That text is labels is known of named
        families alone, and whose they are is not where several videos might have been here.
        """
        known, end = not stream.unsure, stream.first + len(stream.positions)
        if self.row.named and (known or len(stream.items) == 1):
            for item in stream.lost:
                low, high = stream.edges[item : item + 2]
                if len(stream.items[item]) > 1 and low < high:
                    begun = known and stream.starts[item] < stream.first
                    goes_on = known and stream.starts[item + 1] > end
                    start, stop = stream.positions[low], stream.positions[high - 1]
                    yield self.edges[0] if begun else start, self.edges[-1] if goes_on else stop


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
    windows = _windows_of_positions(row, max_length, sides)
    inside = ((bisect_left(row.edges, a), bisect_right(row.edges, b) - 1) for a, b in windows)
    return [(start, max(start, stop)) for start, stop in inside]  # whole tokens


def _windows_of_positions(row: _Row, max_length, sides: list) -> list[tuple[int, int]]:
    starts = [row.edges[start] for start in row.starts]
    if not kinds.nested(max_length):
        limit = min(as_int(max_length, "max_length", minimum=0), starts[-1])
        require(len({*sides[:-1]}) < 2, "side differs, but max_length is one, of the whole row")
        first = 0 if sides[0] == "right" else starts[-1] - limit
        return list(pairwise(min(max(first, edge), first + limit) for edge in starts))
    limits, seqs = as_ids(max_length, "max_length", minimum=0), list(pairwise(starts))
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
