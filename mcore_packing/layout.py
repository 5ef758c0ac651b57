"""``PackedLayout``: the invertible map between both spaces of one packed row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from . import ops, reference
from .errors import (
    INT32_MAX,
    BoundarySpaceError,
    Fault,
    PackingError,
    PlaceholderMismatch,
    Space,
)

# An upper bound is rounded up to this, so that mcore's RoPE cache (32 entries) sees few values.
MAX_SEQLEN_STEP = 1024

_NO_INTEGERS = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class PackedLayout:
    """Where every token and every image row of one packed row stands, before and after expansion.

    Built once per row by ``build`` and only read afterwards. Tensors live on the device of the row;
    what the host knows is a Python int. The map itself is piecewise: images turn tokens into
    *rows*, ``row_starts`` cuts the rows into sequences, and ``cu_seqlens_padded`` places each
    sequence in the physical row. The last sequence is the tail: what lies past the last boundary,
    possibly nothing.

    Attributes:
        input_ids: integer ``[T]``, the collapsed row.
        expanded_start: int32 ``[T + 1]``, ``t + sum of (tokens_per_image - 1)`` over the
            placeholders before ``t``: where token ``t`` begins if nothing is padded.
        image_begin: int32 ``[N]``, ``expanded_start`` of each placeholder.
        image_start: int32 ``[N + 1]``, prefix sums of ``tokens_per_image``.
        token_starts: int32 ``[B + 2]``, the token each sequence begins with, and ``T``.
        row_starts: int32 ``[B + 2]``, the unpadded row each sequence begins with, and their number.
        cu_seqlens_collapsed: int32 ``[B + 1]``, real boundaries in tokens.
        cu_seqlens_expanded: int32 ``[B + 1]``, real boundaries in rows.
        cu_seqlens_padded: int32 ``[B + 2]``, physical offsets in rows, the last sequence being the
            tail.
        status: int64 ``[5]``, what is wrong with the row (``errors.Fault``).
        image_token_id: the placeholder.
        num_collapsed: ``T``.
        num_expanded: ``S``, the physical length of the expanded row.
        num_image_rows: the sum of ``tokens_per_image``, None where the host does not know it.
        max_seqlen: the longest padded sequence, or an upper bound where nobody looked.
        seq_multiple: every padded sequence is a multiple of it.
        has_tail: False where the host knows that the tail is empty.
        images_per_seq: how many images each sequence should have, where the caller said so.
    """

    input_ids: Tensor
    expanded_start: Tensor
    image_begin: Tensor
    image_start: Tensor
    token_starts: Tensor
    row_starts: Tensor
    cu_seqlens_collapsed: Tensor
    cu_seqlens_expanded: Tensor
    cu_seqlens_padded: Tensor
    status: Tensor
    image_token_id: int
    num_collapsed: int
    num_expanded: int
    num_image_rows: int | None
    max_seqlen: int
    seq_multiple: int
    has_tail: bool
    images_per_seq: tuple[int, ...] | None = None
    _maps: dict = field(default_factory=dict, compare=False)

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
    ) -> "PackedLayout":
        """Lay out one packed row.

        On a CPU, and wherever the host knows neither ``num_image_rows`` nor ``num_padded_rows``, it
        looks at the values: the layout is exact, and a bad row raises at once. Given either,
        building on a GPU costs one kernel launch and no host synchronisation; sizes are then upper
        bounds, the tail takes the surplus, and ``check`` raises what the kernel found.

        Args:
            input_ids: integer ``[T]`` or ``[1, T]``, placeholders included.
            cu_seqlens: int32 ``[B + 1]`` on the same device, starting at 0, never decreasing.
            tokens_per_image: integer ``[N]``, how many rows each placeholder becomes, in order; or
                one list per sequence, which also checks how many images each sequence has.
            image_token_id: the placeholder's id.
            space: the space of ``cu_seqlens``: "auto", "collapsed" or "expanded".
            num_image_rows: the sum of ``tokens_per_image``, where the host knows it.
            num_padded_rows: the physical length ``S``, where the host knows it.
            seq_multiple: pad every sequence to a multiple of this many rows.
            total_multiple: pad the whole row to a multiple of this many rows.
            max_expanded: cut the expanded row off here.
            cu_seqlens_padded: int32 ``[B + 1]``, the physical offsets of the sequences in the given
                row, where it is padded between sequences; ``cu_seqlens`` then counts real tokens.

        Returns:
            The layout.

        Raises:
            PlaceholderMismatch: placeholders and ``tokens_per_image`` differ in number.
            BoundarySpaceError: ``space="auto"`` and both spaces are possible.
            PackingError: anything else that is wrong with the row, with the place.

        Example:
            Three samples, two images of 3 and 4 rows:

            >>> ids = torch.tensor([11, 12, -200, 13, -200, 21, 22, 31, 32, 33])
            >>> cu_seqlens = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
            >>> layout = PackedLayout.build(ids, cu_seqlens, torch.tensor([3, 4]))
            >>> layout.cu_seqlens_expanded.tolist(), layout.num_expanded
            ([0, 6, 12, 15], 15)
            >>> padded = PackedLayout.build(ids, cu_seqlens, [3, 4], seq_multiple=8)
            >>> padded.cu_seqlens_padded.tolist()
            [0, 8, 16, 24, 24]
        """
        input_ids = _as_row(input_ids, "input_ids")
        cu_seqlens = _as_boundaries(cu_seqlens, input_ids, "cu_seqlens")
        if cu_seqlens_padded is not None:
            cu_seqlens_padded = _as_boundaries(
                cu_seqlens_padded, input_ids, "cu_seqlens_padded", cu_seqlens.numel()
            )
        rows, images_per_seq = _as_tokens_per_image(
            tokens_per_image, input_ids, cu_seqlens.numel() - 1
        )
        seq_multiple, total_multiple = _as_multiples(seq_multiple, total_multiple)
        looks = _may_look(input_ids) or (num_image_rows is None and num_padded_rows is None)

        # The physical length: exact without padding between sequences, else a bound.
        num_tokens, num_images, num_seqs = input_ids.numel(), rows.numel(), cu_seqlens.numel() - 1
        known_rows = num_image_rows
        if known_rows is None and looks:
            known_rows = int(rows.long().clamp(1, INT32_MAX).sum())
        if num_padded_rows is not None:
            _check_multiple("num_padded_rows", num_padded_rows, total_multiple)
            num_rows = num_padded_rows
        else:
            bound = num_tokens - num_images + known_rows + num_seqs * (seq_multiple - 1)
            num_rows = _round_up(max(bound, 0), total_multiple)
        truncate = max_expanded is not None and num_rows >= max_expanded
        if max_expanded is not None:
            _check_multiple("max_expanded", max_expanded, total_multiple)
            num_rows = min(num_rows, max_expanded)
        if num_rows > INT32_MAX:
            if not looks:
                raise PackingError(
                    f"the expanded row has {num_rows} rows, more than int32 can count"
                )
            num_rows = INT32_MAX // total_multiple * total_multiple

        maps = ops.layout(
            input_ids, cu_seqlens, cu_seqlens_padded, rows, image_token_id, _as_space(space),
            -1 if num_image_rows is None else num_image_rows, num_rows, seq_multiple, truncate,
        )  # fmt: skip
        layout = cls(
            input_ids,
            *maps,
            image_token_id=image_token_id,
            num_collapsed=num_tokens,
            num_expanded=num_rows,
            num_image_rows=known_rows,
            # Never the row's own length: mcore's unfused RoPE would take it for absolute positions.
            max_seqlen=_round_up(num_rows + 1, MAX_SEQLEN_STEP),
            seq_multiple=seq_multiple,
            has_tail=True,
            images_per_seq=images_per_seq,
        )
        return layout._look(total_multiple, num_padded_rows is None) if looks else layout

    def _look(self, total_multiple: int, shrink: bool) -> "PackedLayout":
        """The exact layout: errors raised, no surplus in the tail, the true ``max_seqlen``."""
        self.check()
        cu_padded = self.cu_seqlens_padded
        num_rows, last = self.num_expanded, int(cu_padded[-2])
        if shrink:
            needed = last + int(self.row_starts[-1] - self.row_starts[-2])
            num_rows = min(_round_up(needed, total_multiple), num_rows)
            cu_padded[-1] = num_rows
        return replace(
            self,
            num_expanded=num_rows,
            max_seqlen=int(cu_padded.diff().max()),
            has_tail=num_rows > last,
            _maps={},
        )

    @property
    def num_seqs(self) -> int:
        """``B``, the tail not counted."""
        return self.cu_seqlens_collapsed.numel() - 1

    @property
    def space(self) -> str:
        """The space the given boundaries were found to be in (synchronises on a GPU)."""
        found = Space(int(self.status[1]))
        return "collapsed" if found == Space.SAME else found.name.lower()

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[S]``, restarting in every sequence."""
        return self.tokens()[1]

    @property
    def position_ids_collapsed(self) -> Tensor:
        """int64 ``[T]``, restarting in every sequence, as ``learned_absolute`` needs it."""
        if "collapsed" not in self._maps:
            _, offset = _find_seq(self.token_starts, self.num_collapsed)
            self._maps["collapsed"] = offset.clamp(min=0)
        return self._maps["collapsed"]

    @property
    def padding_mask(self) -> Tensor:
        """bool ``[S]``, True for padding: behind each sequence's real rows, and the whole tail."""
        if "padding" not in self._maps:
            seq, offset = _find_seq(self.cu_seqlens_padded, self.num_expanded)
            length = torch.nn.functional.pad(self.cu_seqlens_expanded.diff(), (0, 1))
            self._maps["padding"] = offset >= length.index_select(0, seq)
        return self._maps["padding"]

    def tokens(self, labels=None, loss_mask=None, cp_size: int = 1, cp_rank: int = 0):
        """``source, position_ids, token_ids, labels, loss_mask`` of a rank, ``[S / cp_size]`` each.

        One launch; without labels and loss mask the answer is kept, with them its other parts are.
        """
        key = ("tokens", cp_size, cp_rank)
        if key not in self._maps or labels is not None or loss_mask is not None:
            self._check_rank(cp_size, cp_rank)
            maps = ops.expand_tokens(
                self.input_ids, labels, loss_mask, self.image_begin, self.image_start,
                self.row_starts, self.cu_seqlens_padded, self.image_token_id, self.num_expanded,
                cp_size, cp_rank,
            )  # fmt: skip
            self._maps[key] = (*maps[:3], None, None)
            return maps
        return self._maps[key]

    def source_positions(self, cp_size: int = 1, cp_rank: int = 0) -> tuple[Tensor, Tensor]:
        """int32 ``[T]`` and ``[num_image_rows]``: where each source row stands on a rank, or -1."""
        key = ("positions", cp_size, cp_rank)
        if key not in self._maps:
            self._check_rank(cp_size, cp_rank)
            self._maps[key] = ops.source_positions(
                self.input_ids, self.expanded_start, self.image_begin, self.image_start,
                self.row_starts, self.cu_seqlens_padded, self.num_image_rows, self.image_token_id,
                cp_size, cp_rank,
            )  # fmt: skip
        return self._maps[key]

    def _check_rank(self, cp_size: int, cp_rank: int) -> None:
        if not 0 <= cp_rank < cp_size:
            raise PackingError(f"cp_rank is {cp_rank}, expected 0 <= cp_rank < cp_size = {cp_size}")
        if cp_size > 1 and (self.seq_multiple % (2 * cp_size) or self.num_expanded % (2 * cp_size)):
            raise PackingError(
                f"cp_size {cp_size} needs every sequence to be a multiple of {2 * cp_size} rows, "
                f"but the layout was built with seq_multiple={self.seq_multiple}; see mp.alignment"
            )

    def to(self, device, non_blocking: bool = False) -> "PackedLayout":
        """The same layout on another device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedLayout":
        """The same layout in pinned memory; a ``DataLoader`` calls this."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function) -> "PackedLayout":
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        moved = {name: function(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **moved, _maps={})

    def check(self) -> None:
        """Raise what is wrong with the row, if anything is (synchronises on a GPU).

        Raises:
            PlaceholderMismatch, BoundarySpaceError, PackingError: as ``build`` says.
        """
        status = self.status.tolist()
        if status[0]:
            raise _explain(self, Fault(status[0]), *status[2:])
        if self.images_per_seq is not None:
            _check_images_per_seq(self)

    def __repr__(self) -> str:
        return (
            f"PackedLayout({self.num_seqs} sequences, {self.image_begin.numel()} images, "
            f"{self.num_collapsed} tokens -> {self.num_expanded} rows, {self.input_ids.device})"
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


def expand_embeddings(
    layout: PackedLayout, text: Tensor, images: Tensor | None, *, cp_size: int = 1, cp_rank: int = 0
) -> Tensor:
    """Fill the expanded row: every row is written once, padding with zeros. Differentiable.

    Args:
        layout: of this row.
        text: ``[T, H]``, embeddings of the collapsed tokens; those of placeholders are not used.
        images: ``[L, tiles, H]`` as Megatron's vision projection gives them, or ``[rows, H]``; of
            the same dtype as ``text``; None where the row has no images.
        cp_size: context-parallel size.
        cp_rank: the rank whose rows to write.

    Returns:
        ``[S / cp_size, H]``; NaN where the layout is not sound.

    Raises:
        PackingError: a shape or dtype does not fit the layout.
        PlaceholderMismatch: ``images`` has another number of rows than the placeholders ask for.

    Source:
        ``LLaVAModel._preprocess_data`` of Megatron-Core 0.16.1, followed by
        ``_process_embedding_token_parallel`` under context parallelism.

    Example:
        >>> ids, cu_seqlens = torch.tensor([5, -200, 6]), torch.tensor([0, 3], dtype=torch.int32)
        >>> layout = PackedLayout.build(ids, cu_seqlens, [2], space="collapsed")
        >>> text, images = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[7.0], [8.0]])
        >>> expand_embeddings(layout, text, images).flatten().tolist()
        [1.0, 7.0, 8.0, 2.0]
    """
    if text.dim() != 2 or text.shape[0] != layout.num_collapsed:
        raise PackingError(f"text is {list(text.shape)}, expected [{layout.num_collapsed}, H]")
    if images is not None:
        images = images.unsqueeze(1) if images.dim() == 2 else images
        if images.dim() != 3 or images.shape[2] != text.shape[1] or images.dtype != text.dtype:
            raise PackingError(
                f"images are {list(images.shape)} {images.dtype}, expected [L, tiles, "
                f"{text.shape[1]}] or [rows, {text.shape[1]}] {text.dtype} like text"
            )
    num_rows = 0 if images is None else images.shape[0] * images.shape[1]
    if layout.num_image_rows is None:
        raise PackingError("the layout was built without num_image_rows; give it to build")
    if num_rows != layout.num_image_rows:
        raise PlaceholderMismatch(
            actual=num_rows,
            expected=layout.num_image_rows,
            message=f"images have {num_rows} rows, but the placeholders become "
            f"{layout.num_image_rows} rows",
        )
    source = layout.tokens(cp_size=cp_size, cp_rank=cp_rank)[0]
    positions = ()
    if torch.is_grad_enabled() and (
        text.requires_grad or (images is not None and images.requires_grad)
    ):
        positions = layout.source_positions(cp_size, cp_rank)
    return ops.expand_rows(text, images, source, layout.status, *positions)


def expand_labels(
    layout: PackedLayout,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Move labels and loss mask to the expanded row, sequence by sequence.

    Within a sequence, as Megatron does: labels come shifted left by one, nothing predicts an image
    row, an image's last row carries its placeholder's label, masked. Across a boundary nothing
    moves: a sequence that begins with an image costs the one before it nothing.

    Args:
        layout: of this row.
        labels: integer ``[T]`` or ``[1, T]``, already shifted, or None.
        loss_mask: ``[T]`` or ``[1, T]``, or None.
        cp_size: context-parallel size.
        cp_rank: the rank whose positions to write.

    Returns:
        ``labels [S / cp_size]``, -100 where nothing is predicted, and ``loss_mask [S / cp_size]``;
        None for what was None.

    Raises:
        PackingError: a length is not that of the collapsed row.

    Source:
        ``LLaVAModel._preprocess_data`` of Megatron-Core 0.16.1.

    Example:
        >>> ids = torch.tensor([11, 12, -200, 21])
        >>> cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
        >>> layout = PackedLayout.build(ids, cu_seqlens, [3], space="collapsed")
        >>> labels, loss_mask = expand_labels(layout, torch.tensor([12, 13, 21, 22]), torch.ones(4))
        >>> labels.tolist(), loss_mask.tolist()
        ([12, 13, -100, -100, 21, 22], [1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    """
    if labels is not None:
        labels = _as_row(labels, "labels", layout.num_collapsed)
    if loss_mask is not None:
        loss_mask = _as_row(loss_mask, "loss_mask", layout.num_collapsed, floating=True)
    expanded = layout.tokens(labels, loss_mask, cp_size, cp_rank)
    return (
        None if labels is None else expanded[3],
        None if loss_mask is None else expanded[4],
    )


def _find_seq(starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sequence that each of ``size`` positions lies in, and how far behind its start."""
    position = torch.arange(size, device=starts.device)
    starts = starts.long()
    seq = reference.last_at_or_below(starts, position)
    return seq, position - starts.index_select(0, seq)


def _may_look(input_ids: Tensor) -> bool:
    """Whether reading a value costs nothing."""
    return input_ids.device.type == "cpu"


def _as_row(tensor: Tensor, name: str, length: int | None = None, floating: bool = False) -> Tensor:
    """``[T]`` from ``[T]`` or ``[1, T]``."""
    if not isinstance(tensor, Tensor):
        raise PackingError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if not floating and tensor.dtype not in (torch.int32, torch.int64):
        # A placeholder of -200, or an ignored label of -100, would wrap around in a smaller one.
        raise PackingError(f"{name} is {tensor.dtype}, expected int64 or int32 integers")
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


def _as_boundaries(cu_seqlens, input_ids, name, length=None) -> Tensor:
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
    if cu_seqlens.device != input_ids.device:
        raise PackingError(
            f"{name} is on {cu_seqlens.device}, but input_ids on {input_ids.device}; move it there"
        )
    return cu_seqlens.contiguous()


def _as_tokens_per_image(tokens_per_image, input_ids, num_seqs):
    """``[N]`` on the row's device, and the counts per sequence where they were nested lists."""
    images_per_seq = None
    if not isinstance(tokens_per_image, Tensor):
        entries = [x.tolist() if hasattr(x, "tolist") else x for x in tokens_per_image]
        if any(isinstance(entry, Sequence) for entry in entries):
            entries = [list(entry) for entry in entries]
            images_per_seq = tuple(len(e) for e in entries)
            if len(entries) != num_seqs:
                raise PackingError(
                    f"tokens_per_image has {len(entries)} lists, but cu_seqlens {num_seqs} "
                    "sequences"
                )
            entries = [rows for e in entries for rows in e]
        if any(isinstance(entry, bool) or not isinstance(entry, int) for entry in entries):
            raise PackingError(f"tokens_per_image is {entries}, expected ints")
        tokens_per_image = torch.tensor(entries, dtype=torch.int64, device=input_ids.device)
    if tokens_per_image.dtype in _NO_INTEGERS or tokens_per_image.dim() != 1:
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


def _as_multiples(seq_multiple: int, total_multiple: int) -> tuple[int, int]:
    for name, value in (("seq_multiple", seq_multiple), ("total_multiple", total_multiple)):
        if not isinstance(value, int) or value < 1:
            raise PackingError(f"{name} is {value!r}, expected a positive int")
    return seq_multiple, math.lcm(seq_multiple, total_multiple)


def _as_space(space: str) -> int:
    try:
        return {"auto": Space.AUTO, "collapsed": Space.COLLAPSED, "expanded": Space.EXPANDED}[space]
    except (KeyError, TypeError):
        raise PackingError(
            f"space is {space!r}, expected 'auto', 'collapsed' or 'expanded'"
        ) from None


def _check_multiple(name: str, value: int, multiple: int) -> None:
    if not isinstance(value, int) or value < 0 or value % multiple:
        raise PackingError(f"{name} is {value!r}, expected a multiple of {multiple} rows")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _explain(
    layout: PackedLayout, fault: Fault, where: int, found: int, expected: int
) -> PackingError:
    """The error for a status: where, what was found, what was expected, what to do."""
    token = layout.image_token_id
    if fault == Fault.START:
        return PackingError(f"cu_seqlens starts at {found}, expected 0")
    if fault == Fault.DECREASING:
        return PackingError(f"sequence {where}: cu_seqlens decreases by {-found}, expected never")
    if fault in (Fault.TOO_FEW_IMAGES, Fault.TOO_MANY_IMAGES):
        counts = _placeholders_per_seq(layout)
        if fault == Fault.TOO_FEW_IMAGES:
            seq = int(torch.searchsorted(layout.token_starts[1:-1], where, right=True))
            entries = found - sum(counts[:seq])
        else:
            seq = max((s for s, count in enumerate(counts) if count), default=0)
            entries = counts[seq] + found - expected
        return PlaceholderMismatch(
            actual=found,
            expected=expected,
            message=f"sequence {seq}: {counts[seq]} placeholders (id {token}) but {entries} "
            f"entries in tokens_per_image; the row has {expected} placeholders and {found} "
            f"entries, pass one for each placeholder",
        )
    if fault == Fault.TOKENS_PER_IMAGE:
        return PackingError(
            f"image {where}: tokens_per_image is {found}, expected at least {expected}; drop the "
            f"placeholder of an image without rows"
        )
    if fault == Fault.OVERFLOW:
        return PackingError(f"the expanded row has {found} rows, more than int32 can count")
    if fault == Fault.IMAGE_ROWS:
        return PlaceholderMismatch(
            actual=expected,
            expected=found,
            message=f"the row's placeholders become {found} image rows, but there are {expected}",
        )
    if fault == Fault.AMBIGUOUS:
        return BoundarySpaceError(
            f"the last boundary is {found} in a row of {expected} tokens that expands to "
            f"{int(layout.row_starts[-1])} rows: it could count either; pass space='collapsed' or "
            f"space='expanded'"
        )
    if fault == Fault.PAST_END:
        return PackingError(
            f"the last boundary is {found}, past the end of the row at {expected} "
            f"({layout.num_collapsed} tokens, {int(layout.row_starts[-1])} rows)"
        )
    if fault == Fault.REAL_LENGTH:
        return PackingError(
            f"sequence {where}: {found} long by cu_seqlens, but only {expected} by "
            "cu_seqlens_padded"
        )
    return PackingError(
        f"the padded row has {found} rows, more than the num_padded_rows={expected} that was given"
    )


def _placeholders_per_seq(layout: PackedLayout) -> list[int]:
    """How many placeholders each sequence has; the tail counts to the last."""
    before = (layout.input_ids == layout.image_token_id).cumsum(0)
    before = torch.cat([before.new_zeros(1), before])
    starts = layout.token_starts.long()[:-1].clone()
    starts[-1] = layout.num_collapsed
    return before[starts].diff().tolist()


def _check_images_per_seq(layout: PackedLayout) -> None:
    counts = _placeholders_per_seq(layout)
    for seq, (found, entries) in enumerate(zip(counts, layout.images_per_seq, strict=True)):
        if found != entries:
            raise PlaceholderMismatch(
                actual=entries,
                expected=found,
                message=f"sequence {seq}: {found} placeholders (id {layout.image_token_id}) but "
                f"{entries} entries in tokens_per_image; pass one for each placeholder",
            )
