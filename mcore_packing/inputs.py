"""What callers may pass: each contract said once, for everything that takes it."""

from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from .errors import INT32_MAX, PackingError


def may_look(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing."""
    return tensor.device.type == "cpu"


def fits_int32(tensor: Tensor) -> bool:
    """Whether int32 holds all of its integers."""
    if tensor.dtype == torch.int32:
        return True
    values = tensor.cpu().numpy()  # torch takes four times as long for a few thousand
    return bool((values.astype(np.int32) == values).all())


def as_int(value, name: str) -> int:
    """An int, of any kind but bool."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise PackingError(f"{name} is {value!r}, expected an int")
    return int(value)


def as_positive(value, name: str) -> int:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise PackingError(f"{name} is {value!r}, expected a positive int")
    return int(value)


def as_size(value, name: str, multiple: int = 1) -> int | None:
    """A number of positions that ``multiple`` divides, or None."""
    if value is None:
        return None
    if as_int(value, name) < 0 or value % multiple:
        raise PackingError(f"{name} is {value!r}, expected a multiple of {multiple} positions")
    return int(value)


def as_choice(value, name: str, choices: Sequence[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise PackingError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
    return value


def as_row(tensor: Tensor, name: str, length: int | None = None, floating: bool = False) -> Tensor:
    """``[T]`` from ``[T]`` or ``[1, T]``: int32 or int64, unless ``floating``; of ``length``."""
    if not isinstance(tensor, Tensor):
        raise PackingError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if not floating and tensor.dtype not in (torch.int32, torch.int64):
        # A placeholder of -200, or an ignored label of -100, would wrap around in a smaller one.
        raise PackingError(f"{name} is {tensor.dtype}, expected int64 or int32 integers")
    if tensor.is_meta:
        raise PackingError(f"{name} is on the meta device: it has a shape, but no values")
    shape = list(tensor.shape)
    if tensor.dim() == 2 and shape[0] == 1:
        tensor = tensor[0]
    elif tensor.dim() != 1:
        raise PackingError(f"{name} is {shape}, expected one packed row, [T] or [1, T]")
    if tensor.numel() == 0:
        raise PackingError(f"{name} is empty")
    if length is not None and tensor.numel() != length:
        raise PackingError(f"{name} has {tensor.numel()} entries, but the row has {length} tokens")
    return tensor.contiguous()


def as_boundaries(cu_seqlens, name: str, like: Tensor | None = None, length=None) -> Tensor:
    """int32 ``[B + 1]``, with ``length`` entries, on the device of ``like``."""
    if not isinstance(cu_seqlens, Tensor):
        raise PackingError(f"{name} is a {type(cu_seqlens).__name__}, expected an int32 tensor")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise PackingError(
            f"{name} is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected torch.int32 [B + 1]"
        )
    if cu_seqlens.numel() < 2:
        raise PackingError(f"{name} has {cu_seqlens.numel()} entries, expected B + 1 with B >= 1")
    if length is not None and cu_seqlens.numel() != length:
        raise PackingError(
            f"{name} has {cu_seqlens.numel()} entries, expected {length} like cu_seqlens"
        )
    if like is not None and cu_seqlens.device != like.device:
        raise PackingError(
            f"{name} is on {cu_seqlens.device}, but input_ids on {like.device}; move it there"
        )
    if cu_seqlens.is_meta:
        raise PackingError(f"{name} is on the meta device: it has a shape, but no values")
    return cu_seqlens.contiguous()


def as_tokens_per_image(
    tokens_per_image, input_ids: Tensor, num_seqs: int
) -> tuple[Tensor, tuple[int, ...] | None]:
    """``[N]`` on the row's device, and how many entries each sequence has, where it was given as
    one list of ints per sequence."""
    images_per_seq = None
    if not isinstance(tokens_per_image, Tensor):
        entries, images_per_seq = _flatten(tokens_per_image, num_seqs)
        tokens_per_image = torch.tensor(entries, dtype=torch.int64, device=input_ids.device)
    dtype = tokens_per_image.dtype
    is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if not is_integer or tokens_per_image.dim() != 1:
        raise PackingError(
            f"tokens_per_image is {dtype} {list(tokens_per_image.shape)}, expected integers [N]"
        )
    if tokens_per_image.device != input_ids.device:
        raise PackingError(
            f"tokens_per_image is on {tokens_per_image.device}, but input_ids on "
            f"{input_ids.device}; move it there"
        )
    return tokens_per_image.contiguous(), images_per_seq


def _flatten(tokens_per_image, num_seqs: int) -> tuple[list[int], tuple[int, ...] | None]:
    """Ints from a list of ints or of one list per sequence, and how many each of those has."""
    expected = "expected integers [N], or one list of ints per sequence"
    is_text = isinstance(tokens_per_image, str | bytes)
    if is_text or not hasattr(tokens_per_image, "__iter__"):
        raise PackingError(f"tokens_per_image is {tokens_per_image!r}, {expected}")
    entries = [x.tolist() if hasattr(x, "tolist") else x for x in tokens_per_image]
    is_list = [isinstance(entry, list | tuple) for entry in entries]
    images_per_seq = None
    if any(is_list):
        if not all(is_list):
            raise PackingError(f"tokens_per_image mixes ints and lists: {entries}, {expected}")
        if len(entries) != num_seqs:
            raise PackingError(
                f"tokens_per_image has {len(entries)} lists, but cu_seqlens {num_seqs} sequences"
            )
        images_per_seq = tuple(map(len, entries))
        entries = [count for sequence in entries for count in sequence]
    for image, entry in enumerate(entries):
        if isinstance(entry, bool) or not isinstance(entry, Integral):
            raise PackingError(f"tokens_per_image is {entries}, expected ints")
        if abs(entry) > INT32_MAX:
            raise PackingError(f"image {image}: tokens_per_image is {entry}, more than int32 holds")
    return entries, images_per_seq


def refuse_old(function: str, given: Mapping[str, object], renamed: Mapping[str, str]) -> None:
    """Raise for keywords that ``function`` does not take, with the new name of those it took in
    0.1."""
    for name in given:
        if name in renamed:
            raise PackingError(f"{function} takes no {name}= any more: {renamed[name]}")
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
