"""Expansion of a packed row, against Megatron's own step, two common ways, and a plain copy.

Every contender, and its gradient, is checked against Megatron's real ``_preprocess_data`` first;
nothing wrong is timed. On a GPU what is ours, and the copy, are timed as replays of CUDA graphs, on
data that the L2 cache does not hold; the others wait for the host, or read what they replay.
"""

import logging
import operator
import sys
import warnings
from functools import partial

import bench
import torch

import mcore_packing as mp
from mcore_packing import PackedLayout, ops
from mcore_packing.expand import expand_tokens, source_positions
from mcore_packing.testing import tiny
from mcore_packing.testing.host_reads import HostReads

IMAGE = tiny.IMAGE_TOKEN_ID
TOKENS_PER_TILE = 576
CP_SIZE = 8
ALONE = "mcore_packing, the copy alone"


class Row:
    """One packed row: ``T`` tokens, images of 1 to 3 tiles of 576 embeddings, 4 sequences."""

    def __init__(self, num_tokens, num_images, hidden_size, dtype):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 30_000, (num_tokens,), generator=generator)
        spots = torch.randperm(num_tokens - 2, generator=generator)[:num_images] + 1
        self.ids[spots] = IMAGE
        self.tiles = torch.arange(num_images) % 3 + 1
        quarter = num_tokens // 4
        edges = [0, quarter, 2 * quarter, 3 * quarter, num_tokens]
        self.ids[edges[1:-1]] = 5  # no sequence begins with an image: Megatron is right here
        self.ids[edges[1] - 1] = 5
        self.tiles = self.tiles[: int((self.ids == IMAGE).sum())].int()
        self.cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        self.labels = torch.cat([self.ids[1:], self.ids[:1]])
        self.loss_mask = torch.ones(num_tokens)
        self.num_tiles = int(self.tiles.sum())
        self.counts = self.tiles * TOKENS_PER_TILE
        self.num_image_embeddings = int(self.counts.sum())
        self.length = num_tokens - len(self.tiles) + self.num_image_embeddings
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(bench.DEVICE))
        shapes = (num_tokens, hidden_size), (TOKENS_PER_TILE, self.num_tiles, hidden_size)
        torch.manual_seed(0)
        # Embeddings of which each set is the row's own; drawn where they are used.
        self.sets = [
            tuple(
                torch.randn(shape, device=bench.DEVICE, dtype=dtype).requires_grad_()
                for shape in shapes
            )
            for _ in range(bench.num_sets(2 * self.length * hidden_size * dtype.itemsize))
        ]
        self.text, self.images = self.sets[0]

    def build(self, **fields):
        spec = mp.RowSpec(image_token_id=IMAGE, **fields)
        return PackedLayout.build(
            self.ids, self.cu_seqlens, self.counts, spec, space="collapsed",
            num_image_embeddings=self.num_image_embeddings,
        )  # fmt: skip


def contenders(model, row, few):
    """``{name: function}`` of text and images; each gives embeddings, and labels where it makes
    them. ``few``: Megatron and ours alone."""
    layout = row.build()

    def megatron(text, images):
        outputs = model._preprocess_data(
            images, text[None], row.ids[None], row.loss_mask[None], row.labels[None],
            False, None, IMAGE, row.tiles,
        )  # fmt: skip
        return outputs[0][:, 0], outputs[1][0], outputs[2][0]

    def ours(text, images):
        layout = row.build()
        labels, loss_mask = mp.expand_labels(layout, row.labels, row.loss_mask)
        return mp.expand_embeddings(layout, text, images), labels, loss_mask

    found = {
        "megatron": megatron,
        "mcore_packing": ours,
        "mcore_packing, layout known": lambda text, images: (
            mp.expand_embeddings(layout, text, images),
        ),
    }
    return found if few else found | others(row, layout)


