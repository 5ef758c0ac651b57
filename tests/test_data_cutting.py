"""Samples that are too long: cut at their ends, never inside an image, and counted."""

import logging
from itertools import accumulate

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

import mcore_packing as mp

IMAGE, TILE = -200, 4
SPEC = mp.RowSpec(img_seq_len=TILE)
COLUMNS = {"advantages": mp.data.Column(0.0, shifted=True), "step": -1}


def make_sample(structure: list[int], kind=torch.tensor, labels=True, padding=(0, 0)) -> dict:
    """A sample from its structure: 0 is text, k an image of k tiles. ``kind`` makes its counts."""
    ids = torch.tensor([IMAGE if k else 100 + at for at, k in enumerate(structure)])
    tiles = [k for k in structure if k]
    pixels = torch.arange(3.0 * sum(tiles)).reshape(-1, 3, 1, 1)
    sample = {
        "input_ids": ids, "images": pixels, "num_image_tiles": kind(tiles), "__key__": "k",
        "tokens_per_image": kind([TILE * k for k in tiles]), "step": torch.arange(len(ids)),
        "advantages": torch.arange(len(ids)) / 2, "note": "as it was",
    }  # fmt: skip
    if labels:
        sample["labels"] = torch.where(ids % 3 == 0, -100, ids)
    if any(padding):
        for name in ("input_ids", "labels", "step", "advantages"):
            if name in sample:
                sample[name] = torch.nn.functional.pad(sample[name], padding, value=7)
        mask = [0] * padding[0] + [1] * len(ids) + [0] * padding[1]
        sample["attention_mask"] = kind(mask)
    return sample


def cut_by_hand(structure: list[int], room: int, **options) -> dict | None:
    """What is left, in plain Python: tokens while they fit."""
    ends = accumulate(k * TILE or 1 for k in structure)
    left = [k for k, end in zip(structure, ends, strict=True) if end <= room]
    return make_sample(left, **options) if left else None


def same(a: dict, b: dict) -> bool:
    def equal(x, y):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def without_images(sample: dict, whole: dict) -> dict:
    """Of the sample by hand, what a cut says where it took every image."""
    gone = dict.fromkeys(("images", "num_image_tiles", "tokens_per_image"))
    return sample | (gone if len(whole["images"]) and not len(sample["images"]) else {})


