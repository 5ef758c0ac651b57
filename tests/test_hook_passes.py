"""What passes the hook untouched, and what it refuses."""

import dataclasses
import gc
import inspect
import threading
import types
import warnings
import weakref

import pytest
import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.megatron import call
from mcore_packing.megatron.params import LaidOutParams
from mcore_packing.testing import tiny

from .models import (
    SIZE,
    Reached,
    arguments,
    both_expansions,
    install,
    model_of,
    reached,
    stop_at_language_model,
)

pytestmark = pytest.mark.usefixtures("megatron")
MISSING = "got no packed_seq_params in thd format"


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
    with install(model, on_missing="pass"):
        found = {name: outcome(model, call) for name, call in calls.items()}
    torch.testing.assert_close(found.pop("unpacked"), expected.pop("unpacked"), rtol=0, atol=0)
    for name, result in found.items():
        same = torch.equal if isinstance(result, torch.Tensor) else tuple.__eq__
        assert same(result, expected[name]), name


def test_another_context_parallel_size_is_refused():
    if not hasattr(PackedSeqParams(), "local_cp_size"):
        pytest.skip("this megatron-core has no local_cp_size")
    model, given = model_of(), arguments(tiny.samples(1, img_size=SIZE))
    given["packed_seq_params"].local_cp_size = 2
    with install(model), pytest.raises(mp.PackingError, match="local_cp_size is 2"):
        model(**given)


@both_expansions
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
def test_bad_calls(change, message, ours):
    model, samples = model_of(), tiny.samples(1, img_size=SIZE)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if value is not None
    }
    with (
        install(model, ours=ours),
        pytest.raises(mp.PackingError, match=message),
    ):
        model(**{**arguments(samples), **change})
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert parity.compare(model, samples).num_samples == 1  # and it still runs


@pytest.mark.parametrize("fp8", [None, "e4m3"])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
@pytest.mark.parametrize(
    "ours, context", [(False, None), (True, "inference_context"), (True, "inference_params")]
)
def test_boundaries_end_where_megatrons_own_rows_do(fp8, fixed, ours, context):
    # Its own expansion pads no row to a multiple, and none to a fixed length in inference.
    model, samples = model_of(max_sequence_length=400), tiny.samples(3, img_size=SIZE)
    model.config.fp8, model.config.fp8_recipe = fp8, "delayed"
    model._language_is_pipeline_parallel = fixed
    stop_at_language_model(model)
    given = arguments(samples)
    if context:
        given[context] = types.SimpleNamespace(key_value_memory_dict={})
    with install(model, ours=ours), pytest.raises(Reached) as reached:
        model(**given)
    kwargs = reached.value.args[0]
    assert kwargs["packed_seq_params"].cu_seqlens_q[-1] == kwargs["decoder_input"].shape[0]


# Missing boundaries


@pytest.fixture
def unpacked_call():
    """A call without boundaries, of one sample."""
    return {**arguments(tiny.samples(1, img_size=SIZE)), "packed_seq_params": None}


@pytest.fixture
def warned(monkeypatch):
    """Warnings of this package, in a process that had none yet."""
    call._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if "mcore_packing" in str(w.message)]


def test_a_call_without_boundaries_raises_in_training(unpacked_call):
    model = model_of()
    params = arguments(tiny.samples(1, img_size=SIZE))["packed_seq_params"]
    one_sequence = dataclasses.replace(params, qkv_format="sbhd")
    with install(model):
        for params, found in ((None, "none"), (one_sequence, "qkv_format 'sbhd'")):
            with pytest.raises(mp.PackingError, match=rf"{MISSING} \({found}\)"):
                model(**{**unpacked_call, "packed_seq_params": params})
    with install(model, on_missing="pass"):
        model(**unpacked_call)


def test_evaluation_passes_with_one_warning(unpacked_call, warned):
    model = model_of().eval()
    with install(model), torch.no_grad():
        expected = model(**unpacked_call)[0]
        model(**unpacked_call)
        (said,) = warned()
        assert "a call in evaluation mode got no packed_seq_params" in said
        with pytest.raises(mp.PackingError, match=MISSING):
            model.train()(**unpacked_call)
    assert torch.equal(model.eval()(**unpacked_call)[0], expected)


def test_evaluation_that_packs_must_go_on_packing(unpacked_call, warned):
    model = model_of().eval()
    packed = arguments(tiny.samples(3, img_size=SIZE))
    with install(model), torch.no_grad():
        model.train()(**packed)
        model.eval()(**unpacked_call)  # training packs, evaluation does not: its own affair
        model(**packed)
        with pytest.raises(mp.PackingError, match=MISSING):
            model(**unpacked_call)
        with mp.unpacked(model):
            model(**unpacked_call)
    assert len(warned()) == 1


