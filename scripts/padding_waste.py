"""How much of a row is padding, against context-parallel size and sequences per row."""

import random
import sys

import bench
import torch

import mcore_packing as mp

IMAGE = -200
TOKENS_PER_IMAGE = 576
CP_SIZES = (1, 2, 4, 8, 16, 32, 64)
SHAPES = ((8_192, 4), (32_768, 16), (131_072, 64), (1_000_000, 64), (1_000_000, 512))
TP_SIZE = 8


def make_row(num_positions: int, num_seqs: int):
    """Sequences of random length that expand to about so many positions, half of them images."""
    rng = random.Random(num_positions + num_seqs)
    tokens, edges, counts = [], [0], []
    for _ in range(num_seqs):
        budget = int(num_positions / num_seqs * rng.uniform(0.2, 1.8))
        images = budget // 2 // TOKENS_PER_IMAGE
        text = max(budget - images * TOKENS_PER_IMAGE, 1)
        sequence = [1] * text + [IMAGE] * images
        rng.shuffle(sequence)
        tokens += sequence
        counts += [TOKENS_PER_IMAGE] * images
        edges.append(len(tokens))
    return torch.tensor(tokens), torch.tensor(edges, dtype=torch.int32), counts


def main() -> int:
    options = bench.parser(__doc__).parse_args()
    header = "".join(f" cp {size} |" for size in CP_SIZES)
    print(f"| positions | sequences |{header}\n|---|---|{'---|' * len(CP_SIZES)}")
    results = []
    for num_positions, num_seqs in SHAPES:
        ids, cu_seqlens, counts = make_row(num_positions, num_seqs)
        counts = torch.tensor(counts, dtype=torch.int64)
        cells = []
        for cp_size in CP_SIZES:
            seq_multiple, total_multiple = mp.alignment(cp_size, TP_SIZE, sequence_parallel=True)
            spec = mp.RowSpec(
                image_token_id=IMAGE, seq_multiple=seq_multiple, total_multiple=total_multiple
            )
            layout = mp.PackedLayout.build(ids, cu_seqlens, counts, spec, space="collapsed")
            real = int(layout.cu_seqlens_expanded[-1])
            waste = 1 - real / layout.num_expanded
            cells.append(f" {waste:.2%} |")
            results.append({"positions": real, "sequences": num_seqs, "cp_size": cp_size,
                            "tp_size": TP_SIZE, "padded_positions": layout.num_expanded,
                            "waste": waste})  # fmt: skip
        print(f"| {real:,} | {num_seqs} |{''.join(cells)}", flush=True)
    print(f"wrote {bench.save('padding_waste', results, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
