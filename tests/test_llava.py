"""The hook on a real LLaVAModel: packed equals one by one, and nothing else changes."""

import copy as copy_module
import dataclasses
import logging
import pickle
import types
import warnings

import pytest
import torch
from megatron.core import __version__ as mcore_version
from megatron.core.models.mamba import MambaModel
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from torch.nn.parallel import DistributedDataParallel

import mcore_packing as mp
from mcore_packing import layout as layout_room
from mcore_packing import llava as llava_room
from mcore_packing import parity, tiny
from mcore_packing.cpu import HostReads
from mcore_packing.llava import takes_boundaries, understanding

pytestmark = pytest.mark.usefixtures("megatron")
SIZE = 28  # pixels: 5 rows a tile
POSITIONS = ("learned_absolute", "rope")
OLD = tuple(map(int, mcore_version.split(".")[:2])) < (0, 16)


def model_of(positions="learned_absolute", **kwargs):
    return tiny.llava_model(positions, **{"img_size": SIZE, **kwargs})


def arguments(samples, cu_seqlens=None):
    """Keyword arguments of ``forward`` for one packed row."""
    row = parity.pack(samples)
    cu_seqlens = row["cu_seqlens"] if cu_seqlens is None else cu_seqlens
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=row["max_seqlen"], max_seqlen_kv=row["max_seqlen"],
    )  # fmt: skip
    names = ("images", "input_ids", "position_ids", "labels", "loss_mask", "num_image_tiles")
    return {name: row[name] for name in names} | {
        "attention_mask": None,
        "packed_seq_params": params,
    }


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
        with mp.install(model):
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
        with mp.install(model, fused=fused):
            result = parity.compare(model, samples, alone)
        assert result.token_mult_prob_error == pytest.approx(1, abs=1e-6)
        first = sum(int(sample["input_ids"][0]) == tiny.IMAGE_TOKEN_ID for sample in samples[1:])
        assert result.lost_labels == (0 if fused else first)


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
    with mp.install(model, fused=fused):
        result = parity.compare(model, samples, alone)
    assert result.max_difference < 1e-5


@pytest.mark.skipif("main" not in understanding(LLaVAModel), reason="only main resizes freely")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
@pytest.mark.parametrize(
    "options",
    [{}, {"pixel_shuffle": True}, {"drop_vision_class_token": False}, {"max_num_tiles": 4}],
    ids=["plain", "pixel-shuffle", "class-tokens", "tiles"],
)
def test_dynamic_resolution(options, fused):
    options = {"drop_vision_class_token": True, **options}
    model = model_of("rope", vision_model_type="radio", dynamic_resolution=True, **options)
    model.eval()  # in training, RADIO moves its positions at random
    tiles = [[2], [1, 1], [1]] if "max_num_tiles" in options else [[1], [1, 1], [1]]
    sizes = [[(56, 84), (28, 28)], [(28, 28), (56, 28)], [(84, 28)]]
    places = ([2], [0, 3], [11])
    samples = []
    for sample, (at, count) in enumerate(zip(places, tiles, strict=True)):
        ids = torch.randint(1, 500, (12,), generator=torch.Generator().manual_seed(sample))
        ids[at] = tiny.IMAGE_TOKEN_ID
        mine = sizes[sample][: sum(count)]
        patches = sum(height * width for height, width in mine) // 14**2
        samples.append((ids, torch.randn(patches, 3 * 14**2), mine, count))

    def run(samples, cu_seqlens=None):
        ids, patches = (torch.cat([sample[i] for sample in samples]) for i in (0, 1))
        labels = torch.cat(
            [torch.cat([sample[0][1:], sample[0].new_ones(1)]) for sample in samples]
        )
        params = None
        if cu_seqlens is not None:
            params = PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, 12, 12)
        with torch.no_grad():
            return model(
                patches[None], ids[None], torch.arange(ids.numel())[None], None,
                labels=labels[None], loss_mask=torch.ones(1, ids.numel()),
                num_image_tiles=torch.tensor([n for s in samples for n in s[3]], dtype=torch.int),
                imgs_sizes=torch.tensor([size for s in samples for size in s[2]]),
                packed_seq_params=params,
            )  # fmt: skip

    alone = [run([sample]) for sample in samples]
    expected, expected_mask = (torch.cat(x, dim=1) for x in zip(*alone, strict=True))
    with mp.install(model, fused=fused, space="collapsed"):
        loss, mask = run(samples, torch.tensor([0, 12, 24, 36], dtype=torch.int32))
    assert loss.shape == expected.shape
    assert ((loss - expected) * mask * expected_mask).abs().max() < 1e-5
    assert (mask != expected_mask).sum() == (0 if fused else 1)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_gradients_equal_one_by_one(dtype, tolerance):
    samples = tiny.samples(6, img_size=SIZE, dtype=dtype)
    packed = gradients(model_of().to(dtype), [parity.pack(samples)], install=True)
    rows = [{**parity.pack([sample]), "cu_seqlens": None} for sample in samples]
    alone = gradients(model_of().to(dtype), rows)
    assert packed.keys() == alone.keys()
    kinds = ("embedding", "vision_projection", "vision_model", "decoder")
    assert all(any(kind in name for name in packed) for kind in kinds)
    for name, gradient in packed.items():
        error = (gradient - alone[name]).norm() / alone[name].norm().clamp(min=1e-30)
        assert error <= tolerance or alone[name].norm() < 1e-12, (name, error)


