"""What differs between Megatron-Core releases, in one table."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ..errors import PackingError
from ..inputs import may_look

# What every ``LLaVAModel._preprocess_data`` takes.
_COMMON = frozenset({
    "image_embeddings", "language_embeddings", "input_ids", "loss_mask", "labels",
    "use_inference_kv_cache", "inference_context", "image_token_index", "num_image_tiles",
    "inference_params",
})  # fmt: skip
_SOUND = frozenset({"sound_embeddings", "sound_embeddings_len", "sound_timestamps"})
_PACKED = frozenset({"is_packed_dynamic_res"})
_PER_TILE = frozenset({"imgs_sizes", "position_ids"})
_SHARES_BY_ITSELF = "_balance_vision_context_parallel_by_tokens"  # Megatron, September 2026

DynamicTokens = Callable[[LLaVAModel, Mapping[str, Any], Tensor], tuple[Tensor, int | None] | None]


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
        boundary_uses: how often ``forward`` names its ``packed_seq_params``.
        dynamic_tokens: positions of each image where images come in their own resolutions, and
            their sum where the host knows it; None where this call is not such a one.
    """

    name: str
    arguments: frozenset[str]
    returns_ids: bool
    pads_rows: bool
    reads_boundaries: bool
    keeps_text_rows: bool
    boundary_uses: int
    dynamic_tokens: DynamicTokens


def _never_dynamic(model, given, num_image_tiles) -> None:
    return None


