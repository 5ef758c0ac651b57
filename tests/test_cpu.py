"""``megatron_on_cpu``: what it makes possible, and that it puts everything back."""

import subprocess
import sys

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.multimodal import llava_model
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker, random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_packing import cpu, parity
from mcore_packing.testing import tiny


def touched():
    names = ("HAVE_TE", "HAVE_TEX", "TEDotProductAttention", "is_te_min_version", "tex")
    return {
        "Tensor.cuda": torch.Tensor.cuda,
        "Module.cuda": torch.nn.Module.cuda,
        "cuda": {name: getattr(torch.cuda, name) for name in dir(torch.cuda)},
        "random": {name: value for name, value in vars(random).items() if callable(value)},
        "fork": random.CudaRNGStatesTracker.fork,
        "norm": WrappedTorchNorm.__dict__["__new__"],
        "clip": CLIPViTModel.__init__.__defaults__,
        "llava": {name: getattr(llava_model, name, "missing") for name in names},
        "groups": (torch.distributed.is_initialized(), parallel_state.is_initialized()),
    }


def test_it_restores_everything_it_touched():
    before = touched()
    for _ in range(2):
        with cpu.megatron_on_cpu():
            assert torch.distributed.is_initialized() and parallel_state.is_initialized()
            tiny.llava_model(img_size=28)
        assert touched() == before
    with pytest.raises(ZeroDivisionError), cpu.megatron_on_cpu():
        _ = 1 / 0
    assert touched() == before


def test_cuda_calls_land_on_the_cpu():
    with cpu.megatron_on_cpu():
        x = torch.zeros(3, device="cuda")
        assert x.device.type == torch.tensor([1], device="cuda:0").device.type == "cpu"
        copy = torch.zeros(1).expand(3).cuda()
        copy[0] = 1  # a copy: the expanded tensor has one element
        assert copy.tolist() == [1, 0, 0]


def test_the_random_tracker_forks():
    with cpu.megatron_on_cpu():
        torch.manual_seed(0)
        outside = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            first = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), outside)
        with get_cuda_rng_tracker().fork():
            second = torch.rand(3)
        assert not torch.equal(first, second)


def test_experts_that_exchange_tokens():
    language = {
        "num_moe_experts": 4,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
    }
    with cpu.megatron_on_cpu():
        model = tiny.llava_model(img_size=28, language=language)
        row = {**parity.collate(tiny.samples(1, img_size=28)), "cu_seqlens": None}
        loss, _ = parity.forward(model, row)
        loss.sum().backward()
        assert loss.isfinite().all()
    assert getattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None) is None


def test_torchruns_processes_are_one_world():
    code = (
        "import torch.distributed as dist; from mcore_packing import cpu\n"
        "with cpu.megatron_on_cpu(): assert dist.get_world_size() == 2"
    )
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "--no-python", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_norms_carry_the_sequence_parallel_mark():
    with cpu.megatron_on_cpu():
        for sequence_parallel in (False, True):
            config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
            config.sequence_parallel = sequence_parallel
            norm = WrappedTorchNorm(config, 8)
            assert {p.sequence_parallel for p in norm.parameters()} == {sequence_parallel}
            assert config.sequence_parallel is sequence_parallel


def test_a_model_trains():
    with cpu.megatron_on_cpu():
        model = tiny.llava_model(img_size=28, language={"hidden_dropout": 0.1})
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        row = {**parity.collate(tiny.samples(1, img_size=28)), "cu_seqlens": None}
        losses = []
        for _ in range(5):
            loss, mask = parity.forward(model, row)
            loss = (loss * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
