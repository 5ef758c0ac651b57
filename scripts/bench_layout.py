"""Building a layout, against the plain torch composition of the same boundaries.

On a GPU the layout is timed as a CUDA graph, which leaves the host's share out; that is the column
``host``. The composition reads values, so it cannot be captured. Speed is measured and said, not
asserted.
"""

import random
import sys

import bench
import torch

from mcore_packing import PackedLayout, RowSpec

IMAGE = -200
SPEC = RowSpec(image_token_id=IMAGE)
TOKENS_PER_TILE = 576


def make_row(num_tokens: int, num_seqs: int, device: str):
    """A row with an image every 170 tokens or so."""
    rng = random.Random(num_tokens * 31 + num_seqs)
    ids = torch.randint(1, 30_000, (num_tokens,), generator=torch.Generator().manual_seed(0))
    ids[rng.sample(range(num_tokens), max(num_tokens // 170, 1))] = IMAGE
    edges = sorted(rng.sample(range(1, num_tokens), num_seqs - 1))
    cu_seqlens = torch.tensor([0, *edges, num_tokens], dtype=torch.int32)
    tiles = [rng.randint(1, 3) for _ in range(int((ids == IMAGE).sum()))]
    counts = torch.tensor(tiles, dtype=torch.int32) * TOKENS_PER_TILE
    return ids.to(device), cu_seqlens.to(device), counts.to(device), int(counts.sum())


def compose(ids, cu_seqlens, counts):
    """Masks, cumsum, gather: starts of tokens, prefix sums of image embeddings, and boundaries."""
    expansion = torch.ones_like(ids)
    expansion[ids == IMAGE] = counts.long()
    start = torch.cat([expansion.new_zeros(1), expansion.cumsum(0)]).int()
    cu_image_embeddings = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    expanded = start[cu_seqlens.long()]
    padded = torch.cat([expanded, start[-1:]])
    return start, cu_image_embeddings, expanded, padded, int(expanded.diff().max())


def main() -> int:
    options = bench.parser(__doc__, budget=0.5).parse_args()
    print(f"{'tokens':>9} {'seqs':>6} {'layout':>10} {'composed':>10} {'ratio':>6} {'host':>9}  us")
    measured = []
    sizes = (1_024, 4_096, 8_192, 32_768, 131_072, 1_048_576)
    for num_tokens in sizes[:1] if options.smallest else sizes:
        for num_seqs in (1, 64, 4_096):
            if num_seqs > num_tokens // 2:
                continue
            ids, cu_seqlens, counts, total = make_row(num_tokens, num_seqs, bench.DEVICE)

            def ours(ids=ids, cu=cu_seqlens, counts=counts, total=total):
                return PackedLayout.build(
                    ids, cu, counts, SPEC, space="collapsed", num_image_embeddings=total
                )

            def plain(ids=ids, cu=cu_seqlens, counts=counts):
                return compose(ids, cu, counts)

            layout, expected = ours(), plain()
            layout.check()
            assert torch.equal(layout.expanded_start, expected[0])
            assert torch.equal(layout.cu_image_embeddings, expected[1])
            assert torch.equal(layout.cu_seqlens_expanded, expected[2])
            assert torch.equal(layout.cu_seqlens_padded[: num_seqs + 2], expected[3])
            found = bench.measure_captured([ours], options.budget)
            composed = bench.measure(plain, options.budget)
            one = {"tokens": num_tokens, "sequences": num_seqs, "images": counts.numel(),
                   "layout": found, "composition": composed,
                   "ratio": composed["median_us"] / found["median_us"],
                   "host_us": bench.host_time(ours)}  # fmt: skip
            measured.append(one)
            print(f"{num_tokens:9} {num_seqs:6} {found['median_us']:10.1f} "
                  f"{composed['median_us']:10.1f} {one['ratio']:6.2f} {one['host_us']:9.1f}",
                  flush=True)  # fmt: skip
        path = bench.save("bench_layout", measured, options)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
