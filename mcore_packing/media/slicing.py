"""Which entries of which tensor belong to which samples."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .families import LAYOUT_WORDS, Family, get_family
from .kinds import as_ids, as_int, as_list, length, nested, require, shorten, take_spans


def split_samples(
    batch: Mapping[str, Any], layout: Mapping[str, str] | str | Family | None,
    num_images: Sequence[int] | None, chunks: Sequence[Sequence[int]] | int, *,
    family: str | Family | None = None, tiles_per_image: Sequence[int] | None = None,
    num_videos: Sequence[int] | None = None, frames_per_video: Sequence[int] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Cut a batch of samples into chunks of samples, every tensor where its own entries are.

    What a first dimension counts is never guessed from a shape; all first dimensions are checked
    before anything is cut.

    Args:
        batch: tensors, arrays or lists by name; None counts as absent.
        layout: for every key what its first dimension counts, in words of ``Family.layout``, or a
            family. Patches are counted by ``image_grid_thw`` (or ``image_grid_hw``) and
            ``video_grid_thw`` of the batch.
        num_images: how many images each sample has; None where there are only videos.
        chunks: ``[start, stop)`` of the samples of each chunk, also as a ``range``, in any order;
            an int is the number of samples in each chunk, of which the last may have fewer.
        family: in place of ``layout``, which is None then.
        tiles_per_image, frames_per_video: how many each has, where a key counts them.
        num_videos: how many videos each sample has, where there are any.

    Returns:
        One dict for each chunk: views of its entries, where the kind allows. A key that does not
            count
        samples is absent where a chunk has no entry of it: vision encoders do not take none.

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
    spans = Spans(batch, layout, num_images, family, tiles_per_image, num_videos, frames_per_video)
    total, checked = spans.num_samples, []
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
    return [spans.of(samples) for samples in checked]


def take_samples(
    batch: Mapping[str, Any], layout: Mapping[str, str] | str | Family | None,
    num_images: Sequence[int] | None, order: Sequence[int], **given: Any,
) -> dict[str, Any]:  # fmt: skip
    """Gather samples of a batch in any order, with repetition, and all that is theirs with them.

    Inside a sample the order of its images, and of their patches, stays as it is.

    Args:
        batch, layout, num_images, **given: as for ``split_samples``, whose keywords these are.
        order: the samples to take, ``[N]``.

    Returns:
        A batch of ``N`` samples, without the keys that they have no entry of.

    Raises:
        PackingError: as for ``split_samples``, or a sample in ``order`` does not exist.

    Example:
        >>> batch = {"input_ids": [[5], [6]], "pixel_values": ["a", "b", "c"]}
        >>> layout = {"input_ids": "sample", "pixel_values": "image"}
        >>> take_samples(batch, layout, [2, 1], [1, 0, 1])
        {'input_ids': [[6], [5], [6]], 'pixel_values': ['c', 'a', 'b', 'c']}
    """
    spans = Spans(batch, layout, num_images, **given)
    samples, last = as_ids(order, "order"), spans.num_samples - 1
    for i, sample in enumerate(samples):
        require(0 <= sample <= last, f"order[{i}] is {sample}, expected a sample from 0 to {last}")
    return spans.of(samples)


class Spans:
    """Where the entries of each sample begin in each tensor of a batch."""

    def __init__(
        self, batch, layout, num_images, family=None, tiles_per_image=None, num_videos=None,
        frames_per_video=None,
    ):  # fmt: skip
        found = type(batch).__name__
        require(hasattr(batch, "items"), f"batch is a {found}, expected tensors by name")
        require(layout is None or family is None, "family is given beside layout; pass one of them")
        layout = family if layout is None else layout
        layout = get_family(layout).layout if isinstance(layout, (str, Family)) else layout
        found = type(layout).__name__
        require(isinstance(layout, Mapping), f"layout is a {found}, expected a dict or a family")
        self.batch = {key: value for key, value in batch.items() if value is not None}
        self.words = {key: layout.get(key) for key in self.batch}
        self.given = {"tiles_per_image": tiles_per_image, "frames_per_video": frames_per_video}
        numbers = {"image": num_images, "video": num_videos}
        numbers = {of: as_ids(n, f"num_{of}s", 0) for of, n in numbers.items() if n is not None}
        require(numbers, "num_images is None, expected the number of images of each sample")
        for key, word in self.words.items():
            if word == "video_or_frame":
                word = self.words[key] = _video_or_frame(self.batch[key], key)
            found = "is not in the layout" if word is None else f"is laid out by {word!r}"
            expected = f"expected what it counts, one of {', '.join(LAYOUT_WORDS)}"
            require(word in LAYOUT_WORDS, f"{key} {found}, {expected}")
            told = "video" in numbers or "video" not in word or not length(self.batch[key], key)
            require(told, f"{key} counts videos; pass num_videos")
        sizes = [len(number) for number in numbers.values()]
        found = f"num_images has {sizes[0]} entries and num_videos {sizes[-1]}"
        require(sizes[0] == sizes[-1], f"{found}; both have one for each sample")
        self.num_samples = sizes[0]
        self.numbers = dict.fromkeys(("image", "video"), [0] * self.num_samples) | numbers
        self.starts = {word: [0, *accumulate(self._count(word))] for word in self.words.values()}
        for key, word in self.words.items():
            size, total = length(self.batch[key], key), self.starts[word][-1]
            found = f"{key} has {size} entries in its first dimension"
            require(size == total, f"{found}, its samples {total} of what it counts ({word})")

    def of(self, samples: Sequence[int]) -> dict[str, Any]:
        """What belongs to these samples, in their order."""
        parts = {}
        for key, word in self.words.items():
            spans = [self.starts[word][sample : sample + 2] for sample in samples]
            if word == "sample" or any(start < stop for start, stop in spans):
                parts[key] = take_spans(self.batch[key], spans)
        return parts

    def _count(self, word: str) -> list[int]:
        """How many of ``word`` each sample has."""
        if word in self.numbers:
            return self.numbers[word]
        if "sample" in word:
            return [int(word == "sample" or number > 0) for number in self.numbers["image"]]
        item = "video" if "video" in word else "image"
        keys = ", ".join(key for key, by in self.words.items() if by == word)
        per_sample = self.numbers[item]
        if "patch" in word:
            flat = item == "image" and "image_grid_hw" in self.batch
            name = "image_grid_hw" if flat else f"{item}_grid_thw"
            grid = self.batch.get(name, None if any(per_sample) else [])
            require(grid is not None, f"{keys} counts by {name}, which is not in the batch")
            counts = _products(grid, name)
        else:
            name = "frames_per_video" if item == "video" else "tiles_per_image"
            require(self.given[name] is not None, f"{keys} counts {word}s; pass {name}")
            counts = as_ids(self.given[name], name, minimum=0)
        expected = f"num_{item}s {shorten(per_sample)} adds up to {sum(per_sample)}"
        require(len(counts) == sum(per_sample), f"{name} has {len(counts)} entries, but {expected}")
        starts, bounds = [0, *accumulate(counts)], [0, *accumulate(per_sample)]
        return [starts[last] - starts[first] for first, last in pairwise(bounds)]


def _video_or_frame(values: Any, key: str) -> str:
    """Whether the entries are videos ``[frames, C, H, W]``, or frames ``[C, H, W]``."""
    if not length(values, key):
        return "video"
    entries = [values[0]] if hasattr(values, "shape") else values
    dims = {len(getattr(entry, "shape", ())) for entry in entries}
    found = f"{key} has entries of {' and '.join(map(str, sorted(dims)))} dimensions"
    expected = "expected 4 (a video each) or 3 (a frame each); or say what they are in a layout"
    require(dims in ({3}, {4}), f"{found}, {expected}")
    return "video" if dims == {4} else "video_frame"


def _products(grid: Any, name: str) -> list[int]:
    """How many patches each entry of a grid is."""
    length(grid, name)  # refuses what has none
    entries = [as_ids(entry, f"{name}[{i}]", minimum=1) for i, entry in enumerate(grid)]
    sides = name.rpartition("_")[2]
    for i, entry in enumerate(entries):
        expected = f"expected {len(sides)}: {', '.join(sides)}"
        require(len(entry) == len(sides), f"{name}[{i}] has {len(entry)} entries, {expected}")
    return [math.prod(entry) for entry in entries]
