"""The scripts: what they answer to mistakes, where they write, and the GPU job."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import processes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scripts(monkeypatch):
    """Modules of the folder."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench
    import bench_step
    import figures
    import gpu_ci

    return SimpleNamespace(bench=bench, bench_step=bench_step, figures=figures, gpu_ci=gpu_ci)


ERRORS = {
    "MCORE_PACKING_PYTHON=nothing demo.sh": "mcore_packing: MCORE_PACKING_PYTHON=nothing is no "
    "Python of 3.10 or newer",
    "MCORE_PACKING_PYTHON=/bin/true gpu_ci.sh": "mcore_packing: MCORE_PACKING_PYTHON=/bin/true is "
    "no Python of 3.10 or newer",
    "parallel_parity.sh cp3": "unknown case cp3; there are ",
}


@pytest.mark.parametrize("command", ERRORS)
def test_a_shell_script_answers_a_mistake_with_one_line_and_status_2(command, tmp_path):
    words = command.split()
    variables = dict(word.split("=") for word in words if "=" in word)
    script, *arguments = words[len(variables) :]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        env={**os.environ, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(ERRORS[command]) and done.stderr.count("\n") == 1


def test_results_go_to_a_folder_of_the_users(scripts, tmp_path, monkeypatch, capsys):
    bench = scripts.bench
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scripts.figures, "RESULTS", tmp_path / "tracked")
    (tmp_path / "tracked").mkdir()
    parser = bench.parser("A benchmark.", budget=1.0)
    for arguments, name in (([], "out"), (["--output", "mine"], "mine"), (["--update"], "tracked")):
        path = bench.save("b", [], parser.parse_args(arguments))
        assert path.absolute().parent == tmp_path / name and path.is_file()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--output", "file"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("argument --output: file: File exists\n")


def times(median, name="mcore_packing", tokens=7):
    spread = {"median_us": median, "p20_us": 0.95 * median, "p80_us": 1.05 * median}
    return {"measurements": [{"name": name, "tokens": tokens, "forward": spread, "ratio": 1.0}]}


def test_only_what_is_slower_beyond_noise_is_a_regression(scripts):
    slower = scripts.figures.slower
    assert slower(times(131.0), times(100.0)) == ["mcore_packing 7, forward: 131.0 us, was 100.0"]
    assert slower(times(120.0), times(100.0)) == []  # noise
    assert slower(times(10.0), times(100.0)) == []
    assert slower(times(131.0), times(100.0, tokens=8)) == []  # another case
    assert slower(times(131.0, "megatron"), times(100.0, "megatron")) == []  # not ours
    wide = times(100.0)
    wide["measurements"][0]["forward"]["p80_us"] = 200.0
    assert slower(times(131.0), wide) == []


def check_of(gpu_ci, name, code, seconds=1, limit=20, **more):
    return gpu_ci.Check(name, ["-c", code], seconds, limit, **more)


def test_the_gpu_job_reports_after_each_check(scripts, tmp_path, monkeypatch):
    gpu_ci = scripts.gpu_ci
    monkeypatch.setattr(scripts.figures, "RESULTS", tmp_path / "tracked")
    monkeypatch.setattr(gpu_ci, "find_spec", lambda name: None)
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked" / "regressed-h100.json").write_text(json.dumps(times(100.0)))
    (tmp_path / "regressed.json").write_text(json.dumps(times(200.0)))
    table = str(tmp_path / "gpu_ci.md")
    wanted = [
        check_of(gpu_ci, "passes", "print('fine')"),
        check_of(gpu_ci, "fails", "raise SystemExit('bad')"),
        check_of(gpu_ci, "hangs", "import time; print('on it', flush=True); time.sleep(60)",
                 limit=3),
        check_of(gpu_ci, "te", "", needs_te=True),
        check_of(gpu_ci, "regressed", "print('timed')", figures=True, alone=True),
        check_of(gpu_ci, "untracked", "print('timed')", figures=True, alone=True),
        check_of(gpu_ci, "looks", f"print(open({table!r}).read().count('| passed'))", alone=True),
        gpu_ci.Check("tool", ["-c", ""], 1, 1, tool=("no-such-tool",)),
    ]  # fmt: skip
    job = gpu_ci.Job(tmp_path, "NVIDIA H100 80GB HBM3", allow_missing_te=True)
    job.run(wanted)
    found = {one["check"]: (one["status"], one["said"]) for one in job.reports}
    assert found == {
        "passes": ("passed", "fine"),
        "fails": ("failed", "bad"),
        "hangs": ("failed", "stopped after 3 seconds"),
        "te": ("skipped", "missing: Transformer Engine"),
        "tool": ("failed", "missing: no-such-tool"),
        "regressed": ("failed", "timed; slower: mcore_packing 7, forward: 200.0 us, was 100.0"),
        "untracked": ("passed", "timed; no figures in untracked-h100.json to compare with"),
        "looks": ("passed", "2"),
    }
    assert job.failed and (tmp_path / "gpu_ci.md").read_text() == job.table
    with tarfile.open(tmp_path / "gpu_ci.tar.gz") as archive:
        assert {"gpu_ci.json", "gpu_ci.md", "hangs.log"} <= set(archive.getnames())
    job = gpu_ci.Job(tmp_path, "NVIDIA H100 80GB HBM3")
    job.run(wanted[3:4])
    assert job.reports[0]["status"] == "failed"


