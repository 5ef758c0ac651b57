"""``isolation`` and ``verify`` in one process: broken models are found, right ones are not, and
what a check could not have seen makes it inconclusive."""

import dataclasses
import json

import pytest
import torch

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.parity import content
from mcore_packing.testing import broken, tiny

from .models import SIZE, model_of

pytestmark = pytest.mark.usefixtures("megatron")
COUNT = 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(dtype=torch.float32, positions="learned_absolute", count=COUNT, untrained=(), **kwargs):
    """A model with the hook, and a row for it."""
    model = model_of(positions, **kwargs).to(dtype)
    mp.install(model)
    samples = tiny.samples(count, img_size=SIZE)
    for sequence in untrained:
        samples[sequence]["labels"] = torch.full_like(samples[sequence]["input_ids"], -100)
    return model, mp.data.get_packer("concatenative", mp.row_spec(model)).join(samples)


def leaking(found) -> set[int]:
    return {leak.sequence for leak in found.leaks}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"positions": "rope"}, {"language": broken.EXPERTS}],
    ids=["learned", "rope", "experts"],
)
def test_a_right_model_is_right(dtype, settings):
    model, row = make(dtype, **settings)
    found, compared = parity.isolation(model, row), parity.verify(model, row, gradients=True)
    assert found.verdict == "right" and found.is_right, str(found)
    assert compared.verdict == "right", str(compared)
    assert found.floor == 0 or "language" in settings  # experts round by what others hold
    assert found.num_passes <= 4 or "language" in settings
    assert compared.floor > 0 and {g.verdict for g in compared.gradients} == {"right"}


