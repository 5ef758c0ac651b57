"""A sample that is too long, cut to what a row has room for."""

from math import prod

from torch import Tensor

from ..media.truncation import truncate
from .media import COUNT_BY_GRIDS
from .samples import COUNTS, Contents, Sample, SampleTooLong, as_ints, attended

_GRID = "image_grid_thw"


def cut(sample: dict, found: Sample, contents: Contents, room: int) -> tuple[dict, int]:
    """The same sample with at most so many positions, its end cut off, but never inside an image.

    What it has for each token, and its images with all that counts them, is cut along.

    Args:
        sample: as it was given.
        found: the same, taken apart, its values looked at.
        contents: what rows take of it.
        room: positions.

    Returns:
        The sample that is left, padding left out, and how many images are not in it.

    Raises:
        SampleTooLong: nothing would be left, or it is not known which part of it is of which image.
    """
    counts = _positions_of_images(sample, found, contents)
    entries = {name: _entries(name, found, contents) for name, v in found.media.items() if len(v)}
    spec, family = contents.spec, contents.family
    token = spec.image_token_id if spec.expands or family is None else None  # else the family's
    how = truncate(
        found.ids,
        counts,
        room,
        token,
        family=family,
        space="collapsed" if spec.expands else "expanded",
    )
    if not how.keep_positions:
        raise SampleTooLong(
            f"{found.num_positions} positions, but a row has room for {room}, and no cut leaves "
            f"anything: its first image alone does not fit; give it fewer tiles, or raise the "
            f"capacity"
        )
    here = attended(sample, len(sample["input_ids"]))
    left = {}
    for name, value in sample.items():
        if name == "input_ids":
            value = how.output_ids
        elif value is None:
            pass
        elif name == "position_ids":
            value = how.apply(value[..., here], per="position", dim=-1)
        elif name in contents.columns:
            column = contents.columns[name]
            value = how.apply(value[here], shifted=column.shifted, fill=column.fill, dim=0)
        elif name in ("labels", "attention_mask"):
            value = how.apply(value[here], shifted=False)
        elif name in COUNTS and how.dropped_images:
            value = how.apply(value, per="image")
        elif name in entries and how.dropped_images and not callable(value):
            value = how.apply(value, per="image", rows=entries[name])
        left[name] = value
    return left, len(how.dropped_images)


def _positions_of_images(sample: dict, found: Sample, contents: Contents) -> list[int]:
    """How many positions each image of a sample has."""
    if contents.spec.expands:
        return found.tokens_per_image
    if not any(map(len, found.media.values())):
        return []
    given, family = as_ints(sample, "tokens_per_image"), contents.family
    if given is not None:
        return given
    if _GRID in found.media and family.count in COUNT_BY_GRIDS:
        return [area // family.settings["merge_size"] ** 2 for area in _areas(found.media[_GRID])]
    raise _cannot(found, "how many positions each of its images has is not known")


def _entries(name: str, found: Sample, contents: Contents) -> list[int]:
    """How many entries of a medium each image has."""
    word, images = contents.media[name], len(found.tokens_per_image)
    if word == "tile" and found.num_image_tiles:
        return found.num_image_tiles
    if word == "image":
        return [1] * len(found.media[name])
    if word == "patch" and _GRID in found.media:
        return _areas(found.media[_GRID])
    if word == "patch" and images == 1:
        return [len(found.media[name])]
    raise _cannot(found, f"which entries of {name} are of which image is not known")


def _areas(grid: Tensor) -> list[int]:
    return [prod(entry) for entry in grid.tolist()]


def _cannot(found: Sample, why: str) -> SampleTooLong:
    return SampleTooLong(
        f"{found.num_positions} positions are too many, but it is not cut: {why}; cut it with "
        f"mp.media.truncate and its family before"
    )
