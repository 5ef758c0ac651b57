"""scripts/train_llava.py: the same losses in every packing and on all ranks, killed and resumed."""

import json
import time
from pathlib import Path

import pytest

from . import processes

SCRIPT = Path(__file__).parent.parent / "scripts/train_llava.py"
STEPS = 8
# Rows that one process, two context-parallel and two data-parallel ranks all can take.
COMMON = [
    "--steps", str(STEPS), "--row-length", "384", "--rows-per-step", "2", "--seq-multiple", "4",
    "--evaluate-every", "100", "--save-every", "2",
]  # fmt: skip


def words(output: Path, *options: str) -> list[str]:
    return [*COMMON, "--output", str(output), *options]


def train(output: Path, *options: str, count: int = 1) -> list[float]:
    """The losses of a run."""
    said = processes.run(SCRIPT, *words(output, *options), processes=count)
    assert "WRONG" not in said
    return losses(output)


def losses(output: Path, packing: str = "hook") -> list[float]:
    log = output / packing / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["loss"] for line in lines]


def train_and_kill(output: Path, *options: str, count: int = 1) -> None:
    """Start a run, and kill -9 it in the middle of a step, some steps after a checkpoint."""
    options = words(output, *options)
    with processes.started(SCRIPT, *options, processes=count, folder=output) as ranks:
        limit = time.monotonic() + 120
        while len(losses(output)) < 5:
            assert all(rank.is_alive() for rank in ranks) and time.monotonic() < limit
            time.sleep(0.005)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[float]:
    """One process, not interrupted."""
    found = train(tmp_path_factory.mktemp("reference"))
    assert len(found) == STEPS and found[-1] < found[0]
    return found


def test_every_packing_trains_alike(tmp_path):
    packings = ["hook", "one-by-one", "padded", "dropped"]
    train(tmp_path, "--steps", "4", "--packing", *packings)
    alone = losses(tmp_path, "one-by-one")
    assert losses(tmp_path, "hook") == pytest.approx(alone, rel=1e-5)
    assert losses(tmp_path, "padded") == pytest.approx(alone, rel=1e-5)
    assert losses(tmp_path, "dropped") != pytest.approx(alone, rel=1e-3)


def test_packings_that_are_not_verified_are_refused(tmp_path):
    options = words(tmp_path, "--packing", "dropped", "--verify-packing", "2")
    status, _, said = processes.fork(SCRIPT, *options)
    assert status == 2 and "--verify-packing needs --packing hook" in said


def test_killed_and_resumed(reference, tmp_path):
    train_and_kill(tmp_path)
    assert 5 <= len(losses(tmp_path)) < STEPS
    options = words(tmp_path, "--resume", "--rows-per-step", "1")
    status, _, said = processes.fork(SCRIPT, *options)
    assert status == 2
    assert "has rows_per_step 2, not 1" in said and "Traceback" not in said
    assert train(tmp_path, "--resume") == reference  # to the last bit


@pytest.mark.parametrize(
    "options, count_after",
    [
        pytest.param(["--cp", "2"], 2, id="cp2"),
        pytest.param(["--pp", "2"], 2, id="pp2", marks=pytest.mark.slow),
        pytest.param([], 2, id="dp2", marks=pytest.mark.slow),
        pytest.param([], 1, id="dp2-then-one", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_on_ranks(options, count_after, reference, tmp_path):
    train_and_kill(tmp_path, *options, count=2)
    assert 5 <= len(losses(tmp_path)) < STEPS
    verified = [*options, "--resume", "--verify-packing", "100"]
    found = train(tmp_path, *verified, count=count_after)
    assert found == pytest.approx(reference, rel=1e-5)
