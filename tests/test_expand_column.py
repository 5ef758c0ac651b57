"""Columns through a layout: the loss mask's rule, for any dtype and width."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

import mcore_packing as mp
from mcore_packing.data import Column
from mcore_packing.testing.host_reads import HostReads

from .packs import IMAGE, build, lay_out, make_row, structures

multiples = st.sampled_from([(1, 1), (4, 8), (2, 6)])


def oracle(row, values: list, spec: Column, multiple: tuple[int, int]) -> list:
    """What every position gets, one sequence after the other, in plain Python."""
    out, counts = [], iter(row.tokens_per_image.tolist())
    ids = row.input_ids.tolist()
    for begin, end in row.spans():
        for token in range(begin, end):
            before_image = token + 1 < end and ids[token + 1] == IMAGE
            value = spec.fill if spec.shifted and before_image else values[token]
            if ids[token] != IMAGE:
                out.append(value)
            else:
                out += [value if spec.images == "repeat" else spec.fill] * next(counts)
        out += [spec.fill] * (-len(out) % multiple[0])
    return out + [spec.fill] * (-len(out) % multiple[1])


@settings(max_examples=300)
@given(structures(), st.booleans(), st.sampled_from(["fill", "repeat"]), multiples)
def test_every_position_gets_what_plain_python_says(structure, shifted, images, multiple):
    row, spec = make_row(structure), Column(-1, shifted, images)
    layout = build(row, seq_multiple=multiple[0], total_multiple=multiple[1])
    values = torch.arange(row.input_ids.numel()) + 1
    expected = oracle(row, values.tolist(), spec, multiple)
    found = mp.expand_column(layout, values, spec)
    assert found.tolist() == expected and found.dtype == torch.int64
    wide = torch.stack([values, 2 * values], dim=1).to(torch.float16)
    found = mp.expand_column(layout, wide[None], spec)
    assert found[:, 0].tolist() == expected and found.dtype == torch.float16


@settings(max_examples=200)
@given(structures(), multiples)
def test_a_shifted_column_moves_as_the_loss_mask(structure, multiple):
    row = make_row(structure)
    layout = build(row, seq_multiple=multiple[0], total_multiple=multiple[1])
    _, expected = mp.expand_labels(layout, None, row.loss_mask)
    found = mp.expand_column(layout, row.loss_mask, Column(0.0, shifted=True))
    assert torch.equal(found, expected)


@given(structures(), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_ranks_have_the_column_among_them(structure, cp_size, shifted):
    row = make_row(structure)
    multiple = 2 * cp_size if cp_size > 1 else 1
    layout = build(row, seq_multiple=multiple, total_multiple=multiple)
    values, spec = torch.rand(row.input_ids.numel()), Column(0.5, shifted, "repeat")
    whole = mp.expand_column(layout, values, spec)
    for rank in range(cp_size):
        local = mp.cp_partition(layout.cu_seqlens_padded, layout.num_expanded, cp_size, rank)
        found = mp.expand_column(layout, values, spec, cp_size=cp_size, cp_rank=rank)
        assert torch.equal(found, whole[local])


def test_a_plain_row_only_gets_its_padding():
    ids, cu_seqlens = torch.tensor([5, IMAGE, 6]), torch.tensor([0, 2, 3], dtype=torch.int32)
    layout = lay_out(ids, cu_seqlens, [], None, expands=False, seq_multiple=4)
    found = mp.expand_column(layout, torch.tensor([True, True, False]), Column(False, shifted=True))
    assert found.tolist() == [True, True, False, False, False, False, False, False]
    assert mp.expand_column(layout, torch.tensor([7, 8, 9])).tolist() == [7, 8, 0, 0, 9, 0, 0, 0]


def test_nothing_waits_for_the_gpu():
    with FakeTensorMode():
        ids = torch.tensor([5, 6, IMAGE, 7], device="cuda:0")
        cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device="cuda:0")
        counts = torch.tensor([3], device="cuda:0")
        layout = lay_out(ids, cu_seqlens, counts, num_image_embeddings=3)
        with HostReads() as reads:
            for images in ("fill", "repeat"):
                column = torch.zeros(4, 2, device="cuda:0")
                found = mp.expand_column(layout, column, Column(0.0, True, images))
        assert reads.found == [] and found.shape == (layout.num_expanded, 2)


@pytest.mark.parametrize(
    "column, spec, match",
    [
        ([1.0], 0, "column is a list"),
        (torch.zeros(()), 0, "column is a Tensor"),
        (torch.zeros(3), 0, "column has 3 entries, but the row 2 tokens"),
        (torch.zeros(2), "x", "fill of a column is 'x'"),
    ],
)
def test_what_is_no_column_is_refused(column, spec, match):
    row = make_row([[0, 0]])
    with pytest.raises(mp.PackingError, match=match):
        mp.expand_column(build(row), column, spec)


@pytest.mark.parametrize("fields", [{"images": "zero"}, {"shifted": 1}, {"fill": None}])
def test_a_column_is_said_in_its_words(fields):
    with pytest.raises(mp.PackingError):
        Column(**fields)
