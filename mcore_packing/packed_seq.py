"""``PackedSeqParams`` of either space into expanded ones, and from a layout."""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from .errors import PackingError
from .layout import PackedLayout

_FIELDS = {item.name for item in dataclasses.fields(PackedSeqParams)}


def boundaries(layout: PackedLayout, capacity: int | None = None) -> Tensor:
    """The expanded boundaries of a row as one tensor, to broadcast to stages without tokens.

    Compute it once, in the data path, from the layout of the collapsed row; ``packed_seq_params``
    turns it into parameters on the other side.

    Args:
        layout: of the row, built with ``Installation.layout_options``.
        capacity: number of sequences to make room for, the tail included, so that every
            micro-batch has the same shape; spare ones repeat the last boundary. By default as many
            as there are.

    Returns:
        int32 ``[capacity + 2]``: ``max_seqlen``, then the padded boundaries, the tail's included.

    Raises:
        PackingError: more sequences than ``capacity``.

    Example:
        >>> ids = torch.tensor([11, 12, -200])
        >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
        >>> layout = PackedLayout.build(ids, cu_seqlens, [9], space="collapsed", seq_multiple=4)
        >>> boundaries(layout, capacity=4).tolist()
        [12, 0, 4, 16, 16, 16]
    """
    cu_seqlens = layout.cu_seqlens_padded
    spare = 0 if capacity is None else capacity + 1 - cu_seqlens.numel()
    if spare < 0:
        raise PackingError(
            f"the row has {cu_seqlens.numel() - 1} sequences, the tail included, but "
            f"capacity={capacity}"
        )
    longest = torch.full_like(cu_seqlens[:1], layout.max_seqlen)
    return torch.cat([longest, cu_seqlens, cu_seqlens[-1:].expand(spare)])


def packed_seq_params(
    layout: PackedLayout | Tensor,
    like: PackedSeqParams | None = None,
    *,
    pad_between_seqs: bool | None = None,
    seq_idx: bool | None = None,
) -> PackedSeqParams:
    """The expanded boundaries of a layout, as attention, RoPE and Mamba layers read them.

    By default one tensor, the padded boundaries, fills all four ``cu_seqlens`` fields: a causal
    mask makes trailing padding harmless, every position is covered, and Transformer Engine need
    not compare real with padded boundaries on the GPU.

    Args:
        layout: of the row; or what ``boundaries`` gave (on a GPU, reading ``max_seqlen`` from it
            synchronises once).
        like: every field that is not about boundaries is carried over from here.
        pad_between_seqs: give real boundaries in ``cu_seqlens_q`` and padded ones in
            ``cu_seqlens_q_padded``. By default what ``like`` does.
        seq_idx: also give ``seq_idx`` int32 ``[1, S]``, which Mamba layers read, where the
            installed megatron-core has it. By default what ``like`` does.

    Returns:
        New parameters with int32 ``[B + 2]`` boundaries, ``[B + 1]`` where the host knows that the
        tail is empty, and an int ``max_seqlen``.

    Source:
        ``PackedSeqParams`` of Megatron-Core 0.12.3 to 0.16.1 and main;
        ``DotProductAttention.forward`` of Transformer Engine 2.x for what it does with them.
    """
    if isinstance(layout, Tensor):
        layout = _Received(layout)
    if pad_between_seqs is None:
        padded = None if like is None else like.cu_seqlens_q_padded
        pad_between_seqs = padded is not None and padded is not like.cu_seqlens_q
    if seq_idx is None:
        seq_idx = getattr(like, "total_tokens", None) is not None
        seq_idx = seq_idx or getattr(like, "seq_idx", None) is not None
    padded = layout.cu_seqlens_padded if layout.has_tail else layout.cu_seqlens_padded[:-1]
    real = padded
    if pad_between_seqs:
        real = layout.cu_seqlens_expanded
        if layout.has_tail:  # an empty sequence, all padding
            real = torch.cat([real, real[-1:]])
    changes = {
        "qkv_format": "thd",
        "cu_seqlens_q": real,
        "cu_seqlens_kv": real,
        "cu_seqlens_q_padded": padded,
        "cu_seqlens_kv_padded": padded,
        "max_seqlen_q": layout.max_seqlen,
        "max_seqlen_kv": layout.max_seqlen,
        "total_tokens": None,  # set below: __post_init__ would derive seq_idx from it with a sync
        "seq_idx": None,
        "cp_scatter_cache": None,  # derived from boundaries that no longer hold
        "pad_between_seqs": pad_between_seqs,
    }
    changes = {name: value for name, value in changes.items() if name in _FIELDS}
    params = PackedSeqParams(**changes) if like is None else dataclasses.replace(like, **changes)
    return with_seq_idx(params, layout.num_expanded) if seq_idx else params


