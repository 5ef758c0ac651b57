"""Images and videos of samples: which tensors these are, joined along their first dimension."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from ..errors import PackingError, PlaceholderMismatch
from ..media.families import FAMILIES, Family, get_family
from ..media.slicing import Spans
from ..spec import RowSpec
from .columns import OWN, Column, kind_of

MEGATRON = {"images": "tile", "imgs_sizes": "image"}  # beside num_image_tiles
_COUNTED = ("num_image_tiles", "tokens_per_image")
_TYPES = "token_type_ids"  # what a family has for each token
COUNT_BY_GRIDS = ("qwen_vl", "glm_vl")  # rules by which merge_size ** 2 patches become a position
Form = tuple[torch.dtype, tuple[int, ...]]


def media_of(spec: RowSpec, family: Family | None) -> dict[str, str]:
    """``{name: what its first dimension counts}`` of the media that rows of a model take."""
    known = {} if family is None else family.layout
    media = {
        name: word
        for name, word in known.items()
        if name not in (*OWN, *_COUNTED, "tokens") and not name.endswith(_TYPES)
    }
    return {**MEGATRON, **media} if spec.expands else media


def columns_of(spec: RowSpec, family: Family | None) -> dict[str, Column]:
    """The columns that a family's processor makes, by name."""
    if spec.expands or family is None:
        return {}
    return {name: Column(0) for name in family.layout if name.endswith(_TYPES)}


def as_family(family: str | Family | None) -> Family | None:
    """A family by its name, or none."""
    return None if family is None else get_family(family)


def check_known(name: str, spec: RowSpec) -> None:
    """Refuse a tensor that some family has as media, where nobody said which family it is."""
    if spec.expands:
        return
    words = {family.layout[name] for family in FAMILIES.values() if name in family.layout}
    if words - {"sample"}:
        raise PackingError(
            f"{name} is what models get images and videos in, but it is not said what it counts: "
            f"pass family=, such as 'qwen2_5_vl'"
        )


class LaterTiles:
    """The tiles of a sample whose ``images`` are a callable: made when its row is.

    Args:
        make: from which of the sample's tiles, ``list[int]``, to a tensor of them, ``[tiles, 3, h,
            w]``.
        count: how many tiles the sample has.
    """

    def __init__(self, make: Callable[[list[int]], Tensor], count: int):
        self.make, self.shape = make, (count,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, tiles: list[int]) -> Tensor:
        made = self.make(tiles)
        if not isinstance(made, Tensor) or made.dim() == 0 or made.shape[0] != len(tiles):
            raise PackingError(
                f"images made {kind_of(made)} of {len(tiles)} tiles, expected a tensor "
                f"[{len(tiles)}, 3, h, w]"
            )
        return made


def as_media(name: str, value) -> Tensor:
    """A tensor ``[entries, ...]``, from a list of numbers too."""
    if not isinstance(value, Tensor) and isinstance(value, list | tuple) and value:
        with suppress(TypeError, ValueError):
            value = torch.tensor(value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        expected = "[tiles, 3, h, w] or None" if name == "images" else "[entries, ...]"
        raise PackingError(f"{name}: found {kind_of(value)}, expected a tensor {expected}")
    return value


def form_of(value: Tensor) -> Form | None:
    """What all media of a row by one name have alike, or None where a sample has no entry."""
    shape = value.shape
    return (value.dtype, shape[1:]) if shape[0] else None


def as_forms(forms) -> dict[str, Form]:
    """``{name: (dtype, shape of an entry)}``."""
    forms = {} if forms is None else forms
    if not isinstance(forms, Mapping) or not all(
        isinstance(form, tuple) and len(form) == 2 and isinstance(form[0], torch.dtype)
        for form in forms.values()
    ):
        raise PackingError(f"forms is {forms!r}, expected {{name: (dtype, shape of an entry)}}")
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in forms.items()}


