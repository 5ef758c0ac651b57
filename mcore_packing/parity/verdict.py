"""What a check answers: right, wrong, or that it could not have told."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

RIGHT, WRONG, INCONCLUSIVE = "right", "wrong", "inconclusive"


class Finding:
    """What a check found: a dataclass with a ``verdict``."""

    verdict: str

    @property
    def is_right(self) -> bool:
        """Whether the verdict is "right"; an inconclusive one is not."""
        return self.verdict == RIGHT

    def to_dict(self) -> dict:
        """Everything that is a number or text, for logs."""
        return {**_plain(self), "verdict": self.verdict, "is_right": self.is_right}


@dataclass(frozen=True)
class Blind:
    """What a check could not have seen, in one data-parallel replica.

    Attributes:
        replica: its data-parallel rank.
        sequence: where, None for the whole row.
        reason: in words.
    """

    replica: int
    sequence: int | None
    reason: str


def blind_lines(blind: Iterable[Blind]) -> list[str]:
    """A line for each reason, with the sequences of each replica."""
    places = {}
    for one in blind:
        places.setdefault((one.replica, one.reason), []).append(one.sequence)
    lines = []
    for (replica, reason), sequences in places.items():
        named = ", ".join(str(sequence) for sequence in sequences if sequence is not None)
        lines.append(f"replica {replica}: {reason}" + (f" (sequences {named})" if named else ""))
    return lines


def worst(verdicts: Iterable[str]) -> str:
    """One verdict for several: wrong if one is, right only if all are."""
    verdicts = set(verdicts)
    return next((v for v in (WRONG, INCONCLUSIVE) if v in verdicts), RIGHT)


def _plain(value):
    """Of dataclasses, lists and dicts what is plain; tensors and layouts are left out."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {
            name: _plain(one)
            for name, one in value.items()
            if not isinstance(one, torch.Tensor) and not hasattr(one, "cu_seqlens_expanded")
        }
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
