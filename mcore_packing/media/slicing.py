"""Which rows of which tensor belong to which samples."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .families import LAYOUT_WORDS, Family, get_family
from .kinds import as_counts, as_ids, as_int, as_list, length, nested, require, shorten, take_spans


def split_samples(
    batch: Mapping[str, Any],
    layout: Mapping[str, str] | str | Family | None,
    num_images: Sequence[int] | None,
    chunks: Sequence[Sequence[int]] | int,
    *,
    family: str | Family | None = None,
    tiles_per_image: Sequence[int] | None = None,
    num_videos: Sequence[int] | None = None,
    frames_per_video: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Cut a batch of samples into chunks of samples, every tensor at its own rows.

    Rows are counted by what ``layout`` says, never guessed from a shape, and all first dimensions
    are checked before anything is cut.

    Args:
        batch: tensors, arrays or lists by name; None counts as absent.
        layout: for every key what its first dimension counts, in words of ``Family.layout``, or a
            family. An image has as many of ``patch`` as the product of its row in
            ``image_grid_thw`` (or ``image_grid_hw``), a video of ``video_patch`` likewise.
        num_images: how many images each sample has; None where there are only videos.
        chunks: ``[start, stop)`` of the samples of each chunk, also as a ``range``, in any order;
            an int is the number of samples in each chunk, of which the last may have fewer.
        family: in place of ``layout``, which is None then.
        tiles_per_image: how many tiles each image has, where a key counts tiles.
        num_videos: how many videos each sample has, where there are any.
        frames_per_video: how many frames each video has, where a key counts them.

    Returns:
        One dict for each chunk: views of its rows, where the kind allows. A key that counts images
        (or videos, tiles, patches, frames) is absent where a chunk has none: vision encoders do not
        take zero rows.

    Raises:
        PackingError: a key is not in the layout, or has another first dimension than its samples
            add up to; what it counts by is missing; a chunk lies outside the batch.

    Example:
        >>> batch = {"input_ids": [[5], [6], [7]], "pixel_values": ["a", "b", "c"]}
        >>> layout = {"input_ids": "sample", "pixel_values": "image"}
        >>> split_samples(batch, layout, [2, 0, 1], [(0, 1), (1, 2), (2, 3)])[0]
        {'input_ids': [[5]], 'pixel_values': ['a', 'b']}
        >>> split_samples(batch, layout, [2, 0, 1], 2)[1]
        {'input_ids': [[7]], 'pixel_values': ['c']}
    """
    layout = family if layout is None and family is not None else layout
    rows = _Rows(batch, layout, num_images, tiles_per_image, num_videos, frames_per_video)
    if not nested(chunks):
        size = as_int(chunks, "chunks", minimum=1)
        starts = range(0, rows.num_samples, size)
        chunks = [(start, min(start + size, rows.num_samples)) for start in starts]
    checked = []
    for i, chunk in enumerate(as_list(chunks, "chunks")):
        bounds = _as_bounds(chunk, f"chunks[{i}]")
        require(
            len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= rows.num_samples,
            f"chunks[{i}] is {bounds}, expected [start, stop) of {rows.num_samples} samples",
        )
        checked.append(range(*bounds))
    return [rows.of(samples) for samples in checked]


