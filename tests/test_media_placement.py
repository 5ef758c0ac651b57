"""Placement: known cases, what moves along, and the laws of splicing."""

import json
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_packing import PackingError, PlaceholderMismatch
from mcore_packing.media import get_family, place_image_blocks, splice_image_blocks

from .laws import examples

CASES = json.loads(Path(__file__).with_name("media_cases").joinpath("placement.json").read_text())
CASES = CASES["cases"]
# Only splice_image_blocks falls back to there.
AFTER_BOS = ("fallback_empty_opener", "pretruncated_prompt_without_opener")
TEXT = ["prompt_ids", "labels", "loss_mask", "cu_seqlens", "turn_opener"]
BEGIN, IMAGE, END, BREAK, BOS = 90, 91, 92, 93, 2
OPENER = [5, 6]
LAW = examples(1000)


def as_kind(kind, values):
    return values if kind == "list" or values is None else torch.tensor(values)


def as_list(values):
    return values.tolist() if isinstance(values, torch.Tensor) else values


def splice_after_bos(prompt_ids, blocks, turn_opener, bos_token_id=None):
    """Once released code: image tokens before the conversation begins."""
    return [*prompt_ids[:1], *(token for block in blocks for token in block), *prompt_ids[1:]]


def splice_by_hand(prompt, blocks, opener, bos=None):
    """The rule in its plainest form."""
    at = None
    for start in range(len(prompt) - len(opener) + 1):
        if opener and prompt[start : start + len(opener)] == opener:
            at = start + len(opener)
    if at is None:
        at = 0 if not prompt or (bos is not None and prompt[0] != bos) else 1
    return prompt[:at] + [token for block in blocks for token in block] + prompt[at:]


def has_opener(prompt, opener):
    spots = range(len(prompt) - len(opener) + 1)
    return bool(opener) and any(prompt[at : at + len(opener)] == opener for at in spots)


def shift(values, fill, bounds=None):
    """Entry t about token t + 1, in every sequence by itself."""
    spans = pairwise(bounds or [0, len(values)])
    return [v for a, b in spans if a < b for v in [*values[a + 1 : b], fill]]


def without(output, spans):
    """The row without its blocks."""
    starts = [0, *(stop for _, stop in spans)]
    stops = [*(start for start, _ in spans), len(output)]
    return [t for a, b in zip(starts, stops, strict=True) for t in output[a:b]]


ids = st.lists(st.sampled_from([1, BOS, *OPENER, 7]), max_size=14)
block = st.integers(0, 3).map(lambda n: [BEGIN, *[IMAGE] * n, END])
blocks_of_any_size = st.lists(st.one_of(block, st.just([])), max_size=3)
openers = st.sampled_from([[], [5], OPENER, [5, 5], [7, 7, 7], [1] * 20])