def with_seq_idx(params: PackedSeqParams, num_rows: int) -> PackedSeqParams:
    """A copy with ``seq_idx`` int32 ``[1, num_rows]``, where the installed megatron-core has it."""
    if "seq_idx" not in _FIELDS:
        return params
    params = copy.copy(params)  # replace() would run __post_init__, which synchronises
    begins = physical_boundaries(params)[1:]
    position = torch.arange(num_rows, dtype=torch.int32, device=begins.device)
    index = torch.searchsorted(begins, position, right=True)
    params.seq_idx = index.to(torch.int32).unsqueeze(0)
    params.total_tokens = num_rows
    return params


def physical_boundaries(params: PackedSeqParams) -> Tensor:
    """Where the sequences of the queries are in the row: the padded boundaries, where given."""
    padded = params.cu_seqlens_q_padded
    return params.cu_seqlens_q if padded is None else padded


class _Received:
    """What ``packed_seq_params`` needs of a layout, from what ``boundaries`` gave."""

    def __init__(self, received: Tensor):
        self.cu_seqlens_padded = self.cu_seqlens_expanded = received[1:]
        self.max_seqlen = int(received[0])
        self.has_tail = True

    @property
    def num_expanded(self) -> int:
        return int(self.cu_seqlens_padded[-1])


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
            are counted in expanded space.
        input_ids: integer ``[T]`` or ``[1, T]``, the collapsed row.
        tokens_per_image: integer ``[N]``, or one list per sequence.
        image_token_id: the placeholder's id.
        space: the space of ``params``: "auto", "collapsed" or "expanded".

    Returns:
        ``params`` itself where it is expanded already and covers the row; else new parameters whose
        last sequence is the tail. Looks at the values, so it synchronises on a GPU.

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
    return expand_params(
        params, *layouts_of(params, input_ids, tokens_per_image, image_token_id, space=space)
    )


def layouts_of(
    params: PackedSeqParams, input_ids, tokens_per_image, image_token_id, **kwargs
) -> tuple[PackedLayout, PackedLayout]:
    """The layouts that the query and the key boundaries describe: one and the same object where
    those are the same tensors. Further arguments are those of ``PackedLayout.build``."""

    def build(cu_seqlens, padded):
        return PackedLayout.build(
            input_ids, cu_seqlens, tokens_per_image, image_token_id,
            cu_seqlens_padded=None if padded is cu_seqlens else padded, **kwargs,
        )  # fmt: skip

    queries = params.cu_seqlens_q, params.cu_seqlens_q_padded
    keys = params.cu_seqlens_kv, params.cu_seqlens_kv_padded
    layout = build(*queries)
    same = all(key is None or key is query for query, key in zip(queries, keys, strict=True))
    return layout, layout if same else build(*keys)


def expand_params(
    params: PackedSeqParams, layout: PackedLayout, layout_kv: PackedLayout, **kwargs
) -> PackedSeqParams:
    """``params`` themselves where the layouts show that they are expanded and cover the row."""
    lengths = params.max_seqlen_q, params.max_seqlen_kv
    covers = _is_expanded(layout, params.cu_seqlens_q, params.cu_seqlens_q_padded)
    covers = covers and _is_expanded(layout_kv, params.cu_seqlens_kv, params.cu_seqlens_kv_padded)
    if covers and all(isinstance(length, int) for length in lengths) and not kwargs:
        return params
    expanded = packed_seq_params(layout, params, **kwargs)
    if layout_kv is not layout:
        keys = packed_seq_params(layout_kv, params, **kwargs)
        expanded.cu_seqlens_kv = keys.cu_seqlens_kv
        expanded.cu_seqlens_kv_padded = keys.cu_seqlens_kv_padded
        expanded.max_seqlen_kv = keys.max_seqlen_kv
    return expanded


def _is_expanded(layout: PackedLayout, cu_seqlens: Tensor | None, padded: Tensor | None) -> bool:
    """Whether the host can tell that these boundaries are what the layout would give."""
    given = cu_seqlens if padded is None else padded
    if layout.has_tail or given is None:
        return False
    return torch.equal(layout.cu_seqlens_padded[:-1], given)
