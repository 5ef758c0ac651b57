"""What packing costs one core, how full its rows are, and how evenly they spread attention."""

import random
import statistics
import sys
import time
from collections.abc import Callable

import bench
import torch

import mcore_packing as mp
from mcore_packing.testing.lengths import llava_mix

IMAGE_TOKENS = 576
BUFFER = 1_000  # what Energon packs at a time
NUM_BUFFERS = 20
SAMPLES_A_ROW = 16


def text(rng: random.Random, median: float, sigma: float) -> int:
    return max(16, int(median * rng.lognormvariate(0, sigma)))


def document(rng: random.Random, capacity: int) -> int:
    """A long tail, cut at the capacity."""
    return text(rng, 540, 1.3)


def bimodal(rng: random.Random, capacity: int) -> int:
    """Half of them text, half of them two to six images."""
    if rng.random() < 0.5:
        return text(rng, 180, 0.7)
    return rng.randint(2, 6) * IMAGE_TOKENS + text(rng, 245, 0.6)


def awkward(rng: random.Random, capacity: int) -> int:
    """Two thirds of them just longer than a third of a row, the others than a half."""
    a, b = (0.334, 0.36) if rng.random() < 2 / 3 else (0.501, 0.54)
    return int(capacity * rng.uniform(a, b))


def video(rng: random.Random, capacity: int) -> int:
    """One in twenty takes most of a row, the others are short."""
    if rng.random() < 0.05:
        return int(capacity * rng.uniform(0.55, 1))
    return text(rng, 245, 0.8)


MIXES = {"documents": document, "bimodal": bimodal, "awkward": awkward, "video": video}


def make_lengths(mix: str, count: int, capacity: int, seed: int = 0) -> list[int]:
    if mix == "llava":
        lengths = llava_mix(count, seed)
    else:
        rng = random.Random(seed)
        lengths = [MIXES[mix](rng, capacity) for _ in range(count)]
    return [min(length, capacity) for length in lengths]


def check(lengths: list[int], bins: list[list[int]], capacity: int) -> None:
    """Every sample in one bin, no bin too full."""
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in bin_) for bin_ in bins) <= capacity


def timed(function: Callable, repeats: int) -> tuple[list, float]:
    """What a call gives, and the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        result = function()
        seconds.append(time.process_time() - begin)
    return result, statistics.median(seconds)


def measure(buffers: list[list[int]], capacity: int, name: str, balance: bool, repeats: int):
    """Rows over all buffers, seconds for one."""
    packer = mp.data.get_packer(name, mp.RowSpec(), capacity, balance=balance)
    packed, seconds = timed(lambda: [packer.place(lengths) for lengths in buffers], repeats)
    costs = []
    for lengths, bins in zip(buffers, packed, strict=True):
        check(lengths, bins, capacity)
        costs += [float(sum(lengths[i] ** 2 for i in bin_)) for bin_ in bins]
    return {
        "algorithm": name,
        "balance": balance,
        "rows": len(costs),
        "fill": sum(map(sum, buffers)) / (len(costs) * capacity),
        "median_s": seconds / len(buffers),
        "attention_spread": statistics.pstdev(costs) / statistics.mean(costs),
    }


def compare(mix: str, capacity: int, buffers: list[list[int]], repeats: int) -> list[dict]:
    """Every algorithm, and the default one balanced; prints a row of the table."""
    bound = sum(-(-sum(lengths) // capacity) for lengths in buffers)
    found = [measure(buffers, capacity, name, False, repeats) for name in mp.data.ALGORITHMS]
    default = found[0]
    balanced = measure(buffers, capacity, default["algorithm"], True, repeats)
    cells = "".join(
        f" {one['rows']:,}, {one['fill']:.2%}, {one['median_s'] * 1e3:.3g} ms |" for one in found
    )
    print(
        f"| {mix} | {capacity:,} | {bound:,} |{cells} {balanced['rows']:,} "
        f"({balanced['rows'] / default['rows'] - 1:+.1%}), {balanced['median_s'] * 1e3:.3g} ms, "
        f"{default['attention_spread']:.0%} to {balanced['attention_spread']:.0%} |",
        flush=True,
    )
    case = {"mix": mix, "capacity": capacity, "samples": len(buffers[0]), "bound": bound}
    return [{**case, **one, "buffers": len(buffers)} for one in (*found, balanced)]


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


def measure_joining(num_rows: int) -> dict[str, dict]:
    """Microseconds a row: joined from its samples, which have labels, and only their copies."""
    samples = make_samples(llava_mix(num_rows * SAMPLES_A_ROW))
    for sample in samples:
        sample["labels"] = labels = sample["input_ids"].clone()
        labels[: len(labels) // 3] = -100
    join = mp.data.get_packer("fullest", mp.RowSpec(img_seq_len=IMAGE_TOKENS)).join

    def copy(row: list[dict]) -> None:
        for name in ("input_ids", "labels", "labels", "images"):  # labels are shifted besides
            torch.cat([sample[name] for sample in row if name in sample])

    seconds = {"join": [], "copy": []}
    for end in range(SAMPLES_A_ROW, len(samples) + 1, SAMPLES_A_ROW):
        row = samples[end - SAMPLES_A_ROW : end]
        for name, function in (("join", join), ("copy", copy)):
            begin = time.perf_counter()
            function(row)
            seconds[name].append((time.perf_counter() - begin) * 1e6)
    return {name: bench.summary(values) for name, values in seconds.items()}


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--capacities", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--mixes", nargs="+", default=["llava", *MIXES], choices=["llava", *MIXES])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = []
    sizes = ((options.samples, 1), (BUFFER, NUM_BUFFERS))
    for size, num_buffers in sizes:
        names = " | ".join(mp.data.ALGORITHMS)
        print(f"\nRows, fill and CPU time of {size:,} samples; {num_buffers} times, time for one")
        print(f"| mix | capacity | at least | {names} | balanced; spread of attention |")
        print(f"|{'---|' * (len(mp.data.ALGORITHMS) + 4)}")
        for mix in options.mixes:
            for capacity in options.capacities:
                seeds = range(num_buffers)
                buffers = [make_lengths(mix, size, capacity, seed) for seed in seeds]
                results += compare(mix, capacity, buffers, options.repeats)
    lengths = llava_mix(options.samples)
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
    joining = measure_joining(num_rows=1_000)
    beside = joining["join"]["median_us"] - joining["copy"]["median_us"]
    print(
        f"joining {SAMPLES_A_ROW} samples of the LLaVA mix takes {beside:.0f} us beside the "
        f"{joining['copy']['median_us']:.0f} us of copying their tokens, labels and images"
    )
    results.append({"pack_s": whole, "row_s": each, "samples": len(samples), **joining})
    print(f"wrote {bench.save('bench_pack', results, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
