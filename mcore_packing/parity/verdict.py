"""What a check answers: right, wrong, or that it could not have told."""

import dataclasses
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
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: _plain(value) for name, value in fields.items() if _is_plain(value)}
        return plain | {"verdict": self.verdict, "is_right": self.is_right}


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



def blind_lines(blind) -> list[str]:
    """A line for each reason, with the sequences of each replica."""
    places = {}
    for one in blind:
        places.setdefault((one.replica, one.reason), []).append(one.sequence)
    return [
        f"replica {replica}: {reason}" + _where(sequences)
        for (replica, reason), sequences in places.items()
    ]


def _where(sequences: list) -> str:
    named = ", ".join(str(sequence) for sequence in sequences if sequence is not None)
    return f" (sequences {named})" if named else ""


def worst(verdicts) -> str:
    """One verdict for several: wrong if one is, right only if all are."""
    verdicts = set(verdicts)
    return next((v for v in (WRONG, INCONCLUSIVE) if v in verdicts), RIGHT)


def _is_plain(value) -> bool:
    return not isinstance(value, torch.Tensor) and not hasattr(value, "cu_seqlens_expanded")


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value
