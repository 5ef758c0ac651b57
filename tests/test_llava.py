"""The hook on a real LLaVAModel: packed equals one by one, and nothing else changes."""

import concurrent.futures
import copy as copy_module
import dataclasses
import functools
import gc
import inspect
import io
import logging
import pickle
import types
import warnings
import weakref

import pytest
import torch
from megatron.core.models.mamba import MambaModel
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from torch.nn.parallel import DistributedDataParallel

import mcore_packing as mp
from mcore_packing import layout as layout_room
from mcore_packing import ops, parity, versions
from mcore_packing import packed_seq as packed_seq_room
from mcore_packing.testing import tiny
from mcore_packing.testing.host_reads import HostReads
from mcore_packing.versions import takes_boundaries

from .models import (
    OLD,
    POSITIONS,
    RELEASE,
    SIZE,
    Reached,
    arguments,
    install,
    model_of,
    stop_at_language_model,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def seen(monkeypatch):
    """What the language model was called with, call by call."""
    calls = []

    def watch(model):
        hook = lambda module, args, kwargs: calls.append(kwargs)  # noqa: E731
        model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
        return calls

    return watch


# The main job


@pytest.mark.parametrize("count", [1, 4, 16])
def test_forward_packed_vs_batched(count):
    samples = tiny.samples(count)
    for positions in POSITIONS:
        model = tiny.llava_model(positions)
        assert model.img_seq_len == 577
        alone = parity.run_alone(model, samples)
        with install(model):
            result = parity.compare(model, samples, alone)
        assert f"{result.token_mult_prob_error:.6f}" == "1.000000"
        assert result.max_difference < 1e-5 and result.lost_labels == 0
        if positions == "learned_absolute":
            assert parity.compare(model, samples, alone).token_mult_prob_error > 1.05


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_many_packs(positions, fused):
    model = model_of(positions)
    for seed in range(12):
        samples = tiny.samples(1 + seed % 7, img_size=SIZE, seed=seed)
        alone = parity.run_alone(model, samples)
        with install(model, fused=fused):
            result = parity.compare(model, samples, alone)
        assert result.token_mult_prob_error == pytest.approx(1, abs=1e-6)
        assert result.lost_labels == 0


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
@pytest.mark.parametrize(
    "options",
    [
        {"drop_vision_class_token": True},
        {"vision_model_type": "siglip"},
        {"vision_model_type": "internvit", "drop_vision_class_token": True, "pixel_shuffle": True},
        {"img_size": 56},
    ],
    ids=["no-class-token", "siglip", "pixel-shuffle", "16-patches"],
)
def test_vision_towers(options, fused):
    size = options.get("img_size", SIZE)
    model, samples = model_of(**options), tiny.samples(5, img_size=size)
    alone = parity.run_alone(model, samples)
    with install(model, fused=fused):
        result = parity.compare(model, samples, alone)
    assert result.max_difference < 1e-5


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_gradients_equal_one_by_one(dtype, tolerance):
    samples = tiny.samples(6, img_size=SIZE, dtype=dtype)
    packed = gradients(model_of().to(dtype), [parity.pack(samples)], packed=True)
    rows = [{**parity.pack([sample]), "cu_seqlens": None} for sample in samples]
    alone = gradients(model_of().to(dtype), rows)
    assert packed.keys() == alone.keys()
    kinds = ("embedding", "vision_projection", "vision_model", "decoder")
    assert all(any(kind in name for name in packed) for kind in kinds)
    for name, gradient in packed.items():
        error = (gradient - alone[name]).norm() / alone[name].norm().clamp(min=1e-30)
        assert error <= tolerance or alone[name].norm() < 1e-12, (name, error)


def gradients(model, rows, packed=False, **options):
    """Summed gradients of every parameter over rows."""
    model.train()
    handle = install(model, **options) if packed else None
    for row in rows:
        loss, mask = parity.forward(model, row)
        (loss * mask).sum().backward()
    if handle is not None:
        handle.remove()
    named = model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
    ],
    ids=["full", "selective"],
)
def test_activation_recomputation(recompute, fused):
    row = parity.pack(tiny.samples(4, img_size=SIZE))
    plain = gradients(model_of(), [row], packed=True, fused=fused)
    again = gradients(model_of(language=recompute), [row], packed=True, fused=fused)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-9)


# How it is called


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
@pytest.mark.parametrize("way", ["call", "forward", "positional"])
def test_every_way_to_call(way, fused):
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    given = arguments(samples)
    order = ("images", "input_ids", "position_ids", "attention_mask", "labels", "loss_mask")
    with install(model, fused=fused), torch.no_grad():
        if way == "call":
            loss, mask = model(**given)
        elif way == "forward":
            loss, mask = model.forward(**given)
        else:
            positional = [given[name] for name in order]
            rest = [None, given["num_image_tiles"], None, None, given["packed_seq_params"]]
            loss, mask = model.forward(*positional, *rest)
    difference = ((loss[0] + alone).abs() * mask[0]).max()
    assert difference < 1e-5


def test_wrapped_in_float16_module():
    model = model_of().bfloat16()
    model.config.bf16 = True
    wrapped = Float16Module(model.config, model)
    samples = tiny.samples(4, img_size=SIZE)
    alone = parity.run_alone(wrapped, samples)
    with install(wrapped):
        result = parity.compare(wrapped, samples, alone)
    assert result.token_mult_prob_error < 1.01
    assert parity.compare(wrapped, samples, alone).token_mult_prob_error > 1.05


def test_wrapped_in_ddp():
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    wrapped = DistributedDataParallel(model)
    handle = install(wrapped)
    assert parity.compare(wrapped, samples).max_difference < 1e-5
    handle.remove()
    assert "forward" not in model.__dict__


