"""Which context-parallel rank encodes which tile of a row: known on the host, where rows are made.

Every rank owns some positions of a row, and needs the image embeddings that stand there. A tile is
encoded where most of its embeddings are needed, as far as the balance of the vision tower allows;
only the others travel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .context_parallel import check_multiple, chunks_of
from .errors import PackingError
from .inputs import as_positive
from .reference import prefix_sum, steps_of

if TYPE_CHECKING:
    from .layout import PackedLayout


@dataclass(frozen=True, eq=False)
class Shares:
    """The tiles of a row, shared over its context-parallel ranks.

    Attributes:
        encoder: int32 ``[tiles]``, the rank that encodes each tile.
        cu_tile_embeddings: int32 ``[tiles + 1]``, prefix sums of what each tile becomes.
        counts: int32 ``[cp, cp]``, how many image embeddings go from a rank (first) to another
            (second); the diagonal is what stays.
    """

    encoder: Tensor
    cu_tile_embeddings: Tensor
    counts: Tensor

    @property
    def cp_size(self) -> int:
        """Over how many ranks the tiles are shared."""
        return self.counts.shape[0]

    @property
    def num_tiles(self) -> int:
        """How many tiles the row has."""
        return self.encoder.numel()

    @cached_property
    def tile_sizes(self) -> list[int]:
        """How many embeddings each tile becomes."""
        return self.cu_tile_embeddings.diff().tolist()

    @cached_property
    def num_sent(self) -> list[list[int]]:
        """``counts``, as ints."""
        return self.counts.tolist()

    @cached_property
    def _tiles(self) -> list[list[int]]:
        tiles: list[list[int]] = [[] for _ in range(self.cp_size)]
        for tile, cp_rank in enumerate(self.encoder.tolist()):
            tiles[cp_rank].append(tile)
        return tiles

    def tiles_of(self, cp_rank: int) -> list[int]:
        """Which tiles a rank encodes, in their order."""
        return self._tiles[cp_rank]

    def num_embeddings_of(self, cp_rank: int) -> int:
        """How many image embeddings a rank makes, those included that were cut off the row."""
        return sum(self.tile_sizes[tile] for tile in self._tiles[cp_rank])


def shares(
    layout: "PackedLayout",
    tiles_per_image: Tensor | Sequence[int],
    cp_size: int,
    cost: Tensor | Sequence[float] | None = None,
    *,
    embeddings_per_tile: Tensor | Sequence[int] | None = None,
) -> Shares:
    """Share the tiles of a row over its context-parallel ranks: the same on every rank.

    A tile goes to the rank that needs most of its embeddings, as long as no rank does more than the
    average; those that are left go to whoever has done least. The ranks' costs differ by at most
    the largest tile's, so equal tiles by at most one a rank.

    Args:
        layout: of the row; on a GPU it is read, which waits.
        tiles_per_image: ``[N]`` (``num_image_tiles``), how many tiles each image has.
        cp_size: context-parallel size.
        cost: ``[tiles]``, what a tile costs the vision tower; by default what its patches do, of
            which there are as many for each of its embeddings.
        embeddings_per_tile: ``[tiles]``, how many embeddings each tile becomes. By default all
            tiles of an image become the same.

    Returns:
        The shares, on the CPU. Ties go to the lowest rank.

    Raises:
        PackingError: counts do not agree with the layout, or its sequences do not divide.

    Example:
        Four images of four embeddings each in one sequence of 16 positions:

        >>> from mcore_packing import PackedLayout, RowSpec
        >>> ids, cu_seqlens = torch.full((4,), -200), torch.tensor([0, 4], dtype=torch.int32)
        >>> spec = RowSpec(cp_size=2, seq_multiple=4)
        >>> layout = PackedLayout.build(ids, cu_seqlens, [4] * 4, spec, space="collapsed")
        >>> found = shares(layout, [1] * 4, cp_size=2)
        >>> found.encoder.tolist(), found.counts.tolist()
        ([0, 1, 1, 0], [[8, 0], [0, 8]])
    """
    as_positive(cp_size, "cp_size")
    if not layout.has_tokens:
        raise PackingError("this layout holds boundaries only, for a stage without tokens")
    check_multiple(cp_size, layout.spec.seq_multiple, layout.num_expanded)
    layout = layout.to("cpu")
    sizes = _tile_sizes(layout, tiles_per_image, embeddings_per_tile)
    ends = prefix_sum(sizes)
    need = _needs(layout, ends, cp_size)
    cost = sizes.astype(float) if cost is None else np.asarray(cost, dtype=float)
    if cost.shape != sizes.shape or (cost < 0).any() or not np.isfinite(cost).all():
        raise PackingError(f"cost is {list(cost.shape)}, expected [{sizes.size}], none below 0")
    encoder = _assign(need, cost)
    counts = _counts(need, encoder)
    return Shares(*(torch.from_numpy(x.astype(np.int32)) for x in (encoder, ends, counts)))


def check_shares(layout: "PackedLayout", parts: Shares) -> None:
    """Refuse shares of another row: embeddings would travel to positions that are not theirs.

    Raises:
        PackingError: these are not shares of this layout, which is on a CPU.
    """
    ends, images = parts.cu_tile_embeddings.numpy(), layout.cu_image_embeddings.numpy()
    whole = ends[-1] == images[-1] and bool(np.isin(images, ends).all())
    if whole:
        counts = _counts(_needs(layout, ends, parts.cp_size), parts.encoder.numpy())
        whole = np.array_equal(counts, parts.counts.numpy())
    if not whole:
        raise PackingError(
            f"these shares of {parts.num_tiles} tiles are of another row: make them of this "
            f"layout, with mp.vision.shares"
        )


def _counts(need: np.ndarray, encoder: np.ndarray) -> np.ndarray:
    """``[cp, cp]``, from every encoder what each rank needs: exact in float64, whose products are
    fast."""
    ranks = np.arange(need.shape[1])[:, None]
    return (encoder == ranks).astype(float) @ need.astype(float)


def _tile_sizes(layout: "PackedLayout", tiles_per_image, embeddings_per_tile) -> np.ndarray:
    """int64 ``[tiles]``, how many embeddings each tile becomes."""
    tiles = np.asarray(tiles_per_image, dtype=np.int64).reshape(-1)
    counts = steps_of(layout.cu_image_embeddings.numpy()).astype(np.int64)
    if tiles.size != counts.size or (tiles < 1).any():
        raise PackingError(
            f"tiles_per_image has {tiles.size} entries, expected one of at least 1 for each of "
            f"{counts.size} placeholders"
        )
    if embeddings_per_tile is None:
        uneven = np.flatnonzero(counts % tiles)
        if uneven.size:
            image = int(uneven[0])
            raise PackingError(
                f"image {image}: {counts[image]} embeddings are not {tiles[image]} equal tiles; "
                f"pass embeddings_per_tile="
            )
        return np.repeat(counts // tiles, tiles)
    sizes = np.asarray(embeddings_per_tile, dtype=np.int64).reshape(-1)
    whole = sizes.size == tiles.sum() and bool((sizes >= 1).all())
    if not whole or (prefix_sum(sizes)[prefix_sum(tiles)] != prefix_sum(counts)).any():
        raise PackingError(
            f"embeddings_per_tile does not say what {int(tiles.sum())} tiles become: its sums over "
            f"the tiles of each image are not tokens_per_image"
        )
    return sizes


def _needs(layout: "PackedLayout", ends: np.ndarray, cp_size: int) -> np.ndarray:
    """int64 ``[tiles, cp]``, how many embeddings of each tile every rank owns positions for."""
    start = layout.seq_start_expanded.numpy().astype(np.int64)
    room = steps_of(layout.cu_seqlens_padded.numpy()).astype(np.int64)[:, None]
    rank = np.arange(cp_size)

    def owned(offset: np.ndarray, room: np.ndarray) -> np.ndarray:
        """How many of a sequence's first ``offset`` positions each rank owns: of two chunks."""
        chunk = room // chunks_of(cp_size)
        first = np.minimum(np.maximum(offset - rank * chunk, 0), chunk)
        if cp_size == 1:
            return first
        return first + np.minimum(np.maximum(offset - (2 * cp_size - 1 - rank) * chunk, 0), chunk)

    before = np.zeros((room.size + 1, cp_size), dtype=np.int64)
    owned(steps_of(start)[:, None], room).cumsum(axis=0, out=before[1:])
    image_start = layout.image_start.numpy().astype(np.int64)
    first_embedding = layout.cu_image_embeddings.numpy().astype(np.int64)
    image = np.searchsorted(first_embedding, ends[:-1], side="right") - 1
    begin = image_start[image] + ends[:-1] - first_embedding[image]
    edges = np.concatenate([begin, begin + steps_of(ends)])
    seq = (np.searchsorted(start, edges, side="right") - 1).clip(0, room.size - 1)
    sums = before[seq] + owned((edges - start[seq])[:, None], room[seq])
    return sums[begin.size :] - sums[: begin.size]


