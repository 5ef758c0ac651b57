"""Rows for models whose processor expanded the images: physical rows, their media and columns."""

import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

import mcore_packing as mp
from mcore_packing.data import Column

IMAGE, VIDEO, PAD = 151655, 151656, 77
COLUMNS = {"advantages": Column(0.0, shifted=True), "step": 9}


def spec_of(**fields) -> mp.RowSpec:
    return mp.RowSpec(image_token_id=IMAGE, expands=False, pad_token_id=PAD, **fields)


def make_sample(structure: list[str], index: int = 0, **has) -> dict:
    """A sample of Qwen2.5-VL from its structure: "t" is text, "i" an image, "v" a video.

    Args:
        structure: what stands where.
        index: makes its tokens and pixels its own.
        **has: "labels", "positions" (1 or 3 axes), "columns", "types", whether it has those.
    """
    generator = torch.Generator().manual_seed(index)
    ids, pixels, grids = [], {"i": [], "v": []}, {"i": [], "v": []}
    for place, kind in enumerate(structure):
        if kind == "t":
            ids.append(1000 * (index + 1) + place)
            continue
        grid = [1 + (kind == "v"), 2, 2 * (1 + (place + index) % 2)]
        size = grid[0] * grid[1] * grid[2]
        ids += [IMAGE if kind == "i" else VIDEO] * (size // 4)
        pixels[kind].append(torch.randn(size, 3, generator=generator))
        grids[kind].append(grid)
    sample = {"input_ids": torch.tensor(ids, dtype=torch.int64), "__key__": f"k{index}"}
    for kind, name, grid in (
        ("i", "pixel_values", "image_grid_thw"), ("v", "pixel_values_videos", "video_grid_thw")
    ):  # fmt: skip
        if grids[kind]:
            sample |= {name: torch.cat(pixels[kind]), grid: torch.tensor(grids[kind])}
    num_tokens = len(ids)
    if has.get("labels"):
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][::3] = -100
    if has.get("positions"):
        shape = [3, num_tokens] if has["positions"] == 3 else [num_tokens]
        sample["position_ids"] = torch.randint(0, 99, shape, generator=generator)
    if has.get("columns"):
        sample["advantages"] = torch.randn(num_tokens, generator=generator)
        sample["step"] = torch.randint(0, 5, (num_tokens, 2), generator=generator)
    if has.get("types"):
        sample["mm_token_type_ids"] = (sample["input_ids"] == IMAGE).int()
    return sample


