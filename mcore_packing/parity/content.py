"""Rows made of another row: with other content, other boundaries, one of its samples."""

import dataclasses
from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import get_packer, split
from ..data.rows import Row, check_members
from ..errors import PackingError
from ..layout import PackedLayout
from ..reference import IGNORE_INDEX
from ..spec import RowSpec

EVERY = 4  # of so many tokens one stays, to be watched
SEED = 20


class _Tokens(NamedTuple):
    """What a row has for each of its tokens, ``[T]``: without the padding that the rows of a model
    have which does not expand."""

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor

    @classmethod
    def of(cls, row: Row) -> "_Tokens":
        found = (getattr(row, name)[0] for name in cls._fields)
        if row.layout.spec.expands:
            return cls(*found)
        return cls(*(column[~row.layout.padding_mask] for column in found))

    def in_row(self, row: Row, layout: PackedLayout, **changes) -> Row:
        """The row with these tokens, its first ones, laid out like that."""
        tokens = self
        if layout is not row.layout:
            changes = {"columns": {}, "positions": _positions(row, layout), **changes}
        if not layout.spec.expands:
            real = (~layout.padding_mask).nonzero().flatten()
            fills = layout.spec.pad_token_id, IGNORE_INDEX, 0
            tokens = (
                column.new_full([layout.num_expanded], fill).scatter(0, real, column)
                for column, fill in zip(self, fills, strict=True)
            )
        named = {name: column[None] for name, column in zip(self._fields, tokens, strict=True)}
        return dataclasses.replace(row, layout=layout, **named, **changes)


def with_all_labels(row: Row) -> Row:
    """The row with a label at every token, so that a log-probability of each can be compared.

    Where nothing is trained it is the next token of the same sample, or 0 where that is none that a
    model could predict. What is trained, and the loss mask, stay.

    Raises:
        PackingError: a placeholder, or what is no token, is trained.
    """
    (ids, labels, mask), image = _Tokens.of(row), row.layout.spec.image_token_id
    is_image = ids == image
    ends = row.layout.cu_seqlens_collapsed[1:].long()
    has_next = torch.ones_like(is_image)
    has_next[ends[ends > 0] - 1] = False
    has_next[:-1] &= ~is_image[1:]
    trained = (labels != IGNORE_INDEX) & (mask > 0)
    wrong = trained & ((labels < 0) | (labels == image))
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise PackingError(
            f"label {token} of the row is {int(labels[token])} and trained, expected the id of a "
            f"token that the model can predict"
        )
    following = ids.roll(-1).where(has_next, 0)
    return _Tokens(ids, labels.where(trained, following), mask).in_row(row, row.layout)


def one_by_one(row: Row, length: int | None = None) -> list[Row]:
    """Every sample of a row in a row of its own, laid out as the row is.

    Args:
        row: of ``mp.data``.
        length: that all rows must have, where the model takes no other.

    Raises:
        PackingError: the boundaries of the row are not those of its samples.
    """
    spec = row.layout.spec
    if length is not None and spec.fixed_length is None:
        spec = dataclasses.replace(spec, fixed_length=length, max_length=None)
    check_members(row)
    if not spec.expands:
        return [_slice(row, sequence, spec) for sequence in range(row.layout.num_seqs)]
    packer, rows = get_packer("concatenative", spec), []
    for sequence, sample in enumerate(split(row)):
        try:
            rows.append(packer.join([sample]))
        except PackingError as error:
            raise PackingError(
                f"sequence {sequence} of the row is not its sample: {error}"
            ) from error
    return rows


def _slice(row: Row, sequence: int, spec: RowSpec) -> Row:
    """One sample of a row for a model that does not expand."""
    begin, end = row.layout.cu_seqlens_collapsed[sequence : sequence + 2].tolist()
    tokens = _Tokens(*(column[begin:end] for column in _Tokens.of(row)))
    edges = row.layout.cu_seqlens_collapsed.new_tensor([0, end - begin])
    layout = PackedLayout.build(tokens.input_ids, edges, [], spec, space="collapsed")
    spans = {name: _entries(row, name)[sequence] for name in row.media}
    return tokens.in_row(
        row,
        layout,
        positions=_positions(row, layout, begin),
        media={name: row.media[name][i:j] for name, (i, j) in spans.items() if i < j},
        indices=row.indices[sequence : sequence + 1],
        members=row.members[sequence : sequence + 1],
        num_trained=int((tokens.loss_mask > 0).sum()),
    )


def _entries(row: Row, name: str) -> list[tuple[int, int]]:
    """Where what each sample has of a medium begins and ends in the row's."""
    sizes = (member.media.get(name) for member in row.members)
    sizes = (size if isinstance(size, int) else 0 for size in sizes)  # else of an empty tensor
    return list(pairwise(accumulate(sizes, initial=0)))


def _positions(row: Row, layout: PackedLayout, begin: int = 0) -> Tensor | None:
    """What samples brought as position ids, from a token on, where another layout puts it."""
    if row.positions is None:
        return None
    known = row.positions[..., ~row.layout.padding_mask]
    positions = known.new_zeros((*known.shape[:-1], layout.num_expanded))
    is_real = ~layout.padding_mask
    positions[..., is_real] = known[..., begin : begin + int(is_real.sum())]
    return positions


