"""Pipeline stages: what those without images or tokens are told, and what they tell."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing.megatron import plan
from mcore_packing.megatron.spec import stage_length
from mcore_packing.testing import tiny

from .models import SIZE, arguments, install, model_of

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def middle_stage():
    """A stage without tokens, and how to call it."""
    stage = model_of("rope", pre_process=False, post_process=False, add_encoder=False)

    def run(params, length, **options):
        stage.set_input_tensor(torch.randn(length, 1, 64))
        nothing = dict.fromkeys(("images", "input_ids", "position_ids", "attention_mask"))
        with mp.install(stage, **options), torch.no_grad():
            return stage(**nothing, packed_seq_params=params)[0]

    run.stage = stage
    return run


def test_a_last_stage_without_looking(like_a_gpu):
    # It sees tokens but no images, so only the fixed length of pipelines tells it its size.
    whole, samples = model_of("rope", max_sequence_length=400), tiny.samples(3, img_size=SIZE)
    last = model_of("rope", max_sequence_length=400, pre_process=False, add_encoder=False)
    whole._language_is_pipeline_parallel = last._language_is_pipeline_parallel = True
    last.set_input_tensor(torch.randn(400, 1, 64))
    with install(whole), install(last), torch.no_grad():
        expected, expected_mask = whole(**arguments(samples))
        loss, mask = last(**{**arguments(samples), "images": None})
    assert loss.shape == expected.shape == (1, 400)
    torch.testing.assert_close(mask, expected_mask, rtol=0, atol=0)


def test_a_stage_without_tokens_takes_what_carries_its_layout(middle_stage, sent_layout, seen):
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    calls = seen(middle_stage.stage)
    layout = sent_layout(given, model, total_multiple=510, max_length=510)
    received = mp.PackedLayout.from_tensor(layout.to_tensor(boundaries_only=True))
    for sent in (layout, received):
        out = middle_stage(mp.packed_seq_params(sent), 510)
        assert out.shape == (510, 1, 64)
        params = calls[-1]["packed_seq_params"]
        assert type(params) is PackedSeqParams and params.max_seqlen_q == layout.max_seqlen
        assert torch.equal(params.cu_seqlens_q, layout.cu_seqlens_padded)
    with pytest.raises(mp.PackingError, match="has 510 positions, but this stage has 400"):
        middle_stage(mp.packed_seq_params(received), 400)


@pytest.mark.parametrize("shared_by_tp, length", [(False, 24), (True, 96)])
def test_a_stage_counts_the_positions_of_all_its_ranks(middle_stage, shared_by_tp, length):
    stage = middle_stage.stage
    stage.context_parallel_lm, stage.tensor_model_parallel_size_lm = 3, 4
    stage.sequence_parallel_lm = shared_by_tp
    stage.set_input_tensor(torch.randn(8, 1, 64))
    assert stage_length(stage) == (length, torch.device("cpu"))


def test_a_stage_without_tokens_guesses_nothing(middle_stage, seen):
    # Collapsed boundaries of a row that a bucket padded can end where the stage's rows do.
    calls = seen(middle_stage.stage)
    params = arguments(tiny.samples(3, img_size=SIZE))["packed_seq_params"]
    length = int(params.cu_seqlens_q[-1])
    for space in (None, "collapsed"):
        with pytest.raises(mp.PackingError, match="cannot tell what its boundaries count"):
            middle_stage(params, length, space=space)
    declared = middle_stage(params, length + 30, space="expanded")
    assert declared.shape[0] == length + 30
    assert calls[-1]["packed_seq_params"].cu_seqlens_q[-1] == length + 30
    with pytest.raises(mp.PackingError, match="but this stage has 210 positions"):
        middle_stage(params, 210, space="expanded")
    params.cu_seqlens_q = params.cu_seqlens_kv = params.cu_seqlens_q.flip(0)
    with pytest.raises(mp.PackingError, match="cu_seqlens starts at"):
        middle_stage(params, length, space="expanded")


def test_a_stage_without_tokens_on_a_gpu(middle_stage, like_a_gpu, no_layers, seen):
    no_layers(middle_stage.stage, like_a_gpu)
    calls = seen(middle_stage.stage)
    params = arguments(tiny.samples(3, img_size=SIZE))["packed_seq_params"]
    middle_stage(params, 300, space="expanded")
    assert like_a_gpu == ["queued", "read", "layer"]
    found = calls[-1]["packed_seq_params"]
    assert found.max_seqlen_q == int(found.cu_seqlens_q.diff().max())
    params.cu_seqlens_q[1] = 999
    like_a_gpu.clear()
    with pytest.raises(mp.PackingError, match="sequence 1: cu_seqlens decreases"):
        middle_stage(params, 300, space="expanded")
    assert like_a_gpu == ["queued", "read"]


@pytest.mark.skipif(
    "seq_idx" not in PackedSeqParams.__dataclass_fields__, reason="this megatron-core has none"
)
def test_a_stage_without_tokens_gets_its_seq_idx(middle_stage, seen, monkeypatch):
    # Mamba layers read nothing else, and treat None as one sequence.
    edges = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    spec = mp.row_spec(middle_stage.stage)
    params = mp.packed_seq_params(mp.PackedLayout.from_boundaries(edges, 8, spec))
    assert params.seq_idx is None
    calls = seen(middle_stage.stage)
    monkeypatch.setattr(plan, "_HYBRIDS", (torch.nn.Module,))
    middle_stage(params, 8)
    assert calls[-1]["packed_seq_params"].seq_idx.tolist() == [[0, 0, 0, 2, 2, 2, 2, 2]]
    assert params.seq_idx is None
