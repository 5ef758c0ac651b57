"""``PackedLayout``: the invertible map between both spaces of one packed row."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from . import ops, reference
from .errors import INT32_MAX, PackingError, PlaceholderMismatch, Status, explain
from .inputs import (
    as_boundaries,
    as_row,
    as_size,
    as_tokens_per_image,
    fits_int32,
    may_look,
    refuse_old,
)
from .reference import HEADER_SIZE, STATUS_SIZE, parts_of
from .space import SPACES, Space
from .spec import SPEC_FIELDS, RowSpec, as_spec, round_up
from .vision import Shares, check_shares

# What the host knows of a layout: these and the fields of its spec are the header of its tensor.
_FACTS = (
    "num_seqs", "num_collapsed", "num_images", "num_expanded", "num_image_embeddings", "max_seqlen",
    "has_tail", "is_exact", "space", "num_cut", "num_tiles", "vision_cp_size",
)  # fmt: skip
_HEADER = ("version", "checksum", *_FACTS, *SPEC_FIELDS)
_VERSION = 0x6C617934  # "lay4"
_OLD_VERSIONS = {0x6C617932: "0.1", 0x6C617933: "0.2 before its release"}
_NOT_SUMMED = 0x6E6F6E65  # "none": made on a GPU, where summing would wait

NO_IMAGE = -(2**31)  # an id that no tokenizer has: no token is a placeholder

# An upper bound is rounded up to this, so that mcore's RoPE cache (32 entries) sees few values.
_MAX_SEQLEN_STEP = 1024

_RENAMED = {
    "image_token_id": "pass spec=mp.RowSpec(image_token_id=...)",
    "num_image_rows": "pass num_image_embeddings=",
    "num_padded_rows": "pass spec=mp.RowSpec(fixed_length=...)",
    "seq_multiple": "pass spec=mp.RowSpec(seq_multiple=...)",
    "total_multiple": "pass spec=mp.RowSpec(total_multiple=...)",
    "max_expanded": "pass spec=mp.RowSpec(max_length=...)",
    "on_overflow": "pass spec=mp.RowSpec(on_overflow=...)",
    "strict": "mp.find_space says what boundaries can count",
}


class PackedLayout:
    """Where every token and every image embedding of one packed row stands, in both spaces.

    Made once a row by ``build`` and only read afterwards. Images move tokens,
    ``seq_start_expanded`` cuts the moved row into sequences, and ``cu_seqlens_padded`` places each
    sequence in the physical row. The last sequence is the tail: what lies past the last boundary,
    possibly nothing.

    It is one int32 tensor, of which everything below is a view, and a few facts that the host
    knows. It moves to a device in one copy, and through broadcasts as it is: ``to_tensor``.

    A pipeline stage without tokens needs boundaries only. Its layout, which ``from_tensor`` and
    ``from_boundaries`` make, has None for everything that counts tokens or images.

    Attributes:
        tensor: int32, all parts of the layout; see ``reference.parts_of``.
        spec: what the row was laid out for.
        num_seqs: ``B``, the tail not counted.
        num_expanded: ``S``, the physical length of the expanded row.
        max_seqlen: the longest padded sequence; where ``is_exact`` is False, an upper bound.
        has_tail: False where the host has looked, and the tail is empty.
        is_exact: whether the host has read ``status``: then nothing is wrong with the row, and
            ``max_seqlen`` is exact.
        space: what the boundaries that were given counted, "collapsed" or "expanded".
        num_collapsed: ``T``.
        num_images: ``N``.
        num_image_embeddings: the sum of ``tokens_per_image``, None where the host does not know it.
        num_cut: how many tokens fell off the end of the row, None where the host has not looked.
        has_tokens: False for the layout of a stage without tokens.
        num_tiles: how many tiles the row has, None where they are not shared over ranks.
        vision_cp_size: over how many ranks they are.
    """

    def __init__(
        self,
        tensor: Tensor,
        spec: RowSpec,
        *,
        num_seqs: int,
        num_expanded: int,
        max_seqlen: int,
        has_tail: bool,
        is_exact: bool,
        space: Space,
        num_collapsed: int | None = None,
        num_images: int | None = None,
        num_image_embeddings: int | None = None,
        num_cut: int | None = None,
        num_tiles: int | None = None,
        vision_cp_size: int | None = None,
    ):
        self.tensor, self.spec = tensor, spec
        self.num_seqs, self.num_expanded, self.max_seqlen = num_seqs, num_expanded, max_seqlen
        self.has_tail, self.is_exact, self.space = has_tail, is_exact, space
        self.num_collapsed, self.num_images = num_collapsed, num_images
        self.num_image_embeddings, self.num_cut = num_image_embeddings, num_cut
        self.num_tiles, self.vision_cp_size = num_tiles, vision_cp_size
        self.has_tokens = num_collapsed is not None
        self._parts = parts_of(
            num_seqs, num_collapsed, num_images or 0, num_tiles, vision_cp_size or 0
        )

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        tokens_per_image: Tensor | Sequence,
        spec: RowSpec | None = None,
        *,
        space: Space | None = None,
        cu_seqlens_padded: Tensor | None = None,
        num_image_embeddings: int | None = None,
        **old: NoReturn,
    ) -> "PackedLayout":
        """Lay out one packed row.

        On a CPU, and wherever the host knows neither ``num_image_embeddings`` nor a fixed length,
        it looks at the values: the layout is exact, and a bad row raises at once. Given either,
        building on a GPU costs one kernel launch and no host synchronisation; sizes are then upper
        bounds, the tail takes the surplus, and ``check`` raises what the kernel found.

        Args:
            input_ids: integer ``[T]`` or ``[1, T]``, placeholders included.
            cu_seqlens: int32 ``[B + 1]`` on the same device, starting at 0, never decreasing.
            tokens_per_image: integer ``[N]``, how many positions each placeholder becomes, in
                order; or one list per sequence, which also checks how many images each has.
            spec: what the model asks of the row; by default nothing.
            space: what ``cu_seqlens`` counts, "collapsed" tokens or "expanded" positions. It is
                taken at its word, unless boundaries that are said to be expanded can only be
                collapsed. Not needed where ``spec.expands`` is False: both are the same.
            cu_seqlens_padded: int32 ``[B + 1]``, the physical offsets of the sequences in the given
                row, where it is padded between sequences; ``cu_seqlens`` then counts real tokens.
            num_image_embeddings: the sum of ``tokens_per_image``, where the host knows it.

        Returns:
            The layout.

        Raises:
            PlaceholderMismatch: placeholders and ``tokens_per_image`` differ in number.
            BoundarySpaceError: boundaries that are not what they were said to be.
            PackingError: anything else that is wrong with the row, with the place.

        Example:
            Three samples, two images of 3 and 4 embeddings:

            >>> ids = torch.tensor([11, 12, -200, 13, -200, 21, 22, 31, 32, 33])
            >>> cu_seqlens = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
            >>> layout = PackedLayout.build(ids, cu_seqlens, [3, 4], space="collapsed")
            >>> layout.cu_seqlens_expanded.tolist(), layout.num_expanded
            ([0, 6, 12, 15], 15)
            >>> spec = RowSpec(seq_multiple=8)
            >>> padded = PackedLayout.build(ids, cu_seqlens, [3, 4], spec, space="collapsed")
            >>> padded.cu_seqlens_padded.tolist()
            [0, 8, 16, 24, 24]
        """
        if old:
            refuse_old("PackedLayout.build", old, _RENAMED)
        spec = RowSpec() if spec is None else as_spec(spec)
        if not spec.expands:
            space = "expanded"
        elif space not in SPACES:
            raise _not_a_space(space)
        ids = as_row(input_ids, "input_ids")
        cu_seqlens = as_boundaries(cu_seqlens, "cu_seqlens", like=ids)
        if cu_seqlens_padded is not None:
            cu_seqlens_padded = as_boundaries(
                cu_seqlens_padded, "cu_seqlens_padded", ids, cu_seqlens.numel()
            )
        num_tokens, num_seqs = ids.numel(), cu_seqlens.numel() - 1
        counts, images_per_seq = as_tokens_per_image(tokens_per_image, ids, num_seqs)
        num_image_embeddings = as_size(num_image_embeddings, "num_image_embeddings")
        looks = may_look(ids) or (num_image_embeddings is None and spec.fixed_length is None)
        if looks and not fits_int32(ids):
            raise PackingError("input_ids hold an id beyond int32, more than a layout can")

        known = num_image_embeddings
        if known is None and looks:
            known = int(counts.long().clamp(1, INT32_MAX).sum())
        # Exact without padding between sequences, else a bound.
        length = spec.length_of(num_tokens - counts.numel() + (known or 0), num_seqs)
        if length > INT32_MAX:
            if not looks:
                raise PackingError(f"the row has {length} positions, more than int32 can count")
            length = INT32_MAX // spec.total_multiple * spec.total_multiple
        tensor = ops.layout(
            ids, cu_seqlens, cu_seqlens_padded, counts,
            spec.image_token_id if spec.expands else NO_IMAGE, space == "expanded",
            -1 if num_image_embeddings is None else num_image_embeddings,
            -1 if spec.longest is None else spec.longest,
            length, spec.seq_multiple, spec.on_overflow == "truncate",
        )  # fmt: skip
        layout = cls(
            tensor,
            spec,
            num_seqs=num_seqs,
            num_expanded=length,
            max_seqlen=0 if looks else max_seqlen_bound(length),
            has_tail=True,
            is_exact=False,
            space=space,
            num_collapsed=num_tokens,
            num_images=counts.numel(),
            num_image_embeddings=known,
        )
        if not looks:
            return layout
        layout._read(Status(*layout.status.tolist()))
        if images_per_seq is not None:
            layout._check_images_per_seq(images_per_seq)
        layout._shrink()
        return layout

    @classmethod
    def from_boundaries(
        cls,
        cu_seqlens: Tensor,
        length: int,
        spec: RowSpec | None = None,
        *,
        cu_seqlens_padded: Tensor | None = None,
    ) -> "PackedLayout":
        """The layout of a stage without tokens, from boundaries that are expanded already.

        Nothing is padded any more: what is behind the last boundary is the tail.

        Args:
            cu_seqlens: int32 ``[B + 1]``, real boundaries.
            length: ``S``, how many positions the stage has, those of all its ranks together.
            spec: what the model asks of the row; by default nothing.
            cu_seqlens_padded: int32 ``[B + 1]``, physical offsets, where they differ.

        Raises:
            PackingError: boundaries that decrease, lie beyond the row or do not divide; at once on
                a CPU, on a GPU where ``exact_later`` or ``check`` ask.

        Example:
            >>> cu_seqlens = torch.tensor([0, 579, 1157], dtype=torch.int32)
            >>> PackedLayout.from_boundaries(cu_seqlens, 1160).cu_seqlens_padded.tolist()
            [0, 579, 1157, 1160]
        """
        spec = RowSpec() if spec is None else as_spec(spec)
        cu_seqlens = physical = as_boundaries(cu_seqlens, "cu_seqlens")
        if cu_seqlens_padded is not None:
            physical = as_boundaries(
                cu_seqlens_padded, "cu_seqlens_padded", cu_seqlens, cu_seqlens.numel()
            )
        num_seqs = cu_seqlens.numel() - 1
        spec.check_room(num_seqs)
        padded = torch.cat([physical.clamp(0, length), torch.full_like(physical[:1], length)])
        room = padded.diff().clamp(min=0)
        real = torch.cat([physical[:1] * 0, cu_seqlens.diff().clamp(min=0).minimum(room[:-1])])
        parts = parts_of(num_seqs)
        values = {
            "status": reference.stage_status(
                cu_seqlens,
                physical,
                room,
                length,
                spec.seq_multiple,
                spec.on_overflow == "truncate",
            ).view(torch.int32),
            "cu_seqlens_expanded": real.cumsum(0),
            "cu_seqlens_padded": padded,
            "seq_start_expanded": padded,
        }
        tensor = cu_seqlens.new_zeros(parts["end"][0])
        for name, value in values.items():
            tensor.narrow(0, *parts[name]).copy_(value)
        layout = cls(
            tensor,
            spec,
            num_seqs=num_seqs,
            num_expanded=length,
            max_seqlen=max_seqlen_bound(length),
            has_tail=True,
            is_exact=False,
            space="expanded",
        )
        return layout.exact_later()() if may_look(cu_seqlens) else layout

    def _shrink(self) -> None:
        """Count what is cut; and leave to the tail only what it needs, and the row's multiple."""
        edges, starts = self.cu_seqlens_padded.cpu().numpy(), self.seq_start_expanded.cpu().numpy()
        lengths, rooms = starts[1:] - starts[:-1], edges[1:] - edges[:-1]
        self.num_cut = 0 if (lengths <= rooms).all() else int(self.is_cut.sum())
        last = int(edges[-2])
        if self.spec.fixed_length is None:
            needed = round_up(last + int(lengths[-1]), self.spec.total_multiple)
            self.num_expanded = min(needed, self.num_expanded)
        self.has_tail = self.num_expanded > last
        if edges[-1] != self.num_expanded:
            self.cu_seqlens_padded[-1] = self.num_expanded
            rooms[-1] = self.num_expanded - last
            self.max_seqlen = self.status[4] = int(rooms.max())

    # Between devices and processes

    def _with(self, tensor: Tensor, **changes) -> "PackedLayout":
        layout = PackedLayout(
            tensor, self.spec, **{name: getattr(self, name) for name in _FACTS} | changes
        )
        if layout.num_tiles is not None and "shares" in vars(self):
            layout.shares = self.shares
        return layout

    def with_shares(self, shares: Shares) -> "PackedLayout":
        """The same layout, which brings ``mp.vision.shares`` of its row along.

        Raises:
            PackingError: they are of another row, which is looked at on a CPU.
        """
        if may_look(self.tensor):
            check_shares(self, shares)
        end = parts_of(self.num_seqs, self.num_collapsed, self.num_images or 0)["end"][0]
        num_tiles, cp_size = shares.num_tiles, shares.cp_size
        parts = parts_of(self.num_seqs, self.num_collapsed, self.num_images, num_tiles, cp_size)
        tensor = self.tensor.new_zeros(parts["end"][0])
        tensor[:end] = self.tensor[:end]
        for name in ("encoder", "cu_tile_embeddings", "counts"):
            value = getattr(shares, name).reshape(-1)
            tensor.narrow(0, *parts[name]).copy_(value, non_blocking=True)
        layout = self._with(tensor, num_tiles=num_tiles, vision_cp_size=cp_size)
        layout.shares = shares
        return layout

    @cached_property
    def shares(self) -> Shares | None:
        """The tiles that each context-parallel rank encodes, on the CPU; None where nobody made
        shares. The host knows them, unless somebody pickled a layout that was on a GPU."""
        if self.num_tiles is None:
            return None
        counts = self._part("counts").cpu().view(self.vision_cp_size, self.vision_cp_size)
        return Shares(self.encoder.cpu(), self.cu_tile_embeddings.cpu(), counts)

    def to(self, device, non_blocking: bool = False) -> "PackedLayout":
        """The same layout on another device: one copy, or itself where it is there already."""
        tensor = self.tensor.to(device, non_blocking=non_blocking)
        return self if tensor is self.tensor else self._with(tensor)

    def pin_memory(self) -> "PackedLayout":
        """The same layout in pinned memory; a ``DataLoader`` calls this."""
        return self._with(self.tensor.pin_memory())

    def __reduce__(self):
        return _rebuild, (self.tensor, self.spec, {name: getattr(self, name) for name in _FACTS})

    def to_tensor(self, size: int | None = None, boundaries_only: bool = False) -> Tensor:
        """The layout as one integer tensor, for Megatron's ``broadcast_data`` and for pipeline
        stages; ``from_tensor`` is the inverse.

        Args:
            size: how long the tensor should be, so that every micro-batch has the same shape:
                ``tensor_size`` says what a row needs. By default as long as this row needs.
            boundaries_only: leave out all that a stage without tokens does not need.

        Returns:
            int32 ``[size]``: the memory of the layout itself where nothing is to be added or left
            out.

        Raises:
            PackingError: the row needs more than ``size``; and what ``check`` raises, where nobody
                has looked yet.

        Example:
            >>> ids = torch.tensor([11, 12, -200])
            >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
            >>> spec = RowSpec(seq_multiple=4)
            >>> layout = PackedLayout.build(ids, cu_seqlens, [9], spec, space="collapsed")
            >>> sent = layout.to_tensor(PackedLayout.tensor_size(num_seqs=8), boundaries_only=True)
            >>> received = PackedLayout.from_tensor(sent)
            >>> received.cu_seqlens_padded.tolist(), received.max_seqlen
            ([0, 4, 16, 16], 12)
        """
        layout = self if self.is_exact else self.exact_later()()
        if boundaries_only and layout.has_tokens:
            end = parts_of(layout.num_seqs)["end"][0]
            nothing = dict.fromkeys((
                "num_collapsed", "num_images", "num_image_embeddings", "num_cut", "num_tiles",
                "vision_cp_size",
            ))  # fmt: skip
            layout = layout._with(layout.tensor[:end].clone(), **nothing)
        used = layout.tensor.numel()
        if size is not None and used > size:
            raise PackingError(
                f"the layout needs {used} integers, but size={size}; PackedLayout.tensor_size says "
                f"what a row needs"
            )
        tensor = layout.tensor
        if size not in (None, used):
            tensor = torch.nn.functional.pad(tensor, (0, size - used))
        tensor[: len(_HEADER)].copy_(layout._header(), non_blocking=True)
        return tensor

    def _header(self) -> Tensor:
        """int32, on the CPU."""
        facts = {name: getattr(self, name) for name in _FACTS}
        facts["space"] = SPACES.index(self.space)
        words = [-1 if fact is None else int(fact) for fact in facts.values()]
        words = [_VERSION, *words, *self.spec.to_ints()]
        words.insert(1, _checksum(words, self.tensor))
        return torch.tensor(words, dtype=torch.int32)

    @staticmethod
    def tensor_size(
        num_seqs: int,
        num_tokens: int | None = None,
        num_images: int | None = None,
        num_tiles: int | None = None,
        cp_size: int = 1,
    ) -> int:
        """How many integers ``to_tensor`` needs for a row of at most so many sequences; tokens and
        images count too, unless it gives boundaries only; tiles, where it brings their shares."""
        return parts_of(num_seqs, num_tokens, num_images or 0, num_tiles, cp_size)["end"][0]

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "PackedLayout":
        """The layout that ``to_tensor`` made a tensor of.

        Args:
            tensor: integer ``[size]`` or ``[1, size]``, on any device. Reads it, so it synchronises
                once on a GPU.

        Returns:
            The layout, on the device of ``tensor`` and made of its memory, where that is int32 and
            begins at a multiple of 16 bytes. One that was sent as boundaries only has no tokens.

        Raises:
            PackingError: it is not such a tensor, or that of another version of this package.
        """
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PackingError(f"the layout is {found}, expected the int32 tensor of to_tensor()")
        tensor = tensor[0] if tensor.dim() == 2 and tensor.shape[0] == 1 else tensor
        if tensor.dim() != 1 or tensor.numel() < HEADER_SIZE + STATUS_SIZE:
            raise PackingError(f"the layout is {list(tensor.shape)}, expected that of to_tensor()")
        tensor = tensor.int().contiguous()
        on_host = tensor.cpu()  # whole: the shares of the vision tower stand at its end
        front = on_host[: HEADER_SIZE + STATUS_SIZE].tolist()
        words = dict(zip(_HEADER, front, strict=False))
        tensor = tensor[: _end_of(words, front[HEADER_SIZE:], tensor.numel())]
        checksum = words.pop("checksum")
        if may_look(tensor) and checksum not in (_NOT_SUMMED, _checksum(words.values(), tensor)):
            raise PackingError("the layout was damaged on its way: its sum is not what it was")
        facts = {name: _from_word(words[name]) for name in _FACTS}
        for name in ("has_tail", "is_exact"):
            facts[name] = bool(facts[name])
        facts["space"] = SPACES[words["space"]]
        spec = RowSpec.from_ints([words[name] for name in SPEC_FIELDS])
        layout = cls(tensor if _is_aligned(tensor) else tensor.clone(), spec, **facts)
        if layout.num_tiles is not None:
            layout.shares = cls(on_host, spec, **facts).shares
        return layout

    # What is wrong with a row

    def check(self) -> None:
        """Raise what is wrong with the row, if anything is (synchronises on a GPU).

        Raises:
            PlaceholderMismatch, BoundarySpaceError, PackingError: as ``build`` says.
        """
        if not self.is_exact:
            self.exact_later()()

    def exact_later(self) -> Callable[[], "PackedLayout"]:
        """Queue a copy of ``status`` to the host, and return a function that waits for it.

        That function gives the layout with its exact ``max_seqlen``, or raises what ``check``
        raises. What is queued on the GPU in between keeps it busy while the host waits.
        """
        read = read_later(self.status)
        return lambda: self.exact(Status(*read()))

    def exact(self, status: Status) -> "PackedLayout":
        """The same layout, once the host has read its status; or the error that the status says."""
        layout = self._with(self.tensor)
        layout._read(status)
        return layout

    def _read(self, status: Status) -> None:
        """Know what the status says.

        Raises:
            PackingError: it says that something is wrong.
        """
        if status.fault:
            raise explain(self, status)
        self.is_exact, self.max_seqlen = True, status.max_seqlen
        if self.has_tokens:
            self.num_image_embeddings = status.num_image_embeddings

    def placeholders_per_seq(self) -> list[int]:
        """How many placeholders each sequence has; those of the tail count to the last."""
        before = torch.nn.functional.pad(self.is_placeholder.cumsum(0), (1, 0))
        starts = self.seq_start_collapsed.long()[:-1].clone()
        starts[-1] = self.num_collapsed
        return before[starts].diff().tolist()

    def _check_images_per_seq(self, images_per_seq: tuple[int, ...]) -> None:
        counts = self.placeholders_per_seq()
        for seq, (found, entries) in enumerate(zip(counts, images_per_seq, strict=True)):
            if found != entries:
                raise PlaceholderMismatch(
                    actual=entries,
                    expected=found,
                    message=f"sequence {seq}: {found} placeholders (id {self.spec.image_token_id}) "
                    f"but {entries} entries in tokens_per_image; pass one for each placeholder",
                )

    # The parts of the tensor

    def _part(self, name: str) -> Tensor | None:
        return self.tensor.narrow(0, *self._parts[name]) if name in self._parts else None

    @cached_property
    def status(self) -> Tensor:
        """int64 ``[6]``, what is wrong with the row, and more: ``errors.Status``."""
        return self.tensor.narrow(0, *self._parts["status"]).view(torch.int64)

    @cached_property
    def cu_seqlens_expanded(self) -> Tensor:
        """int32 ``[B + 1]``, real boundaries in expanded space."""
        return self.tensor.narrow(0, *self._parts["cu_seqlens_expanded"])

    @cached_property
    def cu_seqlens_padded(self) -> Tensor:
        """int32 ``[B + 2]``, physical offsets in expanded space; the last sequence is the tail."""
        return self.tensor.narrow(0, *self._parts["cu_seqlens_padded"])

    @cached_property
    def seq_start_expanded(self) -> Tensor:
        """int32 ``[B + 2]``, the position each sequence starts with if nothing is padded, and the
        length of that row."""
        return self.tensor.narrow(0, *self._parts["seq_start_expanded"])

    @cached_property
    def cu_seqlens_collapsed(self) -> Tensor | None:
        """int32 ``[B + 1]``, real boundaries in tokens."""
        return self._part("cu_seqlens_collapsed")

    @cached_property
    def seq_start_collapsed(self) -> Tensor | None:
        """int32 ``[B + 2]``, the token each sequence starts with, and ``T``."""
        return self._part("seq_start_collapsed")

    @cached_property
    def input_ids(self) -> Tensor | None:
        """int32 ``[T]``, the collapsed row."""
        return self._part("input_ids")

    @cached_property
    def expanded_start(self) -> Tensor | None:
        """int32 ``[T + 1]``, ``t + sum of (tokens_per_image - 1)`` over the placeholders before
        ``t``: where token ``t`` starts if nothing is padded."""
        return self._part("expanded_start")

    @cached_property
    def image_start(self) -> Tensor | None:
        """int32 ``[N]``, ``expanded_start`` of each placeholder."""
        return self._part("image_start")

    @cached_property
    def cu_image_embeddings(self) -> Tensor | None:
        """int32 ``[N + 1]``, prefix sums of ``tokens_per_image``."""
        return self._part("cu_image_embeddings")

    @cached_property
    def encoder(self) -> Tensor | None:
        """int32 ``[tiles]``, the context-parallel rank that encodes each; see ``shares``."""
        return self._part("encoder")

    @cached_property
    def cu_tile_embeddings(self) -> Tensor | None:
        """int32 ``[tiles + 1]``, prefix sums of what each tile becomes."""
        return self._part("cu_tile_embeddings")

    # What is known of a row

    @property
    def may_be_cut(self) -> bool:
        """Whether tokens could have fallen off the end of the row, as far as the host knows."""
        if self.num_cut is not None or not self.has_tokens:
            return bool(self.num_cut)
        if self.num_image_embeddings is None:
            return True
        needed = self.num_collapsed - self.num_images + self.num_image_embeddings
        needed += self.num_seqs * (self.spec.seq_multiple - 1)
        return needed > self.num_expanded

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
        """bool ``[S]``, True for padding: behind each sequence's real positions, and the tail."""
        seq, offset = _find_seq(self.cu_seqlens_padded, self.num_expanded)
        length = torch.nn.functional.pad(self.cu_seqlens_expanded.diff(), (0, 1))
        return offset >= length.index_select(0, seq)

    @property
    def is_placeholder(self) -> Tensor:
        """bool ``[T]``, True for what an expanding model replaces."""
        if not self.spec.expands:
            return torch.zeros_like(self.input_ids, dtype=torch.bool)
        return self.input_ids == self.spec.image_token_id

    @property
    def is_before_image(self) -> Tensor:
        """bool ``[T]``, True for tokens that a placeholder of the same sequence follows."""
        follows = self.is_placeholder & (self.position_ids_collapsed > 0)
        return torch.nn.functional.pad(follows, (0, 1)).narrow(0, 1, self.num_collapsed)

    @property
    def tail_length(self) -> Tensor:
        """int32 ``[1]``, the positions of the tail that are not padding."""
        room = self.cu_seqlens_padded[-1:] - self.cu_seqlens_padded[-2:-1]
        length = self.seq_start_expanded[-1:] - self.seq_start_expanded[-2:-1]
        return length.clamp(min=0).minimum(room)

    @property
    def is_cut(self) -> Tensor:
        """bool ``[T]``, True for tokens whose first position fell off the end of the row."""
        seq, _ = _find_seq(self.seq_start_collapsed, self.num_collapsed)
        start = self.expanded_start.narrow(0, 0, self.num_collapsed)
        offset = start - self.seq_start_expanded.index_select(0, seq)
        return offset >= self.cu_seqlens_padded.diff().index_select(0, seq)

    def __repr__(self) -> str:
        device = self.tensor.device
        if not self.has_tokens:
            return (
                f"PackedLayout({self.num_seqs} sequences, {self.num_expanded} positions, {device})"
            )
        return (
            f"PackedLayout({self.num_seqs} sequences, {self.num_images} images, "
            f"{self.num_collapsed} tokens -> {self.num_expanded} positions, {device})"
        )