def _image_or_tube(model, given, num_image_tiles) -> tuple[Tensor, int | None] | None:
    """0.18 and 0.19: one placeholder for each entry of ``imgs_sizes``, or for each tubelet."""
    sizes, num_frames = given.get("imgs_sizes"), given.get("num_frames")
    if sizes is None or len(sizes) == 0:
        return None
    device = num_image_tiles.device
    if model.temporal_patch_dim > 1 and num_frames is not None:
        frames = num_frames.tolist() if isinstance(num_frames, Tensor) else list(num_frames)
        tubelets = sum(-(-count // model.temporal_patch_dim) for count in frames)
        counts = torch.full((tubelets,), model.img_seq_len, device=device)
        return counts, tubelets * model.img_seq_len
    if not model.add_encoder:
        raise PackingError(
            "this stage has no vision model, so it cannot tell what images of their own size "
            "become; send it the layout of the row (mp.packed_seq_params)"
        )
    if given.get("vision_packed_seq_params") is None:
        return None
    patches = (torch.as_tensor(sizes) // model.vision_model.patch_dim).prod(-1)
    patches = patches // 4 if model._pixel_shuffle else patches
    return patches.to(device, non_blocking=True), _known_sum(patches)


def _known_sum(counts: Tensor) -> int | None:
    return int(counts.sum()) if may_look(counts) else None


def _per_tile(model, given, num_image_tiles) -> tuple[Tensor, int | None] | None:
    """Main: an image becomes what its tiles do, each of its own size."""
    sizes = given.get("imgs_sizes")
    if sizes is None or not model._dynamic_resolution:
        return None
    tokens = (torch.as_tensor(sizes) // model.patch_dim).prod(-1)
    if not model._drop_vision_class_token:
        tokens = tokens + model.vision_model.class_token_len
    for merges in (model._pixel_shuffle, model._conv_merging):
        tokens = tokens // 4 if merges else tokens
    known = _known_sum(tokens)
    tokens = tokens.to(num_image_tiles.device, non_blocking=True)
    if model._max_num_tiles > 1:
        ends = num_image_tiles.cumsum(0)
        before = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])
        tokens = before[ends] - before[ends - num_image_tiles]
    return tokens, known


# fmt: off
RELEASES = tuple(Release(*row) for row in (
    # releases        _preprocess_data takes        ids    pads   reads  keeps uses resolution
    ("0.12 to 0.17",  _COMMON,                      False, False, False, False, 2, _never_dynamic),
    ("0.18 and 0.19", _COMMON | _SOUND | _PACKED,   False, True,  False, False, 2, _image_or_tube),
    ("main",          _COMMON | _SOUND | _PER_TILE, True,  True,  True,  True,  5, _per_tile),
))
# fmt: on

PACKED_SEQ_FIELDS = frozenset(field.name for field in dataclasses.fields(PackedSeqParams))


def release_of(model_class: type[LLaVAModel] = LLaVAModel) -> Release | None:
    """The release whose ``_preprocess_data`` a class has, None if none of the known ones."""
    takes = set(inspect.signature(model_class._preprocess_data).parameters) - {"self"}
    return next((release for release in RELEASES if release.arguments == takes), None)


def tokens_per_image(
    model: LLaVAModel, release: Release | None, given: Mapping[str, Any]
) -> tuple[Tensor, int | None]:
    """How many positions each placeholder of a call becomes, ``[N]``, and their sum where the host
    knows it.

    Args:
        model: which is called.
        release: whose expansion it has.
        given: the arguments of ``forward``, by their names.
    """
    images, input_ids = given.get("images"), given["input_ids"]
    num_image_tiles = given.get("num_image_tiles")
    if num_image_tiles is None and isinstance(images, Tensor):
        num_image_tiles = torch.ones(images.shape[0], dtype=torch.int, device=input_ids.device)
    if not isinstance(num_image_tiles, Tensor) or num_image_tiles.dim() != 1:
        found = getattr(num_image_tiles, "shape", type(num_image_tiles).__name__)
        raise PackingError(f"num_image_tiles is {found}, expected a tensor [N] on every stage")
    if num_image_tiles.numel() == 0:
        return num_image_tiles.long(), 0  # images may still hold a dummy
    if release is not None:
        dynamic = release.dynamic_tokens(model, given, num_image_tiles)
        if dynamic is not None:
            counts, known = dynamic
            return counts.to(input_ids.device, non_blocking=True), known
    elif given.get("imgs_sizes") is not None:
        raise PackingError("mcore_packing does not know this LLaVAModel's dynamic resolution")
    known = None
    if model.pre_process and isinstance(images, Tensor):
        known = images.shape[0] * model.img_seq_len
    elif model.pre_process and model.encoder_hidden_state is not None:
        known = model.encoder_hidden_state.shape[:2].numel()
    return num_image_tiles.long() * model.img_seq_len, known


def tokens_per_tile(model: LLaVAModel, release: Release, given: Mapping[str, Any]) -> Tensor | None:
    """What each tile of a call becomes, ``[tiles]`` on the CPU, where tiles have sizes of their
    own; None where all become ``img_seq_len``."""
    sizes = given.get("imgs_sizes")
    if sizes is None:
        return None
    dynamic = release.dynamic_tokens(model, given, torch.ones(len(sizes), dtype=torch.long))
    return None if dynamic is None else dynamic[0].cpu()


def why_not_ours(model: LLaVAModel) -> str | None:
    """Why the expansion of a model may not be replaced: it has to be Megatron's own, of a known
    release. None where it may."""
    names = ["_preprocess_data"]
    if model.context_parallel_lm > 1 or model.sequence_parallel_lm:
        names.append("_process_embedding_token_parallel")
    kind = type(model).__name__
    if changed := [name for name in names if not _is_megatrons(model, name)]:
        verb = "is" if len(changed) == 1 else "are"
        return f"{' and '.join(changed)} of this {kind} {verb} not Megatron's own"
    release = release_of(type(model))
    if release is None:
        takes = sorted(inspect.signature(model._preprocess_data).parameters)
        return f"_preprocess_data of this {kind} is of no known release (it takes {takes})"
    if model._tile_tags is not None:
        return f"this {kind} has tile tags"
    if (uses := _boundary_uses()) not in (0, release.boundary_uses):
        return (
            f"forward of this {kind} uses its boundaries in {uses} places, of which "
            f"{release.boundary_uses} are known (as in {release.name}): it may weigh the loss by "
            "them, say"
        )
    if shares_by_itself(model):
        return f"this {kind} shares its vision model over context-parallel ranks by itself"
    return None


def shares_by_itself(model: LLaVAModel) -> bool:
    """Whether Megatron shares the vision model over context-parallel ranks."""
    return model.context_parallel_lm > 1 and getattr(model, _SHARES_BY_ITSELF, False)


def _boundary_uses() -> int:
    """How often Megatron's own ``forward`` reads its ``packed_seq_params``, 0 where it cannot be
    seen; somebody's wrapper around it makes no difference."""
    forward = inspect.unwrap(LLaVAModel.forward)
    if forward.__code__.co_filename != inspect.getsourcefile(llava_model):
        return 0
    try:
        source = inspect.getsource(forward)
    except OSError:
        return 0
    names = (node for node in ast.walk(ast.parse(textwrap.dedent(source))) if _is_read(node))
    return sum(node.id == "packed_seq_params" for node in names)


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def _is_megatrons(model: LLaVAModel, name: str) -> bool:
    """Whether nobody overrode a method in a subclass, patched it on the class, or replaced it on
    the instance."""
    code = getattr(getattr(type(model), name), "__code__", None)
    source = inspect.getsourcefile(llava_model)
    return name not in vars(model) and code is not None and code.co_filename == source


def describe(model_class: type[LLaVAModel] = LLaVAModel) -> str:
    """In words, how far ``install`` understands a ``LLaVAModel`` class."""
    release = release_of(model_class)
    if release is None:
        return "boundaries only: its _preprocess_data is not known"
    if _boundary_uses() not in (0, release.boundary_uses):
        return "boundaries only: its forward uses boundaries where none is known to"
    return f"understood (as in {release.name})"
