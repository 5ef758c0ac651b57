"""Rows for a job: loss weights, the objective through Megatron's schedule, as many rows as it
takes."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from megatron.core.pipeline_parallel import get_forward_backward_func

import mcore_packing as mp
from mcore_packing.data import algorithms
from mcore_packing.testing import plain, tiny

SPEC = mp.RowSpec(img_seq_len=4)
KINDS = ["token", "sample", "square"]
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=20)


def text(length: int, **others) -> dict:
    return {"input_ids": torch.arange(1, length + 1), **others}


def make_samples(sizes) -> list[dict]:
    return [text(size, __key__=str(index)) for index, size in enumerate(sizes)]


# Weights


@given(lengths, st.sampled_from(KINDS))
def test_weights_are_what_they_say_and_have_mean_one(sizes, kind):
    rows, _ = mp.data.pack(make_samples(sizes), SPEC, 16, loss_weights=kind)
    rows, of_sample = list(rows), {}
    for row in rows:
        assert row.loss_mask.dtype == torch.float32
        assert row.num_trained == int((row.loss_mask > 0).sum())
        for index, mask in zip(
            row.indices,
            row.loss_mask[0].split(row.layout.cu_seqlens_collapsed.diff().tolist()),
            strict=True,
        ):
            assert torch.equal(mask > 0, torch.arange(sizes[index]) < sizes[index] - 1)
            of_sample[index] = mask[:-1]
    total = sum(row.num_trained for row in rows)
    if total:
        mean = sum(float(mask.double().sum()) for mask in of_sample.values()) / total
        assert mean == pytest.approx(1, abs=1e-6)
    power = {"token": 0, "sample": 1, "square": 0.5}[kind]
    scaled = [float(mask[0]) * len(mask) ** power for mask in of_sample.values() if len(mask)]
    assert scaled == pytest.approx(scaled[:1] * len(scaled), rel=1e-5)


def test_a_row_by_itself_has_mean_one():
    packer = mp.data.get_packer("first_fit", SPEC, 64, loss_weights="sample")
    row = packer.join(make_samples([3, 9]))
    assert float(row.loss_mask.sum()) == pytest.approx(row.num_trained) == 10
    assert row.loss_mask[0, 0] == 4 * row.loss_mask[0, 3]


def test_one_over_n_is_no_sum_of_a_mask():
    """Megatron's own loss functions count ``loss_mask.sum().to(torch.int)`` tokens."""
    rounded = [n for n in range(2, 5000) if int((torch.ones(n) / n).sum().to(torch.int)) == 0]
    assert len(rounded) > 1000
    rows, _ = mp.data.pack([text(101), text(3)], SPEC, 101, loss_weights="sample")
    for row, number in zip(rows, (100, 2), strict=True):
        assert float(row.loss_mask.sum()) == pytest.approx(51)  # each sample counts alike
        _, count, said = mp.data.loss_func(torch.ones(1, number + 1), row)
        assert int(count) == row.num_trained == int(said["lm loss"][1]) == number


# The objective, in models


