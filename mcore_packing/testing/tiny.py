"""A small real LLaVAModel and samples for it: what the demo shows, tests test, the CLI checks."""

import contextlib
import copy
import inspect
import itertools
from functools import partial
from importlib.util import find_spec

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from .. import cpu

IMAGE_TOKEN_ID = -200
VOCAB_SIZE = 512
HAVE_GPU = torch.cuda.is_available()
HAVE_TE = HAVE_GPU and find_spec("transformer_engine") is not None
DEVICE = "cuda" if HAVE_GPU else "cpu"
DTYPE = torch.bfloat16 if HAVE_GPU else torch.float32


def attention_name() -> str:
    """The attention that packed rows get on this machine."""
    if HAVE_TE:
        return "Transformer Engine, bf16"
    if HAVE_GPU:
        return "PackedAttention: torch varlen, bf16"
    return "PackedAttention: SDPA, fp32"


@contextlib.contextmanager
def megatron(**parallel_sizes):
    """Megatron-Core on the GPU where there is one, else on the CPU.

    Args:
        **parallel_sizes: as ``cpu.megatron_on_cpu`` takes them.
    """
    with contextlib.ExitStack() as stack:
        if not HAVE_GPU:
            stack.enter_context(cpu.megatron_on_cpu(**parallel_sizes))
        else:
            stack.enter_context(cpu.process_groups("nccl", **parallel_sizes))
        if HAVE_GPU and not HAVE_TE:
            stack.enter_context(cpu.clip_norm())
        yield


def llava_model(
    position_embedding_type: str = "learned_absolute",
    *,
    img_size: int = 336,
    language_layers: int = 3,
    hidden_size: int = 64,
    max_sequence_length: int = 65536,
    vocab_size: int = VOCAB_SIZE,
    vision_model_type: str = "clip",
    seed: int = 0,
    per_token_loss: bool = False,
    sequence_parallel: bool = False,
    language: dict | None = None,
    vision: dict | None = None,
    hybrid_pattern: str | None = None,
    mamba_layer=IdentityOp,
    initialize_on_gpu: bool = False,
    **kwargs,
) -> LLaVAModel:
    """Build a ``LLaVAModel``: a vision tower (577 positions a tile), an MLP projector, a GPT.

    Weights are random, in fp32 on a CPU and in bf16 on a GPU. Where Megatron's process groups split
    tensors or positions, this rank gets its part; ``llava_stage`` also splits layers.

    Args:
        position_embedding_type: "learned_absolute" or "rope".
        img_size: pixels on each side of a tile, a multiple of 14.
        language_layers: GPT layers, on all pipeline stages together.
        hidden_size: of the GPT.
        max_sequence_length: positions of the GPT.
        vocab_size: of the GPT.
        vision_model_type: "clip", "siglip" or "internvit".
        seed: of the weights.
        per_token_loss: weigh every trained token of a step alike (``calculate_per_token_loss``),
            as packed rows need it: they do not all hold the same number of them.
        sequence_parallel: split positions over the tensor-parallel ranks.
        language, vision: further ``TransformerConfig`` arguments of the GPT and the vision tower.
        hybrid_pattern: makes the language model a hybrid, of the layers that Megatron writes so:
            "*" attention, "-" MLP, "M" Mamba.
        mamba_layer: what a hybrid has where the pattern says "M".
        initialize_on_gpu: draw the weights there: a large model takes seconds on a CPU.
        **kwargs: for ``LLaVAModel``.
    """
    torch.manual_seed(seed)
    common = {
        "use_cpu_initialization": not initialize_on_gpu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.05,  # enough for tokens to depend on what they attend to
        "bf16": HAVE_GPU,
        "params_dtype": DTYPE,
    }
    heads = {"num_attention_heads": 4, **common}
    if HAVE_GPU:
        heads["kv_channels"] = 64  # smaller heads are not safe in every kernel
    if HAVE_TE:  # cuDNN or an error: the unfused path takes its place in silence, and is wrong
        heads["attention_backend"] = AttnBackend.fused
    text = {
        "num_layers": language_layers,
        "hidden_size": hidden_size,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "sequence_parallel": sequence_parallel,
        "calculate_per_token_loss": per_token_loss,
    }
    language_config = TransformerConfig(**{**text, **heads, **(language or {})})
    pictures = {"num_layers": 2, "hidden_size": 64, **heads, **(vision or {})}
    vision_config = TransformerConfig(**pictures)
    projector = {"num_layers": 2, "hidden_size": hidden_size, "ffn_hidden_size": 64}
    projector_config = TransformerConfig(**projector, **common, num_attention_heads=1)
    language_config.language_model_type = "nemotron5-hybrid" if hybrid_pattern else "tiny"
    vision_config.vision_model_type = vision_model_type
    for config in (vision_config, projector_config):
        config.tensor_model_parallel_size = language_config.tensor_model_parallel_size
    make_spec = get_gpt_layer_with_transformer_engine_spec if HAVE_TE else cpu.layer_spec
    spec, vision_spec = make_spec(language_config.num_moe_experts), make_spec()
    vision_spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    settings = {
        "drop_vision_class_token": False,
        "language_position_embedding_type": position_embedding_type,
        "img_h": img_size,
        "img_w": img_size,
        "patch_dim": 14,
        "image_token_index": IMAGE_TOKEN_ID,
    }
    if hybrid_pattern is not None:
        spec = hybrid_spec(spec, mamba_layer)
        settings |= _settings_of_pattern(hybrid_pattern)
    model = LLaVAModel(
        language_transformer_config=language_config,
        language_transformer_layer_spec=spec,
        language_vocab_size=vocab_size,
        language_max_sequence_length=max_sequence_length,
        vision_transformer_config=vision_config,
        vision_transformer_layer_spec=vision_spec,
        vision_projection_config=projector_config,
        vision_projection_layer_spec=submodules(make_spec().submodules.mlp),
        **{**settings, **kwargs},
    )
    model.model_type = ModelType.encoder_or_decoder  # as megatron.training does
    return model.to(DEVICE, DTYPE) if HAVE_GPU else model


