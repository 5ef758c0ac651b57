"""scripts/long_run.py: what its ranks train on, and what it says of them."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

import mcore_packing as mp

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def long_run(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import long_run

    monkeypatch.setattr(long_run, "WORKERS", 0)
    return long_run


@pytest.fixture
def loader(long_run, monkeypatch):
    """A rank's loader."""

    def make(rank=0):
        monkeypatch.setattr(long_run.parallel_state, "get_data_parallel_rank", lambda: rank)
        spec = mp.RowSpec(img_seq_len=4)
        packer = mp.data.get_packer("first_fit", spec, long_run.CAPACITIES[0])
        return long_run.WorkersLoader(long_run.train_llava.shapes.Conversations(10_000), packer)

    return make


def ids(rows) -> list[list[int]]:
    return [row.input_ids[0].tolist() for row in rows]


def test_a_loader_goes_on_where_it_was(long_run, loader):
    first, state, num_steps = loader(), None, 12
    taken = []
    for step in range(num_steps):
        if step == num_steps // 2:
            state = first.state_dict()
        taken.append(ids(first.take(long_run.ROWS_PER_STEP, 0, long_run.RANKS)))
    assert first.state["first_sample"] > 0  # into another buffer
    second = loader()
    second.load_state_dict(state)
    for rows in taken[num_steps // 2 :]:
        assert ids(second.take(long_run.ROWS_PER_STEP, 0, long_run.RANKS)) == rows


def test_the_ranks_share_the_rows(long_run, loader):
    ranks = [loader(rank) for rank in range(long_run.RANKS)]
    for _ in range(3):
        taken = [one.take(long_run.ROWS_PER_STEP, 0, long_run.RANKS) for one in ranks]
        rows = [row for pair in zip(*taken, strict=True) for row in pair]
        assert len({tuple(one) for one in ids(rows)}) == long_run.ROWS_PER_STEP
        begin = ranks[0].state["rows_taken"] - long_run.ROWS_PER_STEP
        expected = itertools.islice(ranks[0].rows, begin, begin + len(rows))
        assert ids(rows) == ids(expected)


def test_rows_are_long_and_short_and_some_are_text_alone(long_run):
    found = long_run.composition()
    assert found["shortest"] < 100 < 1000 < found["longest"]
    assert 0.1 < found["text_alone"] / found["looked_at"] < 0.5


def job(losses, kills=()) -> SimpleNamespace:
    seen = [(float(m), "rank", m % 2, m % 2, 500.0 + m // 50, 120) for m in range(60)]
    seen += [(1.0, "worker", 0, 7, 300.0, 90)]
    log = [{"loss": loss} for loss in losses]
    return SimpleNamespace(seen=seen, kills=list(kills), log=lambda: log, minutes=60.0)


def test_a_loss_that_differs_is_counted(long_run, tmp_path):
    kill = {"minute": 20.0, "what": "rank", "step": 2}
    jobs = {"killed": job([3.0, 2.0, 1.5], [kill]), "alone": job([3.0, 2.0, 1.0, 0.5])}
    found = long_run.report(jobs)
    assert found["steps_compared"] == 3 and found["losses_that_differ"] == 1
    assert found["alone"]["mib_of_ranks"]["last 10 %"] == 501.0
    assert found["alone"]["most_descriptors"] == 120 and found["kills"] == [kill]
    long_run.draw(jobs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
