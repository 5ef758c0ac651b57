"""Packed against one by one: the same samples must give the same log-probabilities."""

from importlib import import_module
from typing import TYPE_CHECKING

from .metric import token_mult_prob_error

if TYPE_CHECKING:
    from .comparison import Comparison as Comparison
    from .comparison import compare as compare
    from .runs import collate as collate
    from .runs import forward as forward
    from .runs import run_alone as run_alone
    from .runs import run_stage as run_stage
    from .verification import SequenceError as SequenceError
    from .verification import Verification as Verification
    from .verification import verify as verify

# What needs Megatron, which the metric does not.
_LAZY = {
    "Comparison": "comparison",
    "SequenceError": "verification",
    "Verification": "verification",
    "collate": "runs",
    "compare": "comparison",
    "forward": "runs",
    "run_alone": "runs",
    "run_stage": "runs",
    "verify": "verification",
}

__all__ = ["token_mult_prob_error", *_LAZY]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