def losses(model, row) -> torch.Tensor:
    """``[1, S]`` in fp64: Megatron's own cross entropy computes in fp32."""
    inputs = row.to(dtype=torch.float64).inputs() | {"labels": None}
    output, labels = model(**inputs), row.labels[0]
    if row.layout.spec.expands:
        output, (labels, _) = output[0], mp.expand_labels(row.layout, row.labels, None)
    logits = output.reshape(labels.numel(), -1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")[None]


def run(model, rows, per_token: bool, loss_func=mp.data.loss_func):
    """Loss and gradients of rows as micro-batches of Megatron's schedule."""
    model.config.calculate_per_token_loss = per_token
    model.config.finalize_model_grads_func = None
    counts = []

    def forward_step(iterator, model):
        row = next(iterator)
        output = losses(model, row)

        def objective(output):
            found = loss_func(output, row)
            counts.append(int(found[1]))
            return found

        return output, objective

    model.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=model,
        num_microbatches=len(rows),
        seq_length=8,
        micro_batch_size=1,
        forward_only=False,
    )
    scale = 1 / max(sum(counts), 1) if per_token else 1  # as finalize_model_grads does
    gradients = {
        name: parameter.grad * scale
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return gradients, counts


def one_by_one(model, samples, kind: str):
    """The weighted mean loss of samples, each run by itself, and its gradients."""
    model.zero_grad()
    packer = mp.data.get_packer("first_fit", mp.row_spec(model), family=family_of(model))
    alone = [packer.join([sample]) for sample in samples]
    numbers = [row.num_trained for row in alone]
    weights = [
        {"token": 1.0, "sample": 1 / max(n, 1), "square": max(n, 1) ** -0.5}[kind] for n in numbers
    ]
    scale = sum(numbers) / sum(n * w for n, w in zip(numbers, weights, strict=True))
    total = 0
    for row, weight in zip(alone, weights, strict=True):
        weight = float(torch.tensor(weight * scale).float())  # as the mask has it
        total = total + mp.data.loss_func(losses(model, row), row)[0] * weight
    (total / sum(numbers)).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def family_of(model):
    return "qwen2_5_vl" if isinstance(model, plain.PlainVLM) else None


def models():
    yield "plain", plain.plain_vlm("rope").double(), plain.plain_samples(6, dtype=torch.float64)
    llava = tiny.llava_model("rope", img_size=28, language_layers=2)
    yield "llava", llava.double(), tiny.samples(5, img_size=28, dtype=torch.float64)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_token", [True, False], ids=["per-token", "per-micro-batch"])
def test_the_packed_objective_is_that_of_its_samples(kind, per_token):
    """With ``calculate_per_token_loss`` off Megatron averages each micro-batch: of one there."""
    for name, model, samples in models():
        expected = one_by_one(model, samples, kind)
        if name == "llava":
            mp.install(model)
        options = {"family": family_of(model), "loss_weights": kind}
        capacity = {"plain": 24, "llava": 200}[name] if per_token else None
        rows, report = mp.data.pack(samples, mp.row_spec(model), capacity, **options)
        assert not report.refused and (len(rows) > 1) == per_token
        gradients, counts = run(model, list(rows), per_token)
        assert counts == [row.num_trained for row in rows]
        assert gradients.keys() == expected.keys()
        for parameter, grad in gradients.items():
            assert (grad - expected[parameter]).abs().max() < 1e-9, (name, parameter)


@pytest.mark.usefixtures("megatron")
def test_empty_rows_change_nothing():
    """In our loss function and in Megatron's, which divides by what is left of the mask."""

    def megatrons(loss, row):
        mask = row.loss_mask.reshape(-1)
        total = (loss.reshape(-1).float() * mask).sum()
        return total, mask.sum().to(torch.int), {"lm loss": total.detach()}

    model = plain.plain_vlm("rope").double()
    samples = plain.plain_samples(4, dtype=torch.float64)
    options = {"family": "qwen2_5_vl", "num_rows_multiple": 3, "fill_rows": "empty"}
    rows, report = mp.data.pack(samples, mp.row_spec(model), **options)
    assert len(rows) == 3 and report.num_empty == 2 and report.num_rows == 3
    assert "empty rows, which fill up the job: 2" in str(report)
    assert [row.num_trained > 0 for row in rows] == [True, False, False]
    for loss_func in (mp.data.loss_func, megatrons):
        expected, _ = run(model, [rows[0]], True, loss_func)
        found, counts = run(model, list(rows), True, loss_func)
        assert counts[1:] == [0, 0]
        for name, grad in found.items():
            assert (grad - expected[name]).abs().max() < 1e-12
    found, _ = run(model, [rows[1]], False)  # nothing to divide by
    assert all(not grad.any() for grad in found.values())


def test_a_loss_of_another_length_is_refused():
    row = mp.data.get_packer("first_fit", SPEC, 64).join([text(8)])
    with pytest.raises(mp.PackingError, match="loss has 4 positions, expected 8"):
        mp.data.loss_func(torch.zeros(1, 4), row)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(KINDS), st.booleans())
def test_the_ranks_objectives_add_up(sizes, kind, expands):
    spec = mp.RowSpec(img_seq_len=4, seq_multiple=4, cp_size=2, expands=expands)
    packer = mp.data.get_packer("first_fit", spec, loss_weights=kind)
    row = packer.join(make_samples(sizes))
    loss = torch.rand(1, row.layout.num_expanded)
    whole, count, _ = mp.data.loss_func(loss, row)
    parts = []
    for rank in range(2):
        local = row.positions_of(rank)
        parts.append(mp.data.loss_func(loss[:, local], row, cp_rank=rank))
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole), rel=1e-5)
    assert sum(int(part[1]) for part in parts) == int(count) == row.num_trained


# As many rows as a job takes


