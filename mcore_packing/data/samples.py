"""What a sample is: its parts, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PackingError, PlaceholderMismatch
from ..media.families import FAMILIES, Family
from ..reference import prefix_sum
from ..spec import RowSpec
from .columns import OWN, Column, Tokens, as_columns, check_tokens, kind_of, look_at
from .media import (
    Form,
    LaterTiles,
    as_family,
    as_media,
    check_known,
    check_media,
    columns_of,
    form_of,
    media_of,
)


class EmptySample(PackingError):
    """A sample without tokens."""


class SampleTooLong(PackingError):
    """A sample that does not fit a row by itself."""


class UntrainedSample(PackingError):
    """A sample without a trained token, where those are refused."""


class WrongLength(PackingError):
    """A sample that is not as long as ``lengths`` said."""


class Length(NamedTuple):
    """How long a sample is: what packing has to know of it. ``Packer.length(sample)`` says it.

    Attributes:
        positions: how many it becomes, without alignment.
        trained: how many of its tokens are trained; None where that is not known.
        tiles: how many images it has, or tiles where images have several; or None.
        patches: how many positions its images become, or patches where those are counted; or None.
    """

    positions: int
    trained: int | None = None
    tiles: int | None = None
    patches: int | None = None

    def check(self, found: "Length") -> None:
        """Refuse what is not as it was said here."""
        for name, said, real in zip(self._fields, self, found, strict=True):
            if None not in (said, real) and said != real:
                raise WrongLength(
                    f"lengths say {said} {name}, but it has {real}; make them anew "
                    f"(packer.length(sample))"
                )


@dataclass(frozen=True)
class Contents:
    """What rows take of samples, by name.

    Attributes:
        spec: what the model asks of a row.
        family: whose processor made the samples, where the model does not expand.
        media: images and videos, and what their first dimensions count.
        columns: what there is for each token.
    """

    spec: RowSpec
    family: Family | None
    media: Mapping[str, str]
    columns: Mapping[str, Column]

    @classmethod
    def of(
        cls, spec: RowSpec, family: str | Family | None = None, columns: Mapping | None = None
    ) -> "Contents":
        """Of a model whose samples a family's processor made, with columns besides."""
        family = as_family(family)
        media = media_of(spec, family)
        columns = columns_of(spec, family) | as_columns(columns)
        if both := ", ".join(media.keys() & columns.keys()):
            raise PackingError(f"{both} are images or videos, and cannot be columns")
        return cls(spec, family, media, columns)

    @cached_property
    def placeholders(self) -> tuple[int, ...]:
        """The ids that stand for images and videos."""
        ids = [self.spec.image_token_id]
        if self.family is not None and not self.spec.expands:
            ids += [self.family.image_token_id, self.family.video_token_id]
        return tuple(dict.fromkeys(token for token in ids if token is not None))

    @property
    def where(self) -> str:
        """How messages name a placeholder."""
        return f"placeholders (id {' or '.join(map(str, self.placeholders))})"


class Member(NamedTuple):
    """What a row remembers of one of its samples, beside tensors.

    Attributes:
        num_tokens: how long it is, collapsed.
        plain: what the sample had that is plain: numbers, text, and lists and dicts of them.
        media: how many entries it has of each of the row's media; of those that have none, an empty
            tensor's dtype and shape.
        counts: what it had in tensors that are known otherwise, by name, with their dtypes.
        columns: the names of the columns that it came with, labels among them.
        position_dims: 1 where it came with ``position_ids``, 2 for those of mRoPE, else 0.
    """

    num_tokens: int
    plain: dict
    media: dict[str, int | tuple]
    counts: dict[str, torch.dtype]
    columns: tuple[str, ...]
    position_dims: int