def gradients(model, rows, install=False, **options):
    """Summed gradients of every parameter over rows."""
    model.train()
    handle = mp.install(model, **options) if install else None
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
    plain = gradients(model_of(), [row], install=True, fused=fused)
    again = gradients(model_of(language=recompute), [row], install=True, fused=fused)
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
    with mp.install(model, fused=fused), torch.no_grad():
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
    with mp.install(wrapped):
        result = parity.compare(wrapped, samples, alone)
    assert result.token_mult_prob_error < 1.01
    assert parity.compare(wrapped, samples, alone).token_mult_prob_error > 1.05


def test_wrapped_in_ddp():
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    wrapped = DistributedDataParallel(model)
    handle = mp.install(wrapped)
    assert parity.compare(wrapped, samples).max_difference < 1e-5
    handle.remove()
    assert "forward" not in model.__dict__


def test_labels_none_gives_logits():
    model, samples = model_of(parallel_output=False), tiny.samples(3, img_size=SIZE)
    alone = [
        model(**{**arguments([sample]), "labels": None, "packed_seq_params": None})[0]
        for sample in samples
    ]
    with mp.install(model):
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
        with (
            mp.install(model, fused=fused),
            caplog.at_level(logging.INFO, logger="mcore_packing"),
            torch.no_grad(),
        ):
            caplog.clear()
            loss, mask = model(**given)
            model(**given)
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
    with mp.install(model, space="collapsed"), torch.no_grad():
        loss, _ = model(**given)
    params = calls[-1]["packed_seq_params"]
    assert params.cu_seqlens_q.numel() == 4 and params.cu_seqlens_q[-1] == loss.shape[1]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_text_only(fused):
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 1, 20)]
    model = model_of("rope")
    with mp.install(model, fused=fused):
        assert parity.compare(model, samples).max_difference < 1e-5


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_text_only_with_fsdps_dummy_image(fused):
    model = model_of()
    model.vision_model._is_fsdp_managed_module = True
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 20)]
    given = arguments(samples)
    expected = model(**given)[0]
    given["images"] = torch.randn(1, 3, SIZE, SIZE)
    with mp.install(model, fused=fused):
        loss, mask = model(**given)
        (loss * mask).sum().backward()
    torch.testing.assert_close(loss[:, :9], expected[:, :9], rtol=0, atol=1e-5)
    grads = [parameter.grad for parameter in model.vision_model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_images_of_nobody_are_refused():
    model = model_of()
    given = arguments([{"input_ids": torch.randint(1, 500, (9,))}])
    given["images"] = torch.randn(1, 3, SIZE, SIZE)
    with mp.install(model) as handle:
        if "main" in understanding(LLaVAModel):  # there they take part with weight zero
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
    with mp.install(model), pytest.raises(mp.PackingError, match="local_cp_size is 2"):
        model(**given)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "boundaries-only"])
