"""scripts/train_llava.py: the same losses in every packing and on all ranks, killed and resumed,
on other parallel sizes too; and what it answers to damage and mistakes."""

import contextlib
import io
import json
import logging
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import processes

SCRIPT = Path(__file__).parent.parent / "scripts/train_llava.py"
STEPS = 8
# Rows that one process, two context-parallel and two data-parallel ranks all can take.
COMMON = [
    "--steps", str(STEPS), "--row-length", "384", "--rows-per-step", "2", "--seq-multiple", "4",
    "--evaluate-every", "100", "--save-every", "2",
]  # fmt: skip
SHORT = ["--steps", "4", "--save-every", "2", "--rows-per-step", "1"]


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
def scripts():
    """Modules of the folder."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        import checkpoints
        import train_llava

        yield SimpleNamespace(train_llava=train_llava, checkpoints=checkpoints)
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(scripts):
    """The script in this process: its status, and what it says."""

    def run(output: Path, *options: str) -> SimpleNamespace:
        said, errors = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(),
        ):
            try:
                status = scripts.train_llava.main([*COMMON, "--output", str(output), *options])
            except SystemExit as error:
                status = error.code
        return SimpleNamespace(status=status, said=said.getvalue(), errors=errors.getvalue())

    return run


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory) -> list[float]:
    """One process, not interrupted."""
    output = tmp_path_factory.mktemp("reference")
    assert run(output).status == 0
    found = losses(output)
    assert len(found) == STEPS and found[-1] < found[0]
    return found


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """A short run, with checkpoints of the steps 2 and 4."""
    output = tmp_path_factory.mktemp("finished")
    assert run(output, *SHORT).status == 0
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_one_line(done, text: str) -> bool:
    return done.status == 2 and text in done.errors and done.errors.count("\n") == 1


def test_every_packing_trains_alike(run, tmp_path):
    packings = ["hook", "one-by-one", "padded", "dropped"]
    assert run(tmp_path, "--steps", "4", "--packing", *packings).status == 0
    alone = losses(tmp_path, "one-by-one")
    assert losses(tmp_path, "hook") == pytest.approx(alone, rel=1e-5)
    assert losses(tmp_path, "padded") == pytest.approx(alone, rel=1e-5)
    assert losses(tmp_path, "dropped") != pytest.approx(alone, rel=1e-3)


def test_killed_and_resumed(reference, tmp_path):
    train_and_kill(tmp_path)
    assert 5 <= len(losses(tmp_path)) < STEPS
    assert train(tmp_path, "--resume") == reference  # to the last bit


ONE, DP, CP, TP, PP = [], [], ["--cp", "2"], ["--tp", "2"], ["--pp", "2"]


@pytest.mark.parametrize(
    "before, after, counts",
    [
        pytest.param(CP, TP, (2, 2), id="cp2-then-tp2"),
        pytest.param(PP, ONE, (2, 1), id="pp2-then-one", marks=pytest.mark.ci),
        pytest.param(ONE, CP, (1, 2), id="one-then-cp2", marks=pytest.mark.slow),
        pytest.param(TP, PP, (2, 2), id="tp2-then-pp2", marks=pytest.mark.slow),
        pytest.param(PP, DP, (2, 2), id="pp2-then-dp2", marks=pytest.mark.slow),
        pytest.param(DP, ONE, (2, 1), id="dp2-then-one", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_on_other_ranks(before, after, counts, reference, tmp_path):
    train_and_kill(tmp_path, *before, count=counts[0])
    assert 5 <= len(losses(tmp_path)) < STEPS
    verified = [*after, "--resume", "--verify-packing", "100"]
    found = train(tmp_path, *verified, count=counts[1])
    assert found == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize(
    "options, text",
    [
        ("--cp 0", "argument --cp: expected a whole number from 1 on, not 0"),
        ("--cp 2", "--cp, --tp and --pp ask for 2 processes or a multiple, there is 1"),
        ("--tp 3", "argument --tp: invalid choice: 3"),
        ("--save-every 0", "argument --save-every: expected a whole number from 1 on, not 0"),
        ("--evaluate-every x", "expected a whole number from 1 on, not x"),
        ("--verify-packing -1", "expected a whole number from 0 on, not -1"),
        ("--steps 1", "expected a whole number from 2 on, not 1"),
        ("--seed 99999999999", "expected a whole number from 0 on, not 99999999999"),
        ("--plot nothing/a.png", "expected a .png in a folder that there is"),
        ("--output setup.py", "argument --output: setup.py: File exists"),
        ("--packing hook hook", "--packing names one way twice"),
        ("--packing dropped --verify-packing 2", "--verify-packing needs --packing hook"),
        ("--packing padded --tp 1 --cp 2", "need --packing hook"),
        ("--resume --overwrite", "not allowed with argument"),
        ("--row-length 4", "no sample fits into a row of 4 positions"),
        ("--seq-multiple 4096", "max_length is 384, expected a multiple of 4096"),
    ],
)
def test_a_mistake_is_answered_with_one_line(options, text, run, tmp_path, monkeypatch):
    monkeypatch.chdir(SCRIPT.parents[1])
    done = run(tmp_path, *options.split())
    assert is_one_line(done, text), done.errors


def test_a_folder_that_holds_a_run_is_refused(run, finished):
    before = files(finished)
    done = run(finished, *SHORT, "--packing", "padded", "hook")
    assert is_one_line(done, "holds a run: go on with it (--resume), delete it (--overwrite)")
    assert files(finished) == before  # and "padded" has not begun


def test_a_run_is_overwritten_where_that_is_asked_for(run, copied, finished):
    done = run(copied, *SHORT, "--steps", "2", "--seed", "1", "--overwrite")
    assert done.status == 0 and len(losses(copied)) == 2
    assert losses(copied)[0] != losses(finished)[0]
    kept = [path.name for path in (copied / "hook" / "checkpoints").iterdir()]
    assert kept == ["step-000002"]


@pytest.mark.parametrize(
    "options, text",
    [
        ("--seed 1", "has seed 0, not 1"),
        ("--steps 6", "has steps 4, not 6"),
        ("--rows-per-step 2", "has rows_per_step 1, not 2"),
        ("--seq-multiple 8", "has seq_multiple 4, not 8"),
    ],
)
def test_another_run_is_not_resumed(options, text, run, finished):
    before = files(finished)
    done = run(finished, *SHORT, "--resume", *options.split())
    assert is_one_line(done, text), done.errors
    assert files(finished) == before


DAMAGED = "__0_0.distcp", "__0_1.distcp", "common.pt", ".metadata", "metadata.json"


@pytest.mark.parametrize("name", [*DAMAGED, "checksums.json"])
def test_a_damaged_checkpoint_is_passed_over(name, run, copied, finished):
    damaged = copied / "hook" / "checkpoints" / "step-000004"
    if not (damaged / name).exists():
        pytest.skip("this release of Megatron-Core writes no such file")
    (damaged / name).write_bytes((damaged / name).read_bytes()[:-9])
    done = run(copied, *SHORT, "--resume")
    assert done.status == 0 and "going on from step 2" in done.said
    assert f"step-000004 is passed over: {name} is " in done.said
    assert losses(copied) == losses(finished)
    assert "going on from step 4" in run(copied, *SHORT, "--resume").said  # it was written anew


def test_no_checkpoint_is_whole(run, copied):
    for path in (copied / "hook" / "checkpoints").glob("*/.metadata"):
        path.unlink()
    before = files(copied)
    done = run(copied, *SHORT, "--resume")
    assert is_one_line(done, "checkpoints is whole") and ".metadata is missing" in done.said
    assert files(copied) == before


def test_what_is_no_checkpoint_is_left_alone(run, copied):
    folder = copied / "hook" / "checkpoints"
    (folder / "step-last").mkdir()
    (folder / "step-000009").touch()
    (folder / "unfinished").mkdir()
    assert "going on from step 4" in run(copied, *SHORT, "--resume").said
    assert (folder / "step-last").exists() and (folder / "step-000009").exists()


@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda text: text[:-9], 4),
        (lambda text: text.replace('"step": 2', '"step": 3'), 2),
        (lambda text: text[text.index("\n") + 1 :], 1),
        (lambda text: "[]\n" + text, 1),
        (lambda text: "", 1),
    ],
    ids=["half-a-line", "another-step", "a-line-less", "no-entry", "empty"],
)
def test_a_damaged_log_is_answered_with_one_line(damage, line, run, copied):
    log = copied / "hook" / "log.jsonl"
    log.write_text(damage(log.read_text()))
    before = files(copied)
    done = run(copied, *SHORT, "--resume")
    assert is_one_line(done, f"log.jsonl, line {line}: expected the entry of step {line}, found")
    assert files(copied) == before


def test_half_a_line_behind_the_checkpoint_is_what_a_killed_run_leaves(run, copied, finished):
    shutil.rmtree(copied / "hook" / "checkpoints" / "step-000004")
    log = copied / "hook" / "log.jsonl"
    log.write_text(log.read_text()[:-9])
    assert run(copied, *SHORT, "--resume").status == 0
    assert losses(copied) == losses(finished)


def test_checkpoints_before_a_damaged_one_are_kept(scripts, tmp_path):
    from mcore_packing.testing import tiny

    kept = scripts.checkpoints.Checkpoints(tmp_path, kept=2)
    with tiny.megatron():
        for step in 1, 2, 9:
            kept.save(step, {"step": step})
        (kept.path(9) / ".metadata").unlink()
        assert kept.newest(print) == 2
        kept.save(3, {"step": 3})
        assert kept.steps == [2, 3, 9]
        assert kept.newest(print) == 3 and kept.common(3)["step"] == 3
