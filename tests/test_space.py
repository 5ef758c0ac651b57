"""Which space boundaries can be in: never wrong, refused where both are possible."""

import random
from collections import Counter

import pytest
import torch

import mcore_packing as mp
from mcore_packing import find_space

from .packs import IMAGE, lay_out

STYLES = [
    (space, tail) for space in ("collapsed", "expanded") for tail in ("bare", "folded", "dummy")
]
EOS = 2


def random_row(rng: random.Random, space: str, tail: str):
    """A row of 1 to 8 samples that end in EOS, then 0 to 2,000 padding tokens; half of the rows are
    padded with EOS. ``bare`` boundaries stop before the padding, ``folded`` ones give it to the
    last sequence, ``dummy`` ones make it a sequence of its own."""
    tokens_per_tile = rng.choice([1, 2, 4, 16, 64, 256, 256, 576, 577])
    tokens, boundaries, rows = [], [0], []
    for _ in range(rng.randint(1, 8)):
        sample = [rng.randint(3, 9) for _ in range(rng.randint(0, 60))]
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            sample.insert(rng.randint(0, len(sample)), IMAGE)
            rows.append(rng.randint(1, 6) * tokens_per_tile)
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


def cut(rng, ids, given, rows):
    """Expanded boundaries as Bridge and main clamp them to a maximum inside the row."""
    longest = rng.randint(1, int(given[-1]))
    return given.clamp(max=longest), longest


@pytest.mark.parametrize("space, tail", STYLES, ids=["-".join(style) for style in STYLES])
def test_space_is_never_wrong(space, tail):
    rng = random.Random(f"{space} {tail}")
    found = Counter()
    for _ in range(4000):
        ids, given, rows, truth = random_row(rng, space, tail)
        longest = None
        if space == "expanded" and rng.random() < 0.3:
            given, longest = cut(rng, ids, given, rows)
            truth = truth.clamp(max=longest)
        try:
            answer = find_space(ids, given, rows, IMAGE, max_length=longest)
        except mp.BoundarySpaceError as error:
            assert "pass space='collapsed' if they count tokens" in str(error)
            found["refused"] += 1
            continue
        assert answer in (space, None)
        found[answer] += 1
        if answer is None:  # both are the same
            assert torch.equal(given, truth)
    assert found["refused"] < 0.75 * 4000, found
    assert found[space] > 0.2 * 4000, found


@pytest.mark.parametrize("space, tail", STYLES, ids=["-".join(style) for style in STYLES])
def test_saying_the_space_always_works(space, tail):
    rng = random.Random(f"{space} {tail} said")
    for _ in range(300):
        ids, given, rows, truth = random_row(rng, space, tail)
        layout = lay_out(ids, given, rows, space)
        assert torch.equal(layout.cu_seqlens_expanded, truth)


def build(tokens, boundaries, counts, space):
    return lay_out(torch.tensor(tokens), int32(boundaries), counts, space)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


ROW = [1, IMAGE, 2, 3]  # the image ends at token 2, or at position 21 of 23 if it becomes 20


@pytest.mark.parametrize(
    "boundaries, rows, expected",
    [
        ([0, 4], [20], "collapsed"),  # at the last token
        ([0, 2], [20], "collapsed"),  # right behind the image
        ([0, 1], [20], "neither"),  # the image lies behind it
        ([0, 23], [20], "expanded"),
        ([0, 21, 23], [20], "expanded"),  # right behind the image
        ([0, 20, 23], [20], "neither"),  # inside the image
        ([0, 24], [20], "neither"),  # past the end of either
        ([0, 5], [20], "neither"),
        ([0, 4], [1], None),  # an image of one embedding: both are the same
        ([0, 4], [3], "either"),  # all tokens, or right behind the image
        ([0, 4], [2], "either"),  # all tokens, or all but the last
        ([0, 1, 4], [2], "either"),
        ([0, 2, 4], [2], "collapsed"),  # no token starts at position 2
    ],
)
def test_each_rule(boundaries, rows, expected):
    given = torch.tensor(ROW), int32(boundaries), rows
    if expected in ("either", "neither"):
        with pytest.raises(mp.BoundarySpaceError, match=f"could count {expected}"):
            find_space(*given)
    else:
        assert find_space(*given) == expected