@settings(max_examples=100)
@given(
    structures=st.lists(
        st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=9), min_size=1, max_size=5
    ),
    room=st.integers(1, 20),
    multiple=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from([torch.tensor, list]),
    labels=st.booleans(),
    padding=st.sampled_from([(0, 0), (2, 1)]),
)
@example([[0, 1, 1, 0]], 9, 1, list, True, (0, 0))  # images that adjoin
def test_a_row_has_what_is_left_of_its_samples(structures, room, multiple, kind, labels, padding):
    """Tokens, labels, columns, images and all their counts; the report has the rest."""
    spec = mp.RowSpec(img_seq_len=TILE, seq_multiple=multiple)
    capacity = -(-room // multiple) * multiple
    options = {"kind": kind, "labels": labels, "padding": padding}
    samples = [make_sample(structure, **options) for structure in structures]
    given_options = {"columns": COLUMNS, "on_too_long": "truncate"}
    rows, report = mp.data.pack(samples, spec, capacity, **given_options)
    expected = {
        index: cut_by_hand(structure, capacity, kind=kind, labels=labels)
        for index, structure in enumerate(structures)
    }
    assert {one.index for one in report.refused} == {i for i, one in expected.items() if not one}
    assert all(one.cause == "SampleTooLong" for one in report.refused)
    lost = {one.index: one for one in report.truncated}
    for row in rows:
        assert row.layout.num_expanded <= capacity
        for index, found in zip(row.indices, mp.data.split(row), strict=True):
            wanted, whole = expected[index], samples[index]
            is_cut = len(wanted["input_ids"]) < len(structures[index])
            assert is_cut == (index in lost)
            mask = found.pop("attention_mask", None)
            assert mask is None or [*map(int, mask)] == [1] * len(wanted["input_ids"])
            assert same(found, without_images(wanted, whole))
            if is_cut:
                alone = [mp.data.pack([one], spec, columns=COLUMNS)[0][0] for one in (whole, found)]
                trained = alone[0].num_trained - alone[1].num_trained
                tokens = len(structures[index]) - len(wanted["input_ids"])
                images = len(whole["num_image_tiles"]) - len(wanted["num_image_tiles"])
                one = lost[index]
                assert (one.tokens, one.trained, one.images) == (tokens, trained, images)
                assert one.key == "k"


def test_the_advice_for_a_long_sample_works():
    sample = make_sample([0, 2, 0, 1, 0, 0])
    with pytest.raises(mp.data.SampleTooLong) as refused:
        mp.data.pack([sample], SPEC, 10, columns=COLUMNS, on_refused="raise")
    assert str(refused.value) == (
        "sample 0 (k): 16 positions, but a row has room for 10; have it cut "
        "(on_too_long='truncate', or mp.media.truncate(space='collapsed') before), or raise the "
        "capacity"
    )
    for options in ({"on_too_long": "truncate"}, {"capacity": 16}):
        rows, _ = mp.data.pack([sample], SPEC, **{"capacity": 10, "columns": COLUMNS, **options})
        assert len(rows) == 1
    how = mp.media.truncate(sample["input_ids"], [8, 4], 10, IMAGE, space="collapsed")
    images = how.apply(sample["images"], per="image", rows=[2, 1])
    cut = {"input_ids": how.output_ids, "images": images, "num_image_tiles": [2]}
    (row,), _ = mp.data.pack([cut], SPEC, 10)
    assert row.input_ids.tolist() == [[100, IMAGE, 102]]
    spec = mp.RowSpec(img_seq_len=TILE, max_length=10)
    with pytest.raises(mp.data.SampleTooLong, match=r"before\)$"):  # there is no larger capacity
        mp.data.get_packer("fullest", spec, columns=COLUMNS).num_positions(sample)
    with pytest.raises(mp.PackingError, match="on_too_long is 'cut', expected 'refuse' or"):
        mp.data.get_packer("fullest", spec, on_too_long="cut")


def test_what_is_cut_is_counted_and_logged(caplog):
    structures = [0, 0, 0, 2, 0, 1, 0, 0], [0, 0], [2, 0]
    samples = [make_sample(structure, labels=False) for structure in structures]
    packer = mp.data.get_packer("fullest", SPEC, 7, columns=COLUMNS, on_too_long="truncate")
    with caplog.at_level(logging.WARNING):
        rows, report = packer.pack(samples)
    assert report.cut_off == {"samples": 1, "tokens": 5, "trained": 1, "images": 2}
    said = "cut to fit 1, by 5 tokens (1 trained) and 2 images: sample 0 (k)"
    assert said in str(report) and caplog.messages == [f"{said} (on_too_long='truncate')"]
    (refused,) = report.refused
    assert "room for 7, and no cut leaves anything: its first image alone does" in refused.reason
    both = report + report
    assert [one.index for one in both.truncated] == [0, 3] and both.cut_off["tokens"] == 10
    assert both.to_dict()["cut_off"]["images"] == 4
    assert both.to_dict()["truncated"][1] == {
        "index": 3, "key": "k", "tokens": 5, "trained": 1, "images": 2
    }  # fmt: skip
    assert packer.num_positions(samples[0]) == 3
    again = packer.join([samples[index] for index in rows[0].indices])
    assert again.input_ids.tolist() == rows[0].input_ids.tolist()


def test_what_is_wrong_with_a_long_sample_is_still_said():
    """A cut would hide that there are too few images."""
    sample = make_sample([0, 0, 0, 1, 1])
    sample["images"], sample["num_image_tiles"] = sample["images"][:1], torch.tensor([1])
    sample["tokens_per_image"] = None
    strange = make_sample([1, 0, 0])
    strange["images"] = torch.zeros(1, 1, 1, 1)
    samples = [sample, make_sample([1, 0]), make_sample([1, 0]), strange]
    _, report = mp.data.pack(samples, SPEC, 5, columns=COLUMNS, on_too_long="truncate")
    assert [one.cause for one in report.refused] == ["PlaceholderMismatch", "PackingError"]
    assert "[1, 1, 1] each, but rows hold" in report.refused[1].reason
    assert not report.truncated  # the strange one was cut, but is in no row
    untrained = make_sample([0, 0, 0, 0])
    untrained["labels"] = torch.tensor([-100, -100, -100, 103])
    options = {"on_too_long": "truncate", "refuse_untrained": True, "columns": COLUMNS}
    _, report = mp.data.pack([untrained, make_sample([0, 0])], SPEC, 3, **options)
    assert report.causes == {"UntrainedSample": 1} and not report.truncated


# Plain models, whose processor expanded the images


FAMILY = mp.media.get_family("qwen2_5_vl")
PLAIN = mp.RowSpec(image_token_id=FAMILY.image_token_id, expands=False, pad_token_id=0)


def qwen_sample(*sizes: int, positions=True) -> dict:
    """Text before, between and behind images of so many positions, with M-RoPE's positions."""
    ids, at, axes = [50, 51], 2, [[0, 0, 0], [1, 1, 1]]
    for number, size in enumerate(sizes):
        ids += [FAMILY.vision_start_id, *[FAMILY.image_token_id] * size, FAMILY.vision_end_id]
        axes += [[at] * 3] + [[at + 1, at + 1, at + 1 + w] for w in range(size)]
        axes += [[at + 1 + size] * 3]
        ids, at = [*ids, 60 + number], at + size + 3
        axes += [[at - 1] * 3]
    patches = [4 * size for size in sizes]
    sample = {
        "input_ids": torch.tensor(ids),
        "pixel_values": torch.arange(1.0 * sum(patches))[:, None].expand(-1, 6),
        "image_grid_thw": torch.tensor([[1, 2, 2 * size] for size in sizes]),
        "mm_token_type_ids": (torch.tensor(ids) == FAMILY.image_token_id).int(),
    }
    if positions:
        sample["position_ids"] = torch.tensor(axes).T.contiguous()
    return sample


def test_a_sample_of_qwen_is_cut_with_its_grids_and_positions():
    sample = qwen_sample(3, 2, 4)
    options = {"family": "qwen2_5_vl", "on_too_long": "truncate"}
    for room in range(2, 23):
        (row,), report = mp.data.pack([sample], PLAIN, room, **options)
        (found,) = mp.data.split(row)
        how = mp.media.truncate(sample["input_ids"], [3, 2, 4], room, family="qwen2_5_vl")
        kept = len(how.kept_images)
        assert found["input_ids"].tolist() == how.output_ids.tolist() and len(row.input_ids) <= room
        assert (
            found["position_ids"].tolist() == sample["position_ids"][:, how.keep_positions].tolist()
        )
        assert (
            found["mm_token_type_ids"].tolist() == how.apply(sample["mm_token_type_ids"]).tolist()
        )
        patches = np.cumsum([0, 12, 8, 16])[kept]
        if kept:
            assert found["image_grid_thw"].tolist() == sample["image_grid_thw"][:kept].tolist()
            assert torch.equal(found["pixel_values"], sample["pixel_values"][:patches])
        else:
            assert found["image_grid_thw"] is found["pixel_values"] is None
        assert report.cut_off["images"] == 3 - kept == len(how.dropped_images)
        assert report.cut_off["tokens"] == len(sample["input_ids"]) - len(found["input_ids"])


def test_where_nobody_knows_an_images_positions_nothing_is_cut():
    """Its error says what works."""
    family = mp.media.get_family("gemma3")
    ids = torch.tensor([2, *[family.image_token_id] * 3, 9, 9])
    sample = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 2, 2)}
    spec = mp.RowSpec(image_token_id=family.image_token_id, expands=False)
    options = {"family": "gemma3", "on_too_long": "truncate"}
    _, report = mp.data.pack([sample], spec, 5, **options)
    reason = report.refused[0].reason
    assert "it is not cut: how many positions each of its images has is not known" in reason
    assert "mp.media.truncate and its family" in reason
    sample["tokens_per_image"] = [3]
    (row,), report = mp.data.pack([sample], spec, 5, **options)
    assert row.input_ids.tolist() == [ids[:5].tolist()] and not report.refused
    video = qwen_sample(2) | {
        "pixel_values_videos": torch.zeros(8, 6), "video_grid_thw": torch.tensor([[1, 2, 4]])
    }  # fmt: skip
    video["input_ids"] = torch.cat([video["input_ids"], torch.tensor([FAMILY.video_token_id] * 2)])
    del video["position_ids"], video["mm_token_type_ids"]
    _, report = mp.data.pack([video], PLAIN, 7, family="qwen2_5_vl", on_too_long="truncate")
    assert "which entries of pixel_values_videos are of which" in report.refused[0].reason


def test_text_is_cut_without_a_family():
    sample = {"input_ids": torch.arange(1, 9), "position_ids": torch.arange(8)}
    for spec in (mp.RowSpec(expands=False), mp.RowSpec()):
        sample = {"input_ids": torch.arange(1, 9)}
        (row,), report = mp.data.pack([sample], spec, 5, on_too_long="truncate")
        assert row.input_ids.tolist() == [[1, 2, 3, 4, 5]] and report.cut_off["trained"] == 3
