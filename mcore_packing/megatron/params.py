"""Megatron's ``PackedSeqParams`` of a layout, which remember it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ..context_parallel import check_rank
from ..errors import PackingError
from ..inputs import may_look, refuse_old
from ..layout import PackedLayout, max_seqlen_bound
from ..space import Space
from ..spec import RowSpec
from .releases import PACKED_SEQ_FIELDS

CU_SEQLENS = tuple(f"cu_seqlens_{x}{padded}" for x in ("q", "kv") for padded in ("", "_padded"))
TILES_OF_ONE_RANK = (
    "; if rows.shard_vision made it, share the tower: mp.install(model, vision_dp_over_cp=True)"
)


@dataclass
class LaidOutParams(PackedSeqParams):
    """Megatron's ``PackedSeqParams``, with what their data path knows.

    These are dataclass fields because FSDP2 and ``dataclasses.replace`` rebuild parameters field by
    field, and other attributes would be lost.

    Attributes:
        layout: the layout of the row, where the parameters were made from one.
        space: what boundaries without a layout count, "collapsed" or "expanded".
        vision_share: the context-parallel rank whose tiles alone are in ``images``, and of how many
            ranks; None where all are.
    """

    layout: PackedLayout | None = None
    space: str | None = None
    vision_share: tuple[int, int] | None = None

    def __post_init__(self):
        """Does nothing: Megatron's own would derive ``seq_idx``, and wait for the GPU."""


def packed_seq_params(
    layout: PackedLayout,
    like: PackedSeqParams | None = None,
    *,
    seq_idx: bool | None = None,
    vision_share: tuple[int, int] | None = None,
    **old: NoReturn,
) -> LaidOutParams:
    """The expanded boundaries of a layout, as attention, RoPE and Mamba layers read them.

    The parameters remember their layout, so that an installed model uses it as it is: nothing is
    guessed, and nothing is computed again.

    One tensor, the padded boundaries, fills all four ``cu_seqlens`` fields: a causal mask makes
    trailing padding harmless, every position is covered, and Transformer Engine need not compare
    real with padded boundaries on the GPU. Only where ``like`` tells them apart, and the installed
    megatron-core can say so to Transformer Engine (0.19 on), ``cu_seqlens_q`` counts real
    positions.

    Args:
        layout: the layout of the row.
        like: every field that is not about boundaries is carried over from here.
        seq_idx: also give ``seq_idx`` int32 ``[1, S]``, which Mamba layers read, where the
            installed megatron-core has it. By default what ``like`` does.
        vision_share: ``(cp_rank, cp_size)`` where ``images`` hold the tiles of that rank alone, as
            rows of ``rows.shard_vision`` do.

    Returns:
        New parameters with int32 ``[B + 2]`` boundaries, ``[B + 1]`` where the host knows that the
        tail is empty, and an int ``max_seqlen``: exact, or a bound where ``layout.is_exact`` is
        False. A spec with ``max_sequences`` makes that ``[max_sequences + 1]``, the last one
        repeated, and always a bound: layers that are captured as CUDA graphs see the same shapes
        and numbers in every row.

    Source:
        ``PackedSeqParams`` of Megatron-Core 0.12.3 to main; ``DotProductAttention.forward`` of
        Transformer Engine 2.x for what it does with them.

    Example:
        >>> ids = torch.tensor([11, 12, -200, 21])
        >>> cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
        >>> layout = PackedLayout.build(ids, cu_seqlens, [576], space="collapsed")
        >>> params = packed_seq_params(layout)
        >>> params.cu_seqlens_q.tolist(), params.max_seqlen_q, params.layout is layout
        ([0, 2, 579], 577, True)
    """
    refuse_old("packed_seq_params", old, {"pad_between_seqs": "pass like= that tells them apart"})
    if not isinstance(layout, PackedLayout):
        raise PackingError(
            f"packed_seq_params takes a PackedLayout, not a {type(layout).__name__}; what "
            f"to_tensor made goes through PackedLayout.from_tensor first"
        )
    if vision_share is not None:
        cp_rank, cp_size = vision_share = tuple(vision_share)
        check_rank(cp_size, cp_rank)
    fields = _fields(layout, like, seq_idx)
    return LaidOutParams(**fields, layout=layout, vision_share=vision_share)


