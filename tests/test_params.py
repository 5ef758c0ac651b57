"""PackedSeqParams: expanded, carried over, left alone."""

import copy as copy_module
import dataclasses
import functools
import pickle

import hypothesis
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed.fsdp._fully_shard._fsdp_common import _cast_fp_tensor
from torch.distributed.utils import _apply_to_tensors, _recursive_to

import mcore_packing as mp

from .packs import IMAGE, NAMED, build, lay_out, make_row, structures

FIELDS = {item.name for item in dataclasses.fields(PackedSeqParams)}
BOUNDARIES = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
OWNED = {*BOUNDARIES, "qkv_format", "max_seqlen_q", "max_seqlen_kv", "pad_between_seqs"}
OWNED |= {"total_tokens", "seq_idx", "cp_scatter_cache", "tokens_per_sample"}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def params_of(cu_seqlens, **kwargs):
    longest = int(cu_seqlens.diff().max())
    kwargs = {"cu_seqlens_kv": cu_seqlens, "max_seqlen_q": longest, **kwargs}
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, max_seqlen_kv=longest, **kwargs
    )


def remap(row, params, space="collapsed"):
    return mp.remap_packed_seq_params(
        params, row.input_ids, row.tokens_per_image, IMAGE, space=space
    )


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


def test_queries_decide():
    row = make_row(NAMED["T63-N5-B3"])
    found = remap(row, params_of(row.cu_seqlens, cu_seqlens_kv=row.cu_seqlens.clone()))
    assert found.cu_seqlens_q is found.cu_seqlens_kv
    found = remap(row, params_of(row.cu_seqlens, cu_seqlens_kv=None))
    assert found.cu_seqlens_q is found.cu_seqlens_kv
    other = row.cu_seqlens.clone()
    other[1] += 1
    for keys in (
        {"cu_seqlens_kv": other},
        {"cu_seqlens_q_padded": row.cu_seqlens, "cu_seqlens_kv_padded": other},
    ):
        with pytest.raises(mp.PackingError, match="LLaVA attends to itself"):
            remap(row, params_of(row.cu_seqlens, **keys))


def real_and_padded():
    """Ids, counts and parameters of a row that is padded between its sequences."""
    real, padded = int32(0, 3, 5), int32(0, 4, 8)
    params = params_of(real, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded)
    return torch.tensor([1, 2, 3, 0, 6, IMAGE, 0, 0]), [4], params


@pytest.mark.skipif("pad_between_seqs" not in FIELDS, reason="nothing tells TE")
def test_real_and_padded_boundaries_stay_apart():
    ids, counts, params = real_and_padded()
    found = mp.remap_packed_seq_params(params, ids, counts, IMAGE, space="collapsed")
    assert found.cu_seqlens_q.tolist() == [0, 3, 8]
    assert found.cu_seqlens_q_padded.tolist() == [0, 4, 11]
    assert found.cu_seqlens_q is found.cu_seqlens_kv
    assert found.cu_seqlens_q_padded is found.cu_seqlens_kv_padded
    assert found.pad_between_seqs is True


@pytest.mark.skipif("pad_between_seqs" in FIELDS, reason="TE can be told")
def test_real_boundaries_are_left_out_where_nothing_tells_te():
    # Under context parallelism TE does not notice that they differ behind the last sequence only.
    ids, counts, params = real_and_padded()
    found = mp.remap_packed_seq_params(params, ids, counts, IMAGE, space="collapsed")
    assert found.cu_seqlens_q.tolist() == [0, 4, 11]
    assert len({id(getattr(found, name)) for name in BOUNDARIES}) == 1
    assert found.layout.cu_seqlens_expanded.tolist() == [0, 3, 8]


def test_from_a_layout():
    row = make_row([[0, 1], [0, 0, 0]])
    layout = build(row, seq_multiple=4, total_multiple=16)
    params = mp.packed_seq_params(layout)
    assert params.qkv_format == "thd" and params.cu_seqlens_q.tolist() == [0, 8, 12, 16]
    assert params.cu_seqlens_q_padded is params.cu_seqlens_q
    for other in (None, layout.to_tensor(), layout.cu_seqlens_padded):
        with pytest.raises(mp.PackingError, match="takes a PackedLayout, not a"):
            mp.packed_seq_params(other)
    with pytest.raises(mp.PackingError, match="no pad_between_seqs= any more: pass like="):
        mp.packed_seq_params(layout, pad_between_seqs=True)