class Sample(NamedTuple):
    """A sample, taken apart.

    Attributes:
        ids: int64 ``[t]``.
        columns: ``[t, ...]`` each, by name; labels among them, not shifted.
        media: ``[entries, ...]`` each, by name.
        forms: what of each medium, and of each column, has to be alike in a row.
        num_image_tiles: how many tiles each image has.
        tokens_per_image: how many positions each placeholder becomes.
        positions: int64 ``[t]`` or ``[axes, t]``, or None.
        left_out: what it has that no row takes.
        member: what a row remembers of it.
    """

    ids: Tensor
    columns: dict[str, Tensor]
    media: dict[str, Tensor]
    forms: dict[str, Form]
    num_image_tiles: list[int]
    tokens_per_image: list[int]
    positions: Tensor | None
    left_out: list[str]
    member: Member

    @property
    def says_images(self) -> bool:
        """Whether it says itself how many images its tiles are."""
        known = self.member.plain | self.member.counts
        return any(known.get(name) is not None for name in COUNTS)

    @property
    def num_tiles(self) -> int:
        """How many tiles, images and videos it has: what ``max_tiles`` counts."""
        if self.num_image_tiles:
            return sum(self.num_image_tiles)
        grids = ("image_grid_thw", "image_grid_hw", "video_grid_thw")
        counts = [self.media[name].shape[0] for name in grids if name in self.media]
        return sum(counts) if counts else max((v.shape[0] for v in self.media.values()), default=0)

    @property
    def num_patches(self) -> int:
        """What the cost of its images and videos grows with."""
        if self.tokens_per_image:
            return sum(self.tokens_per_image)
        names = ("pixel_values", "pixel_values_videos")
        return sum(self.media[name].shape[0] for name in names if name in self.media)

    @property
    def num_positions(self) -> int:
        """How many positions it becomes, without alignment."""
        return self.member.num_tokens - len(self.tokens_per_image) + sum(self.tokens_per_image)

    def length(self, trained: int | None = None) -> Length:
        """How long it is; how many tokens are trained, only their values tell."""
        return Length(self.num_positions, trained, self.num_tiles, self.num_patches)


COUNTS = ("num_image_tiles", "tokens_per_image")
_PLAIN = {str, int, float, bool, bytes, type(None)}


def read(sample: dict, contents: Contents) -> Sample:
    """Take a sample apart. Everything is checked but values of its tokens: ``look`` does that, for
    many samples at once.

    Raises:
        EmptySample, PackingError: what is wrong with it.
        TypeError: no ``spec.img_seq_len`` where it is needed.
    """
    if not isinstance(sample, dict):
        raise PackingError(f"a sample is a {type(sample).__name__}, expected a dict")
    ids = sample.get("input_ids")
    if isinstance(ids, Tensor) and ids.numel() == 0:
        raise EmptySample("input_ids are empty")
    check_tokens("input_ids", ids)
    plain, columns, media, counts, forms, left_out = {}, {}, {}, {}, {}, []
    for name, value in sample.items():
        if name == "input_ids":
            continue
        if value is None:
            plain[name] = None
        elif name == "labels":
            check_tokens(name, value)
            columns[name] = value
        elif name in contents.media:
            if name == "images" and callable(value):
                media[name] = LaterTiles(value, _num_tiles_said(sample))
                continue
            media[name] = entries = as_media(name, value)
            if entries is not value:
                plain[name] = value
            if form := form_of(entries):
                forms[name] = form
        elif name in contents.columns:
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise PackingError(f"{name}: found {kind_of(value)}, expected a tensor [t, ...]")
            columns[name] = value
            forms[name] = value.dtype, tuple(value.shape[1:])
        elif name in COUNTS and isinstance(value, Tensor):
            counts[name] = value.dtype
            if not contents.spec.expands:  # no row has it
                plain[name] = value.tolist()
        elif is_plain(value):
            plain[name] = value
        elif name not in OWN and not str(name).startswith("__"):  # a loader's own
            check_known(name, contents.spec)
            left_out.append(name)
    num_tokens = ids.numel()
    for name, value in columns.items():
        if value.shape[0] != num_tokens:
            raise PackingError(f"{name} have {value.shape[0]} entries, but input_ids {num_tokens}")
    if sample.get("loss_mask") is not None:
        raise PackingError(
            "a sample has a loss_mask, which could be shifted or not; give labels instead, -100 "
            "where nothing is trained"
        )
    positions = None
    if sample.get("position_ids") is not None:
        positions = _positions(sample["position_ids"], num_tokens, contents.spec)
    if sample.get("attention_mask") is not None:
        span = attended(sample, num_tokens)
        ids = ids[span]
        num_tokens = ids.numel()
        columns = {name: value[span] for name, value in columns.items()}
        positions = None if positions is None else positions[..., span]
        if "attention_mask" in plain:
            plain["attention_mask"] = plain["attention_mask"][span]
        else:
            counts["attention_mask"] = sample["attention_mask"].dtype
    tiles, per_image = _count(sample, media.get("images"), contents.spec)
    sizes = {name: value.shape[0] or (value.dtype, value.shape) for name, value in media.items()}
    dims = 0 if positions is None else positions.dim()
    member = Member(num_tokens, plain, sizes, counts, tuple(columns), dims)
    return Sample(ids, columns, media, forms, tiles, per_image, positions, left_out, member)


