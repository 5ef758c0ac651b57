"""What differs between Megatron-Core releases, in one table; the functions below read it."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import __version__ as MCORE_VERSION
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from .errors import PackingError

# What every ``LLaVAModel._preprocess_data`` takes.
_COMMON = frozenset({
    "image_embeddings", "language_embeddings", "input_ids", "loss_mask", "labels",
    "use_inference_kv_cache", "inference_context", "image_token_index", "num_image_tiles",
    "inference_params",
})  # fmt: skip
_SOUND = frozenset({"sound_embeddings", "sound_embeddings_len", "sound_timestamps"})
_PACKED = frozenset({"is_packed_dynamic_res"})
_PER_TILE = frozenset({"imgs_sizes", "position_ids"})

DynamicTokens = Callable[[LLaVAModel, Mapping[str, Any], Tensor], Tensor | None]


@dataclass(frozen=True)
class Release:
    """How the ``LLaVAModel`` of some releases behaves.

    Attributes:
        name: which releases.
        arguments: what ``_preprocess_data`` takes.
        returns_ids: whether ``_preprocess_data`` also returns token and position ids.
        pads_rows: whether ``_process_embedding_token_parallel`` pads a row that does not divide.
        reads_boundaries: whether ``forward`` compares ``cu_seqlens_q[-1]`` with the row, a host
            synchronisation on a GPU, and rebuilds the parameters where it is larger.
        keeps_text_rows: whether a row with an empty ``num_image_tiles`` keeps its placeholders as
            text, and the length it has.
        dynamic_tokens: rows of each image where images come in their own resolutions, or None
            where this call is not such a one.
    """

    name: str
    arguments: frozenset[str]
    returns_ids: bool
    pads_rows: bool
    reads_boundaries: bool
    keeps_text_rows: bool
    dynamic_tokens: DynamicTokens


def _never_dynamic(model, given, num_image_tiles) -> None:
    return None


def _packed_or_tubes(model, given, num_image_tiles) -> Tensor | None:
    """0.18 and 0.19: one placeholder for each entry of ``imgs_sizes``, or for each tubelet."""
    sizes, num_frames = given.get("imgs_sizes"), given.get("num_frames")
    if sizes is None or len(sizes) == 0:
        return None
    device = num_image_tiles.device
    if model.temporal_patch_dim > 1 and num_frames is not None:
        frames = num_frames.tolist() if isinstance(num_frames, Tensor) else list(num_frames)
        tubelets = sum(-(-count // model.temporal_patch_dim) for count in frames)
        return torch.full((tubelets,), model.img_seq_len, device=device)
    if not model.add_encoder:
        raise PackingError(
            "this stage has no vision model, so it cannot tell how many rows images of their own "
            "size become; send it the layout of the row (mp.packed_seq_params)"
        )
    if given.get("vision_packed_seq_params") is None:
        return None
    sizes = torch.as_tensor(sizes, device=device)
    patches = (sizes // model.vision_model.patch_dim).prod(-1)
    return patches // 4 if model._pixel_shuffle else patches


def _per_tile(model, given, num_image_tiles) -> Tensor | None:
    """Main: the rows of an image are those of its tiles, each of its own size."""
    sizes = given.get("imgs_sizes")
    if sizes is None or not model._dynamic_resolution:
        return None
    rows = (torch.as_tensor(sizes, device=num_image_tiles.device) // model.patch_dim).prod(-1)
    if not model._drop_vision_class_token:
        rows = rows + model.vision_model.class_token_len
    for merges in (model._pixel_shuffle, model._conv_merging):
        rows = rows // 4 if merges else rows
    if model._max_num_tiles > 1:
        ends = num_image_tiles.cumsum(0)
        before = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
        rows = before[ends] - before[ends - num_image_tiles]
    return rows


# fmt: off
RELEASES = tuple(Release(*row) for row in (
    # releases        _preprocess_data takes         ids    pads   reads  keeps  resolution
    ("0.12 to 0.17",  _COMMON,                       False, False, False, False, _never_dynamic),
    ("0.18 and 0.19", _COMMON | _SOUND | _PACKED,    False, True,  False, False, _packed_or_tubes),
    ("main",          _COMMON | _SOUND | _PER_TILE,  True,  True,  True,  True,  _per_tile),
))
# fmt: on

PACKED_SEQ_FIELDS = frozenset(field.name for field in dataclasses.fields(PackedSeqParams))


def release_of(model_class: type[LLaVAModel] = LLaVAModel) -> Release | None:
    """The release whose ``_preprocess_data`` a class has, None if none of the known ones."""
    takes = set(inspect.signature(model_class._preprocess_data).parameters) - {"self"}
    return next((release for release in RELEASES if release.arguments == takes), None)


def overridden(model: LLaVAModel, names: tuple[str, ...]) -> list[str]:
    """Which of these methods are not Megatron's own: overridden in a subclass, patched on the
    class, or replaced on the instance."""
    source = inspect.getsourcefile(llava_model)

    def is_own(name):
        function = getattr(type(model), name)
        code = getattr(function, "__code__", None)
        return name not in vars(model) and code is not None and code.co_filename == source

    return [name for name in names if not is_own(name)]


def takes_boundaries(language_model) -> bool:
    """Whether a language model reads ``packed_seq_params``: hybrids do from 0.16 on."""
    parameters = inspect.signature(language_model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return "packed_seq_params" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def is_hybrid(language_model) -> bool:
    """Whether it has Mamba layers, which read ``seq_idx``."""
    return isinstance(language_model, _hybrid_classes())


def _hybrid_classes() -> tuple[type, ...]:
    found = []
    for module, name in (
        ("mamba.mamba_model", "MambaModel"),
        ("hybrid.hybrid_model", "HybridModel"),
    ):
        try:
            found.append(getattr(importlib.import_module(f"megatron.core.models.{module}"), name))
        except ImportError:
            continue
    return tuple(found)


def wants_padding_mask(language_model) -> bool:
    """Whether it has experts whose routers count tokens, and take a mask of padding.

    They take one from 0.16 on. From there to 0.19 ``_apply_expert_bias`` cannot broadcast it, and
    quantile balancing refuses one.
    """
    config = getattr(language_model, "config", None)
    if getattr(config, "num_moe_experts", None) is None:
        return False
    if "padding_mask" not in inspect.signature(language_model.forward).parameters:
        return False
    balancing = getattr(config, "moe_router_load_balancing_type", None)
    balancing = balancing if isinstance(balancing, list | tuple) else [balancing]
    if "quantile_balancing" in balancing:
        return False
    version = tuple(map(int, MCORE_VERSION.split(".")[:2]))
    return not (version < (0, 20) and config.moe_router_enable_expert_bias)


def asks_for_layer_graphs(config) -> bool:
    """Whether layers are captured as CUDA graphs one by one, which reject a changed int."""
    implementation = getattr(config, "cuda_graph_impl", None) or "none"
    if implementation == "none":
        return any(
            getattr(config, name, False) for name in ("enable_cuda_graph", "external_cuda_graph")
        )
    scope = getattr(config, "cuda_graph_scope", None) or ()
    scope = scope if isinstance(scope, list | tuple) else [scope]
    whole = any("full_iteration" in str(part) for part in (implementation, *scope))
    return not whole


def gemm_alignment(config) -> int:
    """How many rows FP8 or FP4 matrix products want a multiple of, on each rank.

    Source:
        ``fp8_utils.get_fp8_align_size``, which does not know blockwise scaling (128), and
        ``fp4_utils.get_fp4_align_size``, of Megatron-Core.
    """
    if getattr(config, "fp4", None):
        try:
            from megatron.core.fp4_utils import get_fp4_align_size
        except ImportError:  # before 0.16
            return 128
        return get_fp4_align_size(config.fp4_recipe)
    if not getattr(config, "fp8", None):
        return 1
    if str(getattr(config, "fp8_recipe", "")).endswith("blockwise"):
        return 128
    try:
        from megatron.core.fp8_utils import get_fp8_align_size
    except ImportError:  # before 0.13
        return 32 if str(getattr(config, "fp8_recipe", "")).endswith("mxfp8") else 16
    return get_fp8_align_size(config.fp8_recipe)


def describe(model_class: type[LLaVAModel] = LLaVAModel) -> str:
    """In words, how far ``install`` understands a ``LLaVAModel`` class."""
    release = release_of(model_class)
    if release is None:
        return "boundaries only: its _preprocess_data is not known"
    return f"understood, fused (as in {release.name})"
