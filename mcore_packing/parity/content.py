"""Rows made of another row: with other content, other boundaries, one of its samples."""

import dataclasses
from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..data.rows import Row, get_packer, split
from ..errors import PackingError
from ..layout import PackedLayout
from ..reference import IGNORE_INDEX

EVERY = 4  # of so many tokens one stays, to be watched
SEED = 20


def with_all_labels(row: Row) -> Row:
    """The row with a label at every token, so that a log-probability of each can be compared.

    Where nothing is trained it is the next token of the same sample, or 0 where that is none that a
    model could predict. What is trained, and the loss mask, stay.
    """
    ids, is_image = row.input_ids[0], row.layout.is_placeholder
    ends = row.layout.cu_seqlens_collapsed[1:].long()
    has_next = torch.ones_like(is_image)
    has_next[ends[ends > 0] - 1] = False
    has_next[:-1] &= ~is_image[1:]
    following = ids.roll(-1).where(has_next, 0)
    trained = (row.labels[0] != IGNORE_INDEX) & (row.loss_mask[0] > 0)
    return dataclasses.replace(row, labels=row.labels[0].where(trained, following)[None])


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
    if len(row.members) != row.layout.num_seqs:
        raise PackingError(
            f"the row has {row.layout.num_seqs} sequences, but was packed with "
            f"{len(row.members)} samples"
        )
    samples = split(row)
    if not spec.expands:
        return [_slice(row, sequence, spec) for sequence in range(len(samples))]
    packer, rows = get_packer("concatenative", spec), []
    for sequence, sample in enumerate(samples):
        try:
            rows.append(packer.join([sample]))
        except PackingError as error:
            raise PackingError(
                f"sequence {sequence} of the row is not its sample: {error}"
            ) from error
    return rows


def _slice(row: Row, sequence: int, spec) -> Row:
    """One sample of a row for a model that does not expand."""
    begin, end = row.layout.cu_seqlens_collapsed[sequence : sequence + 2].tolist()
    part = {
        name: getattr(row, name)[:, begin:end] for name in ("input_ids", "labels", "loss_mask")
    }
    edges = row.layout.cu_seqlens_collapsed.new_tensor([0, end - begin])
    first, last = _entries(row)[sequence]
    return dataclasses.replace(
        row,
        **part,
        columns={name: column[..., begin:end] for name, column in row.columns.items()},
        media={**row.media, "images": row.images[first:last]},
        layout=PackedLayout.build(part["input_ids"], edges, [], spec, space="collapsed"),
        indices=row.indices[sequence : sequence + 1],
        members=row.members[sequence : sequence + 1],
    )


def _entries(row: Row) -> list[tuple[int, int]]:
    """Where the images of each sample begin and end in ``row.images``."""
    counts = torch.tensor([0, *(member.tiles or 0 for member in row.members)]).cumsum(0).tolist()
    return list(zip(counts[:-1], counts[1:], strict=True))


def laid_out_anew(row: Row, cu_seqlens: Sequence[int], num_tokens: int | None = None) -> Row:
    """The first tokens of a row under other boundaries.

    Args:
        row: of ``mp.data``.
        cu_seqlens: collapsed, to its last token.
        num_tokens: how many tokens it keeps, by default all; there is no image in the others.

    Raises:
        PackingError: what comes out does not fit the model.
    """
    layout = row.layout
    part = {name: getattr(row, name)[:, :num_tokens] for name in ("input_ids", "labels")}
    return dataclasses.replace(
        row,
        **part,
        loss_mask=row.loss_mask[:, :num_tokens],
        layout=PackedLayout.build(
            part["input_ids"],
            layout.cu_seqlens_collapsed.new_tensor(cu_seqlens),
            layout.cu_image_embeddings.diff(),
            layout.spec,
            space="collapsed",
        ),
    )


def as_one_sequence(row: Row) -> Row:
    """The row with all boundaries dropped but the last."""
    return laid_out_anew(row, [0, int(row.layout.cu_seqlens_collapsed[-1])])


def with_moved_boundaries(row: Row) -> Row | None:
    """The row with every boundary between samples one token late, or else one early.

    Where padding then needs more room than there is, the row loses some text at its end.

    Returns:
        None where no such row fits the model.
    """
    edges = row.layout.cu_seqlens_collapsed.tolist()
    for cut in range(min(2 * row.layout.spec.seq_multiple, _trailing_text(row))):
        end = edges[-1] - cut
        for step in (1, -1):
            moved = [0, *(edge + step for edge in edges[1:-1]), end]
            if len(edges) > 2 and all(a < b for a, b in pairwise(moved)):
                try:
                    return laid_out_anew(row, moved, end)
                except PackingError:
                    continue
    return None


