"""Images before the model: placement, counts, truncation and slicing that agree with each other."""

from .counts import check_placeholders, count_with_processor, num_image_tokens, num_video_tokens
from .families import FAMILIES, Family, get_family, register_family
from .placement import Placement, place_image_blocks, splice_image_blocks
from .slicing import split_samples, take_samples
from .truncation import Truncation, collapse, reconcile, truncate

__all__ = [
    "FAMILIES", "Family", "Placement", "Truncation", "check_placeholders", "collapse",
    "count_with_processor", "get_family", "num_image_tokens", "num_video_tokens",
    "place_image_blocks", "reconcile", "register_family", "splice_image_blocks", "split_samples",
    "take_samples", "truncate",
]  # fmt: skip
