"""Real processes, real models: the cases of scripts/parallel_parity.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/parallel_parity.py"
QUICK = {"cp2": (2, "--cp 2"), "tp2sp": (2, "--tp 2 --sp"), "pp2": (2, "--pp 2")}
SLOW = {
    "cp4": (4, "--cp 4"),
    "cp2tp2sp": (4, "--cp 2 --tp 2 --sp"),
    "pp4": (4, "--pp 4"),
    "cp2pp2": (4, "--cp 2 --pp 2"),
}
CASES = [pytest.param(*case, id=name) for name, case in QUICK.items()]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()]


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0])


@pytest.fixture(scope="module", params=["rope", "learned_absolute"])
def reference(request, tmp_path_factory):
    """The one-process packed run, which equals one by one."""
    path = tmp_path_factory.mktemp("reference") / "reference.pt"
    options = ["--reference", str(path), "--positions", request.param]
    result = run([sys.executable, "-W", "ignore", str(SCRIPT), *options])
    assert result["loss"] <= 1e-5 and result["gradient"] <= 1e-5
    return options


@pytest.mark.parametrize("processes, case", CASES)
def test_parallel_equals_one_process(reference, processes, case):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-W", "ignore", *launcher, str(SCRIPT), *reference, *case.split()]
    result = run(command)
    assert result["loss"] <= 1e-5 and result["gradient"] <= 1e-5, result
    assert result["parameters"] > 80  # every parameter of the model has a gradient somewhere
    # The layout that came along cost nothing; and either way every stage knows the longest one.
    assert result["exact_max_seqlen"] and result["reads"] == [0, 0]
    assert result["launches"] == [0, 1]