def remap_cu_seqlens(
    cu_seqlens: Tensor,
    input_ids: Tensor,
    tokens_per_image: Tensor | Sequence,
    image_token_id: int = -200,
) -> Tensor:
    """Move collapsed boundaries to where they are after every placeholder became its positions.

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
    spec = RowSpec(image_token_id=image_token_id)
    layout = PackedLayout.build(input_ids, cu_seqlens, tokens_per_image, spec, space="collapsed")
    return layout.cu_seqlens_expanded


def read_later(values: Tensor) -> Callable[[], list[int]]:
    """Queue a copy of a few integers to pinned memory; the function returned waits for them."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return wait


def max_seqlen_bound(length: int) -> int:
    """An upper bound of every sequence in a row of this length.

    Never the length itself: mcore's unfused RoPE would take it for absolute positions.
    """
    return round_up(length + 1, _MAX_SEQLEN_STEP)


def _not_a_space(space) -> PackingError:
    if space is None:
        return PackingError(
            "space is not said: pass space='collapsed' if boundaries count tokens, "
            "space='expanded' if they count positions; mp.find_space says what they can count"
        )
    if space == "auto":
        return PackingError("space='auto' is no more: ask mp.find_space, and say what it answers")
    return PackingError(f"space is {space!r}, expected 'collapsed' or 'expanded'")


