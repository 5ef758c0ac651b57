"""``RowSpec``: what a model asks of a row."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .context_parallel import chunks_of
from .errors import INT32_MAX, PackingError
from .inputs import as_choice, as_int, as_positive, as_size

if TYPE_CHECKING:
    from .layout import PackedLayout

ON_OVERFLOW = ("raise", "truncate")


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """What a model asks of a row; every layout carries the one it was made with.

    ``mp.row_spec(model)`` reads it off a model. Lengths count positions.

    Args:
        image_token_id: the placeholder of an image, one token.
        img_seq_len: what a tile becomes, where all become the same.
        seq_multiple: every sequence is padded to a multiple of it.
        total_multiple: the whole row is, too; ``seq_multiple`` divides it, or becomes part of it.
        max_length: the longest row that the model takes.
        fixed_length: the length that every row has, where the model takes no other.
        max_sequences: how many sequences attention gets of every row, the tail included, where its
            layers are captured as CUDA graphs; empty ones fill up.
        on_overflow: "raise" makes sequences that do not fit, with their padding, an error;
            "truncate" cuts them off, as Megatron does.
        expands: whether the model replaces placeholders itself, as ``LLaVAModel`` does. Without it
            ids are expanded already, and both spaces are one.
        cp_size: over how many context-parallel ranks the row is split.
        pad_token_id: what fills up a row of a model that does not expand.

    Raises:
        PackingError: a field of another type, or fields that contradict each other.

    Example:
        >>> spec = RowSpec(img_seq_len=576, seq_multiple=4, max_length=4096, cp_size=2)
        >>> spec.total_multiple
        4
        >>> RowSpec(seq_multiple=2, cp_size=2)
        Traceback (most recent call last):
        ...
        mcore_packing.errors.PackingError: seq_multiple is 2, but cp_size 2 cuts every sequence into 4 chunks: see mp.alignment
    """  # noqa: E501

    image_token_id: int = -200
    img_seq_len: int | None = None
    seq_multiple: int = 1
    total_multiple: int = 1
    max_length: int | None = None
    fixed_length: int | None = None
    max_sequences: int | None = None
    on_overflow: str = "raise"
    expands: bool = True
    cp_size: int = 1
    pad_token_id: int = 0

    def __post_init__(self):
        for name in ("image_token_id", "pad_token_id"):
            self._set(name, as_int(getattr(self, name), name))
        for name in ("seq_multiple", "total_multiple", "cp_size"):
            self._set(name, as_positive(getattr(self, name), name))
        for name in ("img_seq_len", "max_sequences"):
            if getattr(self, name) is not None:
                self._set(name, as_positive(getattr(self, name), name))
        self._set("total_multiple", math.lcm(self.seq_multiple, self.total_multiple))
        for name in ("max_length", "fixed_length"):
            self._set(name, as_size(getattr(self, name), name, self.total_multiple))
        as_choice(self.on_overflow, "on_overflow", ON_OVERFLOW)
        if not isinstance(self.expands, bool):
            raise PackingError(f"expands is {self.expands!r}, expected True or False")
        if self.seq_multiple % chunks_of(self.cp_size):
            raise PackingError(
                f"seq_multiple is {self.seq_multiple}, but cp_size {self.cp_size} cuts every "
                f"sequence into {chunks_of(self.cp_size)} chunks: see mp.alignment"
            )
        if None not in (self.fixed_length, self.max_length) and self.fixed_length > self.max_length:
            raise PackingError(
                f"fixed_length is {self.fixed_length}, expected at most max_length = "
                f"{self.max_length}"
            )

        for name, value in vars(self).items():
            if type(value) is int and not -INT32_MAX - 1 <= value <= INT32_MAX:
                raise PackingError(f"{name} is {value}, more than int32 holds")

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)

    @property
    def longest(self) -> int | None:
        """How many positions a row has at most, None where there is no limit."""
        return self.max_length if self.fixed_length is None else self.fixed_length

    def to_ints(self) -> list[int]:
        """The fields in their order, None as -1, for the header of a layout's tensor."""
        values = vars(self) | {"on_overflow": ON_OVERFLOW.index(self.on_overflow)}
        return [-1 if values[name] is None else int(values[name]) for name in SPEC_FIELDS]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> "RowSpec":
        """The spec of which ``to_ints`` gave these."""
        values = dict(zip(SPEC_FIELDS, ints, strict=True))
        for name in ("img_seq_len", "max_length", "fixed_length", "max_sequences"):
            values[name] = None if values[name] == -1 else values[name]
        values["on_overflow"] = ON_OVERFLOW[values["on_overflow"]]
        values["expands"] = bool(values["expands"])
        return cls(**values)

    def length_of(self, num_positions: int, num_seqs: int) -> int:
        """How long a row of so many real positions is: exactly, if its sequences need no padding;
        else at most.

        Raises:
            PackingError: it has too many sequences.
        """
        self.check_room(num_seqs)
        if self.fixed_length is not None:
            return self.fixed_length
        most = num_positions + num_seqs * (self.seq_multiple - 1)
        length = round_up(max(most, 0), self.total_multiple)
        return length if self.max_length is None else min(length, self.max_length)

    def check_room(self, num_seqs: int) -> None:
        """Refuse a row with more sequences than captured layers have room for."""
        if self.max_sequences is not None and num_seqs >= self.max_sequences:
            raise PackingError(
                f"the row has {num_seqs + 1} sequences, the tail included, but layers are captured "
                f"with room for max_sequences={self.max_sequences}"
            )

    def check(self, layout: "PackedLayout") -> None:
        """Refuse a layout that was made for another model.

        Equal are ``expands``, ``fixed_length``, ``max_sequences``, and ``image_token_id`` where the
        row has images; both multiples divide those of the layout; the layout is at most
        ``max_length`` long. ``img_seq_len``, ``on_overflow`` and ``cp_size`` make no difference.

        Raises:
            PackingError: it does not fit; names the field.
        """
        wrong = None if layout.spec == self else self._difference(layout)
        if wrong is None and self.max_length is not None and layout.num_expanded > self.max_length:
            wrong = (
                f"has {layout.num_expanded} positions, more than the {self.max_length} that this "
                f"model takes"
            )
        if wrong:
            raise PackingError(
                f"the layout that came with this row {wrong}; build it with mp.row_spec(model)"
            )

    def _difference(self, layout: "PackedLayout") -> str | None:
        for name in ("expands", "fixed_length", "max_sequences", "image_token_id"):
            found, expected = getattr(layout.spec, name), getattr(self, name)
            if found != expected and (name != "image_token_id" or layout.num_images):
                return f"was made with {name}={found}, but this model asks for {expected}"
        for name in ("seq_multiple", "total_multiple"):
            found, expected = getattr(layout.spec, name), getattr(self, name)
            if found % expected:
                return f"was made with {name}={found}, but this model asks for {expected}"
        return None


SPEC_FIELDS = tuple(field.name for field in dataclasses.fields(RowSpec))


def as_spec(spec) -> RowSpec:
    """A ``RowSpec``, and nothing else."""
    if not isinstance(spec, RowSpec):
        raise PackingError(
            f"spec is {spec!r}, expected a mp.RowSpec: what mp.row_spec(model) gives, or "
            f"mp.RowSpec(image_token_id=...)"
        )
    return spec


def round_up(value: int, multiple: int) -> int:
    """The next multiple at or above ``value``."""
    return -(-value // multiple) * multiple
