"""What a model asks of a row: read off its config, the same before and after install."""

import dataclasses
import pickle
import types

import pytest
import torch

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.megatron import spec as model_spec
from mcore_packing.testing import tiny

from .models import OLD, RELEASE, SIZE, OwnExpansion, arguments, install, model_of, reached

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_token_id": None}, "image_token_id is None, expected an int"),
        ({"image_token_id": "-200"}, "image_token_id is '-200', expected an int"),
        ({"image_token_id": True}, "image_token_id is True, expected an int"),
        ({"img_seq_len": 0}, "img_seq_len is 0, expected a positive int"),
        ({"seq_multiple": 2.0}, "seq_multiple is 2.0, expected a positive int"),
        ({"seq_multiple": 0}, "seq_multiple is 0, expected a positive int"),
        ({"total_multiple": 1.5}, "total_multiple is 1.5, expected a positive int"),
        ({"max_length": 10, "total_multiple": 4}, "max_length is 10, expected a multiple of 4"),
        ({"fixed_length": 16.0}, "fixed_length is 16.0, expected an int"),
        ({"fixed_length": 16, "max_length": 12}, "fixed_length is 16, expected at most max_length"),
        ({"max_sequences": 0}, "max_sequences is 0, expected a positive int"),
        ({"on_overflow": "cut"}, "on_overflow is 'cut', expected 'raise' or 'truncate'"),
        ({"on_overflow": None}, "on_overflow is None"),
        ({"expands": 1}, "expands is 1, expected True or False"),
        ({"cp_size": 2}, "seq_multiple is 1, but cp_size 2 cuts every sequence into 4 chunks"),
        ({"cp_size": 4, "seq_multiple": 4}, "seq_multiple is 4, but cp_size 4 cuts .* 8 chunks"),
        ({"pad_token_id": "0"}, "pad_token_id is '0', expected an int"),
        ({"max_length": 2**33}, "max_length is 8589934592, more than int32 holds"),
        ({"image_token_id": -(2**31) - 1}, "image_token_id is -2147483649, more than int32 holds"),
        ({"seq_multiple": 2**16, "total_multiple": 3**11}, "total_multiple is 1160.*more than"),
    ],
)
def test_fields_that_make_no_sense(fields, message):
    with pytest.raises(mp.PackingError, match=message):
        mp.RowSpec(**fields)


