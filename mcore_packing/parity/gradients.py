"""Gradients of the same targets, packed and one by one, part by part of the model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from .noise import Size, judge, stands_out
from .verdict import INCONCLUSIVE, RIGHT

# What a training loop hangs onto a config: none of it may see these gradients.
_OF_TRAINING = (
    "finalize_model_grads_func",
    "grad_scale_func",
    "grad_sync_func",
    "no_sync_func",
    "param_sync_func",
)


@dataclass(frozen=True)
class GradientError:
    """How far the gradients of a part of the model are apart, in one data-parallel replica.

    Attributes:
        replica: its data-parallel rank.
        part: the tower, the projector, the language model: what the model calls it.
        relative_difference: the norm of the difference over that of the gradient one by one.
        cosine: of the angle between both.
        floor: the relative difference that rounding alone makes.
        verdict: what that means; inconclusive also where dropped boundaries would not be seen.
    """

    replica: int
    part: str
    relative_difference: float
    cosine: float
    floor: float
    verdict: str

    def __str__(self) -> str:
        return (
            f"gradient of {self.part} in replica {self.replica}: relative difference "
            f"{self.relative_difference:.2e}, cosine {self.cosine:.6f}; rounding makes "
            f"{self.floor:.2e}"
        )


class _Sums(NamedTuple):
    """Squares and products over the parameters of a part."""

    difference: float = 0.0
    packed: float = 0.0
    alone: float = 0.0
    product: float = 0.0
    packed_noise: float = 0.0
    alone_noise: float = 0.0
    dropped: float = 0.0

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))


class Gradients:
    """The gradients of a model, borrowed: afterwards they are what they were.

    Takes a copy of all of them, one more for what a run adds up, and on the CPU one for every run.

    Args:
        chunks: of the model.
        config: Megatron's.
    """

    def __init__(self, chunks: Sequence, config):
        self.chunks, self.config = chunks, config
        for module in (module for chunk in chunks for module in chunk.modules()):
            if hasattr(module, "reshard"):  # FSDP2: else some of its parameters are not the job's
                module.reshard()
        self.parameters = list(_parameters(chunks))

    @contextlib.contextmanager
    def borrowed(self):
        """Nothing of the training loop runs, and nothing is reduced, inside of this."""
        hung = {name: getattr(self.config, name) for name in _OF_TRAINING}
        before = [(p, p.grad, getattr(p, "main_grad", None)) for _, p in self.parameters]
        kept = [None if main is None else main.clone() for *_, main in before]
        fused = [getattr(p, "grad_added_to_main_grad", None) for _, p in self.parameters]
        with contextlib.ExitStack() as stack:
            for name in _OF_TRAINING:
                setattr(self.config, name, None)
            for chunk in self.chunks:
                if hasattr(chunk, "no_sync"):
                    stack.enter_context(chunk.no_sync())
            try:
                yield
            finally:
                for name, value in hung.items():
                    setattr(self.config, name, value)
                for (parameter, grad, main), copy, flag in zip(before, kept, fused, strict=True):
                    parameter.grad = grad
                    if main is not None:
                        main.copy_(copy)
                    if flag is not None:
                        parameter.grad_added_to_main_grad = flag

    def of(self, *runs: Callable) -> list[Tensor]:
        """What forward and backward passes give, added up in fp32, over the ranks of one row too;
        on the CPU."""
        total = [torch.zeros(()) for _ in self.parameters]
        for run in runs:
            for _, parameter in self.parameters:
                parameter.grad = None
                if getattr(parameter, "main_grad", None) is not None:
                    parameter.main_grad.zero_()
            run()
            found = (_local(parameter) for _, parameter in self.parameters)
            total = [sum_ + one for sum_, one in zip(total, found, strict=True)]
        return [_whole(p, grad).cpu() for (_, p), grad in zip(self.parameters, total, strict=True)]

    def sums(self, found: "Found") -> dict[str, _Sums]:
        """Of each part of the model, what this rank counts."""
        sums = {}
        for (part, parameter), *five in zip(self.parameters, *found, strict=True):
            if _counts(parameter):
                a, b, n, m, d = (gradient.double() for gradient in five)
                # A gradient is rounded itself, before anybody adds it up.
                own = torch.finfo(parameter.dtype).eps ** 2 * b.square()
                one = _Sums(
                    difference=(a - b).square().sum().item(),
                    packed=a.square().sum().item(),
                    alone=b.square().sum().item(),
                    product=(a * b).sum().item(),
                    packed_noise=((n - a).square() + own).sum().item(),
                    alone_noise=((m - b).square() + own).sum().item(),
                    dropped=(d - b).square().sum().item(),
                )
                sums[part] = sums.get(part, _Sums()) + one
        return sums


class Found(NamedTuple):
    """Gradients of every run: as ``Gradients.of`` gives them."""

    packed: list
    alone: list
    packed_noise: list
    alone_noise: list
    dropped: list


def compare_sums(everyones: Iterable[tuple[int, dict[str, _Sums]]]) -> tuple[GradientError, ...]:
    """The parts of each replica, from what its ranks counted."""
    totals = {}
    for replica, sums in everyones:
        for part, one in sums.items():
            totals[replica, part] = totals.get((replica, part), _Sums()) + one
    return tuple(
        _error(replica, part, total)
        for (replica, part), total in sorted(totals.items())
        if total.alone or total.packed
    )


def _error(replica: int, part: str, total: _Sums) -> GradientError:
    tiny = torch.finfo(torch.float64).tiny
    difference = (total.difference / max(total.alone, tiny)) ** 0.5
    floor = (max(total.packed_noise, total.alone_noise) / max(total.packed, tiny)) ** 0.5
    dropped = (total.dropped / max(total.alone, tiny)) ** 0.5
    found = Size(difference, difference)
    verdict = judge(found, Size(floor, floor))
    if verdict == RIGHT and not stands_out(Size(dropped, dropped), found):
        verdict = INCONCLUSIVE
    return GradientError(
        replica=replica,
        part=part,
        relative_difference=difference,
        cosine=total.product / max(total.packed * total.alone, tiny) ** 0.5,
        floor=floor,
        verdict=verdict,
    )


def _parameters(chunks) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What is trained, and the part of the model that it belongs to."""
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                yield name.partition(".")[0], parameter


def _local(parameter) -> Tensor:
    """The gradient that this rank has, fp32."""
    gradient = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if gradient is None else gradient
    if gradient is None:
        gradient = torch.zeros_like(parameter.data)  # others may have one
    if hasattr(gradient, "to_local"):  # FSDP2
        gradient = gradient.to_local()
    return gradient.detach().float()


def _whole(parameter, gradient: Tensor) -> Tensor:
    """A gradient, as DDP and ``finalize_model_grads`` would sum it over the ranks of one row."""
    is_shared = getattr(parameter, "allreduce", True)  # not that of an expert
    if is_shared and parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
    if getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient


def _counts(parameter) -> bool:
    """Whether this rank is the one that counts a parameter which several have."""
    if parallel_state.get_context_parallel_rank() and getattr(parameter, "allreduce", True):
        return False
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return is_split or parallel_state.get_tensor_model_parallel_rank() == 0
