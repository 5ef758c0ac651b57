"""Figures that git tracks, and which of new ones are slower. Without torch: the GPU job reads them
while its checks import it."""

import json
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NOISE = 1.25  # between runs on one GPU
# What says which case was measured.
CASE = (
    "name",
    "tokens",
    "positions",
    "sequences",
    "num_tokens",
    "num_images",
    "hidden_size",
    "dtype",
)
OURS = "layout", "forward", "backward"  # times of ours


def kind_of(gpu: str) -> str:
    """The kind of device in the name of a file, from what the GPU calls itself; "cpu" if none."""
    if not gpu or gpu.startswith("none"):
        return "cpu"
    return next((chip for chip in ("h200", "h100", "b200", "a100") if chip in gpu.lower()), "gpu")


def tracked(name: str, gpu: str) -> Path:
    """Where git tracks the results of this kind of device."""
    return RESULTS / f"{name}-{kind_of(gpu)}.json"


def compared(name: str, folder: Path, gpu: str) -> tuple[list[str], str]:
    """What became slower than the tracked figures, and the comparison in words."""
    before = tracked(name, gpu)
    if not before.is_file():
        return [], f"no figures in {before.name} to compare with"
    reports = (json.loads(path.read_text()) for path in (folder / f"{name}.json", before))
    regressions = slower(*reports)
    return regressions, "slower: " + "; ".join(regressions) if regressions else "no slower"


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
    for measured in report["measurements"]:
        if measured.get("name", "mcore_packing").startswith("mcore_packing"):
            case = " ".join(str(measured[key]) for key in CASE if key in measured)
            yield from ((f"{case}, {name}", measured[name]) for name in OURS if name in measured)
