"""``PackedLayout``: the invertible map between both spaces of one packed row."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from . import ops, reference
from .errors import INT32_MAX, PackingError
from .faults import Fault, Status, check_images_per_seq, explain
from .reference import LayoutMaps
from .space import Space, check_space, find_space

# An upper bound is rounded up to this, so that mcore's RoPE cache (32 entries) sees few values.
MAX_SEQLEN_STEP = 1024

# The integers in front of a layout's tensor form. ``version`` says that it is one.
_HEADER = (
    "version", "num_collapsed", "num_images", "num_seqs", "num_expanded", "num_image_rows",
    "max_seqlen", "seq_multiple", "has_tail", "image_token_id", "space", "is_int64", "num_cut",
)  # fmt: skip
_VERSION = 0x6C617932  # "lay2"
_SPACES = (None, "collapsed", "expanded")


@dataclass(frozen=True, eq=False, repr=False)
class PackedLayout:
    """Where every token and every image row of one packed row stands, before and after expansion.

    Built once per row by ``build`` and only read afterwards. Tensors live on the device of the row;
    what the host knows is a Python int. Images move tokens, ``seq_start_expanded`` cuts the moved
    row into sequences, and ``cu_seqlens_padded`` places each sequence in the physical row. The last
    sequence is the tail: what lies past the last boundary, possibly nothing.

    A pipeline stage without tokens needs boundaries only. Its layout, which ``from_tensor`` and
    ``from_boundaries`` make, has None for everything that counts tokens or images.

    Attributes:
        cu_seqlens_expanded: int32 ``[B + 1]``, real boundaries in expanded space.
        cu_seqlens_padded: int32 ``[B + 2]``, physical offsets in expanded space; the last sequence
            is the tail.
        status: int64 ``[6]``, what is wrong with the row, and its longest sequence
            (``faults.Status``).
        num_expanded: ``S``, the physical length of the expanded row.
        max_seqlen: the longest padded sequence; where ``is_exact`` is False, an upper bound.
        seq_multiple: every padded sequence is a multiple of it.
        has_tail: False where the host knows that the tail is empty.
        is_exact: whether the host has read ``status``: then nothing is wrong with the row, and
            ``max_seqlen`` is exact.
        space: what the boundaries that were given counted, "collapsed" or "expanded"; None where
            ``space="auto"`` found that both are the same.
        image_token_id: the placeholder.
        num_collapsed: ``T``.
        num_image_rows: the sum of ``tokens_per_image``, None where the host does not know it.
        input_ids: integer ``[T]``, the collapsed row.
        expanded_start: int32 ``[T + 1]``, ``t + sum of (tokens_per_image - 1)`` over the
            placeholders before ``t``: where token ``t`` starts if nothing is padded.
        image_start: int32 ``[N]``, ``expanded_start`` of each placeholder.
        cu_image_rows: int32 ``[N + 1]``, prefix sums of ``tokens_per_image``.
        seq_start_collapsed: int32 ``[B + 2]``, the token each sequence starts with, and ``T``.
        seq_start_expanded: int32 ``[B + 2]``, the same if nothing is padded, and the length.
        cu_seqlens_collapsed: int32 ``[B + 1]``, real boundaries in tokens.
        num_cut: how many tokens fell off the end of the row, where the host has looked. Boundaries
            that the data path cut at ``max_expanded`` are consent: then it is 0.
    """

    cu_seqlens_expanded: Tensor
    cu_seqlens_padded: Tensor
    status: Tensor
    num_expanded: int
    max_seqlen: int
    seq_multiple: int
    has_tail: bool
    is_exact: bool
    space: Space | None
    image_token_id: int | None = None
    num_collapsed: int | None = None
    num_image_rows: int | None = None
    input_ids: Tensor | None = None
    expanded_start: Tensor | None = None
    image_start: Tensor | None = None
    cu_image_rows: Tensor | None = None
    seq_start_collapsed: Tensor | None = None
    seq_start_expanded: Tensor | None = None
    cu_seqlens_collapsed: Tensor | None = None
    num_cut: int | None = None

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        tokens_per_image: Tensor | Sequence,
        image_token_id: int = -200,
        space: str = "auto",
        num_image_rows: int | None = None,
        num_padded_rows: int | None = None,
        seq_multiple: int = 1,
        total_multiple: int = 1,
        max_expanded: int | None = None,
        cu_seqlens_padded: Tensor | None = None,
        on_overflow: str = "raise",
        strict: bool = False,
    ) -> "PackedLayout":
        """Lay out one packed row.

        On a CPU, and wherever the host knows neither ``num_image_rows`` nor ``num_padded_rows``, it
        looks at the values: the layout is exact, and a bad row raises at once. Given either, and a
        ``space``, building on a GPU costs one kernel launch and no host synchronisation; sizes are
        then upper bounds, the tail takes the surplus, and ``check`` raises what the kernel found.

        Args:
            input_ids: integer ``[T]`` or ``[1, T]``, placeholders included.
            cu_seqlens: int32 ``[B + 1]`` on the same device, starting at 0, never decreasing.
            tokens_per_image: integer ``[N]``, how many rows each placeholder becomes, in order; or
                one list per sequence, which also checks how many images each sequence has.
            image_token_id: the placeholder's id.
            space: the space of ``cu_seqlens``: "collapsed", "expanded", or "auto", which asks the
                values and refuses a row that could be either.
            num_image_rows: the sum of ``tokens_per_image``, where the host knows it.
            num_padded_rows: the physical length ``S``, where the host knows it.
            seq_multiple: pad every sequence to a multiple of this many rows.
            total_multiple: pad the whole row to a multiple of this many rows.
            max_expanded: the longest row that the model takes. What does not fit of the tail is cut
                off.
            cu_seqlens_padded: int32 ``[B + 1]``, the physical offsets of the sequences in the given
                row, where it is padded between sequences; ``cu_seqlens`` then counts real tokens.
            on_overflow: "raise" makes padded sequences that do not fit an error, "truncate" cuts
                them off, as Megatron does.
            strict: whether boundaries are an error that ``space="auto"`` would not find to be in
                this space. Otherwise only those are that it would find to be in the other one.

        Returns:
            The layout.

        Raises:
            PlaceholderMismatch: placeholders and ``tokens_per_image`` differ in number.
            BoundarySpaceError: ``space="auto"`` and the answer is not certain, or boundaries that
                are not what they were said to be.
            PackingError: anything else that is wrong with the row, with the place.

        Example:
            Three samples, two images of 3 and 4 rows:

            >>> ids = torch.tensor([11, 12, -200, 13, -200, 21, 22, 31, 32, 33])
            >>> cu_seqlens = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
            >>> rows = torch.tensor([3, 4])
            >>> layout = PackedLayout.build(ids, cu_seqlens, rows, space="collapsed")
            >>> layout.cu_seqlens_expanded.tolist(), layout.num_expanded
            ([0, 6, 12, 15], 15)
            >>> padded = PackedLayout.build(ids, cu_seqlens, rows, seq_multiple=8)
            >>> padded.cu_seqlens_padded.tolist()
            [0, 8, 16, 24, 24]
        """
        input_ids = as_row(input_ids, "input_ids")
        cu_seqlens = as_boundaries(cu_seqlens, "cu_seqlens", like=input_ids)
        if cu_seqlens_padded is not None:
            cu_seqlens_padded = as_boundaries(
                cu_seqlens_padded, "cu_seqlens_padded", input_ids, cu_seqlens.numel()
            )
        rows, images_per_seq = _as_tokens_per_image(
            tokens_per_image, input_ids, cu_seqlens.numel() - 1
        )
        image_token_id = _as_int(image_token_id, "image_token_id")
        num_image_rows = _as_size(num_image_rows, "num_image_rows")
        seq_multiple, total_multiple = as_multiples(seq_multiple, total_multiple)
        num_padded_rows = _as_size(num_padded_rows, "num_padded_rows", total_multiple)
        max_expanded = _as_size(max_expanded, "max_expanded", total_multiple)
        truncates = check_on_overflow(on_overflow) == "truncate"
        if check_space(space) == "auto":
            physical = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
            space = find_space(input_ids, physical, rows, image_token_id, max_expanded)
        looks = may_look(input_ids) or (num_image_rows is None and num_padded_rows is None)

        # The physical length: exact without padding between sequences, else a bound.
        num_tokens, num_images, num_seqs = input_ids.numel(), rows.numel(), cu_seqlens.numel() - 1
        known_rows = num_image_rows
        if known_rows is None and looks:
            known_rows = int(rows.long().clamp(1, INT32_MAX).sum())
        if num_padded_rows is not None:
            num_rows = num_padded_rows
            if max_expanded is not None and num_rows > max_expanded:
                raise PackingError(
                    f"num_padded_rows is {num_rows}, expected at most max_expanded={max_expanded}"
                )
        else:
            bound = num_tokens - num_images + known_rows + num_seqs * (seq_multiple - 1)
            num_rows = round_up(max(bound, 0), total_multiple)
            if max_expanded is not None:
                num_rows = min(num_rows, max_expanded)
        if num_rows > INT32_MAX:
            if not looks:
                raise PackingError(
                    f"the expanded row has {num_rows} rows, more than int32 can count"
                )
            num_rows = INT32_MAX // total_multiple * total_multiple

        maps = LayoutMaps(*ops.layout(
            input_ids, cu_seqlens, cu_seqlens_padded, rows, image_token_id, space == "expanded",
            strict, -1 if num_image_rows is None else num_image_rows,
            -1 if max_expanded is None else max_expanded, num_rows, seq_multiple, truncates,
        ))  # fmt: skip
        layout = cls(
            **maps._asdict(),
            input_ids=input_ids,
            num_expanded=num_rows,
            max_seqlen=max_seqlen_bound(num_rows),
            seq_multiple=seq_multiple,
            has_tail=True,
            is_exact=False,
            space=space,
            image_token_id=image_token_id,
            num_collapsed=num_tokens,
            num_image_rows=known_rows,
        )
        if not looks:
            return layout
        layout = layout.exact_later()()
        was_cut_before = space == "expanded" and int(cu_seqlens[-1]) == max_expanded
        lengths, widths = layout.seq_start_expanded.diff(), layout.cu_seqlens_padded.diff()
        fits = was_cut_before or bool((lengths <= widths).all())
        num_cut = 0 if fits else int(layout.is_cut.sum())
        layout = dataclasses.replace(layout, num_cut=num_cut)
        if images_per_seq is not None:
            check_images_per_seq(layout, images_per_seq)
        return layout._without_surplus(total_multiple) if num_padded_rows is None else layout

    @classmethod
    def from_boundaries(
        cls,
        cu_seqlens: Tensor,
        num_rows: int,
        seq_multiple: int = 1,
        cu_seqlens_padded: Tensor | None = None,
        on_overflow: str = "raise",
    ) -> "PackedLayout":
        """The layout of a stage without tokens, from boundaries that are expanded already.

        Nothing is padded any more: what is behind the last boundary is the tail.

        Args:
            cu_seqlens: int32 ``[B + 1]``, real boundaries.
            num_rows: ``S``, how many rows the stage has, those of all its ranks together.
            seq_multiple: what every sequence is a multiple of.
            cu_seqlens_padded: int32 ``[B + 1]``, physical offsets, where they differ.
            on_overflow: as in ``build``.

        Raises:
            PackingError: boundaries that decrease, lie beyond the row or do not divide; at once on
                a CPU, on a GPU where ``exact_later`` or ``check`` ask.

        Example:
            >>> cu_seqlens = torch.tensor([0, 579, 1157], dtype=torch.int32)
            >>> PackedLayout.from_boundaries(cu_seqlens, 1160).cu_seqlens_padded.tolist()
            [0, 579, 1157, 1160]
        """
        cu_seqlens = as_boundaries(cu_seqlens, "cu_seqlens")
        physical = cu_seqlens
        if cu_seqlens_padded is not None:
            physical = as_boundaries(
                cu_seqlens_padded, "cu_seqlens_padded", cu_seqlens, cu_seqlens.numel()
            )
        truncates = check_on_overflow(on_overflow) == "truncate"
        padded = torch.cat([physical.clamp(0, num_rows), torch.full_like(physical[:1], num_rows)])
        room = padded.diff().clamp(min=0)
        real = torch.cat([physical[:1] * 0, cu_seqlens.diff().clamp(min=0).minimum(room[:-1])])
        layout = cls(
            cu_seqlens_expanded=real.cumsum(0).int(),
            cu_seqlens_padded=padded,
            status=_find_stage_fault(cu_seqlens, physical, room, num_rows, seq_multiple, truncates),
            num_expanded=num_rows,
            max_seqlen=max_seqlen_bound(num_rows),
            seq_multiple=seq_multiple,
            has_tail=True,
            is_exact=False,
            space="expanded",
        )
        return layout.exact_later()() if may_look(cu_seqlens) else layout

    # Between devices and processes

    def to(self, device, non_blocking: bool = False) -> "PackedLayout":
        """The same layout on another device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedLayout":
        """The same layout in pinned memory; a ``DataLoader`` calls this."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function) -> "PackedLayout":
        tensors = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def to_tensor(self, size: int | None = None, boundaries_only: bool = False) -> Tensor:
        """The layout as one integer tensor, for Megatron's ``broadcast_data`` and for pipeline
        stages; ``from_tensor`` is the inverse.

        Args:
            size: how long the tensor should be, so that every micro-batch has the same shape:
                ``tensor_size`` says what a row needs. By default as long as this row needs.
            boundaries_only: leave out all that a stage without tokens does not need.

        Returns:
            int32 ``[size]``: some integers that describe the rest, the rest, and zeros.

        Raises:
            PackingError: the row needs more than ``size``, or has a token id beyond int32; and what
                ``check`` raises, where nobody has looked yet.

        Example:
            >>> ids = torch.tensor([11, 12, -200])
            >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
            >>> layout = PackedLayout.build(ids, cu_seqlens, [9], space="collapsed", seq_multiple=4)
            >>> sent = layout.to_tensor(PackedLayout.tensor_size(num_seqs=8), boundaries_only=True)
            >>> received = PackedLayout.from_tensor(sent)
            >>> received.cu_seqlens_padded.tolist(), received.max_seqlen
            ([0, 4, 16, 16], 12)
        """
        layout = self if self.is_exact else self.exact_later()()
        boundaries_only = boundaries_only or not self.has_tokens
        header = {
            "version": _VERSION,
            "num_seqs": self.num_seqs,
            "num_expanded": layout.num_expanded,
            "max_seqlen": layout.max_seqlen,
            "seq_multiple": layout.seq_multiple,
            "has_tail": layout.has_tail,
            "space": _SPACES.index(layout.space),
        }
        if not boundaries_only:
            ids = layout.input_ids
            header |= {
                "num_collapsed": layout.num_collapsed,
                "num_images": layout.image_start.numel(),
                "num_image_rows": layout.num_image_rows,
                "image_token_id": layout.image_token_id,
                "is_int64": ids.dtype == torch.int64,
                "num_cut": -1 if layout.num_cut is None else layout.num_cut,
            }
            if ids.dtype == torch.int64 and not torch.equal(ids.int().long(), ids):
                raise PackingError("input_ids hold an id beyond int32, which this tensor cannot")
        words = [int(header.get(name) or 0) for name in _HEADER]
        names = _parts(header["num_seqs"], header.get("num_collapsed"), header.get("num_images"))
        parts = [getattr(layout, name).int() for name in names]
        device = layout.cu_seqlens_padded.device
        tensor = torch.cat([torch.tensor(words, dtype=torch.int32, device=device), *parts])
        if size is None:
            return tensor
        if tensor.numel() > size:
            raise PackingError(
                f"the layout needs {tensor.numel()} integers, but size={size}; "
                f"PackedLayout.tensor_size says what a row needs"
            )
        return torch.nn.functional.pad(tensor, (0, size - tensor.numel()))

    @staticmethod
    def tensor_size(
        num_seqs: int, num_tokens: int | None = None, num_images: int | None = None
    ) -> int:
        """How many integers ``to_tensor`` needs for a row of at most so many sequences; tokens and
        images count too, unless it gives boundaries only."""
        return len(_HEADER) + sum(_parts(num_seqs, num_tokens, num_images).values())

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "PackedLayout":
        """The layout that ``to_tensor`` made a tensor of.

        Args:
            tensor: integer ``[size]`` or ``[1, size]``, on any device. Reads its first entries, so
                it synchronises once on a GPU.

        Returns:
            The layout, on the device of ``tensor`` and made of its memory where that is int32. One
            that was sent as boundaries only has no tokens.

        Raises:
            PackingError: it is not such a tensor.
        """
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PackingError(f"the layout is {found}, expected the int32 tensor of to_tensor()")
        tensor = tensor[0] if tensor.dim() == 2 and tensor.shape[0] == 1 else tensor
        if tensor.dim() != 1 or tensor.numel() < len(_HEADER):
            raise PackingError(f"the layout is {list(tensor.shape)}, expected that of to_tensor()")
        words = dict(zip(_HEADER, tensor[: len(_HEADER)].tolist(), strict=True))
        parts = _parts(words["num_seqs"], words["num_collapsed"] or None, words["num_images"])
        if words["version"] != _VERSION or len(_HEADER) + sum(parts.values()) > tensor.numel():
            raise PackingError(
                f"a tensor of {tensor.numel()} integers that begins with {words['version']} is not "
                f"what PackedLayout.to_tensor() gives"
            )
        pieces = (
            tensor[len(_HEADER) :]
            .int()
            .split([*parts.values(), tensor.numel() - len(_HEADER) - sum(parts.values())])
        )
        layout = cls(
            **dict(zip(parts, pieces, strict=False)),
            status=torch.zeros(len(Status._fields), dtype=torch.int64, device=tensor.device),
            is_exact=True,
            space=_SPACES[words["space"]],
            has_tail=bool(words["has_tail"]),
            **{name: words[name] for name in ("num_expanded", "max_seqlen", "seq_multiple")},
        )
        if not layout.has_tokens:
            return layout
        ids = layout.input_ids
        return dataclasses.replace(
            layout,
            input_ids=ids.long() if words["is_int64"] else ids,
            num_cut=None if words["num_cut"] < 0 else words["num_cut"],
            **{name: words[name] for name in ("num_collapsed", "num_image_rows", "image_token_id")},
        )

    # What is wrong with a row

    def check(self) -> None:
        """Raise what is wrong with the row, if anything is (synchronises on a GPU).

        Raises:
            PlaceholderMismatch, BoundarySpaceError, PackingError: as ``build`` says.
        """
        self._check(Status(*self.status.tolist()))

    def _check(self, status: Status) -> None:
        if status.fault:
            raise explain(self, status)

    def exact_later(self) -> Callable[[], "PackedLayout"]:
        """Queue a copy of ``status`` to the host, and return a function that waits for it.

        That function gives the layout with its exact ``max_seqlen``, or raises what ``check``
        raises. What is queued on the GPU in between keeps it busy while the host waits.
        """
        read = read_later(self.status)

        def wait() -> "PackedLayout":
            status = Status(*read())
            self._check(status)
            known = status.num_image_rows if self.has_tokens else None
            return dataclasses.replace(
                self, max_seqlen=status.max_seqlen, num_image_rows=known, is_exact=True
            )

        return wait

    def _without_surplus(self, total_multiple: int) -> "PackedLayout":
        """The row as short as it can be: a bound leaves rows in the tail that nobody needs."""
        cu_padded, starts = self.cu_seqlens_padded.clone(), self.seq_start_expanded
        last = int(cu_padded[-2])
        needed = last + int(starts[-1] - starts[-2])
        num_rows = min(round_up(needed, total_multiple), self.num_expanded)
        cu_padded[-1] = num_rows
        return dataclasses.replace(
            self,
            cu_seqlens_padded=cu_padded,
            num_expanded=num_rows,
            max_seqlen=int(cu_padded.diff().max()),
            has_tail=num_rows > last,
        )

    # What is known of a row

    @property
    def has_tokens(self) -> bool:
        """False for the layout of a stage without tokens."""
        return self.input_ids is not None

    @property
    def num_seqs(self) -> int:
        """``B``, the tail not counted."""
        return self.cu_seqlens_expanded.numel() - 1

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[S]``, restarting in every sequence."""
        return _find_seq(self.cu_seqlens_padded, self.num_expanded)[1]

    @property
    def position_ids_collapsed(self) -> Tensor:
        """int64 ``[T]``, restarting in every sequence, as ``learned_absolute`` needs it."""
        return _find_seq(self.seq_start_collapsed, self.num_collapsed)[1].clamp(min=0)

    @property
    def padding_mask(self) -> Tensor:
        """bool ``[S]``, True for padding: behind each sequence's real rows, and the whole tail."""
        seq, offset = _find_seq(self.cu_seqlens_padded, self.num_expanded)
        length = torch.nn.functional.pad(self.cu_seqlens_expanded.diff(), (0, 1))
        return offset >= length.index_select(0, seq)

    @property
    def tail_rows(self) -> Tensor:
        """int32 ``[1]``, the rows of the tail that are not padding."""
        room = self.cu_seqlens_padded[-1:] - self.cu_seqlens_padded[-2:-1]
        if self.seq_start_expanded is None:
            return room
        rows = self.seq_start_expanded[-1:] - self.seq_start_expanded[-2:-1]
        return rows.clamp(min=0).minimum(room)

    @property
    def is_cut(self) -> Tensor:
        """bool ``[T]``, True for tokens whose first row fell off the end of the expanded row."""
        seq, _ = _find_seq(self.seq_start_collapsed, self.num_collapsed)
        start = self.expanded_start.narrow(0, 0, self.num_collapsed)
        offset = start - self.seq_start_expanded.index_select(0, seq)
        return offset >= self.cu_seqlens_padded.diff().index_select(0, seq)

    def __repr__(self) -> str:
        device = self.cu_seqlens_padded.device
        if not self.has_tokens:
            return f"PackedLayout({self.num_seqs} sequences, {self.num_expanded} rows, {device})"
        return (
            f"PackedLayout({self.num_seqs} sequences, {self.image_start.numel()} images, "
            f"{self.num_collapsed} tokens -> {self.num_expanded} rows, {device})"
        )


