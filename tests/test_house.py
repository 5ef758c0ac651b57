"""The house: who may import whom, what is imported late, and how far one forward goes through
it."""

import ast
import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing.testing import tiny

ROOT = Path(mp.__file__).parent
# From the roof to the ground: a room imports from what is below it only.
ROOMS = [
    "cli", "plot", "parity", "testing", "data", "media",
    "megatron.hook", "megatron.call", "megatron.plan", "megatron.cpu", "megatron.attention",
    "megatron.vision", "megatron.dummy", "megatron.ranks", "megatron.params", "megatron.spec",
    "megatron.plain", "megatron.config", "megatron.releases", "megatron.find",
    "expand", "layout", "vision", "space", "spec", "context_parallel", "ops", "copies",
    "reference", "inputs", "errors",
]  # fmt: skip
# Imported inside a function, because what they need may be missing, or is not wanted: {room: what}.
LATE = {
    "cli": {
        "data",
        "parity",
        "plot",
        "testing",
        "megatron.find",
        "megatron.hook",
        "megatron.spec",
    },
    "data": {"megatron.params"},  # rows are packed without Megatron
}


def modules() -> dict[str, Path]:
    """``{"megatron.hook": path}`` of every module that is not a package's own."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return {name: path for name, path in found.items() if name not in ("__init__", "megatron")}


def room_of(name: str) -> str | None:
    return next((room for room in ROOMS if name == room or name.startswith(f"{room}.")), None)


def imports(name: str, path: Path):
    """``(module of ours, whether inside a function)`` of every import, type checking left out."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())

    def walk(node, late):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.level:
                base = package[: len(package) - child.level + 1]
                whole = [*base, *(child.module.split(".") if child.module else [])]
                for alias in child.names:
                    deeper = ".".join([*whole, alias.name])
                    yield (deeper if deeper in modules() else ".".join(whole)), late
            yield from walk(child, late or isinstance(child, ast.FunctionDef))

    yield from walk(tree, False)


def test_dependencies_point_down():
    for name, path in modules().items():
        room = room_of(name)
        assert room is not None, f"{name} is in no room"
        for target, late in imports(name, path):
            below = room_of(target)
            if below is None or below == room or (late and below in LATE.get(room, ())):
                continue
            assert ROOMS.index(below) > ROOMS.index(room), f"{name} imports {target}"


def test_nothing_is_imported_inside_a_function_but_what_is_late_by_design():
    for name, path in modules().items():
        for target, late in imports(name, path):
            room, below = room_of(name), room_of(target)
            assert not late or below in LATE.get(room, ()) or room == "testing", (name, target)


def test_kernels_know_nothing_of_ours():
    for path in (ROOT.parent / "kernels").glob("*.py"):
        assert "mcore_packing" not in path.read_text().replace("mcore_packing.kernels", "")


class Walk:
    """Calls of our functions in a run; of ``cpu``, ``attention`` and ``testing``, which stand in
    for Megatron's, none."""

    def __init__(self):
        self.calls = []

    def __call__(self, frame, event, argument):
        code = frame.f_code
        is_ours = event == "call" and self.is_ours(code) and not self.stands_in(frame.f_back.f_code)
        if is_ours and not code.co_name.startswith("<"):
            self.calls.append((code.co_filename, code.co_name))

    def is_ours(self, code) -> bool:
        place = Path(code.co_filename)
        return place.is_relative_to(ROOT) and not self.stands_in(code)

    def stands_in(self, code) -> bool:
        place = Path(code.co_filename)
        return place.is_relative_to(ROOT) and (
            place.name in ("cpu.py", "attention.py") or "testing" in place.parts
        )

    @property
    def changes(self) -> int:
        """How often the next call is in another file."""
        files = [file for file, _ in self.calls]
        return sum(a != b for a, b in itertools.pairwise(files))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    "rides, most_calls, most_changes", [(True, 45, 20), (False, 90, 24)], ids=["rides", "in-model"]
)
def test_one_forward_can_be_held_in_the_head(rides, most_calls, most_changes):
    model = tiny.llava_model("rope", img_size=28, max_sequence_length=1024)
    (row,), _ = mp.data.pack(tiny.samples(6, img_size=28), mp.row_spec(model))
    given, walk = row.inputs(), Walk()
    if not rides:
        edges = row.layout.cu_seqlens_collapsed
        given["packed_seq_params"] = PackedSeqParams("thd", edges, edges, None, None, 127, 127)
    with mp.install(model, space="collapsed"), torch.no_grad():
        model(**given)
        sys.setprofile(walk)
        try:
            model(**given)
        finally:
            sys.setprofile(None)
    most = Counter(walk.calls).most_common(5)
    assert 20 < len(walk.calls) <= most_calls and walk.changes <= most_changes, most
