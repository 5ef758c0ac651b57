"""Telling collapsed boundaries from expanded ones: never wrong, refused where both are possible."""

import random
from collections import Counter

import pytest
import torch

import mcore_packing as mp
from mcore_packing import PackedLayout

from .packs import IMAGE

STYLES = [
    (space, tail) for space in ("collapsed", "expanded") for tail in ("bare", "folded", "dummy")
]
EOS = 2


def random_row(rng: random.Random, space: str, tail: str):
    """A row of 1 to 8 samples that end in EOS, then 0 to 2,000 padding tokens; half of the rows are
    padded with EOS. ``bare`` boundaries stop before the padding, ``folded`` ones give it to the
    last sequence, ``dummy`` ones make it a sequence of its own."""
    rows_per_tile = rng.choice([1, 2, 4, 16, 64, 256, 256, 576, 577])
    tokens, boundaries, rows = [], [0], []
    for _ in range(rng.randint(1, 8)):
        sample = [rng.randint(3, 9) for _ in range(rng.randint(0, 60))]
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            sample.insert(rng.randint(0, len(sample)), IMAGE)
            rows.append(rng.randint(1, 6) * rows_per_tile)
        tokens += [*sample, EOS]
        boundaries.append(len(tokens))
    pad = rng.choice([0, rng.randint(0, 20), rng.randint(0, 2000)])
    tokens += [EOS if rng.random() < 0.5 else 0] * pad
    if tail == "folded":
        boundaries[-1] = len(tokens)
    elif tail == "dummy" and pad:
        boundaries.append(len(tokens))
    ids, boundaries = torch.tensor(tokens), torch.tensor(boundaries)
    rows = torch.tensor(rows, dtype=torch.int64)
    expansion = torch.ones_like(ids).masked_scatter(ids == IMAGE, rows)
    start = torch.cat([expansion.new_zeros(1), expansion.cumsum(0)])
    given = boundaries if space == "collapsed" else start[boundaries]
    return ids, given.int(), rows, start[boundaries].int()


@pytest.mark.parametrize("space, tail", STYLES, ids=["-".join(style) for style in STYLES])
def test_space_is_never_wrong(space, tail):
    rng = random.Random(f"{space} {tail}")
    found = Counter()
    for _ in range(4000):
        ids, given, rows, truth = random_row(rng, space, tail)
        try:
            layout = PackedLayout.build(ids, given, rows, IMAGE)
        except mp.BoundarySpaceError as error:
            assert "pass space='collapsed' or space='expanded'" in str(error)
            found["refused"] += 1
            found["refused, 16 rows or more"] += int(rows.min()) >= 16
            continue
        assert torch.equal(layout.cu_seqlens_expanded, truth), (layout.space, space)
        found[layout.space] += 1
    # Few rows are refused, and hardly any with images of ordinary size.
    assert found["refused"] < 0.1 * 4000, found
    assert found["refused, 16 rows or more"] < 0.01 * 4000, found


@pytest.mark.parametrize("space, tail", STYLES, ids=["-".join(style) for style in STYLES])
def test_saying_the_space_always_works(space, tail):
    rng = random.Random(f"{space} {tail} said")
    for _ in range(300):
        ids, given, rows, truth = random_row(rng, space, tail)
        layout = PackedLayout.build(ids, given, rows, IMAGE, space=space)
        assert torch.equal(layout.cu_seqlens_expanded, truth)


def test_each_rule():
    def space(tokens, boundaries, rows):
        given = torch.tensor(boundaries, dtype=torch.int32)
        return PackedLayout.build(torch.tensor(tokens), given, rows, IMAGE).space

    pads = [0] * 20
    assert space([1, IMAGE, 2], [0, 3], [1]) == "collapsed"  # 1: one row per image, both the same
    assert space([1, IMAGE, 2], [0, 22], [20]) == "expanded"  # 2: past the tokens
    assert space([1, IMAGE, 2], [0, 3], [20]) == "collapsed"  # 3: before the last real row
    # 4: the same end, but no token begins at row 5
    assert space([IMAGE, 1, *pads], [0, 20], [19]) == "expanded"
    assert space([IMAGE, 1, *pads], [0, 5, 20], [19]) == "collapsed"
    # 5: all tokens, many of them padding
    assert space([1, IMAGE, 2, *pads], [0, 23], [4]) == "collapsed"
    # 6: right behind the real rows
    assert space([IMAGE, 1, *[0] * 40], [0, 21], [20]) == "expanded"
    with pytest.raises(mp.BoundarySpaceError):  # 7
        space([1, IMAGE, 2], [0, 3], [2])


def test_megatrons_own_case():
    ids = torch.randint(1, 100, (1024,), generator=torch.Generator().manual_seed(0))
    ids[0] = IMAGE
    given = torch.tensor([0, 512, 1024, 1600], dtype=torch.int32)
    layout = PackedLayout.build(ids, given, [577], IMAGE)
    assert layout.space == "expanded"
    assert torch.equal(layout.cu_seqlens_expanded, given)
