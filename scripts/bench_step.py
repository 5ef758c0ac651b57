"""A training step of a LLaVA on a packed row: who lays it out, and what packing is worth.

On a GPU the model has about 1.2 billion parameters (a CLIP tower of 24 layers, a GPT of 16) and
the rows 8 k and 32 k positions; elsewhere it is a toy that shows that the contenders agree. They
take turns, each on the same samples, and their losses are compared before anything is timed.
"""

import contextlib
import statistics
import sys
import time
from collections import defaultdict
from functools import partial

import bench
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from train_llava import padded, without_boundaries

import mcore_packing as mp
from mcore_packing.testing import tiny

LARGE = bench.HAVE_GPU
TOLERANCE = 2e-2 if LARGE else 1e-5  # of a loss per token, in bf16 or fp32
ROW_LENGTHS = (8_192, 32_768) if LARGE else (512,)
ROUNDS = 7
# Of the vision tower, whose activations for 70 tiles would take half of the memory.
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform",
             "recompute_num_layers": 1}  # fmt: skip


def build_model(row_length: int):
    if not LARGE:
        return tiny.llava_model("rope", img_size=28, max_sequence_length=row_length,
                                drop_vision_class_token=True)  # fmt: skip
    return tiny.llava_model(
        "rope", language_layers=16, hidden_size=2048, max_sequence_length=row_length,
        vocab_size=32_768, drop_vision_class_token=True,
        language={"num_attention_heads": 32, "ffn_hidden_size": 8192, "init_method_std": 0.02},
        vision={"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, **RECOMPUTE},
    )  # fmt: skip


def make_row(model, row_length: int):
    """Samples of one or two tiles and some text, packed until a row is full; and its packer.

    Every image stands inside a sample: Megatron's own expansion of a row would drop the last label
    of a sample that another one follows with an image.
    """
    side = model.vision_model.img_h
    draw = torch.Generator().manual_seed(0)
    samples = []
    for i in range(8 + row_length // (model.img_seq_len + 8)):
        length = int(torch.randint(24, 400 if LARGE else 60, (), generator=draw))
        ids = torch.randint(1, tiny.VOCAB_SIZE, (length,), generator=draw)
        ids[3] = tiny.IMAGE_TOKEN_ID
        images = torch.randn(1 + i % 2, 3, side, side, generator=draw)
        labels = torch.where(ids < 0, -100, ids)
        samples.append({"input_ids": ids, "labels": labels, "images": images,
                        "num_image_tiles": [len(images)]})  # fmt: skip
    packer = mp.data.get_packer("first_fit", mp.row_spec(model), row_length)
    rows, _ = packer.pack(samples)
    return rows[0].to(tiny.DEVICE, tiny.DTYPE), packer


def contenders(row, packer) -> dict:
    """By name: keywords of ``install`` (None without the hook), and the micro-batches of a step."""
    given, layout = row.inputs(), row.layout
    to_map = {**given, "packed_seq_params": thd(layout.cu_seqlens_collapsed)}
    by_hand = {**given, "packed_seq_params": thd(layout.cu_seqlens_padded)}
    alone = [without_boundaries(packer.join([sample]).to(tiny.DEVICE, tiny.DTYPE))
             for sample in mp.data.split(row)]  # fmt: skip
    return {
        "mcore_packing, layout from the data path": ({}, [given]),
        "mcore_packing, laid out in the model": ({"space": "collapsed"}, [to_map]),
        "Megatron, boundaries by hand": (None, [by_hand]),
        "Megatron, padded batch": (None, [padded(alone)]),
        "Megatron, one by one": (None, alone),
    }


def thd(cu_seqlens) -> PackedSeqParams:
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, longest, longest)


def step(model, batches: list[dict]) -> torch.Tensor:
    """Forward and backward of all micro-batches; the summed loss and the number of tokens."""
    model.zero_grad(set_to_none=True)
    sums = torch.zeros(2, device=tiny.DEVICE)
    for inputs in batches:
        loss, mask = model(**inputs)
        total = (loss.float() * mask).sum()
        total.backward()
        sums += torch.stack([total.detach(), mask.sum()])
    return sums


class Watch:
    """Times between the end of the vision projection and the first layer of the language model."""

    def __init__(self, model):
        self.marks = []
        first = model.language_model.decoder.layers[0]
        self.hooks = [
            model.vision_projection.register_forward_hook(lambda *_: self.marks.append(mark())),
            first.register_forward_pre_hook(lambda *_: self.marks.append(mark())),
        ]

    def milliseconds(self) -> float:
        """Of all micro-batches since the last call."""
        marks, self.marks = self.marks, []
        return sum(between(begin, end) for begin, end in zip(marks[::2], marks[1::2], strict=True))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def mark():
    """Now: on a GPU when its work until here is done."""
    if not bench.HAVE_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin, end) -> float:
    return begin.elapsed_time(end) if bench.HAVE_GPU else (end - begin) * 1e3