def test_labels_none_gives_logits():
    model, samples = model_of(parallel_output=False), tiny.samples(3, img_size=SIZE)
    alone = [
        model(**{**arguments([sample]), "labels": None, "packed_seq_params": None})[0]
        for sample in samples
    ]
    with install(model):
        logits, mask = model(**{**arguments(samples), "labels": None})
    assert mask is None
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_expanded_boundaries_pass_as_the_same_object(seen, caplog):
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    calls = seen(model)
    lengths = [pair[0].numel() for pair in parity.run_alone(model, samples)]
    expanded = torch.tensor([0, *lengths]).cumsum(0).int()
    for fused in (True, False):
        given = arguments(samples, expanded)
        longest = dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), max(lengths))
        given["packed_seq_params"] = dataclasses.replace(given["packed_seq_params"], **longest)
        with (
            mp.install(model, fused=fused) as handle,
            caplog.at_level(logging.INFO, logger="mcore_packing"),
            torch.no_grad(),
        ):
            caplog.clear()
            assert handle.space == "auto"
            loss, mask = model(**given)
            model(**given)
            assert handle.space == "expanded"
        assert calls[-1]["packed_seq_params"] is given["packed_seq_params"]
        assert ((loss[0] + alone).abs() * mask[0]).max() < 1e-5
        said = [r.getMessage() for r in caplog.records if r.name.startswith("mcore_packing")]
        assert said == ["the boundaries of the first packed row are expanded"]  # said once


