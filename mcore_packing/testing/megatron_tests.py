"""A pytest plugin: Megatron's own LLaVA tests on a CPU, with the hook in every ``LLaVAModel``.

In a folder that ``sources.unpacked`` gave::

    pytest -c /dev/null --rootdir . -p mcore_packing.testing.megatron_tests tests/unit_tests/models

``--without-hook`` runs them as they are. Tests for several processes are left out of a single one.
"""

import functools
import importlib
import os
import sys
import types
from pathlib import Path

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.transformer_config import TransformerConfig

import mcore_packing as mp

from .. import cpu

INSTALLED = []  # the handle of every model that was built


def pytest_addoption(parser):
    parser.addoption("--without-hook", action="store_true", help="run the tests as they are")


def pytest_configure(config):
    config.addinivalue_line("markers", "internal: Megatron's own mark")
    tests = types.ModuleType("tests")  # theirs, not those of a checkout of ours on the path
    tests.__path__ = [str(Path.cwd() / "tests")]
    sys.modules["tests"] = tests
    _stand_in_for_megatron_training()
    context = cpu.megatron_on_cpu()
    context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))
    for name in ("get_gpt_layer_with_transformer_engine_spec",
                 "get_gpt_layer_with_transformer_engine_submodules"):  # fmt: skip
        if hasattr(gpt_layer_specs, name):
            setattr(gpt_layer_specs, name, _local(name))
    _initialize_on_cpu()
    if not config.getoption("--without-hook"):
        _install_in_every_model()


def pytest_collection_modifyitems(items):
    utilities = importlib.import_module("tests.unit_tests.test_utilities").Utils
    utilities.initialize_model_parallel = staticmethod(lambda *args, **kwargs: None)
    utilities.destroy_model_parallel = staticmethod(lambda: None)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    for item in items:
        if "TestLLaVAModelTokenParallel" in item.nodeid and "process_embedding" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="needs eight processes"))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(INSTALLED)} models had the hook")


def _stand_in_for_megatron_training() -> None:
    """The tests store their arguments in ``megatron.training``, which no package has."""
    names = {
        "megatron.training": (),
        "megatron.training.global_vars": ("set_args",),
        "megatron.training.argument_utils": (
            "gpt_config_from_args", "hybrid_config_from_args", "pretrain_cfg_container_from_args",
        ),
    }  # fmt: skip
    for name, functions in names.items():
        module = types.ModuleType(name)
        for function in functions:
            setattr(module, function, lambda *args, **kwargs: None)
        sys.modules[name] = module


def _local(name):
    """Megatron's local layer, with ``PackedAttention``, where the tests ask for one of TE."""

    def spec(*args, **kwargs):
        layer = cpu.layer_spec(*args, **kwargs)
        return layer.submodules if name.endswith("submodules") else layer

    return spec


def _initialize_on_cpu() -> None:
    after = TransformerConfig.__post_init__

    @functools.wraps(after)
    def initialize_on_cpu(self):
        self.use_cpu_initialization = True
        after(self)

    TransformerConfig.__post_init__ = initialize_on_cpu


def _install_in_every_model() -> None:
    before = LLaVAModel.__init__

    @functools.wraps(before)
    def init(self, *args, **kwargs):
        before(self, *args, **kwargs)
        # Their packed row has boundaries inside an image: expanded ones, as Energon makes them.
        INSTALLED.append(mp.install(self, space="expanded"))

    LLaVAModel.__init__ = init
