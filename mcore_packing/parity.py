"""Packed against one by one: the same samples must give the same log-probabilities."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .data.rows import concatenate, get_packer, split
from .errors import PackingError
from .layout import PackedLayout
from .reference import local_positions


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
    from .llava import find_llava

    llava = find_llava(model)
    _check_samples(llava, samples)
    was_training = model.training
    model.eval()
    try:
        alone = run_alone(model, samples) if alone is None else alone
        packed = pack(samples)
        logprobs, mask = _run(model, packed | _told(packed, boundaries))
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


def _check_samples(llava, samples: Sequence[dict]) -> None:
    if not samples:
        raise PackingError("samples is empty: there is nothing to compare")
    packer = _packer(llava, capacity=2**31 - 1)
    for index, sample in enumerate(samples):
        try:
            packer.num_rows(sample)
        except PackingError as error:
            raise PackingError(f"sample {index}: {error}") from error


def _packer(llava, capacity: int | None, **options):
    """Of samples for this model."""
    return get_packer(
        "concatenative",
        capacity,
        image_token_id=llava.image_token_index,
        img_seq_len=llava.img_seq_len,
        **options,
    )


def _told(packed: dict, boundaries: Tensor | str | None) -> dict:
    """What ``forward`` is to see of a row's boundaries."""
    if isinstance(boundaries, str):
        return {}
    if boundaries is None:
        return {"cu_seqlens": None}
    cu_seqlens = boundaries.to(packed["input_ids"].device)
    return {"cu_seqlens": cu_seqlens, "max_seqlen": int(cu_seqlens.diff().max()), "space": None}


