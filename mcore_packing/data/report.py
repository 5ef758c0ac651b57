"""What packing did: how full the rows are, where the rest went, which samples were refused."""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field, replace

SHOWN = 10  # refused samples that a printed report names


@dataclass(frozen=True)
class Refused:
    """A sample that is in no row.

    Attributes:
        index: of the sample, in what was packed.
        key: its ``__key__``, where it has one.
        cause: the class of the error, in a word.
        reason: what is wrong with it, and what to do.
    """

    index: int
    key: str | None
    cause: str
    reason: str

    def __str__(self) -> str:
        return f"{name_of(self.index, self.key)}: {self.reason}"


@dataclass(frozen=True)
class Truncated:
    """A sample that was cut to fit its row.

    Attributes:
        index: of the sample, in what was packed.
        key: its ``__key__``, where it has one.
        tokens: how many of its tokens are gone, its placeholders among them.
        trained: how many tokens that were trained are not any more.
        images: how many images are gone.
    """

    index: int
    key: str | None
    tokens: int
    trained: int
    images: int


def key_of(sample) -> str | None:
    """The ``__key__`` of a sample, where it is one and has one."""
    return sample.get("__key__") if isinstance(sample, dict) else None


def name_of(index: int, key: str | None) -> str:
    """A sample, as messages name it."""
    return f"sample {index}" if key is None else f"sample {index} ({key})"


@dataclass(frozen=True)
class Report:
    """Of rows that were packed; those of several buffers add up.

    Attributes:
        num_samples: how many were given, refused ones included.
        num_rows: how many rows they became.
        capacity: of a row, in positions.
        num_real: positions of all packed samples.
        num_aligned: the same, every sample rounded up to ``seq_multiple``.
        refused: the samples that are in no row.
        left_out: what samples have that is in no row, by name, and how many have it.
        untrained: index and key of the packed samples without a trained token.
        num_empty: how many of the rows only fill up a job.
        imbalance: where rows were balanced, how much more than the mean the row that costs most
            costs, before and after; of several reports the largest.
        truncated: the packed samples that were cut to fit, and how much of each.
    """

    num_samples: int = 0
    num_rows: int = 0
    capacity: int = 0
    num_real: int = 0
    num_aligned: int = 0
    refused: tuple[Refused, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    untrained: tuple[tuple[int, str | None], ...] = ()
    num_empty: int = 0
    imbalance: tuple[float, float] | None = None
    truncated: tuple[Truncated, ...] = ()

    @property
    def fill(self) -> float:
        """The share of all rows' capacity that real positions take."""
        return self._share(self.num_real)

    @property
    def fill_aligned(self) -> float:
        """The same, with the padding of each sample counted as full."""
        return self._share(self.num_aligned)

    @property
    def waste(self) -> dict[str, float]:
        """The rest of the capacity by its cause: padding of samples, and the ends of rows."""
        return {
            "alignment": self.fill_aligned - self.fill,
            "row tails": 1 - self.fill_aligned if self.num_rows else 0.0,
        }

    @property
    def num_untrained(self) -> int:
        """How many packed samples have no trained token."""
        return len(self.untrained)

    @property
    def cut_off(self) -> dict[str, int]:
        """How many samples were cut to fit, and what of them is in no row."""
        parts = {
            name: sum(getattr(one, name) for one in self.truncated)
            for name in ("tokens", "trained", "images")
        }
        return {"samples": len(self.truncated), **parts}

    @property
    def causes(self) -> Counter:
        """How many samples were refused, by cause."""
        return Counter(refused.cause for refused in self.refused)

    def to_dict(self) -> dict:
        """All figures, for a log: plain numbers, text, lists and dicts of them."""
        return {
            **dataclasses.asdict(self),
            "fill": self.fill,
            "fill_aligned": self.fill_aligned,
            "waste": self.waste,
            "causes": dict(self.causes),
            "cut_off": self.cut_off,
            "num_untrained": self.num_untrained,
        }

    def say_cut(self) -> str:
        """What was cut off, in a line."""
        gone, names = self.cut_off, _names([(one.index, one.key) for one in self.truncated])
        return (
            f"cut to fit {gone['samples']:,}, by {gone['tokens']:,} tokens ({gone['trained']:,} "
            f"trained) and {gone['images']:,} images: {names}"
        )

    def _share(self, positions: int) -> float:
        return positions / (self.num_rows * self.capacity) if self.num_rows else 0.0

    def __add__(self, other: "Report") -> "Report":
        """Both together; the samples of ``other`` come after those of this one."""

        def moved(entries):
            return (replace(entry, index=self.num_samples + entry.index) for entry in entries)

        return Report(
            self.num_samples + other.num_samples,
            self.num_rows + other.num_rows,
            max(self.capacity, other.capacity),
            self.num_real + other.num_real,
            self.num_aligned + other.num_aligned,
            (*self.refused, *moved(other.refused)),
            dict(Counter(self.left_out) + Counter(other.left_out)),
            (*self.untrained, *((self.num_samples + index, key) for index, key in other.untrained)),
            self.num_empty + other.num_empty,
            _larger(self.imbalance, other.imbalance),
            (*self.truncated, *moved(other.truncated)),
        )

    def __str__(self) -> str:
        packed = self.num_samples - len(self.refused)
        wasted = ", ".join(f"{share:.1%} {cause}" for cause, share in self.waste.items())
        lines = [
            f"{packed:,} of {self.num_samples:,} samples in {self.num_rows:,} rows of "
            f"{self.capacity:,}: {self.fill:.1%} filled, {self.fill_aligned:.1%} with alignment; "
            f"wasted: {wasted}"
        ]
        if self.num_empty:
            lines.append(f"empty rows, which fill up the job: {self.num_empty:,}")
        if self.imbalance is not None:
            before, after = self.imbalance
            lines.append(
                f"the row that costs most: {before:.1%} above the mean, {after:.1%} balanced"
            )
        if self.left_out:
            names = ", ".join(f"{name!r} of {count:,}" for name, count in self.left_out.items())
            lines.append(f"left out of rows, since it is not plain: {names}")
        if self.untrained:
            names = _names(self.untrained)
            lines.append(f"without a trained token {self.num_untrained:,}: {names}")
        if self.truncated:
            lines.append(self.say_cut())
        if self.refused:
            causes = ", ".join(f"{count:,} {cause}" for cause, count in self.causes.most_common())
            lines.append(f"refused {len(self.refused):,}: {causes}")
            lines += [f"  {refused}" for refused in self.refused[:SHOWN]]
            if len(self.refused) > SHOWN:
                lines.append(f"  and {len(self.refused) - SHOWN:,} more: see report.refused")
        return "\n".join(lines)


def _names(samples) -> str:
    """The first few of samples."""
    more = ", ..." if len(samples) > SHOWN else ""
    return ", ".join(name_of(*one) for one in samples[:SHOWN]) + more


def _larger(one, other):
    """Of two imbalances, either of which may be None, the larger of each figure."""
    known = [pair for pair in (one, other) if pair is not None]
    return tuple(map(max, zip(*known, strict=True))) if known else None
