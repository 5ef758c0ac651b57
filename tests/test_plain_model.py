"""A plain VLM around Megatron's real ``GPTModel``: packed as one by one."""

from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing.testing import plain

from . import processes

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(params=["rope", "learned_absolute"])
def model(request):
    return plain.plain_vlm(request.param).double()


def alone(model, sample: dict) -> torch.Tensor:
    """Losses of a sample by itself, without packing: ``[t]``, the last one is no prediction."""
    ids = sample["input_ids"][None]
    media = {name: sample[name] for name in ("pixel_values", "image_grid_thw") if name in sample}
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    return model(ids, torch.arange(ids.shape[1])[None], labels=labels, **media)[0]


def test_a_packed_row_is_its_samples(model):
    samples = plain.plain_samples(7, dtype=torch.float64)
    spec = mp.row_spec(model)
    assert not spec.expands and spec.image_token_id == plain.IMAGE_TOKEN_ID
    rows, report = mp.data.pack(samples, spec, 48, family="qwen2_5_vl")
    assert not report.refused and len(rows) > 1
    for row in rows:
        losses = model(**row.inputs())[0]
        for start, index in zip(row.layout.cu_seqlens_padded.tolist(), row.indices, strict=False):
            expected = alone(model, samples[index])
            here = slice(start, start + expected.numel())
            trained = row.loss_mask[0, here] > 0
            assert trained.sum() > 0
            difference = (losses[here] - expected)[trained].abs().max()
            assert difference < 1e-9


def test_without_boundaries_it_would_not_be(model):
    samples = plain.plain_samples(4, dtype=torch.float64)
    packer = mp.data.get_packer("first_fit", mp.row_spec(model), family="qwen2_5_vl")
    row = packer.join(samples)
    whole = torch.tensor([0, row.layout.num_expanded], dtype=torch.int32)
    params = PackedSeqParams("thd", whole, whole, None, None, int(whole[1]), int(whole[1]))
    right, wrong = (
        model(**row.inputs())[0],
        model(**row.inputs() | {"packed_seq_params": params})[0],
    )
    assert (right - wrong)[row.loss_mask[0] > 0].abs().max() > 1e-3


def run_ranks(*options: str) -> dict:
    """Summed losses of each sample, packed and alone, on one rank or on two."""
    worker = Path(__file__).with_name("plain_worker.py")
    return processes.result(worker, *options, processes=2 if options else 1)


@pytest.fixture(scope="module")
def one_process():
    return run_ranks()


@pytest.mark.parametrize(
    "options, multiples",
    [(("--cp", "2"), [4, 4]), (("--tp", "2"), [1, 2])],
    ids=["cp2", "tp2sp"],
)
def test_under_parallelism_it_is_what_one_process_computes(one_process, options, multiples):
    found = run_ranks(*options)
    assert found["multiples"] == multiples
    for way in ("packed", "alone"):
        assert found[way][:7] == pytest.approx(one_process["alone"], rel=1e-5)
    assert one_process["packed"][:7] == pytest.approx(one_process["alone"], rel=1e-5)
    assert sum(found["packed"][7:]) == 0  # of the tail


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, (1, 1, 4096, None)),
        ({"context_parallel_size": 2}, (4, 4, 4096, None)),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, (1, 2, 4096, None)),
        ({"pipeline_model_parallel_size": 2}, (1, 1, 4096, 4096)),
        ({"pipeline_model_parallel_size": 2, "variable_seq_lengths": True}, (1, 1, 4096, None)),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, (1, 16, 4096, None)),
    ],
)
def test_what_a_plain_model_asks_of_a_row(config, expected):
    """By its config, as it is read when rows are made."""
    model = plain.plain_vlm()
    vars(model.language_model.config).update(config)
    for given in (model, [model], torch.nn.Sequential(model)):
        spec = mp.row_spec(given)
        found = spec.seq_multiple, spec.total_multiple, spec.max_length, spec.fixed_length
        assert found == expected and spec.cp_size == config.get("context_parallel_size", 1)
    captured = mp.row_spec(model, max_sequences=8)
    assert (captured.fixed_length, captured.max_sequences) == (4096, 8)


def test_what_is_no_model_is_refused():
    with pytest.raises(mp.PackingError, match="Linear holds 0 LLaVAModels, expected one, or a"):
        mp.row_spec(torch.nn.Linear(2, 2))
