"""How much of a row is padding, against context-parallel size and sequences per row."""

import random
import sys

import bench
import torch

import mcore_packing as mp

IMAGE = -200
ROWS = 576
CP_SIZES = (1, 2, 4, 8, 16, 32, 64)
SHAPES = ((8_192, 4), (32_768, 16), (131_072, 64), (1_000_000, 64), (1_000_000, 512))
TP_SIZE = 8


def make_row(num_rows: int, num_seqs: int):
    """Sequences of random length that expand to about ``num_rows`` rows, half of them images."""
    rng = random.Random(num_rows + num_seqs)
    tokens, edges, rows = [], [0], []
    for _ in range(num_seqs):
        budget = int(num_rows / num_seqs * rng.uniform(0.2, 1.8))
        images = budget // 2 // ROWS
        text = max(budget - images * ROWS, 1)
        sequence = [1] * text + [IMAGE] * images
        rng.shuffle(sequence)
        tokens += sequence
        rows += [ROWS] * images
        edges.append(len(tokens))
    return torch.tensor(tokens), torch.tensor(edges, dtype=torch.int32), torch.tensor(rows).long()


def main() -> int:
    options = bench.parser(__doc__).parse_args()
    header = "".join(f" cp {size} |" for size in CP_SIZES)
    print(f"| rows | sequences |{header}\n|---|---|{'---|' * len(CP_SIZES)}")
    results = []
    for num_rows, num_seqs in SHAPES:
        ids, cu_seqlens, rows = make_row(num_rows, num_seqs)
        cells = []
        for cp_size in CP_SIZES:
            multiples = mp.alignment(cp_size, TP_SIZE, sequence_parallel=True)
            layout = mp.PackedLayout.build(
                ids, cu_seqlens, rows, IMAGE, "collapsed", None, None, *multiples
            )
            real = int(layout.cu_seqlens_expanded[-1])
            waste = 1 - real / layout.num_expanded
            cells.append(f" {waste:.2%} |")
            results.append({"rows": real, "sequences": num_seqs, "cp_size": cp_size,
                            "tp_size": TP_SIZE, "padded_rows": layout.num_expanded,
                            "waste": waste})  # fmt: skip
        print(f"| {real:,} | {num_seqs} |{''.join(cells)}", flush=True)
    print(f"wrote {bench.save('padding_waste', results, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