def others(row, layout) -> dict:
    """Two common ways, one of them compiled too."""
    source = expand_tokens(layout).source.long()
    index = torch.where(source >= 0, source, row.ids.numel() - 2 - source)
    is_image = (source < 0)[:, None]
    token_ids = torch.where(source >= 0, source, 0)

    def gather(text, images):
        vectors = images.permute(1, 0, 2).reshape(-1, images.shape[2])
        return torch.cat([text, vectors]).index_select(0, index)

    def masked_scatter(text, images):
        embeddings = text.index_select(0, token_ids)
        vectors = images.permute(1, 0, 2).reshape(-1, images.shape[2])
        return (embeddings.masked_scatter(is_image, vectors),)

    compiled = torch.compile(gather, fullgraph=True)
    return {
        "masked_scatter": masked_scatter,
        "index_select": lambda text, images: (gather(text, images),),
        "index_select, compiled": lambda text, images: (compiled(text, images),),
    }


def copies(row):
    """Copies of as many bytes, with the default allocator, of a set of data each."""
    shape, dtype = (row.length, row.text.shape[1]), row.text.dtype
    for _ in row.sets:
        vectors = torch.randn(shape, device=bench.DEVICE, dtype=dtype)
        yield lambda vectors=vectors: torch.empty_like(vectors).copy_(vectors)


def ops_alone(row, y):
    """The copy kernel forward and backward, on each set of data: nothing else is launched."""
    layout = row.build()
    source = expand_tokens(layout).source
    positions = source_positions(layout, row.num_image_embeddings)
    sets = [tuple(x.detach() for x in pair) for pair in row.sets]
    # As many gradients: what they are does not matter, where they lie does.
    grads = [y, *(torch.randn_like(y) for _ in sets[1:])]
    forward = [lambda pair=pair: ops.expand_embeddings(*pair, source, *positions) for pair in sets]
    backward = [
        lambda grad=grad: (
            ops.collect_gradients(grad, positions.text, row.ids.numel(), 1),
            ops.collect_gradients(grad, positions.images, *row.images.shape[:2]),
        )
        for grad in grads
    ]
    return forward, backward


def count_synchronisations(name, function):
    """On a GPU as CUDA counts them; on a CPU the calls that would be, where that can be told."""
    if not bench.HAVE_GPU:
        if name.startswith("mcore_packing") or name.endswith("compiled"):
            return None  # on a CPU ours may look, and what is compiled cannot be watched
        with HostReads() as reads:
            function()
        return len(reads.found)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        function()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


def check_same(found, expected) -> None:
    """Bitwise, and fast where they are."""
    for mine, wanted in zip(found, expected, strict=False):
        if not torch.equal(mine, wanted):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


def bench_case(model, case, budget, few=False):
    row = Row(**case)
    runs = contenders(model, row, few)
    y = torch.randn(row.length, row.text.shape[1], device=bench.DEVICE, dtype=row.text.dtype)
    backwards, expected = {}, None  # Megatron's, which comes first
    for name, function in runs.items():
        outputs = function(row.text, row.images)

        def backward(output=outputs[0]):
            return torch.autograd.grad(output, (row.text, row.images), y, retain_graph=True)

        found = *backward(), *outputs
        expected = expected or found
        check_same(found, expected)
        backwards[name] = backward
    runs_forward, runs_backward = ops_alone(row, y)
    text, images = runs_backward[0]()
    check_same((text.squeeze(1), images, runs_forward[0]()), expected)
    del found, expected, outputs, text, images
    forward, backward = time_all(row, runs, backwards, budget)
    if bench.HAVE_GPU:  # elsewhere it is "layout known" again
        forward[ALONE] = bench.measure_captured(runs_forward, budget)
        backward[ALONE] = bench.measure_captured(runs_backward, budget)
    results = []
    for name in [*runs, ALONE] if bench.HAVE_GPU else runs:
        run = partial(runs[name], row.text, row.images) if name in runs else runs_forward[0]
        result = {
            **{key: str(value) for key, value in case.items()},
            "positions": row.length,
            "name": name,
            "forward": forward[name],
            "backward": backward[name],
            "copy": forward["copy"],
            "peak_over_output": bench.peak_bytes(run) / y.nbytes,
            "synchronisations": count_synchronisations(name, run),
        }
        for direction, times in (("forward", forward), ("backward", backward)):
            part = times["copy"]["median_us"] / times[name]["median_us"]
            result[f"{direction}_over_copy_ceiling"] = part
        results.append(result)
    slowest = results[0]["forward"]["median_us"]
    for result in results:
        result["times_megatron"] = slowest / result["forward"]["median_us"]
    return results