def test_the_tail_is_covered(seen):
    # Tokens past the last boundary: a sequence of their own, so that no row stays uninitialised.
    model, samples = model_of(), tiny.samples(3, img_size=SIZE)
    calls = seen(model)
    given = arguments(samples)
    given["packed_seq_params"].cu_seqlens_q = given["packed_seq_params"].cu_seqlens_q[:-1]
    given["packed_seq_params"].cu_seqlens_kv = given["packed_seq_params"].cu_seqlens_q
    with install(model), torch.no_grad():
        loss, _ = model(**given)
    params = calls[-1]["packed_seq_params"]
    assert params.cu_seqlens_q.numel() == 4 and params.cu_seqlens_q[-1] == loss.shape[1]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_text_only(fused):
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 1, 20)]
    model = model_of("rope")
    with install(model, fused=fused):
        assert parity.compare(model, samples).max_difference < 1e-5


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_text_only_with_fsdps_dummy_image(fused):
    model = model_of()
    model.vision_model._is_fsdp_managed_module = True
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 20)]
    given = arguments(samples)
    expected = model(**given)[0]
    given["images"] = torch.randn(1, 3, SIZE, SIZE)
    with install(model, fused=fused):
        loss, mask = model(**given)
        (loss * mask).sum().backward()
    torch.testing.assert_close(loss[:, :9], expected[:, :9], rtol=0, atol=1e-5)
    grads = [parameter.grad for parameter in model.vision_model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_images_of_nobody_are_refused():
    model = model_of()
    given = arguments([{"input_ids": torch.randint(1, 500, (9,))}])
    given["images"] = torch.randn(1, 3, SIZE, SIZE)
    with install(model) as handle:
        if RELEASE.keeps_text_rows:  # there they take part with weight zero
            model(**given)
        else:
            with pytest.raises(mp.PlaceholderMismatch, match="images have 5 rows"):
                model(**given)
        handle.check()


def test_another_context_parallel_size_is_refused():
    if not hasattr(PackedSeqParams(), "local_cp_size"):
        pytest.skip("this megatron-core has no local_cp_size")
    model, given = model_of(), arguments(tiny.samples(1, img_size=SIZE))
    given["packed_seq_params"].local_cp_size = 2
    with install(model), pytest.raises(mp.PackingError, match="local_cp_size is 2"):
        model(**given)


def alone_mask(model, samples):
    """The loss mask of samples that are run one by one, one behind the other."""
    return torch.cat([pair[1] for pair in parity.run_alone(model, samples)])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_truncation_at_the_models_length(fused, seen, caplog):
    samples = tiny.samples(4, img_size=SIZE)
    whole = model_of("rope")
    short = model_of("rope", max_sequence_length=150)
    calls = seen(short)
    with install(short, fused=fused), pytest.raises(mp.PackingError, match="there is room for 150"):
        short(**arguments(samples))
    cut = {"fused": fused, "on_overflow": "truncate"}
    with install(whole, fused=fused), install(short, **cut), torch.no_grad():
        expected, expected_mask = whole(**arguments(samples))
        loss, mask = short(**arguments(samples))
    lost = int(alone_mask(whole, samples)[150:].sum())
    (said,) = [r.getMessage() for r in caplog.records if "trained tokens" in r.getMessage()]
    assert said.startswith(f"{lost} trained tokens do not fit the row of 150")
    assert loss.shape == mask.shape == (1, 150) and expected.shape[1] > 150
    assert calls[-1]["packed_seq_params"].cu_seqlens_q.max() == 150
    torch.testing.assert_close(mask, expected_mask[:, :150], rtol=0, atol=0)
    torch.testing.assert_close(loss * mask, (expected * expected_mask)[:, :150], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
@pytest.mark.parametrize("longest", [120, 400])
def test_the_fixed_length_of_pipelines(fused, longest, seen):
    model, samples = model_of("rope", max_sequence_length=longest), tiny.samples(3, img_size=SIZE)
    calls = seen(model)
    model._language_is_pipeline_parallel = True
    with install(model, fused=fused, on_overflow="truncate"), torch.no_grad():
        loss, mask = model(**arguments(samples))
    cu_seqlens = calls[-1]["packed_seq_params"].cu_seqlens_q
    assert loss.shape == mask.shape == (1, longest) and cu_seqlens[-1] == longest
    alone = torch.cat([pair[0] for pair in parity.run_alone(model_of("rope"), samples)])[:longest]
    size = alone.numel()
    assert ((loss[0, :size] + alone) * mask[0, :size]).abs().max() < 1e-5
    assert not mask[0, size:].any()


# What passes through, and what is refused


def outcome(model, given):
    """The loss, or what Megatron raises."""
    try:
        return model(**given)[0]
    except Exception as error:
        return type(error), str(error)


def test_calls_that_are_not_packed_pass_through():
    model = model_of()
    given = arguments(tiny.samples(1, img_size=SIZE))
    calls = {
        "unpacked": {**given, "packed_seq_params": None},
        "sbhd": {**given, "packed_seq_params": PackedSeqParams(qkv_format="sbhd")},
        "lists, for inference": {**given, "input_ids": [1, 2, 3]},
    }
    expected = {name: outcome(model, call) for name, call in calls.items()}
    assert isinstance(expected["unpacked"], torch.Tensor)
    with install(model):
        found = {name: outcome(model, call) for name, call in calls.items()}
    torch.testing.assert_close(found.pop("unpacked"), expected.pop("unpacked"), rtol=0, atol=0)
    for name, result in found.items():
        same = torch.equal if isinstance(result, torch.Tensor) else tuple.__eq__
        assert same(result, expected[name]), name


def test_on_missing():
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    given = arguments(samples)
    one_sequence = dataclasses.replace(given["packed_seq_params"], qkv_format="sbhd")
    for params, found in ((None, "none"), (one_sequence, "qkv_format 'sbhd'")):
        with (
            install(model, on_missing="raise"),
            pytest.raises(mp.PackingError, match=rf"got no packed_seq_params .* \({found}\)"),
        ):
            model(**{**given, "packed_seq_params": params})


def test_remove_restores_the_model():
    model = model_of()
    before, forward, before_state = dict(model.__dict__), model.forward, model.state_dict()
    handle = install(model)
    assert model.forward != forward and model.forward.__name__ == "forward"
    assert isinstance(model, LLaVAModel) and type(model).__name__ == "LLaVAModel"
    assert inspect.signature(model.forward) == inspect.signature(forward)
    assert model.state_dict().keys() == before_state.keys()
    handle.check()
    handle.remove()
    assert model.__dict__ == before and model.forward == forward and type(model) is LLaVAModel
    assert not model.language_model._forward_pre_hooks
    with pytest.raises(mp.PackingError, match="removed before"):
        handle.remove()
    with install(model):
        assert type(model) is not LLaVAModel
    assert model.__dict__ == before


def test_remove_puts_another_wrapper_back():
    model = model_of()
    model.forward = wrapper = lambda *args, **kwargs: LLaVAModel.forward(model, *args, **kwargs)
    model.forward.__wrapped__ = LLaVAModel.forward.__get__(model)
    handle = install(model)
    handle.remove()
    assert model.__dict__["forward"] is wrapper
    handle = install(model)
    model.forward = wrapper
    with pytest.raises(mp.PackingError, match="someone replaced forward"):
        handle.remove()


def test_copies_of_the_whole_model_are_refused():
    model = model_of()
    copies = (copy_module.deepcopy, pickle.dumps, lambda x: torch.save(x, io.BytesIO()))
    with install(model):
        for copy in copies:
            with pytest.raises(
                mp.PackingError, match=r"remove\(\) the hook, copy or save the model"
            ):
                copy(model)
        torch.save(model.state_dict(), io.BytesIO())
    assert model_of().load_state_dict(model.state_dict())


def test_a_shallow_copy_runs_on_itself():
    model, samples = model_of(), tiny.samples(3, img_size=SIZE)
    with install(model):
        copy = copy_module.copy(model)
        other = model_of(seed=1).vision_projection
        copy._modules = {**model._modules, "vision_projection": other}
        with torch.no_grad():
            given = arguments(samples)
            assert not torch.equal(copy(**given)[0], model(**given)[0])
    with pytest.raises(mp.PackingError, match="is a shallow copy of"):
        copy(**given)


@pytest.mark.parametrize("call", [False, True], ids=["idle", "called"])
def test_an_installed_model_is_freed_with_its_last_reference(call):
    gc.collect()
    gc.disable()
    try:
        model = model_of()
        handle = install(model)
        if call:
            loss, mask = model(**arguments(tiny.samples(2, img_size=SIZE)))
            (loss * mask).sum().backward()
            del loss, mask
        reference = weakref.ref(model)
        del model
        assert reference() is None
        with pytest.raises(mp.PackingError, match="the model is gone"):
            handle.check()
    finally:
        gc.enable()


def test_two_threads_do_not_mix_up_their_calls():
    model = model_of()
    rows = [tiny.samples(1 + seed % 5, img_size=SIZE, seed=seed) for seed in range(8)]

    # Main's transformer layers are not thread-safe.
    shape = model.img_seq_len, model.vision_model.config.hidden_size
    num_values = shape[0] * shape[1]
    model.vision_model.forward = lambda pixels: pixels.flatten(1)[:, :num_values].view(-1, *shape)

    def embeddings_and_boundaries(*args, **kwargs):
        params = kwargs["packed_seq_params"]
        return kwargs["decoder_input"], params.cu_seqlens_q, torch.tensor(params.max_seqlen_q)

    model.language_model.forward = embeddings_and_boundaries
    with install(model), torch.no_grad():
        expected = [model(**arguments(samples))[0] for samples in rows]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda samples: model(**arguments(samples))[0], rows * 6)
    for results, wanted in zip(found, expected * 6, strict=True):
        torch.testing.assert_close(results, wanted)


def test_install_is_refused():
    model = model_of()
    with pytest.raises(mp.PackingError, match="Linear holds 0 LLaVAModels"):
        install(torch.nn.Linear(2, 2))
    with pytest.raises(mp.PackingError, match="str holds 0 LLaVAModels"):
        install("model")
    with pytest.raises(mp.PackingError, match="in the list twice"):
        install([model, model])
    with pytest.raises(mp.PackingError, match="space is 'both'"):
        install(model, space="both")
    with pytest.raises(mp.PackingError, match="on_missing is 'warn'"):
        install(model, on_missing="warn")
    with install(model), pytest.raises(mp.PackingError, match="installed on this model already"):
        install([model_of(), model])
    assert "forward" not in model.__dict__


def test_every_chunk_is_installed_on():
    chunks = [model_of(), DistributedDataParallel(model_of(seed=1))]
    handle = install(chunks)
    for chunk, samples in zip(chunks, (tiny.samples(2, img_size=SIZE),) * 2, strict=True):
        assert parity.compare(chunk, samples).max_difference < 1e-5
    handle.remove()


def test_hybrid_models_need_their_boundaries():
    # Until 0.15, LLaVAModel does not hand packed_seq_params to its MambaModel.
    assert takes_boundaries(MambaModel) == (not OLD)
    model = model_of()
    model.language_model.forward = lambda input_ids, position_ids, attention_mask: None
    with pytest.raises(mp.PackingError, match="passes no packed_seq_params to GPTModel"):
        install(model)
    assert "forward" not in vars(model)


def caught_warnings(model, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = install(model, **options)
    return handle, [str(w.message) for w in caught if "mcore_packing" in str(w.message)]


class Overridden(LLaVAModel):
    """A user's own expansion, with the arguments of Megatron's: it doubles image rows."""

    def _preprocess_data(self, image_embeddings, *args, **kwargs):
        return super()._preprocess_data(2 * image_embeddings, *args, **kwargs)


def test_an_overridden_expansion_keeps_its_own_and_is_warned_about():
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    model.__class__ = Overridden
    handle, (warning,) = caught_warnings(model)
    assert "_preprocess_data of this Overridden are not Megatron's own" in warning
    assert parity.compare(model, samples).max_difference < 1e-5
    handle.remove()
    assert type(model) is Overridden


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("wraps", [True, False])
def test_a_patched_expansion_keeps_its_own_and_is_warned_about(monkeypatch, where, wraps):
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    original = LLaVAModel._preprocess_data

    def double(self, image_embeddings, *args, **kwargs):
        return original(self, 2 * image_embeddings, *args, **kwargs)

    double.__signature__ = inspect.signature(original)
    patch = functools.wraps(original)(double) if wraps else double
    if where == "class":
        monkeypatch.setattr(LLaVAModel, "_preprocess_data", patch)
    else:
        model._preprocess_data = types.MethodType(patch, model)
    handle, (warning,) = caught_warnings(model)
    assert "are not Megatron's own" in warning
    assert parity.compare(model, samples).max_difference < 1e-5
    handle.remove()


def test_an_unknown_release_warns_and_still_remaps(monkeypatch):
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    monkeypatch.setattr(versions, "RELEASES", ())
    handle, (warning,) = caught_warnings(model)
    assert "is of no known release" in warning and "fused=False" in warning
    assert parity.compare(model, samples).max_difference < 1e-5
    handle.remove()


def test_a_forward_that_hides_its_boundaries_is_refused():
    class Hides(LLaVAModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = model_of()
    model.__class__ = Hides
    with pytest.raises(mp.PackingError, match="forward of this Hides has no parameter packed_seq"):
        install(model)
    Hides.forward = functools.wraps(LLaVAModel.forward)(Hides.forward)
    with install(model):
        assert parity.compare(model, tiny.samples(3, img_size=SIZE)).max_difference < 1e-5


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_image_tiles": [1, 1]}, "num_image_tiles is list, expected a tensor"),
        ({"num_image_tiles": None, "images": None}, "num_image_tiles is NoneType"),
        ({"num_image_tiles": torch.ones(1, 1)}, r"num_image_tiles is torch.Size\(\[1, 1\]\)"),
        ({"num_image_tiles": torch.tensor([1, 2])}, "placeholders .* entries in tokens_per_image"),
        ({"num_image_tiles": torch.tensor([0])}, "image 0: tokens_per_image is 0"),
        (
            {"input_ids": torch.ones(2, 20).long()},
            r"\[2, 20\], expected one packed row, \[1, T\]: Megatron",
        ),
        ({"input_ids": torch.ones(1, 20)}, "input_ids is torch.float32"),
    ],
)
def test_bad_calls(change, message, fused):
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if value is not None
    }
    with (
        install(model, fused=fused),
        pytest.raises(mp.PackingError, match=message),
    ):
        model(**{**arguments(samples), **change})
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert parity.compare(model, samples).num_samples == 1  # and it still runs


