"""Embeddings, labels and columns through a layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .context_parallel import check_multiple, check_rank
from .errors import PackingError, PlaceholderMismatch
from .inputs import as_choice, as_row
from .layout import PackedLayout
from .reference import FIRST_IMAGE, PAD, ExpandedTokens, SourcePositions


def expand_embeddings(
    layout: PackedLayout, text: Tensor, images: Tensor | None, *, cp_size: int = 1, cp_rank: int = 0
) -> Tensor:
    """Fill the expanded row: every position is written once, padding with zeros. Differentiable.

    Args:
        layout: of this row.
        text: ``[T, H]``, embeddings of the collapsed tokens; those of placeholders are not used.
        images: ``[L, tiles, H]`` as Megatron's vision projection gives them, or ``[embeddings,
            H]``, of the same dtype as ``text``; None where the row has no images.
        cp_size: context-parallel size.
        cp_rank: the rank whose positions to write.

    Returns:
        ``[S / cp_size, H]``.

    Raises:
        PackingError: a shape or dtype does not fit the layout.
        PlaceholderMismatch: ``images`` holds another number of embeddings than the placeholders ask
            for.

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
    source = expand_tokens(layout, cp_size=cp_size, cp_rank=cp_rank).source
    return fill(layout, text, images, source, cp_size, cp_rank)


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
    embedding, an image's last position carries its placeholder's label, masked. Across a boundary
    nothing moves: a sequence that begins with an image costs the one before it nothing. A last
    label that is itself the placeholder's id was shifted over a boundary, and is dropped; labels
    that are shifted inside each sample never are.

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
    tokens = expand_tokens(layout, labels, loss_mask, cp_size, cp_rank)
    return (
        None if labels is None else tokens.labels,
        None if loss_mask is None else tokens.loss_mask,
    )


@dataclass(frozen=True)
class Column:
    """What else is known of every token: advantages, old log-probabilities, token types.

    Attributes:
        fill: what padding gets, and tokens of a sample that has no such column.
        shifted: whether entry ``t`` is about the prediction of token ``t + 1``, as Megatron's
            labels and loss mask; then the token before an image has none.
        images: what the positions of an image get: "fill", or "repeat", the entry of its
            placeholder.
    """

    fill: float | int | bool = 0
    shifted: bool = False
    images: str = "fill"

    def __post_init__(self):
        if not isinstance(self.fill, bool | int | float):
            raise PackingError(f"the fill of a column is {self.fill!r}, expected a number")
        if not isinstance(self.shifted, bool):
            raise PackingError(f"shifted is {self.shifted!r}, expected True or False")
        as_choice(self.images, "images", ("fill", "repeat"))