def commonest_forms(samples: Iterable[Mapping[str, Form]]) -> dict[str, Form]:
    """By name, the form that most samples have; the first of those that as many have."""
    counts: dict[str, dict[Form, int]] = {}
    for forms in samples:
        for name, form in forms.items():
            seen = counts.setdefault(name, {})
            seen[form] = seen.get(form, 0) + 1
    return {name: max(seen, key=seen.__getitem__) for name, seen in counts.items()}


def check_alike(samples: Sequence[Mapping[str, Form]]) -> None:
    """Refuse a sample that has not the form that most samples of a row have."""
    forms = {form for found in samples for form in found.items()}
    if len(forms) > len({name for name, _ in forms}):
        wanted = commonest_forms(samples)
        for found in samples:
            check_forms(found, wanted)


def check_forms(found: Mapping[str, Form], wanted: Mapping[str, Form]) -> None:
    """Refuse media of another form than those of a row have."""
    for name, form in found.items():
        if form != wanted[name]:
            (dtype, shape), other = form, wanted[name]
            raise PackingError(
                f"{name} are {dtype} {list(shape)} each, but rows hold those of one kind, here "
                f"{other[0]} {list(other[1])}, which most samples have (or forms= says)"
            )


def check_media(
    media: Mapping[str, Tensor],
    words: Mapping[str, str],
    num_image_tiles: list[int] | None,
    family: Family,
    placeholders: int,
) -> None:
    """Refuse media of a sample that do not count the same images, or that do not fill its
    placeholders.

    Raises:
        PlaceholderMismatch, PackingError: which do not, and how many there are.
    """
    if not media:
        raise PlaceholderMismatch(
            f"{placeholders} placeholders, but none of {', '.join(words)}",
            actual=0,
            expected=placeholders,
        )
    sizes: dict[str, int] = {}  # by what is counted
    for name, value in media.items():
        sizes.setdefault(words[name], value.shape[0])
    frames = media.get("num_frames_per_video")
    tiles = num_image_tiles or ([sizes["tile"]] if sizes.get("tile") else [])
    # What nothing counts is taken as one image, or video.
    images = (
        len(tiles) if "tile" in sizes else int(bool(sizes.keys() & {"patch", "nonempty_sample"}))
    )
    videos = int(bool(sizes.keys() & {"video_patch", "video_frame"}))
    Spans(
        media,
        words,
        [sizes.get("image", images)],
        tiles_per_image=tiles,
        num_videos=[sizes.get("video", videos)],
        frames_per_video=[sizes.get("video_frame", 0)] if frames is None else frames,
    )
    grid, merge = media.get("image_grid_thw"), family.settings.get("merge_size")
    if grid is None or "video_grid_thw" in media or family.count not in COUNT_BY_GRIDS:
        return
    embeddings = sum(prod(entry) // merge**2 for entry in grid.tolist())
    if embeddings != placeholders:
        raise PlaceholderMismatch(
            f"{placeholders} placeholders, but image_grid_thw says {embeddings} positions for "
            f"{len(grid)} images; the processor of this model expands each image to as many",
            actual=embeddings,
            expected=placeholders,
        )


def join_tiles(
    samples: Sequence[Mapping], device: torch.device, kept: list[int] | None = None
) -> Tensor:
    """The ``images`` of a row, from the media of its samples; with ``kept``, those tiles only."""
    values, first = [], 0
    for media in samples:
        images = media.get("images")
        if images is None:
            continue
        last = first + images.shape[0]
        if kept is not None:
            here = [tile - first for tile in kept if first <= tile < last]
        else:
            here = range(last - first)
        if isinstance(images, Tensor):
            values.append(images if kept is None else images[here])
        elif here:
            values.append(images[list(here)])
        first = last
    check_alike([{"images": form} for value in values if (form := form_of(value)) is not None])
    return join_media(values) if values else torch.empty(0, device=device)


def join_media(values: Sequence[Tensor]) -> Tensor:
    """All entries, of those that have any."""
    filled = [value for value in values if value.shape[0]]
    return torch.cat(filled or [values[0]])