def test_spare_image_tiles_are_refused():
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    given = {**arguments(samples), "images": torch.randn(3, 3, SIZE, SIZE)}
    with (
        install(model),
        pytest.raises(mp.PlaceholderMismatch, match="become 5 image rows, but there are 15"),
    ):
        model(**given)


def test_one_tile_an_image_is_the_default():
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    with install(model), torch.no_grad():
        given = arguments(samples)
        expected = model(**given)[0]
        given["num_image_tiles"] = None
        assert torch.equal(model(**given)[0], expected)


def test_real_and_padded_boundaries_by_choice(seen):
    model, samples = model_of("rope", max_sequence_length=400), tiny.samples(3, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    calls = seen(model)
    model._language_is_pipeline_parallel = True
    with install(model, pad_between_seqs=True), torch.no_grad():
        loss, mask = model(**arguments(samples))
    params = calls[-1]["packed_seq_params"]
    assert params.cu_seqlens_q[-1] == alone.numel() and params.cu_seqlens_q_padded[-1] == 400
    assert ((loss[0, : alone.numel()] + alone) * mask[0, : alone.numel()]).abs().max() < 1e-5


@pytest.fixture
def no_layers(monkeypatch):
    """Notes when the first layer of a language model runs."""

    def watch(model, events):
        run = lambda module, args: events.append("layer")  # noqa: E731
        model.language_model.decoder.layers[0].register_forward_pre_hook(run)

    return watch


@pytest.mark.parametrize("positions", POSITIONS)
def test_without_looking(like_a_gpu, positions, seen, no_layers):
    model = model_of(positions)
    calls = seen(model)
    no_layers(model, like_a_gpu)
    for seed in range(6):
        samples = tiny.samples(1 + seed, img_size=SIZE, seed=seed)
        alone = parity.run_alone(model, samples)
        like_a_gpu.clear()
        with install(model):
            result = parity.compare(model, samples, alone)
        assert result.max_difference < 1e-5 and result.lost_labels == 0
        # One read, before the language model, and it knows the longest sequence.
        assert like_a_gpu[:3] == ["queued", "read", "layer"]
        params = calls[-1]["packed_seq_params"]
        assert params.cu_seqlens_q.numel() == len(samples) + 2  # the tail is kept, however empty
        assert type(params.max_seqlen_q) is int
        assert params.max_seqlen_q == int(params.cu_seqlens_q.diff().max())


@pytest.mark.parametrize("positions", POSITIONS)
def test_no_value_is_read_before_the_language_model(like_a_gpu, positions):
    model, given = model_of(positions), arguments(tiny.samples(3, img_size=SIZE))
    stop_at_language_model(model)
    with install(model, pad_between_seqs=True), HostReads() as reads, pytest.raises(Reached):
        model(**given)
    assert reads.found == []  # but the status, in one copy
    assert like_a_gpu == ["queued", "read"]
    with HostReads() as reads, pytest.raises(Reached):
        model(**given)
    assert len(reads.found) > 10  # Megatron's own


@pytest.fixture
def sent_layout(monkeypatch):
    """The layout that a data path, on a CPU, would send with these arguments of ``forward``."""

    def build(given, model, **options):
        with monkeypatch.context() as patch:
            for room in (layout_room, packed_seq_room):
                patch.setattr(room, "may_look", lambda tensor: True)
            return mp.PackedLayout.build(
                given["input_ids"],
                given["packed_seq_params"].cu_seqlens_q,
                given["num_image_tiles"] * model.img_seq_len,
                tiny.IMAGE_TOKEN_ID,
                **{**mp.layout_options(model), "space": "collapsed", **options},
            )

    return build


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_a_layout_from_the_data_path_is_used_as_it_is(
    sent_layout, like_a_gpu, monkeypatch, positions, fused, seen
):
    model, samples = model_of(positions), tiny.samples(4, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    calls = seen(model)
    with install(model, space="auto", fused=fused) as handle:
        given = arguments(samples)
        layout = sent_layout(given, model)
        params = mp.packed_seq_params(layout)
        monkeypatch.setattr(ops, "layout", pytest.fail)
        like_a_gpu.clear()
        given["packed_seq_params"] = params
        with torch.no_grad():
            loss, mask = model(**given)
        handle.check()
        stop_at_language_model(model)
        with HostReads() as reads, pytest.raises(Reached):
            model(**given)
    assert like_a_gpu == [] and (not fused or reads.found == [])
    assert ((loss[0] + alone).abs() * mask[0]).max() < 1e-5
    found = calls[-1]["packed_seq_params"]
    assert type(found) is PackedSeqParams and torch.equal(found.cu_seqlens_q, params.cu_seqlens_q)
    assert found.max_seqlen_q == found.max_seqlen_kv == layout.max_seqlen


def test_a_layout_for_another_model_is_refused(sent_layout, like_a_gpu):
    model, given = model_of(max_sequence_length=400), arguments(tiny.samples(3, img_size=SIZE))
    rows = sent_layout(given, model).num_expanded
    cases = [
        ({"total_multiple": 64}, {}, f"has {rows} rows, expected a multiple of 64"),
        ({"seq_multiple": 4}, {"seq_multiple": 2}, "pads sequences to multiples of 2, expected 4"),
        ({"num_padded_rows": 400}, {}, f"has {rows} rows, expected 400: pipelines"),
        ({"max_expanded": 50}, {}, f"has {rows} rows, more than the 50 that"),
        ({"num_image_rows": 30}, {}, "has 35 image rows, but the images have 30"),
    ]
    options = mp.layout_options(model)
    for needs, has, message in cases:
        with pytest.raises(mp.PackingError, match=message):
            packed_seq_room.check_options(sent_layout(given, model, **has), **options | needs)
    with install(model):
        params = mp.packed_seq_params(sent_layout(given, model))
        for name, value in (
            ("images", given["images"][:-1]),
            ("input_ids", torch.ones(1, 9).long()),
        ):
            with pytest.raises(mp.PackingError, match="the layout that came with this row"):
                model(**given | {"packed_seq_params": params, name: value})
    boundaries = mp.PackedLayout.from_tensor(params.layout.to_tensor(boundaries_only=True))
    with install(model), pytest.raises(mp.PackingError, match="but this stage has tokens"):
        model(**given | {"packed_seq_params": mp.packed_seq_params(boundaries)})
    with install(model, fused=False), pytest.raises(mp.PackingError, match="which only fused=True"):
        padded = mp.packed_seq_params(sent_layout(given, model, seq_multiple=8))
        model(**given | {"packed_seq_params": padded})


def test_check_finds_a_layout_of_other_tokens(sent_layout, like_a_gpu):
    # On a GPU nobody compares tokens on the way: check() does, when it is asked.
    model, given = model_of(), arguments(tiny.samples(3, img_size=SIZE))
    with install(model) as handle, torch.no_grad():
        params = mp.packed_seq_params(sent_layout(given, model))
        other = given["input_ids"].clone()
        other[0, -1] += 1
        model(**given | {"packed_seq_params": params, "input_ids": other})
        with pytest.raises(mp.PackingError, match="was made of other input_ids"):
            handle.check()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": [0, 9, 3, 200]}, "sequence 1: cu_seqlens decreases by 6"),
        ({"cu_seqlens": [0, 9, 20, 2000]}, "the last boundary is 2000, past the end"),
        ({"num_image_tiles": [1, 2, 1, 1]}, "become 20 image rows|become 25 image rows"),
        ({"num_image_tiles": [1, -2, 1, 1]}, "image 1: tokens_per_image is -10"),
        ({"num_image_tiles": [1, 2]}, "placeholders .* entries in tokens_per_image"),
    ],
)
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_bad_row_raises_before_any_layer(like_a_gpu, positions, change, message, no_layers):
    model, samples = model_of(positions), tiny.samples(3, img_size=SIZE)
    given = arguments(samples)
    if "cu_seqlens" in change:
        cu_seqlens = torch.tensor(change["cu_seqlens"], dtype=torch.int32)
        given["packed_seq_params"].cu_seqlens_q = cu_seqlens
        given["packed_seq_params"].cu_seqlens_kv = cu_seqlens
    else:
        given["num_image_tiles"] = torch.tensor(change["num_image_tiles"], dtype=torch.int)
    no_layers(model, like_a_gpu)
    with install(model) as handle:
        with pytest.raises(mp.PackingError, match=message):
            model(**given)
        assert like_a_gpu == ["queued", "read"]
        with pytest.raises(mp.PackingError, match=message):
            handle.check()


