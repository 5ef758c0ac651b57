"""The demo: parity of packed rows without and with the hook, then a short training run."""

import argparse
import json
import logging
import sys
import time

import torch
from bench import folder

import mcore_packing as mp
from mcore_packing import cli
from mcore_packing.testing import tiny

try:
    from mcore_packing import plot
except ImportError:
    plot = None

STEPS = 4
SAMPLE_COUNTS = (1, 4, 16)
PICTURED = 4  # samples
POSITIONS = ("learned_absolute", "rope")
HEADER = (
    f"{'positions':16} {'samples':>7} {'images':>6} {'collapsed':>9} {'expanded':>8} "
    f"{'hook':>7}   {'token_mult_prob_error':>21}   {'largest difference':>18}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=folder, default="out", help="folder of PNG and JSON")
    parser.add_argument("--smallest", action="store_true", help="tiny images")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    exact = torch.float32 == tiny.DTYPE
    say(f"mcore_packing {mp.__version__}; attention: {tiny.attention_name()}")
    with tiny.megatron():
        size = 28 if options.smallest else 336  # pixels: 5 or 577 positions a tile
        rows, broken, pictured = show_parity(size)
        training = show_training(size)

    report = {"environment": cli.doctor(), "parity": rows, "broken": broken, "training": training}
    (options.output / "parity.json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"wrote {options.output / 'parity.json'}")
    if plot is None:
        say("parity.png needs matplotlib: pip install matplotlib")
    else:
        pictured = {f"{name} ({kind})": found for name, (kind, found) in pictured.items()}
        plot.draw_parity(pictured, tiny.attention_name(), options.output / "parity.png")
        say(f"wrote {options.output / 'parity.png'}")

    failures = [
        f"{row['position_embedding_type']}, {row['samples']} samples: not 1.000000 with the hook"
        for row in rows
        if row["hook"] and not row["token_mult_prob_error"] <= (1 + 5e-7 if exact else 1.05)
    ]
    failures += [f"training: {name}" for name, passed in training["checks"].items() if not passed]
    for failure in failures:
        say(f"FAILED: {failure}")
    return int(bool(failures))


def say(line: str) -> None:
    print(line, flush=True)


def show_parity(size: int):
    """One table: every position kind, number of samples, without and with the hook."""
    say("\nOne packed row against the same samples, run one by one. 1.000000 is perfect.\n")
    say(HEADER)
    rows, broken, pictured = [], {}, {}
    for positions in POSITIONS:
        model = tiny.llava_model(positions, img_size=size)
        for count in SAMPLE_COUNTS:
            progress(f"running {count} samples one by one ...")
            samples = tiny.samples(count, img_size=size)
            alone = mp.parity.run_alone(model, samples)
            progress("running them packed ...")
            before, reason = attempt(model, samples, alone, "collapsed")
            with mp.install(model, space="collapsed"):
                after = mp.parity.compare(model, samples, alone)
            rows.append(record(positions, False, before, reason, after))
            rows.append(record(positions, True, after, "", after))
            progress("")
            say(line_of(rows[-2]))
            say(line_of(rows[-1]))
            if count == PICTURED:
                broken[positions] = show_broken(model, samples, alone, after)
                found = {**broken[positions], "moved by mcore_packing": (after, "")}
                for name, (result, reason) in found.items():
                    if not reason:  # rope where it computes: learned positions go on besides
                        pictured[f"Boundaries {name}"] = positions, result
    say(f"\n{PICTURED} samples, without the hook, by what becomes of their boundaries.\n")
    say(f"{'boundaries':46} {'learned_absolute':>17} {'rope':>9}   {'what happens':20}")
    for name, (_, happens) in BROKEN.items():
        errors = (in_short(*broken[positions][name]) for positions in POSITIONS)
        say(f"{name:46} {next(errors):>17} {next(errors):>9}   {happens}")
    record_of = {
        positions: {name: in_short(*found) for name, found in broken[positions].items()}
        for positions in POSITIONS
    }
    return rows, record_of, pictured


def show_broken(model, samples, alone, right) -> dict:
    """Every way to get boundaries wrong, without the hook: a comparison, or why there is none."""
    return {
        name: attempt(model, samples, alone, boundaries(right.layout))
        for name, (boundaries, _) in BROKEN.items()
    }


def miscounted(layout):
    """The boundaries of a data path that takes an image for one position less than it becomes; the
    last one is the row's end."""
    images = layout.is_placeholder.cumsum(0)
    before = torch.cat([images.new_zeros(1), images])[layout.cu_seqlens_collapsed.long()]
    before[-1] = 0
    return (layout.cu_seqlens_expanded - before).int()


def in_short(result, reason) -> str:
    return "raises" if reason else f"{result.token_mult_prob_error:.6f}"


BROKEN = {  # what becomes of the boundaries, and of attention
    "left collapsed": (
        lambda layout: "collapsed",
        "cut inside images; what is past the last boundary attends to nothing",
    ),
    "dropped": (lambda layout: None, "one sequence: every sample sees all before it"),
    "expanded, but one short for each image": (
        miscounted,
        "the last positions of each sample belong to the next one",
    ),
}


def attempt(model, samples, alone, boundaries):
    """A comparison, or in words why Megatron could not compute it."""
    try:
        return mp.parity.compare(model, samples, alone, boundaries), ""
    except RuntimeError as error:
        return None, f"Megatron raises {type(error).__name__}: {str(error).splitlines()[0]}"


def record(positions, hook, result, reason, shape) -> dict:
    return {
        "position_embedding_type": positions,
        "hook": hook,
        "samples": shape.num_samples,
        "images": shape.num_images,
        "collapsed": shape.num_collapsed,
        "expanded": shape.num_expanded,
        "token_mult_prob_error": result and result.token_mult_prob_error,
        "max_difference": result and result.max_difference,
        "lost_labels": result and result.lost_labels,
        "error": reason,
    }


def line_of(row: dict) -> str:
    error = "raises" if row["error"] else f"{row['token_mult_prob_error']:.6f}"
    difference = row["error"][:60] if row["error"] else f"{row['max_difference']:.1e}"
    return (
        f"{row['position_embedding_type']:16} {row['samples']:7} {row['images']:6} "
        f"{row['collapsed']:9} {row['expanded']:8} {'with' if row['hook'] else 'without':>7}   "
        f"{error:>21}   {difference:>18}"
    )


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def show_training(size: int) -> dict:
    """Losses of a few steps, packed and one by one, from the same weights."""
    samples = tiny.samples(6, img_size=size)
    say(f"\nTraining {STEPS} steps with SGD from the same weights: the loss of every step.\n")
    runs = {}
    for name in ("one by one", "packed"):
        begin = time.perf_counter()
        runs[name] = train(size, samples, name == "packed")
        losses = "  ".join(f"{loss:.7f}" for loss in runs[name])
        say(f"{name:20} {losses}   ({time.perf_counter() - begin:.1f} s)")
    tolerance = 2e-6 if torch.float32 == tiny.DTYPE else 2e-2

    pairs = zip(*runs.values(), strict=True)
    same = all(abs(x - y) <= tolerance * abs(x) for x, y in pairs)
    checks = {"packed equals one by one": same}
    for check, passed in checks.items():
        say(f"{'ok' if passed else 'NO':>4}  {check}")
    say("")
    return {"losses": runs, "checks": checks}


def train(size: int, samples, is_packed: bool) -> list[float]:
    """Mean loss of every step, packed or one by one."""
    model = tiny.llava_model(img_size=size)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rows = [mp.parity.collate(samples)]
    if not is_packed:
        rows = [{**mp.parity.collate([sample]), "cu_seqlens": None} for sample in samples]
    handle = mp.install(model, space="collapsed") if is_packed else None
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = [mp.parity.forward(model, row) for row in rows]
        total = sum((loss.float() * mask.float()).sum() for loss, mask in outputs)
        loss = total / sum(mask.float().sum() for _, mask in outputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if handle is not None:
        handle.remove()
    return losses


if __name__ == "__main__":
    sys.exit(main())