def synchronize() -> None:
    if bench.HAVE_GPU:
        torch.cuda.synchronize()


@contextlib.contextmanager
def hooked(model, keywords):
    """The model as this contender has it."""
    with contextlib.ExitStack() as stack:
        if keywords is not None:
            stack.enter_context(mp.install(model, **keywords))
        watch = Watch(model)
        stack.callback(watch.remove)
        yield watch


def time_all(model, runs: dict) -> dict:
    """Milliseconds a step, until the host is done with it, and from the vision tower to the first
    layer; contenders take turns."""
    times = {name: defaultdict(list) for name in runs}
    for turn in range(ROUNDS + 1):
        for name, (keywords, batches) in runs.items():
            with hooked(model, keywords) as watch:
                synchronize()
                begin = time.perf_counter()
                step(model, batches)
                host = time.perf_counter() - begin
                synchronize()
                whole = time.perf_counter() - begin
            if turn:  # the first compiles and allocates
                times[name]["step"].append(whole * 1e3)
                times[name]["host"].append(host * 1e3)
                times[name]["expansion"].append(watch.milliseconds())
    return times


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--smallest", action="store_true", help="the shortest row alone")
    options = parser.parse_args()
    rows = []
    with tiny.megatron():
        for row_length in ROW_LENGTHS[:1] if options.smallest else ROW_LENGTHS:
            model = build_model(row_length)
            row, packer = make_row(model, row_length)
            runs, num_samples = contenders(row, packer), len(row.indices)
            check(model, runs)
            billions = sum(p.numel() for p in model.parameters()) / 1e9
            print(f"{row_length} positions, {num_samples} samples, {billions:.3f} B parameters, "
                  f"{tiny.attention_name()}", flush=True)  # fmt: skip
            peaks = {}
            for name, (keywords, batches) in runs.items():
                with hooked(model, keywords):
                    peaks[name] = bench.peak_bytes(partial(step, model, batches))
            for name, taken in time_all(model, runs).items():
                found = {what: statistics.median(values) for what, values in taken.items()}
                rows.append({
                    "name": name, "tokens": row_length, "samples": num_samples,
                    "parameters": billions, **{f"{what}_ms": ms for what, ms in found.items()},
                    "spread_ms": [min(taken["step"]), max(taken["step"])],
                    "samples_per_second": num_samples / found["step"] * 1e3,
                    "peak_gib": peaks[name] / 2**30,
                })  # fmt: skip
                last = rows[-1]
                print(f"  {name:42} {found['step']:9.1f} ms a step, host {found['host']:8.1f}, "
                      f"vision to first layer {found['expansion']:7.2f}, "
                      f"{last['samples_per_second']:7.1f} samples/s, "
                      f"{last['peak_gib']:6.2f} GiB", flush=True)  # fmt: skip
    print(f"wrote {bench.save('bench_step', rows, options)}")
    return 0


def check(model, runs: dict) -> None:
    """Every contender trains the same tokens to the same loss, or nothing is timed."""
    losses = {}
    for name, (keywords, batches) in runs.items():
        with hooked(model, keywords):
            total, tokens = step(model, batches).tolist()
        losses[name] = total / tokens, tokens
    loss, tokens = losses["Megatron, one by one"]
    for name, (found, count) in losses.items():
        if count != tokens or abs(found - loss) > TOLERANCE * loss:
            raise SystemExit(
                f"{name}: {found} over {count} tokens, one by one {loss} over {tokens}"
            )


if __name__ == "__main__":
    sys.exit(main())
