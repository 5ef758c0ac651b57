"""The GPU CI job: runs every check that needs a GPU, and reports them in one JSON and one table."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import bench

from mcore_packing.testing import tiny

ROOT = Path(__file__).parents[1]
HELP = """
A check fails where its command fails or runs into its limit, and where a benchmark is slower than
the figures of this kind of GPU in scripts/results beyond noise: the median by more than a quarter,
and even the p20 above their p80. Where there are no such figures, speed is reported only.

The checks parity and bench_max_seqlen need Transformer Engine and fail where that is missing;
--allow-missing-te skips them. Single tests that need it skip themselves, and say so. No other check
is skipped. Every limit fits a command of 10 minutes; --only splits the job over several.

gpu_ci.json, gpu_ci.md, the log of every check and gpu_ci.tar.gz with all of them are written
anew after each check. The exit status is 0 where all passed or were skipped, 1 where a check
failed, 2 where nothing could run.
"""


@dataclass
class Check:
    """One command, the seconds that it may take, and what it needs beside a GPU.

    Attributes:
        figures: whether it leaves ``<name>.json`` with times to compare.
    """

    name: str
    command: list[str]
    limit: int
    needs_te: bool = False
    figures: bool = False


def checks(output: Path) -> list[Check]:
    python = [sys.executable, "-W", "ignore"]
    results = ["--output", str(output)]
    return [
        Check("tests", [*python, "-m", "pytest", "-q", "-m", "gpu", "--durations=5"], 450),
        Check("demo", [*python, "scripts/demo.py", *results], 120),
        Check(
            "train_llava",
            [*python, "scripts/train_llava.py", "--verify-packing", "50", *results],
            200,
        ),
        Check("parity", [*python, "-m", "mcore_packing.cli", "parity"], 100, needs_te=True),
        Check("bench_layout", [*python, "scripts/bench_layout.py", *results], 180, figures=True),
        Check("bench_expand", [*python, "scripts/bench_expand.py", *results], 300, figures=True),
        Check(
            "bench_max_seqlen",
            [*python, "scripts/bench_max_seqlen.py", *results],
            120,
            needs_te=True,
        ),
        Check("bench_step", [*python, "scripts/bench_step.py", *results], 400),
    ]


def missing(check: Check) -> list[str]:
    found = [] if bench.HAVE_GPU else ["a GPU"]
    if check.needs_te and not tiny.HAVE_TE:
        found.append("Transformer Engine")
    return found


def run(check: Check, output: Path) -> dict:
    """Run a check; its line of the report."""
    print(f"\n== {check.name}", flush=True)
    begin = time.perf_counter()
    log = output / f"{check.name}.log"
    with open(log, "w") as file:
        try:
            code = subprocess.run(
                check.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                check=False,
                timeout=check.limit,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
            file.write(f"\nstopped after {check.limit} seconds\n")
    said = log.read_text()
    print(said, flush=True)
    last = [line for line in said.splitlines() if line.strip()][-1:]
    status, speed = ("passed" if code == 0 else "failed"), ""
    if check.figures and code == 0:
        regressions, speed = compare_speed(check.name, output)
        status = "failed" if regressions else status
    return {
        "check": check.name,
        "status": status,
        "seconds": round(time.perf_counter() - begin, 1),
        "said": "; ".join(filter(None, [*last, speed])),
    }


def compare_speed(name: str, output: Path) -> tuple[list[str], str]:
    """What became slower than the tracked figures, and the comparison in words."""
    tracked = bench.tracked(name)
    if not tracked.is_file():
        return [], f"no figures in {tracked.name} to compare with"
    reports = (json.loads(path.read_text()) for path in (output / f"{name}.json", tracked))
    regressions = bench.slower(*reports)
    return regressions, "slower: " + "; ".join(regressions) if regressions else "no slower"


def report(environment: dict, rows: list[dict], output: Path) -> str:
    """Write what is known so far; the table."""
    content = {"environment": environment, "checks": rows}
    (output / "gpu_ci.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["# GPU CI", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in environment.items()]
    lines += ["", "| check | result | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {row['check']} | {row['status']} | {row['seconds']} | {row['said']} |" for row in rows
    ]
    table = "\n".join(lines) + "\n"
    (output / "gpu_ci.md").write_text(table)
    with tarfile.open(output / "gpu_ci.tar.gz", "w:gz") as archive:
        for path in sorted(output.iterdir()):
            if path.suffix in (".json", ".md", ".log", ".png"):
                archive.add(path, path.name)
    return table


def run_all(wanted: Iterable[Check], environment: dict, output: Path, allow_missing_te: bool):
    """Run the checks, and report after each; the rows and the table of the report."""
    rows, table = [], ""
    for check in wanted:
        if lacks := missing(check):
            status = "skipped" if allow_missing_te else "failed"
            said = f"missing: {', '.join(lacks)}"
            rows.append({"check": check.name, "status": status, "seconds": 0, "said": said})
        else:
            rows.append(run(check, output))
        table = report(environment, rows, output)
    return rows, table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [check.name for check in checks(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK",
                        help=f"some of {', '.join(names)}; by default all of them")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--output", type=Path, default="gpu_ci", help="folder of results")
    parser.add_argument("--allow-missing-te", action="store_true",
                        help="skip what needs Transformer Engine where it is missing")  # fmt: skip
    options = parser.parse_args()
    output = options.output.absolute()
    wanted = [check for check in checks(output) if check.name in options.only]
    if options.dry_run:
        for check in wanted:
            lacks = missing(check)
            state = f"missing: {', '.join(lacks)}" if lacks else "would run"
            command = " ".join(check.command[3:])
            print(f"{check.name:13} {state:34} at most {check.limit} s  {command}")
        return 0
    if not bench.HAVE_GPU:
        print("This machine has no GPU; --dry-run says what would run.", file=sys.stderr)
        return 2
    bench.folder(output)
    rows, table = run_all(wanted, bench.environment(), output, options.allow_missing_te)
    if "GITHUB_STEP_SUMMARY" in os.environ:
        with open(os.environ["GITHUB_STEP_SUMMARY"], "a") as summary:
            summary.write(table)
    print(f"\n{table}")
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