def _assign(need: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """int64 ``[tiles]``, the rank of each."""
    num_tiles, cp_size = need.shape
    encoder = np.full(num_tiles, -1)
    average = cost.sum() / cp_size
    load, wanted = np.zeros(cp_size), need.copy()
    left = np.arange(num_tiles)
    while left.size:  # every tile asks the rank that needs most of it
        best = wanted[left].argmax(axis=1)
        gain = wanted[left, best]
        asks = gain > 0
        asking, best, gain = left[asks], best[asks], gain[asks]
        if not asking.size:
            break
        order = np.lexsort((asking, -gain, best))
        asking, best = asking[order], best[order]
        sums = cost[asking].cumsum()
        first = np.searchsorted(best, best)  # where those begin that ask the same rank
        taken = load[best] + sums - sums[first] + cost[asking[first]] <= average * (1 + 1e-9)
        encoder[asking[taken]] = best[taken]
        load += np.bincount(best[taken], cost[asking[taken]], cp_size)
        wanted[asking[~taken], best[~taken]] = 0
        left = asking[~taken]
    rest = np.flatnonzero(encoder < 0)
    rest = rest[np.lexsort((rest, -need[rest].max(axis=1, initial=0), -cost[rest]))]
    loads = load.tolist()
    for tile in rest.tolist():  # the largest first, to whoever has done least
        least = min(loads)
        idle = [rank for rank, done in enumerate(loads) if done == least]
        rank = max(idle, key=need[tile].__getitem__) if len(idle) > 1 else idle[0]
        encoder[tile] = rank
        loads[rank] += cost[tile]
    return encoder
