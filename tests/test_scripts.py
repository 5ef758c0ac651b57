"""The scripts: what they answer to mistakes, where they write, and the report of the GPU job."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scripts(monkeypatch):
    """The modules ``bench`` and ``gpu_ci``."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench
    import gpu_ci

    return SimpleNamespace(bench=bench, gpu_ci=gpu_ci)


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
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "tracked")
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
    return {"rows": [{"name": name, "tokens": tokens, "forward": spread, "ratio": 1.0}]}


def test_only_what_is_slower_beyond_noise_is_a_regression(scripts):
    slower = scripts.bench.slower
    assert slower(times(131.0), times(100.0)) == ["mcore_packing 7, forward: 131.0 us, was 100.0"]
    assert slower(times(120.0), times(100.0)) == []  # noise
    assert slower(times(10.0), times(100.0)) == []
    assert slower(times(131.0), times(100.0, tokens=8)) == []  # another case
    assert slower(times(131.0, "megatron"), times(100.0, "megatron")) == []  # not ours
    wide = times(100.0)
    wide["rows"][0]["forward"]["p80_us"] = 200.0
    assert slower(times(131.0), wide) == []


def test_the_gpu_job_reports_after_each_check(scripts, tmp_path, monkeypatch):
    gpu_ci, bench = scripts.gpu_ci, scripts.bench
    monkeypatch.setattr(bench, "HAVE_GPU", True)
    monkeypatch.setattr(bench, "tracked", lambda name: tmp_path / f"tracked-{name}.json")
    (tmp_path / "tracked-regressed.json").write_text(json.dumps(times(100.0)))
    (tmp_path / "regressed.json").write_text(json.dumps(times(200.0)))

    def check(name, code, limit=20, **more):
        return gpu_ci.Check(name, [sys.executable, "-c", code], limit, **more)

    wanted = [
        check("passes", "print('fine')"),
        check("fails", "raise SystemExit('bad')"),
        check("hangs", "import time; print('on it', flush=True); time.sleep(60)", limit=1),
        check("te", "", needs_te=True),
        check("regressed", "print('timed')", figures=True),
        check("untracked", "print('timed')", figures=True),
        check("looks", f"print(open({str(tmp_path / 'gpu_ci.md')!r}).read().count('| passed'))"),
    ]
    rows, table = gpu_ci.run_all(wanted, {"GPU": "none"}, tmp_path, allow_missing_te=True)
    found = {row["check"]: (row["status"], row["said"]) for row in rows}
    assert found == {
        "passes": ("passed", "fine"),
        "fails": ("failed", "bad"),
        "hangs": ("failed", "stopped after 1 seconds"),
        "te": ("skipped", "missing: Transformer Engine"),
        "regressed": ("failed", "timed; slower: mcore_packing 7, forward: 200.0 us, was 100.0"),
        "untracked": ("passed", "timed; no figures in tracked-untracked.json to compare with"),
        "looks": ("passed", "2"),
    }
    assert (tmp_path / "gpu_ci.md").read_text() == table
    with tarfile.open(tmp_path / "gpu_ci.tar.gz") as archive:
        assert {"gpu_ci.json", "gpu_ci.md", "hangs.log"} <= set(archive.getnames())
    rows, _ = gpu_ci.run_all(wanted[3:4], {}, tmp_path, allow_missing_te=False)
    assert rows[0]["status"] == "failed"


def test_every_check_of_the_gpu_job_fits_a_command_of_ten_minutes(scripts, tmp_path):
    checks = scripts.gpu_ci.checks(tmp_path)
    assert all(check.limit < 600 for check in checks)
    assert all((ROOT / part).is_file() for check in checks for part in check.command
               if part.startswith("scripts/"))  # fmt: skip
