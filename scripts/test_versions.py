"""Test the hook against every Megatron-Core release that it supports, and print a table.

Releases up to 0.16.1 come from the package index, later ones from a clone of Megatron-LM. Only the
clone holds Megatron's own LLaVA tests; they run with the hook in every model. "newest" is whatever
the clone has checked out: it is reported, and fails nothing.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from mcore_packing.testing.sources import CHECKOUT, MEGATRON, SourcesMissing

PACKAGES = "0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.16.1"
SOURCES = tuple(MEGATRON.commits)
OUR_TESTS = [
    *sorted(str(path) for path in Path("tests").glob("test_hook_*.py")),
    *(f"tests/test_{room}.py" for room in ("releases", "row_spec", "params", "cpu", "attention")),
]
MEGATRONS_TESTS = "tests/unit_tests/models/test_llava_model.py"
PLUGIN = "mcore_packing.testing.megatron_tests"
DESCRIBE = """
import megatron.core
from mcore_packing.megatron.releases import describe
print(megatron.core.__file__, describe(), sep="\\n")
"""
COLUMNS = "megatron-core", "expansion", "our tests", "hybrid models", "Megatron's own LLaVA tests"


class Failed(Exception):
    """A release that could not be tested."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "versions", nargs="*", help=f"of {', '.join(PACKAGES + SOURCES)}; all of them by default"
    )
    parser.add_argument(
        "--own", nargs="*", help="run Megatron's own tests for these versions only", metavar="V"
    )
    parser.add_argument(
        "--missing-ok", action="store_true", help="say which sources are missing, and pass"
    )
    options = parser.parse_args()
    if unknown := set(options.versions) - {*PACKAGES, *SOURCES}:
        parser.error(f"unknown versions: {', '.join(sorted(unknown))}")
    failed, missing, table = [], [], [COLUMNS]
    for version in options.versions or PACKAGES + SOURCES:
        print(f"== megatron-core {version}", file=sys.stderr, flush=True)
        try:
            folder = package(version) if version in PACKAGES else MEGATRON.unpacked(version)
        except SourcesMissing as error:
            print(f"MISSING: {error}", file=sys.stderr)
            missing.append(version)
            table.append((version, "NOT TESTED: no sources", "", "", ""))
            continue
        if version == "newest" and folder == MEGATRON.unpacked("main"):
            table.append((version, "is main", "", "", ""))
            continue
        runs_own = version in SOURCES and (options.own is None or version in options.own)
        try:
            table.append((version, *tested(version, folder, runs_own)))
        except Failed as error:
            print(error, file=sys.stderr)
            if version != "newest":
                failed.append(version)
            table.append((version, "FAILED", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    if missing:
        print(f"\nNOT TESTED, their sources are missing: {', '.join(missing)}. {MEGATRON.how}")
    if failed:
        print(f"\nFAILED with megatron-core {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 3 if missing and not options.missing_ok else 0


def package(version: str) -> Path:
    """megatron-core alone, in a folder of its own: torch and the rest are shared."""
    folder = CHECKOUT / ".versions" / version
    if not (folder / "megatron").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--no-deps", "--target", str(folder), f"megatron-core=={version}"], check=True
        )
    return folder


def tested(version: str, folder: Path, runs_own: bool) -> tuple[str, str, str, str]:
    """The cells of a release's line."""
    found, expansion = run(folder, ["-c", DESCRIBE]).strip().splitlines()[-2:]
    if not found.startswith(str(folder)):
        raise Failed(f"megatron-core {version}: found {found} instead")
    ours = pytest(folder, OUR_TESTS)
    hybrid = pytest(folder, ["tests/test_hybrid.py"])
    own = "-"
    if runs_own:
        options = ["--noconftest", "-c", os.devnull, "--rootdir", str(folder), "-p", PLUGIN]
        own = pytest(folder, [*options, str(folder / MEGATRONS_TESTS)])
    elif version in PACKAGES:
        own = "not in the package"
    return expansion, ours, hybrid, own


def pytest(folder: Path, arguments: list[str]) -> str:
    """What pytest counts: "163 passed, 2 skipped"."""
    options = ["-q", "-m", "not gpu and not slow", "-p", "no:cacheprovider"]
    output = run(folder, ["-W", "ignore", "-m", "pytest", *options, *arguments])
    counts = re.findall(r"\d+ (?:passed|skipped)", output.strip().splitlines()[-1])
    return ", ".join(counts)


def run(folder: Path, arguments: list[str]) -> str:
    """Standard output of Python with this Megatron before any other."""
    path = os.pathsep.join([str(folder), str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-40:])
        raise Failed(f"python {' '.join(arguments)}\n{tail}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
