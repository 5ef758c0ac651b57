"""Fixtures: real Megatron on this machine, and Hypothesis without randomness."""

import contextlib
import os
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch

if os.environ.get("MCORE_PACKING_TEST_KERNELS") == "1":
    # Ops on CPU tensors run the kernels, under Triton's interpreter: see test_kernels.py.
    from mcore_packing.kernels import expand_rows, expand_tokens, layout, source_positions

    from mcore_packing import reference

    for module in (layout, expand_tokens, source_positions, expand_rows):
        for name in ("layout", "expand_tokens", "source_positions", "expand_rows", "collect_rows"):
            if hasattr(module, name):
                setattr(reference, name, getattr(module, name))

# Subprocesses find this checkout too.
ROOT = str(Path(__file__).parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=300, database=None
)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def megatron():
    """Megatron-Core, able to build and run models on this machine's GPU or CPU."""
    from mcore_packing import tiny

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tiny.megatron():
            yield


@pytest.fixture
def poisoned_memory():
    """``torch.empty`` gives NaN and INT_MAX, so that what is not written shows."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
