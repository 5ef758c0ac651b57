"""Small faults, put into the package one at a time: does a test notice?

A seeded sample of mutants over the rooms below; each runs its room's tests, fastest first, until
one fails. It works in a copy of the checkout, and goes on where it was stopped.

    python scripts/mutate.py --mutants 300        # results in scripts/results/mutants.json
    python scripts/mutate.py --only 17            # what mutant 17 is, and what its tests say

Torch and Megatron are imported once; every run of tests is a fork.
"""

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "scripts/results/mutants.json"
PACKAGE = "mcore_packing"
PRELOADED = ("pytest", "hypothesis.strategies", "megatron.core.models.multimodal.llava_model")

SOAK = "test_soak.py::test_nothing_is_wrong"
MAPS = ("test_layout.py", "test_layout_tensor.py", "test_expand.py")
OPS = ("test_ops.py", "test_space.py", "test_context_parallel.py", "test_kernels.py")
HOOK = ("test_hook_layouts.py", "test_hook_reads.py", "test_hook_overflow.py")
HOOK += ("test_hook_packed.py", "test_hook_stages.py", "test_hook_install.py")
HOOK += ("test_plain_model.py", "test_hook_passes.py", "test_text_rows.py", "test_releases.py")
HOOK += ("test_vision.py",)
DATA = ("test_data_samples.py", "test_data_plain.py", "test_data.py", "test_data_job.py")
DATA += ("test_data_lengths.py", "test_data_cutting.py", "test_vision.py")
# What a room's tests are, fastest first; its own doctests come last.
TESTS = {
    "layout.py": (SOAK, *MAPS, "test_space.py", "test_row_spec.py", *HOOK[:3]),
    "reference.py": (SOAK, *MAPS, *OPS),
    "expand.py": (SOAK, *MAPS, "test_expand_column.py", "test_ops.py", *HOOK[:3]),
    "spec.py": (SOAK, "test_row_spec.py", *MAPS, "test_hook_layouts.py", "test_data.py"),
    "vision.py": ("test_vision.py",),
    "megatron/vision.py": ("test_vision.py", "test_verify.py"),
    "megatron/params.py": ("test_params.py", "test_row_spec.py", *HOOK),
    "megatron/spec.py": ("test_row_spec.py", *HOOK),
    "megatron/call.py": HOOK,
    "data/algorithms.py": (SOAK, *DATA),
    "data/columns.py": (SOAK, *DATA),
    "data/cutting.py": ("test_data_cutting.py",),
    "data/energon.py": ("test_energon.py",),
    "data/media.py": (SOAK, *DATA),
    "data/packer.py": (SOAK, *DATA),
    "data/report.py": (SOAK, "test_reports.py", *DATA),
    "data/rows.py": (SOAK, *DATA),
    "data/samples.py": (SOAK, *DATA),
    "data/weights.py": (SOAK, "test_data_job.py", "test_data.py"),
}
SECONDS = 120  # that a file's tests compute; what takes longer hangs

# The faults

OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum"}
NAMES |= {"maximum": "minimum"}


def faults_of(node: ast.AST) -> list[ast.AST | None]:
    """What could stand in a node's place; None leaves the statement out."""
    if isinstance(node, ast.Compare):
        return [_changed(node, ops=[OTHER[type(node.ops[0])](), *node.ops[1:]])]
    if isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in OTHER:
        return [_changed(node, op=OTHER[type(node.op)]())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        return [node.operand]
    if isinstance(node, ast.IfExp):
        return [_changed(node, body=node.orelse, orelse=node.body)]
    if isinstance(node, Condition):
        return [ast.UnaryOp(ast.Not(), node.test)]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        return [ast.Constant(not node.value)]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [ast.Constant(node.value + 1), ast.Constant(node.value - 1)]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        key = "id" if isinstance(node.func, ast.Name) else "attr"
        if name in NAMES:
            return [_changed(node, func=_changed(node.func, **{key: NAMES[name]}))]
    if isinstance(node, ast.Return) and not isinstance(node.value, ast.Constant | None):
        return [ast.Return(ast.Constant(None))]
    is_said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_said or isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break):
        return [None]
    if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple):
        return [None]
    return []


class Condition(ast.expr):
    """What an ``if`` asks, where nothing else can be turned round in it."""

    def __init__(self, test: ast.expr):
        self.test, self._fields = test, ()
        ast.copy_location(self, test)


def _changed(node: ast.AST, **fields) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def places_in(node: ast.AST):
    """Nodes to try: neither annotations, decorators and messages, nor what only type checkers
    read, nor what only checks the code itself (``zip(strict=)``)."""
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    yield node
    left_out = {"annotation", "returns", "decorator_list", "type_comment"}
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.If | ast.While | ast.comprehension):
        tests = [node.test] if hasattr(node, "test") else node.ifs
        plain = ast.Name | ast.Attribute | ast.Call | ast.NamedExpr
        yield from (Condition(test) for test in tests if isinstance(test, plain))
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in left_out:
                yield from places_in(child)


