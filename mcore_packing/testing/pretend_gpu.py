"""A CPU that answers for a GPU, so that code which needs one can be rehearsed.

``python -m mcore_packing.testing.pretend_gpu SCRIPT ...`` or ``-m MODULE ...`` runs it so. Values
are right; times and memory mean nothing. Tensors "on cuda" say so of themselves, and mixing
devices, waiting under ``set_sync_debug_mode`` and what a capturing stream forbids are the errors
that they are on a GPU. Kernels do not run: ops have their reference.
"""

import contextlib
import os
import runpy
import sys
import time
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo
import torch.distributed as dist
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..megatron import attention

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "no GPU, pretended"
_MARK = "_pretends_to_be_on_a_gpu"
_MOVES = Tensor.to, Tensor.cuda, Tensor.cpu
_FROM_HOST = torch.tensor, torch.as_tensor, Tensor.new_tensor
_READS = (
    "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive",
)  # fmt: skip
# Functions that take tensors of both devices.
_MIXES = "copy_", "set_", "equal", "backward", "getitem", "setitem"


class State:
    """What the GPU that is not there is doing."""

    waits = "default"  # what set_sync_debug_mode said
    graph = None  # the CUDA graph that is being captured


def storage_of(tensor: Tensor):
    """None where there is none."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor was made on the GPU."""
    return getattr(storage_of(tensor), _MARK, False)


def tensors_in(*found) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def put(result, there: bool = True):
    """The same tensors, as made on the GPU or not."""
    for tensor in tensors_in(result):
        if (storage := storage_of(tensor)) is not None:
            setattr(storage, _MARK, there)
    return result


def put_new(out, given: list[Tensor]):
    """What a function gave, as made on the GPU where its memory is none that it was given."""
    old = {storage._cdata for x in given if (storage := storage_of(x)) is not None}
    put([x for x in tensors_in(out) if (s := storage_of(x)) is not None and s._cdata not in old])
    return out


def is_cuda(device) -> bool:
    """Whether the device of an argument is the GPU."""
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def refuse_in_capture(what: str) -> None:
    if State.graph is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def waited(what: str) -> None:
    """The host waits for the GPU here."""
    refuse_in_capture(what)
    said = f"called a synchronizing CUDA operation ({what})"
    if State.waits == "error":
        raise RuntimeError(said)
    if State.waits == "warn":
        warnings.warn(said, stacklevel=3)


class OnCpu(TorchFunctionMode):
    """Sends what asks for the GPU to the CPU, and marks what it gives."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _MOVES:
            return move(function, *args, **kwargs)
        if function is Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        given, device = tensors_in(args, kwargs), kwargs.get("device")
        there = any(map(on_gpu, given))
        if there and function is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if there and function is Tensor.type and len(args) == 1:
            return function(*args).replace("torch.", "torch.cuda.")
        if there and function is Tensor.tolist:
            waited("tolist")
        if there:
            refuse_mixture(function, given)
        if is_cuda(device):
            if function in _FROM_HOST and not there:
                waited("copy from pageable memory")
            return put(function(*args, **{**kwargs, "device": CPU}))
        out = function(*args, **kwargs)
        return put_new(out, given) if there and device is None else out


def move(function, tensor, *words, device=None, dtype=None, non_blocking=False, **more) -> Tensor:
    """``to``, ``cuda`` and ``cpu`` of a tensor."""
    for word in {Tensor.cpu: [CPU], Tensor.cuda: [GPU]}.get(function, words):
        if isinstance(word, Tensor):
            device, dtype = word.device, word.dtype
        elif isinstance(word, torch.dtype):
            dtype = word
        elif isinstance(word, bool):
            non_blocking = word
        else:
            device = word
    comes, dtype = is_cuda(device), dtype or tensor.dtype
    if device is None or on_gpu(tensor) == comes:
        return tensor.to(dtype, **more)
    if not non_blocking:
        waited("copy between host and GPU")
    return put(tensor.to(dtype, copy=True), comes)


def refuse_mixture(function, given: list[Tensor]) -> None:
    """What runs on a GPU takes scalars from the CPU, and no other tensor."""
    name = function.__name__
    for tensor in given:
        if not on_gpu(tensor) and tensor.dim() and name not in _MIXES and name[0] != "_":
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {name} got one on the CPU, "
                f"{list(tensor.shape)} {tensor.dtype}"
            )


class Propagation(TorchDispatchMode):
    """What is computed from tensors on the GPU is there too; what makes the host wait is
    noticed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = tensors_in(args, kwargs)
        there = any(map(on_gpu, given))
        if there:
            notice(function.overloadpacket.__name__, given, args, kwargs)
        if is_cuda(kwargs.get("device")):  # inside a function that OnCpu let through
            there, kwargs["device"] = True, CPU
        out = function(*args, **kwargs)
        if there:
            put_new(out, given)
        if State.graph is not None:
            State.graph.calls.append((function, args, kwargs, out))
        return out