@torch.no_grad()
def run_alone(model, samples: Sequence[dict]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and loss mask, fp32 ``[S_i]`` each, of every sample by itself, unpacked."""
    from .llava import unpacked

    with unpacked(model):
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


def run_stage(model, inputs: dict) -> tuple[Tensor, Tensor | None]:
    """``forward`` of one pipeline stage, with what that stage reads of a micro-batch.

    The first stage has the images; those in the middle have no tokens either, only boundaries.

    Args:
        model: as ``find_llava`` takes it.
        inputs: keyword arguments for a model of one stage, as ``mp.data.Row.inputs`` gives them.

    Returns:
        What ``LLaVAModel.forward`` returns: the loss, logits or hidden states of the stage, and the
        expanded loss mask where it has labels.
    """
    from .llava import find_llava

    llava = find_llava(model)
    missing = ()
    if not llava.pre_process:
        missing = ("images",)
    if not (llava.pre_process or llava.post_process):
        missing = [name for name in inputs if name != "packed_seq_params"]
    return model(**{**inputs, **dict.fromkeys(missing)})


# On the running job


@dataclass(frozen=True)
class SequenceError:
    """How far a sequence of a packed row is from its sample alone, on one rank.

    Attributes:
        rank: the process that computed it.
        sequence: its place in the row.
        token_mult_prob_error: over its trained tokens on this rank; 1.0 is perfect.
        max_difference: the largest absolute difference of a log-probability.
        row: where that is, in expanded space, counted from the sequence's start.
        unmatched_labels: positions that train either packed or alone, but not both.
        num_compared: positions that train in both.
    """

    rank: int
    sequence: int
    token_mult_prob_error: float
    max_difference: float
    row: int
    unmatched_labels: int
    num_compared: int

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence} ({self.token_mult_prob_error:.6f}, largest difference "
            f"{self.max_difference:.2e} at its row {self.row}, {self.unmatched_labels} labels "
            f"unmatched)"
        )


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found, the same on every rank.

    Attributes:
        sequences: one entry for each sequence that a rank has trained tokens of.
        tolerance: how much more than 1.0 the error of a sequence may be.
    """

    sequences: tuple[SequenceError, ...]
    tolerance: float

    @property
    def wrong(self) -> tuple[SequenceError, ...]:
        """The sequences that are not, packed, what their samples are alone."""
        return tuple(
            found
            for found in self.sequences
            if found.unmatched_labels
            or not found.token_mult_prob_error <= 1 + self.tolerance  # NaN too
        )

    @property
    def is_right(self) -> bool:
        return not self.wrong

    @property
    def by_rank(self) -> dict[int, float]:
        """``token_mult_prob_error`` of every rank that has log-probabilities: those of the last
        pipeline stage."""
        ranks = dict.fromkeys(found.rank for found in self.sequences)
        return {
            rank: _mean(found for found in self.sequences if found.rank == rank) for rank in ranks
        }

    @property
    def token_mult_prob_error(self) -> float:
        """Over all ranks; 1.0 is perfect."""
        return _mean(self.sequences)

    def __str__(self) -> str:
        ranks = ", ".join(f"{error:.6f} on rank {rank}" for rank, error in self.by_rank.items())
        lines = [f"packed against one by one: token_mult_prob_error {ranks}"]
        lines += [f"  WRONG on rank {found.rank}: {found}" for found in self.wrong]
        return "\n".join(lines)


def _mean(found: Iterable[SequenceError]) -> float:
    found = list(found)
    count = sum(sequence.num_compared for sequence in found)
    total = sum(sequence.token_mult_prob_error * sequence.num_compared for sequence in found)
    return total / count if count else 1.0


def verify(model, row, tolerance: float | None = None) -> Verification:
    """Check a row of the running job: packed, every sample must be what it is alone.

    Splits the row into its samples, runs it and each sample in a row of its own through Megatron's
    schedule, and compares the log-probabilities of their labels. The model stays as it is: wrapped,
    with its own attention, on its tensor, sequence, context and pipeline parallel ranks. It costs
    one forward pass a sample, and leaves no gradients.

    Every rank must call it, and gets the same answer. Data-parallel replicas bring a row each; the
    ranks of a replica all bring the same one.

    Args:
        model: as ``install`` takes it, installed or not, of one chunk.
        row: of ``mp.data``, packed with ``**mp.layout_options(model)``.
        tolerance: how much more than 1.0 the ``token_mult_prob_error`` of a sequence may be; by
            default 1e-4 in fp32 and 0.05 in lower precision.

    Returns:
        A ``Verification``: the error on every rank, and which sequences are wrong.

    Raises:
        PackingError: the row does not split into samples, so its boundaries are not those it was
            packed with; nothing in it is trained; or the pipeline is an interleaved one.
    """
    from .llava import _chunks, find_llava

    if len(_chunks(model)) > 1:
        raise PackingError("verify knows no interleaved pipelines: pass the one chunk of a stage")
    (model,) = _chunks(model)
    weight = next(model.parameters())
    if tolerance is None:
        tolerance = 1e-4 if weight.dtype == torch.float32 else 0.05
    row = row.to(weight.device, weight.dtype)
    runs = _run_rows(model, [row, *_alone(model, row)])
    mine = _compare_sequences(find_llava(model), row.layout, *runs) if runs else []
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    found = tuple(found for theirs in everyones for found in theirs)
    if not any(sequence.num_compared for sequence in found):
        raise PackingError("no token is trained both packed and alone: there is nothing to verify")
    return Verification(found, tolerance)


def _alone(model, row) -> list:
    """Every sample of a row in a row of its own."""
    from .llava import find_llava, layout_options

    options = {**layout_options(model), "seq_multiple": row.layout.seq_multiple}
    packer = _packer(find_llava(model), capacity=None, **options)
    rows = []
    for sequence, sample in enumerate(split(row)):
        try:
            rows.append(packer.join([sample]))
        except PackingError as error:
            raise PackingError(
                f"sequence {sequence} of the row is not its sample: {error}"
            ) from error
    return rows


@torch.no_grad()
def _run_rows(model, rows: list) -> list[tuple[Tensor, Tensor]]:
    """This rank's log-probabilities and loss mask of every row, on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from .llava import find_llava

    def step(iterator, model):
        output, mask = run_stage(model, next(iterator).inputs())
        return output, lambda loss, non_loss_data: (-loss[0].float(), mask[0].float())

    was_training = model.training
    model.eval()
    try:
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(rows),
            model=[model],
            num_microbatches=len(rows),
            seq_length=find_llava(model)._language_max_sequence_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        model.train(was_training)


def _compare_sequences(llava, layout: PackedLayout, packed, *alone) -> list[SequenceError]:
    """Context parallelism cuts every sequence by itself: a rank has the same piece of it in either
    run, and in one piece."""
    size, rank = llava.context_parallel_lm, 0
    if size > 1:
        rank = llava.cp_group.rank()
    edges = layout.cu_seqlens_padded
    positions = local_positions(edges, layout.num_expanded, size, rank)
    edges, found = edges.tolist(), []
    for sequence, run in enumerate(alone):
        begin, end = edges[sequence] // size, edges[sequence + 1] // size
        (logprobs, mask), (logprobs_alone, mask_alone) = (
            (x[begin:end] for x in packed),
            (x[: end - begin] for x in run),
        )
        both = mask * mask_alone
        differences = (logprobs - logprobs_alone).abs().masked_fill(both == 0, 0.0)
        num_compared, lost = int((both > 0).sum()), int(((mask > 0) != (mask_alone > 0)).sum())
        if not num_compared + lost:
            continue
        worst = int(differences.argmax())
        found.append(
            SequenceError(
                rank=dist.get_rank(),
                sequence=sequence,
                token_mult_prob_error=token_mult_prob_error(logprobs, logprobs_alone, both).item(),
                max_difference=differences[worst].item(),
                row=int(positions[begin + worst]) - edges[sequence],
                unmatched_labels=lost,
                num_compared=num_compared,
            )
        )
    return found