def test_truncation_at_the_models_length(fused, seen):
    samples = tiny.samples(4, img_size=SIZE)
    whole = model_of("rope")
    short = model_of("rope", max_sequence_length=150)
    calls = seen(short)
    with mp.install(whole, fused=fused), mp.install(short, fused=fused), torch.no_grad():
        expected, expected_mask = whole(**arguments(samples))
        loss, mask = short(**arguments(samples))
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
    with mp.install(model, fused=fused), torch.no_grad():
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
    with mp.install(model):
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
            mp.install(model, on_missing="raise"),
            pytest.raises(mp.PackingError, match=rf"got no packed_seq_params .* \({found}\)"),
        ):
            model(**{**given, "packed_seq_params": params})


def test_remove_restores_the_model():
    model = model_of()
    before, forward = dict(model.__dict__), model.forward
    handle = mp.install(model)
    assert model.forward != forward and model.forward.__name__ == "forward"
    handle.check()
    handle.remove()
    assert model.__dict__ == before and model.forward == forward
    with pytest.raises(mp.PackingError, match="removed before"):
        handle.remove()
    with mp.install(model):
        assert model.__dict__ != before
    assert model.__dict__ == before


def test_remove_puts_another_wrapper_back():
    model = model_of()
    model.forward = wrapper = lambda *args, **kwargs: LLaVAModel.forward(model, *args, **kwargs)
    model.forward.__wrapped__ = LLaVAModel.forward.__get__(model)
    handle = mp.install(model)
    handle.remove()
    assert model.__dict__["forward"] is wrapper
    handle = mp.install(model)
    model.forward = wrapper
    with pytest.raises(mp.PackingError, match="someone replaced forward"):
        handle.remove()


def test_copies_are_refused():
    # A copy would run the original's forward, with the original's weights, and nobody would know.
    model = model_of()
    with mp.install(model):
        for copy in (copy_module.deepcopy, pickle.dumps):
            with pytest.raises(mp.PackingError, match="would run the original's forward"):
                copy(vars(model)["forward"])


def test_install_is_refused():
    model = model_of()
    with pytest.raises(mp.PackingError, match="Linear holds 0 LLaVAModels"):
        mp.install(torch.nn.Linear(2, 2))
    with pytest.raises(mp.PackingError, match="str holds 0 LLaVAModels"):
        mp.install("model")
    with pytest.raises(mp.PackingError, match="in the list twice"):
        mp.install([model, model])
    with pytest.raises(mp.PackingError, match="space is 'both'"):
        mp.install(model, space="both")
    with pytest.raises(mp.PackingError, match="on_missing is 'warn'"):
        mp.install(model, on_missing="warn")
    with mp.install(model), pytest.raises(mp.PackingError, match="installed on this model already"):
        mp.install([model_of(), model])
    assert "forward" not in model.__dict__


def test_every_chunk_is_installed_on():
    chunks = [model_of(), DistributedDataParallel(model_of(seed=1))]
    handle = mp.install(chunks)
    for chunk, samples in zip(chunks, (tiny.samples(2, img_size=SIZE),) * 2, strict=True):
        assert parity.compare(chunk, samples).max_difference < 1e-5
    handle.remove()