def _trailing_text(row: Row) -> int:
    """How many tokens its last sample has, behind its last image."""
    is_image = row.input_ids[0] == row.layout.spec.image_token_id
    begin = int(row.layout.cu_seqlens_collapsed[-2])
    last_image = is_image.nonzero()[-1:].flatten().tolist()
    return row.input_ids.numel() - max(begin, *last_image, 0)


class Content:
    """What of a row can become something else without moving anything.

    Text changes places with other text of the row. Image tokens stay, what stands beside them where
    a model does not expand (its markers), and one text token of ``EVERY``: what that one gives can
    change by what it attends to only. Pixels are drawn anew. All ranks come to the same.

    Args:
        row: of ``mp.data``, with labels everywhere.
        keep_ids: further ids that stay.

    Attributes:
        later: bool ``[positions]``, those that come after something of their sample that changes.
        watched: those of them whose own token stays.
    """

    def __init__(self, row: Row, keep_ids: Collection[int] = ()):
        self.row, ids, layout = row, row.input_ids[0].cpu(), row.layout.to("cpu")
        is_image = ids == layout.spec.image_token_id
        fixed = is_image | torch.isin(ids, torch.tensor(list(keep_ids), dtype=ids.dtype))
        if not layout.spec.expands:
            fixed[1:] |= is_image[:-1]
            fixed[:-1] |= is_image[1:]
        self.pool = ids[~fixed & ~torch.isin(ids, ids[fixed])].unique()
        changes = torch.isin(ids, self.pool) & (self.pool.numel() > 1)
        starts = layout.cu_seqlens_collapsed.long()
        token = torch.arange(ids.numel())
        self.sample = torch.searchsorted(starts, token, right=True) - 1
        place = token - starts[self.sample]
        is_last = torch.isin(token, starts - 1)
        stays = changes & (place % EVERY == EVERY // 2) & ~is_last
        self.changes = changes & ~stays
        has_pixels = is_image & row.images.is_floating_point() & (row.images.numel() > 0)
        after = _after_first(self.changes | has_pixels, starts, self.sample)
        self.later = _at_positions(after, layout)
        self.watched = _at_positions(after & stays, layout)
        self.ids = self._new_ids(ids)
        self.images = self._new_images()

    def changed(self, samples: Collection[int]) -> Row:
        """The row with other content in these samples."""
        row, device = self.row, self.row.input_ids.device
        ours = torch.isin(self.sample, torch.tensor(sorted(samples)))
        ids = self.ids.where(ours & self.changes, row.input_ids[0].cpu()).to(device)
        images = row.images.clone()
        for sample in samples:
            first, last = _entries(row)[sample]
            images[first:last] = self.images[first:last]
        row = dataclasses.replace(
            row, input_ids=ids[None], media={**row.media, "images": images}
        )
        return laid_out_anew(row, row.layout.cu_seqlens_collapsed.tolist())

    def _new_ids(self, ids: Tensor) -> Tensor:
        """Another id of the pool for each."""
        count, generator = self.pool.numel(), torch.Generator().manual_seed(SEED)
        if count < 2:
            return ids
        steps = torch.randint(1, count, ids.shape, generator=generator)
        return self.pool[(torch.searchsorted(self.pool, ids) + steps) % count]

    def _new_images(self) -> Tensor:
        """Noise as bright and as rich in contrast as the images."""
        images = self.row.images
        if not images.is_floating_point() or not images.numel():
            return images
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))
        known = images.float()
        spread = known.std(correction=0).clamp(min=0.1)
        return (noise.to(images.device) * spread + known.mean()).to(images.dtype)


def _after_first(changes: Tensor, starts: Tensor, sample: Tensor) -> Tensor:
    """Of each sample, everything from its first token that changes on."""
    count = torch.nn.functional.pad(changes.cumsum(0), (1, 0))
    return count[1:] > count[starts[sample]]


def _at_positions(of_tokens: Tensor, layout: PackedLayout) -> Tensor:
    """bool ``[S]`` of bool ``[T]``, False for padding."""
    real = (~layout.padding_mask).nonzero().flatten()
    widths = layout.expanded_start.diff()
    found = torch.zeros(layout.num_expanded, dtype=torch.bool)
    found[real] = torch.repeat_interleave(of_tokens, widths)[: real.numel()]
    return found