def test_boundaries_cut_at_the_maximum():
    given = torch.tensor(ROW), int32([0, 1, 10]), [20]
    assert find_space(*given, max_length=10) == "expanded"
    with pytest.raises(mp.BoundarySpaceError, match="neither"):
        find_space(*given)


def test_text_answers_nothing():
    assert find_space(torch.tensor([1, 2, 3]), int32([0, 2, 3]), []) is None


def test_another_fault_is_left_to_the_layout():
    for boundaries, counts, message in (
        ([0, 3, 2], [20], "cu_seqlens decreases"),
        ([1, 4], [20], "cu_seqlens starts at 1"),
        ([0, 4], [], "placeholders"),
    ):
        assert find_space(torch.tensor(ROW), int32(boundaries), counts) is None
        for space in ("collapsed", "expanded"):
            with pytest.raises(mp.PackingError, match=message):
                build(ROW, boundaries, counts, space)


def test_what_it_does_not_take_is_refused():
    for change, message in (
        ({"input_ids": [1, 2]}, "input_ids is a list"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens is torch.int64"),
        ({"tokens_per_image": None}, "tokens_per_image is None"),
        ({"image_token_id": None}, "image_token_id is None"),
        ({"max_length": 1.5}, "max_length is 1.5"),
    ):
        given = {"input_ids": torch.tensor(ROW), "cu_seqlens": int32([0, 4])}
        with pytest.raises(mp.PackingError, match=message):
            find_space(**{**given, "tokens_per_image": [20], **change})


def test_one_token_too_many_is_not_expanded():
    # The row of the demo, whose last boundary says 310 for 309.
    tokens = [1] * 309
    for place in (10, 80, 150, 210):
        tokens[place] = IMAGE
    counts = [577, 1154, 577, 1731]
    with pytest.raises(mp.BoundarySpaceError, match="could count neither"):
        find_space(torch.tensor(tokens), int32([0, 76, 148, 207, 310]), counts)
    with pytest.raises(mp.PackingError, match="the last boundary is 310, past the end"):
        build(tokens, [0, 76, 148, 207, 310], counts, "collapsed")
    assert find_space(torch.tensor(tokens), int32([0, 76, 148, 207, 309]), counts) == "collapsed"


def test_collapsed_boundaries_that_are_said_to_be_expanded_are_refused():
    # Nobody guesses, but what can only be the other one is no row of this data path.
    tokens = [1] * 309
    tokens[80] = IMAGE
    with pytest.raises(
        mp.BoundarySpaceError, match="said to be expanded, but cannot be: boundary 2 lies"
    ):
        build(tokens, [0, 76, 148, 309], [577], "expanded")


def test_what_is_said_is_taken_at_its_word():
    # By their values these could be neither.
    tokens = [1, 2, IMAGE, 3, IMAGE, 4]
    for space, boundaries in {"collapsed": [0, 2, 4], "expanded": [0, 7, 9]}.items():
        assert build(tokens, boundaries, [6, 6], space).space == space
        with pytest.raises(mp.BoundarySpaceError, match="could count neither"):
            find_space(torch.tensor(tokens), int32(boundaries), [6, 6])


def test_megatrons_own_case_is_said_to_be_expanded():
    # Its boundaries lie inside an image.
    ids = torch.randint(1, 100, (1024,), generator=torch.Generator().manual_seed(0))
    ids[0] = IMAGE
    given = int32([0, 512, 1024, 1600])
    with pytest.raises(mp.BoundarySpaceError, match="lies inside an image; pass space="):
        find_space(ids, given, [577])
    layout = lay_out(ids, given, [577], "expanded")
    assert torch.equal(layout.cu_seqlens_expanded, given)


def test_expanded_boundaries_that_are_said_to_be_collapsed_are_told_of_the_space():
    tokens = [1] * 20
    tokens[3] = tokens[12] = IMAGE
    message = r"past the end of the row at 20 \(20 tokens, 40 expanded\)"
    with pytest.raises(
        mp.BoundarySpaceError, match=f"{message}.*if they count positions, pass space='expanded'"
    ):
        build(tokens, [0, 19, 39], [11, 11], "collapsed")
    for last in (25, 41):  # inside the last image, and past the end of either
        with pytest.raises(mp.PackingError, match=f"{message}$"):
            build(tokens, [0, 19, last], [11, 11], "collapsed")
