"""Images before the model: placement, counts, truncation and slicing that agree with each other."""

from .families import FAMILIES, MEGATRON_TURN_OPENERS, Family, get_family, register_family
from .placement import Placement, place_image_blocks, splice_image_blocks

__all__ = [
    "FAMILIES",
    "MEGATRON_TURN_OPENERS",
    "Family",
    "Placement",
    "get_family",
    "place_image_blocks",
    "register_family",
    "splice_image_blocks",
]
