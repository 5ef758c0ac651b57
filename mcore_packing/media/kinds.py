"""Lists, tensors and arrays in, the same kind out: what the rooms of this package share."""

from collections.abc import Sequence
from itertools import chain, pairwise
from numbers import Integral
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PackingError

_INTS = {"int64", "int32", "int16", "int8", "uint32", "uint16", "uint8"}  # an int64 holds them


def require(condition: Any, message: str) -> None:
    """What a caller has to see to, in a sentence."""
    if not condition:
        raise PackingError(message)


def as_int(value: Any, name: str, minimum: int | None = None) -> int:
    """``value`` as a Python int; floats, strings and bools are refused, never rounded."""
    try:
        number = _index(value)
    except TypeError:
        raise PackingError(f"{name} is {value!r}, expected an int") from None
    if minimum is not None and number < minimum:
        raise PackingError(f"{name} is {number}, expected at least {minimum}")
    return number


def _index(value: Any) -> int:
    """``operator.index``, but a bool is no index: a mask would be read as zeros and ones."""
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
        raise TypeError
    return index(value)


def as_flag(value: Any, name: str) -> bool:
    """A switch; the string "false" and arrays are none, and would be true or crash."""
    known = value is None or isinstance(value, bool)
    require(known, f"{name} is {value!r}, expected True or False")
    return bool(value)


def as_list(values: Any, name: str) -> list:
    """The entries of anything that has some: of a tensor or array plain numbers."""
    try:
        return values.tolist() if getattr(values, "shape", None) else list(values)
    except TypeError:
        raise PackingError(f"{name} is {values!r}, expected a list") from None