@settings(max_examples=200)
@given(lengths, st.integers(1, 6), st.sampled_from(["split", "empty"]), st.booleans())
def test_rows_come_in_multiples(sizes, multiple, fill, balance):
    samples = make_samples(sizes)
    options = {"num_rows_multiple": multiple, "fill_rows": fill, "balance": balance}
    try:
        rows, report = mp.data.pack(samples, SPEC, 16, **options)
    except mp.PackingError as error:
        assert fill == "split" and "too few to fill up the rows of a job" in str(error)
        plain_rows, _ = mp.data.pack(samples, SPEC, 16, balance=balance)
        assert -(-len(plain_rows) // multiple) * multiple > len(sizes)
        return
    assert len(rows) % multiple == 0 and report.num_rows == len(rows)
    packed = [index for row in rows for index in row.indices]
    assert sorted(packed) == list(range(len(sizes)))
    for row in rows:
        assert row.layout.num_expanded <= 16
        if not row.indices:
            assert row.num_trained == 0 == float(row.loss_mask.sum())
            assert (row.labels == -100).all() and mp.data.split(row) == []
    assert sum(not row.indices for row in rows) == report.num_empty
    assert fill == "empty" or report.num_empty == 0
    assert [row.indices for row in rows[1:]] == [row.indices for row in rows][1:]


@given(lengths, st.integers(1, 4))
def test_a_row_has_so_many_samples(sizes, most):
    rows, _ = mp.data.pack(make_samples(sizes), SPEC, 64, max_sequences=most)
    assert all(len(row.indices) <= most for row in rows)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(3, 5))
def test_a_row_has_so_many_tiles(tiles, most):
    samples = []
    for number in tiles:
        ids = torch.tensor([5] + [-200] * (number > 0))
        images = torch.zeros(number, 3, 2, 2)
        samples.append({"input_ids": ids, "images": images, "num_image_tiles": [number][:number]})
    rows, report = mp.data.pack(samples, SPEC, max_tiles=most)
    assert not report.refused and all(len(row.images) <= most for row in rows)


def test_the_vision_tower_counts_when_rows_are_balanced():
    """Two long texts and two short samples with many tiles: not both images in one row."""
    image = {"input_ids": torch.tensor([-200]), "images": torch.zeros(8, 3, 2, 2)}
    image["num_image_tiles"] = [8]
    samples = [text(8), text(8), image, image]
    spec = mp.RowSpec(img_seq_len=1)
    rows, report = mp.data.pack(samples, spec, 16, balance=True, vision_cost=100.0)
    assert [len(row.images) for row in rows] == [8, 8]
    before, after = report.imbalance
    assert before > after == 0 and "the row that costs most" in str(report)
    assert (report + report).imbalance == report.imbalance
    assert mp.data.pack(samples, spec, 16)[1].imbalance is None
    packer = mp.data.get_packer("first_fit", mp.RowSpec(img_seq_len=1, seq_multiple=4), 16)
    measured = packer.measure([text(3), image], pytest.fail)
    assert packer.costs(measured) == [4**2, 8**2 + packer.vision_cost * 8]


def test_bins_that_cost_most_are_divided():
    bins = [[0, 1, 2], [3, 4]]
    algorithms.split_bins(bins, [5, 1, 1, 2, 2], 2)
    assert sorted(map(sorted, bins)) == [[0], [1, 2], [3], [4]]
    with pytest.raises(mp.PackingError, match="5 samples are 1 too few"):
        algorithms.split_bins(bins, [5, 1, 1, 2, 2], 2)


def test_a_report_is_plain_figures():
    import json

    _, report = mp.data.pack(make_samples([3, 99, 1]), SPEC, 16, balance=True)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["num_untrained"] == 1 and found["causes"] == {"SampleTooLong": 1}
    assert found["fill"] == report.fill and found["refused"][0]["index"] == 1


@pytest.mark.parametrize(
    "options, match",
    [
        ({"loss_weights": "mean"}, "loss_weights is 'mean', expected 'token' or 'sample'"),
        ({"fill_rows": "drop"}, "fill_rows is 'drop'"),
        ({"num_rows_multiple": 0}, "num_rows_multiple is 0"),
        ({"max_sequences": True}, "max_sequences is True"),
        ({"max_tiles": 1.5}, "max_tiles is 1.5"),
        ({"vision_cost": -1}, "vision_cost is -1"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(mp.PackingError, match=match):
        mp.data.get_packer("first_fit", SPEC, 32, **options)
