"""Megatron-Bridge, its ``NemotronVL`` and its Qwen2.5-VL, on a machine without a GPU.

Bridge is real, out of a clone, and so is the Megatron-Core beside it. What takes the place of
something, because that needs CUDA or is not installed:

- the ``__init__`` files of Bridge's packages: nothing. They import every model family there is, and
  with them Transformer Engine and diffusers.
- ``omegaconf``, ``datasets``, where not installed: names that raise when they are used. Bridge
  imports them for its files of settings and for data sets off the hub.
- ``typing.override``, before Python 3.12: the same of ``typing_extensions``.
- Transformer Engine's layers: Megatron's local ones with ``PackedAttention``.
- Mamba layers: none, by the pattern of layers.
- the sizes of NemotronVL's vision model and projector, which its provider writes into the call.

Example, in a process started with ``env=environment("main")``:

.. code-block:: python

    make_importable()
    with on_cpu():
        model = built(qwen25_vl())
        samples = qwen25_vl_samples(4)
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

NEMOTRON_VL = "megatron.bridge.models.nemotron_vl.nemotron_vl_provider"
QWEN25_VL = "megatron.bridge.models.qwen_vl.qwen25_vl_provider"
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
    # Megatron leaves there which attention a model of this process asked for, and checks it.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, path))}


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
    """``cpu.megatron_on_cpu``, where Bridge's providers build their models too.

    Args:
        **parallel_sizes: as ``cpu.megatron_on_cpu`` takes them.
    """
    provider = importlib.import_module(NEMOTRON_VL)
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


# Of a small language model, in fp32.
_LANGUAGE = {
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "seq_length": 1024,
    "init_method_std": 0.05,  # enough for tokens to depend on what they attend to
    "params_dtype": torch.float32,
    "bf16": False,
    # Kernels of Transformer Engine, apex and Triton, which need CUDA.
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "cross_entropy_loss_fusion": False,
    "moe_permute_fusion": False,
}


def nemotron_vl(**settings):
    """Bridge's ``NemotronVLModelProvider`` of a small model, which expands its placeholders itself.

    Args:
        **settings: its fields.
    """
    fields = {
        "hybrid_layer_pattern": "*-*-",
        "vocab_size": 131_136,  # its placeholder is 131,072
        "first_last_layers_bf16": False,
    }
    provider = importlib.import_module(NEMOTRON_VL)
    return provider.NemotronVLModelProvider(**{**_LANGUAGE, **fields, **settings})


def qwen25_vl(**settings):
    """Bridge's ``Qwen25VLModelProvider`` of a small model, whose ids are expanded before it.

    Args:
        **settings: its fields.
    """
    provider = importlib.import_module(QWEN25_VL)
    tower = provider.Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
    )
    fields = {
        "vision_config": tower,
        "transformer_layer_spec": lambda config: cpu.layer_spec(normalization="RMSNorm"),
        "num_layers": 2,
        "mrope_section": [2, 3, 3],
        "vocab_size": 151_680,  # its placeholder is 151,655
        "normalization": "RMSNorm",
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
    }
    return provider.Qwen25VLModelProvider(**{**_LANGUAGE, **fields, **settings})


def built(provider):
    """The model of a provider, of this rank, without a wrapper; weights are random."""
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    return model


def qwen25_vl_samples(count: int, seed: int = 0) -> list[dict]:
    """Samples as the processor of Qwen2.5-VL writes them: an id for each image embedding.

    Each has ``input_ids`` and ``labels`` ``[t]`` (not shifted), and all but every third an image,
    ``pixel_values`` ``[patches, 1176]`` and ``image_grid_thw`` ``[1, 3]`` of patches, of which four
    make an embedding. No two images are of one size.

    Args:
        count: how many.
        seed: of the contents.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        ids = torch.randint(1, 500, (9 + 5 * index,), generator=generator)
        sample = {}
        if index % 3 != 2:
            height, width = 4, 4 + 2 * index
            image = torch.full((height * width // 4,), 151_655)
            start, end = torch.tensor([151_652]), torch.tensor([151_653])
            ids = torch.cat([ids[:3], start, image, end, ids[3:]])
            sample["pixel_values"] = torch.randn(height * width, 1176, generator=generator)
            sample["image_grid_thw"] = torch.tensor([[1, height, width]])
        sample["input_ids"] = ids
        sample["labels"] = ids.masked_fill(ids >= 151_652, -100)
        samples.append(sample)
    return samples


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
