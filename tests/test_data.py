"""Packing: every sample in one row or in the report, rows that fit, samples as they were."""

import dataclasses
import pickle
import time

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import mcore_packing as mp
from mcore_packing import ops, parity
from mcore_packing.data import algorithms
from mcore_packing.testing import tiny
from mcore_packing.testing.lengths import llava_mix

from . import packs

SIZE = 28
IMAGE = packs.IMAGE
TOKENS_PER_TILE = packs.TOKENS_PER_TILE
SPEC = mp.RowSpec(img_seq_len=TOKENS_PER_TILE)
PARALLEL = [
    mp.alignment(cp_size, 8, sequence_parallel, fp8_align)
    for cp_size in (1, 2, 8, 64)
    for sequence_parallel in (False, True)
    for fp8_align in (1, 16, 128)
]


def spec_of(**fields) -> mp.RowSpec:
    return dataclasses.replace(SPEC, **fields)


def make_sample(tokens: list[int], index: int = 0, labels: str = "none", key: bool = False) -> dict:
    """A sample from its structure: 0 is text, k an image of k tiles."""
    ids = torch.arange(len(tokens)) + 1000 * (index + 1)
    tiles = [k for k in tokens if k]
    ids[torch.tensor(tokens, dtype=torch.int64) > 0] = IMAGE
    sample = {"input_ids": ids}
    if tiles or index % 2:
        pixels = torch.arange(sum(tiles) * 3.0).reshape(-1, 3, 1, 1) + index
        sample |= {"images": pixels, "num_image_tiles": torch.tensor(tiles, dtype=torch.int32)}
    elif index % 3:
        sample["images"] = None
    if labels != "none":
        sample["labels"] = ids.clone()  # placeholders included, as people do
        sample["labels"][: len(tokens) // 2] = -100
    if key:
        sample |= {"__key__": f"shard/{index}", "meta": {"index": index}}
    return sample


def make_samples(structure, **options) -> list[dict]:
    return [make_sample(tokens, index, **options) for index, tokens in enumerate(structure)]


def same(a: dict, b: dict) -> bool:
    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return x == y

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


# Laws of rows


@settings(max_examples=150)
@given(
    structure=st.lists(st.lists(st.sampled_from([0, 0, 0, 1, 3]), max_size=14), max_size=12),
    multiples=st.sampled_from(PARALLEL),
    algorithm=st.sampled_from(list(algorithms.ALGORITHMS)),
    labels=st.sampled_from(["none", "some"]),
    flags=st.fixed_dictionaries({"keep_order": st.booleans(), "balance": st.booleans()}),
    key=st.booleans(),
    room=st.integers(1, 40),
    spare=st.integers(0, 999),
)
def test_every_sample_is_in_one_row_that_fits_or_in_the_report(
    structure, multiples, algorithm, labels, flags, key, room, spare
):
    seq_multiple, total_multiple = multiples
    capacity = total_multiple * -(-room // total_multiple) + spare % total_multiple
    samples = make_samples(structure, labels=labels, key=key)
    spec = spec_of(seq_multiple=seq_multiple, total_multiple=total_multiple)
    rows, report = mp.data.pack(samples, spec, capacity, algorithm, **flags)
    refused = [entry.index for entry in report.refused]
    assert sorted([index for row in rows for index in row.indices] + refused) == list(
        range(len(samples))
    )
    for entry in report.refused:
        sample = samples[entry.index]
        length = len(structure[entry.index]) + sum(
            tiles * TOKENS_PER_TILE - 1 for tiles in structure[entry.index] if tiles
        )
        is_empty = sample["input_ids"].numel() == 0
        assert entry.cause == ("EmptySample" if is_empty else "SampleTooLong")
        aligned = -(-length // seq_multiple) * seq_multiple
        assert is_empty or aligned > capacity // total_multiple * total_multiple
        assert entry.key == (f"shard/{entry.index}" if key else None)
    for row in rows:
        layout = row.layout
        assert layout.num_expanded <= capacity and layout.num_expanded % total_multiple == 0
        assert not (layout.cu_seqlens_padded.diff()[:-1] % seq_multiple).any()
        assert all(map(same, mp.data.split(row), [samples[index] for index in row.indices]))
    assert report.num_real == sum(int(row.layout.cu_seqlens_expanded[-1]) for row in rows)
    assert report.num_aligned == sum(int(row.layout.cu_seqlens_padded[-2]) for row in rows)
    if rows:
        assert report.fill + sum(report.waste.values()) == pytest.approx(1)


@pytest.mark.parametrize("labels", ["none", "some"])
def test_a_row_is_its_samples_one_behind_the_other(labels):
    structure = [[0, 1, 0, 0], [2, 0], [0, 0, 0], [0, 0, 3]]
    samples = make_samples(structure, labels=labels)
    packer = mp.data.get_packer("first_fit", spec_of(seq_multiple=4, total_multiple=8), 100)
    row = packer.join(samples)
    alone = [packer.join([sample]) for sample in samples]
    for name in ("input_ids", "labels", "loss_mask", "position_ids"):
        expected = torch.cat([getattr(one, name) for one in alone], dim=1)
        assert torch.equal(getattr(row, name), expected), name
    for name in ("images", "num_image_tiles"):
        expected = torch.cat([getattr(one, name) for one in alone if getattr(one, name).numel()])
        assert torch.equal(getattr(row, name), expected), name
    for index, one in enumerate(alone):
        ids, found = samples[index]["input_ids"], one.labels[0]
        assert found[-1] == -100 and not (found == IMAGE).any()
        trained = samples[index].get("labels", ids)[1:]
        assert torch.equal(found[:-1], trained.masked_fill(ids[1:] == IMAGE, -100))
        assert torch.equal(one.loss_mask[0] > 0, found != -100)
    assert row.num_image_tiles.dtype == torch.int32 and row.loss_mask.dtype == torch.float32


def test_a_row_without_images_has_tensors_too():
    (row,), _ = mp.data.pack(make_samples([[0, 0], [0]]), SPEC, 8)
    assert row.images.numel() == 0
    assert row.num_image_tiles.shape == (0,) and row.num_image_tiles.dtype == torch.int32


def test_tokens_per_image_in_place_of_tiles():
    """Dynamic resolution: what an image becomes is said, not counted in tiles."""
    sample = make_sample([0, 1, 0, 1])
    sample["tokens_per_image"] = [7, 3]
    (row,), report = mp.data.pack([{**sample, "num_image_tiles": [1, 1]}], mp.RowSpec(), 12)
    assert row.layout.cu_image_embeddings.tolist() == [0, 7, 10] and report.num_real == 12
    del sample["num_image_tiles"]
    sample["images"] = torch.zeros(30, 588)  # patches
    (row,), _ = mp.data.pack([sample], mp.RowSpec(max_length=12))
    assert row.num_image_tiles.tolist() == [1, 1] and row.images.shape == (30, 588)
    assert all(map(same, mp.data.split(row), [sample]))


def test_rows_of_a_fixed_length():
    """Pipelines exchange rows of one length: the tail takes what is left."""
    samples = make_samples([[0] * 9, [0] * 7, [0] * 5])
    rows, report = mp.data.pack(samples, mp.RowSpec(fixed_length=16), algorithm="first_fit")
    assert [row.layout.num_expanded for row in rows] == [16, 16]
    assert report.capacity == 16 and "65.6% filled" in str(report)


def test_rows_are_made_when_asked_for_and_travel():
    samples = make_samples([[0, 1, 0], [0, 0], [2, 0, 0], [0]], labels="some")
    rows, _ = mp.data.pack(samples, SPEC, 12, "first_fit")
    assert len(rows) == 2 and len(rows[1:]) == 1 and rows[-1].indices == rows[1].indices
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2)
    for sent, here in zip(loader, rows, strict=True):
        for one in (sent, pickle.loads(pickle.dumps(here)), here.to("cpu")):
            assert all(map(same, mp.data.split(one), mp.data.split(here)))
            assert torch.equal(one.layout.to_tensor(), here.layout.to_tensor())
    assert rows[0].to(dtype=torch.bfloat16).images.dtype == torch.bfloat16
    assert rows[0].to("meta").input_ids.is_meta and rows[0].to("meta").layout.status.is_meta
    with pytest.raises(IndexError):
        rows[2]


def test_samples_may_come_from_a_dataset_or_an_iterator():
    samples = make_samples([[0, 1, 0], [0, 0], [2, 0, 0], [0]])

    class Dataset:
        def __len__(self):
            return len(samples)

        def __getitem__(self, index):
            return samples[index]

    expected, _ = mp.data.pack(samples, SPEC, 12)
    for source in (Dataset(), iter(samples)):
        rows, _ = mp.data.pack(source, SPEC, 12)
        assert rows.bins == expected.bins
        assert torch.equal(rows[0].input_ids, expected[0].input_ids)


def test_a_stream_is_packed_buffer_by_buffer():
    samples = make_samples([[0] * (1 + i % 5) for i in range(11)] + [[]])
    packer = mp.data.get_packer("best_fit_decreasing", SPEC, 6)
    seen, total, counts = [], mp.data.Report(), []
    for rows, report in packer.stream(iter(samples), 5):
        seen += [int(ids[0]) // 1000 - 1 for row in rows for ids in row.input_ids[0].split(
            row.layout.cu_seqlens_collapsed.diff().tolist())]  # fmt: skip
        total += report
        counts.append(report.num_samples)
    assert sorted(seen) == list(range(11))
    assert counts == [5, 5, 2] and total.num_samples == 12
    assert [entry.index for entry in total.refused] == [11]
    assert total.num_real == sum(1 + i % 5 for i in range(11)) and total.capacity == 6


# What is wrong with a sample


WRONG = {
    "no ids": ({"input_ids": None}, "PackingError", "found NoneType, expected torch.int64"),
    "a list": ({"input_ids": [1, 2]}, "PackingError", "input_ids: found list"),
    "int32": ({"input_ids": torch.arange(3).int()}, "PackingError", "found torch.int32 [3]"),
    "empty": ({"input_ids": torch.tensor([])}, "EmptySample", "input_ids are empty"),
    "too long": (
        {"input_ids": torch.tensor([IMAGE] + [7] * 94)},
        "SampleTooLong",
        "99 positions, 100 when",
    ),
    "labels": ({"labels": torch.arange(2)}, "PackingError", "labels have 2 entries, but input_ids"),
    "a label of -1": ({"labels": torch.tensor([5, -1, -100])}, "PackingError", "label 1 is -1"),
    "a loss mask": ({"loss_mask": torch.ones(3)}, "PackingError", "has a loss_mask, which could"),
    "no image": ({"images": None}, "PackingError", "are 1 tiles, but images hold 0"),
    "placeholder": ({"input_ids": torch.arange(9)}, "PlaceholderMismatch", "0 placeholders"),
    "two placeholders": (
        {"input_ids": torch.tensor([IMAGE, 5, IMAGE])},
        "PlaceholderMismatch",
        "2 placeholders (id -200) but 1 images",
    ),
    "tiles": ({"num_image_tiles": [2]}, "PackingError", "[2] are 2 tiles, but images hold 1"),
    "no tile": ({"num_image_tiles": [0]}, "PackingError", "[0], expected positive ints"),
    "floats": ({"num_image_tiles": torch.tensor([1.0])}, "PackingError", "expected positive ints"),
    "pixels": ({"images": torch.zeros(1, 3, 2, 2)}, "PackingError", "[3, 2, 2] each, but those"),
    "a path": ({"images": "cat.jpg"}, "PackingError", "images: found str, expected a tensor"),
    "tokens without images": (
        {"images": None, "num_image_tiles": None, "tokens_per_image": [4]},
        "PackingError",
        "names 1 images, but there are none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sample_is_named_and_the_others_are_packed(name):
    change, cause, reason = WRONG[name]
    samples = make_samples([[0, 1, 0, 0], [0, 1, 0], [1, 0]], key=True)
    samples[1] |= change
    spec = spec_of(seq_multiple=4)
    rows, report = mp.data.pack(samples, spec, 32)
    assert sorted(index for row in rows for index in row.indices) == [0, 2]
    (refused,) = report.refused
    assert (refused.index, refused.key, refused.cause) == (1, "shard/1", cause)
    assert reason in refused.reason and report.causes == {cause: 1}
    assert f"sample 1 (shard/1): {refused.reason}" in str(report)
    with pytest.raises(mp.PackingError) as caught:
        mp.data.pack(samples, spec, 32, on_refused="raise")
    assert str(caught.value) == f"sample 1 (shard/1): {refused.reason}"
    assert type(caught.value).__name__ == cause


def test_no_sample_at_all():
    rows, report = mp.data.pack([], SPEC, 8)
    assert len(rows) == 0 and str(report).startswith("0 of 0 samples in 0 rows")
    rows, report = mp.data.pack([7], SPEC, 8)
    assert len(rows) == 0 and report.refused[0].reason == "a sample is a int, expected a dict"


def test_a_long_report_is_short_in_print():
    _, report = mp.data.pack([{"input_ids": torch.tensor([])}] * 30, SPEC, 8)
    assert len(str(report).splitlines()) == 13 and "and 20 more" in str(report)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"spec": None}, "spec is None, expected a mp.RowSpec"),
        ({"spec": 8}, "spec is 8, expected a mp.RowSpec"),  # the capacity of 0.1
        ({"capacity": 8.0}, "capacity is 8.0, expected an int"),
        ({"spec": spec_of(max_length=7)}, "capacity is 8, but the model takes rows of at most 7"),
        ({"spec": spec_of(fixed_length=7)}, "capacity is 8, but the model takes rows of at most 7"),
        ({"spec": spec_of(total_multiple=16)}, "capacity is 8, expected at least 16"),
        ({"algorithm": "worst_fit"}, "algorithm is 'worst_fit', expected one of concatenative"),
        ({"on_refused": "skip"}, "on_refused is 'skip', expected 'report' or 'raise'"),
        ({"img_seq_len": 5}, "takes no img_seq_len= any more: spec=mp.row_spec"),
        ({"max_expanded": 8}, "takes no max_expanded= any more: spec=mp.row_spec"),
    ],
)
def test_options_that_contradict_each_other(options, match):
    with pytest.raises(mp.PackingError, match=match):
        mp.data.pack([], **{"spec": SPEC, "capacity": 8, **options})


