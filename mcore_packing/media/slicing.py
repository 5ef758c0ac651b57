"""Which rows of which tensor belong to which samples."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..errors import PackingError
from .families import LAYOUT_WORDS, Family, get_family
from .kinds import as_counts, as_ids, as_int, as_list, length, nested, shorten, take_spans


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

    The rows of a tensor are counted by what ``layout`` says of it, never guessed from a shape: with
    as many images as samples every guess is wrong sooner or later. All first dimensions are checked
    before anything is cut.

    Args:
        batch: tensors, arrays or lists by name; None counts as absent.
        layout: for every key what its first dimension counts, or a family, whose layout is taken.
            ``sample``; ``nonempty_sample``, a sample with at least one image; ``image``; ``tile``;
            ``patch``, of which an image has the product of its row in ``image_grid_thw`` (or
            ``image_grid_hw``); ``video``; ``video_patch``, likewise by ``video_grid_thw``;
            ``video_frame``.
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
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= rows.num_samples:
            raise PackingError(
                f"chunks[{i}] is {bounds}, expected [start, stop) of {rows.num_samples} samples"
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
        if not 0 <= sample < rows.num_samples:
            raise PackingError(
                f"order[{i}] is {sample}, expected a sample from 0 to {rows.num_samples - 1}"
            )
    return rows.of(samples)


def _as_bounds(chunk, name: str) -> list[int]:
    if not isinstance(chunk, range):
        return as_ids(chunk, name)
    if chunk.step != 1:
        raise PackingError(f"{name} is {chunk}, expected a step of 1")
    return [chunk.start, chunk.stop]


class _Rows:
    """Where the rows of each sample begin in each tensor of a batch."""

    def __init__(self, batch, layout, num_images, tiles_per_image, num_videos, frames_per_video):
        if not hasattr(batch, "items"):
            raise PackingError(f"batch is a {type(batch).__name__}, expected tensors by name")
        self.batch = {key: value for key, value in batch.items() if value is not None}
        layout = get_family(layout).layout if isinstance(layout, (str, Family)) else layout
        if not isinstance(layout, Mapping):
            raise PackingError(f"layout is a {type(layout).__name__}, expected a dict or a family")
        self.words = {}
        for key in self.batch:
            word = layout.get(key)
            if word not in LAYOUT_WORDS:
                found = "is not in the layout" if word is None else f"is laid out by {word!r}"
                raise PackingError(
                    f"{key} {found}; say what its first dimension counts, one of "
                    f"{', '.join(LAYOUT_WORDS)}"
                )
            self.words[key] = word
        self.tiles_per_image, self.frames_per_video = tiles_per_image, frames_per_video

        if num_images is None and num_videos is None:
            raise PackingError("num_images is None, expected the number of images of each sample")
        images = None if num_images is None else as_counts(num_images, "num_images")
        videos = None if num_videos is None else as_counts(num_videos, "num_videos")
        self.images = [0] * len(videos) if images is None else images
        self.videos = [0] * len(images) if videos is None else videos
        if len(self.images) != len(self.videos):
            raise PackingError(
                f"num_images has {len(self.images)} entries and num_videos {len(self.videos)}; "
                f"both have one for each sample"
            )
        self.num_samples = len(self.images)
        of_videos = [key for key, word in self.words.items() if "video" in word]
        forgotten = [key for key in of_videos if length(self.batch[key], key)]
        if videos is None and forgotten:
            raise PackingError(f"{', '.join(forgotten)} counts videos; pass num_videos")

        self.starts = {word: self._count(word) for word in set(self.words.values())}
        for key, word in self.words.items():
            found, expected = length(self.batch[key], key), self.starts[word][-1]
            if found != expected:
                raise PackingError(
                    f"{key} has {found} rows in its first dimension, but {self.num_samples} "
                    f"samples have {expected} of what it counts ({word})"
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
        """Prefix sums of how many of ``word`` each sample has."""
        if word == "sample":
            counts = [1] * self.num_samples
        elif word == "nonempty_sample":
            counts = [int(number > 0) for number in self.images]
        elif word in ("image", "video"):
            counts = self.images if word == "image" else self.videos
        elif word == "patch":
            grid = "image_grid_hw" if "image_grid_hw" in self.batch else "image_grid_thw"
            counts = self._sum(self.images, self._grid_products(grid, word), "image")
        elif word == "video_patch":
            counts = self._sum(self.videos, self._grid_products("video_grid_thw", word), "video")
        elif word == "tile":
            rows = self._given("tiles_per_image", self.tiles_per_image, word)
            counts = self._sum(self.images, rows, "image")
        else:
            rows = self._given("frames_per_video", self.frames_per_video, word)
            counts = self._sum(self.videos, rows, "video")
        return [0, *accumulate(counts)]

    def _sum(self, items_per_sample: list[int], named: tuple[str, list[int]], item: str):
        """How many rows each sample has, from the rows of each of its images."""
        name, rows = named
        if len(rows) != sum(items_per_sample):
            raise PackingError(
                f"{name} has {len(rows)} entries, but num_{item}s {shorten(items_per_sample)} "
                f"adds up to {sum(items_per_sample)}"
            )
        starts = [0, *accumulate(rows)]
        bounds = [0, *accumulate(items_per_sample)]
        return [starts[last] - starts[first] for first, last in pairwise(bounds)]

    def _given(self, name: str, values, word: str) -> tuple[str, list[int]]:
        if values is None:
            keys = [key for key, by in self.words.items() if by == word]
            raise PackingError(f"{', '.join(keys)} counts {word}s; pass {name}")
        return name, as_counts(values, name)

    def _grid_products(self, name: str, word: str) -> tuple[str, list[int]]:
        """Patches of each image: the product of its row in the grid."""
        grid = self.batch.get(name)
        if grid is None:
            keys = [key for key, by in self.words.items() if by == word]
            items = self.images if word == "patch" else self.videos
            if not any(items):
                return name, []
            raise PackingError(f"{', '.join(keys)} counts by {name}, which is not in the batch")
        length(grid, name)
        rows = [as_counts(row, f"{name}[{i}]", minimum=1) for i, row in enumerate(grid)]
        sides = name.rpartition("_")[2]
        for i, row in enumerate(rows):
            if len(row) != len(sides):
                raise PackingError(
                    f"{name}[{i}] has {len(row)} entries, expected {len(sides)}: "
                    f"{', '.join(sides[:-1])} and {sides[-1]}"
                )
        return name, [math.prod(row) for row in rows]