def test_a_spec_is_frozen_hashable_and_picklable():
    spec = mp.RowSpec(seq_multiple=4, total_multiple=6, max_length=24)
    assert spec.total_multiple == 12 and spec.longest == 24
    assert {spec: 1}[pickle.loads(pickle.dumps(spec))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.seq_multiple = 8
    lowest = mp.RowSpec(image_token_id=-(2**31))
    for one in (spec, lowest):
        assert mp.RowSpec.from_ints(one.to_ints()) == one


@pytest.mark.parametrize("own", [False, True], ids=["ours", "boundaries-only"])
def test_the_same_before_and_after_install(own):
    model, samples = model_of(), tiny.samples(3, img_size=SIZE)
    if own:
        model.__class__ = OwnExpansion
    row = parity.collate(samples)
    counts = row["num_image_tiles"] * model.img_seq_len
    before = mp.row_spec(model)
    assert before.img_seq_len == model.img_seq_len and before.on_overflow == "raise"
    for options in ({"space": None}, {"on_overflow": "truncate"}):
        with install(model, **options), torch.no_grad():
            assert mp.row_spec(model) == mp.row_spec([model]) == before
            model(**{
                **arguments(samples),
                "packed_seq_params": mp.packed_seq_params(mp.PackedLayout.build(
                    row["input_ids"], row["cu_seqlens"], counts, before, space="collapsed"
                )),
            })  # fmt: skip


@pytest.mark.parametrize("own", [False, True], ids=["ours", "boundaries-only"])
def test_max_sequences_of_a_loader_that_install_was_not_told(own):
    model = model_of("rope", max_sequence_length=256)
    if own:
        model.__class__ = OwnExpansion
    before = mp.row_spec(model, max_sequences=8)
    with install(model):
        assert mp.row_spec(model, max_sequences=8) == before
    assert (before.max_sequences, before.fixed_length) == ((None, None) if own else (8, 256))


def test_the_spec_of_a_model_is_made_at_install():
    model = model_of(max_sequence_length=1000)
    with install(model):
        model._language_max_sequence_length = 512
        assert mp.row_spec(model).max_length == 1000
    assert mp.row_spec(model).max_length == 512


def test_a_stage_without_a_language_model_asks_nothing():
    encoder, model = model_of(add_decoder=False, post_process=False), model_of()
    assert mp.row_spec(encoder).max_length is None
    assert mp.row_spec([encoder, model]) == mp.row_spec(model)


@pytest.mark.parametrize("recipe, multiple", [("delayed", 16), ("mxfp8", 32), ("blockwise", 128)])
def test_fp8_is_read_off_the_config(recipe, multiple):
    model = model_of(max_sequence_length=1000)
    model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
    spec = mp.row_spec(model)
    assert spec.total_multiple == multiple
    assert spec.max_length == 1000 // multiple * multiple
    model._language_is_pipeline_parallel = True
    for ask in (mp.row_spec, install):
        with pytest.raises(mp.PackingError, match=f"of {multiple}:"):
            ask(model)


def test_fp4_is_read_off_the_config():
    config = types.SimpleNamespace(fp4="e2m1", fp4_recipe="nvfp4", fp8=None)
    found = model_spec.fp8_align_of(config)
    if OLD:
        assert found == 128
        return
    from megatron.core.fp4_utils import get_fp4_align_size

    assert found == get_fp4_align_size("nvfp4") >= 32


@pytest.mark.skipif(not RELEASE.pads_rows, reason="this megatron-core pads no row")
def test_boundaries_reach_the_end_of_a_row_that_megatron_pads():
    # From 0.18 on it pads what sequence parallelism could not divide.
    model, samples = model_of(), tiny.samples(3, img_size=SIZE)
    model.__class__ = OwnExpansion
    with install(model):
        free = int(reached(model, arguments(samples))["packed_seq_params"].cu_seqlens_q[-1])
    model.sequence_parallel_lm, model.tensor_model_parallel_size_lm = True, 16
    assert free % 16 and mp.row_spec(model).total_multiple == 16


# Captured layers


def captured():
    model = model_of("rope", max_sequence_length=1024)
    model.config.enable_cuda_graph, model.config.cuda_graph_impl = True, "local"
    return model


def test_captured_layers_see_the_same_shapes_and_numbers():
    model, seen = captured(), []
    with install(model, max_sequences=64):
        assert mp.row_spec(model) == mp.row_spec(model, max_sequences=64)
        assert mp.row_spec(model).fixed_length == 1024
        for seed, count in enumerate((1, 4, 7)):
            params = reached(model, arguments(tiny.samples(count, img_size=SIZE, seed=seed)))
            seen.append(params["packed_seq_params"])
    for params in seen:
        assert params.cu_seqlens_q.shape == (65,) and params.cu_seqlens_q[-1] == 1024
        assert params.max_seqlen_q == seen[0].max_seqlen_q == 2048
    with install(model, max_sequences=4), pytest.raises(mp.PackingError, match="max_sequences=4"):
        reached(model, arguments(tiny.samples(7, img_size=SIZE)))


def test_a_layout_that_rides_along_to_captured_layers(sent_layout):
    model, given = captured(), arguments(tiny.samples(3, img_size=SIZE))
    with install(model, max_sequences=64):
        params = mp.packed_seq_params(sent_layout(given, model))
        found = reached(model, given | {"packed_seq_params": params})["packed_seq_params"]
        assert torch.equal(found.cu_seqlens_q, params.cu_seqlens_q)
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            wrong = dataclasses.replace(params, **{name: params.cu_seqlens_q[:-1]})
            with pytest.raises(mp.PackingError, match=r"there are 64 boundaries, but .* has 65"):
                reached(model, given | {"packed_seq_params": wrong})


def test_captured_layers_have_to_say_how_many_sequences():
    with pytest.raises(mp.PackingError, match="say with max_sequences= how many sequences"):
        install(captured())


def test_a_graph_of_the_whole_iteration_is_no_graph_of_layers():
    config = types.SimpleNamespace(cuda_graph_impl="local", cuda_graph_scope=["full_iteration"])
    assert not model_spec.captures_layers(config)
    config.cuda_graph_scope = []
    assert model_spec.captures_layers(config)
    assert model_spec.captures_layers(types.SimpleNamespace(external_cuda_graph=True))
