"""What the benchmarks share: arguments, timing, and the JSON they leave."""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

import figures

from mcore_packing import cli

HAVE_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAVE_GPU else "cpu"
# Sizes that fill a GPU, unless it is only pretended: mcore_packing.testing.pretend_gpu.
LARGE = HAVE_GPU and not hasattr(torch.cuda, "PRETENDED")
LONG_ENOUGH = 1e-3  # seconds: a replay this long hides what starting one costs


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
    made.add_argument("--smallest", action="store_true", help="the smallest case alone")
    if budget is not None:
        made.add_argument("--budget", type=float, default=budget, help="seconds a measurement")
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
    return {name: summary(values) for name, values in times.items()}


def measure_captured(functions: Sequence, budget: float = 1.0) -> dict:
    """``measure`` of what the GPU does, the host's launches left out: replays of a CUDA graph.

    Args:
        functions: the same work on data of its own each, together several times the L2 cache, so
            that no call finds in it what the one before has left there.
        budget: seconds.
    """
    if not HAVE_GPU:
        return measure(functions[0], budget)
    once = _captured(functions)
    for _ in range(2):  # a first replay uploads the graph
        seconds = _gpu_seconds(once.replay)
    rounds = 1 + int(LONG_ENOUGH / max(seconds, 1e-6))
    graph = once if rounds == 1 else _captured([*functions] * rounds)
    return _measure_gpu(graph.replay, budget, calls=len(functions) * rounds)


def _captured(functions: Sequence):
    """A CUDA graph of these calls, whose results do not share memory within a round."""
    for function in dict.fromkeys(functions):
        function()  # compiles and allocates
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), deque(maxlen=len(set(functions)))
    with torch.cuda.graph(graph):
        for function in functions:
            kept.append(function())
    return graph


def _gpu_seconds(function) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _measure_gpu(function, budget: float, calls: int = 1) -> dict:
    """Between CUDA events. What comes before clears the L2 cache, which takes the GPU about 0.1 ms:
    that long, the host may be ahead."""
    function()
    torch.cuda.synchronize()
    count = int(min(max(budget / 2 / max(_gpu_seconds(function), 1e-4), 10), 300))
    cache = torch.empty(1 << 28 if LARGE else 1, dtype=torch.int8, device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        cache.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return summary([begin.elapsed_time(end) * 1e3 / calls for begin, end in events])


def num_sets(nbytes: int) -> int:
    """How many sets of data of this size are several times the L2 cache; 1 without a GPU."""
    if not HAVE_GPU:
        return 1
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, -(-4 * cache // nbytes))


def summary(times: Sequence[float]) -> dict:
    """Median, p20 and p80 of times in microseconds."""
    fifths = statistics.quantiles(times, n=5)
    return {"median_us": statistics.median(times), "p20_us": fifths[0], "p80_us": fifths[3]}


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


@functools.cache
def environment() -> dict:
    """Versions, GPU, driver, processor and commit; no path of this machine."""
    found = cli.doctor()
    found.pop("found in", None)
    found["processor"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    # Copied to a machine without its history, a checkout does not know.
    said = os.environ.get("MCORE_PACKING_COMMIT")
    found["commit"] = said or _output("git", "rev-parse", "--short", "HEAD")
    return found


def save(name: str, measurements: list[dict], options: argparse.Namespace, **more) -> Path:
    """Write ``<name>.json`` into ``--output``, or the one that git tracks with ``--update``."""
    path = tracked(name) if options.update else options.output / f"{name}.json"
    report = {"benchmark": name, "environment": environment(), **more, "measurements": measurements}
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def tracked(name: str) -> Path:
    """Where git tracks the results of this kind of device."""
    return figures.tracked(name, gpu_name())


def gpu_name() -> str:
    """What the GPU calls itself; empty if there is none."""
    return torch.cuda.get_device_name() if HAVE_GPU else ""


def device_name() -> str:
    """The kind of device, in short."""
    return figures.kind_of(gpu_name())


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def main() -> None:
    """Write ``environment.json``: what this machine has."""
    options = parser("What this machine has.").parse_args()
    found = json.dumps(environment(), indent=1)
    (options.output / "environment.json").write_text(found + "\n")
    print(f"{found}\nwrote {options.output / 'environment.json'}")


if __name__ == "__main__":
    main()