@pytest.mark.parametrize("kind", ["list", "tensor"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_cases(case, kind):
    inputs = {
        name: as_kind(kind, value) if name in TEXT else value
        for name, value in case["input"].items()
    }
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(PlaceholderMismatch) as caught:
            place_image_blocks(**inputs)
        found = caught.value
        assert (found.actual, found.expected) == (expect["actual"], expect["expected"])
        assert str(found.actual) in str(found) and str(found.expected) in str(found)
        return
    if "expect_with_bos" in case:
        checked = splice_image_blocks(**inputs)
        assert as_list(checked) == case["expect_with_bos"]["output_ids"]
        inputs.pop("bos_token_id")
    if case["name"] in AFTER_BOS:
        assert as_list(splice_image_blocks(**inputs)) == expect["output_ids"]
        with pytest.raises(PackingError, match="after BOS, outside the user's turn"):
            place_image_blocks(**inputs)
        return
    placement = place_image_blocks(**inputs)
    for name, value in expect.items():
        assert as_list(getattr(placement, name)) == value, name
    for name in ("output_ids", "labels", "loss_mask", "position_ids", "cu_seqlens"):
        found = getattr(placement, name)
        assert found is None or isinstance(found, torch.Tensor) == (kind == "tensor"), name
    plain = set(inputs) <= {"prompt_ids", "blocks", "turn_opener", "bos_token_id"}
    if plain:
        assert as_list(splice_image_blocks(**inputs)) == expect["output_ids"]


def test_no_case_is_missing():
    assert len(CASES) == 11


def test_splicing_after_bos_is_wrong():
    """The cases and the law that place the blocks inside the turn catch it."""
    wrong = []
    for case in CASES[:8]:
        if splice_after_bos(**case["input"]) != case["expect"]["output_ids"]:
            wrong.append(case["name"])
    assert "gemma4_inside_user_turn" in wrong and "qwen3vl_multi_turn" in wrong
    assert "fallback_empty_opener" not in wrong
    prompt, image = [BOS, *OPENER, 7], [BEGIN, IMAGE, END]
    assert splice_after_bos(prompt, [image], OPENER) != splice_by_hand(prompt, [image], OPENER)


@LAW
@given(ids, blocks_of_any_size, openers, st.sampled_from([None, BOS]))
def test_splicing_by_the_rule_and_back(prompt, blocks, opener, bos):
    """The plainest form says the same, and removing the blocks gives the prompt."""
    spliced = splice_image_blocks(prompt, blocks, opener, bos)
    assert spliced == splice_by_hand(prompt, blocks, opener, bos)
    if blocks and not has_opener(prompt, opener):
        with pytest.raises(PackingError, match="after BOS"):
            place_image_blocks(prompt, blocks, opener, bos_token_id=bos)
        return
    placement = place_image_blocks(prompt, blocks, opener, bos_token_id=bos)
    assert placement.output_ids == splice_by_hand(prompt, blocks, opener, bos)
    assert without(placement.output_ids, placement.block_spans) == prompt
    spans = placement.block_spans
    assert [placement.output_ids[a:b] for a, b in spans] == blocks
    assert all(b == c for (_, b), (c, _) in pairwise(spans))  # contiguous, in order
    assert isinstance(placement.insert_at, int)
    assert not spans or spans[0][0] == placement.insert_at


@LAW
@given(st.lists(st.tuples(ids, blocks_of_any_size), min_size=1, max_size=4), openers, st.data())
def test_a_packed_row_is_its_sequences(seqs, opener, data):
    """No sequence sees its neighbour: every array and every boundary, with a tail behind."""
    tail = data.draw(st.lists(st.sampled_from([1, 7]), max_size=3))
    shifted = data.draw(st.booleans())
    seqs = [(prompt, mine if has_opener(prompt, opener) else []) for prompt, mine in seqs]
    row, bounds = [], [0]
    for prompt, _ in seqs:
        row += prompt
        bounds.append(len(row))
    row += tail
    labels, loss_mask = list(range(1000, 1000 + len(row))), [1] * len(row)
    blocks = [block for _, mine in seqs for block in mine]
    packed = place_image_blocks(
        row, blocks, opener, bos_token_id=BOS, labels=labels, loss_mask=loss_mask, shifted=shifted,
        cu_seqlens=bounds, blocks_per_seq=[len(mine) for _, mine in seqs],
    )  # fmt: skip
    alone = [
        place_image_blocks(
            prompt, mine, opener, bos_token_id=BOS, shifted=shifted,
            labels=labels[start : start + len(prompt)], loss_mask=[1] * len(prompt),
        )
        for (prompt, mine), start in zip(seqs, bounds, strict=False)
    ]  # fmt: skip
    rows = [one.output_ids for one in alone]
    assert packed.output_ids == [*chain(*rows), *tail]
    assert packed.labels == [*chain(*(one.labels for one in alone)), *labels[bounds[-1] :]]
    assert packed.loss_mask == [*chain(*(one.loss_mask for one in alone)), *[1] * len(tail)]
    assert packed.cu_seqlens == [0, *np.cumsum([len(one) for one in rows]).tolist()]
    positions = [p for one in [*rows, tail] for p in range(len(one))]
    assert packed.position_ids == positions
    assert [packed.output_ids[a:b] for a, b in packed.block_spans] == blocks


@LAW
@given(ids, st.lists(block, max_size=3), st.booleans())
def test_no_inserted_token_is_trained(prompt, blocks, shifted):
    """No token of a block is a target, and every other token is still the one that it was."""
    prompt = OPENER + prompt
    labels = [-100, *(token + 100 for token in prompt[1:])][: len(prompt)]
    loss_mask = [0, *[1.0] * len(prompt[1:])][: len(prompt)]
    moved = (shift(labels, -100), shift(loss_mask, 0)) if shifted else (labels, loss_mask)
    placement = place_image_blocks(
        prompt, blocks, OPENER, labels=moved[0], loss_mask=moved[1], shifted=shifted
    )
    found = list(zip(placement.labels, placement.loss_mask, strict=True))
    if shifted:  # what entry t says is about token t + 1
        found = [(-100, 0), *found][: len(found)]
    inside = {p for a, b in placement.block_spans for p in range(a, b)}
    assert all(found[position] == (-100, 0) for position in inside)
    others = [found[p] for p in range(len(found)) if p not in inside]
    assert others == list(zip(labels, loss_mask, strict=True))


@LAW
@given(st.lists(st.tuples(ids, st.booleans(), st.booleans(), st.data()), min_size=1, max_size=3))
def test_shifting_and_placing_commute(parts):
    """Spliced and in place, with and without markers: the same targets whichever comes first."""
    row, bounds, blocks, counts, labels = [], [0], [], [], []
    for prompt, in_place, marked, data in parts:
        if in_place:
            image = [BEGIN, IMAGE, END] if marked else [IMAGE]
            prompt = [t for token in prompt for t in (image if token == 7 else [token])]
        count = prompt.count(IMAGE) or data.draw(st.integers(0, 2)) * has_opener(prompt, OPENER)
        blocks += [data.draw(st.one_of(block, st.just([]))) for _ in range(count)]
        counts.append(count)
        row += prompt
        bounds.append(len(row))
        labels += [-100, *range(bounds[-2] + 1, len(row))][: len(prompt)]  # no target at the start
    loss_mask = [int(label != -100) for label in labels]
    options = {"image_token_id": IMAGE, "cu_seqlens": bounds, "blocks_per_seq": counts}
    placed = place_image_blocks(row, blocks, OPENER, labels=labels, loss_mask=loss_mask, **options)
    found = place_image_blocks(
        row, blocks, OPENER, shifted=True, **options,
        labels=shift(labels, -100, bounds), loss_mask=shift(loss_mask, 0, bounds),
    )  # fmt: skip
    assert found.output_ids == placed.output_ids
    assert found.labels == shift(placed.labels, -100, placed.cu_seqlens)
    assert found.loss_mask == shift(placed.loss_mask, 0, placed.cu_seqlens)


@LAW
@given(st.lists(st.one_of(st.just(IMAGE), st.sampled_from([1, *OPENER])), max_size=12), st.data())
def test_placeholders_expand_in_place(prompt, data):
    """One placeholder per image: each becomes its block, wherever the opener stands."""
    count = prompt.count(IMAGE)
    blocks = [data.draw(block) for _ in range(count)]
    placement = place_image_blocks(prompt, blocks, OPENER, image_token_id=IMAGE)
    expected, left = [], iter(blocks)
    for token in prompt:
        expected += next(left) if token == IMAGE else [token]
    assert placement.output_ids == expected
    assert [placement.output_ids[a:b] for a, b in placement.block_spans] == blocks
    if count:
        assert placement.insert_at == [p for p, token in enumerate(prompt) if token == IMAGE]
    assert placement.mm_token_type_ids == [int(token == IMAGE) for token in expected]
    for wrong in (count + 1, count - 1):
        if count and wrong >= 0:
            with pytest.raises(PlaceholderMismatch) as caught:
                place_image_blocks(prompt, [[IMAGE]] * wrong, OPENER, image_token_id=IMAGE)
            assert (caught.value.expected, caught.value.actual) == (count, wrong)


def test_markers_that_are_there_already_are_not_repeated():
    """Qwen's template writes both markers, Gemma's writes none."""
    expand = {"turn_opener": OPENER, "image_token_id": IMAGE}
    image = [BEGIN, IMAGE, IMAGE, IMAGE, END]
    marked = place_image_blocks([*OPENER, BEGIN, IMAGE, END, 7], [image], **expand)
    assert marked.output_ids == [*OPENER, *image, 7] and marked.block_spans == [[2, 7]]
    bare = place_image_blocks([*OPENER, IMAGE, 7], [image], **expand)
    assert bare.output_ids == [*OPENER, *image, 7]
    half = place_image_blocks([BEGIN, IMAGE, 7], [image], **expand)
    assert half.output_ids == [BEGIN, *image, 7]
    twice = place_image_blocks([BEGIN, IMAGE, END] * 2, [image, image], **expand)
    assert twice.output_ids == image * 2
    # Pixtral's blocks have an end only, and breaks inside.
    rows = [IMAGE, IMAGE, BREAK, IMAGE, IMAGE]
    ended = place_image_blocks([IMAGE, END, 7], [[*rows, END]], [], image_token_id=IMAGE)
    assert ended.output_ids == [*rows, END, 7] and ended.block_spans == [[0, 6]]
    begun = place_image_blocks([BEGIN, IMAGE, 7], [[BEGIN, *rows]], [], image_token_id=IMAGE)
    assert begun.output_ids == [BEGIN, *rows, 7] and begun.block_spans == [[0, 6]]
    unended = place_image_blocks([IMAGE, 7], [[*rows, END]], [], image_token_id=IMAGE)
    assert unended.output_ids == [*rows, END, 7]
    # What stands for the next image is no marker of this one.
    next_one = place_image_blocks(
        [BEGIN, BEGIN], [[IMAGE, BEGIN], [IMAGE]], [], image_token_id=IMAGE, prompt_token_id=BEGIN
    )
    assert next_one.output_ids == [IMAGE, BEGIN, IMAGE]
    # One marker between two placeholders belongs to one of them only.
    shared = place_image_blocks([END, IMAGE, END, IMAGE, END], [[END, IMAGE, END]] * 2, **expand)
    assert shared.output_ids == [END, IMAGE, END, END, IMAGE, END, END]
    labels = place_image_blocks(
        [BEGIN, IMAGE, END, 7], [image], **expand, labels=[1, 2, 3, 4], shifted=True
    ).labels
    assert labels == [-100] * 4 + [3, 4]  # the end marker still predicts the 7


def test_another_token_stands_for_the_image_in_the_prompt():
    """Gemma 3 writes begin-of-image there, and its block begins with it."""
    family = get_family("gemma3")
    image = [108, family.vision_start_id, *[family.image_token_id] * 4, family.vision_end_id, 108]
    prompt = [2, *family.turn_opener, family.vision_start_id, 7]
    placement = place_image_blocks(
        prompt, [image], family.turn_opener,
        image_token_id=family.image_token_id, prompt_token_id=family.prompt_token_id,
    )  # fmt: skip
    assert placement.output_ids == [2, *family.turn_opener, *image, 7]
    assert placement.mm_token_type_ids == [0] * 6 + [1] * 4 + [0] * 3


def test_images_of_given_turns():
    """Tool results open user turns too: the last turn is not always the one with the image."""
    prompt, image = [*OPENER, 10, *OPENER, 20], [BEGIN, IMAGE, END]
    asked = place_image_blocks(prompt, [image], OPENER, images_per_turn=[1, 0])
    assert asked.output_ids == [*OPENER, *image, 10, *OPENER, 20] and asked.insert_at == [2]
    row, bounds = prompt + prompt, [0, 6, 12]
    for turns in ([1, 0, 0, 2], torch.tensor([1, 0, 0, 2])):
        packed = place_image_blocks(
            row, [image] * 3, OPENER, images_per_turn=turns, cu_seqlens=bounds
        )
        assert packed.cu_seqlens == [0, 9, 21] and packed.insert_at == [2, 11, 11]
    zero_d = [torch.tensor(count) for count in (1, 0, 0, 2)]
    packed = place_image_blocks(row, [image] * 3, OPENER, images_per_turn=zero_d, cu_seqlens=bounds)
    assert packed.insert_at == [2, 11, 11]
    with pytest.raises(PackingError, match="occurs 2 times"):
        place_image_blocks(prompt, [image], OPENER, images_per_turn=[1])
    with pytest.raises(PlaceholderMismatch, match="adds up to 2 images, but there are 1 blocks"):
        place_image_blocks(prompt, [image], OPENER, images_per_turn=[1, 1])
    with pytest.raises(PackingError, match=r"images_per_turn\[0\] is -1"):
        place_image_blocks(prompt, [], OPENER, images_per_turn=[-1, 1])


def test_placeholders_win_over_given_turns_but_must_agree_with_them():
    prompt, image = [*OPENER, IMAGE, *OPENER, 20], [BEGIN, IMAGE, IMAGE, END]
    expand = {"turn_opener": OPENER, "image_token_id": IMAGE}
    placed = place_image_blocks(prompt, [image], **expand, images_per_turn=[1, 0])
    assert placed.output_ids == [*OPENER, *image, *OPENER, 20]
    with pytest.raises(PlaceholderMismatch, match=r"hold \[1, 0\] placeholders"):
        place_image_blocks(prompt, [image], **expand, images_per_turn=[0, 1])


def test_a_packed_row_must_say_whose_images_they_are():
    row, bounds, image = [*OPENER, 7, *OPENER, 8], [0, 3, 6], [BEGIN, IMAGE, END]
    with pytest.raises(PackingError, match="say blocks_per_seq"):
        place_image_blocks(row, [image], OPENER, cu_seqlens=bounds)
    with pytest.raises(PlaceholderMismatch, match="blocks_per_seq"):
        place_image_blocks(row, [image], OPENER, cu_seqlens=bounds, blocks_per_seq=[1, 1])
    with pytest.raises(PackingError, match="1 entries, but the row has 2 sequences"):
        place_image_blocks(row, [image], OPENER, cu_seqlens=bounds, blocks_per_seq=[1])
    mixed = [*OPENER, IMAGE, *OPENER, 8]  # one sequence has its placeholder, the other has none
    placed = place_image_blocks(
        mixed,
        [image, image],
        OPENER,
        cu_seqlens=bounds,
        blocks_per_seq=[1, 1],
        image_token_id=IMAGE,
    )
    assert placed.output_ids == [*OPENER, *image, *OPENER, *image, 8]
    derived = place_image_blocks(mixed, [image], OPENER, cu_seqlens=bounds, image_token_id=IMAGE)
    assert derived.output_ids == [*OPENER, *image, *OPENER, 8]
    with pytest.raises(PlaceholderMismatch, match="sequence 0: 1 placeholders"):
        place_image_blocks(
            mixed, [image], OPENER, cu_seqlens=bounds, blocks_per_seq=[0, 1], image_token_id=IMAGE
        )
    with pytest.raises(PlaceholderMismatch, match="past the last boundary: 1 placeholders"):
        place_image_blocks(
            [*mixed, IMAGE], [image], OPENER, cu_seqlens=bounds, image_token_id=IMAGE,
            blocks_per_seq=[1, 0],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", ["T", "1xT"])
def test_tensors_keep_their_kind(dtype, shape):
    prompt = torch.tensor([*OPENER, 7], dtype=dtype)
    labels, mask = torch.tensor([1, 2, 3]), torch.tensor([0.0, 1.0, 0.5], dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    if shape == "1xT":
        prompt, labels, mask = prompt[None], labels[None], mask[None]
    blocks = [torch.tensor([BEGIN, IMAGE, END])]
    placed = place_image_blocks(
        prompt, blocks, torch.tensor(OPENER), labels=labels, loss_mask=mask, cu_seqlens=cu_seqlens
    )
    assert placed.output_ids.dtype == dtype and placed.output_ids.shape == (*prompt.shape[:-1], 6)
    assert placed.output_ids.flatten().tolist() == [*OPENER, BEGIN, IMAGE, END, 7]
    assert placed.labels.flatten().tolist() == [1, 2, -100, -100, -100, 3]
    assert placed.loss_mask.dtype == torch.bfloat16
    assert placed.loss_mask.flatten().tolist() == [0, 1, 0, 0, 0, 0.5]
    assert placed.cu_seqlens.dtype == torch.int32 and placed.cu_seqlens.tolist() == [0, 6]
    assert placed.position_ids.shape == placed.output_ids.shape
    assert placed.position_ids.dtype == torch.int64


def test_arrays_keep_their_kind():
    placed = splice_image_blocks(np.array([*OPENER, 7]), [np.array([BEGIN, END])], np.array(OPENER))
    assert isinstance(placed, np.ndarray) and placed.tolist() == [*OPENER, BEGIN, END, 7]


def test_an_empty_prompt_has_ids_too():
    """PyTorch and NumPy make floats of nothing."""
    for nothing in (torch.tensor([]), np.array([])):
        assert "int64" in str(splice_image_blocks(nothing, [[3]], []).dtype)
        placed = place_image_blocks(nothing, [], [], image_token_id=3)
        for row in (placed.output_ids, placed.position_ids, placed.mm_token_type_ids):
            assert "int64" in str(row.dtype)
    mask = place_image_blocks([], [], [], loss_mask=torch.tensor([])).loss_mask
    assert mask.dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_ids": np.array([5, 6, 7], dtype=np.uint16)}, "-200 does not fit uint16"),
        ({"prompt_ids": torch.tensor([5, 6, 7], dtype=torch.int8)}, "-200 does not fit torch.int8"),
        ({"labels": np.array([5, 6, 7], dtype=np.uint16)}, "-100 does not fit uint16"),
        ({"labels": torch.tensor([5, 6, 7], dtype=torch.uint8)}, "-100 does not fit torch.uint8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(PackingError, match=message):
        place_image_blocks(
            **{"prompt_ids": [5, 6, 7], **change}, blocks=[[300, -200]], turn_opener=OPENER
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_ids": [[1, 2]]}, "prompt_ids holds a list"),
        ({"prompt_ids": "text"}, "prompt_ids is a str"),
        ({"prompt_ids": [1.5]}, "prompt_ids holds a float"),
        ({"prompt_ids": [1, torch.tensor(1.5)]}, "prompt_ids holds a Tensor"),
        ({"prompt_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"prompt_ids is \[2, 3\]"),
        ({"prompt_ids": torch.zeros(3)}, "prompt_ids holds a float"),
        ({"blocks": [BEGIN, IMAGE, END]}, r"blocks\[0\] is a int"),
        ({"blocks": 5}, "blocks is 5, expected a list"),
        ({"images_per_turn": 1}, "images_per_turn is 1, expected a list"),
        ({"turn_opener": "user"}, "turn_opener is a str"),
        ({"labels": [1, 2]}, "labels is 2 entries, but the row has 3 tokens"),
        ({"loss_mask": torch.zeros(1, 4)}, "loss_mask"),
        ({"cu_seqlens": [1, 3]}, "starts at 1"),
        ({"cu_seqlens": [0, 2, 1]}, "sequence 1: cu_seqlens goes from 2 back to 1"),
        ({"cu_seqlens": [0, 9]}, "ends at 9, past the end of the row at 3"),
        ({"cu_seqlens": []}, "starts at None"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
        ({"image_token_id": 9.0}, "image_token_id is 9.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(change, message):
    inputs = {"prompt_ids": [*OPENER, 7], "blocks": [[BEGIN, END]], "turn_opener": OPENER}
    with pytest.raises(PackingError, match=message):
        place_image_blocks(**{**inputs, **change})


@pytest.mark.parametrize("opener", [OPENER, [7] * 300 + [8]], ids=["short", "almost-matching"])
def test_long_rows(opener):
    """Openers that almost match everywhere, too."""
    row = [7] * 200_000
    spliced = splice_image_blocks(row, [[BEGIN, END]] * 1000, opener)
    assert len(spliced) == 202_000 and spliced[1] == BEGIN
    seqs = [*opener, *[7] * 200]
    placed = place_image_blocks(
        seqs * 1000, [[BEGIN, END]] * 1000, opener, labels=seqs * 1000,
        cu_seqlens=list(range(0, len(seqs) * 1000 + 1, len(seqs))), blocks_per_seq=[1] * 1000,
    )  # fmt: skip
    assert placed.block_spans[0] == [len(opener), len(opener) + 2]


@pytest.mark.parametrize("labels", [torch.tensor([0.5] * 4), [0.5] * 4, np.full(4, 0.5)])
def test_labels_are_token_ids(labels):
    """-100 among floats would be a value."""
    with pytest.raises(PackingError, match="labels hold floats, expected token ids"):
        place_image_blocks([5, 6, 10, 9], [[7, 9, 9, 8]], [5, 6], image_token_id=9, labels=labels)
