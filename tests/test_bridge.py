"""The guide for Megatron-Bridge and its example, run on Bridge's own models on a CPU."""

import functools
import sys
from pathlib import Path

import pytest

from mcore_packing.testing import bridge
from mcore_packing.testing.sources import BRIDGE, SourcesMissing

from . import processes

pytestmark = pytest.mark.ci

TESTS = Path(__file__).parent
VERSIONS = "0.6.0", "main"
RECIPES = "src/megatron/bridge/recipes/nemotron_vl/nemotron_nano_v2_vl.py"


def sources(version: str) -> Path:
    if sys.version_info < (3, 11):
        pytest.skip("no sources of Megatron-Bridge that this Python can run: it asks for 3.12")
    if not BRIDGE.has(version):
        pytest.skip(f"no sources of Megatron-Bridge {version}. {BRIDGE.how}")
    return BRIDGE.unpacked(version)


@functools.cache
def run(worker: str, version: str, *sizes: str) -> dict:
    """What a worker prints that is started as a job of one or two processes."""
    sources(version)
    try:
        environment = bridge.environment(version)
    except SourcesMissing as missing:
        pytest.skip(str(missing))
    options = {"processes": 2 if sizes else 1, "env": environment, "timeout": 600}
    return processes.result(TESTS / worker, *sizes, **options)


CP1 = pytest.param("main", (), id="main-cp1")
CASES = [
    CP1,
    pytest.param("main", ("--cp", "2"), id="main-cp2"),
    pytest.param("main", ("--tp", "2"), id="main-tp2sp"),
    pytest.param("0.6.0", ("--cp", "2"), id="0.6.0-cp2"),
]


@pytest.mark.parametrize("version, sizes", CASES)
def test_the_lines_of_the_guide_train_on_packed_rows(version, sizes):
    found, alone = run("bridge_worker.py", version, *sizes), run("bridge_worker.py", "main")
    assert found["ours"] and found["samples_per_row"] == [4, 2]
    assert found["seq_multiple"] == (4 if "--cp" in sizes else 1)
    assert found["is_right"] == [True, True], found["says"]
    assert len(found["by_rank"]) == (2 if sizes else 1)
    assert found["num_trained"] == alone["trained_one_by_one"]
    assert found["packed"] == pytest.approx(alone["one_by_one"], abs=2e-3)
    assert abs(alone["dropped"] - alone["one_by_one"]) > 0.1  # it can be seen


@pytest.mark.parametrize("version, sizes", CASES)
def test_its_gradients_are_those_of_one_process(version, sizes):
    found, alone = run("bridge_worker.py", version, *sizes), run("bridge_worker.py", "main")
    assert not found["without_gradient"]
    assert len(found["gradients"]) > 15
    for name, norm in found["gradients"].items():
        assert norm == pytest.approx(alone["gradients"][name], rel=1e-3), name


def test_what_the_guide_says_of_boundaries_and_of_long_rows():
    found = run("bridge_worker.py", "main")
    assert found["same_boundaries"]
    assert "positions" in found["too_long"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_guide_imports_what_bridge_has(version):
    """The test of its lines puts a small model in the place of these."""
    package = sources(version) / "src/megatron/bridge"
    assert "as nemotron_nano_v2_vl_12b_sft_config" in (sources(version) / RECIPES).read_text()
    finetune = package / "training/finetune.py"
    assert "def finetune(\n    config: ConfigContainer,\n    forward_step_func:" in (
        finetune.read_text()
    )


@pytest.mark.parametrize("version, sizes", CASES[1:])
def test_what_the_guide_says_that_bridge_refuses(version, sizes):
    collate, step = run("bridge_worker.py", version, *sizes)["refuses"]
    assert "Nemotron-VL collation does not support in-batch packing" in collate
    if "--cp" in sizes:
        assert "require pipeline_model_parallel_size=1 and context_parallel_size=1" in step
    else:
        assert step is None


def test_qwen25_vl_of_bridge_is_right_packed():
    found = run("bridge_qwen_worker.py", "main")
    assert found["difference"] < 1e-5 < 0.1 < found["dropped"]
    assert found["images"] == 3 and found["rows"] < 1e-5  # of mp.data, with family="qwen2_5_vl"


@pytest.mark.parametrize("version", ["0.6.0"])
def test_without_a_clone_it_says_how_to_get_one(version, tmp_path, monkeypatch):
    monkeypatch.setenv(BRIDGE.variable, str(tmp_path))
    with pytest.raises(SourcesMissing, match=r"git clone https://github\.com/NVIDIA-NeMo"):
        bridge.environment(version)
