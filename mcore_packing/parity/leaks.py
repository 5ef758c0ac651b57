"""Other samples' content changes, this sample's results must not: a check without a tolerance."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .content import Content, as_one_sequence, with_all_labels
from .job import Job, Run, gather, together
from .noise import Size, judge, largest, rounded_otherwise, stands_out
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
        job = Job(model, forward)
        moved = row.to(job.weight.device, job.weight.dtype)
        return _Trial(job, Content(with_all_labels(moved), keep_ids))

    trial = together(prepare)
    trial.run(_patterns(trial.num_samples, exhaustive))
    everyones = gather(trial.record)
    if any(record.leaks(Size(0, 0)) for record in everyones):
        trial.run([{sample} for sample in trial.suspects(everyones)], names=True)
        trial.measure_floor()
        everyones = gather(trial.record)
    return _conclude(everyones)


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


@dataclass(frozen=True)
class _Cell:
    """A sequence in a pass, on one rank, against the row as it is.

    Attributes:
        size: of its differences.
        position: the first that differs, counted from its start.
        control: the size of differences where its own change must show, None if nowhere.
    """

    size: Size
    position: int
    control: Size | None


@dataclass
class _Record:
    """What a rank has seen.

    Attributes:
        replica, rank: which rank it is.
        num_samples: of its row.
        passes: the samples that changed in each pass.
        cells: of each pass and sequence; empty where the rank has no log-probabilities.
        names: the passes that say who is seen.
        repeat: differences between two runs of the same row.
        rounds: whether experts or scales of a whole tensor round by what other samples hold.
        floor: of rounding, where it was measured.
        dropped: of each sequence, differences with all boundaries dropped, where it was measured.
        is_finite: whether all log-probabilities are.
        num_passes: how often rows were run.
    """

    replica: int
    rank: int
    num_samples: int
    rounds: bool
    passes: list[set[int]]
    cells: list[list[_Cell]]
    names: list[int]
    repeat: Size = Size(0, 0)
    floor: Size = Size(0, 0)
    dropped: list[Size] | None = None
    is_finite: bool = True
    num_passes: int = 2

    def leaks(self, floor: Size) -> list[int]:
        """The sequences that differ by more than rounding though they were not changed."""
        return [s for s in range(self.num_samples) if self.worst(s, floor) == WRONG]

    def worst(self, sequence: int, floor: Size) -> str:
        return judge(self.untouched(sequence), floor)

    def untouched(self, sequence: int) -> Size:
        """The largest differences of a sequence in passes that did not change it."""
        return largest(row[sequence].size for row in self._others(sequence))

    def _others(self, sequence: int) -> list[list[_Cell]]:
        pairs = zip(self.passes, self.cells, strict=False)
        return [cells for changed, cells in pairs if sequence not in changed]

    def sees(self, sequence: int, floor: Size) -> tuple[int, ...]:
        """Whose change alone changes a sequence."""
        found = set()
        for index in self.names:
            if sequence in self.passes[index]:
                continue
            if judge(self.cells[index][sequence].size, floor) == WRONG:
                found |= self.passes[index]
        return tuple(sorted(found))

    def leak(self, sequence: int, floor: Size) -> Leak:
        cells = [cells[sequence] for cells in self._others(sequence)]
        first = min(cell.position for cell in cells if judge(cell.size, floor) == WRONG)
        size = self.untouched(sequence)
        return Leak(self.rank, sequence, self.sees(sequence, floor), size.max, first)

    def hidden(self, floor: Size) -> list[tuple[int | None, str]]:
        """What this rank could not have seen."""
        if self.num_samples < 2:
            return [(None, "a row of one sample has nobody to see")]
        found = [] if self.is_finite else [(None, "log-probabilities are not finite")]
        for sequence in range(self.num_samples):
            pairs = zip(self.passes, self.cells, strict=False)
            own = [cells[sequence].control for changed, cells in pairs if sequence in changed]
            if any(size is not None and not stands_out(size, floor) for size in own):
                found.append((sequence, "its own change makes no difference behind it"))
            dropped, size = (self.dropped or [None] * self.num_samples)[sequence], None
            if dropped is not None and sequence:
                size = self.untouched(sequence)
                if judge(size, floor) == INCONCLUSIVE or not stands_out(dropped, size):
                    found.append((sequence, "a leak could hide in the rounding"))
        return found


class _Trial:
    """The passes of one check on this rank."""

    def __init__(self, job: Job, content: Content):
        self.job, self.content, self.row = job, content, content.row
        self.num_samples = self.row.layout.num_seqs
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.record = _Record(job.replica, rank, self.num_samples, _rounds(job.config), [], [], [])
        self.base = None
        layout = self.row.layout.to("cpu")
        positions, edges = job.positions(layout), layout.cu_seqlens_padded.long()
        real = ~layout.padding_mask[positions]
        self.sequence = (torch.searchsorted(edges, positions, right=True) - 1).where(real, -1)
        self.place = positions - edges[self.sequence]
        watched, later = content.watched[positions], content.later[positions]
        self.controls = [self._control(sequence, watched, later) for sequence in range(len(edges))]

    def _control(self, sequence: int, watched: Tensor, later: Tensor) -> Tensor:
        """Where a change of a sequence must show on this rank."""
        ours = self.sequence == sequence
        return ours & watched if bool((ours & watched).any()) else ours & later

    def run(self, passes: Sequence[set[int]], names: bool = False) -> None:
        """Run the row with other content in each set of samples; the first time also as it is."""
        record, first = self.record, self.base is None
        rows = [self.row] * 2 if first else []
        rows += [self.content.changed(samples) for samples in passes]
        runs = self.job.run(rows or [self.row])
        record.num_passes = len(rows) if first else record.num_passes + len(rows)
        if names:
            record.names = [*range(len(record.passes), len(record.passes) + len(passes))]
        record.passes += passes
        if not runs:
            self.base = ()
            return
        if first:
            self.base, again, *runs = runs
            record.repeat = Size.of(self._differences(again))
            record.is_finite = bool(self.base.logprobs.isfinite().all())
        record.cells += [self._cells(run) for run in runs[: len(passes)]]

    def _differences(self, run: Run) -> Tensor:
        """``[positions of this rank]``; what is nan in both is the same."""
        ours, theirs = self.base.logprobs, run.logprobs
        differences = (ours - theirs).abs()
        return differences.masked_fill((ours == theirs) | (ours.isnan() & theirs.isnan()), 0)

    def _cells(self, run: Run) -> list[_Cell]:
        differences = self._differences(run)
        return [self._cell(differences, sequence) for sequence in range(self.num_samples)]

    def _cell(self, differences: Tensor, sequence: int) -> _Cell:
        ours, control = self.sequence == sequence, self.controls[sequence]
        found = differences[ours]
        places = self.place[ours][found != 0]
        return _Cell(
            Size.of(found),
            int(places.min()) if places.numel() else -1,
            Size.of(differences[control]) if bool(control.any()) else None,
        )

    def suspects(self, everyones: Sequence[_Record]) -> list[int]:
        """The samples nearest to the first of this replica's sequences that leaks."""
        ours = [record for record in everyones if record.replica == self.job.replica]
        leaks = sorted({s for record in ours for s in record.leaks(Size(0, 0))})
        if not leaks:
            return []
        return sorted(range(self.num_samples), key=lambda s: (abs(s - leaks[0]), s))[:NAMED]

    def measure_floor(self) -> None:
        """What rounding alone makes, and what all boundaries dropped make; where it is needed."""
        record, job = self.record, self.job
        if not any(gather(record.rounds or record.repeat.max > 0)):
            return
        with rounded_otherwise(job.chunks, job.config):
            noise = job.run([self.row])
        one = as_one_sequence(self.row)
        runs = job.run([one])
        record.num_passes += 2
        if not runs:
            return
        floor = Size.of(self._differences(noise[0]))
        if record.rounds or record.repeat.max > 0:
            record.floor = largest([floor, record.repeat])
        found = job.in_order(runs[0], one.layout).logprobs
        known = job.in_order(self.base, self.row.layout).logprobs
        edges = self.row.layout.cu_seqlens_expanded.tolist()
        record.dropped = [
            Size.of((found - known)[begin:end].abs())
            for begin, end in zip(edges[:-1], edges[1:], strict=True)
        ]