def test_hybrid_models_need_their_boundaries():
    # Until 0.15, LLaVAModel does not hand packed_seq_params to its MambaModel.
    assert takes_boundaries(MambaModel) == (not OLD)
    model = model_of()
    model.language_model.forward = lambda input_ids, position_ids, attention_mask: None
    with pytest.raises(mp.PackingError, match="passes no packed_seq_params to GPTModel"):
        mp.install(model)
    assert "forward" not in vars(model)


def test_an_unknown_signature_warns_and_still_remaps():
    class Later(LLaVAModel):
        def _preprocess_data(self, *args, something_new=None, **kwargs):
            return super()._preprocess_data(*args, **kwargs)

    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    model.__class__ = Later
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = mp.install(model)
        assert parity.compare(model, samples).max_difference < 1e-5
    assert [w for w in caught if "does not know this LLaVAModel" in str(w.message)]
    assert len([w for w in caught if "mcore_packing" in str(w.message)]) == 1
    handle.remove()


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
        mp.install(model, space="collapsed", fused=fused),
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
        mp.install(model, space="collapsed"),
        pytest.raises(mp.PlaceholderMismatch, match="become 5 image rows, but there are 15"),
    ):
        model(**given)


def test_one_tile_an_image_is_the_default():
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    with mp.install(model), torch.no_grad():
        given = arguments(samples)
        expected = model(**given)[0]
        given["num_image_tiles"] = None
        assert torch.equal(model(**given)[0], expected)


def test_routers_of_experts_do_not_count_padding():
    language = {"num_moe_experts": 2, "add_bias_linear": False}
    try:
        model = model_of("rope", language=language, max_sequence_length=400)
    except Exception as error:
        pytest.skip(f"this megatron-core builds no experts on a CPU: {error}")
    masks = []
    for layer in model.language_model.decoder.layers:
        layer.mlp.router.register_forward_pre_hook(lambda module, args: masks.append(args[1:]))
    model._language_is_pipeline_parallel = True  # a fixed length: the surplus is the tail
    with mp.install(model), torch.no_grad():
        _, loss_mask = model(**arguments(tiny.samples(3, img_size=SIZE)))
    assert len(masks) == 3
    if OLD:
        assert masks == [()] * 3
        return
    for (mask,) in masks:
        assert mask.shape == (400, 1) and not (loss_mask[0] * mask[:, 0]).any()
        assert 0 < mask.sum() < 400
    handle = mp.install(model)
    handle.remove()
    assert not model.language_model._forward_pre_hooks


