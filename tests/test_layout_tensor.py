"""A layout as one tensor: what travels, how it is read again, what is refused."""

import itertools
import pickle
import random

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import mcore_packing as mp
from mcore_packing import PackedLayout, RowSpec
from mcore_packing.expand import expand_tokens, source_positions
from mcore_packing.layout import _FACTS
from mcore_packing.reference import HEADER_SIZE, STATUS_SIZE, parts_of

from .packs import IMAGE, NAMED, build, make_row, structures

SPEC = {"img_seq_len": 5, "max_length": 4096, "pad_token_id": 7, "max_sequences": 64}


def assert_same(found: PackedLayout, expected: PackedLayout) -> None:
    """Every fact and every part."""
    assert found.spec == expected.spec
    for name in _FACTS:
        assert getattr(found, name) == getattr(expected, name), name
        assert type(getattr(found, name)) is type(getattr(expected, name)), name
    for name in expected._parts:
        if name not in ("header", "end"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@hypothesis.given(structures(), st.integers(1, 6), st.booleans(), st.sampled_from([None, 3]))
def test_a_tensor_carries_all_of_it(structure, multiple, has_room, spare):
    row = make_row(structure)
    row.input_ids = row.input_ids.int() if multiple == 1 else row.input_ids
    length = 2 * build(row, seq_multiple=multiple).num_expanded * multiple if has_room else None
    layout = build(row, seq_multiple=multiple, fixed_length=length)
    needed = PackedLayout.tensor_size(layout.num_seqs, len(row.input_ids), layout.num_images)
    tensor = layout.to_tensor(None if spare is None else needed + spare)
    assert tensor.dtype == torch.int32 and tensor.numel() == needed + (spare or 0)
    for sent in (tensor, tensor[None], tensor.long()):
        assert_same(PackedLayout.from_tensor(sent), layout)
    # What a stage without tokens needs: the front of the same tensor.
    sent = layout.to_tensor(boundaries_only=True)
    assert torch.equal(sent[HEADER_SIZE:], tensor[HEADER_SIZE : sent.numel()])
    found = PackedLayout.from_tensor(sent)
    assert not found.has_tokens and found.num_expanded == layout.num_expanded
    assert found.max_seqlen == layout.max_seqlen and found.has_tail == layout.has_tail
    for name in ("cu_seqlens_padded", "cu_seqlens_expanded", "position_ids", "padding_mask"):
        assert torch.equal(getattr(found, name), getattr(layout, name)), name
    assert torch.equal(found.tail_length, layout.tail_length)
    assert found.input_ids is None and found.cu_image_embeddings is None
    assert torch.equal(found.to_tensor(), sent)
    with pytest.raises(mp.PackingError, match="this layout holds boundaries only"):
        expand_tokens(found)


def test_the_tensor_is_the_layout():
    layout = build(make_row(NAMED["T63-N5-B3"]), **SPEC)
    assert layout.to_tensor() is layout.tensor
    assert PackedLayout.from_tensor(layout.tensor).tensor.data_ptr() == layout.tensor.data_ptr()
    assert layout.to("cpu") is layout


def test_every_layout_sends_its_header(monkeypatch):
    """Whoever made it exact, and whenever."""
    edges = torch.tensor([0, 579, 1157], dtype=torch.int32)
    layout = PackedLayout.from_boundaries(edges, 1160)
    assert PackedLayout.from_tensor(layout.to_tensor()).max_seqlen == 579
    ids = torch.tensor([11, IMAGE, 21])
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    with monkeypatch.context() as patch:  # as on a GPU
        patch.setattr("mcore_packing.layout.may_look", lambda tensor: False)
        layout = PackedLayout.build(ids, cu_seqlens, [7], space="collapsed", num_image_embeddings=7)
        assert not layout.is_exact
        layout = layout.exact_later()()
    sent = PackedLayout.from_tensor(layout.to_tensor())
    assert (sent.max_seqlen, sent.num_expanded) == (8, 9)


def test_every_part_begins_at_a_multiple_of_16_bytes():
    for num_seqs in range(1, 9):
        for num_tokens in range(1, 9):
            for num_images in range(9):
                parts = parts_of(num_seqs, num_tokens, num_images)
                sizes = list(parts.values())
                assert all(begin % 4 == 0 for begin, _ in sizes)
                assert all(b + n <= c for (b, n), (c, _) in itertools.pairwise(sizes))


def test_moves_and_pickles():
    layout = build(make_row(NAMED["T63-N5-B3"]), seq_multiple=4, **SPEC)
    assert_same(pickle.loads(pickle.dumps(layout)), layout)
    moved = layout.to("meta")
    assert moved.tensor.is_meta and moved.spec is layout.spec
    assert [getattr(moved, name) for name in _FACTS] == [getattr(layout, name) for name in _FACTS]


def test_a_narrow_view_is_copied_to_where_kernels_can_read_it():
    # As broadcast_data gives them: an offset that Triton would compile another variant for.
    layout = build(make_row(NAMED["T63-N5-B3"]))
    received = torch.cat([torch.zeros(1, dtype=torch.int32), layout.to_tensor()])[1:]
    found = PackedLayout.from_tensor(received)
    assert_same(found, layout)
    assert found.tensor.storage_offset() == 0 != received.storage_offset()
    found = expand_tokens(found).source, source_positions(found, layout.num_image_embeddings).images
    expected = (
        expand_tokens(layout).source,
        source_positions(layout, layout.num_image_embeddings).images,
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_tensor_that_is_no_layout_is_refused():
    layout = build(make_row(NAMED["T63-N5-B3"]))
    tensor = layout.to_tensor()
    wrong, old, faulty = tensor.clone(), tensor.clone(), tensor.clone()
    wrong[0] += 1
    old[0] = 0x6C617932
    faulty[HEADER_SIZE] = 2
    for given, message in (
        (wrong, "is not what PackedLayout.to_tensor"),
        (old, "was written by mcore_packing 0.1: run the same version everywhere"),
        (faulty, "is not what PackedLayout.to_tensor"),
        (tensor[:-4], "is not what PackedLayout.to_tensor"),
        (tensor[:5], r"the layout is \[5\]"),
        (tensor.float(), "the layout is torch.float32"),
        (tensor.tolist(), "the layout is list"),
    ):
        with pytest.raises(mp.PackingError, match=message):
            PackedLayout.from_tensor(given)
    with pytest.raises(mp.PackingError, match="but size=9"):
        layout.to_tensor(9)


def test_a_damaged_or_foreign_tensor_is_a_typed_error():
    rng = random.Random("damage")
    outcomes = {"refused": 0, "unharmed": 0}
    for trial in range(4000):
        structure = NAMED[rng.choice(list(NAMED))]
        layout = build(make_row(structure), seq_multiple=rng.choice([1, 2, 8]), **SPEC)
        tensor = layout.to_tensor(boundaries_only=rng.random() < 0.3).clone()
        kind = rng.choice(["entry", "front", "cut", "moved", "noise", "other"])
        if kind in ("entry", "front"):
            size = HEADER_SIZE + STATUS_SIZE if kind == "front" else tensor.numel()
            for _ in range(rng.randint(1, 3)):
                tensor[rng.randrange(size)] = rng.choice([-1, 0, 1, 5, 2**31 - 1, -(2**31), trial])
        elif kind == "cut":
            tensor = tensor[: rng.randrange(tensor.numel())]
        elif kind == "moved":
            tensor = tensor.roll(rng.choice([-3, -1, 1, 2]))
        elif kind == "noise":
            tensor = torch.randint(-(2**31), 2**31 - 1, tensor.shape).int()
            tensor[0] = layout.tensor[0]
        else:
            tensor = torch.zeros(rng.randint(0, 60), dtype=rng.choice([torch.int32, torch.int64]))
        try:
            found = PackedLayout.from_tensor(tensor)
        except mp.PackingError:
            outcomes["refused"] += 1
            continue
        # What was not refused is a layout that can be used, of the same row.
        assert torch.equal(found.cu_seqlens_padded, layout.cu_seqlens_padded)
        assert found.position_ids.numel() == found.num_expanded
        outcomes["unharmed"] += 1
    assert outcomes["refused"] > 3000 and outcomes["unharmed"] > 50, outcomes


def test_a_spec_travels_whole():
    spec = RowSpec(
        image_token_id=-1, img_seq_len=9, seq_multiple=4, total_multiple=8, max_length=800,
        max_sequences=9, on_overflow="truncate", cp_size=2, pad_token_id=-1,
    )  # fmt: skip
    row = make_row([[0, 0, 0]])
    layout = PackedLayout.build(row.input_ids, row.cu_seqlens, [], spec, space="collapsed")
    assert PackedLayout.from_tensor(layout.to_tensor()).spec == spec