def remap_cu_seqlens(
    cu_seqlens: Tensor,
    input_ids: Tensor,
    tokens_per_image: Tensor | Sequence,
    image_token_id: int = -200,
) -> Tensor:
    """Move collapsed boundaries to where they are after every placeholder became its rows.

    Args:
        cu_seqlens: int32 ``[B + 1]``, collapsed.
        input_ids: integer ``[T]`` or ``[1, T]``.
        tokens_per_image: integer ``[N]``, or one list per sequence.
        image_token_id: the placeholder's id.

    Returns:
        int32 ``[B + 1]``, expanded. Looks at the values, so it synchronises on a GPU.

    Raises:
        PackingError: as ``PackedLayout.build`` says.

    Example:
        >>> ids = torch.tensor([11, 12, -200, 13, -200, 21, 22, 31, 32, 33])
        >>> cu_seqlens = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
        >>> remap_cu_seqlens(cu_seqlens, ids, [576, 576]).tolist()
        [0, 579, 1157, 1160]
    """
    layout = PackedLayout.build(
        input_ids, cu_seqlens, tokens_per_image, image_token_id, "collapsed"
    )
    return layout.cu_seqlens_expanded


def read_later(values: Tensor) -> Callable[[], list[int]]:
    """Queue a copy of a few integers to pinned memory; the function returned waits for them."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return wait


def may_look(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing."""
    return tensor.device.type == "cpu"


