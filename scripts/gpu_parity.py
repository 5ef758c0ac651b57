"""Packed against one by one on this machine's attention, beside the noise of one by one itself.

A real ``LLaVAModel`` with learned positions, with RoPE and with fused RoPE; 1, 4 and 16 samples in
a row: log-probabilities and gradients, with the hook, with boundaries left collapsed, and dropped.
The noise is what the same samples differ by in one padded batch, where sums have other shapes. Then
isolation, and what attention and RoPE do with positions past the last boundary.
"""

import json
import logging
import sys
import traceback
from dataclasses import asdict, dataclass

import bench
import torch
from demo import attempt
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from train_llava import padded, without_boundaries

import mcore_packing as mp
from mcore_packing.testing import tiny

COUNTS = 1, 4, 16
SIZE = 336 if bench.LARGE else 28  # pixels: a tile becomes 577 positions, or 5
KINDS = {"learned_absolute": {}, "rope": {}, "rope, fused": {"apply_rope_fusion": True}}
FACTOR = 3  # times the noise: a kernel for packed rows rounds differently from one for batches
LEAST = 1e-6  # where there is no noise: fp32 on a CPU
HEADER = (
    f"{'positions':16} {'samples':>7}  {'run':10} {'token_mult_prob_error':>21} "
    f"{'largest':>9} {'gradients':>9} {'worst parameter':>15}"
)


@dataclass
class Run:
    """What one way to run samples gave.

    Attributes:
        logprobs: fp32 ``[positions]`` of all samples, one after the other.
        mask: fp32 ``[positions]``, the loss mask.
        gradients: fp32, by the name of the parameter, of the summed loss.
    """

    logprobs: Tensor
    mask: Tensor
    gradients: dict[str, Tensor]


@dataclass
class Difference:
    """How far a run is from the samples one by one.

    Attributes:
        token_mult_prob_error: over the tokens that both train; 1.0 is perfect.
        largest: absolute difference of a log-probability.
        gradients: norm of the difference of all gradients, by that of the gradients.
        worst: the same of the parameter where it is largest.
    """

    token_mult_prob_error: float
    largest: float
    gradients: float
    worst: float

    def __str__(self) -> str:
        return (
            f"{self.token_mult_prob_error:21.6f} {self.largest:9.1e} {self.gradients:9.1e} "
            f"{self.worst:15.1e}"
        )


def run(model, batches: list[dict], lengths: list[int] | None = None) -> Run:
    """Forward and backward of micro-batches; a padded one has samples of these lengths."""
    logprobs, masks = [], []
    gradients = {
        name: torch.zeros_like(weight, dtype=torch.float32)
        for name, weight in model.named_parameters()
    }
    for inputs in batches:
        model.zero_grad(set_to_none=True)
        loss, mask = model(**inputs)
        (loss.float() * mask.float()).sum().backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                gradients[name] += weight.grad  # summed in fp32: one by one adds up 16 of them
        sizes = lengths or [loss.shape[1]]
        for index, size in enumerate(sizes):
            logprobs.append(-loss[index, :size].detach().float())
            masks.append(mask[index, :size].float())
    return Run(torch.cat(logprobs), torch.cat(masks), gradients)


def difference(found: Run, alone: Run) -> Difference:
    size = alone.logprobs.numel()
    both = found.mask[:size] * alone.mask
    apart = (found.logprobs[:size] - alone.logprobs).abs() * both
    squares = {
        name: (float((found.gradients[name] - mine).square().sum()), float(mine.square().sum()))
        for name, mine in alone.gradients.items()
    }
    whole = [sum(parts) for parts in zip(*squares.values(), strict=True)]
    return Difference(
        token_mult_prob_error=mp.token_mult_prob_error(
            found.logprobs[:size], alone.logprobs, both
        ).item(),
        largest=apart.max().item(),
        gradients=(whole[0] / whole[1]) ** 0.5,
        worst=max((apart / norm) ** 0.5 for apart, norm in squares.values() if norm),
    )


def compare(model, samples) -> dict[str, Difference | str]:
    """By the way of running them."""
    packer = mp.data.get_packer("concatenative", mp.row_spec(model))
    on_device = [packer.join([sample]).to(tiny.DEVICE, tiny.DTYPE) for sample in samples]
    inputs = [without_boundaries(row) for row in on_device]
    alone = run(model, inputs)
    lengths = [row.layout.num_expanded for row in on_device]
    copies = 2 if len(samples) == 1 else 1  # a batch of one has no other shape
    batch = run(model, [padded(inputs * copies)], lengths * copies)
    batch.gradients = {name: mine / copies for name, mine in batch.gradients.items()}
    found = {"noise": difference(batch, alone)}
    row = packer.join(samples).to(tiny.DEVICE, tiny.DTYPE)
    with mp.install(model):
        found["packed"] = difference(run(model, [row.inputs()]), alone)
    logprobs_alone = mp.parity.run_alone(model, samples)
    for name, boundaries in ("collapsed", "collapsed"), ("dropped", None):
        result, reason = attempt(model, samples, logprobs_alone, boundaries)
        found[name] = reason or Difference(
            result.token_mult_prob_error, result.max_difference, float("nan"), float("nan")
        )
    return found


