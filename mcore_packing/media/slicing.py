"""Which rows of which tensor belong to which samples."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .families import LAYOUT_WORDS, Family, get_family
from .kinds import as_ids, as_int, as_list, length, nested, require, shorten, take_spans


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
        tiles_per_image, frames_per_video: how many each has, where a key counts them.
        num_videos: how many videos each sample has, where there are any.

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
    rows = _Rows(batch, layout, num_images, family, tiles_per_image, num_videos, frames_per_video)
    total, checked = rows.num_samples, []
    if not nested(chunks):
        size = as_int(chunks, "chunks", minimum=1)
        chunks = [(start, min(start + size, total)) for start in range(0, total, size)]
    for i, chunk in enumerate(as_list(chunks, "chunks")):
        name, step = f"chunks[{i}]", getattr(chunk, "step", 1)
        require(step == 1, f"{name} is {chunk}, expected a step of 1")
        bounds = [chunk.start, chunk.stop] if isinstance(chunk, range) else as_ids(chunk, name)
        inside = len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= total
        require(inside, f"{name} is {bounds}, expected [start, stop) of {total} samples")
        checked.append(range(*bounds))
    return [rows.of(samples) for samples in checked]


def take_samples(
    batch: Mapping[str, Any],
    layout: Mapping[str, str] | str | Family | None,
    num_images: Sequence[int] | None,
    order: Sequence[int],
    **given: Any,
) -> dict[str, Any]:
    """Gather samples of a batch in any order, with repetition, and all their rows with them.

    Inside a sample the order of its images, and of their rows, stays as it is.

    Args:
        batch, layout, num_images, **given: as for ``split_samples``, whose keywords these are.
        order: the samples to take, ``[N]``.

    Returns:
        A batch of ``N`` samples; a key that counts images is absent where they have none.

    Raises:
        PackingError: as for ``split_samples``, or a sample in ``order`` does not exist.

    Example:
        >>> batch = {"input_ids": [[5], [6]], "pixel_values": ["a", "b", "c"]}
        >>> layout = {"input_ids": "sample", "pixel_values": "image"}
        >>> take_samples(batch, layout, [2, 1], [1, 0, 1])
        {'input_ids': [[6], [5], [6]], 'pixel_values': ['c', 'a', 'b', 'c']}
    """
    rows = _Rows(batch, layout, num_images, **given)
    samples, last = as_ids(order, "order"), rows.num_samples - 1
    for i, sample in enumerate(samples):
        require(0 <= sample <= last, f"order[{i}] is {sample}, expected a sample from 0 to {last}")
    return rows.of(samples)


class _Rows:
    """Where the rows of each sample begin in each tensor of a batch."""

    def __init__(
        self, batch, layout, num_images, family=None, tiles_per_image=None, num_videos=None,
        frames_per_video=None,
    ):  # fmt: skip
        found = type(batch).__name__
        require(hasattr(batch, "items"), f"batch is a {found}, expected tensors by name")
        layout = family if layout is None else layout
        layout = get_family(layout).layout if isinstance(layout, (str, Family)) else layout
        found = type(layout).__name__
        require(isinstance(layout, Mapping), f"layout is a {found}, expected a dict or a family")
        self.batch = {key: value for key, value in batch.items() if value is not None}
        self.words = {key: layout.get(key) for key in self.batch}
        self.given = {"tiles_per_image": tiles_per_image, "frames_per_video": frames_per_video}
        for key, word in self.words.items():
            found = "is not in the layout" if word is None else f"is laid out by {word!r}"
            expected = f"expected what it counts, one of {', '.join(LAYOUT_WORDS)}"
            require(word in LAYOUT_WORDS, f"{key} {found}, {expected}")

        both = {"image": num_images, "video": num_videos}
        both = {kind: as_ids(n, f"num_{kind}s", 0) for kind, n in both.items() if n is not None}
        require(both, "num_images is None, expected the number of images of each sample")
        for key, word in self.words.items():
            told = "video" in both or "video" not in word or not length(self.batch[key], key)
            require(told, f"{key} counts videos; pass num_videos")
        self.num_samples = len(next(iter(both.values())))
        self.items = {kind: both.get(kind, [0] * self.num_samples) for kind in ("image", "video")}
        images, videos = (len(numbers) for numbers in self.items.values())
        found = f"num_images has {images} entries and num_videos {videos}"
        require(images == videos, f"{found}; both have one for each sample")
        self.starts = {word: [0, *accumulate(self._count(word))] for word in self.words.values()}
        for key, word in self.words.items():
            found, expected = length(self.batch[key], key), self.starts[word][-1]
            message = f"{key} has {found} rows in its first dimension, but {self.num_samples} "
            message += f"samples have {expected} of what it counts ({word})"
            require(found == expected, message)

    def of(self, samples: Sequence[int]) -> dict[str, Any]:
        """The rows of these samples, in their order."""
        parts = {}
        for key, word in self.words.items():
            spans = [self.starts[word][sample : sample + 2] for sample in samples]
            if word == "sample" or any(start < stop for start, stop in spans):
                parts[key] = take_spans(self.batch[key], spans)
        return parts

    def _count(self, word: str) -> list[int]:
        """How many of ``word`` each sample has."""
        if word in self.items:
            return self.items[word]
        if "sample" in word:
            return [int(word == "sample" or number > 0) for number in self.items["image"]]
        item = "video" if "video" in word else "image"
        keys = ", ".join(key for key, by in self.words.items() if by == word)
        per_sample = self.items[item]
        if "patch" in word:
            name = "image_grid_hw" if "image_grid_hw" in self.batch else "image_grid_thw"
            name = "video_grid_thw" if item == "video" else name
            known = name in self.batch or not any(per_sample)
            require(known, f"{keys} counts by {name}, which is not in the batch")
            rows = self._grid_products(name)
        else:
            name = "frames_per_video" if item == "video" else "tiles_per_image"
            require(self.given[name] is not None, f"{keys} counts {word}s; pass {name}")
            rows = as_ids(self.given[name], name, minimum=0)
        expected = f"num_{item}s {shorten(per_sample)} adds up to {sum(per_sample)}"
        require(len(rows) == sum(per_sample), f"{name} has {len(rows)} entries, but {expected}")
        starts, bounds = [0, *accumulate(rows)], [0, *accumulate(per_sample)]
        return [starts[last] - starts[first] for first, last in pairwise(bounds)]

    def _grid_products(self, name: str) -> list[int]:
        """How many patches each row of a grid is."""
        grid, sides, products = self.batch.get(name, []), name.rpartition("_")[2], []
        for i, row in enumerate(grid) if length(grid, name) else ():
            row = as_ids(row, f"{name}[{i}]", minimum=1)
            expected = f"expected {len(sides)}: {', '.join(sides)}"
            require(len(row) == len(sides), f"{name}[{i}] has {len(row)} entries, {expected}")
            products.append(math.prod(row))
        return products