def _rebuild(tensor: Tensor, spec: RowSpec, facts: dict) -> PackedLayout:
    return PackedLayout(tensor, spec, **facts)


def _from_word(word: int) -> int | None:
    return None if word == -1 else word


def _end_of(words: dict[str, int], status: list[int], size: int) -> int:
    """Where a layout's tensor ends, by its header.

    Raises:
        PackingError: ``to_tensor`` never writes such a header, or the tensor is shorter.
    """
    if words["version"] in _OLD_VERSIONS:
        raise PackingError(
            f"the layout was written by mcore_packing {_OLD_VERSIONS[words['version']]}: run the "
            f"same version everywhere"
        )
    has_tokens = words["num_collapsed"] != -1
    limits = {
        "num_seqs": (1, size),
        "num_collapsed": (1, size) if has_tokens else (-1, -1),
        "num_images": (0, size) if has_tokens else (-1, -1),
        "num_expanded": (0, INT32_MAX),
        "num_image_embeddings": (-1, INT32_MAX),
        "max_seqlen": (0, INT32_MAX),
        "has_tail": (0, 1),
        "is_exact": (1, 1),
        "space": (0, 1),
        "num_cut": (-1, size),
        "num_tiles": (-1, size) if has_tokens else (-1, -1),
        "vision_cp_size": (-1, size),
        "on_overflow": (0, 1),
        "expands": (0, 1),
    }
    is_whole = words["version"] == _VERSION and not any(status[:2])  # no fault
    if is_whole and all(low <= words[name] <= high for name, (low, high) in limits.items()):
        num_tokens = words["num_collapsed"] if has_tokens else None
        num_tiles, cp_size = _from_word(words["num_tiles"]), max(words["vision_cp_size"], 0)
        sizes = words["num_seqs"], num_tokens, max(words["num_images"], 0), num_tiles, cp_size
        end = parts_of(*sizes)["end"][0]
        if end <= size:
            return end
    raise PackingError(
        f"a tensor of {size} integers that begins with {words['version']} is not what "
        f"PackedLayout.to_tensor() gives"
    )


def _checksum(words: Iterable[int], tensor: Tensor) -> int:
    """Of a header's other words and all parts behind it, where looking costs nothing."""
    if not may_look(tensor):
        return _NOT_SUMMED
    front = zlib.crc32(np.array(list(words), dtype=np.int32))
    return zlib.crc32(tensor[HEADER_SIZE:].numpy(), front) & INT32_MAX


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.storage_offset() % 4 == 0


def _find_seq(starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sequence that each of ``size`` positions lies in, and how far behind its start."""
    position = torch.arange(size, device=starts.device)
    starts = starts.long()
    seq = reference.last_at_or_below(starts, position)
    return seq, position - starts.index_select(0, seq)
