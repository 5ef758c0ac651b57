"""Other samples' content changes, this sample's results must not: a check without a tolerance."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .content import Content, as_one_sequence, with_all_labels
from .job import Job, gather, together
from .noise import Size, differences, judge, largest, rounded_otherwise, stands_out
from .verdict import INCONCLUSIVE, RIGHT, WRONG, Blind, Finding, blind_lines

NAMED = 16  # samples that are changed one at a time, once something leaks


@dataclass(frozen=True)
class Leak:
    """A sequence whose results depend on other samples, on one rank.

    Attributes:
        rank: the process that computed it.
        sequence: its place in the row.
        sees: whose content changes it; empty where none of the nearest does.
        max_difference: the largest absolute difference of a log-probability.
        position: the first that differs, counted from the sequence's start.
    """

    rank: int
    sequence: int
    sees: tuple[int, ...]
    max_difference: float
    position: int

    def __str__(self) -> str:
        seen = ", ".join(map(str, self.sees)) or "another one"
        return (
            f"sequence {self.sequence} sees {seen} (largest difference {self.max_difference:.2e}, "
            f"from its position {self.position})"
        )


@dataclass(frozen=True)
class Isolation(Finding):
    """What ``isolation`` found, the same on every rank.

    Attributes:
        leaks: the sequences that see others.
        blind: what it could not have seen.
        floor: how far results move without a leak: 0 where they are the same bit by bit.
        num_passes: how often the row was run.
    """

    leaks: tuple[Leak, ...]
    blind: tuple[Blind, ...]
    floor: float
    num_passes: int

    @property
    def verdict(self) -> str:
        if self.leaks:
            return WRONG
        return INCONCLUSIVE if self.blind else RIGHT

    def __str__(self) -> str:
        how = "bit by bit" if not self.floor else f"where rounding makes {self.floor:.2e}"
        lines = [f"isolation: {self.verdict}, {how}, {self.num_passes} passes"]
        lines += [f"  WRONG on rank {leak.rank}: {leak}" for leak in self.leaks]
        if not self.leaks:
            lines += [f"  INCONCLUSIVE: {line}" for line in blind_lines(self.blind)]
        return "\n".join(lines)


def isolation(
    model,
    row,
    forward: Callable | None = None,
    *,
    exhaustive: bool = False,
    keep_ids: Collection[int] = (),
) -> Isolation:
    """Change the content of other samples in a row: a sample must give the same, bit by bit.

    The row is run, run again, run with another content in every odd sample, then in every even one.
    Log-probabilities of all positions are compared, whatever is trained. Lengths, image tokens and
    boundaries stay, so shapes and kernels do, and a sample that sees no other computes the very
    same in any precision. Every changed sample must show it in its own later positions. Where
    something leaks, the nearest samples are changed one by one, to say who sees whom.

    Where the repeat differs, or experts or FP8 scales of a whole tensor round by what other samples
    hold, differences are compared with those of rounding; then the row as one sequence shows what a
    leak would make.

    The model stays as it is: wrapped, on its tensor, sequence, context and pipeline parallel ranks;
    modes, random numbers and gradients are afterwards what they were. Every rank must call it, and
    gets the same answer. Data-parallel replicas bring a row each; the ranks of a replica all bring
    the same one.

    Args:
        model: a ``LLaVAModel`` as ``install`` takes it, installed or not; with ``forward`` any
            model of Megatron's classes, or the list of its pipeline chunks.
        row: of ``mp.data``, packed for this model.
        forward: ``step(model, inputs)`` runs one pipeline stage of a model that is no
            ``LLaVAModel`` on what ``row.inputs()`` gives. It returns what the stage's ``forward``
            returns: on the last one the loss of each of this rank's positions ``[1, positions]``,
            alone or with the loss mask.
        exhaustive: two passes for each bit of the samples' numbers instead of two, so that any two
            samples differ in some pass: whoever sees another that is an even number away is found
            too.
        keep_ids: ids that must stay, besides the image token and what stands beside it where the
            model does not expand.

    Returns:
        An ``Isolation``. It is inconclusive where a row has fewer than two samples, or a changed
        sample does not show it.

    Raises:
        PackingError: the model or the row cannot be run; on all ranks, where it is known before.
    """

    def prepare() -> _Trial:
        job = Job(model, row, forward)
        return _Trial(job, Content(with_all_labels(job.row), keep_ids))

    trial = together(prepare)
    trial.run(_patterns(trial.num_samples, exhaustive))
    if any(gather(bool(trial.leaking()))):  # bit by bit, that is
        trial.measure_floor()
        trial.run([{sample} for sample in trial.suspects()], names=True)
    found = gather((trial.leaks(), trial.blind(), trial.floor.max, trial.num_passes))
    leaks, blind, floors, num_passes = zip(*found, strict=True)
    return Isolation(
        leaks=tuple(leak for theirs in leaks for leak in theirs),
        blind=tuple(dict.fromkeys(one for theirs in blind for one in theirs)),
        floor=max(floors),
        num_passes=max(num_passes),
    )


def _patterns(num_samples: int, exhaustive: bool) -> list[set[int]]:
    """Which samples change together: by the last bit of their numbers, or by every bit."""
    if num_samples < 2:
        return []
    bits = math.ceil(math.log2(num_samples)) if exhaustive else 1
    return [
        {sample for sample in range(num_samples) if (sample >> bit) % 2 == value}
        for bit in range(bits)
        for value in (1, 0)
    ]


class _Trial:
    """The passes of one check, and what this rank reads from them.

    Attributes:
        passes: for each, the samples that changed, and how far every real position moved; empty
            before the last pipeline stage.
        names: those that say who is seen.
        floor: of rounding, where samples may round by others; else 0.
        dropped: how far every real position moves without boundaries, where rounding was measured.
    """

    def __init__(self, job: Job, content: Content):
        self.job, self.content, self.row = job, content, content.row
        edges = self.row.layout.cu_seqlens_expanded.tolist()
        self.spans = [slice(*ends) for ends in pairwise(edges)]
        self.num_samples, self.owned = len(self.spans), job.owned(self.row.layout)
        self.base = self.repeat = self.dropped = None
        self.passes: list[tuple[set[int], Tensor]] = []
        self.names: list[tuple[set[int], Tensor]] = []
        self.floor, self.num_passes = Size(), 0

    def run(self, patterns: Sequence[set[int]], names: bool = False) -> None:
        """Run the row with other content in each set of samples; the first time also as it is."""
        rows = [self.row] * 2 if self.base is None else []
        rows += [self.content.changed(samples) for samples in patterns]
        runs = self._moved(rows)
        if self.repeat is None and runs:
            self.repeat = runs[1]
        found = list(zip(patterns, runs[len(rows) - len(patterns) :], strict=bool(runs)))
        self.passes += found
        self.names += found if names else []

    def _moved(self, rows: Sequence) -> list[Tensor]:
        """How far every real position is from the first run."""
        runs = self.job.run(rows)
        self.num_passes += len(rows)
        if self.base is None:
            self.base = runs[0].logprobs if runs else ()
        return [differences(run.logprobs, self.base) for run in runs]

    def measure_floor(self) -> None:
        """What rounding alone makes, and boundaries dropped; where samples may round by others."""
        repeats = self.repeat is None or not self.repeat.any()
        if not any(gather(not repeats or _rounds(self.job.config))):
            return
        with rounded_otherwise(self.job.chunks, self.job.config):
            noise = self._moved([self.row])
        dropped = self._moved([as_one_sequence(self.row)])
        if noise:
            self.floor = largest([Size.of(noise[0]), Size.of(self.repeat)])
            self.dropped = dropped[0]

    def suspects(self) -> list[int]:
        """The samples nearest to the first of this replica's sequences that leaks."""
        known = gather((self.job.replica, self.leaking()))
        leaking = [sequence for replica, theirs in known if replica == self.job.replica
                   for sequence in theirs]  # fmt: skip
        if not leaking:
            return []
        return sorted(range(self.num_samples), key=lambda s: (abs(s - min(leaking)), s))[:NAMED]

    def leaking(self) -> list[int]:
        """The sequences that moved on this rank though they were not changed."""
        return [
            s for s in range(self.num_samples) if judge(self._untouched(s), self.floor) == WRONG
        ]

    def _untouched(self, sequence: int) -> Size:
        """The largest differences in passes that did not change a sequence."""
        return largest(Size.of(moved) for moved in self._others(sequence, self.passes))

    def _others(self, sequence: int, passes: Sequence) -> list[Tensor]:
        """What a sequence did in passes that did not change it: its positions on this rank."""
        span = self.spans[sequence]
        ours = self.owned[span]
        return [moved[span][ours] for changed, moved in passes if sequence not in changed]

    def leaks(self) -> list[Leak]:
        found = []
        for sequence in self.leaking():
            sees = set()
            for changed, moved in self.names:
                for part in self._others(sequence, [(changed, moved)]):
                    if judge(Size.of(part), self.floor) == WRONG:
                        sees |= changed
            at = self.owned[self.spans[sequence]].nonzero().flatten()
            first = min(
                int(at[part.nonzero()[0]])
                for part in self._others(sequence, self.passes)
                if judge(Size.of(part), self.floor) == WRONG
            )
            size = self._untouched(sequence).max
            found.append(Leak(self.job.rank, sequence, tuple(sorted(sees)), size, first))
        return found

    def blind(self) -> list[Blind]:
        """What the replica could not have seen."""
        found = []
        if self.num_samples < 2:
            found.append((None, "a row of one sample has nobody to see"))
        elif len(self.base):
            if not bool(self.base.isfinite().all()):
                found.append((None, "log-probabilities are not finite"))
            for sequence in range(self.num_samples):
                if not self._shows_its_change(sequence):
                    found.append((sequence, "its own change makes no difference behind it"))
                if self.dropped is not None and sequence and self._could_hide(sequence):
                    found.append((sequence, "a leak could hide in the rounding"))
        return [Blind(self.job.replica, *one) for one in found]

    def _shows_its_change(self, sequence: int) -> bool:
        """Whether a sample that is changed moves its own later positions."""
        span = self.spans[sequence]
        watched, later = self.content.watched[span], self.content.later[span]
        places = watched if bool(watched.any()) else later
        own = [Size.of(moved[span][places]) for who, moved in self.passes if sequence in who]
        return all(stands_out(size, self.floor) for size in own)

    def _could_hide(self, sequence: int) -> bool:
        found = self._untouched(sequence)
        dropped = Size.of(self.dropped[self.spans[sequence]])
        return judge(found, self.floor) == INCONCLUSIVE or not stands_out(dropped, found)


def _rounds(config) -> bool:
    """Whether what a token gives may be rounded by what other tokens are: how many rows an expert's
    matrix product has, and one scale for a tensor. Experts that drop tokens do more than that."""
    if getattr(config, "fp4", None):
        return True
    if getattr(config, "fp8", None):
        return str(getattr(config, "fp8_recipe", "")).endswith(("delayed", "tensorwise"))
    has_experts = getattr(config, "num_moe_experts", None) is not None
    return has_experts and getattr(config, "moe_expert_capacity_factor", None) is None
