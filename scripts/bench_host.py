"""What the hook costs the host in a forward, beside Megatron's own expansion.

Vision and language model are stubs. On a GPU each takes what it takes there, waits included.
Without one, kernels are launched on a GPU that is not there, and Megatron's expansion runs on a
small row on the CPU: some 100 small operations, each of which would be a launch. What waiting costs
is not in that: Megatron's expansion waits many times (docs/speed.md), the hook once, or not at all.
"""

import contextlib
import sys
import time
import warnings
from unittest.mock import patch

import bench
import torch
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing import layout as layouts
from mcore_packing.megatron import params as of_megatron
from mcore_packing.testing import tiny
from mcore_packing.testing.launches import launched_nowhere

SIZE, CALLS = 28, 300


def stub(model, num_tokens: int, num_tiles: int) -> None:
    """A ``LLaVAModel`` whose parts return at once, what forward makes of them included."""
    hidden = model.language_model.config.hidden_size
    there = {"device": tiny.DEVICE, "dtype": tiny.DTYPE}
    text = torch.zeros(num_tokens, 1, hidden, requires_grad=True, **there)
    images = torch.zeros(num_tiles, model.img_seq_len, hidden, **there)
    model.vision_model.forward = lambda *args, **kwargs: images
    model.vision_projection.forward = lambda hidden_states: hidden_states
    model.language_model.embedding.forward = lambda **kwargs: text
    model.language_model.forward = lambda **kwargs: kwargs["decoder_input"]


def make_calls(model, samples) -> tuple[dict, dict, dict]:
    """A row as it comes from ``mp.data``, from a data path with collapsed boundaries, and with
    those that Megatron's own expansion needs."""
    (row,), _ = mp.data.pack(samples, mp.row_spec(model))
    row = row.to(tiny.DEVICE, tiny.DTYPE)
    riding = row.inputs()

    def packed(edges, longest):
        return riding | {
            "packed_seq_params": PackedSeqParams("thd", edges, edges, None, None, longest, longest)
        }

    collapsed = row.layout.cu_seqlens_collapsed
    expanded = row.layout.cu_seqlens_expanded
    return (
        riding,
        packed(collapsed, int(collapsed.diff().max())),
        packed(expanded, row.layout.max_seqlen),
    )


def pretend(stack, model, riding, collapsed) -> None:
    """Until the stack closes: nobody looks at a value, and launches go nowhere, as on a GPU."""
    laid_out = mp.PackedLayout.build(
        riding["input_ids"], collapsed["packed_seq_params"].cu_seqlens_q,
        riding["num_image_tiles"] * model.img_seq_len, mp.row_spec(model), space="collapsed",
    )  # fmt: skip
    for room in (layouts, of_megatron):
        stack.enter_context(patch.object(room, "may_look", lambda tensor: False))
    stack.enter_context(launched_nowhere({"layout": laid_out.tensor}))
    # Without the mode in which Megatron finds no GPU: it makes every operation slower.
    stack.enter_context(torch._C.DisableTorchFunction())


def median_times(functions: dict, calls: int) -> dict[str, dict]:
    """Median, p20 and p80 in microseconds, of calls that take turns."""
    times = {name: [] for name in functions}
    for turn in range(calls + 20):
        for name, function in functions.items():
            if bench.HAVE_GPU:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if turn >= 20:
                times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: bench.summary(found) for name, found in times.items()}


def main() -> int:
    options = bench.parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tiny.megatron():
        samples = tiny.samples(6, img_size=SIZE)
        ours, plain = (tiny.llava_model("rope", img_size=SIZE) for _ in range(2))
        riding, collapsed, expanded = make_calls(ours, samples)
        num_tokens, num_tiles = riding["input_ids"].numel(), len(riding["images"])
        for model in (ours, plain):
            stub(model, num_tokens, num_tiles)
        mp.install(ours, space="collapsed")
        calls = {
            "riding": lambda: ours(**riding),
            "laid out in the model": lambda: ours(**collapsed),
            "Megatron's own": lambda: plain(**expanded),
        }
        with contextlib.ExitStack() as stack:
            if not bench.HAVE_GPU:
                pretend(stack, ours, riding, collapsed)
            found = median_times(calls, 10 if options.smallest else CALLS)
    print(f"a row of {num_tokens} tokens, {len(samples)} samples, {num_tiles} tiles")
    measured = [{"name": name, "forward": times} for name, times in found.items()]
    for one in measured:
        times = one["forward"]
        print(
            f"{one['name']:24}{times['median_us']:8.0f} us"
            f"  ({times['p20_us']:.0f} to {times['p80_us']:.0f})"
        )
    print(f"wrote {bench.save('bench_host', measured, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