def time_all(row, runs, backwards, budget):
    """``{name: times}`` forward and backward, "copy" among them. On a CPU all take turns; on a GPU
    what is ours is captured, forward, and the copy."""
    plain = list(copies(row))
    if not bench.HAVE_GPU:
        copy = {"copy": plain[0]}
        forward = {name: lambda run=run: run(row.text, row.images) for name, run in runs.items()}
        return (
            bench.measure_all({**forward, **copy}, budget),
            bench.measure_all({**backwards, **copy}, budget),
        )
    forward = {"copy": bench.measure_captured(plain, budget)}
    for name, run in runs.items():
        if name.startswith("mcore_packing"):
            calls = [lambda pair=pair, run=run: run(*pair) for pair in row.sets]
            forward[name] = bench.measure_captured(calls, budget)
        else:
            forward[name] = bench.measure(lambda run=run: run(row.text, row.images), budget)
    backward = bench.measure_all(backwards, budget) | {"copy": forward["copy"]}
    return forward, backward


def bench_ranks(case, budget):
    """One context-parallel rank's share against the whole row: time, with and without the maps that
    are made once per row, and the most memory held."""
    row = Row(**case)
    multiples = {"seq_multiple": 2 * CP_SIZE, "total_multiple": 2 * CP_SIZE}
    layout = row.build(**multiples)

    def expand(layout, rank):
        return mp.expand_embeddings(layout, row.text, row.images, **rank)

    result = {**{key: str(value) for key, value in case.items()}, "name": f"one of {CP_SIZE} ranks"}
    with torch.no_grad():
        whole = expand(layout, {})
        for rank in range(CP_SIZE):
            order = mp.cp_partition(layout.cu_seqlens_padded, layout.num_expanded, CP_SIZE, rank)
            part = expand(layout, {"cp_size": CP_SIZE, "cp_rank": rank})
            torch.testing.assert_close(part, whole[order], rtol=0, atol=0)
    # One after the other: no rank ever takes turns with a whole row.
    for name, rank in (("whole", {}), ("share", {"cp_size": CP_SIZE, "cp_rank": 3})):
        expand(layout, rank)
        with torch.no_grad():
            result[name] = bench.measure_captured([lambda rank=rank: expand(layout, rank)], budget)
            result[f"{name}_bytes"] = bench.peak_bytes(lambda rank=rank: expand(layout, rank))
        result[f"{name}_with_maps"] = bench.measure_captured(
            [lambda rank=rank: expand(row.build(**multiples), rank)], budget
        )
    for name in ("", "_with_maps"):
        times = (result[key + name]["median_us"] for key in ("share", "whole"))
        result[f"time_over_whole{name}"] = operator.truediv(*times)
    result["bytes_over_whole"] = result["share_bytes"] / whole.nbytes
    result["index_over_whole"] = 2 * layout.num_expanded * 4 / whole.nbytes
    return result


