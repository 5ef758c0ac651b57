"""Packed multimodal sequences that are correct and fast in Megatron-Core."""

from importlib import import_module
from pathlib import Path

from .context_parallel import alignment, cp_partition
from .errors import AmbiguousTruncation, BoundarySpaceError, PackingError, PlaceholderMismatch
from .layout import PackedLayout, expand_embeddings, expand_labels, remap_cu_seqlens

__version__ = "0.1.0"

# What needs Megatron is imported when it is first used.
_LAZY = {
    "boundaries": "packed_seq",
    "packed_seq_params": "packed_seq",
    "remap_packed_seq_params": "packed_seq",
    "install": "llava",
    "token_mult_prob_error": "parity",
    "attention": None,
    "cpu": None,
    "media": None,
    "parity": None,
}

__all__ = [
    "AmbiguousTruncation",
    "BoundarySpaceError",
    "PackedLayout",
    "PackingError",
    "PlaceholderMismatch",
    "alignment",
    "cp_partition",
    "expand_embeddings",
    "expand_labels",
    "remap_cu_seqlens",
    *_LAZY,
]

# In a bare checkout ``mcore_packing.kernels`` is the folder beside this one; in a wheel it is
# inside.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = import_module(f"{__name__}.{_LAZY[name] or name}")
    return getattr(room, name) if _LAZY[name] else room


def __dir__():
    return sorted({*globals(), *__all__})
