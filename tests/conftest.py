"""Fixtures: real Megatron on this machine, and Hypothesis without randomness."""

import contextlib
import importlib
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

LAUNCHED = Counter()  # kernels that ran, by op: see test_kernels.py


def dispatch_to_kernels() -> torch.library.Library:
    """Ops on CPU tensors run the kernels, under Triton's interpreter, and are counted."""
    from mcore_packing import ops

    library = torch.library.Library("mcore_packing", "IMPL")
    for name, module in ops.KERNELS.items():
        launch = getattr(importlib.import_module(f"mcore_packing.kernels.{module}"), name)

        def counted(*args, name=name, launch=launch):
            LAUNCHED[name] += 1
            return launch(*args)

        library.impl(name, counted, "CPU", allow_override=True)
    return library


if os.environ.get("MCORE_PACKING_TEST_KERNELS") == "1":
    KERNELS_LIBRARY = dispatch_to_kernels()


def pytest_terminal_summary(terminalreporter):
    if LAUNCHED:
        terminalreporter.write_line(f"launched {json.dumps(LAUNCHED)}")
    for report in terminalreporter.stats.get("skipped", ()):
        reason = str(report.longrepr[-1] if report.longrepr else "")
        if "no sources of Megatron-Core" in reason:  # loud: these tests matter
            terminalreporter.write_line(f"NOT TESTED {report.nodeid}: {reason}", red=True)


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
    from mcore_packing.testing import tiny

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


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Nobody looks at a value, but through ``read_later``, as on a GPU. Gives the reads: "queued"
    or "read", one for each."""
    from mcore_packing import layout, llava, packed_seq

    events = []

    def read_later(values):
        events.append("queued")

        def wait():
            events.append("read")
            return values.tolist()

        return wait

    for room in (layout, packed_seq):
        monkeypatch.setattr(room, "may_look", lambda tensor: False)
    for room in (layout, llava):
        monkeypatch.setattr(room, "read_later", read_later)
    return events
