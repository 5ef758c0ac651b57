"""Kernels launched on a GPU that is not there: all that a launch costs the host, and no more."""

import contextlib
import importlib
import warnings
from types import SimpleNamespace

import torch

from .. import ops


class _NoGpu:
    """A Triton driver of an H100 that does not run what is launched."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
    )

    def launcher_cls(self, source, metadata):
        return lambda *args: None

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def launched_nowhere(results: dict[str, torch.Tensor] | None = None):
    """Ops on CPU tensors compile their kernels for an H100, bind their arguments, and run nothing:
    what they return holds whatever the memory held.

    Args:
        results: what an op returns nevertheless, by its name, where it returns one tensor.

    Yields:
        ``{op: the Triton kernel}``, whose caches hold what was compiled.
    """
    from triton.runtime.driver import driver

    results, kernels = results or {}, {}
    library = torch.library.Library("mcore_packing", "IMPL")
    for name, module in ops.KERNELS.items():
        module = importlib.import_module(f"mcore_packing.kernels.{module}")
        launch, result = getattr(module, name), results.get(name)
        kernels[name] = next(
            getattr(module, found) for found in vars(module) if found.endswith("_kernel")
        )

        def launched(*args, launch=launch, result=result):
            out = launch(*args)
            return out if result is None else out.copy_(result)

        with warnings.catch_warnings():  # of the override
            warnings.simplefilter("ignore")
            library.impl(name, launched, "CPU", allow_override=True)
    before = driver._active
    driver.set_active(_NoGpu())
    try:
        yield kernels
    finally:
        driver._active = before
        library._destroy()
