"""Packed against one by one: the same samples must give the same log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.rows import concatenate
from .errors import PackingError
from .layout import PackedLayout


def token_mult_prob_error(logprobs_a: Tensor, logprobs_b: Tensor, mask: Tensor) -> Tensor:
    """Mean factor by which two runs disagree about the probability of a token; 1.0 is perfect.

    ``sum(exp(|a - b| * mask) * mask) / (sum(mask) + 1e-8)``.

    Args:
        logprobs_a: log-probabilities of the target tokens, any shape; shifting is left to the
            caller.
        logprobs_b: the same tokens in another run.
        mask: 1 for the tokens that count; same shape.

    Returns:
        0-d tensor of the same dtype.

    Source:
        ``token_mult_prob_error`` as NeMo-RL's ``ClippedPGLossFn`` reports it.

    Example:
        >>> a, b = torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-1.0, -2.5, 0.0])
        >>> round(token_mult_prob_error(a, b, torch.tensor([1.0, 1.0, 0.0])).item(), 4)
        1.3244
    """
    difference = (logprobs_a - logprobs_b).abs()
    return (torch.exp(difference * mask) * mask).sum() / (mask.sum() + 1e-8)


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        num_samples, num_images: what was packed.
        num_collapsed, num_expanded: length of the packed row before and after expansion.
        token_mult_prob_error: 1.0 is perfect.
        max_difference: the largest absolute difference of a log-probability.
        sequence, token: where that is: the sample, and the row within it in expanded space.
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
    token: int
    lost_labels: int
    gained_labels: int
    differences: Tensor
    compared: Tensor
    layout: PackedLayout

    def __str__(self) -> str:
        return (
            f"{self.num_samples} samples, {self.num_images} images, {self.num_collapsed} tokens -> "
            f"{self.num_expanded} rows: token_mult_prob_error {self.token_mult_prob_error:.6f}, "
            f"largest difference {self.max_difference:.2e} at sequence {self.sequence}, row "
            f"{self.token}; {self.lost_labels} labels lost"
            + (f", {self.gained_labels} gained" if self.gained_labels else "")
        )


@torch.no_grad()
def compare(model, samples: Sequence[dict], alone: list | None = None) -> Comparison:
    """Run samples packed and one by one, and compare the log-probabilities of their labels.

    Whether the packed run is right is up to the model: with ``install`` it should be.

    Args:
        model: a ``LLaVAModel`` or a wrapper around one, on one pipeline stage, without context
            parallelism.
        samples: dicts as ``mp.data.pack`` takes them.
        alone: what ``run_alone`` gave for these samples, to compare several packed runs with.

    Returns:
        A ``Comparison``.

    Raises:
        PackingError: no token is trained in both runs, so there is nothing to compare.
    """
    from .llava import find_llava

    llava = find_llava(model)
    was_training = model.training
    model.eval()
    try:
        alone = run_alone(model, samples) if alone is None else alone
        packed = pack(samples)
        logprobs, mask = _run(model, packed)
    finally:
        model.train(was_training)

    layout = PackedLayout.build(
        packed["input_ids"][0],
        packed["cu_seqlens"],
        packed["num_image_tiles"].long() * llava.img_seq_len,
        llava.image_token_index,
        space="collapsed",
    )
    size = layout.num_expanded
    logprobs_alone = torch.cat([pair[0] for pair in alone])
    mask_alone = torch.cat([pair[1] for pair in alone])
    logprobs, mask = logprobs[:size], mask[:size]
    both = mask * mask_alone
    if not both.any():
        raise PackingError(
            f"no token is trained both packed ({int((mask > 0).sum())} are) and alone "
            f"({int((mask_alone > 0).sum())}), so there is nothing to compare; see loss_mask"
        )
    differences = (logprobs - logprobs_alone).abs().masked_fill(both == 0, 0.0)
    worst = int(differences.argmax())
    starts = layout.cu_seqlens_expanded
    sequence = int(torch.searchsorted(starts, worst, right=True)) - 1
    return Comparison(
        num_samples=len(samples),
        num_images=packed["num_image_tiles"].numel(),
        num_collapsed=layout.num_collapsed,
        num_expanded=size,
        token_mult_prob_error=token_mult_prob_error(logprobs, logprobs_alone, both).item(),
        max_difference=differences[worst].item(),
        sequence=sequence,
        token=worst - int(starts[sequence]),
        lost_labels=int(((mask_alone > 0) & (mask == 0)).sum()),
        gained_labels=int(((mask > 0) & (mask_alone == 0)).sum()),
        differences=differences.cpu(),
        compared=(both > 0).cpu(),
        layout=layout.to("cpu"),
    )


@torch.no_grad()
def run_alone(model, samples: Sequence[dict]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and loss mask, fp32 ``[S_i]`` each, of every sample by itself, unpacked."""
    return [_run(model, {**pack([sample]), "cu_seqlens": None}) for sample in samples]


def pack(samples: Sequence[dict]) -> dict:
    """One collapsed row from samples, as a data path makes it that knows no layouts.

    The tensors of ``mp.data.pack``, but position ids that run on over the whole row, and
    ``cu_seqlens`` with the ``space`` that those count.
    """
    row = concatenate(samples)
    lengths = torch.tensor([0] + [sample["input_ids"].numel() for sample in samples])
    ids = row["input_ids"]
    return {
        **row,
        "position_ids": torch.arange(ids.numel(), device=ids.device)[None],
        "cu_seqlens": lengths.cumsum(0).int().to(ids.device),
        "space": "collapsed",
        "max_seqlen": int(lengths.max()),
    }


def forward(model, row: dict) -> tuple[Tensor, Tensor]:
    """Loss and expanded loss mask, ``[1, S]`` each, of a row that ``pack`` made.

    With ``cu_seqlens=None`` in the row it runs unpacked; ``packed_seq_params`` in the row go before
    its ``cu_seqlens``. The last pipeline stage has no images.
    """
    from .packed_seq import LaidOutParams

    params, cu_seqlens = row.get("packed_seq_params"), row["cu_seqlens"]
    if params is None and cu_seqlens is not None:
        params = LaidOutParams(
            space=row["space"],
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=row["max_seqlen"],
            max_seqlen_kv=row["max_seqlen"],
        )
    images = row["images"]
    if images is not None:
        images = images.to(next(model.parameters()).dtype)
    return model(
        images,
        row["input_ids"],
        row["position_ids"],
        None,
        labels=row["labels"],
        loss_mask=row["loss_mask"],
        num_image_tiles=row["num_image_tiles"],
        packed_seq_params=params,
    )


def _run(model, row: dict) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and the expanded loss mask, fp32 ``[S]`` each."""
    loss, mask = forward(model, row)
    return -loss[0].float(), mask[0].float()
