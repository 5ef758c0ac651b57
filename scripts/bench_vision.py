"""The vision tower shared over context-parallel ranks: what travels, and what is saved.

Without arguments of torchrun it simulates rows: how many image embeddings the busiest rank
receives, against an all-gather of all, and how long making shares takes. With two processes it
trains a model with a heavy tower, with and without sharing.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import mcore_packing as mp
from mcore_packing import cpu, plot
from mcore_packing.testing import tiny

TILE = 256  # positions
ROWS = {
    # name: (positions of a row, draws a sample: a list of tokens, None for a tile)
    "8k SFT pack": (8_192, "sft"),
    "32k SFT pack": (32_768, "sft"),
    "32k of one tile each": (32_768, "single"),
    "128k document": (131_072, "document"),
    "128k video": (131_072, "video"),
}
CP_SIZES = (2, 4, 8, 16)


def picture(path: Path) -> None:
    """A row of three samples at context-parallel size 4."""
    image, text = [-200], [1]
    samples = (
        text * 20 + image * 6 + text * 70 + image * 5 + text * 40,
        text * 40 + image * 2 + text * 60,
        text * 56,
    )
    ids = torch.tensor([token for sample in samples for token in sample])
    edges = torch.tensor([0, *itertools.accumulate(map(len, samples))], dtype=torch.int32)
    spec = mp.RowSpec(cp_size=4, seq_multiple=8)
    layout = mp.PackedLayout.build(ids, edges, [36] * 13, spec, space="collapsed")
    layout = layout.with_shares(mp.vision.shares(layout, [1] * 13, 4))
    plot.draw_shares(layout, path)


def draw(kind: str, rng: np.random.Generator) -> list[int]:
    """A sample: how many tokens of text, and -n for an image of n tiles, in turn."""
    if kind == "single":
        return [int(rng.integers(16, 64)), -1, int(rng.lognormal(5.0, 0.8)) + 8]
    if kind == "sft":  # text, or an image of up to 12 tiles and a thumbnail
        text = int(rng.lognormal(5.3, 1.0)) + 8
        tiles = int(rng.choice([0, 1, 3, 5, 7, 13], p=[0.2, 0.3, 0.1, 0.15, 0.1, 0.15]))
        return [text // 4 + 1, -tiles, text] if tiles else [text]
    if kind == "document":  # pages of text and pictures
        return [x for _ in range(400) for x in (int(rng.integers(50, 600)), -1)]
    return [x for _ in range(600) for x in (int(rng.integers(8, 24)), -1)]  # frames


def make_layout(kind: str, length: int, cp_size: int, rng) -> tuple[mp.PackedLayout, list[int]]:
    """A row, filled up to its length, and its tiles."""
    multiple, ids, bounds, tiles, used = 2 * cp_size, [], [0], [], 0
    while True:
        sample = draw(kind, rng)
        room = length - used - multiple
        fits, size = [], 0
        for part in sample:
            positions = part if part > 0 else -part * TILE
            if size + positions > room:
                break
            fits.append(part)
            size += positions
        if len(fits) < len(sample) and bounds[1:] and kind not in ("document", "video"):
            break
        for part in fits:
            ids += [1] * part if part > 0 else [-200]
            tiles += [] if part > 0 else [-part]
        bounds.append(len(ids))
        used += -(-size // multiple) * multiple
        if len(fits) < len(sample):
            break
    spec = mp.RowSpec(cp_size=cp_size, seq_multiple=multiple)
    edges = torch.tensor(bounds, dtype=torch.int32)
    counts = [count * TILE for count in tiles]
    return mp.PackedLayout.build(torch.tensor(ids), edges, counts, spec, space="collapsed"), tiles


def received(counts: torch.Tensor) -> int:
    """By the busiest rank."""
    return int((counts.sum(0) - counts.diagonal()).max())


def contiguous(layout, tiles, cp_size) -> int:
    """The same where ranks get whole tiles in order, and only what is needed travels."""
    shares = mp.vision.shares(layout, tiles, cp_size)
    total = shares.num_tiles
    need = mp.vision._needs(layout, shares.cu_tile_embeddings.numpy().astype(int), cp_size)
    encoder = np.arange(total) * cp_size // total
    counts = (encoder == np.arange(cp_size)[:, None]).astype(float) @ need
    return received(torch.from_numpy(counts))


def simulate(rows: int, seed: int) -> list[dict]:
    """Mean over rows of what the busiest rank receives, by part of what an all-gather brings."""
    found = []
    for name, (length, kind) in ROWS.items():
        for cp_size in CP_SIZES:
            rng = np.random.default_rng(seed)
            ours, in_order, times, tiles_of_rows, unlike = [], [], [], [], 0
            for _ in range(rows):
                layout, tiles = make_layout(kind, length, cp_size, rng)
                began = time.perf_counter()
                shares = mp.vision.shares(layout, tiles, cp_size)
                times.append(time.perf_counter() - began)
                gathered = int(shares.cu_tile_embeddings[-1]) * (cp_size - 1) / cp_size
                ours.append(received(shares.counts) / gathered)
                in_order.append(contiguous(layout, tiles, cp_size) / gathered)
                tiles_of_rows.append(shares.num_tiles)
                loads = [len(shares.tiles_of(rank)) for rank in range(cp_size)]
                unlike = max(unlike, max(loads) - min(loads))
            found.append({
                "row": name, "cp": cp_size, "tiles": round(statistics.mean(tiles_of_rows)),
                "received": statistics.mean(ours), "contiguous": statistics.mean(in_order),
                "most_tiles_apart": unlike, "ms": 1e3 * statistics.median(times),
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def train(shares_vision: bool, steps: int) -> dict:
    """Seconds of a step and peak memory of a process, of a model with a heavy tower."""
    with cpu.megatron_on_cpu(context_parallel_size=dist.get_world_size()):
        size = {"num_layers": 6, "hidden_size": 256, "ffn_hidden_size": 1024}
        model = tiny.llava_model("rope", img_size=168, vision=size, per_token_loss=True)
        rows, _ = mp.data.pack(tiny.samples(24, img_size=168), mp.row_spec(model), capacity=8192)
        cp_rank, cp_size = dist.get_rank(), dist.get_world_size()
        row = (rows.shard_vision(cp_rank, cp_size) if shares_vision else rows)[0]
        times = []
        with mp.install(model, vision_dp_over_cp=shares_vision):
            for _ in range(steps + 1):
                dist.barrier()
                began = time.perf_counter()
                loss, mask = model(**row.inputs())
                (loss * mask).sum().backward()
                dist.barrier()
                times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"shared": shares_vision, "tiles": len(row.images), "peak_mib": round(peak),
            "seconds": statistics.median(times[1:])}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20, help="of each kind, to simulate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for bench_vision.json and a picture, shares.png")
    parser.add_argument("--shared", action="store_true", help="in a job: share the tower")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if "WORLD_SIZE" not in os.environ:
        found = simulate(options.rows, options.seed)
        if options.output:
            folder = Path(options.output)
            (folder / "bench_vision.json").write_text(json.dumps(found, indent=1) + "\n")
            picture(folder / "shares.png")
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = train(options.shared, options.steps)
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found)
    if dist.get_rank() == 0:
        print(json.dumps({
            **found, "tiles": [one["tiles"] for one in everyones],
            "peak_mib": max(one["peak_mib"] for one in everyones),
        }))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
