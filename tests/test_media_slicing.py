"""Slicing: known cases, every kind of row, and splitting as the inverse of concatenating."""

import json
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_packing import PackingError
from mcore_packing.media import FAMILIES, get_family, split_samples, take_samples

from .laws import examples

CASES = json.loads(Path(__file__).with_name("media_cases").joinpath("slicing.json").read_text())
CASES = CASES["cases"]
# The names that cases give to families that are registered under another.
FAMILY_OF_CASE = {"llava": "llava15", "gemma3": "gemma3_pan_and_scan"}
LAW = examples(500)

KINDS = {
    "list": lambda rows: list(range(rows)),
    "tensor": lambda rows: torch.arange(rows),
    "tensor-2d": lambda rows: torch.arange(rows)[:, None].repeat(1, 3),
    "array": lambda rows: np.arange(rows),
}


def as_rows(value):
    """The rows of a tensor by their names."""
    value = value[:, 0] if getattr(value, "ndim", 1) == 2 else value
    return value.tolist() if hasattr(value, "tolist") else list(value)


def make_batch(case, kind="list"):
    """Tensors whose row r is called r; grids are what they are."""
    inputs = case["input"]
    batch = {key: KINDS[kind](rows) for key, rows in inputs["dim0"].items()}
    if "image_grid_thw" in inputs:
        batch["image_grid_thw"] = torch.tensor(inputs["image_grid_thw"])
    return batch


def slice_by_sample(batch, chunks):
    """Once released code: every tensor indexed by samples."""
    return [{key: value[start:stop] for key, value in batch.items()} for start, stop in chunks]


def concatenate(parts):
    """What ``split_samples`` undoes."""
    whole = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = value if key not in whole else torch.cat([whole[key], value])
    return whole


@st.composite
def batches(draw):
    """A batch of any mixture of images and videos, and what each of its tensors counts."""
    num_samples = draw(st.integers(1, 6))
    counts = st.lists(st.integers(0, 3), min_size=num_samples, max_size=num_samples)
    images, videos = draw(counts), draw(counts)
    grids = st.lists(st.integers(1, 3), min_size=3, max_size=3)
    grid = draw(st.lists(grids, min_size=sum(images), max_size=sum(images)))
    video_grid = draw(st.lists(grids, min_size=sum(videos), max_size=sum(videos)))
    tiles = [product(row[:2]) for row in grid]
    frames = [row[0] for row in video_grid]
    rows = {
        "sample": num_samples,
        "nonempty_sample": sum(n > 0 for n in images),
        "image": sum(images),
        "patch": sum(map(product, grid)),
        "tile": sum(tiles),
        "video": sum(videos),
        "video_patch": sum(map(product, video_grid)),
        "video_frame": sum(frames),
    }
    batch = {word: torch.arange(count) for word, count in rows.items()}
    layout = {word: word for word in rows}
    batch["image_grid_thw"] = torch.tensor(grid, dtype=torch.int64).reshape(-1, 3)
    batch["video_grid_thw"] = torch.tensor(video_grid, dtype=torch.int64).reshape(-1, 3)
    layout |= {"image_grid_thw": "image", "video_grid_thw": "video"}
    given = {"tiles_per_image": tiles, "num_videos": videos, "frames_per_video": frames}
    return batch, layout, images, given


def product(numbers):
    return int(np.prod(numbers, dtype=int))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_cases(case, kind):
    inputs, batch = case["input"], make_batch(case, kind)
    batch["num_images"] = inputs["num_images"]
    layout = {**inputs["layout"], "num_images": "sample"}
    given = {"tiles_per_image": inputs["tiles_per_image"]} if "tiles_per_image" in inputs else {}
    if "sample_order" in inputs:
        order = inputs["sample_order"]
        found = [take_samples(batch, layout, inputs["num_images"], order, **given)]
    else:
        found = split_samples(batch, layout, inputs["num_images"], inputs["chunks"], **given)
    assert len(found) == len(case["expect"])
    for part, expect in zip(found, case["expect"], strict=True):
        assert part.pop("num_images") == expect["num_images"]
        assert set(part) == {key for key, rows in expect["rows"].items() if rows}
        for key, value in part.items():
            assert type(value) is type(batch[key])
            rows = expect["rows"][key]
            if key == "image_grid_thw":
                assert value.tolist() == batch[key][rows].tolist()
            else:
                assert as_rows(value) == rows, key


def test_no_case_is_missing():
    assert len(CASES) == 11


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_registered_layout_is_that_of_the_case(case):
    family = FAMILY_OF_CASE.get(case["family"], case["family"])
    for key, word in case["input"]["layout"].items():
        assert get_family(family).layout[key] == word


