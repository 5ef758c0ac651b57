"""Fixtures: real Megatron on this machine, and Hypothesis without randomness."""

import contextlib
import dataclasses
import importlib
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

from .laws import IS_FULL, examples

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
        if "no sources of" in reason:  # loud: these tests matter
            terminalreporter.write_line(f"NOT TESTED {report.nodeid}: {reason}", red=True)


# Subprocesses find this checkout too.
ROOT = str(Path(__file__).parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

hypothesis.settings.register_profile("repeatable", examples(300))
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("ci") and not IS_FULL:
            item.add_marker(pytest.mark.skip(reason="runs where MCORE_PACKING_TESTS=full"))


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
    from mcore_packing import layout
    from mcore_packing.megatron import call, params

    events = []

    def read_later(values):
        events.append("queued")

        def wait():
            events.append("read")
            return values.tolist()

        return wait

    for room in (layout, params):
        monkeypatch.setattr(room, "may_look", lambda tensor: False)
    for room in (layout, call):
        monkeypatch.setattr(room, "read_later", read_later)
    return events


@pytest.fixture
def sent_layout(monkeypatch):
    """The layout that a data path, on a CPU, would send with these arguments of ``forward``."""
    import mcore_packing as mp
    from mcore_packing import inputs, layout

    def build(given, model, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(layout, "may_look", inputs.may_look)
            return mp.PackedLayout.build(
                given["input_ids"],
                given["packed_seq_params"].cu_seqlens_q,
                given["num_image_tiles"] * model.img_seq_len,
                dataclasses.replace(mp.row_spec(model), **changes),
                space="collapsed",
            )

    return build


@pytest.fixture
def seen():
    """What a language model is called with, call by call."""
    calls = []

    def watch(model):
        hook = lambda module, args, kwargs: calls.append(kwargs)  # noqa: E731
        model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
        return calls

    return watch


@pytest.fixture
def no_layers():
    """Notes when the first layer of a language model runs."""

    def watch(model, events):
        run = lambda module, args: events.append("layer")  # noqa: E731
        model.language_model.decoder.layers[0].register_forward_pre_hook(run)

    return watch
