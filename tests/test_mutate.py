"""scripts/mutate.py: which faults it puts where, and that tests notice them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SOURCE = '''"""What a file says."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 1


def cut(values: list[int], most: int = 3) -> list[int]:
    """Not 4."""
    if not values or "é" in values and most > 2:
        raise ValueError(f"{most + 1}")
    values.sort()
    _ = [*zip(values, values, strict=True)]
    return values[:min(most, 5)]
'''
FAULTS = {
    ("3", "4"), ("3", "2"),
    ('not values or "é" in values and most > 2', "not values and ('é' in values and most > 2)"),
    ("not values", "values"),
    ('"é" in values and most > 2', "'é' in values or most > 2"),
    ('"é" in values', "'é' not in values"), ("most > 2", "most >= 2"), ("2", "3"), ("2", "1"),
    ('raise ValueError(f"{most + 1}")', "pass"), ("values.sort()", "pass"),
    ("return values[:min(most, 5)]", "return None"), ("min(most, 5)", "max(most, 5)"),
    ("5", "6"), ("5", "4"),
}  # fmt: skip


@pytest.fixture
def mutate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutate

    return mutate


@pytest.fixture
def package(mutate, tmp_path, monkeypatch):
    """A checkout of one room, as the script looks at it."""
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "PACKAGE", "package_of_mutants")
    monkeypatch.setitem(mutate.TESTS, "room.py", ("test_room.py",))
    (tmp_path / mutate.PACKAGE).mkdir()
    (tmp_path / mutate.PACKAGE / "room.py").write_text(SOURCE)
    return tmp_path


def test_every_fault_is_of_what_runs(mutate, package):
    found = {(one["was"], one["now"].strip("()")) for one in mutate.mutants_of("room.py")}
    assert found == {(was, now.strip("()")) for was, now in FAULTS}


def test_a_fault_changes_its_place_alone(mutate, package):
    for mutant in mutate.mutants_of("room.py"):
        changed = mutate.mutated(SOURCE, mutant)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        first, last = mutant["place"][0], mutant["place"][2]
        lines = changed.splitlines()
        assert lines[: first - 1] == SOURCE.splitlines()[: first - 1]
        assert lines[first:] == SOURCE.splitlines()[last:]


def test_a_sample_is_the_same_each_time(mutate):
    assert mutate.sample_of(20, seed=3) == mutate.sample_of(20, seed=3)
    assert all((ROOT / "tests" / name.split("::")[0]).exists() or name == "test_vision.py"
               for names in mutate.TESTS.values() for name in names)  # fmt: skip


TEST = """
from package_of_mutants.room import cut

def test_cut():
    assert cut([3, 1, 2, 0]) == [0, 1, 2]
"""


def test_a_mutant_is_killed_or_survives(mutate, package, tmp_path):
    folder = tmp_path / "copy"
    for name, text in (("package_of_mutants/room.py", SOURCE), ("tests/test_room.py", TEST)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    found = {
        (one["was"], one["now"]): mutate.try_out(folder, one)["killed"]
        for one in mutate.mutants_of("room.py")
        if one["was"] in ("values.sort()", "5")
    }
    assert found["values.sort()", "pass"].startswith("FAILED")
    assert found["5", "(6)"] is None and found["5", "(4)"] is None
    assert (folder / "package_of_mutants/room.py").read_text() == SOURCE
