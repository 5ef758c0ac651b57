"""The vision tower shared over context-parallel ranks: each encodes some tiles of a row, and image
embeddings travel to where their positions are."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..context_parallel import chunks_of
from ..errors import PackingError, PlaceholderMismatch
from ..expand import as_images, source_positions
from ..inputs import may_look
from ..layout import PackedLayout
from ..reference import FIRST_IMAGE, PAD, last_at_or_below
from ..vision import Shares, shares
from .dummy import is_waited_for
from .params import CU_SEQLENS
from .releases import Release, tokens_per_tile


class VisionShare:
    """The part of the vision tower that this rank does for one packed row.

    Args:
        model: which is called.
        layout: of the row, which has images.
        parts: which rank encodes which tile.

    Attributes:
        tiles: those of this rank, none where there are fewer tiles than ranks.
        num_embeddings: what they become.
    """

    def __init__(self, model: LLaVAModel, layout: PackedLayout, parts: Shares):
        self.model, self.layout, self.parts = model, layout, parts
        self.group, self.cp_rank = model.cp_group, model.cp_group.rank()
        self.tiles = parts.tiles_of(self.cp_rank)
        self.num_embeddings = parts.num_embeddings_of(self.cp_rank)
        trained = (model.vision_model, model.vision_projection)
        self.trains = torch.is_grad_enabled() and any(
            weight.requires_grad for part in trained for weight in part.parameters()
        )

    def narrow(self, given: Mapping, has_sizes: bool) -> dict:
        """The arguments of ``forward`` that hold tiles, with this rank's tiles only.

        ``images`` hold those alone where ``packed_seq_params`` say so (``vision_share``), as rows
        of ``rows.shard_vision`` do; else all tiles of the row.

        Args:
            given: the arguments of ``forward``, by their names.
            has_sizes: whether tiles have sizes of their own, ``imgs_sizes``: then ``images`` are
                their patches ``[1, patches, width]``.

        Raises:
            PlaceholderMismatch: ``images`` hold another number of tiles.
            PackingError: they hold another rank's, or ask for a gradient that no rank sends back.
        """
        images = given.get("images")
        if not isinstance(images, Tensor):
            raise PackingError(
                f"images is a {type(images).__name__}, expected a tensor of the "
                f"{self.parts.num_tiles} tiles of the row"
            )
        if images.requires_grad and torch.is_grad_enabled() and not self.trains:
            raise PackingError(
                "images ask for a gradient, which ranks that share a vision tower send back only "
                "where it or its projector is trained: install without vision_dp_over_cp"
            )
        held = getattr(given["packed_seq_params"], "vision_share", None)
        here = self.cp_rank, self.parts.cp_size
        if held not in (None, here):
            raise PackingError(
                "images hold the tiles of context-parallel rank {} of {}, but this is rank {} of "
                "{}: shard_vision takes parallel_state.get_context_parallel_rank()".format(
                    *held, *here
                )
            )
        if not has_sizes:
            return {"images": self._narrow(images, 0, [1] * self.parts.num_tiles, self.tiles, held)}
        sizes = torch.as_tensor(given["imgs_sizes"])
        patches = (sizes // self.model.vision_model.patch_dim).prod(-1).tolist()
        if not self.tiles and images.shape[1] and is_waited_for(self.model):
            tiles = [patches.index(min(patches))]  # a dummy: the smallest of the row
        else:
            tiles = self.tiles
        narrowed = self._narrow(images, 1, patches, tiles, held)
        if not narrowed.numel():
            return {"images": images[:0]}
        params = given.get("vision_packed_seq_params")
        of_sizes = {"images": narrowed, "imgs_sizes": given["imgs_sizes"][tiles]}
        if params is not None:
            lengths = [patches[tile] for tile in tiles]
            of_sizes["vision_packed_seq_params"] = _with_lengths(params, lengths)
        return of_sizes

    def _narrow(
        self, images: Tensor, dim: int, sizes: list[int], tiles: list[int], held: tuple | None
    ) -> Tensor:
        """The entries of some tiles along a dimension, of which each tile has ``sizes``."""
        found, total = images.shape[dim], sum(sizes)
        expected, of = total, "all tiles of the row"
        if held is not None:
            expected = sum(sizes[tile] for tile in tiles)
            of = f"the tiles of context-parallel rank {self.cp_rank} alone"
        if found != expected:
            raise PlaceholderMismatch(
                f"images hold {found} {('tiles', 'patches')[dim]}, expected {expected}: {of}, as "
                f"packed_seq_params say (vision_share is {held})",
                actual=found,
                expected=expected,
            )
        if held is not None:
            return images
        ends = list(itertools.accumulate(sizes))
        spans = (range(ends[tile] - sizes[tile], ends[tile]) for tile in tiles)
        index = torch.tensor([*itertools.chain(*spans)], dtype=torch.long)
        index = index.pin_memory() if images.is_cuda else index
        return images.index_select(dim, index.to(images.device, non_blocking=True))

    def fill(self, text: Tensor, images: Tensor | None, source: Tensor) -> Tensor:
        """The embeddings of this rank's positions, ``[S / cp, H]``: a collective of its
        context-parallel group, as is the backward pass.

        Args:
            text: ``[T, H]``.
            images: ``[L, tiles, H]`` of this rank's tiles. A rank without any may have a dummy,
                which takes part with weight zero.
            source: of each position, as ``expand_tokens`` says.
        """
        if images is not None:
            images = as_images(images, text)  # an embedding of another type does not travel
        found = 0 if images is None or not self.tiles else images.shape[:2].numel()
        if found != self.num_embeddings:
            raise PlaceholderMismatch(
                f"{len(self.tiles)} tiles of context-parallel rank {self.cp_rank} gave {found} "
                f"embeddings, but their placeholders become {self.num_embeddings}",
                actual=found,
                expected=self.num_embeddings,
            )
        way = routes(self.layout, self.parts, source, self.cp_rank)
        if images is not None and not self.tiles:
            num_dummy = images.shape[:2].numel()
            way = way._replace(image_position=source.new_full((num_dummy,), PAD))
        return _ExpandShared.apply(text, images, way, self)

    def exchange(self, vectors: Tensor, back: bool = False):
        """Send image embeddings, or gradients ``back``; gives what comes, and how to wait."""
        here = self.cp_rank
        sends, gets = list(self.parts.num_sent[here]), [row[here] for row in self.parts.num_sent]
        sends[here] = gets[here] = 0
        if back:
            sends, gets = gets, sends
        received = vectors.new_empty(sum(gets), vectors.shape[1])
        work = dist.all_to_all_single(
            received, vectors.contiguous(), gets, sends, group=self.group, async_op=True
        )
        return received, work.wait


class Routes(NamedTuple):
    """Where the image embeddings that a rank makes go, and where those of others arrive.

    Attributes:
        source: int32 ``[P]``, of each position: a text token; ``PAD``, also where an embedding of
            another rank arrives; or ``FIRST_IMAGE - e``, where ``e`` counts this rank's own.
        text_position: int32 ``[T]``, where each text token went, -1 if not on this rank.
        image_position: int32 ``[own]``, likewise of its own image embeddings.
        sent: int64, which of its own go to other ranks, by rank, in their order.
        arrives: int64, at which positions those of other ranks arrive, by rank, in their order.
    """

    source: Tensor
    text_position: Tensor
    image_position: Tensor
    sent: Tensor
    arrives: Tensor


def routes(layout: PackedLayout, parts: Shares, source: Tensor, cp_rank: int) -> Routes:
    """What travels, on the row's device. Nothing waits: how much it is, the shares say."""
    device, cp_size, total = source.device, parts.cp_size, sum(parts.tile_sizes)
    stays = parts.num_sent[cp_rank][cp_rank]
    num_sent = sum(parts.num_sent[cp_rank]) - stays
    num_received = sum(row[cp_rank] for row in parts.num_sent) - stays
    encoder, ends = layout.encoder, layout.cu_tile_embeddings
    embedding = torch.arange(total, device=device)
    tile = last_at_or_below(ends, embedding.int())
    encoder = encoder.index_select(0, tile)
    own = _first(encoder != cp_rank, parts.num_embeddings_of(cp_rank))
    positions = source_positions(layout, total, cp_size, cp_rank)

    owner = _owner(layout, own, cp_size)
    sent = _first(torch.where(owner == cp_rank, cp_size, owner), num_sent)

    comes = (positions.images >= 0) & (encoder != cp_rank)
    arriving = _first(torch.where(comes, encoder, cp_size), num_received)
    arrives = positions.images.index_select(0, arriving).long()

    local = source.new_full((total + 1,), PAD)
    counted = torch.arange(len(own), dtype=source.dtype, device=device)
    local.index_copy_(0, own, FIRST_IMAGE - counted)
    mine = local.index_select(0, (FIRST_IMAGE - source.long()).clamp(0, total))
    source = torch.where(source < PAD, mine, source)
    image_position = positions.images.index_select(0, own)
    return Routes(source, positions.text, image_position, sent, arrives)