@pytest.mark.parametrize("positions", POSITIONS)
def test_text_needs_no_read_before_the_language_model(like_a_gpu, positions, no_layers, seen):
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 30, 1)]
    model = model_of(positions)
    alone = parity.run_alone(model, samples)
    no_layers(model, like_a_gpu)
    calls = seen(model)
    with install(model):
        result = parity.compare(model, samples, alone)
        assert result.max_difference < 1e-5
        assert like_a_gpu[:3] == ["queued", "layer", "read"]
        assert calls[-1]["packed_seq_params"].max_seqlen_q == 30
        # A caller that says too little is found out; one whose rows could have a longer tail waits.
        given = arguments(samples)
        given["packed_seq_params"].max_seqlen_q = 22
        with pytest.raises(mp.PackingError, match=r"max_seqlen_q is 22, but the longest .* 30"):
            model(**given)
        for longest in (10, 40, 41):
            like_a_gpu.clear()
            given["packed_seq_params"].max_seqlen_q = longest
            model(**given)
            assert like_a_gpu == ["queued", "read", "layer"]


def test_a_compiled_language_model_that_misses_the_hook(like_a_gpu, monkeypatch):
    # torch.compile may not see hooks that are registered later: then the end of forward reads.
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    expected = model_of("rope")
    with install(expected), torch.no_grad():
        loss = expected(**given)[0]
    like_a_gpu.clear()
    with install(model), torch.no_grad():
        model.language_model._forward_pre_hooks.clear()
        if RELEASE.reads_boundaries:
            with pytest.raises((mp.PackingError, AttributeError, TypeError)):
                model(**given)
            return
        torch.testing.assert_close(model(**given)[0], loss)
        assert like_a_gpu == ["queued", "read"]
        given["packed_seq_params"].cu_seqlens_q = given["packed_seq_params"].cu_seqlens_kv.flip(0)
        given["packed_seq_params"].cu_seqlens_kv = given["packed_seq_params"].cu_seqlens_q
        with pytest.raises(mp.PackingError, match="cu_seqlens starts at"):
            model(**given)


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