def judge(by_count: dict[int, dict]) -> list[str]:
    """What is further away, packed, than noise explains."""
    noise = [found["noise"] for found in by_count.values()]
    limits = {
        "token_mult_prob_error": 1
        + FACTOR * (max(one.token_mult_prob_error for one in noise) - 1)
        + LEAST,
        "gradients": FACTOR * max(one.gradients for one in noise) + LEAST,
    }
    return [
        f"{count} samples: {name} {getattr(found['packed'], name):.6g}, more than {limit:.6g}"
        for count, found in by_count.items()
        for name, limit in limits.items()
        if not getattr(found["packed"], name) <= limit  # nan too
    ]


def isolation(model, samples) -> tuple[str, str]:
    """The verdict, and what it says."""
    (row,), _ = mp.data.pack(samples, mp.row_spec(model))
    with mp.install(model):
        found = mp.parity.isolation(model, row.to(tiny.DEVICE, tiny.DTYPE))
    return found.verdict, str(found)


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that comes next, where the allocator keeps it."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(32)]
    del blocks


def past_the_end(model) -> dict[str, str]:
    """In words, what becomes of the last quarter of a row that no boundary covers."""
    layer = model.language_model.decoder.layers[0].self_attention
    shape = model.config.num_attention_heads, layer.hidden_size_per_attention_head
    length, end = 1024, 768
    cu_seqlens = torch.tensor([0, 300, end], dtype=torch.int32, device=tiny.DEVICE)
    params = PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, end - 300, end - 300)
    angles = model.language_model.rotary_pos_emb(end - 300)

    def attend(heads):
        return layer.core_attention(
            heads, heads, heads, attention_mask=None, attn_mask_type=AttnMaskType.padding_causal,
            packed_seq_params=params,
        )  # fmt: skip

    def turn(heads):
        return apply_rotary_pos_emb(heads, angles, model.config, cu_seqlens=cu_seqlens)

    said = {}
    for name, function in ("attention", attend), ("RoPE", turn):
        torch.manual_seed(0)
        heads = torch.randn(length, *shape, device=tiny.DEVICE, dtype=tiny.DTYPE)
        heads.requires_grad_()
        try:
            poison(heads)
            out = function(heads)
            if out.shape[0] < length:
                said[name] = f"gives {out.shape[0]} positions of {length}"
                continue
            poison(heads)
            (grad,) = torch.autograd.grad(out[:end].float().square().sum(), heads)
            words = (in_words(values.detach()[end:]) for values in (out, grad))
            said[name] = "gives {}, and as gradient {}".format(*words)
        except Exception as error:  # whatever it raises is the answer
            said[name] = f"raises {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return said


def in_words(values: Tensor) -> str:
    if not values.isfinite().all():
        return "what the memory held"
    return "zeros" if not values.any() else "values"


def check(kind: str, language: dict, counts: tuple[int, ...]) -> dict:
    """All of one kind of positions, as the report has it."""
    model = tiny.llava_model(kind.split(",")[0], img_size=SIZE, language=language)
    by_count = {}
    for count in counts:
        by_count[count] = compare(model, tiny.samples(count, img_size=SIZE))
        for name, found in by_count[count].items():
            print(f"{kind:16} {count:7}  {name:10} {found}", flush=True)
    wrong = judge(by_count)
    verdict, said = isolation(model, tiny.samples(COUNTS[1], img_size=SIZE))
    print(f"{kind}, {said}", flush=True)
    wrong += [f"isolation: {verdict}"] if verdict == "wrong" else []
    ends = past_the_end(model) if "rope" in kind else {}
    for name, words in ends.items():
        print(f"{kind}, past the last boundary: {name} {words}", flush=True)
    samples = {
        count: {name: one if isinstance(one, str) else asdict(one) for name, one in found.items()}
        for count, found in by_count.items()
    }
    return {
        "samples": samples,
        "isolation": {"verdict": verdict, "said": said},
        "past_the_last_boundary": ends,
        "wrong": wrong,
    }


def main() -> int:
    options = bench.parser(__doc__).parse_args()
    logging.disable(logging.WARNING)
    report = {"environment": bench.environment(), "kinds": {}}
    path = options.output / "gpu_parity.json"
    print(f"{tiny.attention_name()}; differences from the same samples, one by one\n\n{HEADER}")
    with tiny.megatron():
        for kind, language in KINDS.items():
            if language and not tiny.HAVE_TE:
                continue
            try:
                found = check(kind, language, COUNTS[: 2 if options.smallest else None])
            except Exception as error:  # the other kinds can still be checked
                traceback.print_exc()
                found = {"wrong": [f"raises {type(error).__name__}"]}
            report["kinds"][kind] = found
            path.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [f"{kind}, {what}" for kind, one in report["kinds"].items() for what in one["wrong"]]
    for what in wrong:
        print(f"FAILED: {what}")
    print(f"wrote {path}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
