"""Lengths that are said: no sample is read before its row is made, and a wrong one is found
then."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import mcore_packing as mp
from mcore_packing.data import packer as room

IMAGE = -200
SPEC = mp.RowSpec(img_seq_len=4)
SIZES = [3, 9, 1, 5, 7, 2, 8, 4, 6, 11, 30, 2]


class Counted(Dataset):
    """A map-style data set that counts how often each sample is read."""

    def __init__(self, samples: list[dict]):
        self.samples, self.reads = samples, [0] * len(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        self.reads[index] += 1
        return self.samples[index]


def make_samples(sizes=SIZES, images=(1, 4)) -> list[dict]:
    """Text of these sizes, some with a first token that is an image of two tiles."""
    samples = [
        {"input_ids": torch.arange(1, size + 1), "__key__": f"k{i}"} for i, size in enumerate(sizes)
    ]
    for index in (index for index in images if index < len(sizes)):
        samples[index]["input_ids"][0] = IMAGE
        samples[index] |= {"images": torch.zeros(2, 3, 1, 1), "num_image_tiles": [2]}
    return samples


def same_rows(a, b) -> bool:
    return a.bins == b.bins and all(
        torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.loss_mask, other.loss_mask)
        and torch.equal(one.layout.to_tensor(), other.layout.to_tensor())
        for one, other in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("as_kind", ["positions", "all", "tensor", "array"])
def test_each_sample_is_read_once_when_its_row_is_made(as_kind):
    samples = make_samples()
    packer = mp.data.get_packer("fullest", SPEC, 16)
    lengths = [packer.length(sample) for sample in samples]
    assert lengths[:2] == [mp.data.Length(3, 2, 0, 0), mp.data.Length(16, 7, 2, 8)]
    given = {
        "positions": [length.positions for length in lengths],
        "all": lengths,
        "tensor": torch.tensor([length.positions for length in lengths]),
        "array": np.array(lengths),
    }[as_kind]
    looked_at, said = Counted(samples), Counted(samples)
    expected, _ = packer.pack(looked_at)
    rows, report = mp.data.pack(said, SPEC, 16, lengths=given)
    assert said.reads == [0] * len(samples) and looked_at.reads == [1] * len(samples)
    assert [row.num_trained for row in rows] == [row.num_trained for row in expected[:]]
    assert said.reads == [int(size != 30) for size in SIZES]  # one is too long for any row
    assert report.causes == {"SampleTooLong": 1} and report.refused[0].key is None
    assert same_rows(rows, expected)
    assert same_rows(rows[1:], expected[1:]) and rows[1:].lengths is rows.lengths
    if as_kind in ("all", "array"):
        assert report.untrained == ((2, None),)


def test_a_report_reads_nothing_again():
    """Its keys did: 76 reads for 28 samples."""
    samples = make_samples()
    for sample in samples[:6]:
        sample["labels"] = torch.full_like(sample["input_ids"], -100)
    dataset = Counted(samples)
    rows, report = mp.data.pack(dataset, SPEC, 16)
    assert report.num_untrained == 6 and report.refused[0].key == "k10"
    assert sum(dataset.reads) == len(samples)
    list(rows)
    assert sum(dataset.reads) == 2 * len(samples) - 1


@pytest.mark.parametrize("name", mp.data.Length._fields)
def test_a_wrong_length_is_found_and_named(name):
    samples = make_samples([3, 9, 5])
    packer = mp.data.get_packer("first_fit", SPEC, 64)
    lengths = [packer.length(sample) for sample in samples]
    real = getattr(lengths[1], name)
    lengths[1] = lengths[1]._replace(**{name: real + 1})
    rows, _ = packer.pack(samples, lengths)
    found = rf"sample 1 \(k1\): lengths say {real + 1} {name}, but it has {real}; make them anew"
    with pytest.raises(mp.data.WrongLength, match=found) as caught:
        rows[0]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(mp.data.WrongLength, match=found):
        list(DataLoader(rows, batch_size=None, num_workers=1))


def test_a_bad_sample_is_named_when_its_row_is_made():
    samples = make_samples([3, 9, 5])
    rows, _ = mp.data.pack(samples, SPEC, 64, lengths=[3, 16, 5])
    samples[2]["labels"] = torch.tensor([1, 2, 3, 4, -7])
    with pytest.raises(mp.PackingError, match=r"^sample 2 \(k2\): label 4 is -7"):
        rows[0]
    samples[2]["labels"] = torch.arange(2)
    with pytest.raises(mp.PackingError, match=r"^sample 2 \(k2\): labels have 2 entries"):
        rows[0]


def test_lengths_say_what_the_settings_ask_for():
    """With all of it the rows are those of samples that were looked at."""
    samples = make_samples(SIZES[:10])
    asking = {
        "trained": [{"loss_weights": "square"}, {"refuse_untrained": True}],
        "tiles": [{"max_tiles": 2}],
        "patches": [{"balance": True}, {"balance": True, "vision_cost": 0.5}],
    }
    for name, every in asking.items():
        for options in every:
            packer = mp.data.get_packer("fullest", SPEC, 32, **options)
            lengths = [packer.length(sample) for sample in samples]
            rows, report = packer.pack(samples, lengths)
            expected, other = packer.pack(samples)
            assert same_rows(rows, expected) and rows.scale == expected.scale
            assert report.causes == other.causes and report.imbalance == other.imbalance
            lengths[3] = lengths[3]._replace(**{name: None})
            with pytest.raises(mp.PackingError, match=rf"lengths\[3\] does not say {name}, but"):
                packer.pack(samples, lengths)
    packer = mp.data.get_packer("fullest", SPEC, 32, balance=True, vision_cost=0)
    packer.pack(samples, [packer.length(sample).positions for sample in samples])


def test_only_what_has_to_be_cut_is_read():
    samples = make_samples()
    packer = mp.data.get_packer("fullest", SPEC, 16, on_too_long="truncate", loss_weights="sample")
    lengths = [packer.length(sample) for sample in samples]
    dataset = Counted(samples)
    rows, report = packer.pack(dataset, lengths)
    assert dataset.reads == [int(size == 30) for size in SIZES]
    expected, other = packer.pack(samples)
    assert same_rows(rows, expected) and rows.scale == expected.scale
    assert report.truncated == other.truncated and report.cut_off["trained"] == 14
    for change in ({"positions": 31}, {"trained": 3}):
        wrong = list(lengths)
        wrong[10] = wrong[10]._replace(**change)
        _, report = packer.pack(samples, wrong)
        assert report.causes == {"WrongLength": 1} and report.refused[0].key == "k10"
    short = list(lengths)
    short[10] = short[10]._replace(positions=16)  # it is longer, and would be cut unasked
    rows, _ = packer.pack(samples, short)
    with pytest.raises(mp.data.WrongLength, match="lengths say 16 positions, but it has 30"):
        list(rows)


def test_rows_that_fill_up_a_job_are_checked_too():
    samples = make_samples([3, 4], images=())
    options = {"num_rows_multiple": 4, "fill_rows": "empty", "lengths": [3, 5]}
    rows, _ = mp.data.pack(samples, SPEC, 4, **options | {"lengths": [3, 4]})
    assert [len(row.indices) for row in rows] == [1, 1, 0, 0]
    rows, _ = mp.data.pack(samples, SPEC, 8, **options)
    with pytest.raises(mp.data.WrongLength, match="sample 1"):
        rows[3]


@pytest.mark.parametrize(
    "lengths, found",
    [
        ([1, 2], "there are 2 lengths, but 3 samples"),
        (7, "lengths are a int, expected one for each sample"),
        ({0: 1, 1: 1, 2: 1}, "lengths are a dict"),
        ([1, 2.0, 3], r"lengths\[1\] is 2.0, expected positions, or mp.data.Length\(positions, tr"),
        ([1, 2, -3], r"lengths\[2\] is -3"),
        ([1, True, 3], r"lengths\[1\] is True"),
        ([1, (), 3], r"lengths\[1\] is \(\)"),
        ([1, (None, 3), 3], r"lengths\[1\] is \(None, 3\)"),
        ([1, (1, 2, 3, 4, 5), 3], r"lengths\[1\] is \(1, 2, 3, 4, 5\)"),
        (torch.tensor([1.0, 2.0, 3.0]), r"lengths\[0\] is 1.0"),
    ],
)
def test_lengths_that_make_no_sense(lengths, found):
    with pytest.raises(mp.PackingError, match=found):
        mp.data.pack(make_samples([1, 2, 3], images=()), SPEC, 8, lengths=lengths)


def test_what_lengths_say_is_refused_by_them():
    dataset = Counted(make_samples([1, 2, 3], images=()))
    _, report = mp.data.pack(dataset, SPEC, 8, lengths=[0, 9, 3])
    assert report.causes == {"EmptySample": 1, "SampleTooLong": 1} and not sum(dataset.reads)
    with pytest.raises(mp.data.SampleTooLong, match=r"^sample 1: 9 positions, but a row has room"):
        mp.data.pack(dataset, SPEC, 8, lengths=[1, 9, 3], on_refused="raise")
    with pytest.raises(mp.PackingError, match="not of a stream"):
        mp.data.pack(iter([]), SPEC, 8, lengths=[])


# What a user sees of it


def test_rows_are_a_dataset_and_say_what_they_are():
    rows, _ = mp.data.pack(
        make_samples([3, 4, 12], images=()), SPEC, 16, num_rows_multiple=4, fill_rows="empty"
    )
    assert isinstance(rows, Dataset)
    said = "Rows(4 rows of at most 16 positions, 2 of them empty, with 3 samples)"
    assert repr(rows) == said
    assert repr(copy.copy(rows)[:1]) == "Rows(1 rows of at most 16 positions, with 2 samples)"
    rows, _ = mp.data.pack(make_samples([3, 4], images=()), SPEC)
    assert repr(rows) == "Rows(1 rows, with 2 samples)"


def test_progress_is_shown_where_samples_are_many(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    samples = make_samples([1] * 100, images=())
    mp.data.pack(samples, SPEC, 64)
    assert not capsys.readouterr().err
    monkeypatch.setattr(room, "MANY", 99)
    mp.data.pack(samples, SPEC, 64, progress=False)
    mp.data.pack(samples, SPEC, 64, lengths=[1] * 100)
    assert not capsys.readouterr().err
    mp.data.pack(samples, SPEC, 64)
    shown = capsys.readouterr().err
    assert "packing" in shown and "100/100" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)  # it is not installed
    mp.data.pack(samples, SPEC, 64)
    assert not capsys.readouterr().err


def test_that_nothing_is_packed_is_a_warning():
    samples = make_samples([9, 9], images=())
    with pytest.warns(UserWarning, match="all 2 samples were refused") as caught:
        mp.data.pack(samples, SPEC, 4)
    said = str(caught[0].message)
    assert "(2 SampleTooLong), so there is no row; sample 0 (k0): 9 positions" in said
    assert caught[0].filename == __file__