def nested(value: Any) -> bool:
    """Whether an entry has entries itself; a 0-d tensor has none, for all its ``__len__``."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def as_row(values: Any, name: str) -> list:
    """``as_list``, but a tensor or array has to be ``[T]`` or ``[1, T]``."""
    if getattr(values, "shape", None) is None:
        return as_list(values, name)
    return _flat(values, name).tolist()


def _flat(values: Any, name: str) -> Any:
    """A tensor or array of one row as ``[T]``."""
    shape = values.shape
    fits = len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)
    require(fits, f"{name} is {list(shape)}, expected one row, [T] or [1, T]")
    return values.reshape(-1)


def as_ids(values: Any, name: str, minimum: int | None = None) -> list[int]:
    """The ints of one row: a flat sequence, or a tensor or array ``[T]`` or ``[1, T]``."""
    sequence = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    found = f"{name} is a {type(values).__name__}"
    require(sequence or hasattr(values, "shape"), f"{found}, expected one row of ints")
    ids = row = as_row(values, name)
    types = {*map(type, row)}
    if types - {int}:  # one by one only where something else than a Python int is among them
        try:
            ids = [_index(value) for value in row]
        except TypeError:
            found = " or ".join(sorted({one.__name__ for one in types} - {"int"}))
            raise PackingError(f"{name} holds a {found}, expected one row of ints") from None
    if minimum is not None and ids and min(ids) < minimum:
        i, value = next((i, value) for i, value in enumerate(ids) if value < minimum)
        raise PackingError(f"{name}[{i}] is {value}, expected at least {minimum}")
    return ids


def as_id_array(values: Any, name: str) -> np.ndarray:
    """``as_ids`` as an int64 array; of Python ints where one is too large for that.

    A tensor or array of ints is only looked at as a whole, never one token after the other. It may
    share the memory of ``values``.
    """
    # A subclass may mean something else, as a masked array does.
    if type(values) in (Tensor, np.ndarray, np.memmap) and _of_ints(values):
        row = _flat(values, name)
        row = row.numpy(force=True) if isinstance(row, Tensor) else np.asarray(row)
        return row.astype(np.int64, copy=False)
    ids = as_ids(values, name)
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        return np.array(ids, dtype=object)


def _of_ints(values: Any) -> bool:
    """Whether it has a dtype of which an int64 holds every entry."""
    return str(getattr(values, "dtype", "")).removeprefix("torch.") in _INTS


def as_boundaries(cu_seqlens: Any, num_tokens: int) -> list[int]:
    """Collapsed boundaries of a row of ``num_tokens``; all of the row where there are none."""
    bounds = [0, num_tokens] if cu_seqlens is None else as_ids(cu_seqlens, "cu_seqlens")
    first = next(iter(bounds), None)
    require(first == 0, f"cu_seqlens starts at {first}, expected 0")
    for seq, (start, stop) in enumerate(pairwise(bounds)):
        require(start <= stop, f"sequence {seq}: cu_seqlens goes from {start} back to {stop}")
    found = f"cu_seqlens ends at {bounds[-1]}"
    require(bounds[-1] <= num_tokens, f"{found}, past the end of the row at {num_tokens}")
    return bounds


def with_tail(bounds: list[int], num_tokens: int) -> list[int]:
    """Boundaries with what lies behind the last one as a further sequence, where there is any."""
    return [*bounds, num_tokens] if bounds[-1] < num_tokens else bounds


def holds_ints(values: Any) -> bool:
    """Whether all entries of a list, tensor or array are ints; bools are none."""
    if hasattr(values, "dtype"):
        return "int" in str(values.dtype)
    return all(isinstance(value, Integral) and not isinstance(value, bool) for value in values)


def check_fits(values: Sequence, dtype: Any) -> None:
    """Refuse what a small integer dtype of torch or NumPy would wrap around."""
    if len(values) and "int" in str(dtype):
        limits = torch.iinfo(dtype) if isinstance(dtype, torch.dtype) else np.iinfo(dtype)
        array = isinstance(values, np.ndarray)
        ends = (values.min(), values.max()) if array else (min(values), max(values))
        for value in ends:
            fits = limits.min <= value <= limits.max
            require(fits, f"{value} does not fit {dtype}; pass a wider one")


def like(template: Any, values: list | np.ndarray, dtype: torch.dtype | None = None) -> Any:
    """``values`` as what ``template`` is: list, tuple, tensor, array; of its dtype or ``dtype``."""
    if isinstance(values, np.ndarray) and not _of_ints(template):
        values = values.tolist()
    if not hasattr(template, "__array__"):
        return tuple(values) if isinstance(template, tuple) else values
    dtype = dtype or template.dtype
    check_fits(values, dtype)
    if isinstance(template, Tensor):
        made = torch.tensor(values, dtype=dtype, device=template.device)
    else:
        made = np.asarray(values, dtype=np.int64 if dtype is torch.int64 else dtype)
    return made[None] if template.ndim == 2 else made


def like_ids(template: Any, values: list[int] | np.ndarray) -> Any:
    """``like`` for ids, which are ints even where the template is empty and was made of floats."""
    known = not hasattr(template, "__array__") or holds_ints(template)
    return like(template, values, None if known else torch.int64)


def length(values: Any, name: str) -> int:
    """The first dimension of a tensor, an array or a list."""
    sized = nested(values) and (hasattr(values, "shape") or isinstance(values, (list, tuple)))
    kind = "a scalar" if hasattr(values, "shape") else f"a {type(values).__name__}"
    require(sized, f"{name} is {kind}, expected a tensor, an array or a list")
    return len(values)


def take_spans(values: Any, spans: Sequence[Sequence[int]]) -> Any:
    """The entries in ``[start, stop)`` spans, in the order of the spans; a view where they
    adjoin."""
    parts = [values[start:stop] for start, stop in merge_spans(spans)] or [values[:0]]
    if len(parts) == 1:
        return parts[0]
    if isinstance(values, (list, tuple)):
        return type(values)(chain(*parts))
    return torch.cat(parts) if isinstance(values, Tensor) else np.concatenate(parts)


def merge_spans(spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same entries in as few spans as their order allows, none of them empty."""
    merged: list[list[int]] = []
    for start, stop in spans:
        if start < stop and merged and merged[-1][1] == start:
            merged[-1][1] = stop
        elif start < stop:
            merged.append([start, stop])
    return merged


def shorten(values: Sequence, limit: int = 8) -> str:
    """A list for an error message: all of it, or its first few entries and its length."""
    if len(values) <= limit:
        return str(list(values))
    head = ", ".join(str(value) for value in values[:limit])
    return f"[{head}, ... {len(values)} in all]"
