"""The GPU job: runs every check that needs a GPU, and reports them in one JSON and one table.

It has two parts. The first runs what is not timed side by side, then the benchmarks, each alone on
the card. The second runs again what --again names, then memory under compute-sanitizer, and one
kernel under ncu.
"""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import figures

ROOT = Path(__file__).parents[1]
SUFFIXES = ".json", ".md", ".log", ".png"  # of what the archive holds
HELP = """
A check fails where its command fails or runs into its limit, and where a benchmark is slower than
the figures of this kind of GPU in scripts/results beyond noise: the median by more than a quarter,
and even the p20 above their p80. Where there are no such figures, speed is reported only.

The check bench_max_seqlen needs Transformer Engine and fails where that is missing;
--allow-missing-te skips it. Single tests that need it skip themselves, and say so. --seconds is for
the whole part: every limit ends there, and a check that would not even have half of its predicted
time is left out, and fails.

gpu_ci.json, gpu_ci.md, the log of every check and an archive with all of them are written anew
after each check. The exit status is 0 where all passed or were skipped, 1 where a check
failed, 2 where nothing could run.

Predicted on one H100 and 16 cores, Python and torch not in the disk cache yet; nothing of it was
measured on a GPU. Checks in the order of what they prove; those side by side take as long as the
longest of them.

"""


@dataclass
class Check:
    """One command, and the seconds that it takes.

    Attributes:
        seconds: predicted.
        limit: it is stopped then.
        alone: whether nothing else may run on the card.
        needs_te: whether it needs Transformer Engine beside a GPU.
        figures: whether it leaves ``<name>.json`` with times to compare.
        smaller: arguments that make it small enough for a CPU that answers for a GPU.
        tool: what runs Python, and not in a rehearsal.
        variables: of its environment.
    """

    name: str
    python: list[str]
    seconds: int
    limit: int
    alone: bool = False
    needs_te: bool = False
    figures: bool = False
    smaller: tuple[str, ...] = ()
    tool: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


REHEARSED = 300  # seconds that a check may take on a busy CPU
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--durations=5"]


def first_part(output: Path) -> list[Check]:
    """Most valuable first."""
    results = ["--output", str(output)]
    smallest = ("--smallest",)
    untimed = (*smallest, "--budget", "0")

    def script(name, *more, **numbers):
        return Check(name, [f"scripts/{name}.py", *more, *results], **numbers)

    return [
        Check("environment", ["scripts/bench.py", *results], 20, 60),
        script("gpu_parity", seconds=60, limit=150, smaller=smallest),
        Check("kernels", [*PYTEST, "tests/test_kernels.py"], 75, 150, smaller=("--collect-only",)),
        Check("gpu_tests", [*PYTEST, "tests/test_gpu.py"], 100, 150,
              smaller=("-k", "not beyond")),
        script("train_llava", "--steps", "100", "--verify-packing", "50", "--save-every", "100",
               "--overwrite", seconds=50, limit=150, smaller=("--steps", "2")),
        script("demo", seconds=60, limit=150, smaller=smallest),
        script("bench_expand", "--budget", "0.4", seconds=60, limit=90, alone=True, figures=True,
               smaller=untimed),
        script("bench_step", seconds=65, limit=100, alone=True, smaller=smallest),
        script("bench_max_seqlen", "--budget", "0.4", seconds=15, limit=40, alone=True,
               needs_te=True, smaller=untimed),
        script("bench_layout", "--budget", "0.2", seconds=15, limit=40, alone=True, figures=True,
               smaller=untimed),
        script("bench_host", seconds=15, limit=30, alone=True, figures=True, smaller=smallest),
    ]  # fmt: skip


def second_part(output: Path) -> list[Check]:
    sections = "SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy"
    ncu = ["ncu", "--clock-control", "none", "--kernel-name", "regex:copy_vectors"]
    ncu += ["--launch-skip", "2", "--launch-count", "2"]
    ncu += [word for section in sections for word in ("--section", section)]
    return [
        Check(
            "memcheck", [*PYTEST, "tests/test_kernels.py", "-k", "not two_billion"], 90, 110,
            tool=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
            variables=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),
                       ("MCORE_PACKING_TEST_ROUNDS", "40")),
            smaller=("--collect-only",),
        ),
        Check(
            "profile", ["scripts/bench_expand.py", "--profile", "--output", str(output)], 30, 50,
            alone=True, tool=tuple(ncu), smaller=("--smallest",),
        ),
    ]  # fmt: skip


