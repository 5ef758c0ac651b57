"""What differs between Megatron-Core releases: resolutions, sounds, experts, FSDP2."""

import dataclasses

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed.fsdp import fully_shard

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.megatron import call, plan, releases
from mcore_packing.megatron.params import LaidOutParams, megatron_params
from mcore_packing.testing import tiny

from .models import (
    OLD,
    PACKS_VISION,
    RELEASE,
    SIZE,
    arguments,
    both_expansions,
    install,
    model_of,
    radio,
    reached,
    resolution_row,
    resolution_samples,
)

pytestmark = pytest.mark.usefixtures("megatron")
HAS_SOUND = PACKS_VISION  # main refuses sounds as yet


def test_this_release_is_known():
    assert releases.describe().startswith("understood")


# Images in their own resolution

RESOLUTIONS = [
    pytest.param({}, [[1], [1, 1], [1]], id="plain"),
    pytest.param({"pixel_shuffle": True}, [[1], [1, 1], [1]], id="pixel-shuffle"),
    pytest.param(
        {"drop_vision_class_token": False},
        [[1], [1, 1], [1]],
        id="class-tokens",
        marks=pytest.mark.skipif(PACKS_VISION, reason="its own expansion counts none"),
    ),
    pytest.param(
        {"max_num_tiles": 4},
        [[2], [1, 1], [1]],
        id="tiles",
        marks=pytest.mark.skipif(PACKS_VISION, reason="it has one size an image"),
    ),
]


@pytest.mark.skipif(RELEASE.name == "0.12 to 0.17", reason="it resizes images")
@both_expansions
@pytest.mark.parametrize("options, tiles", RESOLUTIONS)
def test_dynamic_resolution(options, tiles, ours):
    model, samples = radio(**options), resolution_samples(tiles)
    with torch.no_grad():
        alone = [model(**resolution_row([sample])) for sample in samples]
        expected, expected_mask = (torch.cat(x, dim=1) for x in zip(*alone, strict=True))
        with install(model, ours=ours):
            loss, mask = model(**resolution_row(samples, [0, 12, 24, 36]))
    assert loss.shape == expected.shape
    assert ((loss - expected) * mask * expected_mask).abs().max() < 1e-5
    assert (mask != expected_mask).sum() == (0 if ours else 1)


@pytest.mark.skipif(RELEASE.name == "0.12 to 0.17", reason="it resizes images")
def test_dynamic_resolution_of_a_fixed_length_without_looking(like_a_gpu):
    # The rows of images are known on the GPU alone, and the length of the row from the pipeline.
    model, samples = radio(max_sequence_length=128), resolution_samples([[1], [1, 1], [1]])
    given = resolution_row(samples, [0, 12, 24, 36])
    with torch.no_grad():
        with install(model):
            expected, _ = model(**given)
        given = resolution_row(samples, [0, 12, 24, 36])
        model._language_is_pipeline_parallel = True
        with install(model):
            loss, mask = model(**given)
    size = expected.shape[1]
    assert loss.shape == (1, 128) and not mask[:, size:].any()
    assert ((loss[:, :size] - expected) * mask[:, :size]).abs().max() < 1e-5


@pytest.mark.skipif(RELEASE.name == "0.12 to 0.17", reason="it resizes images")
@pytest.mark.parametrize(
    "ours",
    [True, pytest.param(False, marks=pytest.mark.skipif(PACKS_VISION, reason="Megatron raises"))],
    ids=["ours", "boundaries-only"],
)
def test_a_dummy_image_with_a_size_in_a_row_without_images(ours):
    model = radio()
    model.vision_model._is_fsdp_managed_module = True
    ids = torch.randint(1, 500, (29,))
    sample = ids, torch.randn(16, 3 * 14**2), [(56, 56)], []
    given = resolution_row([sample], [0, 9, 29])
    given["num_image_tiles"] = torch.tensor([], dtype=torch.int)
    labels = given["labels"][0].split([9, 20])
    alone = [model(**text(*part)) for part in zip(ids.split([9, 20]), labels, strict=True)]
    with install(model, ours=ours):
        loss, mask = model(**given)
    assert loss.shape == (1, 29)
    expected = torch.cat([pair[0] for pair in alone], dim=1)
    assert ((loss - expected) * mask).abs().max() < 1e-5