def test_without_a_limit_one_row_takes_all():
    samples = make_samples([[0] * 900, [1, 0], [0] * 5000, []])
    rows, report = mp.data.pack(samples, spec_of(seq_multiple=4))
    assert len(rows) == 1 and sorted(rows[0].indices) == [0, 1, 2]
    assert report.capacity == rows[0].layout.num_expanded == 5908
    assert report.fill_aligned == 1


def test_img_seq_len_is_asked_for():
    with pytest.raises(TypeError, match="img_seq_len"):
        mp.data.pack(make_samples([[1, 0]]), mp.RowSpec(), 32)
    with pytest.raises(TypeError, match="no_such_option"):
        mp.data.pack([], SPEC, 32, no_such_option=1)


# Algorithms


def slowly(lengths, capacity, order, choose) -> list[list[int]]:
    """Bins by looking at every bin, for every length."""
    bins, free = [], []
    for index in order:
        fits = [bin_ for bin_, room in enumerate(free) if room >= lengths[index]]
        if not fits:
            fits = [len(bins)]
            bins.append([])
            free.append(capacity)
        bin_ = choose(fits, free)
        bins[bin_].append(index)
        free[bin_] -= lengths[index]
    return bins


LENGTHS = st.lists(st.integers(1, 30), max_size=40)


