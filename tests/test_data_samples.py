"""Samples as data sets have them: masks, labels, forms; what trains, and what is refused by
name."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import mcore_packing as mp

IMAGE = -200
SPEC = mp.RowSpec(img_seq_len=4)


def image(*tokens: int, **others) -> dict:
    """A sample with a tile for every placeholder."""
    ids = torch.tensor(tokens, dtype=torch.int64)
    count = int((ids == IMAGE).sum())
    return {"input_ids": ids, "images": torch.zeros(count, 3, 2, 2), **others}


def pack(*samples, **options):
    return mp.data.pack(list(samples), SPEC, 64, **options)


def only_reason(*samples, **options) -> str:
    _, report = pack(*samples, **options)
    (refused,) = report.refused
    return refused.reason


# Padding


@given(
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    tokens=st.lists(st.sampled_from([IMAGE, 5, 6, 7]), min_size=1, max_size=9),
    kind=st.sampled_from([torch.int64, torch.bool, torch.float32, list]),
)
def test_padding_at_either_end_is_no_sample(left, right, tokens, kind):
    """The row is that of the sample without padding, and split gives that sample."""
    whole = image(*tokens)
    whole["labels"] = whole["input_ids"].clone()
    pad = torch.nn.functional.pad
    padded = {
        **whole,
        **{name: pad(whole[name], (left, right)) for name in ("input_ids", "labels")},
    }
    mask = [0] * left + [1] * len(tokens) + [0] * right
    padded["attention_mask"] = mask if kind is list else torch.tensor(mask).to(kind)
    (row,), _ = pack(padded)
    (expected,), _ = pack(whole)
    for name in ("input_ids", "labels", "loss_mask"):
        assert torch.equal(getattr(row, name), getattr(expected, name))
    assert torch.equal(row.layout.to_tensor(), expected.layout.to_tensor())
    (found,) = mp.data.split(row)
    assert torch.equal(found["input_ids"], whole["input_ids"])
    assert torch.equal(found["labels"], whole["labels"])
    ones = [1] * len(tokens)
    assert (
        found["attention_mask"] == ones if kind is list else found["attention_mask"].dtype == kind
    )
    assert [int(value) for value in found["attention_mask"]] == ones


@pytest.mark.parametrize(
    "mask, reason",
    [
        ([1, 0, 1], "attention_mask is 0 at token 1, between tokens"),
        ([1, 1, 0, 1], "attention_mask is 0 at token 2, between tokens"),
        ([0, 0, 0], "attention_mask is 0 everywhere"),
        ([1, 1], "attention_mask: found torch.int64 [2], expected [3] like input_ids"),
        ([[1, 1, 1]], "attention_mask: found torch.int64 [1, 3]"),
    ],
)
def test_a_mask_that_is_no_padding_is_refused(mask, reason):
    tokens = (5, 6, 7, 8) if len(mask) == 4 else (5, 6, 7)
    for said in (mask, torch.tensor(mask)):
        assert reason in only_reason(image(*tokens, attention_mask=said))


# Placeholders


@pytest.mark.parametrize(
    "sample, advice",
    [
        (
            {"input_ids": torch.tensor([5, IMAGE, 6]), "images": torch.zeros(3, 3, 2, 2)},
            "1 placeholders (id -200) but 3 images; num_image_tiles is not given, so that each of "
            "the 3 tiles counts as an image: give it, how many tiles each image has",
        ),
        (
            {
                "input_ids": torch.tensor([5, IMAGE, 6]),
                "images": torch.zeros(3, 3, 2, 2),
                "num_image_tiles": [1, 1, 1],
            },
            "1 placeholders (id -200) but 3 images; give every image one placeholder",
        ),
        (
            {"input_ids": torch.tensor([5, -201, 6, -201]), "images": torch.zeros(2, 3, 2, 2)},
            "no token has the id -200 of spec.image_token_id, but 2 have -201 (the first is token "
            "1). Give every image one of that id, or say yours: mp.RowSpec(image_token_id=...)",
        ),
        (
            {"input_ids": torch.tensor([5, 151655, 6]), "images": torch.zeros(1, 3, 2, 2)},
            "but 1 have 151655, the placeholder of ",
        ),
        (
            {"input_ids": torch.tensor([5, *[151655] * 4]), "images": torch.zeros(1, 3, 2, 2)},
            "but 4 have 151655, the placeholder of ",
        ),
        (
            {"input_ids": torch.tensor([5, 151655, 6]), "images": torch.zeros(2, 3, 2, 2)},
            "no token has the id -200 of spec.image_token_id. Give",
        ),
        (
            {"input_ids": torch.tensor([5, *[IMAGE] * 4]), "images": torch.zeros(1, 3, 2, 2)},
            "so these ids are expanded already, but this model expands them itself",
        ),
        (
            {"input_ids": torch.tensor([5, IMAGE, 6])},
            "1 placeholders (id -200) but 0 images; give their images, or take the placeholders",
        ),
    ],
    ids=["tiles", "said", "other-id", "family", "expanded-family", "chance", "expanded", "none"],
)
def test_what_is_wrong_with_placeholders_is_said(sample, advice):
    """All were told to give every image one placeholder, which most of these have."""
    _, report = pack(sample)
    assert report.causes == {"PlaceholderMismatch": 1}
    assert advice in report.refused[0].reason


# What trains


@given(
    st.lists(
        st.lists(st.sampled_from([IMAGE, 5, 6, 7]), min_size=1, max_size=8), min_size=1, max_size=5
    ),
    st.booleans(),
)
def test_what_is_counted_is_what_the_model_trains(structure, with_labels):
    """By the mask that an expanding model makes of it: ``expand_labels``."""
    samples = [image(*tokens) for tokens in structure]
    if with_labels:
        for sample in samples:
            sample["labels"] = sample["input_ids"].masked_fill(sample["input_ids"] == 6, -100)
    rows, report = pack(*samples)
    assert not report.refused
    for row in rows:
        labels, mask = mp.expand_labels(row.layout, row.labels, row.loss_mask)
        assert row.num_trained == int(row.loss_mask.sum()) == int(mask.sum())
        assert (labels[mask > 0] >= 0).all()
        _, everything = mp.expand_labels(row.layout, row.labels, torch.ones(row.labels.shape))
        assert row.num_trained == int(everything[labels != -100].sum())
    untrained = [index for index, _ in report.untrained]
    by_one = [pack(sample)[0][0].num_trained for sample in samples]
    assert untrained == [index for index, count in enumerate(by_one) if not count]


def test_a_label_that_is_the_placeholder_is_refused():
    """At a text token: Megatron's loss would read beyond the vocabulary, in silence."""
    bad = image(5, IMAGE, 6, 7, labels=torch.tensor([-100, IMAGE, IMAGE, 7]))
    reason = only_reason(bad)
    assert "label 2 is -200, the placeholder of an image, at a token that is none" in reason
    good = image(5, IMAGE, 6, 7, labels=torch.tensor([-100, IMAGE, 6, 7]))
    assert not pack(good)[1].refused