def same(a: dict, b: dict) -> bool:
    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return x == y

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def oracle(samples: list[dict], spec: mp.RowSpec) -> dict[str, list]:
    """Every entry of a row, in plain Python."""
    row = {name: [] for name in ("input_ids", "labels", "loss_mask", "positions", "advantages")}
    edges = [0]
    for sample in samples:
        ids = sample["input_ids"].tolist()
        own = sample.get("labels", sample["input_ids"]).tolist()
        is_media = [token in (IMAGE, VIDEO) for token in ids]
        labels = [-100 if media else label for label, media in zip(own, is_media, strict=True)]
        labels = [*labels[1:], -100]
        room = -(-len(ids) // spec.seq_multiple) * spec.seq_multiple - len(ids)
        row["input_ids"] += ids + [PAD] * room
        row["labels"] += labels + [-100] * room
        row["loss_mask"] += [float(label != -100) for label in labels] + [0.0] * room
        row["positions"] += range(len(ids) + room)
        advantages = sample.get("advantages", torch.zeros(len(ids))).tolist()
        row["advantages"] += advantages + [0.0] * room
        edges.append(len(row["input_ids"]))
    tail = -(-edges[-1] // spec.total_multiple) * spec.total_multiple - edges[-1]
    fills = {"input_ids": PAD, "labels": -100, "loss_mask": 0.0, "advantages": 0.0}
    for name, fill in fills.items():
        row[name] += [fill] * tail
    row["positions"] += range(tail)
    return row | {"edges": [*edges, edges[-1] + tail]}


structures = st.lists(
    st.lists(st.sampled_from("tttiv"), min_size=1, max_size=7), min_size=1, max_size=7
)
having = st.fixed_dictionaries(
    {
        "labels": st.booleans(),
        "positions": st.sampled_from([0, 1, 3]),
        "columns": st.booleans(),
        "types": st.booleans(),
    }
)
multiples = st.sampled_from([(1, 1), (1, 8), (4, 8), (8, 48)])


@settings(max_examples=100)
@given(structures, st.lists(having, min_size=7, max_size=7), multiples)
@example([["i"], ["t"]], [{"positions": 3}] + [{}] * 6, (4, 8))
def test_split_gives_everything_back(structure, has, multiple):
    """Every kind of media, columns and positions, and nothing that was not there."""
    samples = [make_sample(kinds, i, **has[i]) for i, kinds in enumerate(structure)]
    spec = spec_of(seq_multiple=multiple[0], total_multiple=multiple[1])
    options = {"family": "qwen2_5_vl", "columns": COLUMNS}
    rows, report = mp.data.pack(samples, spec, 48, **options)
    assert not report.refused and not report.left_out, report
    seen = []
    for row in rows:
        for one in (row, pickle.loads(pickle.dumps(row))):
            assert all(map(same, mp.data.split(one), [samples[i] for i in row.indices]))
        seen += row.indices
    assert sorted(seen) == list(range(len(samples)))


@settings(max_examples=100)
@given(structures, st.booleans(), multiples)
def test_a_row_is_what_plain_python_says(structure, has, multiple):
    samples = [
        make_sample(kinds, i, labels=has and i % 2, columns=i % 2)
        for i, kinds in enumerate(structure)
    ]
    spec = spec_of(seq_multiple=multiple[0], total_multiple=multiple[1])
    packer = mp.data.get_packer("first_fit", spec, family="qwen2_5_vl", columns=COLUMNS)
    row, expected = packer.join(samples), oracle(samples, spec)
    for name in ("input_ids", "labels", "loss_mask"):
        assert getattr(row, name)[0].tolist() == expected[name], name
    assert row.position_ids[0].tolist() == expected["positions"]
    if "advantages" in row.columns:
        assert row.columns["advantages"][0].tolist() == expected["advantages"]
    edges = expected["edges"]
    assert row.layout.cu_seqlens_padded.tolist() == edges
    params = row.packed_seq_params
    assert params.cu_seqlens_q.tolist() == (edges if edges[-1] > edges[-2] else edges[:-1])
    assert not hasattr(params, "layout") and params.qkv_format == "thd"
    assert row.num_trained == sum(expected["loss_mask"])
    assert row.layout.num_images == 0 and (row.layout.cu_seqlens_expanded.diff() > 0).all()


@given(structures, st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 3]))
def test_the_ranks_have_the_whole_row_among_them(structure, cp_size, positions):
    """In Transformer Engine's order; images and boundaries stay whole."""
    seq_multiple, total_multiple = mp.alignment(cp_size, 2, sequence_parallel=True)
    spec = spec_of(seq_multiple=seq_multiple, total_multiple=total_multiple, cp_size=cp_size)
    samples = [make_sample(kinds, i, positions=positions) for i, kinds in enumerate(structure)]
    row = mp.data.get_packer("first_fit", spec, family="qwen2_5_vl").join(samples)
    whole = row.inputs()
    for rank in range(cp_size):
        local = mp.cp_partition(
            row.layout.cu_seqlens_padded, row.layout.num_expanded, cp_size, rank
        )
        found = row.inputs(cp_rank=rank)
        assert found.keys() == whole.keys()
        for name in ("input_ids", "labels", "loss_mask", "position_ids"):
            assert torch.equal(found[name], whole[name][..., local]), name
        for name in row.media:
            assert found[name] is row.media[name]
        assert torch.equal(
            found["packed_seq_params"].cu_seqlens_q, whole["packed_seq_params"].cu_seqlens_q
        )
    with pytest.raises(mp.PackingError, match="cp_rank is"):
        row.inputs(cp_rank=cp_size)


def test_positions_of_mrope_are_packed_with_those_of_text():
    samples = [make_sample(["t", "i", "t"], 0, positions=3), make_sample(["t", "t", "t"], 1)]
    spec = spec_of(seq_multiple=4, total_multiple=8)
    row = mp.data.get_packer("first_fit", spec, family="qwen2_5_vl").join(samples)
    given = samples[0]["position_ids"]
    assert row.position_ids.shape == (3, 1, 8) == row.inputs()["position_ids"].shape
    first = samples[0]["input_ids"].numel()
    assert torch.equal(row.position_ids[:, 0, :first], given)
    assert row.position_ids[:, 0, 4:].tolist() == [[0, 1, 2, 0]] * 3
    assert row.to("meta").position_ids.is_meta


def test_positions_of_unlike_axes_are_refused():
    samples = [make_sample(["t", "t"], at, positions=3) for at in range(2)]
    samples[1]["position_ids"] = samples[1]["position_ids"][[0, 0, 1, 2]]
    with pytest.raises(mp.PackingError, match="position_ids of these samples have 3 and 4 axes"):
        mp.data.get_packer("first_fit", spec_of(), family="qwen2_5_vl").join(samples)


def test_only_what_trains_trains_behind_an_image():
    """A plain model trains the token behind an image, an expanding one does not."""
    sample = make_sample(["t", "i", "t"])
    row = mp.data.get_packer("first_fit", spec_of(), family="qwen2_5_vl").join([sample])
    assert row.num_trained == 1 and row.loss_mask[0, -2] == 1