@given(LENGTHS, st.integers(30, 70))
def test_fits_are_those_of_the_obvious_search(lengths, capacity):
    arrival = range(len(lengths))
    longest = sorted(arrival, key=lambda i: -lengths[i])

    def first(fits, free):
        return fits[0]

    for name, order in (("first_fit", arrival), ("first_fit_decreasing", longest)):
        expected = slowly(lengths, capacity, order, first)
        assert algorithms.place(lengths, capacity, name) == expected
    for name, order in (("best_fit", arrival), ("best_fit_decreasing", longest)):
        expected = slowly(
            lengths, capacity, order, lambda fits, free: min(fits, key=free.__getitem__)
        )
        found = algorithms.place(lengths, capacity, name)
        assert sorted(sum(lengths[i] for i in bin_) for bin_ in found) == sorted(
            sum(lengths[i] for i in bin_) for bin_ in expected
        )


@given(LENGTHS, st.integers(30, 70), st.sampled_from(list(algorithms.ALGORITHMS)))
def test_no_length_is_lost_and_no_bin_is_too_full(lengths, capacity, name):
    plain = algorithms.place(lengths, capacity, name)
    total = sum(lengths)
    for options in ({}, {"keep_order": True}, {"balance": True}):
        bins = algorithms.place(lengths, capacity, name, **options)
        assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
        assert all(0 < sum(lengths[i] for i in bin_) <= capacity for bin_ in bins)
    kept = algorithms.place(lengths, capacity, name, keep_order=True)
    assert sorted(map(sorted, plain)) == sorted(kept) and kept == list(map(sorted, kept))
    if name == "modified_first_fit_decreasing" and lengths:
        ideal = -(-total // capacity)  # at least; few lengths may need more
        assert len(plain) <= len(algorithms.place(lengths, capacity, "concatenative"))
        assert len(plain) >= ideal


def test_modified_first_fit_decreasing_pairs_what_first_fit_does_not():
    # Above a half each, and above a sixth: pairs of those fill the gaps that singles would spoil.
    lengths = [51] * 6 + [27] * 6 + [26] * 6 + [23] * 12
    counts = {
        name: len(algorithms.place(lengths, 100, name))
        for name in ("first_fit_decreasing", "modified_first_fit_decreasing")
    }
    assert counts == {"first_fit_decreasing": 11, "modified_first_fit_decreasing": 10}


def test_shuffled_by_its_seed():
    lengths = llava_mix(200)
    bins = [algorithms.place(lengths, 4096, "first_fit_shuffle", seed=seed) for seed in (1, 1, 2)]
    assert bins[0] == bins[1] != bins[2]


@pytest.mark.parametrize("lengths", [[3, 9], [3, 0], [-1]])
def test_a_length_that_no_bin_holds_is_refused(lengths):
    with pytest.raises(mp.PackingError, match="expected 1 to 8"):
        algorithms.place(lengths, 8)


def test_a_llava_mix_fills_rows_in_time():
    lengths = llava_mix(100_000)
    packer = mp.data.get_packer("modified_first_fit_decreasing", SPEC, 4096)
    begin = time.perf_counter()
    bins = packer.place(lengths)
    assert time.perf_counter() - begin < 5  # 0.3 s; scripts/bench_pack.py measures
    assert sum(lengths) / (len(bins) * 4096) >= 0.95
    assert packer.place(torch.tensor(lengths[:100])) == packer.place(lengths[:100])


def test_arrival_order_mixes_lengths_without_a_row_more():
    lengths = llava_mix(20_000)
    mean = sum(lengths) / len(lengths)

    def of_first_rows(**options):
        bins = algorithms.place(lengths, 4096, "first_fit_decreasing", **options)
        first = [lengths[i] for bin_ in bins[:200] for i in bin_]
        return len(bins), sum(first) / len(first) / mean

    plain, kept = of_first_rows(), of_first_rows(keep_order=True)
    assert plain[0] == kept[0] and plain[1] > 1.5 and 0.9 < kept[1] < 1.1


def test_balanced_rows_cost_attention_the_same():
    lengths = llava_mix(20_000)

    def spread(**options):
        bins = algorithms.place(lengths, 8192, "best_fit", **options)
        costs = torch.tensor([float(sum(lengths[i] ** 2 for i in bin_)) for bin_ in bins])
        return len(bins), float(costs.std() / costs.mean())

    (plain, before), (balanced, after) = spread(), spread(balance=True)
    assert balanced <= plain * 1.01 and after < before / 2


# In the model


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
def test_rows_run_as_their_samples_do(positions, monkeypatch):
    model = tiny.llava_model(positions, img_size=SIZE)
    samples = tiny.samples(9, img_size=SIZE)
    samples.append({"input_ids": torch.arange(1, 20)})
    rows, report = mp.data.pack(samples, mp.row_spec(model), 256)
    assert not report.refused and len(rows) > 1
    rows = list(rows)
    with mp.install(model), torch.no_grad():
        monkeypatch.setattr(ops, "layout", pytest.fail)  # the layout came along
        for row in rows:
            loss, mask = model(**row.inputs())
            edges = row.layout.cu_seqlens_padded.tolist()
            for at, index in enumerate(row.indices):
                with monkeypatch.context() as patch:
                    patch.undo()
                    ((logprobs, alone_mask),) = parity.run_alone(model, [samples[index]])
                here = slice(edges[at], edges[at] + alone_mask.numel())
                assert torch.equal(mask[0, here], alone_mask) and alone_mask.sum() > 5
                assert ((loss[0, here] + logprobs) * alone_mask).abs().max() < 1e-5
                assert alone_mask[-1] == 0


@pytest.mark.usefixtures("megatron")
def test_the_capacity_of_a_model():
    model = tiny.llava_model("rope", img_size=SIZE, max_sequence_length=100)
    _, report = mp.data.pack(tiny.samples(3, img_size=SIZE), mp.row_spec(model))
    assert report.capacity == 100
    assert [refused.cause for refused in report.refused] == ["SampleTooLong"] * len(report.refused)


def test_what_can_be_packed():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_samples([[0, 1, 0], [0, 0]]))

    rows, report = mp.data.pack(Stream(), SPEC, 32)
    assert report.num_samples == 2 and len(rows) == 1
    with pytest.raises(mp.PackingError, match="one mapping"):
        mp.data.pack({"a": 1}, SPEC, 32)
    with pytest.raises(mp.PackingError, match="buffer_size is 0"):
        next(mp.data.get_packer("best_fit", SPEC, 32).stream([], 0))
    with pytest.raises(mp.PackingError, match="takes no seq_multiple= any more"):
        mp.data.get_packer("best_fit", SPEC, 32, seq_multiple=4)


def test_a_text_with_no_image_tensor_is_packed_beside_images():
    samples = make_samples([[0, 0], [0, 1, 0]])
    samples[0]["images"] = torch.empty(0)
    rows, report = mp.data.pack(samples, SPEC, 64)
    assert not report.refused and len(rows[0].images) == len(samples[1]["images"])