def take_samples(
    batch: Mapping[str, Any],
    layout: Mapping[str, str] | str | Family | None,
    num_images: Sequence[int] | None,
    order: Sequence[int],
    *,
    family: str | Family | None = None,
    tiles_per_image: Sequence[int] | None = None,
    num_videos: Sequence[int] | None = None,
    frames_per_video: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Gather samples of a batch in any order, with repetition, and all their rows with them.

    Inside a sample the order of its images, and of their rows, stays as it is.

    Args:
        batch, layout, num_images: as for ``split_samples``.
        order: the samples to take.
        family, tiles_per_image, num_videos, frames_per_video: as for ``split_samples``.

    Returns:
        A batch of ``len(order)`` samples; a key that counts images is absent where they have none.

    Raises:
        PackingError: as for ``split_samples``, or a sample in ``order`` does not exist.

    Example:
        >>> batch = {"input_ids": [[5], [6]], "pixel_values": ["a", "b", "c"]}
        >>> layout = {"input_ids": "sample", "pixel_values": "image"}
        >>> take_samples(batch, layout, [2, 1], [1, 0, 1])
        {'input_ids': [[6], [5], [6]], 'pixel_values': ['c', 'a', 'b', 'c']}
    """
    layout = family if layout is None and family is not None else layout
    rows = _Rows(batch, layout, num_images, tiles_per_image, num_videos, frames_per_video)
    samples = as_ids(order, "order")
    for i, sample in enumerate(samples):
        last = rows.num_samples - 1
        require(0 <= sample <= last, f"order[{i}] is {sample}, expected a sample from 0 to {last}")
    return rows.of(samples)


def _as_bounds(chunk, name: str) -> list[int]:
    if not isinstance(chunk, range):
        return as_ids(chunk, name)
    require(chunk.step == 1, f"{name} is {chunk}, expected a step of 1")
    return [chunk.start, chunk.stop]


class _Rows:
    """Where the rows of each sample begin in each tensor of a batch."""

    def __init__(self, batch, layout, num_images, tiles_per_image, num_videos, frames_per_video):
        kind = type(batch).__name__
        require(hasattr(batch, "items"), f"batch is a {kind}, expected tensors by name")
        self.batch = {key: value for key, value in batch.items() if value is not None}
        layout = get_family(layout).layout if isinstance(layout, (str, Family)) else layout
        kind = type(layout).__name__
        require(isinstance(layout, Mapping), f"layout is a {kind}, expected a dict or a family")
        self.words = {key: layout.get(key) for key in self.batch}
        for key, word in self.words.items():
            found = "is not in the layout" if word is None else f"is laid out by {word!r}"
            require(
                word in LAYOUT_WORDS,
                f"{key} {found}; say what its first dimension counts, one of "
                f"{', '.join(LAYOUT_WORDS)}",
            )
        self.given = {"tiles_per_image": tiles_per_image, "frames_per_video": frames_per_video}
        require(
            num_images is not None or num_videos is not None,
            "num_images is None, expected the number of images of each sample",
        )
        images = None if num_images is None else as_counts(num_images, "num_images")
        videos = None if num_videos is None else as_counts(num_videos, "num_videos")
        images = [0] * len(videos) if images is None else images
        forgotten = [k for k, w in self.words.items() if "video" in w and length(self.batch[k], k)]
        require(
            videos is not None or not forgotten,
            f"{', '.join(forgotten)} counts videos; pass num_videos",
        )
        videos = [0] * len(images) if videos is None else videos
        require(
            len(images) == len(videos),
            f"num_images has {len(images)} entries and num_videos {len(videos)}; both have one for "
            f"each sample",
        )
        self.items, self.num_samples = {"image": images, "video": videos}, len(images)
        self.starts = {word: [0, *accumulate(self._count(word))] for word in self.words.values()}
        for key, word in self.words.items():
            found, expected = length(self.batch[key], key), self.starts[word][-1]
            require(
                found == expected,
                f"{key} has {found} rows in its first dimension, but {self.num_samples} samples "
                f"have {expected} of what it counts ({word})",
            )

    def of(self, samples: Sequence[int]) -> dict[str, Any]:
        """The rows of these samples, in their order."""
        parts = {}
        for key, word in self.words.items():
            starts = self.starts[word]
            spans = [(starts[sample], starts[sample + 1]) for sample in samples]
            if word == "sample" or any(start < stop for start, stop in spans):
                parts[key] = take_spans(self.batch[key], spans)
        return parts

    def _count(self, word: str) -> list[int]:
        """How many of ``word`` each sample has."""
        if word == "sample":
            return [1] * self.num_samples
        if word == "nonempty_sample":
            return [int(number > 0) for number in self.items["image"]]
        if word in self.items:
            return self.items[word]
        item = "video" if "video" in word else "image"
        per_sample = self.items[item]
        name, rows = self._rows(word, item, any(per_sample))
        require(
            len(rows) == sum(per_sample),
            f"{name} has {len(rows)} entries, but num_{item}s {shorten(per_sample)} adds up to "
            f"{sum(per_sample)}",
        )
        starts, bounds = [0, *accumulate(rows)], [0, *accumulate(per_sample)]
        return [starts[last] - starts[first] for first, last in pairwise(bounds)]

    def _rows(self, word: str, item: str, needed: bool) -> tuple[str, list[int]]:
        """What says how many of ``word`` each image has, by name: a product of its grid's row."""
        keys = ", ".join(key for key, by in self.words.items() if by == word)
        if "patch" not in word:
            name = "frames_per_video" if item == "video" else "tiles_per_image"
            require(self.given[name] is not None, f"{keys} counts {word}s; pass {name}")
            return name, as_counts(self.given[name], name)
        name = "image_grid_hw" if "image_grid_hw" in self.batch else "image_grid_thw"
        name = "video_grid_thw" if item == "video" else name
        grid, sides = self.batch.get(name), name.rpartition("_")[2]
        require(
            grid is not None or not needed,
            f"{keys} counts by {name}, which is not in the batch",
        )
        rows = []
        grid = [] if grid is None else grid
        for i, row in enumerate(grid) if length(grid, name) else ():
            rows.append(as_counts(row, f"{name}[{i}]", minimum=1))
            require(
                len(rows[-1]) == len(sides),
                f"{name}[{i}] has {len(rows[-1])} entries, expected {len(sides)}: "
                f"{', '.join(sides[:-1])} and {sides[-1]}",
            )
        return name, [math.prod(row) for row in rows]