def look(
    samples: Sequence[Sample], ids: Tensor, labels: Tensor | None, contents: Contents
) -> Tokens:
    """Look at the values of tokens and labels of samples, ``[T]`` one behind the other.

    Raises:
        PlaceholderMismatch: a sample has another number of placeholders than of images.
        PackingError: a label that is no token.
    """
    spec = contents.spec
    bounds = prefix_sum(np.array([sample.member.num_tokens for sample in samples]))
    tokens = look_at(ids, labels, bounds, contents.placeholders, spec.expands)
    edges = zip(samples, tokens.placeholders_per_sample, bounds, bounds[1:], strict=False)
    for sample, found, start, stop in edges:
        if not spec.expands:
            if contents.family is not None and (sample.media or found):
                tiles = sample.num_image_tiles
                check_media(sample.media, contents.media, tiles, contents.family, found)
        elif found != len(sample.tokens_per_image):
            images = len(sample.tokens_per_image)
            advice = _advise(sample, tokens.ids[start:stop], found, spec.image_token_id)
            raise PlaceholderMismatch(
                f"{found} {contents.where} but {images} images; {advice}",
                actual=images,
                expected=found,
            )
        elif len(sample.num_image_tiles) != found:
            raise PackingError(
                f"num_image_tiles has {len(sample.num_image_tiles)} entries, but tokens_per_image "
                f"{found}"
            )
    return tokens


def _advise(sample: Sample, ids: np.ndarray, found: int, token: int) -> str:
    """What is likely wrong with a sample that has another number of placeholders than images."""
    images, tiles = len(sample.tokens_per_image), sum(sample.num_image_tiles)
    if not images:
        return "give their images, or take the placeholders out"
    if found == sum(sample.tokens_per_image):
        return (
            "there are as many as image embeddings, so these ids are expanded already, but this "
            "model expands them itself: give every image one placeholder (mp.media.collapse)"
        )
    if not found:
        other = _other_placeholder(ids, token, (images, sum(sample.tokens_per_image)))
        return (
            f"no token has the id {token} of spec.image_token_id{other}. Give every image one of "
            f"that id, or say yours: mp.RowSpec(image_token_id=...)"
        )
    if found < images == tiles and not sample.says_images:
        return (
            f"num_image_tiles is not given, so that each of the {tiles} tiles counts as an image: "
            f"give it, how many tiles each image has"
        )
    return "give every image one placeholder"


def _other_placeholder(ids: np.ndarray, token: int, counts: tuple[int, int]) -> str:
    """What else could stand for images: a negative id, or some family's, once an image or once a
    position."""
    values, first, times = np.unique(ids, return_index=True, return_counts=True)
    families = {family.image_token_id: name for name, family in FAMILIES.items()}
    for value, at, number in zip(values.tolist(), first.tolist(), times.tolist(), strict=True):
        if value < 0 and value != token:
            return f", but {number} have {value} (the first is token {at})"
        if value in families and number in counts:
            return f", but {number} have {value}, the placeholder of {families[value]}"
    return ""


def as_lengths(lengths, number: int) -> list[Length]:
    """How long each of so many samples is.

    Args:
        lengths: ints or ``Length`` (or lists in that order), in a list, a tensor or an array.
        number: of the samples.
    """
    if hasattr(lengths, "tolist"):
        lengths = lengths.tolist()
    if isinstance(lengths, str | Mapping) or not isinstance(lengths, Sequence):
        raise PackingError(f"lengths are a {kind_of(lengths)}, expected one for each sample")
    if len(lengths) != number:
        raise PackingError(f"there are {len(lengths)} lengths, but {number} samples")
    return [_as_length(index, length) for index, length in enumerate(lengths)]