def _first(key: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest keys, in order; of equal ones the first comes first."""
    return key.int().sort(stable=True).indices[:count]


def _owner(layout: PackedLayout, embedding: Tensor, cp_size: int) -> Tensor:
    """Which rank owns the position of each image embedding; ``cp_size`` where it was cut off."""
    counts, starts = layout.cu_image_embeddings, layout.seq_start_expanded
    image = last_at_or_below(counts, embedding.int())
    within = embedding - counts.index_select(0, image)
    unpadded = layout.image_start.index_select(0, image) + within
    seq = last_at_or_below(starts, unpadded.int())
    room = layout.cu_seqlens_padded.diff().index_select(0, seq)
    offset = unpadded - starts.index_select(0, seq)
    chunk = offset // (room // chunks_of(cp_size)).clamp(min=1)
    owner = chunk.minimum(2 * cp_size - 1 - chunk)
    return torch.where(offset < room, owner, cp_size)


class _ExpandShared(torch.autograd.Function):
    """``expand_embeddings`` where others make some of the image embeddings.

    Each embedding is used by one rank, so the backward pass sends each gradient back, once.
    """

    @staticmethod
    def forward(ctx, text, images, way, share):
        ctx.way, ctx.share, ctx.num_tokens = way, share, text.shape[0]
        ctx.image_shape = None if images is None else images.shape[:2]
        vectors = text.new_empty(0, text.shape[1])
        if share.tiles:
            length = images.shape[0]
            vectors = images[way.sent % length, way.sent // length]
        received, wait = share.exchange(vectors)
        out = ops.expand_embeddings(text, images, way.source)  # while they travel
        wait()
        return out.index_copy_(0, way.arrives, received)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        way, share = ctx.way, ctx.share
        grad_text = grad_images = wait = None
        if share.trains:  # on all ranks alike
            returned, wait = share.exchange(grad.index_select(0, way.arrives), back=True)
        if ctx.needs_input_grad[0]:
            grad_text = ops.collect_gradients(grad, way.text_position, ctx.num_tokens, 1).squeeze(1)
        if ctx.needs_input_grad[1]:
            length, tiles = ctx.image_shape
            grad_images = ops.collect_gradients(grad, way.image_position, length, tiles)
        if wait is not None:
            wait()
            if share.tiles and grad_images is not None:
                grad_images[way.sent % length, way.sent // length] = returned
        return grad_text, grad_images, None, None


def share_of(
    model: LLaVAModel, release: Release, layout: PackedLayout, given: Mapping
) -> tuple[PackedLayout, VisionShare | None, dict]:
    """This rank's share of the vision tower.

    Returns:
        The layout, which has shares; the share; and the arguments of ``forward`` that change. No
        share where every rank encodes all there is: a row without images, or with videos, which
        Megatron shares by itself.

    Raises:
        PackingError: what is wrong with the row, or with the shares that came with it.
    """
    if not layout.num_images or _has_videos(model, given):
        return layout, None, {}
    if layout.tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise PackingError(
            "vision_dp_over_cp cannot be captured as a CUDA graph: other rows have other tiles"
        )
    sizes = tokens_per_tile(model, release, given)
    has_sizes = sizes is not None
    if layout.shares is None or layout.shares.cp_size != model.context_parallel_lm:
        if not may_look(layout.tensor):
            _warn_of_waiting()
            layout = layout if layout.is_exact else layout.exact_later()()
        tiles = given.get("num_image_tiles")
        if tiles is None or (has_sizes and len(sizes) == layout.num_images):
            tiles = torch.ones(layout.num_images, dtype=torch.int)
        parts = shares(layout, tiles.tolist(), model.context_parallel_lm, embeddings_per_tile=sizes)
        layout = layout.with_shares(parts)
    found = layout.shares.tile_sizes
    expected = sizes.tolist() if has_sizes else [model.img_seq_len] * len(found)
    if found != expected:
        raise PackingError(
            f"the shares of this row are of tiles that become {found} embeddings, but here they "
            f"become {expected}"
        )
    share = VisionShare(model, layout, layout.shares)
    return layout, share, share.narrow(given, has_sizes)


def _has_videos(model: LLaVAModel, given: Mapping) -> bool:
    """Whether it is a call with videos, which 0.18 and 0.19 split over the ranks by themselves."""
    return getattr(model, "temporal_patch_dim", 1) > 1 and given.get("num_frames") is not None


@functools.cache
def _warn_of_waiting() -> None:
    warnings.warn(
        "mcore_packing: vision_dp_over_cp waits for the GPU in every step, since rows come without "
        "the shares of its ranks: make layouts in the data path (mp.data.pack does), with "
        "layout.with_shares(mp.vision.shares(...))",
        stacklevel=6,
    )


def _with_lengths(params: PackedSeqParams, lengths: list[int]) -> PackedSeqParams:
    """The boundaries that the vision tower gets, of tiles with so many patches."""
    changes = dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), max(lengths))
    ends = params.cu_seqlens_q.new_tensor([0, *itertools.accumulate(lengths)])
    changes |= {name: ends for name in CU_SEQLENS if getattr(params, name) is not None}
    return dataclasses.replace(params, **changes)
