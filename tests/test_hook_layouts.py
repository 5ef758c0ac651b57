"""Layouts that ride along: used as they are, or refused."""

import contextlib
import dataclasses

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing import ops, parity
from mcore_packing.megatron import call
from mcore_packing.testing import tiny
from mcore_packing.testing.host_reads import HostReads

from .models import (
    POSITIONS,
    RELEASE,
    SIZE,
    Reached,
    arguments,
    both_expansions,
    install,
    model_of,
    stop_at_language_model,
)

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("positions", POSITIONS)
@both_expansions
def test_a_layout_from_the_data_path_is_used_as_it_is(
    sent_layout, like_a_gpu, monkeypatch, positions, ours, seen
):
    model, samples = model_of(positions), tiny.samples(4, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    calls = seen(model)
    with install(model, ours, space=None) as handle:
        given = arguments(samples)
        layout = sent_layout(given, model)
        params = mp.packed_seq_params(layout)
        monkeypatch.setattr(ops, "layout", pytest.fail)
        like_a_gpu.clear()
        given["packed_seq_params"] = params
        with torch.no_grad():
            loss, mask = model(**given)
        handle.check()
        stop_at_language_model(model)
        with HostReads() as reads, pytest.raises(Reached):
            model(**given)
    assert like_a_gpu == [] and (not ours or reads.found == [])
    assert ((loss[0] + alone).abs() * mask[0]).max() < 1e-5
    found = calls[-1]["packed_seq_params"]
    assert type(found) is PackedSeqParams and torch.equal(found.cu_seqlens_q, params.cu_seqlens_q)
    assert found.max_seqlen_q == found.max_seqlen_kv == layout.max_seqlen


def test_check_finds_a_layout_of_other_tokens(sent_layout, like_a_gpu):
    # On a GPU nobody compares tokens on the way: check() does, when it is asked.
    model, given = model_of(), arguments(tiny.samples(3, img_size=SIZE))
    with install(model) as handle, torch.no_grad():
        params = mp.packed_seq_params(sent_layout(given, model))
        other = given["input_ids"].clone()
        other[0, -1] += 1
        model(**given | {"packed_seq_params": params, "input_ids": other})
        with pytest.raises(mp.PackingError, match="was made of other input_ids"):
            handle.check()


FIELDS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def moved(edges):
    return torch.cat([edges[:1], edges[1:2] - 1, edges[2:]])


def cut(edges):
    return edges[:-1]


@pytest.mark.parametrize("change, message", [(moved, "are not those of"), (cut, "there are 3 ")])
@pytest.mark.parametrize("names", [FIELDS, *[(name,) for name in FIELDS]], ids="-".join)
def test_boundaries_changed_under_a_layout_are_refused(sent_layout, names, change, message):
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    params = mp.packed_seq_params(sent_layout(given, model))
    edges = change(params.cu_seqlens_q)
    changed = dataclasses.replace(params, **dict.fromkeys(names, edges))
    given["packed_seq_params"] = changed
    with install(model), pytest.raises(mp.PackingError, match=message):
        model(**given)


def test_boundaries_changed_on_a_gpu_are_found_by_check(sent_layout, like_a_gpu):
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    params = mp.packed_seq_params(sent_layout(given, model))
    changed = dataclasses.replace(params, cu_seqlens_q=moved(params.cu_seqlens_q))
    with install(model) as handle, torch.no_grad():
        model(**given | {"packed_seq_params": params})
        handle.check()
        model(**given | {"packed_seq_params": changed})
        with pytest.raises(mp.PackingError, match="are not those of the layout"):
            handle.check()


def test_placeholders_that_a_riding_layout_takes_for_text_are_refused():
    model = model_of("rope", max_sequence_length=64)
    given = arguments([{"input_ids": torch.arange(10, 30)}])
    given["input_ids"][0, 3] = tiny.IMAGE_TOKEN_ID
    edges = given["packed_seq_params"].cu_seqlens_q
    spec = dataclasses.replace(mp.row_spec(model), image_token_id=7)
    layout = mp.PackedLayout.build(given["input_ids"], edges, [], spec, space="collapsed")
    given["packed_seq_params"] = mp.packed_seq_params(layout)
    if RELEASE.keeps_text_rows:
        pytest.skip("this megatron-core takes such a row for text, too")
    with install(model), pytest.raises(mp.PackingError, match="takes for text"):
        model(**given)


MADE_FOR = [
    (
        "expands",
        {"expands": False},
        {},
        "was made with expands=False, but this model asks for True",
    ),
    ("fixed_length", {"fixed_length": 400}, {}, "fixed_length=400, but this model asks for None"),
    ("max_sequences", {"max_sequences": 8}, {}, "max_sequences=8, but this model asks for None"),
    ("image_token_id", {"image_token_id": 7}, {}, "image_token_id=7, but this model asks for -200"),
    ("seq_multiple", {"seq_multiple": 2}, {"seq_multiple": 4}, "seq_multiple=2, but .* asks for 4"),
    (
        "total_multiple",
        {"total_multiple": 6},
        {"total_multiple": 4},
        "multiple=6, but .* asks for 4",
    ),
    ("max_length", {}, {"max_length": 200}, "has 2[0-9][0-9] positions, more than the 200 that"),
]


@pytest.mark.parametrize("name, has, needs, message", MADE_FOR, ids=[case[0] for case in MADE_FOR])
def test_a_layout_for_another_model_is_refused(name, has, needs, message):
    # Field by field: what rides along has to fit the model that gets it.
    spec = mp.RowSpec(max_length=1200)
    samples = tiny.samples(3, img_size=SIZE)
    given, counts = arguments(samples), [[5], [10], [5, 15]]
    if "expands" in has or "image_token_id" in has:
        counts = [] if "expands" in has else [[]] * 3
    row = given["input_ids"], given["packed_seq_params"].cu_seqlens_q
    if name == "image_token_id":
        ids = torch.where(row[0] == tiny.IMAGE_TOKEN_ID, 7, row[0].clamp(min=8))
        row, counts = (ids, row[1]), [[5], [10], [5, 15]]
    layout = mp.PackedLayout.build(
        *row, counts, dataclasses.replace(spec, **has), space="collapsed"
    )
    with pytest.raises(mp.PackingError, match=f"the layout that came with this row .*{message}"):
        dataclasses.replace(spec, **needs).check(layout)
    mp.RowSpec(**{**{"max_length": 2400}, **has}).check(layout)  # its own, and a longer one


def test_what_makes_no_difference_passes():
    ids, edges = torch.tensor([1, -200, 2]), torch.tensor([0, 3], dtype=torch.int32)
    made = mp.RowSpec(img_seq_len=5, on_overflow="truncate", seq_multiple=8, cp_size=2)
    layout = mp.PackedLayout.build(ids, edges, [5], made, space="collapsed")
    mp.RowSpec(seq_multiple=4, total_multiple=8, max_length=64).check(layout)
    text = mp.PackedLayout.build(torch.tensor([1, 2, 3]), edges, [], made, space="collapsed")
    mp.RowSpec(image_token_id=7).check(text)  # no image, no placeholder


def test_a_layout_of_another_row_is_refused(sent_layout, like_a_gpu):
    model, given = model_of(max_sequence_length=400), arguments(tiny.samples(3, img_size=SIZE))
    params = mp.packed_seq_params(sent_layout(given, model))
    with install(model):
        for name, value in (
            ("images", given["images"][:-1]),
            ("input_ids", torch.ones(1, 9).long()),
        ):
            with pytest.raises(mp.PackingError, match="the layout that came with this row"):
                model(**given | {"packed_seq_params": params, name: value})
    boundaries = mp.PackedLayout.from_tensor(params.layout.to_tensor(boundaries_only=True))
    with install(model), pytest.raises(mp.PackingError, match="but this stage has tokens"):
        model(**given | {"packed_seq_params": mp.packed_seq_params(boundaries)})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seq_multiple": 8}, "pads sequences to multiples of 8, which Megatron's own expansion, "),
        ({"total_multiple": 64}, "positions, but Megatron's own expansion, the one of this call"),
    ],
)
def test_a_layout_that_megatrons_own_expansion_does_not_make_is_refused(
    sent_layout, change, message
):
    model, given = model_of(max_sequence_length=1024), arguments(tiny.samples(3, img_size=SIZE))
    given["packed_seq_params"] = mp.packed_seq_params(sent_layout(given, model, **change))
    with install(model, ours=False), pytest.raises(mp.PackingError, match=message):
        model(**given)


@pytest.mark.parametrize("lengths, passes", [([20, 12], True), ([21, 11], False), ([32], True)])
def test_sequences_that_megatrons_own_expansion_does_not_pad(monkeypatch, lengths, passes):
    # Context parallelism cuts each into chunks; a text row stays as long as it is.
    monkeypatch.setattr(call, "sequences_must_divide_by", lambda model: 4)
    model = model_of("rope", max_sequence_length=32)
    given = arguments([{"input_ids": torch.arange(1, 1 + length)} for length in lengths])
    refused = pytest.raises(mp.PackingError, match=r"sequence 0: 21 positions, expected a multiple")
    with install(model, ours=False), contextlib.nullcontext() if passes else refused:
        model(**given)


def test_a_prefix_of_the_boundaries_is_refused(sent_layout, like_a_gpu):
    # Their number is known without looking.
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    params = mp.packed_seq_params(sent_layout(given, model))
    edges = params.cu_seqlens_q[:-1]
    given["packed_seq_params"] = dataclasses.replace(
        params, cu_seqlens_q=edges, cu_seqlens_kv=edges, cu_seqlens_q_padded=edges
    )
    with install(model), pytest.raises(mp.PackingError, match="there are 3 boundaries, but the"):
        model(**given)
