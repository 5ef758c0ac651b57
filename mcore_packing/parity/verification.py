"""A row of the running job against its samples, on every rank."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, NoReturn

import torch

from ..context_parallel import chunks_of
from ..data.rows import Row
from ..errors import PackingError
from ..inputs import refuse_old
from .content import as_one_sequence, one_by_one, with_all_labels, with_moved_boundaries
from .gradients import Found, GradientError, Gradients, compare_sums
from .job import Job, Run, gather, together
from .metric import token_mult_prob_error
from .noise import Size, differences, judge, rounded_otherwise, stands_out
from .verdict import INCONCLUSIVE, RIGHT, WRONG, Blind, Finding, blind_lines, worst

_OLD = {"tolerance": "verify measures how far results move by rounding, and compares with that"}


@dataclass(frozen=True)
class SequenceError:
    """How far a sequence of a packed row is from its sample alone, on one rank.

    Attributes:
        rank: the process that computed it.
        sequence: its place in the row.
        token_mult_prob_error: over its trained tokens on this rank; 1.0 is perfect.
        max_difference: the largest absolute difference of a log-probability, at any position.
        position: where that is, counted from the sequence's start.
        unmatched_labels: positions that train either packed or alone, but not both.
        num_compared: positions that train in both.
        verdict: what that means beside rounding.
    """

    rank: int
    sequence: int
    token_mult_prob_error: float
    max_difference: float
    position: int
    unmatched_labels: int
    num_compared: int
    verdict: str

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence} ({self.token_mult_prob_error:.6f}, largest difference "
            f"{self.max_difference:.2e} at its position {self.position}, {self.unmatched_labels} "
            f"labels unmatched)"
        )


@dataclass(frozen=True)
class Verification(Finding):
    """What ``verify`` found, the same on every rank.

    Attributes:
        sequences: one entry for each sequence that a rank has positions of.
        blind: which faults it could not have seen.
        floor: how far log-probabilities move by rounding alone.
        gradients: one entry for each part of the model, where they were asked for.
    """

    sequences: tuple[SequenceError, ...]
    blind: tuple[Blind, ...]
    floor: float
    gradients: tuple[GradientError, ...] = ()

    @property
    def wrong(self) -> tuple[SequenceError, ...]:
        """The sequences that are not, packed, what their samples are alone."""
        return tuple(found for found in self.sequences if found.verdict == WRONG)

    @property
    def unclear(self) -> tuple[SequenceError, ...]:
        """Those that differ by more than rounding should, but could be rounded all the same."""
        return tuple(found for found in self.sequences if found.verdict not in (WRONG, RIGHT))

    @property
    def verdict(self) -> str:
        verdicts = [found.verdict for found in (*self.sequences, *self.gradients)]
        return worst([*verdicts, *([INCONCLUSIVE] if self.blind else [])])

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

    def to_dict(self) -> dict:
        """Everything that is a number or text, for logs, and the error over all ranks."""
        return {**super().to_dict(), "token_mult_prob_error": self.token_mult_prob_error}

    def __str__(self) -> str:
        ranks = ", ".join(f"{error:.6f} on rank {rank}" for rank, error in self.by_rank.items())
        lines = [
            f"packed against one by one: {self.verdict}, token_mult_prob_error {ranks}; rounding "
            f"makes {self.floor:.2e}"
        ]
        lines += [f"  WRONG on rank {found.rank}: {found}" for found in self.wrong]
        lines += [f"  {found.verdict.upper()}: {found}" for found in self.gradients]
        if self.verdict != WRONG:
            lines += [f"  INCONCLUSIVE on rank {found.rank}: {found}" for found in self.unclear]
            lines += [f"  INCONCLUSIVE: {line}" for line in blind_lines(self.blind)]
        return "\n".join(lines)


def _mean(found: Iterable[SequenceError]) -> float:
    found = list(found)
    count = sum(sequence.num_compared for sequence in found)
    total = sum(sequence.token_mult_prob_error * sequence.num_compared for sequence in found)
    return total / count if count else 1.0


def verify(
    model, row, forward: Callable | None = None, *, gradients: bool = False, **old: NoReturn
) -> Verification:
    """Check a row of the running job: packed, every sample must be what it is alone.

    Splits the row into its samples, runs it and each sample in a row of its own through Megatron's
    schedule, and compares the log-probabilities of all positions, and which of them are trained.
    How far those move by rounding alone is measured: the row runs again with every layer of the
    language model off by one unit in the last place. And two rows with a known fault are run, every
    boundary off by one token, and no boundary: where one would make no more than what was found,
    the verdict is "inconclusive".

    ``isolation`` sees any dependence on other samples, without a tolerance. This here sees what
    else can be wrong: positions, labels, embeddings in the wrong place. It costs a forward pass a
    sample, and four of the row.

    The model stays as it is: wrapped, on its tensor, sequence, context and pipeline parallel ranks;
    modes, random numbers and gradients are afterwards what they were. Every rank must call it, and
    gets the same answer. Data-parallel replicas bring a row each; the ranks of a replica all bring
    the same one.

    Args:
        model, row, forward: as ``isolation`` takes them.
        gradients: also compare the gradients of the same targets, part by part of the model. It
            takes two backward passes a sample, and three of the row; the memory of the gradients
            twice, and five times on the host.

    Returns:
        A ``Verification``: the error on every rank, and which sequences are wrong.

    Raises:
        PackingError: the row does not split into samples, so its boundaries are not those it was
            packed with; nothing in it is trained; or it cannot be run. On all ranks, where that is
            known before.
    """
    refuse_old("mp.parity.verify", old, _OLD)
    job, rows = together(lambda: _prepare(model, row, forward))
    runs = job.run(rows.all)
    with rounded_otherwise(job.chunks, job.config):
        runs += job.run([rows.packed])
    comparison = together(lambda: _Comparison(job, rows, runs) if runs else None)
    mine = ([], [], 0.0) if comparison is None else comparison.judged()
    apart = _gradients(job, rows, comparison) if gradients else ()
    sequences, blind, floors = zip(*gather(mine), strict=True)
    sequences = tuple(found for theirs in sequences for found in theirs)
    if not any(sequence.num_compared for sequence in sequences):
        raise PackingError("no token is trained both packed and alone: there is nothing to verify")
    blind = dict.fromkeys(found for theirs in blind for found in theirs)
    return Verification(sequences, tuple(blind), max(floors), apart)


class _Rows(NamedTuple):
    """What is run: the row, its samples, and rows with a known fault, ``{fault: row}``."""

    packed: Row
    alone: list[Row]
    faulty: dict[str, Row]

    @property
    def all(self) -> list[Row]:
        return [self.packed, *self.alone, *self.faulty.values()]


def _prepare(model, row, forward) -> tuple[Job, _Rows]:
    job = Job(model, row, forward)
    row = job.row
    length = row.layout.num_expanded if job.pads_rows else None
    alone = [with_all_labels(sample) for sample in one_by_one(row, length)]
    row, faulty = with_all_labels(row), {}
    if len(alone) > 1:
        # By one token, but where nobody pads what ranks then divide.
        step = 1 if row.layout.spec.seq_multiple > 1 else chunks_of(job.cp_size)
        faulty = {
            f"every boundary off by {step}": with_moved_boundaries(row, step),
            "no boundary at all": as_one_sequence(row),
        }
    return job, _Rows(row, alone, {name: row for name, row in faulty.items() if row is not None})


def _gradients(job: Job, rows: _Rows, comparison) -> tuple[GradientError, ...]:
    """Of what trains both packed and alone."""
    whole, parts = None, [None] * len(rows.alone)
    if comparison is not None:
        whole = comparison.trained
        parts = [whole[span] for span in comparison.spans]
    alone = list(zip(rows.alone, parts, strict=True))
    row, weight = alone[0]
    nothing = row, None if weight is None else weight * 0  # all ranks run as many rows
    alone += [nothing] * (max(gather(len(alone))) - len(alone))

    def run(*pairs) -> list:
        return gradients.of(
            *(lambda row=row, weight=weight: job.backward([row], [weight]) for row, weight in pairs)
        )

    gradients, packed = Gradients(job.chunks, job.config), (rows.packed, whole)
    with gradients.borrowed():
        as_they_are = [run(packed), run(*alone)]
        with rounded_otherwise(job.chunks, job.config):
            noise = [run(packed), run(*alone)]
        found = Found(*as_they_are, *noise, run((as_one_sequence(rows.packed), whole)))
    return compare_sums(gather((job.replica, gradients.sums(found))))


class _Comparison:
    """The runs of a replica side by side, position by position of the row without its padding."""

    def __init__(self, job: Job, rows: _Rows, runs: Sequence[Run]):
        self.job, count = job, len(rows.alone)
        self.packed, self.noise = runs[0], runs[-1]
        self.alone = Run(*(torch.cat(parts) for parts in zip(*runs[1 : count + 1], strict=True)))
        self.faulty = dict(zip(rows.faulty, runs[count + 1 : -1], strict=True))
        self.owned = job.owned(rows.packed.layout)
        edges = rows.packed.layout.cu_seqlens_expanded.tolist()
        self.spans = [slice(*ends) for ends in pairwise(edges)]
        self.trained = ((self.packed.mask > 0) & (self.alone.mask > 0)).float()
        self.floor = Size.of(differences(self.noise.logprobs, self.packed.logprobs))

    def judged(self) -> tuple[list[SequenceError], list[Blind], float]:
        """What this rank found in its positions, what the replica is blind for, and the floor."""
        sequences = [self._sequence(index, span) for index, span in enumerate(self.spans)]
        blind = [Blind(self.job.replica, *found) for found in self._blind()]
        return [found for found in sequences if found is not None], blind, self.floor.max

    def _sequence(self, index: int, span: slice) -> SequenceError | None:
        """This rank's positions of a sequence, None where it has none."""
        ours = self.owned[span]
        if not bool(ours.any()):
            return None
        packed, mask, alone, mask_alone = (x[span][ours] for x in (*self.packed, *self.alone))
        both, unmatched = mask * mask_alone, int(((mask > 0) != (mask_alone > 0)).sum())
        apart = differences(packed, alone)
        at = int(apart.argmax())
        return SequenceError(
            rank=self.job.rank,
            sequence=index,
            token_mult_prob_error=token_mult_prob_error(packed, alone, both).item(),
            max_difference=apart[at].item(),
            position=int(ours.nonzero()[at]),
            unmatched_labels=unmatched,
            num_compared=int((both > 0).sum()),
            verdict=WRONG if unmatched else judge(Size.of(apart), self.floor),
        )

    def _blind(self) -> list[tuple[int | None, str]]:
        """The faults that would make no more than what was found."""
        if len(self.spans) < 2:
            return [(None, "a row of one sample has no boundary to get wrong")]
        found = []
        if len(self.faulty) < 2:
            found.append((None, "no row with moved boundaries fits the model"))
        for fault, run in self.faulty.items():
            for index, span in enumerate(self.spans[1:], 1):
                known = self._apart(self.packed, span)
                if not stands_out(self._apart(run, span), known):
                    found.append((index, f"{fault} would not be seen"))
        return found

    def _apart(self, run: Run, span: slice) -> Size:
        """How far a run is from the samples alone; one with a fault may have lost its end."""
        logprobs = run.logprobs[span]
        return Size.of(differences(logprobs, self.alone.logprobs[span][: logprobs.numel()]))
