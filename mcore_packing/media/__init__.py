"""Images before the model: placement, counts, truncation and slicing that agree with each other."""

from .families import FAMILIES, MEGATRON_TURN_OPENERS, Family, get_family, register_family

__all__ = [
    "FAMILIES",
    "MEGATRON_TURN_OPENERS",
    "Family",
    "get_family",
    "register_family",
]
