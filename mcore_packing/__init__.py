"""Packed multimodal sequences that are correct and fast in Megatron-Core."""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from . import vision
from .context_parallel import alignment, cp_partition
from .errors import AmbiguousTruncation, BoundarySpaceError, PackingError, PlaceholderMismatch
from .expand import expand_column, expand_embeddings, expand_labels
from .layout import PackedLayout, remap_cu_seqlens
from .space import find_space
from .spec import RowSpec

if TYPE_CHECKING:  # what _LAZY imports later
    from . import data as data
    from . import media as media
    from . import parity as parity
    from .megatron import attention as attention
    from .megatron import cpu as cpu
    from .megatron.find import find_llava as find_llava
    from .megatron.hook import install as install
    from .megatron.hook import unpacked as unpacked
    from .megatron.params import packed_seq_params as packed_seq_params
    from .megatron.params import remap_packed_seq_params as remap_packed_seq_params
    from .megatron.spec import row_spec as row_spec
    from .parity import token_mult_prob_error as token_mult_prob_error

__version__ = "0.2.0"

# What needs Megatron, or is large, is imported when it is first used: a module, or a name in one.
_LAZY = {
    "attention": "megatron.attention:",
    "cpu": "megatron.cpu:",
    "data": "data:",
    "find_llava": "megatron.find:find_llava",
    "install": "megatron.hook:install",
    "media": "media:",
    "packed_seq_params": "megatron.params:packed_seq_params",
    "parity": "parity:",
    "remap_packed_seq_params": "megatron.params:remap_packed_seq_params",
    "row_spec": "megatron.spec:row_spec",
    "token_mult_prob_error": "parity:token_mult_prob_error",
    "unpacked": "megatron.hook:unpacked",
}
_RENAMED = {
    "layout_options": "mp.row_spec(model) gives a RowSpec, which mp.PackedLayout.build and "
    "mp.data.pack take whole",
}

__all__ = [
    "AmbiguousTruncation",
    "BoundarySpaceError",
    "PackedLayout",
    "PackingError",
    "PlaceholderMismatch",
    "RowSpec",
    "alignment",
    "cp_partition",
    "expand_column",
    "expand_embeddings",
    "expand_labels",
    "find_space",
    "remap_cu_seqlens",
    "vision",
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
    if name in _RENAMED:
        raise PackingError(f"mcore_packing has no {name} any more: {_RENAMED[name]}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room, _, found = _LAZY[name].partition(":")
    room = import_module(f"{__name__}.{room}")
    return getattr(room, found) if found else room


def __dir__():
    return sorted({*globals(), *__all__})