def megatron_params(
    layout: PackedLayout, like: PackedSeqParams, seq_idx: bool = False
) -> PackedSeqParams:
    """``packed_seq_params`` without the layout, for Megatron's layers: what they are given may be
    compared field by field from call to call (CUDA graphs), and knows no layouts."""
    fields = _fields(layout, like, seq_idx or None)
    late = {name: fields[name] for name in ("seq_idx", "total_tokens") if name in fields}
    fields |= dict.fromkeys(late)
    if isinstance(like, LaidOutParams):
        params = PackedSeqParams(**fields)
    else:
        params = dataclasses.replace(like, **fields)
    for name, value in late.items():  # main's __post_init__ would derive one from the other, and
        setattr(params, name, value)  # wait for the GPU
    return params


def _fields(layout: PackedLayout, like: PackedSeqParams | None, seq_idx: bool | None) -> dict:
    """Every field of ``PackedSeqParams``, as far as the installed megatron-core has it."""
    padded = layout.cu_seqlens_padded
    real, apart = padded, _pads_between_seqs(like)
    if apart:
        real = _real(layout)
    max_seqlen = layout.max_seqlen
    if layout.spec.max_sequences is not None:
        spare = layout.spec.max_sequences + 1 - padded.numel()
        padded, real = (torch.cat([x, x[-1:].expand(spare)]) for x in (padded, real))
        max_seqlen = max_seqlen_bound(layout.num_expanded)
    elif not layout.has_tail:
        padded, real = padded[:-1], real[:-1]
    if not apart:
        real = padded
    fields = {} if like is None else {name: getattr(like, name) for name in PACKED_SEQ_FIELDS}
    ours = {
        "qkv_format": "thd",
        "cu_seqlens_q": real,
        "cu_seqlens_kv": real,
        "cu_seqlens_q_padded": padded,
        "cu_seqlens_kv_padded": padded,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_kv": max_seqlen,
        "pad_between_seqs": apart,
        # Derived from boundaries that no longer hold.
        "total_tokens": None,
        "seq_idx": None,
        "tokens_per_sample": None,
        "cp_scatter_cache": None,
    }
    if seq_idx is None:
        seq_idx = any(fields.get(name) is not None for name in ("total_tokens", "seq_idx"))
    if seq_idx:
        ours |= {"seq_idx": _seq_idx(layout), "total_tokens": layout.num_expanded}
    return fields | {name: value for name, value in ours.items() if name in PACKED_SEQ_FIELDS}


def _real(layout: PackedLayout) -> Tensor:
    """int32 ``[B + 2]``, the boundaries without padding; the tail is the last sequence."""
    tail = layout.cu_seqlens_expanded[-1:] + layout.tail_length
    return torch.cat([layout.cu_seqlens_expanded, tail])


def _pads_between_seqs(like: PackedSeqParams | None) -> bool:
    """Whether the caller tells real from padded boundaries, and Transformer Engine can be told.

    Before 0.19 no field tells it, and up to TE 2.16 it does not find out by itself under context
    parallelism where they differ behind the last sequence only.

    Source:
        TransformerEngine issue 3331.
    """
    if like is None or "pad_between_seqs" not in PACKED_SEQ_FIELDS:
        return False
    padded = like.cu_seqlens_q_padded
    return bool(like.pad_between_seqs) or (padded is not None and padded is not like.cu_seqlens_q)


def _seq_idx(layout: PackedLayout) -> Tensor:
    """int32 ``[1, S]``, the sequence of every position."""
    ends = layout.cu_seqlens_padded[1:]
    position = torch.arange(layout.num_expanded, dtype=torch.int32, device=ends.device)
    return torch.searchsorted(ends, position, right=True).to(torch.int32)[None]


def physical_boundaries(params: PackedSeqParams) -> Tensor:
    """Where the sequences of the queries are in the row: the padded boundaries, where given."""
    padded = params.cu_seqlens_q_padded
    return params.cu_seqlens_q if padded is None else padded


def _padded_boundaries(params: PackedSeqParams) -> Tensor | None:
    """The padded boundaries, where they are others than the real ones."""
    padded = params.cu_seqlens_q_padded
    return None if padded is params.cu_seqlens_q else padded


