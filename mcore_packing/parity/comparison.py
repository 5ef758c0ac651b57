"""Samples packed and one by one, on one process."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import get_packer
from ..errors import PackingError
from ..layout import PackedLayout
from ..megatron.find import find_llava
from ..megatron.hook import unpacked
from ..spec import RowSpec
from .metric import token_mult_prob_error
from .runs import collate, evaluating, logprobs, run_alone


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        num_samples, num_images: what was packed.
        num_collapsed, num_expanded: length of the packed row before and after expansion.
        token_mult_prob_error: 1.0 is perfect.
        max_difference: the largest absolute difference of a log-probability.
        sequence, position: where that is: the sample, and the position within it.
        lost_labels, gained_labels: positions that train alone but not packed, and packed but not
            alone.
        differences: fp32 ``[S]``, |packed - alone| where both train, else 0.
        compared: bool ``[S]``, where both train.
        layout: of the packed row, without padding.
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
    differences: Tensor
    compared: Tensor
    layout: PackedLayout

    def __str__(self) -> str:
        return (
            f"{self.num_samples} samples, {self.num_images} images, {self.num_collapsed} tokens -> "
            f"{self.num_expanded} positions: token_mult_prob_error "
            f"{self.token_mult_prob_error:.6f}, largest difference {self.max_difference:.2e} at "
            f"sequence {self.sequence}, position {self.position}; {self.lost_labels} labels lost"
            + (f", {self.gained_labels} gained" if self.gained_labels else "")
        )


@torch.no_grad()
def compare(
    model,
    samples: Sequence[dict],
    alone: list | None = None,
    boundaries: Tensor | str | None = "collapsed",
) -> Comparison:
    """Run samples packed and one by one, and compare the log-probabilities of their labels.

    Whether the packed run is right is up to the model: with ``install`` it should be.

    Args:
        model: a ``LLaVAModel`` or a wrapper around one, on one pipeline stage, without context
            parallelism.
        samples: dicts as ``mp.data.pack`` takes them.
        alone: what ``run_alone`` gave for these samples, to compare several packed runs with.
        boundaries: what the packed run is told: those of the samples, "collapsed", which the hook
            moves; int32 ``[B + 1]`` of your own; or None, which drops them.

    Returns:
        A ``Comparison``.

    Raises:
        PackingError: a sample is malformed, or there is none; or no token is trained in both runs,
            so there is nothing to compare.
    """
    llava = find_llava(model)
    spec = RowSpec(image_token_id=llava.image_token_index, img_seq_len=llava.img_seq_len)
    _check_samples(spec, samples)
    with evaluating(model):
        alone = run_alone(model, samples) if alone is None else alone
        packed = collate(samples)
        with unpacked(model) if boundaries is None else contextlib.nullcontext():
            found, mask = logprobs(model, packed | _told(packed, boundaries))

    layout = PackedLayout.build(
        packed["input_ids"][0],
        packed["cu_seqlens"],
        packed["num_image_tiles"].long() * llava.img_seq_len,
        spec,
        space="collapsed",
    )
    size = layout.num_expanded
    alone, mask_alone = (torch.cat(parts) for parts in zip(*alone, strict=True))
    found, mask = found[:size], mask[:size]
    both = mask * mask_alone
    if not both.any():
        raise PackingError(
            f"no token is trained both packed ({int((mask > 0).sum())} are) and alone "
            f"({int((mask_alone > 0).sum())}), so there is nothing to compare; see loss_mask"
        )
    differences = (found - alone).abs().masked_fill(both == 0, 0.0)
    worst = int(differences.argmax())
    starts = layout.cu_seqlens_expanded
    sequence = int(torch.searchsorted(starts, worst, right=True)) - 1
    return Comparison(
        num_samples=len(samples),
        num_images=packed["num_image_tiles"].numel(),
        num_collapsed=layout.num_collapsed,
        num_expanded=size,
        token_mult_prob_error=token_mult_prob_error(found, alone, both).item(),
        max_difference=differences[worst].item(),
        sequence=sequence,
        position=worst - int(starts[sequence]),
        lost_labels=int(((mask_alone > 0) & (mask == 0)).sum()),
        gained_labels=int(((mask > 0) & (mask_alone == 0)).sum()),
        differences=differences.cpu(),
        compared=(both > 0).cpu(),
        layout=layout.to("cpu"),
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
