"""Samples into packed rows, their layouts, and back."""

from .algorithms import ALGORITHMS
from .report import Refused, Report
from .rows import EmptySample, Packer, Row, Rows, SampleTooLong, get_packer, pack, split

__all__ = [
    "ALGORITHMS",
    "EmptySample",
    "Packer",
    "Refused",
    "Report",
    "Row",
    "Rows",
    "SampleTooLong",
    "get_packer",
    "pack",
    "split",
]
