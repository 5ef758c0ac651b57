"""``PackedAttention``: thd core attention where Transformer Engine is not installed."""

import contextlib
import inspect

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import PackingError
from ..reference import local_positions
from .params import physical_boundaries

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


class PackedAttention(torch.nn.Module):
    """Causal or full attention in ``thd`` and ``sbhd``, built like ``TEDotProductAttention``.

    On a CPU, and in fp32, one SDPA call per sequence; on a GPU in bf16 or fp16,
    ``torch.nn.attention.varlen``. Under context parallelism keys and values are gathered, which is
    simple and exact but not what Transformer Engine does to save memory. Rows that no sequence
    covers come out as zeros.

    Args:
        config: heads, groups, dropout and context-parallel size.
        layer_number: position in the model, from 1.
        attn_mask_type: ``causal`` or ``no_mask``, with or without padding.
        attention_type: "self".
        attention_dropout: probability; by default the config's.
        softmax_scale: by default ``1 / sqrt(head size)``.
        k_channels, v_channels, num_splits, cp_comm_type: accepted, without effect.
        pg_collection, model_comm_pgs: where the context-parallel group is found.

    Raises:
        PackingError: the config asks for what this attention does not do (sliding windows, softmax
            offsets), or a call does (attention bias, an explicit attention mask).

    Source:
        ``TEDotProductAttention`` of Megatron-Core 0.12.3 to main, whose place in a layer spec it
        takes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection=None,
        model_comm_pgs=None,
    ):
        super().__init__()
        if getattr(config, "window_size", None) is not None:
            raise PackingError("PackedAttention has no sliding window; use Transformer Engine")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise PackingError(f"PackedAttention has no softmax_type={config.softmax_type!r}")
        self.config = config
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self._groups = pg_collection or model_comm_pgs

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            query: ``[t, heads, d]`` (thd) or ``[s, b, heads, d]`` (sbhd).
            key, value: likewise, with the same number of heads or a divisor of it.
            attention_mask: must be None: the mask type says it all.
            attn_mask_type: by default the constructor's.
            attention_bias: must be None.
            packed_seq_params: boundaries, for ``qkv_format == "thd"``. Padded boundaries, where
                there are any, say where sequences are; real ones how long they are.
            num_splits: without effect.

        Returns:
            ``[t, heads * d]`` or ``[s, b, heads * d]``.
        """
        if attention_bias is not None:
            raise PackingError("PackedAttention takes no attention_bias")
        mask_type = (attn_mask_type or self.attn_mask_type).name
        if mask_type not in ("causal", "padding_causal", "no_mask", "padding"):
            raise PackingError(f"PackedAttention has no mask type {mask_type!r}")
        causal = mask_type.endswith("causal")
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            if attention_mask is not None and not causal:
                raise PackingError("PackedAttention takes no attention_mask")
            if self.config.context_parallel_size > 1:
                raise PackingError(
                    "PackedAttention under context parallelism needs packed rows (thd)"
                )
            heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._attend(*heads, causal)
            return out.permute(2, 0, 1, 3).flatten(2)
        if self.config.context_parallel_size > 1:
            return self._context_parallel(query, key, value, packed_seq_params, causal)
        if query.is_cuda and varlen_attn is not None and query.dtype != torch.float32:
            return self._varlen(query, key, value, packed_seq_params, causal)
        return self._per_sequence(query, key, value, packed_seq_params, causal)

    def _attend(self, query, key, value, causal=False, mask=None) -> Tensor:
        """SDPA on ``[b, heads, s, d]``."""
        training = self.training and self.dropout > 0
        fork = contextlib.nullcontext()
        if (
            training
            and not self.config.sequence_parallel
            and get_cuda_rng_tracker().is_initialized()
        ):
            fork = get_cuda_rng_tracker().fork()
        with fork:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.dropout if training else 0.0,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )

    def _per_sequence(self, query, key, value, params, causal) -> Tensor:
        pieces, done = [], 0
        for begin, length, end in _sequences(params, query.shape[0]):
            stop = begin + length
            heads = (x[begin:stop].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            pieces.append(query.new_zeros(begin - done, *query.shape[1:]))
            if length:
                pieces.append(self._attend(*heads, causal)[0].transpose(0, 1))
            pieces.append(query.new_zeros(end - stop, *query.shape[1:]))
            done = end
        pieces.append(query.new_zeros(query.shape[0] - done, *query.shape[1:]))
        return torch.cat(pieces).flatten(1)

    def _varlen(self, query, key, value, params, causal) -> Tensor:
        if self.training and self.dropout > 0:
            raise PackingError("torch's varlen attention has no dropout; set attention_dropout=0")
        cu = params.cu_seqlens_q
        if params.cu_seqlens_q_padded is not None and params.cu_seqlens_q_padded is not cu:
            if not causal:
                raise PackingError(
                    "full attention with padding between sequences needs a CPU or TE"
                )
            cu = params.cu_seqlens_q_padded  # a causal mask keeps trailing padding away
        # Rows behind the last boundary are a sequence too, or their gradients would be anything.
        longest = max(int(params.max_seqlen_q), query.shape[0])
        cu = torch.cat([cu, torch.full_like(cu[-1:], query.shape[0])])
        kwargs = {"scale": self.softmax_scale} if self.softmax_scale is not None else {}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in inspect.signature(varlen_attn).parameters:
                kwargs["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        window = {"window_size": (-1, 0) if causal else (-1, -1)}
        if "window_size" not in inspect.signature(varlen_attn).parameters:
            window = {"is_causal": causal}
        out = varlen_attn(query, key, value, cu, cu, longest, longest, **window, **kwargs)
        row = torch.arange(out.shape[0], device=out.device)
        return out.masked_fill((row >= cu[-2])[:, None, None], 0).flatten(1)

    def _context_parallel(self, query, key, value, params, causal) -> Tensor:
        group = getattr(params, "cp_group", None) or getattr(self._groups, "cp", None)
        group = group or get_context_parallel_group()
        size, rank = group.size(), group.rank()
        cu = physical_boundaries(params)
        total = query.shape[0] * size
        order = torch.cat([local_positions(cu, total, size, r) for r in range(size)]).argsort()
        key, value = (_GatherRows.apply(x, group)[order] for x in (key, value))
        position = local_positions(cu, total, size, rank)
        pieces = []
        for begin, length, end in _sequences(params, total):
            rows = query[begin // size : end // size]
            if not rows.shape[0]:
                continue
            at = position[begin // size : end // size] - begin
            keys = torch.arange(length, device=at.device)
            mask = at[:, None] >= keys if causal else (at[:, None] >= 0).expand(-1, length)
            heads = (rows, key[begin : begin + length], value[begin : begin + length])
            heads = (x.transpose(0, 1).unsqueeze(0) for x in heads)
            out = self._attend(*heads, mask=mask)[0].transpose(0, 1)
            pieces.append(torch.where((at < length)[:, None, None], out, 0))
        return torch.cat(pieces).flatten(1)


def _sequences(params: PackedSeqParams, num_rows: int) -> list[tuple[int, int, int]]:
    """``(begin, real length, end)`` of every sequence that fits the row."""
    padded = physical_boundaries(params)
    edges = padded.clamp(max=num_rows).tolist()
    lengths = params.cu_seqlens_q.diff().tolist()
    return [
        (begin, min(length, end - begin), end)
        for begin, end, length in zip(edges[:-1], edges[1:], lengths, strict=True)
    ]


class _GatherRows(torch.autograd.Function):
    """All-gather along dimension 0; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        out = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
        dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None
