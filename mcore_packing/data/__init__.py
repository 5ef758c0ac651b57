"""Samples into packed rows, their layouts, and back."""

from importlib import import_module

from .algorithms import ALGORITHMS
from .columns import Column
from .packer import Packer, Rows, get_packer, pack
from .report import Refused, Report, Truncated
from .rows import Row, split
from .samples import EmptySample, Length, SampleTooLong, UntrainedSample, WrongLength
from .weights import loss_func

__all__ = [
    "ALGORITHMS",
    "Column",
    "EmptySample",
    "Length",
    "Packer",
    "Refused",
    "Report",
    "Row",
    "Rows",
    "SampleTooLong",
    "Truncated",
    "UntrainedSample",
    "WrongLength",
    "get_packer",
    "loss_func",
    "pack",
    "split",
]


def __getattr__(name):
    if name == "energon":  # needs megatron-energon
        return import_module(f"{__name__}.energon")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