def test_dtypes_and_devices():
    sample = make_sample(["t", "i", "v"], columns=True)
    packer = mp.data.get_packer("first_fit", spec_of(), family="qwen2_5_vl", columns=COLUMNS)
    row = packer.join([sample]).to(dtype=torch.bfloat16)
    assert row.media["pixel_values"].dtype == torch.bfloat16
    assert row.media["pixel_values_videos"].dtype == torch.bfloat16
    assert row.media["image_grid_thw"].dtype == torch.int64
    assert row.columns["advantages"].dtype == torch.float32
    assert row.columns["step"].shape[2:] == (2,)


def test_lists_of_numbers_are_media_too():
    """Processors give ``second_per_grid_ts`` as a list."""
    sample = make_sample(["v", "t", "v"]) | {"second_per_grid_ts": [0.1, 0.5]}
    row = mp.data.get_packer("first_fit", spec_of(), family="qwen2_5_vl").join([sample] * 2)
    assert row.media["second_per_grid_ts"].tolist() == pytest.approx([0.1, 0.5] * 2)
    assert mp.data.split(row)[1]["second_per_grid_ts"] == [0.1, 0.5]


WRONG = {
    "patches": ({"pixel_values": torch.zeros(3, 3)}, "pixel_values has 3 entries"),
    "an image too many": (
        {"pixel_values": torch.zeros(8, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)},
        "1 placeholders, but image_grid_thw says 2 positions for 2 images",
    ),
    "no grid": ({"image_grid_thw": None}, "counts by image_grid_thw, which is not in the batch"),
    "no images": (
        {"pixel_values": None, "image_grid_thw": None},
        "1 placeholders, but none of pixel_values, image_grid_thw",
    ),
    "positions": (
        {"position_ids": torch.zeros(3, 2, dtype=torch.int64)},
        "position_ids: found torch.int64 [3, 2], expected torch.int64 [3], or [3, 3] for mRoPE",
    ),
    "float positions": ({"position_ids": torch.zeros(3)}, "found torch.float32 [3]"),
    "a short column": (
        {"advantages": torch.zeros(2)},
        "advantages have 2 entries, but input_ids 3",
    ),
    "a list": ({"advantages": [1.0, 2.0, 3.0]}, "advantages: found list, expected a tensor"),
    "another dtype": ({"step": torch.zeros(3, 2)}, "step are torch.float32 [2] each, but rows"),
    "a label": (
        {"labels": torch.tensor([IMAGE, IMAGE, 5])},
        "label 0 is 151655, the placeholder of an image",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sample_is_named(name):
    change, reason = WRONG[name]
    samples = [make_sample(["t", "i", "t"], i, columns=True) for i in range(3)]
    samples[0]["pixel_values"] = torch.zeros(4, 3)
    samples[0]["image_grid_thw"] = torch.tensor([[1, 2, 2]])
    samples[0]["input_ids"] = torch.tensor([5, IMAGE, 6])
    samples[0] |= {"advantages": torch.zeros(3), "step": torch.zeros(3, 2, dtype=torch.int64)}
    options = {"family": "qwen2_5_vl", "columns": COLUMNS}
    _, report = mp.data.pack(samples, spec_of(), 32, **options)
    assert not report.refused
    samples[0] |= change
    _, report = mp.data.pack(samples, spec_of(), 32, **options)
    (refused,) = report.refused
    assert refused.index == 0 and reason in refused.reason


def test_pixels_of_nobody_knows_what_are_refused():
    """They were dropped in silence."""
    _, report = mp.data.pack([make_sample(["t", "i"])], spec_of(), 32)
    assert "pass family=, such as 'qwen2_5_vl'" in report.refused[0].reason


@pytest.mark.parametrize(
    "options, match",
    [
        ({"family": "qwen9"}, "family 'qwen9' is not registered"),
        ({"columns": ["advantages"]}, "columns is "),
        ({"columns": {"labels": 0}}, "columns name 'labels', which rows have already"),
        ({"columns": {"a": "x"}}, "the fill of a column is 'x', expected a number"),
        ({"columns": {"pixel_values": 0}, "family": "qwen2_vl"}, "pixel_values are images or vid"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(mp.PackingError, match=match):
        mp.data.get_packer("first_fit", spec_of(), 32, **options)


def test_an_expanding_model_has_no_ranks_rows():
    row = mp.data.get_packer("first_fit", mp.RowSpec()).join([{"input_ids": torch.tensor([1, 2])}])
    with pytest.raises(mp.PackingError, match="LLaVAModel splits rows itself"):
        row.inputs(cp_rank=0)
