"""Lets real Megatron-Core build, run and train on a machine without a GPU."""

import contextlib
import importlib
import os
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal import llava_model
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from ..reference import local_positions
from .attention import PackedAttention

CPU = torch.device("cpu")


@contextlib.contextmanager
def megatron_on_cpu(**parallel_sizes):
    """Run Megatron-Core on CPU tensors and gloo for as long as the context is open.

    Sends everything that asks for CUDA to the CPU, gives the random number tracker the CPU
    generator, makes torch norms carry the sequence-parallel mark, and supplies what ``llava_model``
    lacks without Transformer Engine. Configs need ``use_cpu_initialization=True`` and layers the
    spec of ``layer_spec``. Where no process group exists, it makes one of the processes that
    torchrun started, else of this single one, and model parallel groups of the given sizes. On
    leaving, groups that were made are destroyed, and patches are undone.

    Not covered: gradient clipping and the mixed-precision optimizer of Megatron-Core, which insist
    on CUDA tensors.

    Args:
        **parallel_sizes: for ``parallel_state.initialize_model_parallel``.

    Source:
        Checked with Megatron-Core 0.12.3 to main.

    Example:
        >>> with megatron_on_cpu():
        ...     torch.zeros(2, device="cuda").cuda().device
        device(type='cpu')
    """
    with contextlib.ExitStack() as stack:
        for target, name, value in _patches():
            stack.enter_context(patch.object(target, name, value, create=True))
        stack.enter_context(clip_norm())
        stack.enter_context(_CudaToCpu())
        stack.enter_context(process_groups("gloo", **parallel_sizes))
        yield


@contextlib.contextmanager
def process_groups(backend: str, **parallel_sizes):
    """What Megatron-Core expects to be initialised, as far as it is not."""
    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
                dist.init_process_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel(**parallel_sizes)
            stack.callback(parallel_state.destroy_model_parallel)
        tracker = random.get_cuda_rng_tracker()
        if not tracker.is_initialized():
            random.model_parallel_cuda_manual_seed(1234)
            stack.callback(tracker.reset)
        yield


def layer_spec(num_experts: int | None = None, **kwargs) -> ModuleSpec:
    """Megatron's local GPT layer with ``PackedAttention`` as its core attention.

    Args:
        num_experts: of the MLP, if it has any.
        **kwargs: for ``get_gpt_layer_local_spec``.
    """
    spec = get_gpt_layer_local_spec(num_experts, **kwargs)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def _patches():
    """``(object, attribute, value)`` of everything that stands in Megatron's way."""
    tracker = random.CudaRNGStatesTracker
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self.clone()
    yield torch.nn.Module, "cuda", lambda self, *args, **kwargs: self
    yield torch.cuda, "current_device", lambda: CPU
    yield torch.cuda, "synchronize", lambda *args: None
    yield torch.cuda, "Stream", _Stream
    yield torch.cuda, "current_stream", lambda *args: _STREAM
    yield torch.cuda, "stream", contextlib.nullcontext
    if hasattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream"):
        yield MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None
    yield torch.cuda, "manual_seed", torch.manual_seed
    yield torch.cuda, "get_rng_state", lambda *args: torch.get_rng_state()
    yield random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()
    yield random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    yield tracker, "fork", _fork
    yield WrappedTorchNorm, "__new__", staticmethod(_norm)
    if not hasattr(moe_utils, "te_general_gemm"):
        yield moe_utils, "te_general_gemm", None
    if not llava_model.HAVE_TE:
        for stack in hybrid_stacks():
            yield stack, "TENorm", WrappedTorchNorm
        yield llava_model, "HAVE_TE", True
        yield llava_model, "HAVE_TEX", True
        yield llava_model, "TEDotProductAttention", PackedAttention
        yield llava_model, "is_te_min_version", lambda *args, **kwargs: True
        yield llava_model, "tex", SimpleNamespace(thd_get_partitioned_indices=_partitioned_indices)


def hybrid_stacks():
    """The modules that build hybrid language models, and name TE's norm; renamed in 0.18."""
    for name in "ssm.mamba_block", "models.hybrid.hybrid_block":
        with contextlib.suppress(ImportError):
            yield importlib.import_module(f"megatron.core.{name}")


@contextlib.contextmanager
def clip_norm():
    """Give the CLIP tower a default norm that takes Megatron's config where TE is missing."""
    init = CLIPViTModel.__init__
    before = init.__defaults__
    init.__defaults__ = tuple(
        WrappedTorchNorm if value is torch.nn.LayerNorm else value for value in before
    )
    try:
        yield
    finally:
        init.__defaults__ = before


class _Stream:
    """A stream, and an event, where nothing is asynchronous."""

    def __new__(cls, *args, **kwargs):
        return _STREAM

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> "_Stream":
        return self

    def synchronize(self) -> None:
        pass


_STREAM = object.__new__(_Stream)


class _CudaToCpu(torch.overrides.TorchFunctionMode):
    """Redirects ``device="cuda"`` arguments."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        return function(*args, **kwargs)


@contextlib.contextmanager
def _fork(self, name="model-parallel-rng"):
    """``CudaRNGStatesTracker.fork`` on the CPU generator."""
    outside = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


_torch_norm = WrappedTorchNorm.__new__


def _norm(cls, config, *args, **kwargs):
    """A torch norm whose gradients are reduced over tensor-parallel ranks where rows are split."""
    with patch.object(config, "sequence_parallel", False):
        norm = _torch_norm(cls, config, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _partitioned_indices(cu_seqlens, size, world_size, rank):
    return local_positions(cu_seqlens, size, world_size, rank)
