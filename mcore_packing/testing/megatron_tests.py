"""A pytest plugin: Megatron's own LLaVA tests on a CPU, with the hook in every ``LLaVAModel``.

With a folder that ``sources.MEGATRON.unpacked`` gave, and its ``megatron`` or another one on the
path::

    pytest -c /dev/null --rootdir $folder -p mcore_packing.testing.megatron_tests $folder/tests/...

``--without-hook`` runs them as they are. Tests for several processes are left out of a single one.
"""

import functools
import importlib
import os
import sys
import types

import pytest
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

import mcore_packing as mp

from .. import cpu
from . import tiny

INSTALLED = []  # the handle of every model that was built


def pytest_addoption(parser):
    parser.addoption("--without-hook", action="store_true", help="run the tests as they are")


def pytest_configure(config):
    config.addinivalue_line("markers", "internal: Megatron's own mark")
    tests = types.ModuleType("tests")  # theirs, not those of a checkout of ours on the path
    tests.__path__ = [str(config.rootpath / "tests")]
    sys.modules["tests"] = tests
    _stand_in_for_megatron_training()
    context = cpu.megatron_on_cpu()
    context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))
    for name in ("get_gpt_layer_with_transformer_engine_spec",
                 "get_gpt_layer_with_transformer_engine_submodules"):  # fmt: skip
        if hasattr(gpt_layer_specs, name):
            setattr(gpt_layer_specs, name, _local(name))
    transformer_engine.TENorm = WrappedTorchNorm
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
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attention.submodules.linear_qkv = _NormAndLinear
        tiny.submodules(parts.mlp).linear_fc1 = _NormAndLinear
        return layer.submodules if name.endswith("submodules") else layer

    return spec


class _NormAndLinear(ColumnParallelLinear):
    """Normalises its input first, as TE's layer does: the tests count its parameters too."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.norm = WrappedTorchNorm(config, input_size, config.layernorm_epsilon)

    def forward(self, input_, *args, **kwargs):
        return super().forward(self.norm(input_), *args, **kwargs)


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
        INSTALLED.append(mp.install(self, space="expanded", on_missing="pass"))

    LLaVAModel.__init__ = init
