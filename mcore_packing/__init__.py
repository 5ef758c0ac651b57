"""Packed multimodal sequences that are correct and fast in Megatron-Core."""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .context_parallel import alignment, cp_partition
from .errors import AmbiguousTruncation, BoundarySpaceError, PackingError, PlaceholderMismatch
from .expand import expand_embeddings, expand_labels
from .layout import PackedLayout, remap_cu_seqlens

if TYPE_CHECKING:  # what _LAZY imports later
    from . import attention as attention
    from . import cpu as cpu
    from . import data as data
    from . import media as media
    from . import parity as parity
    from .llava import find_llava as find_llava
    from .llava import install as install
    from .llava import layout_options as layout_options
    from .packed_seq import packed_seq_params as packed_seq_params
    from .packed_seq import remap_packed_seq_params as remap_packed_seq_params
    from .parity import token_mult_prob_error as token_mult_prob_error

__version__ = "0.1.0"

# What needs Megatron is imported when it is first used.
_LAZY = {
    "find_llava": "llava",
    "layout_options": "llava",
    "packed_seq_params": "packed_seq",
    "remap_packed_seq_params": "packed_seq",
    "install": "llava",
    "token_mult_prob_error": "parity",
    "attention": None,
    "cpu": None,
    "data": None,
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


def _load_kernels(folder: Path) -> None:
    """In a bare checkout ``mcore_packing.kernels`` is the folder beside this one; in a wheel it is
    inside. Named here, it is imported from there and once, whatever is on the path."""
    name = f"{__name__}.kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    globals()["kernels"] = sys.modules[name]


if not Path(__file__).with_name("kernels").is_dir():
    _load_kernels(Path(__file__).parents[1] / "kernels")


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = import_module(f"{__name__}.{_LAZY[name] or name}")
    return getattr(room, name) if _LAZY[name] else room


def __dir__():
    return sorted({*globals(), *__all__})
