"""What packing costs one core, how full its rows are, and how evenly they spread attention."""

import statistics
import sys
import time

import bench
import torch

import mcore_packing as mp
from mcore_packing.testing.lengths import llava_mix

IMAGE_TOKENS = 576


def check(lengths: list[int], bins: list[list[int]], capacity: int) -> None:
    """Every sample in one bin, no bin too full."""
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in bin_) for bin_ in bins) <= capacity


def measure(name: str, lengths: list[int], capacity: int, repeats: int, **options) -> dict:
    packer = mp.data.get_packer(name, mp.RowSpec(), capacity, **options)
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        bins = packer.place(lengths)
        seconds.append(time.process_time() - begin)
    check(lengths, bins, capacity)
    costs = [float(sum(lengths[i] ** 2 for i in bin_)) for bin_ in bins]
    return {
        "algorithm": name,
        "capacity": capacity,
        **options,
        "samples": len(lengths),
        "rows": len(bins),
        "fill": sum(lengths) / (len(bins) * capacity),
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "attention_spread": statistics.pstdev(costs) / statistics.mean(costs),
    }


def make_samples(lengths: list[int]) -> list[dict]:
    """Samples of these lengths; pixels are shared, nobody looks at them."""
    pixels = torch.zeros(1, 3, 14, 14)
    samples = []
    for length in lengths:
        has_image = length > IMAGE_TOKENS + 8
        ids = torch.ones(length - (IMAGE_TOKENS - 1) * has_image, dtype=torch.int64)
        sample = {"input_ids": ids}
        if has_image:
            ids[4] = -200
            sample |= {"images": pixels, "num_image_tiles": torch.ones(1, dtype=torch.int32)}
        samples.append(sample)
    return samples


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--capacities", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    lengths = llava_mix(options.samples)
    print(
        f"{len(lengths):,} samples, {sum(lengths) / len(lengths):.0f} positions each on average\n"
    )
    print("| algorithm | capacity | CPU seconds | rows | fill | spread of attention | balanced |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for capacity in options.capacities:
        for name in mp.data.ALGORITHMS:
            plain = measure(name, lengths, capacity, options.repeats)
            balanced = measure(name, lengths, capacity, options.repeats, balance=True)
            results += [plain, balanced]
            print(
                f"| {name} | {capacity:,} | {plain['median_s']:.2f} | {plain['rows']:,} "
                f"| {plain['fill']:.3f} | {plain['attention_spread']:.1%} "
                f"| {balanced['attention_spread']:.1%}, {balanced['median_s']:.2f} s, "
                f"fill {balanced['fill']:.3f} |",
                flush=True,
            )
    samples = make_samples(lengths)
    begin = time.process_time()
    spec = mp.RowSpec(img_seq_len=IMAGE_TOKENS)
    rows, report = mp.data.pack(samples, spec, options.capacities[0])
    whole = time.process_time() - begin
    begin = time.process_time()
    some = [row for _, row in zip(range(500), rows, strict=False)]
    each = (time.process_time() - begin) / len(some)
    print(f"\nmp.data.pack looks at every sample's tensors: {whole:.2f} s\n{report}")
    print(f"a row is made in {each * 1e3:.2f} ms, when it is asked for")
    results.append({"pack_s": whole, "row_s": each, "samples": len(samples)})
    print(f"wrote {bench.save('bench_pack', results, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