def llava_stage(*args, language: dict | None = None, **kwargs) -> LLaVAModel:
    """``llava_model``, or the part of it that this pipeline stage has: of the same weights."""
    whole = llava_model(*args, language=language, **kwargs)
    size = parallel_state.get_pipeline_model_parallel_world_size()
    if size == 1:
        return whole
    is_first = parallel_state.is_pipeline_first_stage()
    split = {"pipeline_model_parallel_size": size, "pipeline_dtype": DTYPE}
    places = {
        "pre_process": is_first,
        "post_process": parallel_state.is_pipeline_last_stage(),
        "add_encoder": is_first,
    }
    stage = llava_model(*args, language={**(language or {}), **split}, **places, **kwargs)
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(weights[name_in_whole(stage, name)])
    return stage


def name_in_whole(stage: LLaVAModel, name: str) -> str:
    """What a parameter of a pipeline stage is called where there is but one stage."""
    parts = name.split(".")
    if name.startswith("language_model.decoder.layers."):
        first = stage.language_model.decoder.layers[0].layer_number - 1
        parts[3] = str(int(parts[3]) + first)
    return ".".join(parts)


def _hybrid_stack():
    """The stack of hybrid language models, and its submodules."""
    *_, room = cpu.hybrid_stacks()
    name = "Hybrid" if hasattr(room, "HybridStack") else "Mamba"
    return getattr(room, f"{name}Stack"), getattr(room, f"{name}StackSubmodules")


def _settings_of_pattern(pattern: str) -> dict:
    """Arguments of ``LLaVAModel``. Before 0.17 the ratios beside it must add up to at most 1."""
    takes = inspect.signature(LLaVAModel).parameters
    if "hybrid_layer_pattern" in takes:
        return {"hybrid_layer_pattern": pattern}
    ratios = {"hybrid_attention_ratio": 0.0, "hybrid_mlp_ratio": 0.0}
    return {"hybrid_override_pattern": pattern, **ratios}


def hybrid_spec(layer: ModuleSpec, mamba_layer) -> ModuleSpec:
    """A stack whose attention and MLP layers are the halves of a GPT layer."""
    stack, stack_submodules = _hybrid_stack()
    attention, mlp = copy.deepcopy(layer), copy.deepcopy(layer)
    for name in "pre_mlp_layernorm", "mlp":
        setattr(attention.submodules, name, IdentityOp)
    attention.submodules.mlp_bda = IdentityFuncOp
    mlp.module = MLPLayer
    for name in "input_layernorm", "self_attention":
        setattr(mlp.submodules, name, IdentityOp)
    mlp.submodules.self_attn_bda = IdentityFuncOp
    layers = {"mamba_layer": mamba_layer, "attention_layer": attention, "mlp_layer": mlp}
    return ModuleSpec(module=stack, submodules=stack_submodules(**layers))


def submodules(spec):
    """Of a ``ModuleSpec``, or of the ``functools.partial`` that main has in its place."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def samples(
    count: int, *, img_size: int = 336, device=DEVICE, dtype=DTYPE, seed: int = 0
) -> list[dict]:
    """Samples for ``parity.compare``, with tiles cycling 1, 2, 1, 3, 1.

    In turn: an image inside, an image first, two images, no image, an image last, adjacent images.

    Args:
        count: how many.
        img_size: pixels on each side of a tile.
        device: of the tensors.
        dtype: of the pixels.
        seed: of tokens and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    tiles = itertools.cycle((1, 2, 1, 3, 1))
    places = itertools.cycle(((3,), (0,), (2, 9), (), (-1,), (4, 5)))
    result = []
    for at in itertools.islice(places, count):
        length = int(torch.randint(32, 128, (), generator=generator))
        ids = torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
        ids[list(at)] = IMAGE_TOKEN_ID
        num_tiles = [next(tiles) for _ in at]
        pixels = torch.randn(sum(num_tiles), 3, img_size, img_size, generator=generator)
        result.append(
            {
                "input_ids": ids.to(device),
                "images": pixels.to(device, dtype) if at else None,
                "num_image_tiles": torch.tensor(num_tiles, dtype=torch.int, device=device),
            }
        )
    return result
