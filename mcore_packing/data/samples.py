"""What a sample is: its parts, read and checked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PackingError, PlaceholderMismatch
from ..spec import RowSpec
from .columns import Tokens, check_labels, check_tokens, kind_of, look_at


class EmptySample(PackingError):
    """A sample without tokens."""


class SampleTooLong(PackingError):
    """A sample that does not fit a row by itself."""


class Member(NamedTuple):
    """What a row remembers of one of its samples, beside tensors.

    Attributes:
        num_tokens: how long it is, collapsed.
        plain: what the sample had that is plain: numbers, text, and lists and dicts of them.
        tiles: how many entries of ``images`` it has, None where it has none.
        counts: what it had in tensors that the row knows otherwise, by name, with their dtypes.
        has_labels: whether it came with labels.
    """

    num_tokens: int
    plain: dict
    tiles: int | None
    counts: dict[str, torch.dtype]
    has_labels: bool


class Sample(NamedTuple):
    """A sample, taken apart.

    Attributes:
        ids: int64 ``[t]``.
        labels: int64 ``[t]``, not shifted, or None.
        images: ``[tiles, 3, h, w]``, or None.
        num_image_tiles: how many tiles each image has.
        tokens_per_image: how many positions each image becomes.
        left_out: what it has that no row takes.
        member: what a row remembers of it.
    """

    ids: Tensor
    labels: Tensor | None
    images: Tensor | None
    num_image_tiles: list[int]
    tokens_per_image: list[int]
    left_out: list[str]
    member: Member

    @property
    def num_positions(self) -> int:
        """How many positions it becomes, without alignment."""
        return self.ids.numel() - len(self.tokens_per_image) + sum(self.tokens_per_image)


COUNTS = ("num_image_tiles", "tokens_per_image")
_OF_ROWS = ("input_ids", "images", "labels")  # in tensors of the row
_PLAIN = {str, int, float, bool, bytes, type(None)}


def read(sample: dict, spec: RowSpec) -> Sample:
    """Take a sample apart. Everything is checked but values of its tokens: ``look`` does that, for
    many samples at once.

    Raises:
        EmptySample, PackingError: what is wrong with it.
        TypeError: no ``spec.img_seq_len`` where it is needed.
    """
    if not isinstance(sample, dict):
        raise PackingError(f"a sample is a {type(sample).__name__}, expected a dict")
    ids, labels, images = sample.get("input_ids"), sample.get("labels"), sample.get("images")
    if sample.get("loss_mask") is not None:
        raise PackingError(
            "a sample has a loss_mask, which could be shifted or not; give labels instead, -100 "
            "where nothing is trained"
        )
    if isinstance(ids, Tensor) and ids.numel() == 0:
        raise EmptySample("input_ids are empty")
    check_tokens("input_ids", ids)
    if labels is not None:
        check_tokens("labels", labels)
        if labels.numel() != ids.numel():
            raise PackingError(f"labels have {labels.numel()} entries, but input_ids {ids.numel()}")
    tiles, counts = _count(sample, images, spec)
    plain, dtypes, left_out = {}, {}, []
    for name, value in sample.items():
        if value is None or (name not in _OF_ROWS and is_plain(value)):
            plain[name] = value
        elif name in COUNTS:
            dtypes[name] = value.dtype
        elif name not in _OF_ROWS and not str(name).startswith("__"):  # a loader's own
            left_out.append(name)
    num_tiles = None if images is None else images.shape[0]
    member = Member(ids.numel(), plain, num_tiles, dtypes, labels is not None)
    return Sample(ids, labels, images, tiles, counts, left_out, member)


def look(samples: Sequence[Sample], ids: Tensor, labels: Tensor | None, spec: RowSpec) -> Tokens:
    """Look at the values of tokens and labels of samples, ``[T]`` one behind the other.

    Raises:
        PlaceholderMismatch: a sample has another number of placeholders than of images.
        PackingError: a label that is no token.
    """
    bounds = np.array([0, *(sample.member.num_tokens for sample in samples)]).cumsum()
    tokens = look_at(ids, labels, bounds, spec.image_token_id, spec.expands)
    if labels is not None:
        check_labels(tokens.ids, labels.cpu().numpy(), bounds, spec.image_token_id)
    for sample, found in zip(samples, tokens.placeholders_per_sample, strict=True):
        if found != len(sample.tokens_per_image):
            images = len(sample.tokens_per_image)
            raise PlaceholderMismatch(
                f"{found} placeholders (id {spec.image_token_id}) but {images} images; give every "
                f"image one placeholder",
                actual=images,
                expected=found,
            )
    return tokens


def is_plain(value) -> bool:
    """Whether a value is numbers or text, or lists and dicts of them."""
    if type(value) in _PLAIN:
        return True
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(one) for key, one in value.items())
    return isinstance(value, tuple(_PLAIN))


def _count(sample: dict, images, spec: RowSpec) -> tuple[list[int], list[int]]:
    """``num_image_tiles`` and ``tokens_per_image`` of a sample."""
    num_given = 0
    if images is not None:
        if not isinstance(images, Tensor) or images.dim() == 0:
            raise PackingError(
                f"images: found {kind_of(images)}, expected a tensor [tiles, 3, h, w] or None"
            )
        num_given = images.shape[0]
    counts, tiles = as_ints(sample, "tokens_per_image"), as_ints(sample, "num_image_tiles")
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
    if len(tiles) != len(counts):
        raise PackingError(
            f"num_image_tiles has {len(tiles)} entries, but tokens_per_image {len(counts)}"
        )
    return tiles, counts


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