def command_of(check: Check, rehearse: bool = False) -> list[str]:
    """What runs; in a rehearsal on a CPU that answers for a GPU."""
    python = [sys.executable, "-W", "ignore"]
    if rehearse:
        return [*python, "-m", "mcore_packing.testing.pretend_gpu", *check.python, *check.smaller]
    return [*check.tool, *python, *check.python]


def gpu_name() -> str:
    """Of the first GPU; empty if there is none. Torch would take seconds to say."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except FileNotFoundError:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def missing(check: Check, gpu: str) -> list[str]:
    found = [] if gpu else ["a GPU"]
    if check.needs_te and find_spec("transformer_engine") is None:
        found.append("Transformer Engine")
    return found + [tool for tool in check.tool[:1] if shutil.which(tool) is None]


class Running:
    """A check that runs, in a process group of its own."""

    def __init__(self, check: Check, output: Path, limit: float, rehearse: bool, neighbours: int):
        self.check, self.begin, self.limit = check, time.perf_counter(), limit
        self.log = output / f"{check.name}.log"
        threads = str(max(1, (os.cpu_count() or 1) // neighbours))
        room = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.file = open(self.log, "w")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            command_of(check, rehearse),
            stdout=self.file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1",
                 "PYTHONPATH": room, **dict(check.variables)},
            start_new_session=True,
        )  # fmt: skip

    def ended(self) -> bool:
        """Whether it ran to its end, or into its limit."""
        if self.process.poll() is None and time.perf_counter() - self.begin < self.limit:
            return False
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.file.write(f"\nstopped after {self.limit:.0f} seconds\n")
        self.file.close()
        return True

    def report(self, output: Path, gpu: str) -> dict:
        """What it gave."""
        said = self.log.read_text()
        print(f"\n== {self.check.name}\n{said}", flush=True)
        last = [line for line in said.splitlines() if line.strip()][-1:]
        code, speed = self.process.returncode, ""
        status = "passed" if code == 0 else "failed"
        if self.check.figures and code == 0:
            regressions, speed = figures.compared(self.check.name, output, gpu)
            status = "failed" if regressions else status
        return {
            "check": self.check.name,
            "status": status,
            "seconds": round(time.perf_counter() - self.begin, 1),
            "said": "; ".join(filter(None, [*last, speed])),
        }


class Job:
    """Some checks, and what they gave so far.

    Args:
        output: folder of the results.
        gpu: its name.
        seconds: for all of them; None for no end.
        allow_missing_te: whether what needs Transformer Engine is skipped where it is missing.
        rehearse: whether a CPU answers for the GPU.
        archive: where to put all results in one file; by default among them.
    """

    def __init__(
        self,
        output: Path,
        gpu: str,
        seconds: float | None = None,
        allow_missing_te: bool = False,
        rehearse: bool = False,
        archive: Path | None = None,
    ):
        self.output, self.gpu, self.rehearse = output, gpu, rehearse
        self.archive = archive or output / "gpu_ci.tar.gz"
        self.allow_missing_te = allow_missing_te
        self.end = None if seconds is None else time.perf_counter() + seconds
        self.reports, self.table = [], ""

    def run(self, wanted: list[Check]) -> None:
        """Those that may, side by side; then the others, one by one. A rehearsal times nothing."""
        together = [check for check in wanted if self.rehearse or not check.alone]
        alone = [check for check in wanted if check not in together]
        self.run_together(together, reserved=sum(check.seconds for check in alone))
        for check in alone:
            self.run_together([check])

    def run_together(self, wanted: list[Check], reserved: float = 0) -> None:
        """Start all that can run, and report as they end."""
        ready = [check for check in wanted if self.may_start(check)]
        running = [
            Running(check, self.output, self.limit(check, reserved), self.rehearse, len(ready))
            for check in ready
        ]
        while running:
            for one in [one for one in running if one.ended()]:
                running.remove(one)
                self.add(one.report(self.output, self.gpu))
            time.sleep(0.1)

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.perf_counter()

    def limit(self, check: Check, reserved: float) -> float:
        """What is left, without what is ``reserved`` for others, at most its own."""
        if self.rehearse:
            return REHEARSED
        return min(check.limit, max(self.left() - reserved, check.seconds / 2))

    def may_start(self, check: Check) -> bool:
        lacks = [] if self.rehearse else missing(check, self.gpu)
        if lacks:
            skips = self.allow_missing_te and lacks == ["Transformer Engine"]
            self.leave_out(check, "skipped" if skips else "failed", f"missing: {', '.join(lacks)}")
        elif self.left() < check.seconds / 2:
            self.leave_out(check, "failed", f"no time: {max(self.left(), 0):.0f} seconds are left")
            return False
        return not lacks

    def leave_out(self, check: Check, status: str, said: str) -> None:
        self.add({"check": check.name, "status": status, "seconds": 0, "said": said})

    def add(self, report: dict) -> None:
        """Write what is known so far."""
        self.reports.append(report)
        path = self.output / "environment.json"
        written = any(one["check"] == "environment" for one in self.reports) and path.is_file()
        environment = json.loads(path.read_text()) if written else {"GPU": self.gpu}
        content = {"environment": environment, "checks": self.reports}
        (self.output / "gpu_ci.json").write_text(json.dumps(content, indent=1) + "\n")
        lines = ["# GPU CI", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in environment.items()]
        lines += ["", "| check | result | seconds | |", "|---|---|---|---|"]
        lines += [
            f"| {one['check']} | {one['status']} | {one['seconds']} | {one['said']} |"
            for one in self.reports
        ]
        self.table = "\n".join(lines) + "\n"
        (self.output / "gpu_ci.md").write_text(self.table)
        # Whoever is stopped while writing leaves the last archive whole.
        half = self.archive.with_suffix(".half")
        with tarfile.open(half, "w:gz") as archive:
            for path in sorted(self.output.iterdir()):
                if path.suffix in SUFFIXES:
                    content = path.read_bytes()  # at once: a check that runs may shorten it
                    entry = tarfile.TarInfo(path.name)
                    entry.size, entry.mtime = len(content), time.time()
                    archive.addfile(entry, io.BytesIO(content))
        half.replace(self.archive)

    @property
    def failed(self) -> bool:
        return any(one["status"] == "failed" for one in self.reports)


def predicted(checks: list[Check]) -> int:
    """Seconds of a part."""
    together = max((check.seconds for check in checks if not check.alone), default=0)
    return together + sum(check.seconds for check in checks if check.alone)


def table_of(name: str, checks: list[Check]) -> str:
    lines = [f"{name} part, {predicted(checks)} seconds:"]
    for check in checks:
        when = "alone" if check.alone else "side by side"
        lines.append(f"  {check.name:17} {check.seconds:4} s, at most {check.limit:3} s, {when}")
    return "\n".join(lines)


def main() -> int:
    parts = {"first": first_part, "second": second_part}
    tables = "\n\n".join(table_of(name, checks(Path())) for name, checks in parts.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=HELP + tables,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [check.name for check in first_part(Path())]
    parser.add_argument("--part", choices=parts, default="first")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK",
                        help="some checks of the first part; by default all of them")  # fmt: skip
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="CHECK",
                        help="checks of the first part that the second runs too")  # fmt: skip
    parser.add_argument("--seconds", type=float, help="for the whole part; by default no end")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU that answers for a GPU, "
                        "with small sizes: values are right, times mean nothing")  # fmt: skip
    parser.add_argument("--output", type=Path, default="gpu_ci", help="folder of results")
    parser.add_argument("--archive", type=Path, help="one file of all results, written anew after "
                        "each check; by default gpu_ci.tar.gz among them")  # fmt: skip
    parser.add_argument("--allow-missing-te", action="store_true",
                        help="skip what needs Transformer Engine where it is missing")  # fmt: skip
    options = parser.parse_args()
    os.environ["PATH"] += f"{os.pathsep}/usr/local/cuda/bin"  # compute-sanitizer, ncu
    output = options.output.absolute()
    asked = options.only if options.part == "first" else options.again
    wanted = [check for check in first_part(output) if check.name in asked]
    wanted += second_part(output) if options.part == "second" else []
    gpu = "no GPU, pretended" if options.rehearse else gpu_name()
    if options.dry_run:
        for check in wanted:
            lacks = missing(check, gpu)
            state = f"missing: {', '.join(lacks)}" if lacks else "would run"
            print(f"{check.name:17} {state:34} {check.seconds:4} s, at most {check.limit} s  "
                  f"{' '.join(command_of(check))}")  # fmt: skip
        return 0
    if not gpu:
        print("This machine has no GPU; --dry-run says what would run.", file=sys.stderr)
        return 2
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {output}: {error.strerror}")
    job = Job(
        output, gpu, options.seconds, options.allow_missing_te, options.rehearse, options.archive
    )
    job.run(wanted)
    if "GITHUB_STEP_SUMMARY" in os.environ:
        with open(os.environ["GITHUB_STEP_SUMMARY"], "a") as summary:
            summary.write(job.table)
    print(f"\n{job.table}")
    return int(job.failed)


if __name__ == "__main__":
    sys.exit(main())
