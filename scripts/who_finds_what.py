"""Twelve broken models, and who finds what: ``isolation`` and ``verify``, in fp32 and bf16, at
initialisation and after 20 steps; and 200 models that are right, none of which may be called wrong.

On a CPU. Writes ``who_finds_what-cpu.json``, and prints the table of docs/parity.md.
"""

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections import Counter

import bench
import torch
import torch.distributed as dist

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.testing import broken, shapes, tiny

STEPS, SAMPLES = 20, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINED = {"at initialisation": False, f"after {STEPS} steps": True}
# ``LLaVAModel`` with these: {what is wrong: (how it is broken, settings of its language model)}.
BROKEN = {
    "attention ignores boundaries": (broken.deaf, {}),
    "attention of the last layer does": (broken.deaf_in_one_layer, {}),
    "attention on one rank of cp 2 does": (broken.one_rank_is_deaf, {}),
    "every boundary one late": (broken.one_late, {}),
    "every boundary one early": (broken.one_early, {}),
    "the last boundary one late": (broken.last_one_late, {}),
    "one late, at an image": (broken.late_at_an_image, {}),
    "one late, where nothing is trained": (broken.late_where_nothing_is_trained, {}),
    "positions run on over the row": (broken.positions_run_on, {}),
    "the tower mixes tiles": (broken.tower_mixes_tiles, {}),
    "two tiles change places": (broken.tiles_swapped, {}),
    "experts drop tokens of the row": (None, broken.DROPPING_EXPERTS),
}
ON_TWO_RANKS = "attention on one rank of cp 2 does"
RIGHT = {
    "learned positions": ("learned_absolute", {}),
    "rope": ("rope", {}),
    "experts": ("rope", broken.EXPERTS),
    "two heads a group": ("rope", {"num_query_groups": 2}),
}


def build(positions: str, settings: dict, seed: int, trained: bool, dtype: torch.dtype):
    """A model with the hook, and a row for it; deviations of weights as Megatron's default."""
    parts = {"init_method_std": 0.02}
    model = tiny.llava_model(
        positions,
        img_size=2 * shapes.PATCH,
        language_layers=2,
        vocab_size=shapes.VOCAB_SIZE,
        max_sequence_length=1024,
        drop_vision_class_token=True,
        language={**parts, **settings},
        vision=parts,
        seed=seed,
    )
    mp.install(model)
    packer = mp.data.get_packer("concatenative", mp.row_spec(model))
    data = shapes.Conversations(SAMPLES * (STEPS + 1), seed=seed)
    if trained:
        train(model, [packer.join(data_of(data, step)) for step in range(STEPS)])
    samples = data_of(data, STEPS)
    for sample in samples[broken.UNTRAINED : broken.UNTRAINED + 2]:
        sample["labels"] = torch.full_like(sample["labels"], -100)
    return model.to(dtype), packer.join(samples)


def data_of(data, step: int) -> list[dict]:
    return [data[SAMPLES * step + sample] for sample in range(SAMPLES)]


def train(model, rows) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for row in rows:
        optimizer.zero_grad()
        loss, mask = model(**row.inputs())
        ((loss * mask).sum() / mask.sum()).backward()
        optimizer.step()


def look(name: str, precision: str, trained: bool) -> dict:
    """What both checks say of a broken model."""
    breaks, settings = BROKEN[name]
    model, row = build("learned_absolute", settings, 0, trained, DTYPES[precision])
    if breaks is not None:
        breaks(model)
    found, compared = parity.isolation(model, row), parity.verify(model, row)
    errors = [sequence.token_mult_prob_error for sequence in compared.sequences]
    return {
        "model": name,
        "precision": precision,
        "trained": trained,
        "isolation": found.verdict,
        "leaks": sorted({leak.sequence for leak in found.leaks}),
        "isolation_passes": found.num_passes,
        "verify": compared.verdict,
        "wrong": sorted({sequence.sequence for sequence in compared.wrong}),
        "worst_error": max(errors),
        "largest_difference": max(sequence.max_difference for sequence in compared.sequences),
        "floor": compared.floor,
    }


def on_two_ranks() -> list[dict]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-3000:])
    return lines


def right_runs(count: int) -> list[dict]:
    """What both say of models that are right: another seed of weights and samples each time."""
    cases = [(k, p, t) for k in RIGHT for p in DTYPES for t in TRAINED.values()]
    found = []
    for index in range(count):
        kind, precision, trained = cases[index % len(cases)]
        model, row = build(*RIGHT[kind], 1 + index, trained, DTYPES[precision])
        apart, compared = parity.isolation(model, row), parity.verify(model, row, gradients=True)
        found.append(
            {
                "model": kind,
                "precision": precision,
                "trained": trained,
                "seed": 1 + index,
                "isolation": apart.verdict,
                "verify": compared.verdict,
                "said": [] if compared.is_right and apart.is_right else [str(apart), str(compared)],
            }
        )
    return found


def table(rows: list[dict]) -> list[str]:
    """In Markdown: a line a model, in each cell what ``isolation`` and ``verify`` say."""
    columns = [(p, name, t) for p in DTYPES for name, t in TRAINED.items()]
    lines = ["| | " + " | ".join(f"{p}, {name}" for p, name, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for model in BROKEN:
        cells = []
        for precision, _, trained in columns:
            (row,) = (
                r for r in rows
                if (r["model"], r["precision"], r["trained"]) == (model, precision, trained)
            )  # fmt: skip
            cells.append(f"{row['isolation']}, {row['verify']} ({row['worst_error']:.4f})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def cases(name: str) -> list[dict]:
    return [look(name, p, trained) for p in DTYPES for trained in TRAINED.values()]


def main() -> int:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        with tiny.megatron(context_parallel_size=2):
            rows = cases(ON_TWO_RANKS)
        if dist.get_rank() == 0:
            print(*map(json.dumps, rows), sep="\n", flush=True)
        dist.barrier()
        dist.destroy_process_group()
        return 0
    parser = bench.parser(__doc__)
    parser.add_argument("--right", type=int, default=200, help="how many right models to look at")
    options = parser.parse_args()
    begin = time.monotonic()
    with tiny.megatron():
        rows = [row for name in BROKEN if name != ON_TWO_RANKS for row in cases(name)]
        rows += on_two_ranks()
        print(*table(rows), sep="\n", flush=True)
        right = right_runs(options.right)
    counts = {name: Counter(run[name] for run in right) for name in ("isolation", "verify")}
    print(f"{len(right)} right models: {counts}, {time.monotonic() - begin:.0f} s")
    unsaid = [row for row in rows if "wrong" not in (row["isolation"], row["verify"])]
    false = [run for run in right if "wrong" in (run["isolation"], run["verify"])]
    bench.save("who_finds_what", [*rows, *right], options)
    for row in (*unsaid, *false):
        print(f"FAILED: {row}", file=sys.stderr)
    return int(bool(unsaid or false))


if __name__ == "__main__":
    sys.exit(main())