def remap_packed_seq_params(
    params: PackedSeqParams,
    input_ids: Tensor,
    tokens_per_image: Tensor | Sequence,
    image_token_id: int = -200,
    *,
    space: Space | None = None,
) -> PackedSeqParams:
    """Expanded parameters from parameters of either space.

    Args:
        params: ``thd`` parameters; with padded boundaries, those are mapped and the real lengths
            are counted in expanded space. The boundaries of the queries are used; those of the keys
            must be the same, since LLaVA attends to itself.
        input_ids: integer ``[T]`` or ``[1, T]``, the collapsed row.
        tokens_per_image: integer ``[N]``, or one list per sequence.
        image_token_id: the placeholder's id.
        space: what ``params`` count, "collapsed" or "expanded"; a layout that rides along in them
            knows it.

    Returns:
        ``params`` itself where it is expanded already, covers the row, and has the right
        ``max_seqlen``; else new parameters that remember their layout, whose last sequence is the
        tail. Looks at the values, so it synchronises on a GPU.

    Raises:
        PackingError: as ``PackedLayout.build`` says.

    Example:
        >>> cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
        >>> params = PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, 2, 2)
        >>> ids = torch.tensor([11, 12, -200, 21])
        >>> expanded = remap_packed_seq_params(params, ids, [576], space="collapsed")
        >>> expanded.cu_seqlens_q.tolist(), expanded.max_seqlen_q
        ([0, 2, 579], 577)
        >>> remap_packed_seq_params(expanded, ids, [576]) is expanded
        True
    """
    riding = getattr(params, "layout", None)
    spec = RowSpec(image_token_id=image_token_id) if riding is None else riding.spec
    if riding is not None and riding.num_images and image_token_id != spec.image_token_id:
        raise PackingError(
            f"image_token_id is {image_token_id}, but the layout that came with this row was made "
            f"with {spec.image_token_id}"
        )
    layout = laid_out(params, input_ids, tokens_per_image, spec, space=space)
    return params if _says(params, layout) else packed_seq_params(layout, params)


def _says(params: PackedSeqParams, layout: PackedLayout) -> bool:
    """Whether the host can tell that ``params`` say already what the layout says."""
    lengths = params.max_seqlen_q, params.max_seqlen_kv
    if not all(type(length) is int and length == layout.max_seqlen for length in lengths):
        return False
    if getattr(params, "layout", None) is layout:
        return True
    given = physical_boundaries(params)
    same_keys = params.cu_seqlens_kv is params.cu_seqlens_q
    same_keys &= params.cu_seqlens_kv_padded is params.cu_seqlens_q_padded
    if not layout.is_exact or layout.has_tail or not same_keys or not may_look(given):
        return False
    return torch.equal(layout.cu_seqlens_padded[:-1], given)


def laid_out(
    params: PackedSeqParams,
    input_ids: Tensor,
    tokens_per_image: Tensor | Sequence,
    spec: RowSpec,
    *,
    space: Space | None,
    num_image_embeddings: int | None = None,
) -> PackedLayout:
    """The layout of a row: the one that came with its parameters, or a new one.

    Args:
        params: of the row, in either space.
        input_ids: integer ``[T]`` or ``[1, T]``.
        tokens_per_image: integer ``[N]``, or one list per sequence.
        spec: what the model asks. A layout that came along has to fit it.
        space: what boundaries without a layout count.
        num_image_embeddings: the sum of ``tokens_per_image``, where the host knows it.

    Raises:
        PackingError: as ``PackedLayout.build`` says; or a layout that is of another row, or made
            for another model.
    """
    layout = getattr(params, "layout", None)
    if layout is not None:
        spec.check(layout)
        layout = layout.to(input_ids.device, non_blocking=True)
        looks = may_look(layout.tensor)
        check_boundaries(layout, params, looks)
        _check_row(layout, input_ids, tokens_per_image, spec, num_image_embeddings, looks)
        return layout
    check_keys(params)
    return PackedLayout.build(
        input_ids, params.cu_seqlens_q, tokens_per_image, spec, space=space,
        cu_seqlens_padded=_padded_boundaries(params), num_image_embeddings=num_image_embeddings,
    )  # fmt: skip


