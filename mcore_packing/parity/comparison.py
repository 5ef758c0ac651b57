"""Samples packed and one by one, on one process."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import get_packer
from ..errors import PackingError
from ..inputs import as_choice
from ..layout import PackedLayout
from ..megatron.find import find_llava
from ..megatron.hook import unpacked
from ..spec import RowSpec
from .gradients import Found, GradientError, Gradients, compare_sums
from .metric import token_mult_prob_error
from .noise import Size, differences, judge, rounded_otherwise, stands_out
from .runs import collate, evaluating, logprobs, run_alone
from .verdict import INCONCLUSIVE, RIGHT, WRONG, Finding, worst


@dataclass(frozen=True)
class Comparison(Finding):
    """What ``compare`` found.

    Attributes:
        num_samples, num_images: what was packed.
        num_collapsed, num_expanded: length of the packed row before and after expansion.
        token_mult_prob_error: 1.0 is perfect.
        max_difference: the largest absolute difference of a log-probability.
        sequence, position: where that is: the sample, and the position within it.
        lost_labels, gained_labels: positions that train alone but not packed, and packed but not
            alone.
        verdicts: of each sequence. "inconclusive" also where dropped boundaries would make no more
            than what was found, and for a row of one sample.
        floor: how far log-probabilities move by rounding alone.
        differences: fp32 ``[S]``, |packed - alone| where both train, else 0.
        compared: bool ``[S]``, where both train.
        layout: of the packed row, without padding.
        gradients: one entry for each part of the model, where they were asked for.
    """

    num_samples: int
    num_images: int
    num_collapsed: int
    num_expanded: int
    token_mult_prob_error: float
    max_difference: float
    sequence: int
    position: int
    lost_labels: int
    gained_labels: int
    verdicts: tuple[str, ...]
    floor: float
    differences: Tensor
    compared: Tensor
    layout: PackedLayout
    gradients: tuple[GradientError, ...] = ()

    @property
    def verdict(self) -> str:
        unmatched = [WRONG] if self.lost_labels + self.gained_labels else []
        return worst([*unmatched, *self.verdicts, *(found.verdict for found in self.gradients)])

    def __str__(self) -> str:
        lines = [
            f"{self.num_samples} samples, {self.num_images} images, {self.num_collapsed} tokens -> "
            f"{self.num_expanded} positions: {self.verdict}, token_mult_prob_error "
            f"{self.token_mult_prob_error:.6f}, largest difference {self.max_difference:.2e} at "
            f"sequence {self.sequence}, position {self.position} (rounding makes "
            f"{self.floor:.2e}); {self.lost_labels} labels lost"
            + (f", {self.gained_labels} gained" if self.gained_labels else "")
        ]
        for verdict in WRONG, INCONCLUSIVE:
            named = [str(s) for s, found in enumerate(self.verdicts) if found == verdict]
            if named and self.verdict == verdict:
                lines.append(f"  {verdict.upper()}: sequences {', '.join(named)}")
        return "\n".join(
            lines + [f"  {found.verdict.upper()}: {found}" for found in self.gradients]
        )


def compare(
    model,
    samples: Sequence[dict],
    alone: list | None = None,
    boundaries: Tensor | str | None = "collapsed",
    *,
    gradients: bool = False,
) -> Comparison:
    """Run samples packed and one by one, and compare the log-probabilities of their labels.

    Whether the packed run is right is up to the model: with ``install`` it should be. Rounding is
    measured, and what dropped boundaries would do, as ``verify`` does.

    Args:
        model: a ``LLaVAModel`` or a wrapper around one, on one pipeline stage, without context or
            sequence parallelism.
        samples: dicts as ``mp.data.pack`` takes them.
        alone: what ``run_alone`` gave for these samples, to compare several packed runs with.
        boundaries: what the packed run is told: those of the samples, "collapsed", which the hook
            moves; int32 ``[B + 1]`` of your own; or None, which drops them.
        gradients: also compare the gradients of the same targets, part by part of the model.

    Returns:
        A ``Comparison``.

    Raises:
        PackingError: a sample is malformed, or there is none; no token is trained in both runs, so
            there is nothing to compare; ``boundaries`` is another word; or the model is split.
    """
    llava = find_llava(model)
    _refuse_split(llava)
    if isinstance(boundaries, str):
        as_choice(boundaries, "boundaries", ("collapsed",))
    spec = RowSpec(image_token_id=llava.image_token_index, img_seq_len=llava.img_seq_len)
    _check_samples(spec, samples)
    with evaluating(model):
        alone = run_alone(model, samples) if alone is None else alone
        row = collate(samples, spec.image_token_id)
        told = _Row(row | _told(row, boundaries), boundaries is None)
        dropped = _Row({**row, "cu_seqlens": None}, True)
        with torch.no_grad():
            found, mask = told.run(model)
            without, _ = dropped.run(model)
            with rounded_otherwise([model], llava.config):
                noise, _ = told.run(model)

    layout = PackedLayout.build(
        row["input_ids"][0],
        row["cu_seqlens"],
        row["num_image_tiles"].long() * llava.img_seq_len,
        spec,
        space="collapsed",
    )
    size = layout.num_expanded
    alone, mask_alone = (torch.cat(parts) for parts in zip(*alone, strict=True))
    found, noise, without, mask = (  # where a row is cut, nothing is trained behind
        torch.nn.functional.pad(x, (0, size - x.numel())) for x in (found, noise, without, mask)
    )
    both = mask * mask_alone
    if not both.any():
        raise PackingError(
            f"no token is trained both packed ({int((mask > 0).sum())} are) and alone "
            f"({int((mask_alone > 0).sum())}), so there is nothing to compare; see loss_mask"
        )
    apart, floor, control = (
        differences(a, b).masked_fill(both == 0, 0.0)
        for a, b in ((found, alone), (noise, found), (without, alone))
    )
    edges = layout.cu_seqlens_expanded.tolist()
    spans = [slice(*ends) for ends in pairwise(edges)]
    of_parts = ()
    if gradients:
        of_parts = _gradients(model, llava, samples, told, dropped, both, edges[:-1])
    worst_at = int(apart.argmax())
    sequence = next(s for s, span in enumerate(spans) if worst_at < span.stop)
    return Comparison(
        num_samples=len(samples),
        num_images=row["num_image_tiles"].numel(),
        num_collapsed=layout.num_collapsed,
        num_expanded=size,
        token_mult_prob_error=token_mult_prob_error(found, alone, both).item(),
        max_difference=apart[worst_at].item(),
        sequence=sequence,
        position=worst_at - edges[sequence],
        lost_labels=int(((mask_alone > 0) & (mask == 0)).sum()),
        gained_labels=int(((mask > 0) & (mask_alone == 0)).sum()),
        verdicts=tuple(
            _judge(s, len(spans), *(Size.of(x[span][both[span] > 0]) for x in (apart, control)),
                   Size.of(floor[both > 0]))
            for s, span in enumerate(spans)
        ),
        floor=floor.max().item(),
        differences=apart.cpu(),
        compared=(both > 0).cpu(),
        layout=layout.to("cpu"),
        gradients=of_parts,
    )  # fmt: skip


class _Row(NamedTuple):
    """A collated row, and whether it runs without boundaries."""

    row: dict
    is_unpacked: bool

    def run(self, model) -> tuple[Tensor, Tensor]:
        with unpacked(model) if self.is_unpacked else contextlib.nullcontext():
            return logprobs(model, self.row)


def _judge(sequence: int, count: int, found: Size, control: Size, floor: Size) -> str:
    """What the differences of a sequence mean; the first one sees nobody, whatever is dropped."""
    verdict = judge(found, floor)
    if verdict == RIGHT and (count < 2 or (sequence and not stands_out(control, found))):
        return INCONCLUSIVE
    return verdict


def _gradients(model, llava, samples, told, dropped, both, begins) -> tuple[GradientError, ...]:
    """Of what trains both packed and alone."""
    parts = [
        _Row({**collate([sample], llava.image_token_index), "cu_seqlens": None}, True)
        for sample in samples
    ]
    gradients = Gradients([model], llava.config)

    def backward(row: _Row, begin: int) -> None:
        found, _ = row.run(model)
        weight = both[begin : begin + found.numel()]
        (found[: weight.numel()] * weight).sum().backward()

    def alone() -> list:
        return gradients.of(
            *(lambda row=row, begin=begin: backward(row, begin)
              for row, begin in zip(parts, begins, strict=True))
        )  # fmt: skip

    def packed() -> list:
        return gradients.of(lambda: backward(told, 0))

    with evaluating(model), gradients.borrowed(), torch.enable_grad():
        as_they_are = [packed(), alone()]
        with rounded_otherwise([model], llava.config):
            noise = [packed(), alone()]
        found = Found(*as_they_are, *noise, gradients.of(lambda: backward(dropped, 0)))
    return compare_sums([(0, gradients.sums(found))])


def _refuse_split(llava) -> None:
    """Samples one by one have the lengths that they have, and no stage has a loss but the last."""
    is_stage = not (llava.pre_process and llava.post_process)
    splits = llava.sequence_parallel_lm and llava.tensor_model_parallel_size_lm > 1
    if is_stage or splits or llava.context_parallel_lm > 1:
        raise PackingError(
            "parity.compare runs on one pipeline stage, without context or sequence parallelism; "
            "mp.parity.verify(model, row) runs on the job as it is"
        )


def _check_samples(spec: RowSpec, samples: Sequence[dict]) -> None:
    if not samples:
        raise PackingError("samples is empty: there is nothing to compare")
    packer = get_packer("concatenative", spec)
    for index, sample in enumerate(samples):
        try:
            packer.num_positions(sample)
        except PackingError as error:
            raise PackingError(f"sample {index}: {error}") from error


def _told(packed: dict, boundaries: Tensor | str | None) -> dict:
    """What ``forward`` is to see of a row's boundaries."""
    if isinstance(boundaries, str):
        return {}
    if boundaries is None:
        return {"cu_seqlens": None}
    cu_seqlens = boundaries.to(packed["input_ids"].device)
    return {"cu_seqlens": cu_seqlens, "max_seqlen": int(cu_seqlens.diff().max()), "space": None}