@pytest.mark.skipif("pad_between_seqs" not in FIELDS, reason="nothing tells TE")
def test_like_tells_real_from_padded():
    row = make_row([[0, 1], [0, 0, 0]])
    layout = build(row, seq_multiple=4, total_multiple=16)
    for like in (
        dataclasses.replace(params_of(row.cu_seqlens), pad_between_seqs=True),
        params_of(row.cu_seqlens, cu_seqlens_q_padded=row.cu_seqlens.clone()),
    ):
        params = mp.packed_seq_params(layout, like)
        assert params.cu_seqlens_q.tolist() == [0, 6, 9, 9]  # the tail holds nothing real
        assert params.cu_seqlens_q_padded.tolist() == [0, 8, 12, 16]
    # Tokens behind the last boundary are real: the tail is a sequence, whoever trains it.
    ids = torch.tensor([1, IMAGE, 2, 3, 4])
    layout = lay_out(ids, int32(0, 3), [3], seq_multiple=4, total_multiple=16)
    params = mp.packed_seq_params(layout, like)
    assert params.cu_seqlens_q.tolist() == [0, 5, 7]
    assert params.cu_seqlens_q_padded.tolist() == [0, 8, 16]


@pytest.mark.parametrize("length, count", [(64, 1), (64, 3), (4096, 7)])
def test_captured_layers_see_the_same_shapes_and_numbers(length, count):
    ids = torch.arange(3 * count)
    edges = torch.arange(0, 3 * count + 1, 3, dtype=torch.int32)
    layout = lay_out(ids, edges, [], fixed_length=length, max_sequences=8)
    assert layout.cu_seqlens_padded.numel() == count + 2  # layouts keep what they have
    params = mp.packed_seq_params(layout)
    assert params.cu_seqlens_q.shape == (9,) and params.cu_seqlens_q[-1] == length
    assert torch.equal(params.cu_seqlens_q[: count + 2], layout.cu_seqlens_padded)
    assert params.max_seqlen_q == 1024 * (length // 1024 + 1) > length
    with pytest.raises(mp.PackingError, match="has 8 sequences, the tail included, but layers"):
        lay_out(torch.arange(7), torch.arange(8, dtype=torch.int32), [], max_sequences=7)


def test_the_layout_survives_what_rebuilds_dataclasses():
    row = make_row(NAMED["T63-N5-B3"])
    layout = build(row)
    params = mp.packed_seq_params(layout, seq_idx=True)
    cast = functools.partial(_cast_fp_tensor, torch.bfloat16)  # as FSDP2 casts inputs
    for copy in (
        dataclasses.replace(params),
        _apply_to_tensors(cast, {"packed_seq_params": params})["packed_seq_params"],
        _recursive_to([params], torch.device("cpu"), False)[0][0],
        pickle.loads(pickle.dumps(params)),
        copy_module.deepcopy(params),
    ):
        assert isinstance(copy, PackedSeqParams)
        assert torch.equal(copy.layout.cu_seqlens_padded, layout.cu_seqlens_padded)
        assert copy.layout.max_seqlen == layout.max_seqlen and copy.layout.spec == layout.spec
        if "seq_idx" in FIELDS:
            assert torch.equal(copy.seq_idx, params.seq_idx)
    assert remap(row, params) is params


def test_the_layout_of_another_row_is_refused():
    row = make_row(NAMED["T63-N5-B3"])
    params = mp.packed_seq_params(build(row))
    other = row.input_ids.clone()
    other[0] += 1

    def given(input_ids=row.input_ids, rows=row.tokens_per_image, image_token_id=IMAGE):
        return mp.remap_packed_seq_params(params, input_ids, rows, image_token_id)

    for changes, message in (
        ({"input_ids": row.input_ids[:-1]}, "of another one: tokens 63, but the row has 62"),
        ({"rows": row.tokens_per_image[:-1]}, "of another one: images 5, but the row has 4"),
        (
            {"image_token_id": -201},
            "image_token_id is -201, but the layout that came .* was made with -200",
        ),
        ({"input_ids": other}, "was made of other input_ids"),
        ({"rows": row.tokens_per_image.flip(0)}, "was made of other tokens_per_image"),
    ):
        with pytest.raises(mp.PackingError, match=message):
            given(**changes)


@pytest.mark.parametrize("stale", [True, False])
def test_a_stale_max_seqlen_is_put_right(stale):
    row = make_row(NAMED["T63-N5-B3"])
    expanded = remap(row, params_of(row.cu_seqlens))
    longest = int(row.cu_seqlens.diff().max()) if stale else expanded.max_seqlen_q
    given = params_of(expanded.cu_seqlens_q, max_seqlen_q=longest)
    given.max_seqlen_kv = longest
    found = remap(row, given, space="expanded")
    assert found.max_seqlen_q == found.max_seqlen_kv == expanded.max_seqlen_q
    assert (found is given) == (not stale)


def test_parameters_without_boundaries_are_refused():
    row = make_row(NAMED["T63-N5-B3"])
    with pytest.raises(mp.PackingError, match="have no cu_seqlens_q"):
        remap(row, PackedSeqParams(qkv_format="thd"))
    for wrong in (row.cu_seqlens[:0], row.cu_seqlens[None]):
        with pytest.raises(mp.PackingError, match="cu_seqlens"):
            remap(row, PackedSeqParams(qkv_format="thd", cu_seqlens_q=wrong, cu_seqlens_kv=wrong))


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
