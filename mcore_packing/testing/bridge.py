"""Megatron-Bridge and its ``NemotronVL`` on a machine without a GPU.

Bridge is real, out of a clone, and so is the Megatron-Core beside it. What takes the place of
something, because that needs CUDA or is not installed:

- the ``__init__`` files of Bridge's packages: nothing. They import every model family there is, and
  with them Transformer Engine and diffusers.
- ``omegaconf``, ``datasets``, where not installed: names that raise when they are used. Bridge
  imports them for its files of settings and for data sets off the hub.
- ``typing.override``, before Python 3.12: the same of ``typing_extensions``.
- Transformer Engine's layers: Megatron's local ones with ``PackedAttention``.
- Mamba layers: none, by the pattern of layers.
- the sizes of the vision model and the projector, which the provider writes into its call.
"""

import contextlib
import functools
import importlib
import os
import sys
import typing
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import patch

import torch
import typing_extensions
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp

from .. import cpu
from . import tiny
from .sources import BRIDGE, MEGATRON

PROVIDER = "megatron.bridge.models.nemotron_vl.nemotron_vl_provider"
# The Megatron-Core that a release of Bridge has as its submodule; for main there is a newer one.
MEGATRON_BESIDE = {"main": "main", "0.6.0": "cd4afffa648426a959dc7cb1e24b5ce7d0c3ff54"}
IMG_SIZE = 128  # pixels: a tile is 8 x 8 patches, and becomes 16 positions


def environment(version: str) -> dict[str, str]:
    """The environment of a process that imports a release of Bridge.

    Raises:
        SourcesMissing: there is no clone of it, or of the Megatron-Core beside it.
    """
    folders = [BRIDGE.unpacked(version) / "src", MEGATRON.unpacked(MEGATRON_BESIDE[version])]
    path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def make_importable() -> None:
    """From now on this process, started in ``environment``, can import what Bridge is made of."""
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override
    sys.meta_path.insert(0, _BarePackages())
    for name in "omegaconf", "datasets":
        if find_spec(name) is None:
            sys.modules[name] = _NotInstalled(name)


class _BarePackages(MetaPathFinder, Loader):
    """Finds the packages of Bridge, and runs nothing of their ``__init__``."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[:2] != ["megatron", "bridge"]:
            return None
        found = PathFinder.find_spec(name, path)
        if found is None or found.submodule_search_locations is None:
            return None
        bare = ModuleSpec(name, self, is_package=True)
        bare.submodule_search_locations = found.submodule_search_locations
        return bare

    def exec_module(self, module):
        pass


class _NotInstalled(ModuleType):
    """A package whose names can be imported, and not used."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def use(*args, **kwargs):
            raise ModuleNotFoundError(f"{self.__name__}.{name} is used, but not installed")

        return use


@contextlib.contextmanager
def on_cpu(**parallel_sizes):
    """``cpu.megatron_on_cpu``, where Bridge's provider of ``NemotronVL`` builds its model too."""
    provider = importlib.import_module(PROVIDER)
    language_spec = tiny.hybrid_spec(cpu.layer_spec(), IdentityOp)
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("hybrid_stack_spec", language_spec),
            ("get_vit_layer_with_transformer_engine_spec", _vision_spec),
            ("LLaVAModel", _small(provider.LLaVAModel)),
        ):
            stack.enter_context(patch.object(provider, name, value))
        stack.enter_context(cpu.megatron_on_cpu(**parallel_sizes))
        yield


def nemotron_vl(**settings):
    """Bridge's ``NemotronVLModelProvider`` of a small model.

    Args:
        **settings: its fields.
    """
    fields = {
        "hybrid_layer_pattern": "*-*-",
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": 131_136,  # its placeholder is 131,072
        "seq_length": 1024,
        "init_method_std": 0.05,  # enough for tokens to depend on what they attend to
        "params_dtype": torch.float32,
        "bf16": False,
        # Kernels of Transformer Engine, apex and Triton, which need CUDA.
        "first_last_layers_bf16": False,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "moe_permute_fusion": False,
    }
    provider = importlib.import_module(PROVIDER)
    return provider.NemotronVLModelProvider(**{**fields, **settings})


def _vision_spec():
    spec = cpu.layer_spec()
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return spec


def _small(llava_model):
    """The provider's call of ``LLaVAModel``, with a small vision model and projector."""

    @functools.wraps(llava_model)
    def build(*, vision_transformer_config, vision_projection_config, **settings):
        for name, value in {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 4,
            "kv_channels": 16,
        }.items():
            setattr(vision_transformer_config, name, value)
        vision_projection_config.ffn_hidden_size = 128
        settings |= {"img_h": IMG_SIZE, "img_w": IMG_SIZE}
        return llava_model(
            vision_transformer_config=vision_transformer_config,
            vision_projection_config=vision_projection_config,
            **settings,
        )

    return build
