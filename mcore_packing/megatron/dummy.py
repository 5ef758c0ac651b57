"""The dummy image of a row that has none.

Data-parallel replicas wait for each other's vision model: Megatron's DDP with
``overlap_grad_reduce`` for the gradients of its buckets, FSDP for its weights. A replica whose row
is text has to take part, so one tile of zeros goes through the vision model, and what comes out
counts nothing.
"""

import torch
import torch.distributed as dist
from megatron.core.models.multimodal.llava_model import LLaVAModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..errors import PackingError


def dummy_image(model: LLaVAModel, is_ours: bool) -> Tensor | None:
    """What ``images`` are to be in a row without any, ``[1, 3, height, width]``; None where nobody
    waits for this stage's vision model.

    Args:
        model: which is called.
        is_ours: whether the expansion of this call is.

    Raises:
        PackingError: other ranks wait, and it is not known what could be passed.

    Source:
        Megatron-Core's main keeps the projector in the graph by itself, but not the tower.
    """
    if not model.add_encoder or not is_waited_for(model):
        return None
    tower = model.vision_model
    height, width = (getattr(tower, name, None) for name in ("img_h", "img_w"))
    is_marked = getattr(tower, "_is_fsdp_managed_module", False)
    if not (is_ours or _anchors_projector(model) or is_marked):
        way_out = (
            "Megatron's own expansion, the one of this call, takes a dummy image only where "
            "vision_model._is_fsdp_managed_module is True: set it"
        )
    elif height is None or getattr(tower, "dynamic_resolution", False):
        way_out = (
            "pass one small image that counts nothing (images and its imgs_sizes, no placeholder, "
            "num_image_tiles of shape [0]): its size is not known here"
        )
    else:
        weight = next(tower.parameters())
        return torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise PackingError(
            f"this row has no images, so the vision model would take no part, and other ranks "
            f"could wait for it; {way_out}"
        )
    return None


def _anchors_projector(model: LLaVAModel) -> bool:
    return hasattr(model, "_build_zero_projection_anchor")


def is_waited_for(model: LLaVAModel) -> bool:
    """Whether others wait for the vision model of a rank that has no tile."""
    parts = [model.vision_model, model.vision_projection]
    if torch.is_grad_enabled():  # looked at first: the first weight mostly says it
        trained = parts[:1] if _anchors_projector(model) else parts
        if any(weight.requires_grad for part in trained for weight in part.parameters()):
            return True
    return any(_is_sharded(part) for part in parts)


def _is_sharded(part: torch.nn.Module) -> bool:
    """Whether FSDP gathers its weights when it runs: torch's, Megatron's, or somebody's who says
    so to ``LLaVAModel``."""
    if getattr(part, "_is_fsdp_managed_module", False):
        return True
    if any(hasattr(weight, "_megatron_fsdp_model") for weight in part.parameters()):
        return True
    return any(isinstance(module, FSDPModule) for module in part.modules())


class KeepInGraph(torch.autograd.Function):
    """``embeddings``; ``images`` take part with weight zero, so that all see their gradients."""

    @staticmethod
    def forward(ctx, embeddings, images):
        ctx.images = images.shape, images.dtype, images.device
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, device = ctx.images
        return grad, torch.zeros(shape, dtype=dtype, device=device)