def notice(name: str, given: list[Tensor], args, kwargs) -> None:
    """Wait where a GPU makes the host wait."""
    indices = args[1] if name in ("index", "index_put", "index_put_") else ()
    if any(i is not None and i.dtype == torch.bool for i in indices):
        if name == "index" or args[2].numel() > 1:  # one value: that is a masked_fill
            waited(f"{name} by a mask")
    elif name in _READS or (name == "equal" and not same(*given)):
        waited(name)
    elif name == "copy_" and on_gpu(given[0]) != on_gpu(given[1]):
        is_scalar = given[1].dim() == 0 and on_gpu(given[0])
        if not (is_scalar or kwargs.get("non_blocking", args[2] if len(args) > 2 else False)):
            waited("copy between host and GPU")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two are one: then ``torch.equal`` does not look."""
    views = [(x.data_ptr(), x.storage_offset(), x.shape, x.stride()) for x in (a, b)]
    return views[0] == views[1]


class Graph:
    """A CUDA graph: the operations that it saw, run again on the same memory."""

    def __init__(self):
        self.calls = []

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                    if not same(old, new):
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph):
    """``torch.cuda.graph``."""
    State.graph = graph
    try:
        yield
    finally:
        State.graph = None


class Event:
    """``torch.cuda.Event``: the time on the host."""

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        refuse_in_capture("Event.synchronize")

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def _state_of_generator(*args, **kwargs):
    refuse_in_capture("the state of a generator")
    return torch.get_rng_state()


def _set_state_of_generator(state, *args, **kwargs):
    refuse_in_capture("the state of a generator")
    torch.set_rng_state(state)


_PROPERTIES = SimpleNamespace(
    name=NAME, multi_processor_count=132, L2_cache_size=1 << 20, total_memory=80 << 30
)
_CUDA = {
    "PRETENDED": True,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *args: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda *args: None,
    "get_device_name": lambda *args: NAME,
    "get_device_capability": lambda *args: (9, 0),
    "get_device_properties": lambda *args: _PROPERTIES,
    "synchronize": lambda *args: refuse_in_capture("synchronize"),
    "set_sync_debug_mode": lambda mode: setattr(State, "waits", mode),
    "is_current_stream_capturing": lambda: State.graph is not None,
    "CUDAGraph": Graph,
    "graph": capture,
    "Event": Event,
    "current_stream": lambda *args: SimpleNamespace(wait_stream=lambda stream: None),
    "manual_seed": torch.default_generator.manual_seed,
    "manual_seed_all": torch.default_generator.manual_seed,
    "get_rng_state": _state_of_generator,
    "set_rng_state": _set_state_of_generator,
    "memory_allocated": lambda *args: 0,
    "max_memory_allocated": lambda *args: 0,
    "reset_peak_memory_stats": lambda *args: None,
    "empty_cache": lambda *args: None,
    "_lazy_init": lambda *args: None,
}


def _patches():
    """``(object, attribute, value)`` of everything that asks for a GPU, or looks behind the
    modes."""
    device, start = Tensor.device, dist.init_process_group
    yield Tensor, "device", property(lambda x: GPU if on_gpu(x) else device.__get__(x))
    yield Tensor, "is_cuda", property(on_gpu)
    yield Tensor, "is_cpu", property(lambda x: not on_gpu(x))
    yield from ((torch.cuda, name, value) for name, value in _CUDA.items())
    yield random, "_get_cuda_rng_state", _state_of_generator
    yield random, "_set_cuda_rng_state", _set_state_of_generator
    yield dist, "init_process_group", lambda backend, **kwargs: start("gloo", **kwargs)
    yield attention, "varlen_attn", None
    yield fake_tensor, "init_gpu_context", lambda device: None
    yield torch, "compile", lambda function, **options: function


@contextlib.contextmanager
def pretended_gpu():
    """There is a GPU, as far as torch and Megatron-Core can tell, for as long as it is open."""
    with contextlib.ExitStack() as stack:
        for target, name, value in _patches():
            stack.enter_context(patch.object(target, name, value, create=True))
        stack.enter_context(torch._dynamo.config.patch(disable=True))
        stack.enter_context(OnCpu())
        stack.enter_context(Propagation())
        yield


def main() -> None:
    """Run a script or a module under ``pretended_gpu``."""
    del sys.argv[0]
    with pretended_gpu():
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