def expand_column(
    layout: PackedLayout,
    column: Tensor,
    spec: Column | float | int | bool = 0,
    *,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Move what is known of each token to the expanded row, by the rule of the loss mask.

    Args:
        layout: of this row.
        column: ``[T, ...]`` or ``[1, T, ...]``, of any dtype.
        spec: what it is; a bare value is what it is filled with.
        cp_size: context-parallel size.
        cp_rank: the rank whose positions to write.

    Returns:
        ``[S / cp_size, ...]``, of the same dtype. Does not wait for a GPU.

    Raises:
        PackingError: the column has another length than the row has tokens.

    Example:
        >>> ids, cu_seqlens = torch.tensor([5, -200, 6]), torch.tensor([0, 3], dtype=torch.int32)
        >>> layout = PackedLayout.build(ids, cu_seqlens, [2], space="collapsed")
        >>> advantages = torch.tensor([0.5, 0.0, 2.0])
        >>> expand_column(layout, advantages, 0.0).tolist()
        [0.5, 0.0, 0.0, 2.0]
        >>> expand_column(layout, torch.tensor([0, 1, 0]), Column(0, images="repeat")).tolist()
        [0, 1, 1, 0]
    """
    spec = spec if isinstance(spec, Column) else Column(spec)
    if not isinstance(column, Tensor) or column.dim() == 0:
        raise PackingError(f"column is a {type(column).__name__}, expected a tensor [T, ...]")
    num_tokens = layout.num_collapsed
    if column.dim() > 1 and column.shape[:2] == (1, num_tokens):
        column = column[0]
    source = expand_tokens(layout, cp_size=cp_size, cp_rank=cp_rank).source.long()
    if column.shape[0] != num_tokens:
        raise PackingError(f"column has {column.shape[0]} entries, but the row {num_tokens} tokens")
    token, has_entry = source.clamp(min=0), source >= 0
    if spec.images == "repeat" and layout.num_images:
        counts = layout.cu_image_embeddings
        image = torch.searchsorted(counts, (FIRST_IMAGE - source).int(), right=True) - 1
        start = layout.image_start.index_select(0, image.clamp(0, layout.num_images - 1))
        at = torch.searchsorted(layout.expanded_start, start)
        token = torch.where(source < PAD, at.clamp(max=num_tokens - 1), token)
        has_entry = source != PAD
    if spec.shifted:
        has_entry = has_entry & layout.is_before_image.index_select(0, token).logical_not()
    has_entry = has_entry.reshape(-1, *[1] * (column.dim() - 1))
    return torch.where(has_entry, column.index_select(0, token), column.new_full((), spec.fill))


def expand_tokens(
    layout: PackedLayout,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> ExpandedTokens:
    """What stands at each position of a rank: one launch for all that is not an embedding."""
    _check(layout, cp_size, cp_rank)
    if labels is not None:
        labels = as_row(labels, "labels", layout.num_collapsed)
    if loss_mask is not None:
        loss_mask = as_row(loss_mask, "loss_mask", layout.num_collapsed, floating=True)
    return ExpandedTokens(*ops.expand_tokens(
        layout.tensor, labels, loss_mask, layout.num_collapsed, layout.num_images, layout.num_seqs,
        layout.spec.image_token_id, layout.num_expanded, cp_size, cp_rank,
    ))  # fmt: skip


def fill(
    layout: PackedLayout,
    text: Tensor,
    images: Tensor | None,
    source: Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """``expand_embeddings`` where ``source`` is known already."""
    if not isinstance(text, Tensor) or text.dim() != 2 or text.shape[0] != layout.num_collapsed:
        found = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise PackingError(f"text is {found}, expected [{layout.num_collapsed}, H]")
    found = 0
    if images is not None:
        images = as_images(images, text)
        found = images.shape[0] * images.shape[1]
    if layout.num_image_embeddings not in (None, found):
        raise PlaceholderMismatch(
            actual=found,
            expected=layout.num_image_embeddings,
            message=f"images hold {found} embeddings, but the placeholders become "
            f"{layout.num_image_embeddings}",
        )
    positions = ()
    if torch.is_grad_enabled() and (
        text.requires_grad or (images is not None and images.requires_grad)
    ):
        positions = source_positions(layout, found, cp_size, cp_rank)
    return ops.expand_embeddings(text, images, source, *positions)


def source_positions(
    layout: PackedLayout, num_image_embeddings: int, cp_size: int = 1, cp_rank: int = 0
) -> SourcePositions:
    """Where each text and each image embedding went on a rank: what the gradient needs."""
    _check(layout, cp_size, cp_rank)
    return SourcePositions(*ops.source_positions(
        layout.tensor, layout.num_collapsed, layout.num_images, layout.num_seqs,
        num_image_embeddings, cp_size, cp_rank,
    ))  # fmt: skip


def count_lost(layout: PackedLayout, loss_mask: Tensor) -> Tensor:
    """How many trained tokens fell off the end of the expanded row: 0-d, on the row's device.

    Args:
        layout: of this row.
        loss_mask: ``[T]`` or ``[1, T]``; what it has above 0 is trained, placeholders and what
            stands before an image of the same sequence excepted, as ``expand_labels`` has it.
    """
    loss_mask = as_row(loss_mask, "loss_mask", layout.num_collapsed, floating=True)
    trains = (loss_mask > 0) & ~layout.is_placeholder & ~layout.is_before_image
    return (layout.is_cut & trains).sum()


def as_images(images: Tensor, text: Tensor) -> Tensor:
    """``[L, tiles, H]``, like ``text``."""
    width = text.shape[1]
    expected = f"expected [L, tiles, {width}] or [embeddings, {width}] {text.dtype} like text"
    if not isinstance(images, Tensor):
        raise PackingError(f"images are a {type(images).__name__}, {expected}")
    found, images = list(images.shape), images.unsqueeze(1) if images.dim() == 2 else images
    if images.dim() != 3 or images.shape[2] != width or images.dtype != text.dtype:
        raise PackingError(f"images are {found} {images.dtype}, {expected}")
    return images


def _check(layout: PackedLayout, cp_size: int, cp_rank: int) -> None:
    if not layout.has_tokens:
        raise PackingError(
            "this layout holds boundaries only, for a stage without tokens; send the whole layout "
            "(to_tensor without boundaries_only) to stages that have tokens"
        )
    if cp_size == 1 and cp_rank == 0:
        return
    check_rank(cp_size, cp_rank)
    check_multiple(cp_size, layout.spec.seq_multiple, layout.num_expanded)