def test_slicing_by_samples_is_wrong():
    """On every case where images and samples differ in number, it gives other rows."""
    wrong = []
    for case in CASES:
        if "chunks" not in case["input"]:
            continue
        found = slice_by_sample(make_batch(case), case["input"]["chunks"])
        for part, expect in zip(found, case["expect"], strict=True):
            rows = {key: as_rows(value) for key, value in part.items() if key != "image_grid_thw"}
            if rows != {key: expect["rows"][key] for key in rows}:
                wrong.append(case["name"])
    assert {"gemma4_mixed_counts", "llava15_image_indexed", "qwen_patch_rows"} <= set(wrong)
    assert "idefics3_heuristic_trap" not in wrong  # there it happens to be right


@LAW
@given(batches(), st.data())
def test_concatenating_the_parts_gives_the_batch(made, data):
    batch, layout, images, given = made
    cuts = data.draw(st.lists(st.integers(0, len(images)), max_size=4).map(sorted))
    chunks = list(pairwise([0, *cuts, len(images)]))
    parts = split_samples(batch, layout, images, chunks, **given)
    whole = concatenate(parts)
    for key, value in batch.items():
        if len(value):
            assert torch.equal(whole[key], value), key
        else:
            assert all(key not in part for part in parts)
    for (start, stop), part in zip(chunks, parts, strict=True):
        assert len(part["sample"]) == stop - start
        assert ("image" in part) == any(images[start:stop])
        assert all(len(value) for key, value in part.items() if key != "sample")


@LAW
@given(batches(), st.data())
def test_every_sample_takes_its_own_rows(made, data):
    """Any gather is the concatenation of its samples, one by one."""
    batch, layout, images, given = made
    order = data.draw(st.lists(st.integers(0, len(images) - 1), max_size=8))
    taken = take_samples(batch, layout, images, order, **given)
    alone = split_samples(batch, layout, images, 1, **given)
    expected = concatenate([alone[sample] for sample in order])
    assert set(taken) - {"sample"} == set(expected) - {"sample"}
    for key, value in expected.items():
        assert torch.equal(taken[key], value), key
    same = take_samples(batch, layout, images, range(len(images)), **given)
    for key, value in same.items():
        assert torch.equal(value, batch[key]) and value.data_ptr() == batch[key].data_ptr()


@LAW
@given(batches(), st.data())
def test_every_first_dimension_is_checked(made, data):
    batch, layout, images, given = made
    key = data.draw(st.sampled_from([key for key in batch if not key.endswith("grid_thw")]))
    more = data.draw(st.sampled_from([-1, 1]))
    if len(batch[key]) + more < 0:
        return
    message = f"^{key} has {len(batch[key]) + more} entries .* {len(batch[key])} of what it counts"
    broken = {**batch, key: torch.arange(len(batch[key]) + more)}
    with pytest.raises(ValueError, match=message):
        split_samples(broken, layout, images, [], **given)
    with pytest.raises(ValueError, match=message):
        take_samples(broken, layout, images, [], **given)


def test_chunks_of_one_size_and_a_short_last_one():
    batch = {"input_ids": list(range(5)), "pixel_values": list("abcd")}
    layout = {"input_ids": "sample", "pixel_values": "image"}
    parts = split_samples(batch, layout, [1, 0, 2, 0, 1], 2)
    assert [part["input_ids"] for part in parts] == [[0, 1], [2, 3], [4]]
    assert split_samples(batch, layout, [1, 0, 2, 0, 1], torch.tensor(2)) == parts
    assert [part["pixel_values"] for part in parts] == [["a"], ["b", "c"], ["d"]]
    assert split_samples(batch, layout, [1, 0, 2, 0, 1], [(2, 2)]) == [{"input_ids": []}]


def test_a_range_is_a_chunk():
    """Its two entries are not its start and stop."""
    batch = {"input_ids": [0, 1, 2, 3, 4]}
    parts = split_samples(batch, "llava15", [0] * 5, [range(0, 2), range(2, 5), range(3, 3)])
    assert [part["input_ids"] for part in parts] == [[0, 1], [2, 3, 4], []]
    with pytest.raises(PackingError, match=r"chunks\[0\] is range\(0, 4, 2\)"):
        split_samples(batch, "llava15", [0] * 5, [range(0, 4, 2)])