def test_real_and_padded_boundaries_by_choice(seen):
    model, samples = model_of("rope", max_sequence_length=400), tiny.samples(3, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    calls = seen(model)
    model._language_is_pipeline_parallel = True
    with mp.install(model, pad_between_seqs=True), torch.no_grad():
        loss, mask = model(**arguments(samples))
    params = calls[-1]["packed_seq_params"]
    assert params.cu_seqlens_q[-1] == alone.numel() and params.cu_seqlens_q_padded[-1] == 400
    assert ((loss[0, : alone.numel()] + alone) * mask[0, : alone.numel()]).abs().max() < 1e-5


class Reached(Exception):
    """The language model was called with these arguments."""


def stop_at_language_model(model):
    def stop(module, args, kwargs):
        raise Reached(kwargs)

    model.language_model.register_forward_pre_hook(stop, with_kwargs=True)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Nobody looks at a value before the end of a forward, as on a GPU."""
    monkeypatch.setattr(layout_room, "_may_look", lambda input_ids: False)
    watch = lambda word, expected, tell: lambda: tell(word.tolist())  # noqa: E731
    monkeypatch.setattr(llava_room, "_watch", watch)


@pytest.mark.parametrize("positions", POSITIONS)
def test_without_looking(like_a_gpu, positions, seen):
    model = model_of(positions)
    calls = seen(model)
    for seed in range(6):
        samples = tiny.samples(1 + seed, img_size=SIZE, seed=seed)
        alone = parity.run_alone(model, samples)
        with mp.install(model):
            result = parity.compare(model, samples, alone)
        assert result.max_difference < 1e-5 and result.lost_labels == 0
        params = calls[-1]["packed_seq_params"]  # bounds: the tail is kept, however empty
        assert params.cu_seqlens_q.numel() == len(samples) + 2
        assert type(params.max_seqlen_q) is int and params.max_seqlen_q % 1024 == 0
        assert params.max_seqlen_q > result.num_expanded


@pytest.mark.parametrize("positions", POSITIONS)
def test_no_value_is_read_before_the_language_model(like_a_gpu, positions):
    model, given = model_of(positions), arguments(tiny.samples(3, img_size=SIZE))
    stop_at_language_model(model)
    with mp.install(model, pad_between_seqs=True), HostReads() as reads, pytest.raises(Reached):
        model(**given)
    # Main compares cu_seqlens[-1] with the row once, itself.
    assert reads.found == ["_local_scalar_dense"] * ("main" in understanding(LLaVAModel))
    with HostReads() as reads, pytest.raises(Reached):
        model(**given)
    assert len(reads.found) > 10  # Megatron's own


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
def test_a_bad_row_raises_at_the_end_of_its_forward(like_a_gpu, positions, change, message, seen):
    model, samples = model_of(positions), tiny.samples(3, img_size=SIZE)
    given = arguments(samples)
    if "cu_seqlens" in change:
        cu_seqlens = torch.tensor(change["cu_seqlens"], dtype=torch.int32)
        given["packed_seq_params"].cu_seqlens_q = cu_seqlens
        given["packed_seq_params"].cu_seqlens_kv = cu_seqlens
    else:
        given["num_image_tiles"] = torch.tensor(change["num_image_tiles"], dtype=torch.int)
    calls = seen(model)
    with mp.install(model, space="collapsed") as handle:
        with pytest.raises(mp.PackingError, match=message):
            model(**given)
        # The language model had run by then, on boundaries that stay in the row, and on NaN.
        (call,) = calls
        edges = call["packed_seq_params"].cu_seqlens_q
        assert (edges.diff() >= 0).all() and edges[-1] == call["decoder_input"].shape[0]
        assert call["decoder_input"].isnan().all()
        with pytest.raises(mp.PackingError, match=message):
            handle.check()


def test_a_last_stage_without_looking(like_a_gpu):
    # It sees tokens but no images, so only the fixed length of pipelines tells it its size.
    whole, samples = model_of("rope", max_sequence_length=400), tiny.samples(3, img_size=SIZE)
    last = model_of("rope", max_sequence_length=400, pre_process=False, add_encoder=False)
    whole._language_is_pipeline_parallel = last._language_is_pipeline_parallel = True
    last.set_input_tensor(torch.randn(400, 1, 64))
    with mp.install(whole), mp.install(last), torch.no_grad():
        expected, expected_mask = whole(**arguments(samples))
        loss, mask = last(**{**arguments(samples), "images": None})
    assert loss.shape == expected.shape == (1, 400)
    torch.testing.assert_close(mask, expected_mask, rtol=0, atol=0)


@pytest.mark.parametrize("recipe, multiple", [("delayed", 16), ("mxfp8", 32), ("blockwise", 128)])
def test_fp8_is_read_off_the_config(recipe, multiple):
    model = model_of(max_sequence_length=1000)
    model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
    with mp.install(model) as handle:
        options = handle.layout_options
    assert options["total_multiple"] == multiple
    assert options["max_expanded"] == 1000 // multiple * multiple
    model._language_is_pipeline_parallel = True
    with mp.install(model) as handle, pytest.raises(mp.PackingError, match=f"of {multiple}:"):
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
    with mp.install(model, fused=fused), pytest.raises(Reached) as reached:
        model(**given)
    kwargs = reached.value.args[0]
    assert kwargs["packed_seq_params"].cu_seqlens_q[-1] == kwargs["decoder_input"].shape[0]


def test_a_failing_forward_keeps_its_error(like_a_gpu):
    model, given = model_of(), arguments(tiny.samples(3, img_size=SIZE))
    given["packed_seq_params"].cu_seqlens_q = given["packed_seq_params"].cu_seqlens_kv.flip(0)
    stop_at_language_model(model)
    with mp.install(model, space="collapsed"), pytest.raises(Reached):
        model(**given)


def test_layout_options_lay_out_as_the_model_does():
    model, samples = model_of(), tiny.samples(3, img_size=SIZE)
    row = parity.pack(samples)
    rows = row["num_image_tiles"] * model.img_seq_len
    given = row["input_ids"], row["cu_seqlens"], rows, tiny.IMAGE_TOKEN_ID
    for options in ({"space": "collapsed"}, {"space": "collapsed", "fused": False}):
        with mp.install(model, **options) as handle, torch.no_grad():
            model(**arguments(samples))
            layout = mp.PackedLayout.build(*given, **handle.layout_options)
            assert layout.num_expanded == handle._hooks[0].last_layout.num_expanded
            assert handle.layout_options["space"] == "collapsed"
    for use in (handle.check, lambda: handle.layout_options):
        with pytest.raises(mp.PackingError, match="removed before"):
            use()


def test_a_packed_call_compiles_around_the_hook():
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    with mp.install(model), torch.no_grad():
        expected, _ = model(**arguments(samples))
        torch._dynamo.reset()
        found, _ = torch.compile(model, backend="eager")(**arguments(samples))
    torch.testing.assert_close(found, expected)


def test_a_stage_without_tokens_needs_boundaries_that_cover_its_rows():
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    with mp.install(model) as handle:
        collapsed = arguments(samples)["packed_seq_params"]
        hidden = torch.randn(210, 1, 64)
        stage = model_of("rope", pre_process=False, post_process=False, add_encoder=False)
        stage.set_input_tensor(hidden)
        nothing = dict.fromkeys(("images", "input_ids", "position_ids", "attention_mask"))
        with mp.install(stage), pytest.raises(mp.PackingError, match="but this stage has 210 rows"):
            stage(**nothing, packed_seq_params=collapsed)
        row = parity.pack(samples)
        rows = row["num_image_tiles"] * model.img_seq_len
        layout = mp.PackedLayout.build(
            row["input_ids"], row["cu_seqlens"], rows, tiny.IMAGE_TOKEN_ID,
            **{**handle.layout_options, "num_padded_rows": 210 + 300},
        )  # fmt: skip
        stage.set_input_tensor(torch.randn(510, 1, 64))
        with mp.install(stage), torch.no_grad():
            out, _ = stage(**nothing, packed_seq_params=mp.packed_seq_params(layout))
        assert out.shape == (510, 1, 64)


@pytest.mark.skipif(
    "seq_idx" not in PackedSeqParams.__dataclass_fields__, reason="this megatron-core has none"
)
def test_a_stage_without_tokens_gets_its_seq_idx(seen):
    # Mamba layers read nothing else, and treat None as one sequence.
    stage = model_of("rope", pre_process=False, post_process=False, add_encoder=False)
    edges = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    params = mp.packed_seq_params(torch.cat([edges[-1:], edges]))
    assert params.seq_idx is None
    calls = seen(stage)
    stage.set_input_tensor(torch.randn(8, 1, 64))
    nothing = dict.fromkeys(("images", "input_ids", "position_ids", "attention_mask"))
    with mp.install(stage) as handle, torch.no_grad():
        handle._hooks[0].fields["seq_idx"] = True  # as for a hybrid model
        stage(**nothing, packed_seq_params=params)
    assert calls[-1]["packed_seq_params"].seq_idx.tolist() == [[0, 0, 0, 2, 2, 2, 2, 2]]
    assert params.seq_idx is None
