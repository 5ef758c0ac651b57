"""What samples have for each of their tokens, and what of it is trained."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PackingError
from ..expand import Column
from ..reference import IGNORE_INDEX, steps_of

OWN = ("input_ids", "labels", "loss_mask", "attention_mask", "position_ids")  # no columns


class Tokens(NamedTuple):
    """The tokens of samples one behind the other, on the host.

    Attributes:
        ids: int64 ``[T]``.
        bounds: ``[B + 1]``, where each sample begins, and ``T``.
        placeholders_per_sample: ``[B]``, how many tokens of each stand for images and videos.
        labels: int64 ``[T]``, shifted inside each sample.
        trains: bool ``[T]``, where the loss counts, shifted likewise.
        trained_per_sample: ``[B]``, how many tokens of each sample are trained.
    """

    ids: np.ndarray
    bounds: np.ndarray
    placeholders_per_sample: list[int]
    labels: np.ndarray
    trains: np.ndarray
    trained_per_sample: list[int]


def look_at(
    ids: Tensor,
    given: Tensor | None,
    bounds: np.ndarray,
    placeholders: Sequence[int],
    expands: bool,
) -> Tokens:
    """Shift labels inside each sample, and say what is trained.

    Args:
        ids: int64 ``[T]``, of samples that have a token or more each.
        given: int64 ``[T]``, labels that are not shifted; by default the tokens themselves.
        bounds: ``[B + 1]``.
        placeholders: the ids that stand for images and videos. They are never trained.
        expands: whether the model replaces placeholders, and so does not train the token behind
            each either.

    Raises:
        PackingError: a label that is no token.
    """
    ids = ids.cpu().numpy()
    own = ids if given is None else given.cpu().numpy()
    is_placeholder = ids == placeholders[0]
    for token in placeholders[1:]:
        is_placeholder |= ids == token
    if given is not None:
        _check(own, is_placeholder, bounds, placeholders)
    where = is_placeholder.nonzero()[0]
    starts = bounds[:-1]
    labels = np.empty_like(own)
    labels[:-1] = own[1:]
    labels[starts - 1] = IGNORE_INDEX  # the last of each sample; that of the row by index -1
    if where.size:
        labels[where - 1] = IGNORE_INDEX
    trains = labels != IGNORE_INDEX
    if expands and where.size:
        trains[where] = False
    return Tokens(
        ids,
        bounds,
        steps_of(where.searchsorted(bounds)).tolist(),
        labels,
        trains,
        np.add.reduceat(trains, starts, dtype=np.int64).tolist(),
    )


def _check(labels: np.ndarray, is_placeholder: np.ndarray, bounds: np.ndarray, placeholders):
    """Refuse labels that are no tokens: negative ones but -100, and the placeholders' at a token
    that is none. (Megatron's loss reads garbage at -200, in silence.)"""
    is_wrong, is_text = (labels < 0) & (labels != IGNORE_INDEX), ~is_placeholder
    for token in placeholders:
        np.copyto(is_wrong, is_text, where=labels == token)
    if not is_wrong.any():
        return
    at = int(is_wrong.argmax())
    begin = bounds[bounds.searchsorted(at, side="right") - 1]
    found = f"label {at - begin} is {labels[at]}"
    if labels[at] in placeholders:
        found += ", the placeholder of an image, at a token that is none"
    raise PackingError(f"{found}, expected a token id, or {IGNORE_INDEX} where nothing is trained")


def as_columns(columns: Mapping | None) -> dict[str, Column]:
    """``{name: Column}``; a bare value is what the column is filled with."""
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise PackingError(f"columns is {columns!r}, expected mp.data.Column by name")
    for name in columns:
        if name in OWN:
            raise PackingError(f"columns name {name!r}, which rows have already")
    return {
        name: column if isinstance(column, Column) else Column(column)
        for name, column in columns.items()
    }


def join_column(values: Sequence[Tensor | None], lengths: Sequence[int], column: Column) -> Tensor:
    """``[T, ...]`` of what samples have, and of the filling where one has nothing."""
    known = next(value for value in values if value is not None)
    return torch.cat(
        [
            known.new_full((length, *known.shape[1:]), column.fill) if value is None else value
            for value, length in zip(values, lengths, strict=True)
        ]
    )


def check_tokens(name: str, tensor) -> None:
    """Refuse what is not int64 ``[t]``."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise PackingError(f"{name}: found {kind_of(tensor)}, expected torch.int64 [t]")


def kind_of(value) -> str:
    """What was found, in a few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
