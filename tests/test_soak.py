"""The soak: that it passes what is right, and finds what is not."""

import dataclasses
from pathlib import Path

import pytest

import mcore_packing as mp
from mcore_packing.data import rows

SEEDS = range(40)


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import soak

    return soak


def found(soak) -> list[str]:
    """What is wrong with the first cases, a line each."""
    return [wrong.splitlines()[0] for seed in SEEDS if (wrong := soak.check(seed))]


def test_nothing_is_wrong(soak):
    assert found(soak) == []


def test_every_hostile_input_comes_up(soak, monkeypatch):
    def spoilt(name, spoil):
        def spy(rng, row):
            names.add(name)
            spoil(rng, row)

        return spy

    names = set()
    spies = {name: spoilt(name, spoil) for name, spoil in soak.HOSTILE.items()}
    monkeypatch.setattr(soak, "HOSTILE", spies)
    assert not any(soak.check(10 * seed + 9) for seed in range(200))
    assert names == set(spies)


def wrong_labels(layout, labels, loss_mask, **ranks):
    labels, loss_mask = EXPAND_LABELS(layout, labels, loss_mask, **ranks)
    return labels.roll(1), loss_mask


def wrong_embeddings(layout, text, images, **ranks):
    return EXPAND_EMBEDDINGS(layout, text + 1, images, **ranks)


def wrong_column(layout, column, spec, **ranks):
    return EXPAND_COLUMN(
        layout, column, dataclasses.replace(spec, shifted=not spec.shifted), **ranks
    )


def wrong_shares(layout, tiles, cp_size):
    """Rank 0 encodes all of them."""
    found = SHARES(layout, tiles, cp_size)
    counts = found.counts.clone().zero_()
    counts[0] = found.counts.sum(0)
    return dataclasses.replace(found, encoder=found.encoder * 0, counts=counts)


def wrong_partition(cu_seqlens, total, cp_size, cp_rank):
    return CP_PARTITION(cu_seqlens, total, cp_size, cp_size - 1 - cp_rank)


EXPAND_LABELS, EXPAND_EMBEDDINGS = mp.expand_labels, mp.expand_embeddings
EXPAND_COLUMN, CP_PARTITION = mp.expand_column, mp.cp_partition
SHARES = mp.vision.shares


@pytest.mark.parametrize(
    "name, broken, message",
    [
        ("expand_labels", wrong_labels, "labels of rank "),
        ("expand_embeddings", wrong_embeddings, "embeddings of rank "),
        ("expand_column", wrong_column, "column of rank "),
        ("cp_partition", wrong_partition, "partition of rank "),
    ],
)
def test_what_is_broken_is_found(soak, monkeypatch, name, broken, message):
    monkeypatch.setattr(mp, name, broken)
    wrong = found(soak)
    assert wrong and all(line.startswith(message) for line in wrong)


def test_wrong_shares_are_found(soak, monkeypatch):
    monkeypatch.setattr(rows, "shares", wrong_shares)
    wrong = found(soak)
    assert wrong and all(line.startswith("loads: ") for line in wrong)


def without_gaps(cls, input_ids, cu_seqlens, tokens_per_image, spec, **options):
    options.pop("cu_seqlens_padded", None)
    return BUILD(input_ids, cu_seqlens, tokens_per_image, spec, **options)


BUILD = mp.PackedLayout.build


def test_lost_gaps_are_found(soak, monkeypatch):
    monkeypatch.setattr(mp.PackedLayout, "build", classmethod(without_gaps))
    wrong = found(soak)
    assert any(line.startswith("collapsed with gaps padded: ") for line in wrong)


def turned(row, names):
    return {"media": row.media | {name: row.media[name].flip(0) for name in names & {*row.media}}}


def turned_media(row):
    return turned(row, {"images", "pixel_values"})


def turned_counts(row):
    return turned(row, {"num_image_tiles", "image_grid_thw"})


def other_positions(row):
    return {"positions": None if row.positions is None else row.positions + 1}


@pytest.mark.parametrize(
    "spoil, messages",
    [
        (turned_media, {"images", "pixel_values"}),
        (turned_counts, {"counts"}),
        (other_positions, {"position_ids"}),
    ],
)
def test_other_media_and_positions_are_found(soak, monkeypatch, spoil, messages):
    class Rows(mp.data.Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return dataclasses.replace(row, **spoil(row))

    def pack(*args, **options):
        rows, report = PACK(*args, **options)
        rows.__class__ = Rows
        return rows, report

    monkeypatch.setattr(mp.data, "pack", pack)
    assert {line.split(":")[0] for line in found(soak)} == messages


PACK = mp.data.pack


def test_a_lost_sample_is_found(soak, monkeypatch):
    monkeypatch.setattr(mp.data, "split", lambda row: SPLIT(row)[::-1])
    assert any("split" in line for line in found(soak))


SPLIT = mp.data.split


def test_what_should_be_refused_and_is_not_is_found(soak, monkeypatch):
    monkeypatch.setattr(soak, "HOSTILE", {"nothing": lambda rng, row: None})
    assert soak.check(9) == "nothing: no error"


def test_the_smallest_case_is_told(soak, monkeypatch):
    monkeypatch.setattr(mp, "expand_labels", wrong_labels)
    seed = next(seed for seed in SEEDS if soak.check(seed))
    case = soak.make_case(seed)
    assert len(soak.smallest(case)["samples"]) <= len(case["samples"])
    with pytest.raises(soak.Wrong):
        soak.check_case(soak.smallest(case))