def test_samples_without_a_trained_token_are_named_or_refused():
    nothing = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, -100])}
    samples = [image(5, 6), {**nothing, "__key__": "a"}, image(7)]  # one token trains nothing
    _, report = pack(*samples)
    assert report.num_untrained == 2 and report.untrained == ((1, "a"), (2, None))
    assert "without a trained token 2: sample 1 (a), sample 2" in str(report)
    assert (report + report).untrained[2:] == ((4, "a"), (5, None))
    _, report = pack(*samples, refuse_untrained=True)
    assert report.causes == {"UntrainedSample": 2} and report.num_untrained == 0


def test_position_ids_are_for_models_that_take_them():
    sample = image(5, IMAGE, 6, position_ids=torch.zeros(3, 3, dtype=torch.int64))
    assert "has position_ids, but this model expands images" in only_reason(sample)


# Forms


def test_the_commonest_form_of_images_wins():
    """Not the first: one grayscale image in front would refuse all others."""
    samples = [image(5, IMAGE, 6) for _ in range(50)]
    samples[0]["images"] = torch.zeros(1, 1, 2, 2)
    samples[7]["images"] = torch.zeros(1, 3, 2, 2, dtype=torch.float16)
    _, report = mp.data.pack(samples, SPEC)
    assert [refused.index for refused in report.refused] == [0, 7]
    assert "images are torch.float32 [1, 2, 2] each, but rows hold those of one kind" in str(report)
    assert report.num_real == 48 * 6
    _, report = mp.data.pack(samples, SPEC, forms={"images": (torch.float32, (1, 2, 2))})
    assert len(report.refused) == 49 and report.refused[0].index == 1


def test_tiles_of_another_size_that_are_none_harm_nothing():
    samples = [image(5, IMAGE, 6), image(5, 6)]
    samples[1]["images"] = torch.empty(0, 3, 9, 9, dtype=torch.float16)
    rows, report = pack(*samples)
    assert len(rows) == 1 and not report.refused and rows[0].images.shape == (1, 3, 2, 2)
    found = dict(zip(rows[0].indices, mp.data.split(rows[0]), strict=True))[1]["images"]
    assert found.shape == (0, 3, 9, 9) and found.dtype == torch.float16


def test_join_says_what_it_cannot_join():
    packer = mp.data.get_packer("first_fit", SPEC, 64)
    with pytest.raises(mp.PackingError, match="no samples to join"):
        packer.join([])
    other = image(5, IMAGE, images=torch.zeros(1, 3, 4, 4))
    with pytest.raises(mp.PackingError, match="rows hold those of one kind"):
        packer.join([image(5, IMAGE), other])
    half = image(5, IMAGE, images=torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16))
    with pytest.raises(mp.PackingError, match=r"images are torch\.bfloat16"):
        packer.join([image(5, IMAGE), half])


@pytest.mark.parametrize("forms", [3, {"images": 3}, {"images": ("float32", (3,))}])
def test_forms_are_a_dtype_and_a_shape(forms):
    with pytest.raises(mp.PackingError, match=r"forms is .*shape of an entry"):
        mp.data.get_packer("first_fit", SPEC, 64, forms=forms)
