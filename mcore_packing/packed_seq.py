"""Turn ``PackedSeqParams`` of either space into expanded ones, which remember their layout."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from .errors import PackingError
from .layout import PackedLayout, as_boundaries, may_look
from .versions import PACKED_SEQ_FIELDS


@dataclass
class LaidOutParams(PackedSeqParams):
    """Megatron's ``PackedSeqParams``, with what their data path knows.

    These are dataclass fields because FSDP2 and ``dataclasses.replace`` rebuild parameters field by
    field, and other attributes would be lost.

    Attributes:
        layout: the layout of the row, where the parameters were made from one.
        space: what boundaries without a layout count, "collapsed" or "expanded".
    """

    layout: PackedLayout | None = None
    space: str | None = None

    def __post_init__(self):
        """Does nothing: Megatron's own would derive ``seq_idx``, and wait for the GPU."""


def packed_seq_params(
    layout: PackedLayout,
    like: PackedSeqParams | None = None,
    *,
    pad_between_seqs: bool | None = None,
    seq_idx: bool | None = None,
) -> LaidOutParams:
    """The expanded boundaries of a layout, as attention, RoPE and Mamba layers read them.

    The parameters remember their layout, so that an installed model uses it as it is: nothing is
    guessed, and nothing is computed again.

    By default one tensor, the padded boundaries, fills all four ``cu_seqlens`` fields: a causal
    mask makes trailing padding harmless, every position is covered, and Transformer Engine need
    not compare real with padded boundaries on the GPU.

    Args:
        layout: the layout of the row.
        like: every field that is not about boundaries is carried over from here.
        pad_between_seqs: give real boundaries in ``cu_seqlens_q`` and padded ones in
            ``cu_seqlens_q_padded``. By default what ``like`` does.
        seq_idx: also give ``seq_idx`` int32 ``[1, S]``, which Mamba layers read, where the
            installed megatron-core has it. By default what ``like`` does.

    Returns:
        New parameters with int32 ``[B + 2]`` boundaries, ``[B + 1]`` where the host knows that the
        tail is empty, and an int ``max_seqlen``: exact, or a bound where ``layout.is_exact`` is
        False.

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
    if not isinstance(layout, PackedLayout):
        raise PackingError(
            f"packed_seq_params takes a PackedLayout, not a {type(layout).__name__}; what "
            f"to_tensor made goes through PackedLayout.from_tensor first"
        )
    given = {}
    if like is not None:
        given = {name: getattr(like, name) for name in PACKED_SEQ_FIELDS}
    fields = given | _boundary_fields(layout, like, pad_between_seqs)
    params = LaidOutParams(**fields, layout=layout)
    return with_seq_idx(params, layout.num_expanded) if _wants_seq_idx(seq_idx, like) else params


def megatron_params(
    layout: PackedLayout,
    like: PackedSeqParams,
    *,
    pad_between_seqs: bool | None = None,
    seq_idx: bool | None = None,
) -> PackedSeqParams:
    """``packed_seq_params`` without the layout, for Megatron's layers: what they are given may be
    compared field by field from call to call (CUDA graphs), and knows no layouts."""
    fields = _boundary_fields(layout, like, pad_between_seqs)
    if isinstance(like, LaidOutParams):
        given = {name: getattr(like, name) for name in PACKED_SEQ_FIELDS}
        params = PackedSeqParams(**given | fields)
    else:
        params = dataclasses.replace(like, **fields)
    return with_seq_idx(params, layout.num_expanded) if _wants_seq_idx(seq_idx, like) else params


def _boundary_fields(layout: PackedLayout, like, pad_between_seqs: bool | None) -> dict:
    """Every field that is about boundaries, as far as the installed megatron-core has it."""
    if pad_between_seqs is None:
        padded = None if like is None else like.cu_seqlens_q_padded
        pad_between_seqs = padded is not None and padded is not like.cu_seqlens_q
    padded = layout.cu_seqlens_padded if layout.has_tail else layout.cu_seqlens_padded[:-1]
    real = padded
    if pad_between_seqs:
        real = layout.cu_seqlens_expanded
        if layout.has_tail:
            real = torch.cat([real, real[-1:] + layout.tail_rows])
    fields = {
        "qkv_format": "thd",
        "cu_seqlens_q": real,
        "cu_seqlens_kv": real,
        "cu_seqlens_q_padded": padded,
        "cu_seqlens_kv_padded": padded,
        "max_seqlen_q": layout.max_seqlen,
        "max_seqlen_kv": layout.max_seqlen,
        "pad_between_seqs": pad_between_seqs,
        # Derived from boundaries that no longer hold.
        "total_tokens": None,
        "seq_idx": None,
        "tokens_per_sample": None,
        "cp_scatter_cache": None,
    }
    return {name: value for name, value in fields.items() if name in PACKED_SEQ_FIELDS}


def _wants_seq_idx(seq_idx: bool | None, like: PackedSeqParams | None) -> bool:
    if seq_idx is not None:
        return seq_idx
    return any(getattr(like, name, None) is not None for name in ("total_tokens", "seq_idx"))


def with_seq_idx(params: PackedSeqParams, num_rows: int) -> PackedSeqParams:
    """A copy with ``seq_idx`` int32 ``[1, num_rows]``, where the installed megatron-core has it."""
    if "seq_idx" not in PACKED_SEQ_FIELDS:
        return params
    params = copy.copy(params)  # replace() would run __post_init__, which synchronises
    ends = physical_boundaries(params)[1:]
    position = torch.arange(num_rows, dtype=torch.int32, device=ends.device)
    index = torch.searchsorted(ends, position, right=True)
    params.seq_idx = index.to(torch.int32).unsqueeze(0)
    params.total_tokens = num_rows
    return params


def with_capacity(params: PackedSeqParams, capacity: int) -> PackedSeqParams:
    """A copy whose boundaries have room for ``capacity`` sequences: spare ones are empty.

    Raises:
        PackingError: there are more sequences than that.
    """
    params = copy.copy(params)
    for name in ("cu_seqlens_q", "cu_seqlens_q_padded"):
        cu_seqlens = getattr(params, name)
        spare = capacity + 1 - cu_seqlens.numel()
        if spare < 0:
            raise PackingError(
                f"the row has {cu_seqlens.numel() - 1} sequences, the tail included, but layers "
                f"are captured as graphs with room for {capacity}; see capacity of mp.install"
            )
        padded = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(spare)])
        setattr(params, name, padded)
        setattr(params, name.replace("_q", "_kv"), padded)
    return params


def riding_layout(params: PackedSeqParams) -> PackedLayout | None:
    """The layout that rides along in the parameters, None where there is none."""
    return getattr(params, "layout", None)


def physical_boundaries(params: PackedSeqParams) -> Tensor:
    """Where the sequences of the queries are in the row: the padded boundaries, where given."""
    padded = params.cu_seqlens_q_padded
    return params.cu_seqlens_q if padded is None else padded


def remap_packed_seq_params(
    params: PackedSeqParams,
    input_ids: Tensor,
    tokens_per_image: Tensor | Sequence,
    image_token_id: int = -200,
    space: str = "auto",
) -> PackedSeqParams:
    """Expanded parameters from parameters of either space.

    Args:
        params: ``thd`` parameters; with padded boundaries, those are mapped and the real lengths
            are counted in expanded space. The boundaries of the queries are used; those of the keys
            must be the same, since LLaVA attends to itself.
        input_ids: integer ``[T]`` or ``[1, T]``, the collapsed row.
        tokens_per_image: integer ``[N]``, or one list per sequence.
        image_token_id: the placeholder's id.
        space: the space of ``params``: "auto", "collapsed" or "expanded".

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
        >>> expanded = remap_packed_seq_params(params, ids, [576])
        >>> expanded.cu_seqlens_q.tolist(), expanded.max_seqlen_q
        ([0, 2, 579], 577)
        >>> remap_packed_seq_params(expanded, ids, [576]) is expanded
        True
    """
    layout = layout_of(params, input_ids, tokens_per_image, image_token_id, space=space)
    return params if says(params, layout) else packed_seq_params(layout, params)


def layout_of(
    params: PackedSeqParams,
    input_ids: Tensor,
    tokens_per_image: Tensor | Sequence,
    image_token_id: int,
    **options,
) -> PackedLayout:
    """The layout of a row: the one that came with its parameters, or a new one.

    Args:
        params: of the row, in either space.
        input_ids: integer ``[T]`` or ``[1, T]``.
        tokens_per_image: integer ``[N]``, or one list per sequence.
        image_token_id: the placeholder's id.
        **options: of ``PackedLayout.build``. A layout that came along has to keep to them; its
            ``space`` is its own.

    Raises:
        PackingError: as ``PackedLayout.build`` says; or a layout that is of another row, or made
            for another model.
    """
    layout = riding_layout(params)
    if layout is not None:
        layout = layout.to(input_ids.device, non_blocking=True)
        _check_row(layout, input_ids, tokens_per_image, image_token_id)
        _check_boundaries(layout, params)
        check_options(layout, **options)
        return layout
    if params.cu_seqlens_q is None:
        raise PackingError("packed_seq_params are in thd format, but have no cu_seqlens_q")
    _check_keys(params)
    padded = params.cu_seqlens_q_padded
    return PackedLayout.build(
        input_ids, params.cu_seqlens_q, tokens_per_image, image_token_id,
        cu_seqlens_padded=None if padded is params.cu_seqlens_q else padded, **options,
    )  # fmt: skip


def _check_row(layout: PackedLayout, input_ids, tokens_per_image, image_token_id) -> None:
    """Refuse the layout of another row: by its sizes, and on a CPU by its values."""
    if not layout.has_tokens:
        raise PackingError(
            "the layout that came with this row holds boundaries only, but this stage has tokens: "
            "send it the whole layout (to_tensor without boundaries_only)"
        )
    found = {"tokens": input_ids.numel(), "images": len(tokens_per_image)}
    expected = {"tokens": layout.num_collapsed, "images": layout.image_start.numel()}
    if len(tokens_per_image):
        found["image_token_id"] = image_token_id
        expected["image_token_id"] = layout.image_token_id
    for name, value in found.items():
        if value != expected[name]:
            raise PackingError(
                f"the layout that came with this row is of another one: {name} {expected[name]}, "
                f"but the row has {value}"
            )
    if not may_look(input_ids):
        return
    rows = torch.as_tensor(tokens_per_image, device=input_ids.device)
    same = {
        "input_ids": torch.equal(layout.input_ids, input_ids.reshape(-1)),
        "tokens_per_image": torch.equal(layout.cu_image_rows.diff().long(), rows.long()),
    }
    for name, is_same in same.items():
        if not is_same:
            raise PackingError(f"the layout that came with this row was made of other {name}")
    if layout.image_token_id != image_token_id and bool((input_ids == image_token_id).any()):
        raise PackingError(
            f"the row holds placeholders (id {image_token_id}), which the layout that came with it "
            f"takes for text: it was made with image_token_id={layout.image_token_id}"
        )


def _check_boundaries(layout: PackedLayout, params: PackedSeqParams) -> None:
    """Refuse boundaries that somebody changed since the layout made them, where looking is free."""
    given = physical_boundaries(params)
    if given is None or not may_look(given) or not may_look(layout.cu_seqlens_padded):
        return
    if not torch.equal(given, layout.cu_seqlens_padded[: given.numel()]):
        raise PackingError(
            f"the boundaries {given.tolist()} are not those of the layout that came with them, "
            f"{layout.cu_seqlens_padded.tolist()}; leave out one of both"
        )


def check_options(
    layout: PackedLayout,
    space: str = "auto",
    num_image_rows: int | None = None,
    num_padded_rows: int | None = None,
    seq_multiple: int = 1,
    total_multiple: int = 1,
    max_expanded: int | None = None,
    on_overflow: str = "raise",
    strict: bool = False,
) -> None:
    """Refuse a layout that was made for another model than the one with these options."""
    rows = layout.num_expanded
    wrong = None
    if layout.seq_multiple % seq_multiple:
        wrong = f"pads sequences to multiples of {layout.seq_multiple}, expected {seq_multiple}"
    elif rows % total_multiple:
        wrong = f"has {rows} rows, expected a multiple of {total_multiple}"
    elif num_padded_rows not in (None, rows):
        wrong = f"has {rows} rows, expected {num_padded_rows}: pipelines exchange fixed lengths"
    elif max_expanded is not None and rows > max_expanded:
        wrong = f"has {rows} rows, more than the {max_expanded} that the model takes"
    elif None not in (num_image_rows, layout.num_image_rows) and (
        num_image_rows != layout.num_image_rows
    ):
        wrong = f"has {layout.num_image_rows} image rows, but the images have {num_image_rows}"
    if wrong:
        raise PackingError(
            f"the layout that came with this row {wrong}; build it with **mp.layout_options(model)"
        )


def _check_keys(params: PackedSeqParams) -> None:
    """Self-attention has one set of boundaries: those of the keys are those of the queries."""
    for name in ("cu_seqlens", "cu_seqlens_{}_padded"):
        names = [name.format(x) if "{}" in name else f"{name}_{x}" for x in ["q", "kv"]]
        queries, keys = (getattr(params, name) for name in names)
        if keys is None or keys is queries or queries is None:
            continue
        if may_look(keys) and may_look(queries) and not torch.equal(keys, queries):
            raise PackingError(
                f"{names[1]} differs from {names[0]}: {keys.tolist()} and {queries.tolist()}; "
                f"LLaVA attends to itself, so give both the same boundaries"
            )


def says(params: PackedSeqParams, layout: PackedLayout) -> bool:
    """Whether the host can tell that ``params`` say already what the layout says."""
    if riding_layout(params) is layout:
        return True
    lengths = params.max_seqlen_q, params.max_seqlen_kv
    if not layout.is_exact or layout.has_tail or not all(type(x) is int for x in lengths):
        return False
    given = physical_boundaries(params)
    same_keys = params.cu_seqlens_kv is params.cu_seqlens_q
    same_keys = same_keys and params.cu_seqlens_kv_padded is params.cu_seqlens_q_padded
    if not may_look(given) or not same_keys or lengths != (layout.max_seqlen, layout.max_seqlen):
        return False
    return torch.equal(layout.cu_seqlens_padded[:-1], given)


def stage_layout(params: PackedSeqParams, num_rows: int, space: str, **options) -> PackedLayout:
    """The layout of a stage without tokens: the one that came with its boundaries, or one of
    boundaries that the caller declared to be expanded.

    Args:
        params: of the row.
        num_rows: how many rows the stage has, those of all its ranks together.
        space: what the caller said of boundaries without a layout.
        **options: as ``layout_of`` takes them.

    Raises:
        PackingError: boundaries of which nobody said that they are expanded, or that do not fit.
    """
    layout = riding_layout(params)
    if layout is not None:
        if layout.num_expanded != num_rows:
            raise PackingError(
                f"the layout that came with this row has {layout.num_expanded} rows, but this "
                f"stage has {num_rows} rows"
            )
        check_options(layout, **options)
        return layout
    if space != "expanded":
        raise PackingError(
            "this stage has no tokens, so it cannot tell what its boundaries count: send it those "
            "of a layout (PackedLayout.to_tensor, mp.packed_seq_params), or install with "
            "space='expanded' if they are expanded"
        )
    as_boundaries(params.cu_seqlens_q, "cu_seqlens_q")
    _check_keys(params)
    padded = params.cu_seqlens_q_padded
    return PackedLayout.from_boundaries(
        params.cu_seqlens_q,
        num_rows,
        options["seq_multiple"],
        None if padded is params.cu_seqlens_q else padded,
        options["on_overflow"],
    )