@pytest.mark.parametrize("recipe, multiple", [("delayed", 16), ("mxfp8", 32), ("blockwise", 128)])
def test_fp8_is_read_off_the_config(recipe, multiple):
    model = model_of(max_sequence_length=1000)
    model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
    with install(model) as handle:
        options = handle.layout_options
    assert options["total_multiple"] == multiple
    assert options["max_expanded"] == 1000 // multiple * multiple
    model._language_is_pipeline_parallel = True
    with install(model) as handle, pytest.raises(mp.PackingError, match=f"of {multiple}:"):
        handle.layout_options  # noqa: B018


@pytest.mark.parametrize("fp8", [None, "e4m3"])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
@pytest.mark.parametrize("fused, context", [(False, None), (True, "inference_context"),
                                            (True, "inference_params")])  # fmt: skip
def test_boundaries_end_where_megatrons_own_rows_do(fp8, fixed, fused, context):
    # Its own expansion pads no row to a multiple, and none to a fixed length in inference.
    model, samples = model_of(max_sequence_length=400), tiny.samples(3, img_size=SIZE)
    model.config.fp8, model.config.fp8_recipe = fp8, "delayed"
    model._language_is_pipeline_parallel = fixed
    stop_at_language_model(model)
    given = arguments(samples)
    if context:
        given[context] = types.SimpleNamespace(key_value_memory_dict={})
    with install(model, fused=fused), pytest.raises(Reached) as reached:
        model(**given)
    kwargs = reached.value.args[0]
    assert kwargs["packed_seq_params"].cu_seqlens_q[-1] == kwargs["decoder_input"].shape[0]


