"""The GPU CI job: runs every check that needs a GPU, and reports them in one JSON and one table."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bench

from mcore_packing.testing import tiny

TIMEOUT = 1200  # seconds for one check: a hang must not cost the report


@dataclass
class Check:
    """One command, and what it needs beside a GPU."""

    name: str
    command: list[str]
    needs_te: bool = False


def checks(output: Path) -> list[Check]:
    python = [sys.executable, "-W", "ignore"]
    results = ["--output", str(output)]
    return [
        Check("tests marked gpu", [*python, "-m", "pytest", "-q", "-m", "gpu", "--durations=5"]),
        Check("demo", [*python, "scripts/demo.py", *results]),
        Check(
            "train_llava", [*python, "scripts/train_llava.py", "--verify-packing", "50", *results]
        ),
        Check("parity, TE in bf16", [*python, "-m", "mcore_packing.cli", "parity"], needs_te=True),
        Check("bench_layout", [*python, "scripts/bench_layout.py", *results]),
        Check("bench_expand", [*python, "scripts/bench_expand.py", *results]),
    ]


def missing(check: Check) -> list[str]:
    found = [] if bench.HAVE_GPU else ["a GPU"]
    if check.needs_te and not tiny.HAVE_TE:
        found.append("Transformer Engine")
    return found


def run(check: Check, output: Path) -> dict:
    print(f"\n== {check.name}", flush=True)
    begin = time.perf_counter()
    log = output / f"{check.name.replace(' ', '_').replace(',', '')}.log"
    with open(log, "w") as file:
        try:
            code = subprocess.run(
                check.command, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=TIMEOUT
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
            file.write(f"\nstopped after {TIMEOUT} seconds\n")
    said = log.read_text()
    print(said, flush=True)
    last = [line for line in said.strip().splitlines() if line.strip()][-1:]
    return {
        "check": check.name,
        "status": "passed" if code == 0 else "failed",
        "seconds": round(time.perf_counter() - begin, 1),
        "said": last[0] if last else "",
    }


def table(environment: dict, rows: list[dict]) -> str:
    lines = ["# GPU CI", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in environment.items()]
    lines += ["", "| check | result | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {row['check']} | {row['status']} | {row['seconds']} | {row['said']} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--output", type=Path, default=Path("gpu_ci"), help="folder of results")
    parser.add_argument("--allow-missing-te", action="store_true",
                        help="skip what needs Transformer Engine instead of failing")  # fmt: skip
    options = parser.parse_args()
    environment = bench.environment()
    wanted = checks(options.output)
    if options.dry_run:
        for check in wanted:
            lacks = missing(check)
            state = f"missing: {', '.join(lacks)}" if lacks else "would run"
            print(f"{check.name:22} {state:34} {' '.join(check.command[3:])}")
        return 0

    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for check in wanted:
        lacks = missing(check)
        if "a GPU" in lacks:
            print("This machine has no GPU; --dry-run says what would run.", file=sys.stderr)
            return 1
        if lacks:
            said = f"missing: {', '.join(lacks)}"
            status = "skipped" if options.allow_missing_te else "failed"
            rows.append({"check": check.name, "status": status, "seconds": 0, "said": said})
            continue
        rows.append(run(check, options.output))
    report = {"environment": environment, "checks": rows}
    (options.output / "gpu_ci.json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(environment, rows)
    (options.output / "gpu_ci.md").write_text(text)
    if "GITHUB_STEP_SUMMARY" in os.environ:
        with open(os.environ["GITHUB_STEP_SUMMARY"], "a") as summary:
            summary.write(text)
    print(f"\n{text}")
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