def test_evaluation_of_a_pipeline_of_three_passes_on_every_stage(warned):
    # The stage in the middle gets neither tokens nor boundaries in the validation loop.
    whole = model_of("rope", language_layers=3).eval()
    stages = [
        model_of("rope", language_layers=1, post_process=False),
        model_of("rope", language_layers=1, pre_process=False, post_process=False,
                 add_encoder=False),
        model_of("rope", language_layers=1, pre_process=False, add_encoder=False),
    ]  # fmt: skip
    weights = dict(whole.named_parameters())
    for number, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            name = name.replace(
                "language_model.decoder.layers.0", f"language_model.decoder.layers.{number}"
            )
            parameter.data.copy_(weights[name])
    given = {**arguments(tiny.samples(1, img_size=SIZE)), "packed_seq_params": None}
    nothing = dict.fromkeys(("images", "input_ids", "position_ids", "attention_mask"))
    with install(stages), torch.no_grad():
        first, middle, last = (stage.eval() for stage in stages)
        hidden, _ = first(**given)
        middle.set_input_tensor(hidden)
        hidden, _ = middle(**nothing)
        last.set_input_tensor(hidden)
        loss, mask = last(**{**given, "images": None})
        for stage, of_stage in zip(stages, (given, nothing, given), strict=True):
            with pytest.raises(mp.PackingError, match=MISSING):
                stage.train()(**of_stage)
    with torch.no_grad():
        expected, expected_mask = whole(**given)
    assert torch.equal(mask, expected_mask) and torch.equal(loss, expected)
    assert len(warned()) == 1


def test_what_needs_no_boundaries_passes(unpacked_call):
    encoder, model = model_of(add_decoder=False, post_process=False), model_of()
    context = types.SimpleNamespace(key_value_memory_dict={})
    with install([encoder, model]), torch.no_grad():
        encoder(**unpacked_call)
        stop = stop_at_language_model(model)
        for name in ("inference_context", "inference_params"):
            if name in inspect.signature(LLaVAModel.forward).parameters:
                with pytest.raises(Reached):
                    model(**unpacked_call, **{name: context})
        stop.remove()
        with pytest.raises(mp.PackingError, match=MISSING):
            model(**unpacked_call)


def test_unpacked_nests(unpacked_call):
    chunks = [model_of(), model_of(seed=1)]
    with install(chunks), torch.no_grad():
        with mp.unpacked(chunks):
            with mp.unpacked(chunks[0]):
                chunks[0](**unpacked_call)
            chunks[0](**unpacked_call)  # leaving the inner one leaves the outer one
            chunks[1](**unpacked_call)
            with pytest.raises(ZeroDivisionError), mp.unpacked(chunks):
                1 / 0  # noqa: B018
            chunks[0](**unpacked_call)
        with pytest.raises(
            mp.PackingError, match=r"say that they are not packed: with mp\.unpacked"
        ):
            chunks[0](**unpacked_call)
    with mp.unpacked(chunks), torch.no_grad():  # where nothing is installed, nothing is asked
        chunks[0](**unpacked_call)


def test_unpacked_belongs_to_its_thread(unpacked_call):
    model, errors = model_of(), []

    def other():
        try:
            model(**unpacked_call)
        except mp.PackingError as error:
            errors.append(error)

    with install(model), mp.unpacked(model):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1


# What boundaries count


@both_expansions
def test_a_plain_row_of_which_nobody_said_what_it_counts(ours):
    model, given = model_of("rope"), arguments(tiny.samples(5, img_size=SIZE))
    with install(model, ours, space=None):
        with pytest.raises(mp.BoundarySpaceError, match="by their values they are collapsed"):
            model(**given)
        text = arguments([{"input_ids": torch.randint(1, 500, (n,))} for n in (9, 1, 20)])
        with pytest.raises(mp.BoundarySpaceError, match="they could be either, or the row has"):
            model(**text)
        either = torch.tensor([0, int(given["input_ids"].numel())], dtype=torch.int32)
        neither = either + torch.tensor([0, 999]).int()
        given["packed_seq_params"].cu_seqlens_q = neither
        given["packed_seq_params"].cu_seqlens_kv = neither
        with pytest.raises(mp.BoundarySpaceError, match="could count neither"):
            model(**given)
        given["packed_seq_params"].cu_seqlens_q = None
        with pytest.raises(mp.PackingError, match="have no cu_seqlens_q"):
            model(**given)


def test_what_a_row_says_of_itself_wins():
    model, samples = model_of("rope"), tiny.samples(5, img_size=SIZE)
    given = arguments(samples)
    expected = reached_boundaries(model, given, space="collapsed")
    for space in (None, "expanded"):
        plain = given["packed_seq_params"]
        said = {**given, "packed_seq_params": LaidOutParams(**vars(plain), space="collapsed")}
        assert torch.equal(reached_boundaries(model, said, space=space), expected)


def reached_boundaries(model, given, **options):
    with install(model, **options):
        return reached(model, given)["packed_seq_params"].cu_seqlens_q


@pytest.mark.parametrize("brings_layout", [True, False], ids=["rides", "in-model"])
def test_nothing_of_a_call_is_kept(brings_layout):
    # Activations that wait for the garbage collector would be memory of the GPU.
    model, samples = model_of("rope"), tiny.samples(2, img_size=SIZE)
    given, made = arguments(samples), []
    if brings_layout:
        counts = given["num_image_tiles"] * model.img_seq_len
        edges = given["packed_seq_params"].cu_seqlens_q
        layout = mp.PackedLayout.build(
            given["input_ids"], edges, counts, mp.row_spec(model), space="collapsed"
        )
        given["packed_seq_params"] = mp.packed_seq_params(layout)
    with install(model):
        current = model._packing_hook.current
        model.language_model.register_forward_pre_hook(
            lambda *args: made.append(weakref.ref(current.call))
        )
        gc.disable()
        try:
            loss, mask = model(**given)
            (loss * mask).sum().backward()
            assert made[0]() is None
        finally:
            gc.enable()