def test_a_failing_forward_keeps_its_error(like_a_gpu):
    model, given = model_of(), arguments(tiny.samples(3, img_size=SIZE))
    given["packed_seq_params"].cu_seqlens_q = given["packed_seq_params"].cu_seqlens_kv.flip(0)

    def fail(module, args):
        raise Reached

    model.vision_projection.register_forward_pre_hook(fail)
    with install(model), pytest.raises(Reached):
        model(**given)


def test_layout_options_lay_out_as_the_model_does():
    model, samples = model_of(), tiny.samples(3, img_size=SIZE)
    row = parity.pack(samples)
    rows = row["num_image_tiles"] * model.img_seq_len
    given = row["input_ids"], row["cu_seqlens"], rows, tiny.IMAGE_TOKEN_ID
    for options in ({"space": "collapsed"}, {"space": "collapsed", "fused": False}):
        with install(model, **options) as handle, torch.no_grad():
            model(**arguments(samples))
            layout = mp.PackedLayout.build(*given, **handle.layout_options)
            assert layout.num_expanded == model._packing_hook.last_layout.num_expanded
            assert mp.layout_options(model) == handle.layout_options
            assert handle.layout_options["space"] == "collapsed"
    for use in (handle.check, lambda: handle.layout_options):
        with pytest.raises(mp.PackingError, match="removed before"):
            use()


def test_a_packed_call_compiles_around_the_hook():
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    with install(model), torch.no_grad():
        expected, _ = model(**arguments(samples))
        torch._dynamo.reset()
        found, _ = torch.compile(model, backend="eager")(**arguments(samples))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def middle_stage():
    """A stage without tokens, and how to call it."""
    stage = model_of("rope", pre_process=False, post_process=False, add_encoder=False)

    def run(params, num_rows, **options):
        stage.set_input_tensor(torch.randn(num_rows, 1, 64))
        nothing = dict.fromkeys(("images", "input_ids", "position_ids", "attention_mask"))
        with mp.install(stage, **options), torch.no_grad():
            return stage(**nothing, packed_seq_params=params)[0]

    run.stage = stage
    return run


def test_a_stage_without_tokens_takes_what_carries_its_layout(middle_stage, sent_layout, seen):
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    calls = seen(middle_stage.stage)
    layout = sent_layout(given, model, num_padded_rows=510)
    received = mp.PackedLayout.from_tensor(layout.to_tensor(boundaries_only=True))
    for sent in (layout, received):
        out = middle_stage(mp.packed_seq_params(sent), 510)
        assert out.shape == (510, 1, 64)
        params = calls[-1]["packed_seq_params"]
        assert type(params) is PackedSeqParams and params.max_seqlen_q == layout.max_seqlen
        assert torch.equal(params.cu_seqlens_q, layout.cu_seqlens_padded)
    with pytest.raises(mp.PackingError, match="has 510 rows, but this stage has 400 rows"):
        middle_stage(mp.packed_seq_params(received), 400)


def test_a_stage_without_tokens_guesses_nothing(middle_stage, seen):
    # Collapsed boundaries of a row that a bucket padded can end where the stage's rows do.
    calls = seen(middle_stage.stage)
    params = arguments(tiny.samples(3, img_size=SIZE))["packed_seq_params"]
    num_rows = int(params.cu_seqlens_q[-1])
    for space in ("auto", "collapsed"):
        with pytest.raises(mp.PackingError, match="cannot tell what its boundaries count"):
            middle_stage(params, num_rows, space=space)
    declared = middle_stage(params, num_rows + 30, space="expanded")
    assert declared.shape[0] == num_rows + 30
    assert calls[-1]["packed_seq_params"].cu_seqlens_q[-1] == num_rows + 30
    with pytest.raises(mp.PackingError, match="but this stage has 210 rows"):
        middle_stage(params, 210, space="expanded")
    params.cu_seqlens_q = params.cu_seqlens_kv = params.cu_seqlens_q.flip(0)
    with pytest.raises(mp.PackingError, match="cu_seqlens starts at"):
        middle_stage(params, num_rows, space="expanded")


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
    params = mp.packed_seq_params(mp.PackedLayout.from_boundaries(edges, 8))
    assert params.seq_idx is None
    calls = seen(middle_stage.stage)
    monkeypatch.setattr(versions, "is_hybrid", lambda language_model: True)
    middle_stage(params, 8)
    assert calls[-1]["packed_seq_params"].seq_idx.tolist() == [[0, 0, 0, 2, 2, 2, 2, 2]]
    assert params.seq_idx is None


def test_on_missing_lets_what_needs_no_boundaries_pass():
    encoder = model_of(add_decoder=False, post_process=False)
    model, given = model_of(), arguments(tiny.samples(1, img_size=SIZE))
    given["packed_seq_params"] = None
    context = types.SimpleNamespace(key_value_memory_dict={})
    with install([encoder, model], on_missing="raise"), torch.no_grad():
        encoder(**given)
        stop = stop_at_language_model(model)
        for name in ("inference_context", "inference_params"):
            if name in inspect.signature(LLaVAModel.forward).parameters:
                with pytest.raises(Reached):
                    model(**given, **{name: context})
        stop.remove()
        with pytest.raises(mp.PackingError, match="got no packed_seq_params"):
            model(**given)


def test_the_space_found_first_is_kept_for_training_and_evaluation_apart():
    model, samples = model_of("rope"), tiny.samples(5, img_size=SIZE)
    plain = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 1, 20)]
    collapsed, text = arguments(samples), arguments(plain)
    edges = collapsed["packed_seq_params"].cu_seqlens_q
    layout = mp.PackedLayout.build(
        collapsed["input_ids"], edges, collapsed["num_image_tiles"] * 5, -200, space="collapsed"
    )
    expanded = arguments(samples, layout.cu_seqlens_expanded)
    with install(model, space="auto") as handle, torch.no_grad():
        model.train()(**text)
        assert handle.space == "auto"  # text tells nothing
        model(**collapsed)
        assert handle.space == "collapsed"
        with pytest.raises(mp.PackingError):
            model(**expanded)
        model.eval()(**expanded)
        assert handle.space == "expanded"
        assert model.train() and handle.space == "collapsed"


