"""PackedAttention against Megatron's own attention and plain softmax."""

from itertools import pairwise

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

import mcore_packing as mp
from mcore_packing.megatron.attention import PackedAttention

pytestmark = pytest.mark.usefixtures("megatron")


def config_of(heads=4, groups=4, **kwargs):
    return TransformerConfig(
        num_layers=1, hidden_size=8 * heads, num_attention_heads=heads, num_query_groups=groups,
        attention_dropout=0.0, **kwargs,
    )  # fmt: skip


def attention_of(config, mask_type=AttnMaskType.causal, **kwargs):
    return PackedAttention(config, 1, mask_type, "self", **kwargs)


def heads_of(*leading, heads=4, groups=4, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    counts = (heads, groups, groups)
    make = [torch.randn(*leading, n, size, generator=generator, dtype=dtype) for n in counts]
    return [x.requires_grad_() for x in make]


def thd(cu_seqlens, padded=None):
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    padded = padded and torch.tensor(padded, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams("thd", cu_seqlens, cu_seqlens, padded, padded, longest, longest)


def softmax_attention(query, key, value, causal):
    """``[s, heads, d]`` by the definition."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)


@pytest.mark.parametrize("mask_type", ["causal", "padding_causal", "no_mask", "padding"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_thd_is_softmax_within_each_sequence(mask_type, groups):
    edges = [0, 5, 5, 6, 13]
    query, key, value = heads_of(13, groups=groups)
    attention = attention_of(config_of(groups=groups), AttnMaskType[mask_type])
    found = attention(query, key, value, None, packed_seq_params=thd(edges))
    causal = mask_type.endswith("causal")
    expected = torch.cat(
        [softmax_attention(query[a:b], key[a:b], value[a:b], causal) for a, b in pairwise(edges)]
    )
    torch.testing.assert_close(found, expected)
    y = torch.randn_like(found)
    for x, z in zip(*(torch.autograd.grad(o, (query, key, value), y) for o in (found, expected)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(x, z)


def test_padding_between_sequences_and_uncovered_rows_are_zero():
    query, key, value = heads_of(12)
    for mask_type in (AttnMaskType.causal, AttnMaskType.no_mask):
        attention = attention_of(config_of(), mask_type)
        found = attention(query, key, value, None, packed_seq_params=thd([0, 3, 5], [0, 4, 8]))
        for begin, length in ((0, 3), (4, 2)):
            rows = (x[begin : begin + length] for x in (query, key, value))
            expected = softmax_attention(*rows, mask_type == AttnMaskType.causal)
            torch.testing.assert_close(found[begin : begin + length], expected)
        assert not found[[3, 6, 7, 8, 9, 10, 11]].any()


@pytest.mark.parametrize("batch", [1, 3])
def test_sbhd_equals_megatrons_own(batch):
    config = config_of()
    query, key, value = heads_of(7, batch, dtype=torch.float32)
    mask = torch.ones(1, 1, 7, 7).triu(1).bool()
    expected = DotProductAttention(config, 1, AttnMaskType.causal, "self")(query, key, value, mask)
    found = attention_of(config)(query, key, value, None, AttnMaskType.causal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dropout_follows_the_seed():
    attention = attention_of(config_of(), attention_dropout=0.5)
    query, key, value = heads_of(8)
    given = (query, key, value, None)
    first, second = (attention(*given, packed_seq_params=thd([0, 8])) for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attention(*given, packed_seq_params=thd([0, 8])) for _ in range(2))
    assert torch.equal(first, second)


def test_what_it_does_not_do():
    with pytest.raises(mp.PackingError, match="no sliding window"):
        attention_of(config_of(window_size=(4, 0)))
    attention = attention_of(config_of())
    query, key, value = heads_of(7, 1)
    with pytest.raises(mp.PackingError, match="no attention_bias"):
        attention(query, key, value, None, attention_bias=torch.zeros(1))
    with pytest.raises(mp.PackingError, match="no mask type 'arbitrary'"):
        attention(query, key, value, None, AttnMaskType.arbitrary)
    with pytest.raises(mp.PackingError, match="no attention_mask"):
        attention(query, key, value, torch.zeros(1), AttnMaskType.no_mask)