def test_what_is_not_timed_runs_side_by_side(scripts, tmp_path):
    gpu_ci = scripts.gpu_ci
    waits = """
import pathlib, sys, time
room = pathlib.Path({room!r})
(room / {name!r}).touch()
while not (room / {other!r}).exists():
    time.sleep(0.01)
"""
    both = [
        check_of(gpu_ci, name, waits.format(room=str(tmp_path), name=name, other=other))
        for name, other in (("one", "two"), ("two", "one"))
    ]
    job = gpu_ci.Job(tmp_path, "gpu")
    job.run(both)
    assert [one["status"] for one in job.reports] == ["passed", "passed"]


def test_the_gpu_job_ends_in_time(scripts, tmp_path):
    # What is stopped leaves the others the time that they are predicted to take.
    gpu_ci = scripts.gpu_ci
    sleeps = "import time; time.sleep(60)"
    wanted = [
        check_of(gpu_ci, "long", sleeps, seconds=2, limit=50),
        check_of(gpu_ci, "short", "print('fine')", seconds=3, limit=50, alone=True),
        check_of(gpu_ci, "never", sleeps, seconds=600, limit=600, alone=True),
    ]
    job = gpu_ci.Job(tmp_path, "gpu", seconds=9)
    job.run(wanted)
    assert [one["check"] for one in job.reports] == ["long", "short", "never"]
    assert [one["status"] for one in job.reports] == ["failed", "passed", "failed"]
    assert job.reports[2]["said"].startswith("no time: ")


def test_both_parts_of_the_gpu_job_fit_what_they_have(scripts, tmp_path):
    gpu_ci = scripts.gpu_ci
    first, second = gpu_ci.first_part(tmp_path), gpu_ci.second_part(tmp_path)
    seconds = gpu_ci.predicted(first), gpu_ci.predicted(second)
    assert seconds[0] <= 360 and seconds[1] <= 180
    said = "{} for the first part and {} for the second".format(*seconds)
    assert said in (ROOT / "docs" / "gpu.md").read_text()
    for check in first + second:
        assert check.seconds < check.limit < 600
        assert all((ROOT / part).is_file() for part in check.python
                   if part.startswith(("scripts/", "tests/")))  # fmt: skip


def test_the_commands_of_the_guide_are_understood(scripts):
    text = (ROOT / "docs" / "gpu.md").read_text()
    lines = [
        line for line in re.findall(r"^.*gpu_ci\.(?:py|sh).*$", text, re.M) if "--output" in line
    ]
    assert len(lines) >= 3
    for line in lines:
        assert len(line) <= 2000
        words = shlex.split(line.partition("gpu_ci.")[2].partition(";")[0].partition(" 2>")[0])[1:]
        status, out, error = processes.fork(ROOT / "scripts/gpu_ci.py", *words, "--dry-run")
        assert status == 0 and "at most" in out, (line, error)


def test_a_contender_that_is_wrong_or_runs_out_of_memory_is_left_out(scripts, monkeypatch):
    bench_step = scripts.bench_step

    def step(model, batches):
        if batches == ["large"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor([float(batches[0]), 4.0])

    monkeypatch.setattr(bench_step, "step", step)
    monkeypatch.setattr(bench_step, "hooked", lambda *args: contextlib.nullcontext())
    model, runs = (
        torch.nn.Linear(1, 1),
        {bench_step.ALONE: (None, [2]), "padded": (None, ["large"])},
    )
    peaks, errors = bench_step.first_steps(model, runs)
    assert list(peaks) == [bench_step.ALONE] and errors == {"padded": "out of memory"}
    peaks, errors = bench_step.first_steps(model, {**runs, "other": (None, [3])})
    assert list(peaks) == [bench_step.ALONE]
    assert errors["other"] == "wrong: 0.75 over 4.0 tokens, one by one 0.5 over 4.0"
