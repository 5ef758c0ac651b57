"""Packed against one by one: the same samples must give the same log-probabilities."""

from importlib import import_module
from typing import TYPE_CHECKING

from .metric import token_mult_prob_error

if TYPE_CHECKING:
    from .comparison import Comparison as Comparison
    from .comparison import compare as compare
    from .leaks import Isolation as Isolation
    from .leaks import Leak as Leak
    from .leaks import isolation as isolation
    from .runs import collate as collate
    from .runs import forward as forward
    from .runs import run_alone as run_alone
    from .runs import run_stage as run_stage
    from .verdict import Blind as Blind
    from .verification import SequenceError as SequenceError
    from .verification import Verification as Verification
    from .verification import verify as verify

# What needs Megatron, which the metric does not.
_LAZY = {
    "Blind": "verdict",
    "Comparison": "comparison",
    "Isolation": "leaks",
    "Leak": "leaks",
    "SequenceError": "verification",
    "Verification": "verification",
    "collate": "runs",
    "compare": "comparison",
    "forward": "runs",
    "isolation": "leaks",
    "run_alone": "runs",
    "run_stage": "runs",
    "verify": "verification",
}

__all__ = ["token_mult_prob_error", *_LAZY]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