def _as_length(index: int, given) -> Length:
    values = given if isinstance(given, list | tuple) else (given,)
    is_right = 1 <= len(values) <= len(Length._fields) and values[0] is not None
    for value in values:
        is_count = isinstance(value, Integral) and not isinstance(value, bool) and value >= 0
        is_right = is_right and (value is None or is_count)
    if not is_right:
        raise PackingError(
            f"lengths[{index}] is {given!r}, expected positions, or mp.data.Length("
            f"{', '.join(Length._fields)})"
        )
    return Length(*values)


def is_plain(value) -> bool:
    """Whether a value is numbers or text, or lists and dicts of them."""
    if type(value) in _PLAIN:
        return True
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(one) for key, one in value.items())
    return isinstance(value, tuple(_PLAIN))


def attended(sample: dict, num_tokens: int) -> slice:
    """The tokens that a sample's attention mask leaves, without the padding at either end.

    Raises:
        EmptySample: it leaves none.
        PackingError: it is no mask of these tokens, or hides one between others.
    """
    mask = sample.get("attention_mask")
    if mask is None:
        return slice(0, num_tokens)
    if isinstance(mask, list | tuple):
        mask = torch.tensor(mask) if is_plain(mask) else None
    if not isinstance(mask, Tensor) or mask.dim() != 1 or mask.numel() != num_tokens:
        raise PackingError(
            f"attention_mask: found {kind_of(mask)}, expected [{num_tokens}] like input_ids"
        )
    attended = mask.cpu().numpy().nonzero()[0]
    if not attended.size:
        raise EmptySample("attention_mask is 0 everywhere")
    first, last = int(attended[0]), int(attended[-1])
    if attended.size != last + 1 - first:
        hidden = first + int((np.diff(attended) > 1).argmax()) + 1
        raise PackingError(
            f"attention_mask is 0 at token {hidden}, between tokens that it is not: a row has no "
            f"place for that. Zeros at either end are padding, and are left out"
        )
    return slice(first, last + 1)


def _positions(positions, num_tokens: int, spec: RowSpec) -> Tensor:
    """``position_ids`` of a sample, for models that take any."""
    if spec.expands:
        raise PackingError(
            "a sample has position_ids, but this model expands images and counts its own: leave "
            "them out"
        )
    is_right = isinstance(positions, Tensor) and positions.dtype == torch.int64
    if not is_right or positions.dim() not in (1, 2) or positions.shape[-1] != num_tokens:
        raise PackingError(
            f"position_ids: found {kind_of(positions)}, expected torch.int64 [{num_tokens}], or "
            f"[3, {num_tokens}] for mRoPE"
        )
    return positions


def _count(sample: dict, images: Tensor | None, spec: RowSpec) -> tuple[list[int], list[int]]:
    """``num_image_tiles`` and ``tokens_per_image`` of a sample."""
    counts, tiles = as_ints(sample, "tokens_per_image"), as_ints(sample, "num_image_tiles")
    if not spec.expands:
        return tiles or [], []
    num_given = 0 if images is None else images.shape[0]
    is_said = tiles is not None
    if not is_said:  # one tile each
        tiles = [1] * (num_given if counts is None else len(counts))
    if (counts is None or is_said) and sum(tiles) != num_given:
        raise PackingError(
            f"num_image_tiles {tiles} are {sum(tiles)} tiles, but images hold {num_given}"
        )
    if counts is None:
        if tiles and spec.img_seq_len is None:
            raise TypeError(
                "samples with images need spec.img_seq_len, how many positions a tile becomes, or "
                "tokens_per_image in each sample"
            )
        return tiles, [count * spec.img_seq_len for count in tiles]
    if counts and not num_given:
        raise PackingError(f"tokens_per_image names {len(counts)} images, but there are none")
    return tiles, counts


def _num_tiles_said(sample: dict) -> int:
    """How many tiles a sample has whose images are made later."""
    tiles = as_ints(sample, "num_image_tiles")
    if tiles is None:
        raise PackingError(
            "images are a callable, so num_image_tiles has to say how many tiles they are"
        )
    return sum(tiles)


def as_ints(sample: dict, name: str) -> list[int] | None:
    """A sample's positive counts, from a list or a tensor ``[n]``."""
    values = sample.get(name)
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = values.tolist()
    is_right = isinstance(values, list | tuple) and {*map(type, values)} <= {int}
    if not is_right or (values and min(values) < 1):
        raise PackingError(f"{name} is {sample[name]!r}, expected positive ints [n]")
    return list(values)