def test_only_videos():
    """``num_images`` is None, grids come from the batch, and text samples have no videos."""
    batch = {
        "input_ids": torch.arange(3),
        "video_grid_thw": torch.tensor([[2, 1, 2], [1, 1, 3]]),
        "pixel_values_videos": torch.arange(7),
    }
    first, second = split_samples(batch, "qwen2_5_vl", None, [(0, 2), (2, 3)], num_videos=[1, 0, 1])
    assert first["pixel_values_videos"].tolist() == [0, 1, 2, 3]
    assert second["pixel_values_videos"].tolist() == [4, 5, 6]
    assert second["video_grid_thw"].tolist() == [[1, 1, 3]]
    frames = {"input_ids": [0, 1], "pixel_values_videos": list(range(5))}
    frames["num_frames_per_video"] = [2, 3]
    parts = split_samples(frames, "gemma4", None, 1, num_videos=[1, 1], frames_per_video=[2, 3])
    assert [part["pixel_values_videos"] for part in parts] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("kind", [list, torch.stack, lambda v: np.stack([x.numpy() for x in v])])
def test_videos_or_frames_as_the_dimensions_say(kind):
    """Nemotron's are frames [3, H, W] before transformers 5.24.0, then videos [T, 6, H, W]."""
    family, batch = get_family("nemotron_omni"), {"input_ids": [0, 1]}
    frames = kind([torch.full((3, 4, 4), i) for i in range(5)])
    given = {"num_videos": [1, 1], "frames_per_video": [2, 3]}
    first, second = split_samples(
        {**batch, "pixel_values_videos": frames}, family, None, 1, **given
    )
    assert [int(frame[0, 0, 0]) for frame in first["pixel_values_videos"]] == [0, 1]
    assert [int(frame[0, 0, 0]) for frame in second["pixel_values_videos"]] == [2, 3, 4]
    videos = kind([torch.full((2, 6, 4, 4), i) for i in range(3)])
    for given in ({}, {"frames_per_video": [4, 4, 4]}):  # which are not needed then
        found = take_samples(
            {**batch, "pixel_values_videos": videos},
            family,
            None,
            [1, 0],
            num_videos=[1, 2],
            **given,
        )
        assert [int(video[0, 0, 0, 0]) for video in found["pixel_values_videos"]] == [1, 2, 0]
    for values in (
        [1, 2],
        [videos[0], frames[0]],
        torch.zeros(2, 8),
        torch.zeros(2, 1, 1, 3, 4, 4),
    ):
        with pytest.raises(PackingError, match=r"pixel_values_videos has entries of .* dimensions"):
            split_samples({"pixel_values_videos": values}, family, None, 1, num_videos=[2])
    for empty in ([], torch.zeros(0)):
        none = {**batch, "pixel_values_videos": empty}
        assert split_samples(none, family, [0, 0], 2) == [batch]


def test_a_batch_without_images_needs_no_grids():
    batch = {"input_ids": [[1], [2]], "pixel_values": None, "image_grid_thw": None}
    assert split_samples(batch, "qwen2_vl", [0, 0], [(0, 1)]) == [{"input_ids": [[1]]}]
    no_rows = {"input_ids": [[1], [2]], "pixel_values": torch.zeros(0, 8)}
    assert split_samples(no_rows, "qwen2_vl", [0, 0], [(0, 1)]) == [{"input_ids": [[1]]}]


