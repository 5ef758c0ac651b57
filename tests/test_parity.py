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


@pytest.mark.usefixtures("megatron")
def test_compare_has_a_verdict():
    model, samples = tiny.llava_model("rope", img_size=SIZE), tiny.samples(4, img_size=SIZE)
    with mp.install(model, space="collapsed"):
        found = parity.compare(model, samples, gradients=True)
        assert found.verdict == "right" and found.verdicts == ("right",) * 4, str(found)
        assert {error.part for error in found.gradients} == {
            "language_model", "vision_model", "vision_projection",
        }  # fmt: skip
        assert max(error.relative_difference for error in found.gradients) < 1e-6
        dropped = parity.compare(model, samples, boundaries=None, gradients=True)
        assert dropped.verdict == "wrong" and "WRONG: sequences 1, 2, 3" in str(dropped)
        assert all(error.verdict == "wrong" for error in dropped.gradients)
        one = parity.compare(model, samples[:1])
        assert one.verdict == "inconclusive" and "INCONCLUSIVE: sequences 0" in str(one)
        alone = parity.run_alone(model, samples)
        alone[0][1][alone[0][1].nonzero()[0]] = 0
        assert parity.compare(model, samples, alone).verdict == "wrong"  # a label gained


@pytest.mark.usefixtures("megatron")
def test_compare_refuses_unknown_words_and_models_that_are_split():
    model, samples = tiny.llava_model(img_size=SIZE), tiny.samples(2, img_size=SIZE)
    for word in ("expanded", "dropped", ""):
        with pytest.raises(mp.PackingError, match=r"boundaries is .*, expected 'collapsed'"):
            parity.compare(model, samples, boundaries=word)
    for name, value in (("context_parallel_lm", 2), ("post_process", False)):
        split = tiny.llava_model(img_size=SIZE)
        setattr(split, name, value)
        with pytest.raises(mp.PackingError, match=r"mp.parity.verify\(model, row\) runs on the"):
            parity.compare(split, samples)
    split = tiny.llava_model(img_size=SIZE)
    split.sequence_parallel_lm, split.tensor_model_parallel_size_lm = True, 2
    with pytest.raises(mp.PackingError, match="without context or sequence parallelism"):
        parity.compare(split, samples)


@pytest.mark.usefixtures("megatron")
def test_the_placeholder_is_the_models():
    samples, others = (tiny.samples(3, img_size=SIZE) for _ in range(2))
    for sample in (*samples, *others):
        sample["input_ids"][sample["input_ids"] == 7] = 8
    for sample in others:
        sample["input_ids"][sample["input_ids"] == tiny.IMAGE_TOKEN_ID] = 7
    with pytest.raises(mp.PlaceholderMismatch, match="0 placeholders"):
        parity.collate(others)
    assert 7 not in parity.collate(others, 7)["labels"]
    found = []
    for image, of_model in ((tiny.IMAGE_TOKEN_ID, samples), (7, others)):
        model = tiny.llava_model("rope", img_size=SIZE, image_token_index=image)
        with mp.install(model, space="collapsed"):
            found.append(parity.compare(model, of_model))
    assert [result.verdict for result in found] == ["right", "right"]
    assert torch.equal(*(result.compared for result in found))
