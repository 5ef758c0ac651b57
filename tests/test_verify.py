"""``parity.verify`` on real parallel jobs, and checkpoints of a model that has the hook."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

import mcore_packing as mp
from mcore_packing.testing import tiny

WORKER = Path(__file__).parent / "verify_worker.py"
SIZE = 28
MOVED = 2


def verify_in_processes(*sizes: str) -> dict:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(WORKER), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0])


@pytest.mark.parametrize(
    "sizes, ranks, copies",
    [
        pytest.param(("--cp", "2"), "01", 1, id="cp2"),
        pytest.param(("--tp", "2"), "01", 2, id="tp2sp"),
        pytest.param(("--pp", "2"), "1", 1, id="pp2"),
    ],
)
def test_verify_on_every_rank(sizes, ranks, copies):
    found = verify_in_processes(*sizes)
    assert found["is_right"] and sorted(found["by_rank"]) == list(ranks)
    assert all(error == pytest.approx(1, abs=1e-6) for error in found["by_rank"].values())
    assert found["num_compared"] == found["num_trained"] * copies
    assert found["all_agree"] and found["is_training"] and not found["has_gradients"]
    wrong = {sequence for _, sequence in found["wrong"]}
    assert MOVED in wrong and wrong <= {MOVED - 1, MOVED}, found["says"]  # beside the boundary
    assert f"sequence {MOVED} (" in found["says"]


def make_row(model, **options):
    packer = mp.data.get_packer("concatenative", mp.row_spec(model), **options)
    return packer.join(tiny.samples(4, img_size=SIZE))


@pytest.mark.usefixtures("megatron")
def test_verify_finds_a_layer_that_ignores_boundaries():
    model = tiny.llava_model("rope", img_size=SIZE)
    mp.install(model)
    row = make_row(model)
    assert mp.parity.verify(model, row).is_right
    attention = model.language_model.decoder.layers[0].self_attention.core_attention

    def ignore_boundaries(module, args, kwargs):
        params = kwargs["packed_seq_params"]
        whole = params.cu_seqlens_q_padded[[0, -1]]
        params = dataclasses.replace(params, cu_seqlens_q=whole, cu_seqlens_q_padded=whole)
        return args, {**kwargs, "packed_seq_params": params}

    attention.register_forward_pre_hook(ignore_boundaries, with_kwargs=True)
    found = mp.parity.verify(model, row)
    assert {error.sequence for error in found.wrong} == {1, 2, 3}  # the first sees no other
    assert found.token_mult_prob_error > 1.001


@pytest.mark.usefixtures("megatron")
def test_verify_refuses_a_row_that_is_not_its_samples():
    model = tiny.llava_model("rope", img_size=SIZE)
    samples = tiny.samples(4, img_size=SIZE)
    samples = [{**sample, "labels": sample["input_ids"]} for sample in samples]
    row = mp.data.get_packer("concatenative", mp.row_spec(model)).join(samples)
    row.layout.cu_seqlens_collapsed[3] += 1
    with pytest.raises(mp.PackingError, match="sequence 2 of the row is not its sample"):
        mp.parity.verify(model, row)
    with pytest.raises(mp.PackingError, match="interleaved"):
        mp.parity.verify([model, model], row)


@pytest.mark.usefixtures("megatron")
def test_checkpoints_do_not_know_the_hook():
    plain, hooked = (tiny.llava_model("rope", img_size=SIZE, seed=seed) for seed in (0, 1))
    names, shards = list(hooked.state_dict()), hooked.sharded_state_dict()
    mp.install(hooked)
    state = hooked.state_dict()
    assert list(state) == names
    for name, tensor in hooked.named_parameters():
        assert state[name].data_ptr() == tensor.data_ptr()

    found = hooked.sharded_state_dict()
    assert found.keys() == shards.keys()
    for name, shard in shards.items():
        assert type(found[name]) is type(shard)
        if isinstance(shard, ShardedTensor):
            assert vars(found[name].without_data()) == vars(shard.without_data())

    plain.load_state_dict(state)
    assert all(map(torch.equal, plain.parameters(), hooked.parameters()))
    other = tiny.llava_model("rope", img_size=SIZE, seed=2)
    hooked.load_state_dict(other.state_dict())
    assert all(map(torch.equal, other.parameters(), hooked.parameters()))