BEHIND = set(range(1, COUNT))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "break_it, leaks",
    [
        (broken.deaf, BEHIND),
        (broken.deaf_in_one_layer, BEHIND),
        (broken.one_late, BEHIND),
        (broken.one_early, BEHIND),
        (broken.last_one_late, {COUNT - 1}),  # its first token belongs to the one before
        (broken.late_at_an_image, {broken.AT_IMAGE}),
        (broken.late_where_nothing_is_trained, {broken.UNTRAINED + 1}),
        (broken.tower_mixes_tiles, {0, 1, 2, 4, 5}),  # all with images
        (broken.tiles_swapped, {0, 5}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_isolation_finds_and_names(break_it, leaks, dtype):
    untrained = broken.UNTRAINED, broken.UNTRAINED + 1
    model, row = make(dtype, untrained=untrained)
    break_it(model)
    found = parity.isolation(model, row)
    assert found.verdict == "wrong"
    assert leaking(found) == leaks, str(found)
    if break_it is broken.deaf:
        assert {leak.sequence: leak.sees for leak in found.leaks} == {
            sequence: tuple(range(sequence)) for sequence in BEHIND
        }
        assert "sequence 3 sees 0, 1, 2 (" in str(found)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_experts_that_drop_tokens_leak(dtype):
    model, row = make(dtype, language=broken.DROPPING_EXPERTS)
    assert parity.isolation(model, row).verdict == "wrong"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_verify_sees_positions_which_isolation_cannot(dtype):
    model, row = make(dtype)
    broken.positions_run_on(model)
    assert parity.isolation(model, row).is_right
    found = parity.verify(model, row)
    assert found.verdict == "wrong" and {error.sequence for error in found.wrong} == BEHIND


def test_verify_names_gradients_by_part():
    model, row = make(positions="rope")
    broken.deaf(model)
    found = parity.verify(model, row, gradients=True)
    parts = {error.part: error for error in found.gradients}
    assert parts.keys() == {"language_model", "vision_model", "vision_projection"}
    for error in parts.values():
        assert error.verdict == "wrong" and error.relative_difference > 0.1 and error.cosine < 0.99
    assert "WRONG: gradient of vision_model in replica 0: relative difference" in str(found)


def test_exhaustive_lets_no_pair_hide():
    model, row = make()

    def see_the_first(module, args, out):  # sequence 2 gets a tile of sequence 0: an even number
        out = out.clone()
        if len(out) > 3:
            out[3] = out[3] + out[0]
        return out

    model.vision_model.register_forward_hook(see_the_first)
    assert parity.isolation(model, row).is_right
    found = parity.isolation(model, row, exhaustive=True)
    assert [(leak.sequence, leak.sees) for leak in found.leaks] == [(2, (0,))]


# What could not be seen


def test_one_sample_is_inconclusive():
    model, row = make(count=1)
    found, compared = parity.isolation(model, row), parity.verify(model, row)
    assert (found.verdict, compared.verdict) == ("inconclusive", "inconclusive")
    assert "a row of one sample has nobody to see" in str(found) and not found.is_right
    assert "a row of one sample has no boundary to get wrong" in str(compared)


def test_a_sample_that_nothing_can_change_is_inconclusive():
    model, row = make()
    (ids,) = row.input_ids[:, : row.layout.cu_seqlens_collapsed[4]]
    found = parity.isolation(model, row, keep_ids=ids.tolist())
    assert found.verdict == "inconclusive"
    assert "its own change makes no difference behind it (sequences 3" in str(found)  # no image


def test_tokens_that_see_only_themselves_are_inconclusive():
    model, row = make()

    def attend(module, args, kwargs):
        params = kwargs["packed_seq_params"]
        alone = torch.arange(args[0].shape[0] + 1, dtype=torch.int32)
        names = "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"
        params = dataclasses.replace(params, **dict.fromkeys(names, alone))
        return args, {**kwargs, "packed_seq_params": params}

    for layer in model.language_model.decoder.layers:
        attention = layer.self_attention.core_attention
        attention.register_forward_pre_hook(attend, with_kwargs=True)
    found = parity.isolation(model, row)
    assert found.verdict == "inconclusive" and len(found.blind) == COUNT


def test_what_verify_could_not_have_seen_is_inconclusive():
    tiny_weights = {"init_method_std": 1e-3}
    model, row = make(torch.bfloat16, "rope", language=tiny_weights, vision=tiny_weights)
    broken.deaf(model)
    found = parity.verify(model, row)
    assert found.verdict == "inconclusive", str(found)
    assert "no boundary at all would not be seen (sequences 1, 2, 3, 4, 5)" in str(found)
    assert parity.isolation(model, row).verdict == "wrong"  # whatever the weights


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_model_that_does_not_repeat_is_compared_with_its_noise(is_deaf):
    model, row = make()
    noise = torch.Generator().manual_seed(0)

    def disturb(module, args, out):
        return out * (1 + 1e-5 * torch.randn(out.shape, generator=noise))

    model.language_model.embedding.register_forward_hook(disturb)
    if is_deaf:
        broken.deaf(model)
    found = parity.isolation(model, row)
    assert found.floor > 0 and "where rounding makes" in str(found)
    assert found.verdict == ("wrong" if is_deaf else "right"), str(found)


# What is left, and what is refused


def test_checks_leave_nothing_behind():
    model, row = make(positions="rope")
    model.train()
    model.vision_model.eval()  # frozen
    model.language_model.register_buffer("count", torch.zeros(1))

    def counter(module, args):
        module.count += 1

    model.language_model.register_forward_pre_hook(counter)
    model(**row.inputs())[0].mean().backward()
    model._packing_hook.plan.seen.in_evaluation = False
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state, seen = torch.get_rng_state(), model._packing_hook.plan.seen
    count = model.language_model.count.item()
    samples = tiny.samples(3, img_size=SIZE)
    parity.isolation(model, row)
    parity.verify(model, row, gradients=True)
    parity.compare(model, samples, gradients=True)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and model.language_model.count == count
    assert model._packing_hook.plan.seen is seen and not seen.in_evaluation
    assert seen.compared == {True}
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)


def test_a_model_without_model_type_runs():
    model, row = make()
    del model.model_type
    assert parity.verify(model, row).is_right and not hasattr(model, "model_type")


def test_findings_are_plain_for_logs():
    model, row = make(count=3)
    broken.deaf(model)
    samples = tiny.samples(3, img_size=SIZE)
    for found in (
        parity.isolation(model, row),
        parity.verify(model, row, gradients=True),
        parity.compare(model, samples, gradients=True),
    ):
        plain = json.loads(json.dumps(found.to_dict()))
        assert plain["verdict"] == "wrong" and plain["is_right"] is False
        if not isinstance(found, parity.Isolation):
            assert plain["token_mult_prob_error"] == found.token_mult_prob_error


@pytest.mark.parametrize("check", [parity.isolation, parity.verify])
def test_rows_that_are_not_their_samples_are_refused(check):
    model, row = make()
    edges = row.layout.cu_seqlens_collapsed.tolist()
    with pytest.raises(mp.PackingError, match="the row has 5 sequences, but was packed with 6"):
        check(model, content.laid_out_anew(row, edges[:2] + edges[3:]))
    edges[3] += 1
    with pytest.raises(mp.PackingError, match="sequence 2 of the row is not its sample"):
        check(model, content.laid_out_anew(row, edges))
    other = mp.data.get_packer("concatenative", mp.RowSpec(image_token_id=-1, img_seq_len=5))
    with pytest.raises(mp.PackingError, match="image_token_id"):
        samples = tiny.samples(2, img_size=SIZE)
        for sample in samples:
            sample["input_ids"][sample["input_ids"] == -200] = -1
        check(model, other.join(samples))
    row.labels[0, 5] = -200  # a placeholder, which the loss mask trains
    row.loss_mask[0, 5] = 1
    with pytest.raises(mp.PackingError, match="label 5 of the row is -200 and trained"):
        check(model, row)


@pytest.mark.parametrize("check", [parity.isolation, parity.verify])
def test_models_and_steps_that_cannot_be_run_are_refused(check):
    model, row = make(count=2)
    with pytest.raises(mp.PackingError, match="holds 0 LLaVAModels"):
        check(torch.nn.Linear(2, 2), row)
    with pytest.raises(mp.PackingError, match="no config of Megatron's"):
        check(torch.nn.Linear(2, 2), row, lambda model, inputs: inputs["labels"])
    mean = lambda model, inputs: model(**inputs)[0].mean()  # noqa: E731
    with pytest.raises(mp.PackingError, match=r"the last stage gave \[\], expected the loss of"):
        check(model, row, mean)
    plain = dataclasses.replace(row.layout.spec, expands=False, seq_multiple=64, max_length=None)
    layout = mp.PackedLayout.build(row.input_ids, row.layout.cu_seqlens_collapsed, [], plain)
    with pytest.raises(mp.PackingError, match="filled up as its boundaries say"):
        check(model, dataclasses.replace(row, layout=layout), mean)


def test_old_names():
    model, row = make(count=2)
    with pytest.raises(mp.PackingError, match="tolerance"):
        parity.verify(model, row, tolerance=0.1)


def test_nothing_trained_is_nothing_verified():
    model, row = make(untrained=range(COUNT))
    with pytest.raises(mp.PackingError, match="nothing to verify"):
        parity.verify(model, row)
    assert parity.isolation(model, row).is_right  # which needs no labels