def laid_out_anew(row: Row, cu_seqlens: Sequence[int], num_tokens: int | None = None) -> Row:
    """The first tokens of a row under other boundaries.

    Args:
        row: of ``mp.data``.
        cu_seqlens: collapsed, to its last token.
        num_tokens: how many tokens it keeps, by default all; there is no image in the others.

    Raises:
        PackingError: what comes out does not fit the model.
    """
    layout, tokens = row.layout, _Tokens(*(column[:num_tokens] for column in _Tokens.of(row)))
    edges = layout.cu_seqlens_collapsed.new_tensor(cu_seqlens)
    counts = layout.cu_image_embeddings.diff()
    anew = PackedLayout.build(tokens.input_ids, edges, counts, layout.spec, space="collapsed")
    return tokens.in_row(row, anew)


def as_one_sequence(row: Row) -> Row:
    """The row with all boundaries dropped but the last."""
    return laid_out_anew(row, [0, int(row.layout.cu_seqlens_collapsed[-1])])


def with_moved_boundaries(row: Row, step: int = 1) -> Row | None:
    """The row with every boundary between samples late by so many tokens, or else early.

    Where padding then needs more room than there is, the row loses some text at its end.

    Returns:
        None where no such row fits the model.
    """
    edges = row.layout.cu_seqlens_collapsed.tolist()
    is_image = _Tokens.of(row).input_ids == row.layout.spec.image_token_id
    last_image = int(is_image.nonzero()[-1]) if bool(is_image.any()) else 0
    room = edges[-1] - max(edges[-2], last_image)  # of text behind the last image
    for cut in range(min(2 * row.layout.spec.seq_multiple, room)):
        for moves in (step, -step):
            end = edges[-1] - cut
            moved = [0, *(edge + moves for edge in edges[1:-1]), end]
            if all(a < b for a, b in pairwise(moved)):
                try:
                    return laid_out_anew(row, moved, end)
                except PackingError:
                    continue
    return None


class Content:
    """What of a row can become something else without moving anything.

    Text changes places with other text of the row. Image tokens stay, what stands beside them where
    a model does not expand (its markers), and one text token of ``EVERY``: what that one gives can
    change by what it attends to only. Pixels are drawn anew. All ranks come to the same.

    Args:
        row: of ``mp.data``, with labels everywhere.
        keep_ids: further ids that stay.

    Attributes:
        later: bool ``[real positions]``, those that come after something of their sample that
            changes.
        watched: those of them whose own token stays.
    """

    def __init__(self, row: Row, keep_ids: Collection[int] = ()):
        check_members(row)
        self.row, layout = row, row.layout.to("cpu")
        self.ids = ids = _Tokens.of(row).input_ids.cpu()
        is_image = ids == layout.spec.image_token_id
        fixed = is_image | torch.isin(ids, torch.tensor(list(keep_ids), dtype=ids.dtype))
        if not layout.spec.expands:
            fixed[1:] |= is_image[:-1]
            fixed[:-1] |= is_image[1:]
        self.pool = ids[~fixed & ~torch.isin(ids, ids[fixed])].unique()
        can_change = torch.isin(ids, self.pool) & (self.pool.numel() > 1)
        starts, token = layout.seq_start_collapsed.long(), torch.arange(ids.numel())
        self.sample = torch.searchsorted(starts[:-1], token, right=True) - 1  # the tail's is B
        place = token - starts[self.sample]
        stays = can_change & (place % EVERY == EVERY // 2) & ~torch.isin(token, starts - 1)
        self.changes = can_change & ~stays
        self.new_ids, self.new_media = self._new_ids(ids), self._new_media()
        changes = self.changes | (is_image & bool(self.new_media))
        count = torch.nn.functional.pad(changes.cumsum(0), (1, 0))
        later = count[1:] > count[starts[self.sample]]
        real = int(layout.cu_seqlens_expanded[-1])
        self.later, self.watched = (
            torch.repeat_interleave(of_tokens, layout.expanded_start.diff())[:real]
            for of_tokens in (later, later & stays)
        )

    def changed(self, samples: Collection[int]) -> Row:
        """The row with other content in these samples."""
        row, (ids, labels, mask) = self.row, _Tokens.of(self.row)
        ours = torch.isin(self.sample, torch.tensor(sorted(samples))) & self.changes
        ids = self.new_ids.where(ours, self.ids).to(ids.device)
        media = dict(row.media)
        for name, new in self.new_media.items():
            media[name], entries = media[name].clone(), _entries(row, name)
            for sample in samples:
                first, last = entries[sample]
                media[name][first:last] = new[first:last]
        row = _Tokens(ids, labels, mask).in_row(row, row.layout, media=media)
        if not row.layout.spec.expands:  # nothing of its layout depends on its ids
            return row
        return laid_out_anew(row, row.layout.cu_seqlens_collapsed.tolist())

    def _new_ids(self, ids: Tensor) -> Tensor:
        """Another id of the pool for each."""
        count, generator = self.pool.numel(), torch.Generator().manual_seed(SEED)
        if count < 2:
            return ids
        steps = torch.randint(1, count, ids.shape, generator=generator)
        return self.pool[(torch.searchsorted(self.pool, ids) + steps) % count]

    def _new_media(self) -> dict[str, Tensor]:
        """Noise as bright and as rich in contrast as the images and videos."""
        found = {}
        for name, known in self.row.media.items():
            if known.is_floating_point() and known.numel():
                noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(SEED))
                spread = known.float().std(correction=0).clamp(min=0.1)
                new = noise.to(known.device) * spread + known.float().mean()
                found[name] = new.to(known.dtype)
        return found
