"""The GPU that a CPU answers for refuses what a GPU refuses."""

import pytest
import torch

from mcore_packing.testing.pretend_gpu import pretended_gpu


@pytest.fixture(autouse=True)
def gpu():
    with pretended_gpu():
        yield
        torch.cuda.set_sync_debug_mode("default")


def test_what_it_changes_comes_back():
    with pretended_gpu():
        pass
    assert torch._dynamo.config.disable  # as the fixture has it


def test_tensors_say_where_they_were_made():
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    assert x.is_cuda and x.device == torch.device("cuda", 0) and not y.is_cuda
    derived = x + 1, x[1:], torch.zeros_like(x), x.new_empty(2), y.cuda(), y.to("cuda", x.dtype)
    assert all(z.is_cuda for z in derived)
    back = x.cpu(), x.to("cpu"), torch.empty(3).copy_(x), torch.ones(3, device="cpu")
    assert not any(z.is_cuda for z in back)
    model = torch.nn.Linear(3, 3).to("cuda", torch.bfloat16)
    out = model(x.bfloat16())
    out.sum().backward()
    assert out.is_cuda and model.weight.is_cuda and model.weight.grad.is_cuda
    padded = torch.nn.utils.rnn.pad_sequence([x, x[1:]], True)
    assert padded.is_cuda


def test_devices_do_not_mix():
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        x + y
    assert (x + torch.tensor(1.0)).is_cuda  # a scalar may
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


WAITS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x + 1),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).to("cuda"),
    "new values": lambda x: torch.tensor([1.0], device="cuda"),
    "copy": lambda x: torch.empty(3).copy_(x),
}
FREE = {
    "arithmetic": lambda x: x * 2 + 1,
    "a value for all that a mask names": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "equal to itself": lambda x: torch.equal(x, x),
    "not blocking": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "on the host": lambda x: torch.ones(3).tolist(),
    "an event": lambda x: torch.cuda.Event().synchronize(),
    "a full tensor": lambda x: torch.full((3,), 7.0, device="cuda"),
}


@pytest.mark.parametrize("what", WAITS)
def test_waiting_is_found(what):
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        WAITS[what](x)
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing CUDA operation"):
        WAITS[what](x)


@pytest.mark.parametrize("what", FREE)
def test_not_waiting_passes(what):
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    FREE[what](x)


def test_a_graph_replays_on_what_its_memory_holds():
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        y = (x * 2).add_(1)
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [11, 11, 11]


@pytest.mark.parametrize("forbidden", ["get_rng_state", "synchronize"])
def test_a_capture_refuses(forbidden):
    with (
        pytest.raises(RuntimeError, match="capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        getattr(torch.cuda, forbidden)()
