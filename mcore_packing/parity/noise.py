"""How far a result moves by rounding alone, and what stands out from that."""

import contextlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import Tensor

from .verdict import INCONCLUSIVE, RIGHT, WRONG

WITHIN, ABOVE = 2, 3  # times the floor can still be rounding, and no more
FP8_EPS = 2**-4


class Size(NamedTuple):
    """How large differences are: the largest, and their root mean square."""

    max: float = 0.0
    rms: float = 0.0

    @classmethod
    def of(cls, differences: Tensor) -> "Size":
        if not differences.numel():
            return cls()
        return cls(differences.max().item(), differences.square().mean().sqrt().item())

    def exceeds(self, other: "Size", times: float = 1) -> bool:
        """Whether either is more than so many times the other's; what is not finite is."""
        return not (self.max <= times * other.max and self.rms <= times * other.rms)


def judge(found: Size, floor: Size) -> str:
    """What differences mean, where rounding makes differences as large as ``floor``."""
    if found.exceeds(floor, ABOVE):
        return WRONG
    return INCONCLUSIVE if found.exceeds(floor, WITHIN) else RIGHT


def stands_out(control: Size, found: Size) -> bool:
    """Whether a known fault makes clearly more than what was found: else it could be in there."""
    return control.exceeds(found, ABOVE)


def largest(sizes: Iterable[Size]) -> Size:
    """The largest of each."""
    sizes = [Size(), *sizes]
    return Size(max(size.max for size in sizes), max(size.rms for size in sizes))


def differences(a: Tensor, b: Tensor) -> Tensor:
    """``|a - b|``; what is nan in both, or the same infinity, is the same."""
    return (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0)


@contextlib.contextmanager
def rounded_otherwise(chunks, config):
    """Models that round otherwise: what their embedding and each of their layers give is off by one
    unit in the last place, up or down at random, the same on all ranks.

    Another order of summation, another kernel or another batch does no more than that.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(module, args, outputs):
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        signs = torch.randint(0, 2, first.shape, generator=generator).to(first) * 2 - 1
        first = first * (1 + _eps(first.dtype, config) * signs)
        return (first, *outputs[1:]) if isinstance(outputs, tuple) else first

    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            for name, module in chunk.named_modules():
                is_layer = re.search(r"\blayers\.\d+$", name)
                if is_layer or isinstance(module, LanguageModelEmbedding):
                    stack.callback(module.register_forward_hook(disturb).remove)
        yield


def _eps(dtype: torch.dtype, config) -> float:
    """One unit in the last place of the lowest precision that a layer computes in."""
    if getattr(config, "fp8", None):
        return FP8_EPS
    return max(torch.finfo(dtype).eps, torch.finfo(config.params_dtype).eps)
