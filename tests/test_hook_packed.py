"""The hook on a real LLaVAModel: packed equals one by one, however it is built and called."""

import concurrent.futures

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.megatron.releases import PACKED_SEQ_FIELDS
from mcore_packing.testing import tiny

from .models import POSITIONS, SIZE, arguments, both_expansions, install, model_of

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("count", [1, 4, pytest.param(16, marks=pytest.mark.ci)])
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
@both_expansions
def test_many_packs(positions, ours):
    model = model_of(positions)
    for seed in range(12):
        samples = tiny.samples(1 + seed % 7, img_size=SIZE, seed=seed)
        alone = parity.run_alone(model, samples)
        with install(model, ours=ours):
            result = parity.compare(model, samples, alone)
        assert result.token_mult_prob_error == pytest.approx(1, abs=1e-6)
        assert result.lost_labels == 0


@both_expansions
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
def test_vision_towers(options, ours):
    size = options.get("img_size", SIZE)
    model, samples = model_of(**options), tiny.samples(5, img_size=size)
    alone = parity.run_alone(model, samples)
    with install(model, ours=ours):
        result = parity.compare(model, samples, alone)
    assert result.max_difference < 1e-5


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
def test_gradients_equal_one_by_one(dtype, tolerance):
    samples = tiny.samples(6, img_size=SIZE, dtype=dtype)
    packed = gradients(model_of().to(dtype), [parity.collate(samples)], packed=True)
    rows = [{**parity.collate([sample]), "cu_seqlens": None} for sample in samples]
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


@both_expansions
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
    ],
    ids=["full", "selective"],
)
def test_activation_recomputation(recompute, ours):
    row = parity.collate(tiny.samples(4, img_size=SIZE))
    plain = gradients(model_of(), [row], packed=True, ours=ours)
    again = gradients(model_of(language=recompute), [row], packed=True, ours=ours)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-9)


@both_expansions
@pytest.mark.parametrize("way", ["call", "forward", "positional"])
def test_every_way_to_call(way, ours):
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    given = arguments(samples)
    order = ("images", "input_ids", "position_ids", "attention_mask", "labels", "loss_mask")
    with install(model, ours=ours), torch.no_grad():
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


@both_expansions
def test_expanded_boundaries_keep_their_values(ours, seen):
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    runs = parity.run_alone(model, samples)
    alone = torch.cat([pair[0] for pair in runs])
    calls = seen(model)
    expanded = torch.tensor([0, *(pair[0].numel() for pair in runs)]).cumsum(0).int()
    given = arguments(samples, expanded)
    with install(model, ours=ours, space="expanded"), torch.no_grad():
        loss, mask = model(**given)
    params = calls[-1]["packed_seq_params"]
    assert torch.equal(params.cu_seqlens_q, expanded)
    assert params.max_seqlen_q == int(expanded.diff().max())
    assert ((loss[0] + alone).abs() * mask[0]).max() < 1e-5


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


@both_expansions
def test_text_only(ours):
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 1, 20)]
    model = model_of("rope")
    with install(model, ours=ours):
        assert parity.compare(model, samples).max_difference < 1e-5


@pytest.mark.parametrize("wraps", ["before", "after"])
def test_a_whole_language_model_is_computed_again(wraps):
    # A wrapper that comes after the hook calls what it wraps again, after forward is over.
    samples = tiny.samples(3, img_size=SIZE)
    grads = []
    for is_wrapped in False, True:
        model = model_of("rope")
        if is_wrapped and wraps == "before":
            model.language_model = Recomputed(model.language_model)
        with install(model):
            if is_wrapped and wraps == "after":
                model.language_model = Recomputed(model.language_model)
            loss, mask = model(**arguments(samples))
            (loss * mask).sum().backward()
        grads.append([weight.grad for weight in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-6)


class Recomputed(torch.nn.Module):
    """A language model under activation checkpointing, as torch's ``checkpoint_wrapper`` does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args, **kwargs):
        return checkpoint(self.module, *args, use_reentrant=False, **kwargs)


def test_images_of_nobody_are_refused():
    model = model_of()
    given = arguments([{"input_ids": torch.randint(1, 500, (9,))}])
    given["images"] = torch.randn(2, 3, SIZE, SIZE)  # one would be a dummy
    with (
        install(model) as handle,
        pytest.raises(mp.PlaceholderMismatch, match="images hold 10 embeddings"),
    ):
        model(**given)
        handle.check()


def test_spare_image_tiles_are_refused():
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    given = {**arguments(samples), "images": torch.randn(3, 3, SIZE, SIZE)}
    with (
        install(model),
        pytest.raises(mp.PlaceholderMismatch, match="become 5 image embeddings, but there are 15"),
    ):
        model(**given)


def test_one_tile_an_image_is_the_default():
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    with install(model), torch.no_grad():
        given = arguments(samples)
        expected = model(**given)[0]
        given["num_image_tiles"] = None
        assert torch.equal(model(**given)[0], expected)


def test_the_callers_parameters_say_whether_padding_is_told_apart(seen):
    # Before 0.19 nothing would tell Transformer Engine: then the padded ones alone.
    model, samples = model_of("rope", max_sequence_length=400), tiny.samples(3, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    calls = seen(model)
    model._language_is_pipeline_parallel = True
    given = arguments(samples)
    params = given["packed_seq_params"]
    params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = params.cu_seqlens_q.clone()
    with install(model), torch.no_grad():
        loss, mask = model(**given)
    found = calls[-1]["packed_seq_params"]
    assert found.cu_seqlens_q_padded[-1] == 400
    is_told = "pad_between_seqs" in PACKED_SEQ_FIELDS
    assert found.cu_seqlens_q[-1] == (alone.numel() if is_told else 400)
    assert (found.cu_seqlens_q is found.cu_seqlens_q_padded) != is_told
    if is_told:
        assert found.pad_between_seqs is True
    assert ((loss[0, : alone.numel()] + alone) * mask[0, : alone.numel()]).abs().max() < 1e-5


@pytest.mark.skipif("pad_between_seqs" not in PACKED_SEQ_FIELDS, reason="TE cannot be told")
def test_real_boundaries_with_trained_tokens_behind_the_last(seen):
    # What is behind the last boundary counts as real: those tokens that are trained attend.
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    given = arguments(samples)
    given = arguments(samples, given["packed_seq_params"].cu_seqlens_q[:-1])
    given["packed_seq_params"].pad_between_seqs = True
    calls = seen(model)
    with install(model), torch.no_grad():
        loss, mask = model(**given)
    assert calls[-1]["packed_seq_params"].cu_seqlens_q[-1] == alone.numel()
    assert ((loss[0] + alone) * mask[0]).abs().max() < 1e-5


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


def test_a_packed_call_compiles_around_the_hook():
    model, samples = model_of("rope"), tiny.samples(3, img_size=SIZE)
    with install(model), torch.no_grad():
        expected, _ = model(**arguments(samples))
        torch._dynamo.reset()
        found, _ = torch.compile(model, backend="eager")(**arguments(samples))
    torch.testing.assert_close(found, expected)
