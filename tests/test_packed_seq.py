"""PackedSeqParams: expanded, carried over, left alone."""

import dataclasses

import hypothesis
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp

from .packs import IMAGE, NAMED, make_row, structures

FIELDS = {item.name for item in dataclasses.fields(PackedSeqParams)}
BOUNDARIES = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
OWNED = {*BOUNDARIES, "qkv_format", "max_seqlen_q", "max_seqlen_kv", "pad_between_seqs"}
OWNED |= {"total_tokens", "seq_idx", "cp_scatter_cache"}


def params_of(cu_seqlens, **kwargs):
    longest = int(cu_seqlens.diff().max())
    kwargs = {"cu_seqlens_kv": cu_seqlens, "max_seqlen_q": longest, **kwargs}
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, max_seqlen_kv=longest, **kwargs
    )


def remap(row, params, **kwargs):
    kwargs = {"space": "collapsed", **kwargs}
    return mp.remap_packed_seq_params(params, row.input_ids, row.tokens_per_image, IMAGE, **kwargs)


@hypothesis.given(structures())
def test_collapsed_becomes_expanded_and_stays(structure):
    row = make_row(structure)
    before = dataclasses.replace(params_of(row.cu_seqlens))
    params = remap(row, before)
    expected = mp.remap_cu_seqlens(row.cu_seqlens, row.input_ids, row.tokens_per_image, IMAGE)
    assert torch.equal(params.cu_seqlens_q, expected)
    assert params.max_seqlen_q == params.max_seqlen_kv == int(expected.diff().max())
    assert type(params.max_seqlen_q) is int
    if params is not before:
        assert len({id(getattr(params, name)) for name in BOUNDARIES}) == 1
    assert before.cu_seqlens_q is row.cu_seqlens  # what came in is as it was
    assert remap(row, params, space="expanded") is params  # Law 5


def test_only_the_tail_is_added_to_expanded_boundaries():
    row = make_row([[0, 1], [0, 0], [0, 2, 0]])
    params = params_of(torch.tensor([0, 6, 8], dtype=torch.int32))
    found = remap(row, params, space="expanded")
    assert found.cu_seqlens_q.tolist() == [0, 6, 8, 20] and found.max_seqlen_q == 12


def test_every_other_field_is_carried_over():
    row = make_row(NAMED["T63-N5-B3"])
    params = params_of(row.cu_seqlens)
    others = FIELDS - OWNED
    for name in others:
        setattr(params, name, 1)
    found = remap(row, params)
    assert {name: getattr(found, name) for name in others} == dict.fromkeys(others, 1)


def test_a_tensor_max_seqlen_becomes_an_int():
    row = make_row(NAMED["T63-N5-B3"])
    expanded = remap(row, params_of(row.cu_seqlens))
    given = dataclasses.replace(expanded, max_seqlen_q=torch.tensor(40))
    found = remap(row, given, space="expanded")
    assert found is not given and type(found.max_seqlen_q) is int
    assert found.max_seqlen_q == expanded.max_seqlen_q


def test_key_boundaries_of_their_own_are_mapped_too():
    row = make_row(NAMED["T63-N5-B3"])
    params = params_of(row.cu_seqlens, cu_seqlens_kv=row.cu_seqlens.clone())
    found = remap(row, params)
    assert found.cu_seqlens_q is not found.cu_seqlens_kv
    assert torch.equal(found.cu_seqlens_q, found.cu_seqlens_kv)


def test_real_and_padded_boundaries_stay_apart():
    ids = torch.tensor([1, 2, 3, 0, 6, IMAGE, 0, 0])
    real = torch.tensor([0, 3, 5], dtype=torch.int32)
    padded = torch.tensor([0, 4, 8], dtype=torch.int32)
    params = params_of(real, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded)
    found = mp.remap_packed_seq_params(params, ids, [4], IMAGE, "collapsed")
    assert found.cu_seqlens_q.tolist() == [0, 3, 8]
    assert found.cu_seqlens_q_padded.tolist() == [0, 4, 11]
    assert found.cu_seqlens_q is found.cu_seqlens_kv
    assert found.cu_seqlens_q_padded is found.cu_seqlens_kv_padded
    if "pad_between_seqs" in FIELDS:
        assert found.pad_between_seqs is True


def test_from_a_layout():
    row = make_row([[0, 1], [0, 0, 0]])
    layout = mp.PackedLayout.build(
        row.input_ids, row.cu_seqlens, row.tokens_per_image, IMAGE, "collapsed", seq_multiple=4,
        total_multiple=16,
    )  # fmt: skip
    params = mp.packed_seq_params(layout)
    assert params.qkv_format == "thd" and params.cu_seqlens_q.tolist() == [0, 8, 12, 16]
    assert params.cu_seqlens_q_padded is params.cu_seqlens_q
    params = mp.packed_seq_params(layout, pad_between_seqs=True)
    assert params.cu_seqlens_q.tolist() == [0, 6, 9, 9]  # the tail holds nothing real
    assert params.cu_seqlens_q_padded.tolist() == [0, 8, 12, 16]


@pytest.mark.skipif("seq_idx" not in FIELDS, reason="this megatron-core has no seq_idx")
def test_seq_idx_equals_megatrons_own():
    row = make_row(NAMED["T63-N5-B3"])
    params = dataclasses.replace(params_of(row.cu_seqlens), total_tokens=63)
    found = remap(row, params)
    assert found.total_tokens == int(found.cu_seqlens_q[-1])
    again = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=found.cu_seqlens_q, total_tokens=found.total_tokens
    )
    assert torch.equal(found.seq_idx, again.seq_idx) and found.seq_idx.dtype == torch.int32
