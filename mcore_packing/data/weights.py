"""How much each trained token counts, and the loss that Megatron's schedules take."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from ..errors import PackingError
from ..expand import expand_labels
from .rows import Row

LOSS_WEIGHTS = ("token", "sample", "square")


def weight_of(kind: str, num_trained: int) -> float:
    """Of each trained token of a sample: 1, ``1 / n``, or ``1 / sqrt(n)``; not scaled."""
    if kind == "token" or not num_trained:
        return 1.0
    return 1 / num_trained if kind == "sample" else 1 / sqrt(num_trained)


def scale_of(kind: str, trained: Sequence[int]) -> float:
    """What makes the mean weight of all trained tokens 1."""
    if kind == "token":  # then nobody needs to have counted
        return 1.0
    total = sum(number * weight_of(kind, number) for number in trained)
    return sum(trained) / total if total else 1.0


def loss_func(
    loss: Tensor, row: Row, cp_rank: int | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The objective of a row: what Megatron's schedules take of a loss function.

    They divide by the number of trained tokens, of the row or of the whole batch. That is not the
    sum of the loss mask, which Megatron's own loss functions round to an int: with weights it is no
    number of tokens, and where they are below 1 it may be 0.

    Args:
        loss: ``[1, S]``, of each position, as the model gives it: the first of what ``LLaVAModel``
            returns, or what a ``GPTModel`` does.
        row: that the model was given.
        cp_rank: under context parallelism, whose positions ``loss`` is of: ``[1, S / cp]``.

    Returns:
        The sum of ``weight * loss``, in fp32 (fp64 stays); how many tokens are trained, int32; and
        both, detached, as "lm loss".

    Raises:
        PackingError: ``loss`` has another number of positions than the row, or than the rank.

    Example:
        .. code-block:: python

            def forward_step(iterator, model):
                row = next(iterator)
                loss, _ = model(**row.inputs())
                return loss, partial(mp.data.loss_func, row=row)
    """
    layout, cp_size = row.layout, row.layout.spec.cp_size if cp_rank is not None else 1
    mask = row.loss_mask[0]
    if layout.spec.expands:
        _, mask = expand_labels(layout, None, mask, cp_size=cp_size, cp_rank=cp_rank or 0)
    elif cp_rank is not None:
        mask = mask.index_select(0, row.positions_of(cp_rank))
    if loss.numel() != mask.numel():
        said = "say cp_rank" if cp_rank is None else f"of rank {cp_rank} of {cp_size}"
        raise PackingError(
            f"loss has {loss.numel()} positions, expected {mask.numel()} of a row of "
            f"{layout.num_expanded}: under context parallelism {said}"
        )
    dtype = torch.promote_types(loss.dtype, torch.float32)
    total = (loss.reshape(-1).to(dtype) * mask.to(dtype)).sum()
    if cp_rank is None:
        count = torch.full((), row.num_trained, dtype=torch.int, device=loss.device)
    else:
        count = (mask > 0).sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.to(dtype)])}
