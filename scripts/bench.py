"""What the benchmarks share: arguments, timing, and the JSON they leave."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

from mcore_packing import cli

RESULTS = Path(__file__).parent / "results"
HAVE_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAVE_GPU else "cpu"
NOISE = 1.25  # between runs on one GPU
# What says which case a row of a report is.
CASE = "name", "tokens", "sequences", "num_tokens", "num_images", "hidden_size", "dtype"
OURS = "layout", "forward", "backward"  # times of ours, in rows of ours


def folder(text: str) -> Path:
    """An argument that names a folder; makes it where there is none."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return Path(text)


def parser(doc: str, budget: float | None = None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes; ``budget`` is the default where it is timed."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--output", type=folder, default="out", help="folder of the results")
    made.add_argument("--update", action="store_true", help="write the results that git tracks, in "
                      "scripts/results, instead")  # fmt: skip
    if budget is not None:
        made.add_argument("--budget", type=float, default=budget, help="seconds a measurement")
        made.add_argument("--smallest", action="store_true", help="the smallest case alone")
    return made


def measure(function, budget: float = 1.0, least: int = 5) -> dict:
    """Median, p20 and p80 in microseconds; on a GPU of the GPU's time, with a cold L2 cache."""
    return measure_all({"": function}, budget, least)[""]


def measure_all(functions: dict, budget: float = 1.0, least: int = 5) -> dict[str, dict]:
    """``measure`` for each; on a CPU they take turns, so that its noise falls on all alike."""
    if HAVE_GPU:
        return {name: _measure_gpu(function, budget) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    rounds, end = 0, time.perf_counter() + budget * len(functions)
    while rounds < least or (time.perf_counter() < end and rounds < 1000):
        rounds += 1
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: _summary(*_quantiles(values)) for name, values in times.items()}


def measure_captured(function, budget: float = 1.0) -> dict:
    """``measure`` of what the GPU does, the host's launches left out: replays of a CUDA graph."""
    if not HAVE_GPU:
        return measure(function, budget)
    from triton.testing import do_bench_cudagraph

    times = do_bench_cudagraph(function, rep=int(budget * 100), quantiles=[0.5, 0.2, 0.8])
    return _summary(*(milliseconds * 1e3 for milliseconds in times))


def _measure_gpu(function, budget: float) -> dict:
    from triton.testing import do_bench

    quantiles = [0.5, 0.2, 0.8]
    times = do_bench(function, warmup=50, rep=budget * 300, quantiles=quantiles)
    return _summary(*(milliseconds * 1e3 for milliseconds in times))


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), fifths[0], fifths[3]


def _summary(median: float, p20: float, p80: float) -> dict:
    return {"median_us": median, "p20_us": p20, "p80_us": p80}


def peak_bytes(function) -> int:
    """The most memory that a call holds at once, above what was there before."""
    function()
    if HAVE_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(accumulate(changes, initial=0))


def host_time(function, count: int = 50) -> float:
    """Median microseconds until the call returns: on a GPU, what it costs to launch."""
    function()
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def environment() -> dict:
    """Versions, GPU, driver, processor and commit; no path of this machine."""
    found = cli.doctor()
    found.pop("found in", None)
    found["processor"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["commit"] = _output("git", "rev-parse", "--short", "HEAD")
    return found


def save(name: str, rows: list[dict], options: argparse.Namespace, **more) -> Path:
    """Write ``<name>.json`` into ``--output``, or the one that git tracks with ``--update``."""
    path = tracked(name) if options.update else options.output / f"{name}.json"
    report = {"benchmark": name, "environment": environment(), **more, "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def tracked(name: str) -> Path:
    """Where git tracks the results of this kind of device."""
    return RESULTS / f"{name}-{device_name()}.json"


def slower(found: dict, before: dict) -> list[str]:
    """Which measurements of a report are slower than those of another beyond noise: the median by
    more than ``NOISE``, and even the p20 above the other's p80."""
    old = dict(_timings(before))
    return [
        f"{name}: {new['median_us']:.1f} us, was {old[name]['median_us']:.1f}"
        for name, new in _timings(found)
        if name in old
        and new["median_us"] > NOISE * old[name]["median_us"]
        and new["p20_us"] > old[name]["p80_us"]
    ]


def _timings(report: dict) -> Iterator[tuple[str, dict]]:
    for row in report["rows"]:
        if row.get("name", "mcore_packing").startswith("mcore_packing"):
            case = " ".join(str(row[key]) for key in CASE if key in row)
            yield from ((f"{case}, {name}", row[name]) for name in OURS if name in row)


def device_name() -> str:
    if not HAVE_GPU:
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((chip for chip in ("h200", "h100", "b200", "a100") if chip in name), "gpu")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
