"""What is read from a GPU, and when: once, right before the language model."""

import pytest
import torch

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.testing import tiny
from mcore_packing.testing.host_reads import HostReads

from .models import (
    POSITIONS,
    RELEASE,
    SIZE,
    Reached,
    arguments,
    install,
    model_of,
    stop_at_language_model,
)

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("positions", POSITIONS)
def test_without_looking(like_a_gpu, positions, seen, no_layers):
    model = model_of(positions)
    calls = seen(model)
    no_layers(model, like_a_gpu)
    for seed in range(6):
        samples = tiny.samples(1 + seed, img_size=SIZE, seed=seed)
        alone = parity.run_alone(model, samples)
        like_a_gpu.clear()
        with install(model):
            result = parity.compare(model, samples, alone)
        assert result.max_difference < 1e-5 and result.lost_labels == 0
        # One read, before the language model, and it knows the longest sequence.
        assert like_a_gpu[:3] == ["queued", "read", "layer"]
        params = calls[-1]["packed_seq_params"]
        assert params.cu_seqlens_q.numel() == len(samples) + 2  # the tail is kept, however empty
        assert type(params.max_seqlen_q) is int
        assert params.max_seqlen_q == int(params.cu_seqlens_q.diff().max())


@pytest.mark.parametrize("positions", POSITIONS)
def test_no_value_is_read_before_the_language_model(like_a_gpu, positions):
    model, given = model_of(positions), arguments(tiny.samples(3, img_size=SIZE))
    stop_at_language_model(model)
    with install(model), HostReads() as reads, pytest.raises(Reached):
        model(**given)
    assert reads.found == []  # but the status, in one copy
    assert like_a_gpu == ["queued", "read"]
    with HostReads() as reads, pytest.raises(Reached):
        model(**given)
    assert len(reads.found) > 10  # Megatron's own


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": [0, 9, 3, 200]}, "sequence 1: cu_seqlens decreases by 6"),
        ({"cu_seqlens": [0, 9, 20, 2000]}, "the last boundary is 2000, past the end"),
        (
            {"num_image_tiles": [1, 2, 1, 1]},
            "become 20 image embeddings|become 25 image embeddings",
        ),
        ({"num_image_tiles": [1, -2, 1, 1]}, "image 1: tokens_per_image is -10"),
        ({"num_image_tiles": [1, 2]}, "placeholders .* entries in tokens_per_image"),
    ],
)
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_bad_row_raises_before_any_layer(like_a_gpu, positions, change, message, no_layers):
    model, samples = model_of(positions), tiny.samples(3, img_size=SIZE)
    given = arguments(samples)
    if "cu_seqlens" in change:
        cu_seqlens = torch.tensor(change["cu_seqlens"], dtype=torch.int32)
        given["packed_seq_params"].cu_seqlens_q = cu_seqlens
        given["packed_seq_params"].cu_seqlens_kv = cu_seqlens
    else:
        given["num_image_tiles"] = torch.tensor(change["num_image_tiles"], dtype=torch.int)
    no_layers(model, like_a_gpu)
    with install(model) as handle:
        with pytest.raises(mp.PackingError, match=message):
            model(**given)
        assert like_a_gpu == ["queued", "read"]
        with pytest.raises(mp.PackingError, match=message):
            handle.check()


def test_a_compiled_language_model_that_misses_the_hook(like_a_gpu, monkeypatch):
    # torch.compile may not see hooks that are registered later: then the end of forward reads.
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    expected = model_of("rope")
    with install(expected), torch.no_grad():
        loss = expected(**given)[0]
    like_a_gpu.clear()
    with install(model), torch.no_grad():
        model.language_model._forward_pre_hooks.clear()
        if RELEASE.reads_boundaries:
            with pytest.raises((mp.PackingError, AttributeError, TypeError)):
                model(**given)
            return
        torch.testing.assert_close(model(**given)[0], loss)
        assert like_a_gpu == ["queued", "read"]
        given["packed_seq_params"].cu_seqlens_q = given["packed_seq_params"].cu_seqlens_kv.flip(0)
        given["packed_seq_params"].cu_seqlens_kv = given["packed_seq_params"].cu_seqlens_q
        with pytest.raises(mp.PackingError, match="cu_seqlens starts at"):
            model(**given)


def test_a_failing_forward_keeps_its_error(like_a_gpu):
    model, given = model_of(), arguments(tiny.samples(3, img_size=SIZE))
    given["packed_seq_params"].cu_seqlens_q = given["packed_seq_params"].cu_seqlens_kv.flip(0)

    def fail(module, args):
        raise Reached

    model.vision_projection.register_forward_pre_hook(fail)
    with install(model), pytest.raises(Reached):
        model(**given)


@pytest.mark.parametrize("positions", POSITIONS)
def test_text_waits_like_all_others(like_a_gpu, positions, no_layers, seen):
    # Whatever the caller says of the longest sequence, which may be stale.
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 30, 1)]
    model, given = model_of(positions), arguments(samples)
    calls = seen(model)
    no_layers(model, like_a_gpu)
    with install(model), torch.no_grad():
        for longest in (30, 22, 41):
            like_a_gpu.clear()
            given["packed_seq_params"].max_seqlen_q = longest
            model(**given)
            assert like_a_gpu == ["queued", "read", "layer"]
            assert calls[-1]["packed_seq_params"].max_seqlen_q == 30


def test_the_count_of_lost_tokens_is_read_with_the_status(like_a_gpu, no_layers):
    # A row that a data path filled up with pad tokens: one copy, one wait, and no loss.
    model = model_of("rope", max_sequence_length=128)
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (60, 40)]
    given = arguments(samples)
    for name, fill in (("input_ids", 0), ("labels", -100), ("loss_mask", 0), ("position_ids", 0)):
        given[name] = torch.nn.functional.pad(given[name], (0, 100), value=fill)
    no_layers(model, like_a_gpu)
    with install(model), torch.no_grad():
        loss, _ = model(**given)
        assert loss.shape == (1, 128)
        assert like_a_gpu == ["queued", "read", "layer"]
        like_a_gpu.clear()
        given["loss_mask"][:, 150:] = 1
        with pytest.raises(mp.PackingError, match="50 trained tokens do not fit the row of 128"):
            model(**given)
        assert like_a_gpu == ["queued", "read"]
