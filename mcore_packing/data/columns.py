"""What samples have for each of their tokens, and what of it is trained."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PackingError
from ..reference import IGNORE_INDEX, steps_of


class Tokens(NamedTuple):
    """The tokens of samples one behind the other, on the host.

    Attributes:
        ids: int64 ``[T]``.
        bounds: ``[B + 1]``, where each sample begins, and ``T``.
        placeholders: int64 ``[N]``, which tokens are placeholders.
        placeholders_per_sample: ``[B]``.
        labels: int64 ``[T]``, shifted inside each sample.
        trains: bool ``[T]``, where the loss counts, shifted likewise.
        trained_per_sample: ``[B]``, how many tokens of each sample are trained.
    """

    ids: np.ndarray
    bounds: np.ndarray
    placeholders: np.ndarray
    placeholders_per_sample: list[int]
    labels: np.ndarray
    trains: np.ndarray
    trained_per_sample: list[int]


def look_at(
    ids: Tensor, given: Tensor | None, bounds: np.ndarray, token: int, expands: bool
) -> Tokens:
    """Shift labels inside each sample, and say what is trained.

    Args:
        ids: int64 ``[T]``, of samples that have a token or more each.
        given: int64 ``[T]``, labels that are not shifted; by default the tokens themselves.
        bounds: ``[B + 1]``.
        token: the placeholder. What it stands for is never trained.
        expands: whether the model replaces placeholders, and so does not train the token behind
            each either.
    """
    ids = ids.cpu().numpy()
    own = ids if given is None else given.cpu().numpy()
    is_placeholder = ids == token
    placeholders = is_placeholder.nonzero()[0]
    starts = bounds[:-1]
    labels = np.empty_like(own)
    labels[:-1] = own[1:]
    labels[starts - 1] = IGNORE_INDEX  # the last of each sample; that of the row by index -1
    if placeholders.size:
        labels[placeholders - 1] = IGNORE_INDEX
    trains = labels != IGNORE_INDEX
    if expands and placeholders.size:
        trains[placeholders] = False
    return Tokens(
        ids,
        bounds,
        placeholders,
        steps_of(placeholders.searchsorted(bounds)).tolist(),
        labels,
        trains,
        np.add.reduceat(trains, starts, dtype=np.int64).tolist(),
    )


def check_labels(ids: np.ndarray, labels: np.ndarray, bounds: np.ndarray, token: int) -> None:
    """Refuse labels that are no tokens: negative ones, but for -100 and those of placeholders.

    Raises:
        PackingError: names the first, by its place in its sample.
    """
    if labels.min() >= 0:
        return
    wrong = (labels < 0) & (labels != IGNORE_INDEX) & (labels != token)
    if not wrong.any():
        return
    at = int(wrong.argmax())
    begin = bounds[bounds.searchsorted(at, side="right") - 1]
    raise PackingError(
        f"label {at - begin} is {labels[at]}, expected a token id, or {IGNORE_INDEX} where nothing "
        f"is trained"
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
