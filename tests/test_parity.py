"""The metric and the comparison: right on known numbers, and able to fail."""

import math

import pytest
import torch

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.testing import tiny

SIZE = 28


def test_token_mult_prob_error_by_hand():
    a = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    b = a + torch.tensor([[0.5, -0.25], [7.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    expected = (math.exp(0.5) + math.exp(0.25) + 1) / 3
    found = mp.token_mult_prob_error(a, b, mask)
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-6)
    assert mp.token_mult_prob_error(b, a, mask).item() == pytest.approx(expected, rel=1e-6)
    assert mp.token_mult_prob_error(a, a, mask).item() == pytest.approx(1, rel=1e-6)
    assert mp.token_mult_prob_error(a, b, torch.zeros_like(mask)).item() == 0
    nan = torch.tensor([[torch.nan, -2.0], [-3.0, -4.0]])
    assert mp.token_mult_prob_error(nan, b, mask).isnan()


@pytest.mark.usefixtures("megatron")
def test_compare_finds_the_place():
    model, samples = tiny.llava_model(img_size=SIZE), tiny.samples(3, img_size=SIZE)
    alone = parity.run_alone(model, samples)
    alone[1][0][20] += 0.25  # sequence 1, position 20
    alone[2][1][3] = 0  # a masked token does not count, whatever it differs by
    alone[2][0][3] += 9
    with mp.install(model):
        result = parity.compare(model, samples, alone)
    assert (result.sequence, result.position) == (1, 20)
    assert result.max_difference == pytest.approx(0.25, abs=1e-5)
    assert (result.num_samples, result.num_images) == (3, 4)
    assert result.num_expanded == sum(pair[0].numel() for pair in alone)
    assert "at sequence 1, position 20" in str(result)


@pytest.mark.usefixtures("megatron")
def test_compare_leaves_the_model_in_its_mode():
    model, samples = tiny.llava_model(img_size=SIZE), tiny.samples(1, img_size=SIZE)
    for mode in (True, False):
        model.train(mode)
        parity.compare(model, samples)
        assert model.training is mode


@pytest.mark.usefixtures("megatron")
def test_compare_counts_labels_lost_and_gained():
    model, samples = tiny.llava_model(img_size=SIZE), tiny.samples(3, img_size=SIZE)
    alone = parity.run_alone(model, samples)
    trained = alone[0][1].nonzero().squeeze(1)
    alone[0][1][trained[:3]] = 0
    with mp.install(model):
        result = parity.compare(model, samples, alone)
    assert (result.lost_labels, result.gained_labels) == (0, 3)
    assert str(result).endswith("0 labels lost, 3 gained")


@pytest.mark.usefixtures("megatron")
def test_nothing_trained_is_nothing_compared():
    model, samples = tiny.llava_model(img_size=SIZE), tiny.samples(2, img_size=SIZE)
    for sample in samples:
        sample["labels"] = torch.full_like(sample["input_ids"], -100)
    with mp.install(model), pytest.raises(mp.PackingError, match="nothing to compare"):
        parity.compare(model, samples)


@pytest.mark.usefixtures("megatron")
def test_compare_runs_one_by_one_where_missing_boundaries_are_an_error():
    model, samples = tiny.llava_model(img_size=SIZE), tiny.samples(3, img_size=SIZE)
    with mp.install(model, space="collapsed"):
        assert parity.compare(model, samples).max_difference < 1e-5
        with pytest.raises(mp.PackingError, match="got no packed_seq_params"):
            parity.forward(model, {**parity.collate(samples), "cu_seqlens": None})


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.arange(1)}, "sample 1: labels have 1 entries"),
        ({"num_image_tiles": [9]}, "sample 1: "),
        ({"input_ids": torch.empty(0, dtype=torch.int64)}, "sample 1: input_ids are empty"),
        (None, "samples is empty"),
    ],
)
def test_compare_refuses_malformed_samples(change, message):
    model, samples = tiny.llava_model(img_size=SIZE), tiny.samples(2, img_size=SIZE)
    samples = [] if change is None else [samples[0], samples[1] | change]
    with pytest.raises(mp.PackingError, match=message):
        parity.compare(model, samples)