def mutants_of(room: str) -> list[dict]:
    """Every fault that could be in a file: where, what stood there, what stands there now."""
    source = (ROOT / PACKAGE / room).read_text()
    found = []
    for node in places_in(ast.parse(source)):
        for fault in faults_of(node):
            now = "pass" if fault is None else ast.unparse(ast.fix_missing_locations(fault))
            if isinstance(node, ast.expr):
                now = f"({now})"
            was = ast.get_source_segment(source, node)
            place = [node.lineno, node.col_offset, node.end_lineno, node.end_col_offset]
            found.append({"room": room, "place": place, "was": was, "now": now})
    return found


def mutated(source: str, mutant: dict) -> str:
    lines = source.encode().splitlines(keepends=True)  # columns of ast count bytes
    first, begin, last, end = mutant["place"]
    before, behind = lines[first - 1][:begin], lines[last - 1][end:]
    middle = before + mutant["now"].encode() + behind
    return b"".join([*lines[: first - 1], middle, *lines[last:]]).decode()


def sample_of(count: int, seed: int) -> list[dict]:
    rooms = [room for room in TESTS if (ROOT / PACKAGE / room).exists()]
    every = [mutant for room in rooms for mutant in mutants_of(room)]
    print(f"{len(every)} mutants of {len(rooms)} files", file=sys.stderr)
    return random.Random(seed).sample(every, min(count, len(every)))


# Their tests


def checkout(folder: Path) -> None:
    """A copy of what git knows of, as it is now."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def put(folder: Path, room: str, source: str) -> None:
    path = folder / PACKAGE / room
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


PASSED: set[str] = set()  # in spite of some mutant, so without one too


def run(folder: Path, test: str) -> str | None:
    """What fails first of a file's tests, None if nothing does."""
    log = folder / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.chdir(folder)
        sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115
        for said in (1, 2):
            os.dup2(sys.stdout.fileno(), said)
        sys.path.insert(0, str(folder))
        others = os.environ.get("PYTHONPATH", "")  # another Megatron
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), others])
        import pytest

        words = ["-x", "-q", "--no-header", "--assert=plain", "-m", "not gpu and not slow"]
        words += [f"-pno:{plugin}" for plugin in ("cacheprovider", "anyio", "xdist")]
        status = int(pytest.main([*words, test]))
        sys.stdout.flush()
        os._exit(status)
    limit = time.monotonic() + 10 * SECONDS  # others compute, too
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > limit:
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers of a test, too
    if not found[0]:
        os.waitpid(child, 0)
        return f"{test}: hangs"
    if os.waitstatus_to_exitcode(found[1]) in (0, 5):  # all passed, none there
        return None
    lines = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:200] if lines else f"{test}: {log.read_text()[-200:]}"


def tests_of(room: str, folder: Path) -> list[str]:
    files = [*(f"tests/{name}" for name in TESTS[room]), f"{PACKAGE}/{room}"]
    return [name for name in files if (folder / name.split("::")[0]).exists()]


def try_out(folder: Path, mutant: dict) -> dict:
    """The mutant, and what killed it."""
    source, begin = (ROOT / PACKAGE / mutant["room"]).read_text(), time.monotonic()
    try:
        put(folder, mutant["room"], mutated(source, mutant))
        for test in tests_of(mutant["room"], folder):
            if killed := run(folder, test):
                break
            PASSED.add(test)
    finally:
        put(folder, mutant["room"], source)
    by = test if killed else None
    return {**mutant, "killed": killed, "by": by, "seconds": round(time.monotonic() - begin, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers in the sample; results go out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    sample = sample_of(args.mutants, args.seed)
    known = json.loads(args.results.read_text()) if args.results.exists() else []
    done = {(one["room"], *one["place"], one["now"]): one for one in known}
    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()  # what a fork need not copy
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout(folder)
        if args.only is not None:
            for number in args.only:
                print(json.dumps(try_out(folder, sample[number]), indent=1))
            return 0
        results = []
        for mutant in sample:
            key = (mutant["room"], *mutant["place"], mutant["now"])
            results.append(done.get(key) or try_out(folder, mutant))
            lines = ",\n".join(map(json.dumps, results))
            args.results.write_text(f"[\n{lines}\n]\n")
            survivors = sum(not one["killed"] for one in results)
            print(f"{len(results)} mutants, {survivors} survived", flush=True)
        for test in {one["by"] for one in results if one["killed"]} - PASSED:
            if wrong := run(folder, test):
                raise SystemExit(f"without a mutant: {wrong}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
