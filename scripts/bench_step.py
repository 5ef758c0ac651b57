"""A training step of a LLaVA on a packed row: who lays it out, and what packing is worth.

On a GPU the model has about 1.2 billion parameters (a CLIP tower of 24 layers, a GPT of 16) and
the rows 8 k and 32 k positions; elsewhere it is a toy that shows that the contenders agree. They
take turns, each on the same samples, and their losses are compared before anything is timed: one
that is wrong or runs out of memory is said to, and left out.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections import defaultdict

import bench
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from train_llava import padded, without_boundaries

import mcore_packing as mp
from mcore_packing.testing import tiny

TOLERANCE = 2e-2 if bench.HAVE_GPU else 1e-5  # of a loss per token, in bf16 or fp32
ROUNDS = {8_192: 6, 32_768: 4} if bench.LARGE else {512: 7}  # by the length of the row
# Of text: few, because cuDNN builds a graph for every new shape, 40 to 400 ms each.
TEXT_LENGTHS = (40, 120, 240, 400) if bench.LARGE else (24, 36, 48, 60)
ALONE = "Megatron, one by one"
WRONG = "wrong: "
# Of the vision tower, whose activations for 70 tiles would take half of the memory.
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform",
             "recompute_num_layers": 1}  # fmt: skip


def build_model():
    """For rows of every length."""
    # Megatron's unfused thd RoPE reads the boundaries at every call, and hides what else waits.
    language, vision = {"apply_rope_fusion": tiny.HAVE_TE}, RECOMPUTE if bench.HAVE_GPU else {}
    shared = {"max_sequence_length": max(ROUNDS), "drop_vision_class_token": True,
              "initialize_on_gpu": bench.HAVE_GPU}  # fmt: skip
    if not bench.LARGE:
        return tiny.llava_model("rope", img_size=28, language=language, vision=vision, **shared)
    language |= {"num_attention_heads": 32, "ffn_hidden_size": 8192, "init_method_std": 0.02}
    tower = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
    return tiny.llava_model(
        "rope", language_layers=16, hidden_size=2048, vocab_size=32_768,
        language=language, vision={**tower, **vision}, **shared,
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
        length = TEXT_LENGTHS[int(torch.randint(len(TEXT_LENGTHS), (), generator=draw))]
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
        ALONE: (None, alone),
        "Megatron, padded batch": (None, [padded(alone)]),
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


def first_steps(model, runs: dict) -> tuple[dict, dict]:
    """The peak memory of a step of each, in GiB, and why others are not timed.

    They compile, allocate, and must train the same tokens to the same loss.
    """
    losses, peaks, errors = {}, {}, {}
    for name, (keywords, batches) in runs.items():
        found = first_step(model, keywords, batches)
        if found is None:
            errors[name] = "out of memory"
            continue
        total, tokens, peaks[name] = found
        losses[name] = total / tokens, tokens
    loss, tokens = losses[ALONE]
    for name, (found, count) in losses.items():
        if not (count == tokens and abs(found - loss) <= TOLERANCE * loss):
            errors[name] = f"{WRONG}{found} over {count} tokens, one by one {loss} over {tokens}"
            del peaks[name]
    return peaks, errors


def first_step(model, keywords, batches) -> tuple[float, float, float] | None:
    """Summed loss, number of tokens and peak memory; None where memory does not suffice."""
    try:
        with hooked(model, keywords):
            if bench.HAVE_GPU:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            sums = step(model, batches).tolist()
    except torch.OutOfMemoryError:
        sums = None
    if sums is None:  # outside, where the exception no longer holds what it ran with
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return None
    return *sums, torch.cuda.max_memory_allocated() / 2**30 if bench.HAVE_GPU else 0.0


def time_all(model, runs: dict, rounds: int) -> dict:
    """Milliseconds a step, until the host is done with it, and from the vision tower to the first
    layer; contenders take turns."""
    times = {name: defaultdict(list) for name in runs}
    for _ in range(rounds):
        for name, (keywords, batches) in runs.items():
            with hooked(model, keywords) as watch:
                synchronize()
                begin = time.perf_counter()
                step(model, batches)
                host = time.perf_counter() - begin
                synchronize()
                whole = time.perf_counter() - begin
            times[name]["step"].append(whole * 1e3)
            times[name]["host"].append(host * 1e3)
            times[name]["expansion"].append(watch.milliseconds())
    return times


def bench_row(model, row_length: int, rounds: int) -> list[dict]:
    """What each contender takes for one row."""
    row, packer = make_row(model, row_length)
    runs, num_samples = contenders(row, packer), len(row.indices)
    peaks, errors = first_steps(model, runs)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"{row_length} positions, {num_samples} samples, {billions:.3f} B parameters, "
          f"{tiny.attention_name()}", flush=True)  # fmt: skip
    case = {"positions": row_length, "samples": num_samples, "parameters": billions}
    measured = []
    for name, taken in time_all(model, {name: runs[name] for name in peaks}, rounds).items():
        found = {what: statistics.median(values) for what, values in taken.items()}
        measured.append({
            "name": name, **case, **{f"{what}_ms": ms for what, ms in found.items()},
            "spread_ms": [min(taken["step"]), max(taken["step"])],
            "samples_per_second": num_samples / found["step"] * 1e3,
            "peak_gib": peaks[name],
        })  # fmt: skip
        print(f"  {name:42} {found['step']:9.1f} ms a step, host {found['host']:8.1f}, "
              f"vision to first layer {found['expansion']:7.2f}, "
              f"{measured[-1]['samples_per_second']:7.1f} samples/s, {peaks[name]:6.2f} GiB",
              flush=True)  # fmt: skip
    for name, error in errors.items():
        measured.append({"name": name, **case, "error": error})
        print(f"  {name:42} {error}", flush=True)
    return measured


def main() -> int:
    options = bench.parser(__doc__).parse_args()
    measured = []
    with tiny.megatron():
        model = build_model()
        for row_length, rounds in list(ROUNDS.items())[: 1 if options.smallest else None]:
            measured += bench_row(model, row_length, 1 if options.smallest else rounds)
            path = bench.save("bench_step", measured, options)
    print(f"wrote {path}")
    return int(any(one.get("error", "").startswith(WRONG) for one in measured))


if __name__ == "__main__":
    sys.exit(main())
