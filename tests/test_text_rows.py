"""Rows without an image, in a run whose other rows have some."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mcore_packing as mp

from . import processes
from .models import RELEASE, SIZE, arguments, both_expansions, install, model_of

WORKER = Path(__file__).parent / "text_rows_worker.py"
MEGATRONS_DUMMY = RELEASE.keeps_text_rows  # of the projector
TOWER, BOTH = ("vision_model",), ("vision_model", "vision_projection")

pytestmark = pytest.mark.usefixtures("megatron")


def text_row(sizes=(9, 20)) -> dict:
    return arguments([{"input_ids": torch.randint(1, 500, (size,))} for size in sizes])


def tiles_seen(model) -> list[int]:
    """How many tiles each call of the vision model gets."""
    seen = []
    model.vision_model.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    return seen


# In real processes


@pytest.mark.parametrize(
    "wrap, frozen",
    [
        pytest.param("ddp", (), id="ddp"),
        pytest.param("fsdp2", (), id="fsdp2"),
        pytest.param("ddp", TOWER, id="ddp-frozen-tower", marks=pytest.mark.slow),
        pytest.param("fsdp2", TOWER, id="fsdp2-frozen-tower", marks=pytest.mark.slow),
        pytest.param("fsdp2", BOTH, id="fsdp2-frozen-both", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_both_rows_in_one_process(wrap, frozen):
    found = processes.result(WORKER, wrap, *frozen)
    dummy = 0 if MEGATRONS_DUMMY and wrap == "ddp" and frozen else 1
    for steps in found.values():
        assert steps["worst"] < 1e-6 and steps["largest"] > 1e-3
    assert found["images first"]["encoded"] == [[7, 7, dummy, 7], [7, dummy, dummy, 7]]
    assert found["text first"]["encoded"] == [[7, 7, dummy, 7], [dummy, 7, 7, 7]]


# In one


@both_expansions
def test_one_tile_of_zeros_takes_part(ours):
    if not ours and not MEGATRONS_DUMMY:
        pytest.skip("see the next test")
    model, given = model_of(), text_row()
    with torch.no_grad():
        expected = model(**{**given, "packed_seq_params": None})[0]
    seen = tiles_seen(model)
    with install(model, ours=ours):
        loss, mask = model(**given)
        (loss * mask).sum().backward()
    assert seen == [1]
    torch.testing.assert_close(loss[:, :9], expected[:, :9], rtol=0, atol=1e-5)
    grads = [weight.grad for weight in model.vision_model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


@both_expansions
def test_a_dummy_of_the_caller_is_the_only_one(ours):
    model, given = model_of(), text_row()
    model.vision_model._is_fsdp_managed_module = True  # else Megatron's own takes none
    given["images"] = torch.randn(1, 3, SIZE, SIZE)
    seen = tiles_seen(model)
    with install(model, ours=ours):
        loss, mask = model(**given)
        (loss * mask).sum().backward()
    assert seen == [1]
    grads = [weight.grad for weight in model.vision_model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def frozen(model):
    model.freeze(False, True, True)


@pytest.mark.parametrize("case", ["no-gradients", "frozen", "stage-without-tower"])
def test_nobody_waits(case):
    model, given = model_of(), text_row()
    if case == "frozen":
        frozen(model)
    if case == "stage-without-tower":
        model.add_encoder = False
    seen = tiles_seen(model)
    with install(model), torch.set_grad_enabled(case != "no-gradients"):
        model(**given)
    assert seen == []


def test_a_frozen_tower_that_fsdp_gathers_takes_part():
    model, given = model_of(), text_row()
    frozen(model)
    model.vision_model._is_fsdp_managed_module = True
    seen = tiles_seen(model)
    with install(model), torch.no_grad():
        model(**given)
    assert seen == [1]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_takes_no_dummy_says_so_where_others_could_wait(num_ranks, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: num_ranks)
    cases = [(True, "pass one small image")]
    if not MEGATRONS_DUMMY:
        cases.append((False, "_is_fsdp_managed_module is True: set it"))
    for ours, message in cases:
        model, given = model_of(), text_row((8, 20))
        if ours:
            model.vision_model.dynamic_resolution = True
        with install(model, ours=ours):
            if num_ranks == 1:
                model(**given)
                continue
            with pytest.raises(mp.PackingError, match=message):
                model(**given)
