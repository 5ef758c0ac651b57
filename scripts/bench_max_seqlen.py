"""What an exact ``max_seqlen`` is worth: RoPE and attention of a packed row, by what they are told.

64 sequences of at most 1,024 in a row of 32,768, told their longest (which the hook reads before
the language model) or a bound, the row's length and more. Transformer Engine's fused RoPE launches
a grid of that size; without it, and elsewhere than on a GPU, Megatron's unfused RoPE is timed.
"""

import random
import sys

import bench
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from mcore_packing.testing import tiny

LARGE = bench.LARGE
LENGTH, SEQUENCES, LONGEST, BOUND = (32_768, 64, 1_024, 33_792) if LARGE else (2_048, 8, 512, 4_096)
# Atomics, in bf16.
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2} if bench.HAVE_GPU else {"rtol": 0, "atol": 0}
HEADS, HEAD_DIM = (32, 128) if LARGE else (4, 16)


def boundaries() -> torch.Tensor:
    """int32 ``[SEQUENCES + 1]``: one of the longest, the others such that the row is full."""
    draw, lengths = random.Random(0), [LENGTH // SEQUENCES] * SEQUENCES
    for _ in range(20 * SEQUENCES):
        giver, taker = draw.sample(range(1, SEQUENCES), 2)
        moved = draw.randint(0, min(lengths[giver] - 1, LONGEST - lengths[taker]))
        lengths[giver], lengths[taker] = lengths[giver] - moved, lengths[taker] + moved
    missing = LONGEST - lengths[0]
    for seq in range(1, SEQUENCES):
        moved = min(missing, lengths[seq] - 1)
        lengths[0], lengths[seq], missing = (
            lengths[0] + moved,
            lengths[seq] - moved,
            missing - moved,
        )
    starts = torch.tensor([0, *lengths]).cumsum(0)
    assert max(lengths) == LONGEST and starts[-1] == LENGTH
    return starts.int().to(tiny.DEVICE)


def rope(config, cu_seqlens, heads, longest: int):
    """Forward and backward of RoPE, told the longest sequence."""
    make = RotaryEmbedding(HEAD_DIM, rotary_percent=1.0, use_cpu_initialization=not bench.HAVE_GPU)
    angles = make(longest).to(heads.device)

    def run():
        turned = apply_rotary_pos_emb(heads, angles, config, cu_seqlens=cu_seqlens)
        return turned.detach(), *torch.autograd.grad(turned, heads, heads.detach())

    return run


def attention(core, cu_seqlens, heads, longest: int):
    """Forward and backward of the model's attention."""
    params = PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, longest, longest)

    def run():
        out = core(
            heads, heads, heads, attention_mask=None, attn_mask_type=AttnMaskType.padding_causal,
            packed_seq_params=params,
        )  # fmt: skip
        return out.detach(), *torch.autograd.grad(out, heads, torch.ones_like(out))

    return run


def measure(name: str, runs: dict, budget: float) -> dict[str, dict]:
    """Fused RoPE as replays of a CUDA graph; attention forks a generator, which none may do."""
    if name == "RoPE, fused":
        return {told: bench.measure_captured([run], budget) for told, run in runs.items()}
    return bench.measure_all(runs, budget)


def main() -> int:
    options = bench.parser(__doc__, budget=1.0).parse_args()
    measured = []
    with tiny.megatron():
        language = {"num_attention_heads": HEADS, "kv_channels": HEAD_DIM,
                    "apply_rope_fusion": tiny.HAVE_TE}  # fmt: skip
        model = tiny.llava_model("rope", img_size=28, language_layers=1, language=language)
        layer = model.language_model.decoder.layers[0].self_attention
        cu_seqlens = boundaries()
        draw = torch.Generator().manual_seed(0)
        values = torch.randn(LENGTH, HEADS, HEAD_DIM, generator=draw)
        values = values.to(tiny.DEVICE, tiny.DTYPE).requires_grad_()
        fused = "fused" if tiny.HAVE_TE else "unfused"
        contenders = {
            f"RoPE, {fused}": lambda n: rope(model.config, cu_seqlens, values, n),
            f"attention, {tiny.attention_name()}": lambda n: attention(
                layer.core_attention, cu_seqlens, values, n
            ),
        }
        for name, make in contenders.items():
            exact, bound = make(LONGEST), make(BOUND)
            for one, other in zip(exact(), bound(), strict=True):
                torch.testing.assert_close(one, other, **TOLERANCE)
            found = measure(name, {"exact": exact, "bound": bound}, options.budget)
            ratio = found["bound"]["median_us"] / found["exact"]["median_us"]
            case = {"positions": LENGTH, "sequences": SEQUENCES, "longest": LONGEST, "bound": BOUND}
            measured.append({"name": name, **case, **found, "ratio": ratio})
            exact_us, bound_us = (found[what]["median_us"] for what in ("exact", "bound"))
            print(f"{name:38} told {LONGEST}: {exact_us:9.1f} us, told {BOUND}: {bound_us:9.1f} us,"
                  f" {ratio:5.2f} times", flush=True)  # fmt: skip
    print(f"wrote {bench.save('bench_max_seqlen', measured, options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