def max_seqlen_bound(num_rows: int) -> int:
    """An upper bound of every sequence in a row of ``num_rows``.

    Never ``num_rows`` itself: mcore's unfused RoPE would take it for absolute positions.
    """
    return round_up(num_rows + 1, MAX_SEQLEN_STEP)


def round_up(value: int, multiple: int) -> int:
    """The next multiple at or above ``value``."""
    return -(-value // multiple) * multiple


def _find_seq(starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sequence that each of ``size`` positions lies in, and how far behind its start."""
    position = torch.arange(size, device=starts.device)
    starts = starts.long()
    seq = reference.last_at_or_below(starts, position)
    return seq, position - starts.index_select(0, seq)


def _find_stage_fault(cu_seqlens, physical, room, num_rows, seq_multiple, truncates) -> Tensor:
    """The status of ``from_boundaries``, computed where the boundaries are."""
    lengths, widths = cu_seqlens.diff(), physical.diff()
    last = physical[-1]

    def at_first(values, wrong):
        index = wrong.int().argmax(0, keepdim=True)
        return wrong.any(), index.squeeze(0), values.index_select(0, index).squeeze(0)

    zero = torch.zeros_like(last)
    narrowest = lengths.minimum(widths)
    any_negative, negative, by = at_first(narrowest, narrowest < 0)
    any_uneven, uneven, width = at_first(widths, widths % seq_multiple != 0)
    starts_late = (cu_seqlens[0] != 0) | (physical[0] != 0)
    too_long = (last > num_rows) & (not truncates)
    faults = (
        (Fault.START, starts_late, zero, torch.maximum(cu_seqlens[0], physical[0]), zero),
        (Fault.DECREASING, any_negative, negative, by, zero),
        (Fault.STAGE_ROWS, too_long, zero, last, zero + num_rows),
        (Fault.STAGE_MULTIPLE, any_uneven, uneven, width, zero + seq_multiple),
    )
    status = torch.zeros(4, dtype=torch.int64, device=last.device)
    for fault, applies, *place in reversed(faults):
        words = torch.stack([zero + int(fault), *place]).long()
        status = torch.where(applies, words, status)
    return torch.cat([status, torch.stack([room.max(), zero]).long()])


def _parts(num_seqs: int, num_tokens: int | None, num_images: int | None) -> dict[str, int]:
    """The tensors of a layout's tensor form, in order, and their lengths."""
    parts = {
        "cu_seqlens_expanded": num_seqs + 1,
        "cu_seqlens_padded": num_seqs + 2,
        "seq_start_expanded": num_seqs + 2,
    }
    if num_tokens is not None:
        num_images = num_images or 0
        parts |= {
            "cu_seqlens_collapsed": num_seqs + 1,
            "seq_start_collapsed": num_seqs + 2,
            "input_ids": num_tokens,
            "expanded_start": num_tokens + 1,
            "image_start": num_images,
            "cu_image_rows": num_images + 1,
        }
    return parts


# What callers may pass


def as_row(tensor: Tensor, name: str, length: int | None = None, floating: bool = False) -> Tensor:
    """``[T]`` from ``[T]`` or ``[1, T]``."""
    if not isinstance(tensor, Tensor):
        raise PackingError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if not floating and tensor.dtype not in (torch.int32, torch.int64):
        # A placeholder of -200, or an ignored label of -100, would wrap around in a smaller one.
        raise PackingError(f"{name} is {tensor.dtype}, expected int64 or int32 integers")
    _refuse_meta(tensor, name)
    shape = list(tensor.shape)
    if tensor.dim() == 2 and shape[0] == 1:
        tensor = tensor[0]
    elif tensor.dim() != 1:
        raise PackingError(f"{name} is {shape}, expected one packed row, [T] or [1, T]")
    if tensor.numel() == 0:
        raise PackingError(f"{name} is empty")
    if length is not None and tensor.numel() != length:
        raise PackingError(f"{name} has {tensor.numel()} entries, but the row has {length} tokens")
    return tensor.contiguous()


def as_boundaries(cu_seqlens, name: str, like: Tensor | None = None, length=None) -> Tensor:
    """int32 ``[B + 1]``, with ``length`` entries, on the device of ``like``."""
    if not isinstance(cu_seqlens, Tensor):
        raise PackingError(f"{name} is a {type(cu_seqlens).__name__}, expected an int32 tensor")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise PackingError(
            f"{name} is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected torch.int32 [B + 1]"
        )
    if cu_seqlens.numel() < 2:
        raise PackingError(f"{name} has {cu_seqlens.numel()} entries, expected B + 1 with B >= 1")
    if length is not None and cu_seqlens.numel() != length:
        raise PackingError(
            f"{name} has {cu_seqlens.numel()} entries, expected {length} like cu_seqlens"
        )
    if like is not None and cu_seqlens.device != like.device:
        raise PackingError(
            f"{name} is on {cu_seqlens.device}, but input_ids on {like.device}; move it there"
        )
    _refuse_meta(cu_seqlens, name)
    return cu_seqlens.contiguous()


def _refuse_meta(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise PackingError(f"{name} is on the meta device: it has a shape, but no values")


def _as_tokens_per_image(tokens_per_image, input_ids: Tensor, num_seqs: int):
    """``[N]`` on the row's device, and the counts per sequence where they were nested lists."""
    images_per_seq = None
    if not isinstance(tokens_per_image, Tensor):
        entries, images_per_seq = _flatten(tokens_per_image, num_seqs)
        tokens_per_image = torch.tensor(entries, dtype=torch.int64, device=input_ids.device)
    is_integer = not (
        tokens_per_image.is_floating_point()
        or tokens_per_image.is_complex()
        or tokens_per_image.dtype == torch.bool
    )
    if not is_integer or tokens_per_image.dim() != 1:
        raise PackingError(
            f"tokens_per_image is {tokens_per_image.dtype} {list(tokens_per_image.shape)}, "
            f"expected integers [N]"
        )
    if tokens_per_image.device != input_ids.device:
        raise PackingError(
            f"tokens_per_image is on {tokens_per_image.device}, but input_ids on "
            f"{input_ids.device}; move it there"
        )
    return tokens_per_image.contiguous(), images_per_seq


def _flatten(tokens_per_image, num_seqs: int) -> tuple[list[int], tuple[int, ...] | None]:
    """Ints from a list of ints or of one list per sequence, and how many each of those has."""
    expected = "expected integers [N], or one list of ints per sequence"
    is_text = isinstance(tokens_per_image, str | bytes)
    if is_text or not hasattr(tokens_per_image, "__iter__"):
        raise PackingError(f"tokens_per_image is {tokens_per_image!r}, {expected}")
    entries = [x.tolist() if hasattr(x, "tolist") else x for x in tokens_per_image]
    is_list = [isinstance(entry, list | tuple) for entry in entries]
    images_per_seq = None
    if any(is_list):
        if not all(is_list):
            raise PackingError(f"tokens_per_image mixes ints and lists: {entries}, {expected}")
        if len(entries) != num_seqs:
            raise PackingError(
                f"tokens_per_image has {len(entries)} lists, but cu_seqlens {num_seqs} sequences"
            )
        images_per_seq = tuple(map(len, entries))
        entries = [rows for sequence in entries for rows in sequence]
    for image, entry in enumerate(entries):
        if isinstance(entry, bool) or not isinstance(entry, Integral):
            raise PackingError(f"tokens_per_image is {entries}, expected ints")
        if abs(entry) > INT32_MAX:
            raise PackingError(f"image {image}: tokens_per_image is {entry}, more than int32 holds")
    return entries, images_per_seq


def as_multiples(seq_multiple: int, total_multiple: int) -> tuple[int, int]:
    """Both as ints, the second a multiple of the first."""
    for name, value in (("seq_multiple", seq_multiple), ("total_multiple", total_multiple)):
        if _as_int(value, name) < 1:
            raise PackingError(f"{name} is {value!r}, expected a positive int")
    return int(seq_multiple), math.lcm(seq_multiple, total_multiple)


def check_on_overflow(on_overflow: str) -> str:
    """``on_overflow`` itself, "raise" or "truncate"."""
    if not isinstance(on_overflow, str) or on_overflow not in ("raise", "truncate"):
        raise PackingError(f"on_overflow is {on_overflow!r}, expected 'raise' or 'truncate'")
    return on_overflow


def _as_int(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise PackingError(f"{name} is {value!r}, expected an int")
    return int(value)


def _as_size(value, name: str, multiple: int = 1) -> int | None:
    if value is None:
        return None
    if _as_int(value, name) < 0 or value % multiple:
        raise PackingError(f"{name} is {value!r}, expected a multiple of {multiple} rows")
    return int(value)