def text(ids, labels):
    given = arguments([{"input_ids": ids}])
    trained = {"labels": labels[None], "loss_mask": torch.ones(1, ids.numel())}
    return {**given, **trained, "packed_seq_params": None}


@pytest.mark.skipif(not PACKS_VISION, reason="other stages know the size of a patch")
def test_the_last_stage_needs_the_layout_of_images_of_their_own_size():
    whole, samples = radio(max_sequence_length=128), resolution_samples([[1], [1, 1], [1]])
    last = model_of("rope", max_sequence_length=128, pre_process=False, add_encoder=False)
    whole._language_is_pipeline_parallel = last._language_is_pipeline_parallel = True
    given = resolution_row(samples, [0, 12, 24, 36])
    counts = (given["imgs_sizes"] // 14).prod(-1)
    edges = given["packed_seq_params"].cu_seqlens_q
    layout = mp.PackedLayout.build(
        given["input_ids"], edges, counts, mp.row_spec(whole), space="collapsed"
    )
    last.set_input_tensor(torch.randn(128, 1, 64))
    with install(whole), install(last), torch.no_grad():
        _, expected = whole(**resolution_row(samples, [0, 12, 24, 36]))
        with pytest.raises(mp.PackingError, match="send it the layout"):
            last(**{**given, "images": None})
        given["packed_seq_params"] = mp.packed_seq_params(layout)
        _, mask = last(**{**given, "images": None})
    assert torch.equal(mask, expected)


# Sounds


@pytest.mark.skipif(not HAS_SOUND, reason="this megatron-core has no sounds")
def test_a_placeholder_for_no_sound_stays_ours(monkeypatch):
    monkeypatch.setattr(call.BoundariesOnly, "preprocess", pytest.fail)
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    alone = parity.run_alone(model, samples)
    expected = -torch.cat([pair[0] for pair in alone])
    trained = torch.cat([pair[1] for pair in alone])
    with install(model), torch.no_grad():
        loss, mask = model(**arguments(samples), sound_clips=torch.zeros(1, 1))
    assert torch.equal(mask[0], trained)  # no label lost
    assert ((loss[0] - expected) * mask[0]).abs().max() < 1e-5


@pytest.mark.skipif(not HAS_SOUND, reason="this megatron-core has no sounds")
def test_sounds_are_expanded_by_megatron():
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    sounds = []
    model.sound_model = lambda clips, length: (torch.randn(1, 4, 64), torch.tensor([0]))
    model.sound_projection = lambda rows: sounds.append(rows) or rows
    with install(model), torch.no_grad():
        model(**arguments(samples), sound_clips=torch.ones(1, 16), sound_length=torch.tensor([16]))
        assert sounds and model._packing_hook.plan.seen.layout.spec.seq_multiple == 1


# Experts


def experts(**language):
    language = {"num_moe_experts": 4, "add_bias_linear": False, **language}
    try:
        model = model_of("rope", language=language, max_sequence_length=400)
    except Exception as error:
        pytest.skip(f"this megatron-core builds no such experts on a CPU: {error}")
    model._language_is_pipeline_parallel = True  # a fixed length: the surplus is the tail
    return model


def masks_of_routers(model):
    masks = []
    for layer in model.language_model.decoder.layers:
        layer.mlp.router.register_forward_pre_hook(lambda module, args: masks.append(args[1:]))
    return masks


def test_routers_of_experts_do_not_count_padding():
    model = experts()
    masks = masks_of_routers(model)
    with install(model), torch.no_grad():
        _, loss_mask = model(**arguments(tiny.samples(3, img_size=SIZE)))
    assert len(masks) == 3
    if OLD:
        assert masks == [()] * 3
        return
    for (mask,) in masks:
        assert mask.shape == (400, 1) and not (loss_mask[0] * mask[:, 0]).any()
        assert 0 < mask.sum() < 400
    handle = install(model)
    handle.remove()
    assert not model.language_model._forward_pre_hooks


@pytest.mark.parametrize(
    "language",
    [
        {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
        {"moe_router_load_balancing_type": "quantile_balancing"},
    ],
    ids=["expert-bias", "quantile-balancing"],
)
def test_routers_that_take_no_mask_get_none(language):
    model = experts(**language)
    takes_mask = "moe_router_enable_expert_bias" in language and RELEASE.name == "main"
    assert plan.wants_padding_mask(model.language_model) == takes_mask
    given = arguments(tiny.samples(3, img_size=SIZE))
    try:
        model.train()(**{**given, "packed_seq_params": None})
    except ValueError as error:
        pytest.skip(f"this megatron-core has no such routing: {error}")
    with install(model):
        found = reached(model, given)
        assert (found.get("padding_mask") is not None) == takes_mask
        loss, mask = model.train()(**given)  # does not crash
    assert torch.isfinite(loss[mask > 0]).all()


# What boundaries leave behind


@pytest.mark.parametrize("name", ["total_tokens", "seq_idx", "tokens_per_sample"])
def test_what_was_derived_from_collapsed_boundaries_goes(name):
    if name not in releases.PACKED_SEQ_FIELDS:
        pytest.skip(f"this megatron-core has no {name}")
    model, given = model_of(), arguments(tiny.samples(3, img_size=SIZE))
    stale = torch.tensor([1, 2, 3])
    setattr(given["packed_seq_params"], name, stale)
    with install(model):
        params = reached(model, given)["packed_seq_params"]
    if name == "tokens_per_sample":
        assert params.tokens_per_sample is None
        return
    # Hybrids read them, so they are made anew.
    rows = int(params.cu_seqlens_q[-1])
    assert params.total_tokens == rows and params.seq_idx.shape == (1, rows)


# FSDP2


@pytest.mark.parametrize("first", ["hook", "fsdp"])
def test_fully_sharded_models(first):
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    given = arguments(samples)
    edges = given["packed_seq_params"].cu_seqlens_q
    counts = given["num_image_tiles"] * model.img_seq_len
    layout = mp.PackedLayout.build(
        given["input_ids"], edges, counts, mp.row_spec(model), space="collapsed"
    )
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    expected, _ = install_and_run(model, given)
    handle = mp.install(model) if first == "hook" else None
    fully_shard(model, mesh=mesh)
    handle = handle or mp.install(model)
    given["packed_seq_params"] = mp.packed_seq_params(layout)
    with torch.no_grad():
        loss, _ = model(**given)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    assert model._packing_hook.plan.seen.layout.space == "collapsed"
    if first == "hook":
        with pytest.raises(mp.PackingError, match="remove that first"):
            handle.remove()
    else:
        handle.remove()
        assert type(model).__name__ == "FSDPLLaVAModel"


def install_and_run(model, given):
    with install(model), torch.no_grad():
        return model(**given)


def test_rebuilt_parameters_keep_their_layout():
    layout = mp.PackedLayout.build(
        torch.tensor([1, -200, 2]), torch.tensor([0, 3], dtype=torch.int32), [4], space="collapsed"
    )
    params = mp.packed_seq_params(layout)
    rebuilt = dataclasses.replace(params)
    assert type(rebuilt) is LaidOutParams and rebuilt.layout is layout
    assert type(megatron_params(layout, params)) is PackedSeqParams


def test_a_layout_of_a_row_without_images_rides_along():
    # Main keeps such a row as text, placeholders included.
    model = model_of("rope", max_sequence_length=64)
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 20)]
    (row,), _ = mp.data.pack(samples, mp.row_spec(model), algorithm="concatenative")
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    with mp.install(model), torch.no_grad():
        loss, mask = model(**row.inputs())
    assert mask.sum() == 27 and ((loss[0, :29] + alone) * mask[0, :29]).abs().max() < 1e-5
