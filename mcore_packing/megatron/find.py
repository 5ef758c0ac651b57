"""Finding the ``LLaVAModel`` in what a training script holds, and its hook."""

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel

from ..errors import PackingError

HOOK = "_packing_hook"  # the attribute of an installed model


def find_llava(model) -> LLaVAModel:
    """The one ``LLaVAModel`` inside ``model``.

    Raises:
        PackingError: there is none, or more than one.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = [module for module in modules if isinstance(module, LLaVAModel)]
    if len(found) != 1:
        raise PackingError(
            f"{type(model).__name__} holds {len(found)} LLaVAModels, expected one; pass a "
            f"LLaVAModel, a wrapper around one, or a list of pipeline chunks"
        )
    return found[0]


def holds_llava(model) -> bool:
    """Whether there is one in any pipeline chunk."""
    chunks = model if isinstance(model, list | tuple) else [model]
    modules = (chunk.modules() for chunk in chunks if isinstance(chunk, torch.nn.Module))
    return any(isinstance(one, LLaVAModel) for found in modules for one in found)


def find_llavas(model) -> list[LLaVAModel]:
    """Those of all pipeline chunks."""
    return [find_llava(chunk) for chunk in (model if isinstance(model, list | tuple) else [model])]


def hook_of(model: torch.nn.Module):
    """The hook of an installed model, None for any other module."""
    return vars(model).get(HOOK)
