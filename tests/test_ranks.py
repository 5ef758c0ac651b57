"""Ranks that share a row, and were given different ones."""

from pathlib import Path

import pytest
import torch

import mcore_packing as mp
from mcore_packing.megatron.ranks import fingerprint

from . import processes

WORKER = Path(__file__).parent / "ranks_worker.py"


@pytest.fixture(scope="module", params=["--cp", "--tp"])
def told(request):
    """What each of two ranks was told, by case."""
    return processes.result(WORKER, request.param, "2")


def test_the_same_row(told):
    assert told["same"] == [["nothing"] * 3] * 2


@pytest.mark.parametrize("case", ["other", "moved", "evaluation"])
def test_both_are_told_of_another_row(told, case):
    for rank in told[case]:
        assert len(rank) == 1 and rank[0].startswith("rank 1 was given another row than rank 0")
        assert "get_data_parallel_rank()" in rank[0]


@pytest.mark.parametrize(
    "case, own", [("faulty", "the last boundary is 41"), ("unpacked", "this stage got no")]
)
def test_a_fault_of_one_stops_both(told, case, own):
    (other,), (faulty,) = told[case]
    assert other.startswith("rank 1 found a fault in its row") and faulty.startswith(own)


def test_a_later_row_is_compared_where_one_asks(told):
    for rank in told["later"]:
        assert rank[:2] == ["nothing"] * 2 and rank[2].startswith("rank 1 was given another row")


def test_nothing_is_compared_unasked(told):
    assert told["not asked"] == [["nothing"] * 3] * 2


def layout_of(ids, edges, counts):
    edges = torch.tensor(edges, dtype=torch.int32)
    return mp.PackedLayout.build(ids[None], edges, counts, space="collapsed")


def test_a_fingerprint_tells_rows_apart():
    rows = []
    for ids, edges, counts in (
        ([1, -200, 2, -200, 3, 4], [0, 3, 6], [2, 3]),
        ([1, -200, 2, -200, 4, 3], [0, 3, 6], [2, 3]),
        ([1, -200, 2, -200, 3, 4], [0, 2, 6], [2, 3]),
        ([1, -200, 2, -200, 3, 4], [0, 3, 6], [3, 2]),
        ([2, -200, 1, -200, 3, 4], [0, 3, 6], [2, 3]),
    ):
        ids = torch.tensor(ids)
        layout = layout_of(ids, edges, counts)
        rows.append(tuple(fingerprint(layout, ids).tolist()))
        assert rows[-1] == tuple(fingerprint(layout, ids[None]).tolist())
    assert len(set(rows)) == len(rows) and all(all(row) for row in rows)


def test_a_stage_without_tokens_compares_boundaries():
    ids = torch.tensor([1, -200, 2, -200, 3, 4])
    first, same, moved = (
        layout_of(*case)
        for case in ((ids, [0, 3, 6], [2, 3]), (ids + 7, [0, 3, 6], []), (ids, [0, 2, 6], [2, 3]))
    )
    words = [fingerprint(layout, None).tolist() for layout in (first, first, moved)]
    assert words[0] == words[1] != words[2]
    assert fingerprint(same, None).tolist() != words[0]  # another length