def test_parts_are_views():
    batch = {"input_ids": torch.zeros(2, 3), "pixel_values": torch.zeros(3, 4)}
    part = split_samples(batch, "llava15", [1, 2], [(1, 2)])[0]
    part["pixel_values"] += 1
    assert batch["pixel_values"].sum(1).tolist() == [0, 4, 4]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layout": {"input_ids": "sample"}}, "pixel_values is not in the layout"),
        ({"layout": {"input_ids": "sample", "pixel_values": "images"}}, "laid out by 'images'"),
        ({"layout": None}, "layout is a NoneType"),
        ({"family": "llama4"}, "family is given beside layout"),
        ({"layout": "qwen9_vl"}, "not registered"),
        ({"num_images": [1, 1]}, "input_ids has 3 entries .* 2 of what it counts"),
        ({"num_images": [1, -1, 2]}, r"num_images\[1\] is -1"),
        ({"num_images": [1, 1, 2]}, "pixel_values has 3 entries .* 4 of what it counts"),
        ({"num_images": None}, "num_images is None"),
        ({"num_images": None, "num_videos": [0, 0, 0]}, "pixel_values has 3 entries .* 0 of what"),
        ({"num_videos": [0]}, "num_images has 3 entries and num_videos 1"),
        ({"chunks": [(0, 4)]}, r"chunks\[0\] is \[0, 4\]"),
        ({"chunks": [(0, 1), (2, 1)]}, r"chunks\[1\] is \[2, 1\]"),
        ({"chunks": [(-1, 1)]}, r"chunks\[0\] is \[-1, 1\]"),
        ({"chunks": [(0, 1, 2)]}, r"chunks\[0\]"),
        ({"chunks": 0}, "chunks is 0"),
        ({"chunks": torch.tensor(0)}, "chunks is 0"),
        ({"chunks": torch.tensor(2.5)}, "chunks is tensor"),
        ({"batch": {"input_ids": [1, 2, 3], "pixel_values": torch.tensor(3)}}, "is a scalar"),
        ({"batch": [[1, 2, 3]]}, "batch is a list"),
        ({"batch": {"input_ids": "abc"}}, "input_ids is a str"),
        ({"layout": "internvl3"}, "pixel_values counts tiles; pass tiles_per_image"),
        (
            {"layout": "internvl3", "tiles_per_image": [1]},
            r"tiles_per_image has 1 entries, but num_images \[2, 0, 1\] adds up to 3",
        ),
        (
            {"layout": {"input_ids": "sample", "pixel_values": "video"}},
            "pixel_values counts videos; pass num_videos",
        ),
        (
            {
                "batch": {"pixel_values": [1] * 12, "image_grid_thw": [[2, 2]] * 3},
                "layout": "qwen2_vl",
            },
            r"image_grid_thw\[0\] has 2 entries, expected 3",
        ),
        ({"layout": "qwen2_vl"}, "pixel_values counts by image_grid_thw, which is not in"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(change, message):
    inputs = {
        "batch": {"input_ids": [1, 2, 3], "pixel_values": [1, 2, 3]},
        "layout": "llava15",
        "num_images": [2, 0, 1],
        "chunks": [(0, 3)],
    }
    with pytest.raises(PackingError, match=message):
        split_samples(**{**inputs, **change})


def test_an_order_of_samples_that_do_not_exist():
    batch = {"input_ids": [1, 2]}
    for order in ([2], [-1], [0.5]):
        with pytest.raises(PackingError, match="order"):
            take_samples(batch, "llava15", [0, 0], order)


def test_a_mask_is_no_order():
    """Read as indices, it would take samples 1, 0 and 1."""
    batch = {"input_ids": [1, 2, 3]}
    mask = [True, False, True]
    for order in (mask, torch.tensor(mask), np.array(mask), [*map(torch.tensor, mask)]):
        with pytest.raises(PackingError, match=r"order holds a (bool|Tensor)"):
            take_samples(batch, "llava15", [0, 0, 0], order)
    with pytest.raises(PackingError, match="chunks is tensor"):
        split_samples(batch, "llava15", [0, 0, 0], torch.tensor(True))


def test_layouts_of_all_families_can_be_split():
    """Every registered key works in one batch with all others of its family."""
    rows = {"sample": 2, "nonempty_sample": 1, "image": 1, "patch": 6, "tile": 2}
    rows |= {"video": 1, "video_patch": 4, "video_frame": 3, "video_or_frame": 3}
    grids = {
        "image_grid_thw": [[1, 2, 3]],
        "image_grid_hw": [[2, 3]],
        "video_grid_thw": [[1, 2, 2]],
    }
    given = {"tiles_per_image": [2], "num_videos": [0, 1], "frames_per_video": [3]}
    for family in FAMILIES.values():
        if not family.layout:
            continue
        batch = {key: list(range(rows[word])) for key, word in family.layout.items()}
        frames = [key for key, word in family.layout.items() if word == "video_or_frame"]
        batch |= dict.fromkeys(frames, torch.zeros(3, 3, 4, 4))
        batch |= {key: grid for key, grid in grids.items() if key in batch}
        first, second = split_samples(batch, family.name, [1, 0], 1, **given)
        of_images = {k for k, w in family.layout.items() if w != "sample" and "video" not in w}
        of_videos = {k for k, w in family.layout.items() if "video" in w}
        assert of_images <= set(first) and not of_videos & set(first)
        assert of_videos <= set(second) and not of_images & set(second)


def test_long_batches():
    images = [1] * 20_000
    batch = {"input_ids": list(range(20_000)), "pixel_values": torch.arange(20_000)}
    parts = split_samples(batch, "llava15", images, 1)
    assert parts[-1]["pixel_values"].tolist() == [19_999]
    starts = [0, *accumulate(images)]
    order = list(reversed(range(20_000)))
    assert take_samples(batch, "llava15", images, order)["pixel_values"][0] == starts[-2]