def check_boundaries(layout: PackedLayout, params: PackedSeqParams, looks: bool) -> None:
    """Refuse boundaries that somebody changed since the layout made them, in any field.

    Args:
        layout: that came with them.
        params: which hold them.
        looks: whether their values count, not only how many they are.
    """
    given = {id(x): x for name in CU_SEQLENS if (x := getattr(params, name)) is not None}
    edges = layout.cu_seqlens_padded
    most = edges.numel()
    least = most if layout.has_tail else most - 1
    if layout.spec.max_sequences is not None:
        least = most = layout.spec.max_sequences + 1
    for found in given.values():
        size = found.numel()
        if not least <= size <= most:
            raise PackingError(
                f"there are {size} boundaries, but the layout that came with them has {most}; "
                f"leave out one of both"
            )
        ours = edges[:size]
        if not looks or torch.equal(found[: len(ours)].to(ours.device), ours):
            continue
        is_real = found is params.cu_seqlens_q or found is params.cu_seqlens_kv
        if is_real and torch.equal(found[: len(ours)].to(ours.device), _real(layout)[:size]):
            continue
        raise PackingError(
            f"the boundaries {found.tolist()} are not those of the layout that came with them, "
            f"{edges.tolist()}; leave out one of both"
        )


def _check_row(layout, input_ids, tokens_per_image, spec, num_image_embeddings, looks) -> None:
    """Refuse the layout of another row: by its sizes, and on a CPU by its values."""
    if not layout.has_tokens:
        raise PackingError(
            "the layout that came with this row holds boundaries only, but this stage has tokens: "
            "send it the whole layout (to_tensor without boundaries_only)"
        )
    sizes = (
        ("tokens", layout.num_collapsed, input_ids.numel()),
        ("images", layout.num_images, len(tokens_per_image)),
        ("image embeddings", layout.num_image_embeddings, num_image_embeddings),
    )
    for name, expected, found in sizes:
        if None not in (expected, found) and expected != found:
            raise PackingError(
                f"the layout that came with this row is of another one: {name} {expected}, "
                f"but the row has {found}"
                + (TILES_OF_ONE_RANK if name == "image embeddings" else "")
            )
    if not looks:
        return
    counts = torch.as_tensor(tokens_per_image)
    for name, same in (
        ("input_ids", torch.equal(layout.input_ids.long(), input_ids.reshape(-1).long())),
        ("tokens_per_image", torch.equal(layout.cu_image_embeddings.diff().long(), counts.long())),
    ):
        if not same:
            raise PackingError(f"the layout that came with this row was made of other {name}")
    other_id = layout.spec.image_token_id != spec.image_token_id
    if other_id and bool((input_ids == spec.image_token_id).any()):
        raise PackingError(
            f"the row holds placeholders (id {spec.image_token_id}), which the layout that came "
            f"with it takes for text: it was made with image_token_id={layout.spec.image_token_id}"
        )


def check_keys(params: PackedSeqParams) -> None:
    """Self-attention has one set of boundaries: those of the keys are those of the queries."""
    if params.cu_seqlens_q is None:
        raise PackingError("packed_seq_params are in thd format, but have no cu_seqlens_q")
    for padded in ("", "_padded"):
        queries, keys = (getattr(params, f"cu_seqlens_{x}{padded}") for x in ("q", "kv"))
        if keys is None or keys is queries or queries is None:
            continue
        if may_look(keys) and may_look(queries) and not torch.equal(keys, queries):
            raise PackingError(
                f"cu_seqlens_kv{padded} differs from cu_seqlens_q{padded}: {keys.tolist()} and "
                f"{queries.tolist()}; LLaVA attends to itself, so give both the same boundaries"
            )


def stage_layout(
    params: PackedSeqParams, length: int, device, spec: RowSpec, space: Space | None
) -> PackedLayout:
    """The layout of a stage without tokens: the one that came with its boundaries, or one of
    boundaries that the caller declared to be expanded.

    Args:
        params: of the row.
        length: how many positions the stage has, those of all its ranks together.
        device: where its hidden states are.
        spec: what the model asks.
        space: what the caller said of boundaries without a layout.

    Raises:
        PackingError: boundaries of which nobody said that they are expanded, or that do not fit.
    """
    layout = getattr(params, "layout", None)
    if layout is not None:
        if layout.num_expanded != length:
            raise PackingError(
                f"the layout that came with this row has {layout.num_expanded} positions, but this "
                f"stage has {length}"
            )
        spec.check(layout)
        check_boundaries(layout, params, may_look(layout.tensor))
        return layout.to(device, non_blocking=True)
    if space != "expanded":
        raise PackingError(
            "this stage has no tokens, so it cannot tell what its boundaries count: send it those "
            "of a layout (PackedLayout.to_tensor, mp.packed_seq_params), or install with "
            "space='expanded' if they are expanded"
        )
    check_keys(params)
    return PackedLayout.from_boundaries(
        params.cu_seqlens_q, length, spec, cu_seqlens_padded=_padded_boundaries(params)
    )
