"""Real processes, real models: the cases of scripts/parallel_parity.py."""

from pathlib import Path

import pytest

from . import processes

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


@pytest.fixture(scope="module", params=["rope", "learned_absolute"])
def reference(request, tmp_path_factory):
    """The one-process packed run, which equals one by one."""
    path = tmp_path_factory.mktemp("reference") / "reference.pt"
    options = ["--reference", str(path), "--positions", request.param]
    result = processes.result(SCRIPT, *options, processes=1)
    assert result["loss"] <= 1e-5 and result["gradient"] <= 1e-5
    return options


@pytest.mark.parametrize("count, case", CASES)
def test_parallel_equals_one_process(reference, count, case):
    result = processes.result(SCRIPT, *reference, *case.split(), processes=count)
    assert result["loss"] <= 1e-5 and result["gradient"] <= 1e-5, result
    assert result["parameters"] > 80  # every parameter of the model has a gradient somewhere
    # The layout that came along cost nothing; and either way every stage knows the longest one.
    assert result["exact_max_seqlen"] and result["reads"] == [0, 0]
    assert result["launches"] == [0, 1]