def _rounds(config) -> bool:
    """Whether what a token gives may be rounded by what other tokens are: how many rows an expert's
    matrix product has, and one scale for a tensor. Experts that drop tokens do more than that."""
    if getattr(config, "fp4", None):
        return True
    if getattr(config, "fp8", None):
        return str(getattr(config, "fp8_recipe", "")).endswith(("delayed", "tensorwise"))
    has_experts = getattr(config, "num_moe_experts", None) is not None
    return has_experts and getattr(config, "moe_expert_capacity_factor", None) is None


def _conclude(everyones: Sequence[_Record]) -> Isolation:
    floors = {
        replica: largest(r.floor for r in everyones if r.replica == replica)
        for replica in {record.replica for record in everyones}
    }
    with_results = [record for record in everyones if record.cells or record.num_samples < 2]
    leaks = [
        record.leak(sequence, floors[record.replica])
        for record in with_results
        for sequence in record.leaks(floors[record.replica])
    ]
    blind = {
        Blind(record.replica, *found): None
        for record in with_results
        for found in record.hidden(floors[record.replica])
    }
    return Isolation(
        leaks=tuple(leaks),
        blind=tuple(blind),
        floor=max(floor.max for floor in floors.values()),
        num_passes=max(record.num_passes for record in everyones),
    )
