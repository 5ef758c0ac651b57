"""A row of the running job against its samples, on every rank."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ..data import get_packer, split
from ..errors import PackingError
from ..layout import PackedLayout
from ..megatron.find import find_llava
from ..megatron.spec import row_spec
from ..reference import local_positions
from .metric import token_mult_prob_error
from .runs import evaluating, run_stage


@dataclass(frozen=True)
class SequenceError:
    """How far a sequence of a packed row is from its sample alone, on one rank.

    Attributes:
        rank: the process that computed it.
        sequence: its place in the row.
        token_mult_prob_error: over its trained tokens on this rank; 1.0 is perfect.
        max_difference: the largest absolute difference of a log-probability.
        position: where that is, counted from the sequence's start.
        unmatched_labels: positions that train either packed or alone, but not both.
        num_compared: positions that train in both.
    """

    rank: int
    sequence: int
    token_mult_prob_error: float
    max_difference: float
    position: int
    unmatched_labels: int
    num_compared: int

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence} ({self.token_mult_prob_error:.6f}, largest difference "
            f"{self.max_difference:.2e} at its position {self.position}, {self.unmatched_labels} "
            f"labels unmatched)"
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
        row: of ``mp.data``, packed for ``mp.row_spec(model)``.
        tolerance: how much more than 1.0 the ``token_mult_prob_error`` of a sequence may be; by
            default 1e-4 in fp32 and 0.05 in lower precision.

    Returns:
        A ``Verification``: the error on every rank, and which sequences are wrong.

    Raises:
        PackingError: the row does not split into samples, so its boundaries are not those it was
            packed with; nothing in it is trained; or the pipeline is an interleaved one.
    """
    if isinstance(model, list | tuple):
        if len(model) > 1:
            raise PackingError(
                "verify knows no interleaved pipelines: pass the one chunk of a stage"
            )
        (model,) = model
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
    spec = replace(row_spec(model), seq_multiple=row.layout.spec.seq_multiple)
    packer = get_packer("concatenative", spec)
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

    def step(iterator, model):
        output, mask = run_stage(model, next(iterator).inputs())
        return output, lambda loss, non_loss_data: (-loss[0].float(), mask[0].float())

    with evaluating(model):
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
                position=int(positions[begin + worst]) - edges[sequence],
                unmatched_labels=lost,
                num_compared=num_compared,
            )
        )
    return found