def test_many_processes_are_told_to_say_their_space(monkeypatch):
    model, given = model_of("rope"), arguments(tiny.samples(5, img_size=SIZE))
    stop_at_language_model(model)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with (
        pytest.raises(Reached),
        install(model, space="auto"),
        pytest.warns(UserWarning, match="install.space='collapsed'"),
    ):
        model(**given)


def test_layout_options_follow_the_models_maximum():
    model = model_of(max_sequence_length=1000)
    with install(model) as handle:
        assert handle.layout_options["max_expanded"] == 1000
        model._language_max_sequence_length = 512
        assert handle.layout_options["max_expanded"] == 512


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "masked"])
@pytest.mark.parametrize("on_overflow", ["raise", "truncate"])
def test_tokens_behind_the_last_boundary_that_do_not_fit(trained, on_overflow, caplog):
    samples = tiny.samples(3, img_size=SIZE)
    given = arguments(samples)
    edges = given["packed_seq_params"].cu_seqlens_q[:-1]
    given = arguments(samples, edges)
    given["loss_mask"][:, int(edges[-1]) :] = float(trained)
    behind = int(given["num_image_tiles"][:-2].sum()) * 5
    rows = int(edges[-1]) - len(given["num_image_tiles"][:-2]) + behind
    model = model_of("rope", max_sequence_length=rows + 4)
    with install(model, on_overflow=on_overflow), torch.no_grad():
        if trained and on_overflow == "raise":
            with pytest.raises(mp.PackingError, match="trained tokens do not fit the row"):
                model(**given)
            return
        caplog.set_level(logging.WARNING, logger="mcore_packing")
        loss, _ = model(**given)
    assert loss.shape[1] == rows + 4
    said = [r.getMessage() for r in caplog.records if r.name.startswith("mcore_packing")]
    assert len(said) == trained


def test_real_boundaries_with_trained_tokens_behind_the_last(seen):
    # What is behind the last boundary counts as real rows: those that are trained attend.
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    given = arguments(samples)
    given = arguments(samples, given["packed_seq_params"].cu_seqlens_q[:-1])
    calls = seen(model)
    with install(model, pad_between_seqs=True), torch.no_grad():
        loss, mask = model(**given)
    assert calls[-1]["packed_seq_params"].cu_seqlens_q[-1] == alone.numel()
    assert ((loss[0] + alone) * mask[0]).abs().max() < 1e-5


def test_a_riding_layout_that_was_cut_loses_no_trained_token_in_silence(caplog):
    model = model_of("rope", max_sequence_length=64)
    ids = torch.arange(10, 90)
    given = arguments([{"input_ids": ids}], torch.tensor([0, 30], dtype=torch.int32))
    edges = given[
        "packed_seq_params"
    ].cu_seqlens_q  # what is behind them is trained, and does not fit
    layout = mp.PackedLayout.build(ids, edges, [], **mp.layout_options(model))
    assert layout.num_cut == 16
    for sent in (layout, mp.PackedLayout.from_tensor(layout.to_tensor())):
        given["packed_seq_params"] = mp.packed_seq_params(sent)
        with install(model), pytest.raises(mp.PackingError, match="15 trained tokens do not fit"):
            model(**given)
        caplog.set_level(logging.WARNING, logger="mcore_packing")
        with install(model, on_overflow="truncate"), torch.no_grad():
            model(**given)
        assert "15 trained tokens do not fit" in caplog.text
        caplog.clear()
    given["loss_mask"][:, 30:] = 0
    with install(model), torch.no_grad():
        assert model(**given)[0].shape == (1, 64)


def test_a_layout_longer_than_megatrons_own_row_is_refused():
    model, samples = model_of(max_sequence_length=1024), tiny.samples(3, img_size=SIZE)
    options = {**mp.layout_options(model), "total_multiple": 64}
    (row,), _ = mp.data.pack(samples, None, img_seq_len=model.img_seq_len, **options)
    with (
        install(model, fused=False),
        pytest.raises(mp.PackingError, match="only fused=True pads rows"),
    ):
        model(**row.inputs())


def test_boundaries_changed_under_a_layout_are_refused(sent_layout):
    model, given = model_of("rope"), arguments(tiny.samples(3, img_size=SIZE))
    params = mp.packed_seq_params(sent_layout(given, model))
    edges = params.cu_seqlens_q.clone()
    edges[1] -= 1
    given["packed_seq_params"] = dataclasses.replace(
        params, cu_seqlens_q=edges, cu_seqlens_kv=edges, cu_seqlens_q_padded=edges
    )
    with install(model), pytest.raises(mp.PackingError, match="are not those of the layout"):
        model(**given)


def test_placeholders_that_a_riding_layout_takes_for_text_are_refused():
    model = model_of("rope", max_sequence_length=64)
    given = arguments([{"input_ids": torch.arange(10, 30)}])
    given["input_ids"][0, 3] = tiny.IMAGE_TOKEN_ID
    edges = given["packed_seq_params"].cu_seqlens_q
    layout = mp.PackedLayout.build(
        given["input_ids"], edges, [], 7, **{**mp.layout_options(model), "space": "collapsed"}
    )
    given["packed_seq_params"] = mp.packed_seq_params(layout)
    if RELEASE.keeps_text_rows:
        pytest.skip("this megatron-core takes such a row for text, too")
    with install(model), pytest.raises(mp.PackingError, match="takes for text"):
        model(**given)
