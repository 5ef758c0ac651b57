"""``isolation`` and ``verify`` on real parallel jobs, and checkpoints of a model with the hook."""

import json
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

import mcore_packing as mp
from mcore_packing.testing import sources, tiny

from . import processes

WORKER = Path(__file__).parent / "verify_worker.py"
BRIDGE_WORKER = WORKER.with_name("bridge_verify_worker.py")
EXAMPLE = Path(__file__).parent.parent / "examples/verify_any_vlm.py"
SIZE = 28
PARTS = {"language_model", "vision_model", "vision_projection"}


@pytest.mark.parametrize(
    "sizes, ranks, copies",
    [
        pytest.param(("--cp", "2"), "01", 1, id="cp2"),
        pytest.param(("--cp", "2", "--share"), "01", 1, id="cp2shared", marks=pytest.mark.ci),
        pytest.param(("--tp", "2"), "01", 2, id="tp2sp"),
        pytest.param(("--pp", "2"), "1", 1, id="pp2"),
        pytest.param((), "01", None, id="dp2"),
        pytest.param(("--fsdp",), "01", None, id="fsdp2"),
    ],
)
def test_checks_on_every_rank(sizes, ranks, copies):
    (line,) = (x for x in processes.run(WORKER, *sizes).splitlines() if x.startswith("{"))
    found = json.loads(line)
    assert found["verdicts"] == ["right", "right", "wrong", "wrong"] and found["all_agree"]
    assert sorted(found["by_rank"]) == list(ranks)
    assert all(error == pytest.approx(1, abs=1e-6) for error in found["by_rank"].values())
    if copies is not None:  # else replicas have rows of their own
        assert found["num_compared"] == found["num_trained"] * copies
    assert {part for part, _, _ in found["gradients"]} == PARTS
    assert all(error < 1e-6 and said == "right" for _, error, said in found["gradients"])
    # Modes, gradients, random numbers, what the hook saw, the training loop's functions.
    assert found["left_behind"] == [[], []]
    leaking = {sequence for _, sequence in found["leaks"]}
    assert {1, 2, 3, 4, 5} <= leaking  # under context parallelism the first one, too
    assert {sequence for _, sequence in found["wrong"]} == leaking
    assert {rank for rank, _ in found["leaks"]} == {*map(int, ranks)}
    # A row that cannot be run, on the last replica only: an error on all ranks, at once.
    count = found["num_samples"][-1]
    for errors in found["errors"]:
        for said, seconds in errors:
            assert said.endswith(f"has {count - 1} sequences, but was packed with {count} samples")
            assert seconds < 20


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(("--cp", "2"), id="cp2"),
        pytest.param(("--tp", "2"), id="tp2sp"),
        pytest.param(("--pp", "2", "--vp", "2"), id="pp2vp2"),
        pytest.param(("--pp", "2"), id="pp2", marks=pytest.mark.slow),
        pytest.param((), id="dp2", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_is_no_llava(sizes):
    check_example(processes.run(EXAMPLE, *sizes))


def test_a_model_that_is_no_llava_in_one_process():
    check_example(processes.run(EXAMPLE, processes=1))


@pytest.mark.slow
@pytest.mark.parametrize("tp", ["1", "2"])
def test_qwen25_vl_of_bridge(tp):
    bridge = pytest.importorskip("mcore_packing.testing.bridge")
    if not sources.BRIDGE.has("main"):
        pytest.skip(f"no sources of Megatron-Bridge. {sources.BRIDGE.how}")
    options = {"processes": int(tp), "env": bridge.environment("main"), "timeout": 600}
    right, dropped = processes.run(BRIDGE_WORKER, "--tp", tp, **options).split(
        "without_boundaries\n"
    )
    assert "isolation: right, bit by bit" in right and "one by one: right" in right
    assert "RIGHT: gradient of language_model" in right and "RIGHT: gradient of visual" in right
    assert "sequence 4 sees 0, 1, 2, 3 (" in dropped and "one by one: wrong" in dropped


def check_example(said: str):
    begin = said.index("step\nisolation")
    right, dropped = said[begin:].split("without_boundaries\n")
    dropped, run_on = dropped.split("without_restart\n")
    assert "isolation: right, bit by bit" in right and "one by one: right" in right
    assert "RIGHT: gradient of language_model" in right and "RIGHT: gradient of patches" in right
    assert "isolation: wrong" in dropped and "one by one: wrong" in dropped
    assert "sequence 5 sees 0, 1, 2, 3, 4 (" in dropped
    assert "isolation: right" in run_on and "one by one: wrong" in run_on
    assert all(f": sequence {sequence} (" in run_on for sequence in range(1, 6))


@pytest.mark.usefixtures("megatron")
def test_checkpoints_do_not_know_the_hook():
    plain, hooked = (tiny.llava_model("rope", img_size=SIZE, seed=seed) for seed in (0, 1))
    names, shards = list(hooked.state_dict()), hooked.sharded_state_dict()
    mp.install(hooked)
    state = hooked.state_dict()
    assert list(state) == names
    for name, tensor in hooked.named_parameters():
        assert state[name].data_ptr() == tensor.data_ptr()

    found = hooked.sharded_state_dict()
    assert found.keys() == shards.keys()
    for name, shard in shards.items():
        assert type(found[name]) is type(shard)
        if isinstance(shard, ShardedTensor):
            assert vars(found[name].without_data()) == vars(shard.without_data())

    plain.load_state_dict(state)
    assert all(map(torch.equal, plain.parameters(), hooked.parameters()))
    other = tiny.llava_model("rope", img_size=SIZE, seed=2)
    hooked.load_state_dict(other.state_dict())
    assert all(map(torch.equal, other.parameters(), hooked.parameters()))