def draw(measured, path):
    try:
        import matplotlib
    except ImportError:
        return print("the plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    width = measured[0]["hidden_size"]
    measured = sorted(
        (one for one in measured if one["hidden_size"] == width), key=lambda one: one["positions"]
    )
    for name in dict.fromkeys(one["name"] for one in measured):
        mine = [one for one in measured if one["name"] == name]
        x = [one["positions"] for one in mine]
        y = [one["forward"]["median_us"] / 1e3 for one in mine]
        axis.plot(x, y, marker="o", label=name, linewidth=3 if name == "mcore_packing" else 1.5)
    copy = {one["positions"]: one["copy"]["median_us"] / 1e3 for one in measured}
    axis.plot(list(copy), list(copy.values()), "k--", label="a plain copy of the same bytes")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(list(copy), [f"{size:,}" for size in copy])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("positions")
    axis.set_ylabel("milliseconds, forward")
    kind = f"{measured[0]['dtype'].removeprefix('torch.')}, H = {width}"
    axis.set_title(f"Expanding one packed row ({bench.device_name().upper()}, {kind})", loc="left")
    axis.grid(True, color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def cases():
    """``T`` and images, the contenders' case first; on a GPU up to 128 k positions, H = 8192."""
    if bench.LARGE:
        sizes, dtype = [(4096, 25), (512, 3), (16_384, 100)], torch.bfloat16
        shapes = [(*size, 4096) for size in sizes] + [(*size, 8192) for size in sizes[::2]]
    else:
        sizes, dtype = [(512, 3), (1024, 6), (2048, 12), (4096, 24)], torch.float32
        shapes = [(*size, 1024) for size in sizes]
    names = "num_tokens", "num_images", "hidden_size"
    for shape in shapes:
        yield dict(zip(names, shape, strict=True)) | {"dtype": dtype}


def failures(measured, ranks):
    """The targets, at the largest size. On a GPU speed is measured and said, not asserted."""
    largest = [one for one in measured if one["num_tokens"] == "4096"]
    for one in largest:
        if one["name"] == "mcore_packing":
            if not bench.HAVE_GPU and one["times_megatron"] < 1.5:
                yield f"{one['times_megatron']:.1f} times Megatron, target 1.5 on a CPU"
            if bench.HAVE_GPU and one["synchronisations"]:
                yield f"{one['synchronisations']} host synchronisations"
            if one["peak_over_output"] > 1.05:
                yield f"{one['peak_over_output']:.3f} outputs of memory at the peak, target 1.05"
    for one in ranks:
        targets = {"bytes_over_whole": 1 / CP_SIZE + one["index_over_whole"]}
        if not bench.HAVE_GPU:
            targets["time_over_whole"] = 1.3 / CP_SIZE
        for key, target in targets.items():
            if one[key] > target:
                yield f"a rank's {key} is {one[key]:.3f}, target {target:.3f}"


def line_of(one: dict) -> str:
    forward, backward, copy = (
        one[key]["median_us"] / 1e3 for key in ("forward", "backward", "copy")
    )
    peak, syncs = (
        "-" if one[key] is None else f"{one[key]:.3g}"
        for key in ("peak_over_output", "synchronisations")
    )
    return (
        f"{one['name']:30} {one['positions']:6} {one['hidden_size']:>5} {forward:9.3f} "
        f"{backward:9.3f} {copy:9.3f} {one['times_megatron']:10.2f} "
        f"{one['forward_over_copy_ceiling']:8.0%} {one['backward_over_copy_ceiling']:5.0%} "
        f"{peak:>5} {syncs:>5}"
    )


def profile() -> None:
    """The copy kernel three times each way, for a profiler to look at."""
    row = Row(**next(cases()))
    y = torch.randn(row.length, row.text.shape[1], device=bench.DEVICE, dtype=row.text.dtype)
    for functions in ops_alone(row, y):
        for _ in range(3):
            functions[0]()
    print(f"{row.length} positions of {row.text.shape[1]} {row.text.dtype}")


def main() -> int:
    parser = bench.parser(__doc__, budget=1.0)
    parser.add_argument("--profile", action="store_true", help="run the copy alone, for ncu")
    options = parser.parse_args()
    if options.profile:
        profile()
        return 0
    logging.disable(logging.WARNING)
    measured, ranks = [], []
    print(f"{'name':30} {'length':>6} {'H':>5} {'forward':>9} {'backward':>9} {'copy':>9} "
          f"{'x Megatron':>10} {'of copy':>8} {'back':>5} {'peak':>5} {'syncs':>5} ms")  # fmt: skip
    with tiny.megatron():
        model = tiny.llava_model(drop_vision_class_token=True, max_sequence_length=1 << 20)
    assert model.img_seq_len == TOKENS_PER_TILE
    wanted = list(cases())[: 1 if options.smallest else None]
    for index, case in enumerate(wanted):
        for one in bench_case(model, case, options.budget, few=bench.LARGE and index > 0):
            measured.append(one)
            print(line_of(one), flush=True)
        path = bench.save("bench_expand", measured, options, ranks=ranks)
    for case in wanted[-1:]:
        one = bench_ranks(case, options.budget)
        ranks.append(one)
        print(f"{one['name']}: {one['time_over_whole']:.3f} of the time of the whole row "
              f"({one['time_over_whole_with_maps']:.3f} with the maps that are made once per row), "
              f"{one['bytes_over_whole']:.3f} of its bytes")  # fmt: skip
    path = bench.save("bench_expand", measured, options, ranks=ranks)
    draw(measured, path.with_suffix(".png"))
    print(f"wrote {path}")
    failed = [] if options.smallest else list(failures(measured, ranks))
    for failure in failed:
        print(f"FAILED: {failure}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
