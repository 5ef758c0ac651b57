"""Installing and undoing: what is refused, what is restored, whose expansion is kept."""

import copy as copy_module
import functools
import gc
import inspect
import io
import pickle
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from megatron.core.models.mamba import MambaModel
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.parallel import DistributedDataParallel

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.megatron import hook, releases
from mcore_packing.megatron.plan import takes_boundaries
from mcore_packing.testing import tiny

from .models import OLD, SIZE, arguments, install, model_of

pytestmark = pytest.mark.usefixtures("megatron")


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


def test_a_handle_says_what_it_does():
    model = model_of()
    handle = mp.install(model, space="expanded", on_missing="pass")
    assert repr(handle) == (
        "Installation(LLaVAModel, space='expanded', on_missing='pass', on_overflow='raise', "
        "expansion replaced)"
    )
    handle.remove()
    assert repr(handle) == "Installation(removed)"
    chunks = [model_of(), model_of()]
    chunks[1]._preprocess_data = functools.partial(LLaVAModel._preprocess_data, chunks[1])
    with pytest.warns(UserWarning, match="the expansion is left alone"):
        handle = mp.install(chunks, on_overflow="truncate")
    said = repr(handle)
    assert said.startswith("Installation(2 chunks of LLaVAModel, space=None, on_missing='raise', ")
    assert "on_overflow='truncate', expansion left alone, since " in said
    del chunks[:]
    gc.collect()
    assert repr(handle) == "Installation(the model is gone)"


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


def test_install_is_refused():
    model = model_of()
    with pytest.raises(mp.PackingError, match="Linear holds 0 LLaVAModels"):
        install(torch.nn.Linear(2, 2))
    with pytest.raises(mp.PackingError, match="str holds 0 LLaVAModels"):
        install("model")
    with pytest.raises(mp.PackingError, match="in the list twice"):
        install([model, model])
    with pytest.raises(
        mp.PackingError, match="space is 'both', expected 'collapsed' or 'expanded'"
    ):
        install(model, space="both")
    with pytest.raises(mp.PackingError, match="on_missing is 'warn'"):
        install(model, on_missing="warn")
    with install(model), pytest.raises(mp.PackingError, match="installed on this model already"):
        install([model_of(), model])
    assert "forward" not in model.__dict__


def test_attention_that_takes_no_packed_rows_is_refused():
    model = model_of("rope")
    layer = model.language_model.decoder.layers[1].self_attention
    theirs = DotProductAttention(layer.config, 2, AttnMaskType.causal, "self")
    ours, layer.core_attention = layer.core_attention, theirs
    with pytest.raises(
        mp.PackingError,
        match=r"decoder.layers.1.self_attention.core_attention .* put mp.attention.PackedAttention",
    ):
        install(model)
    theirs.forward = ours.forward  # someone's own
    with install(model), torch.no_grad():
        row = arguments(tiny.samples(2, img_size=SIZE))
        assert torch.isfinite(model(**row)[0]).all()


def test_a_tower_with_attention_of_megatrons_own_is_fine():
    model = model_of("rope")
    for layer in model.vision_model.decoder.layers:
        attention = layer.self_attention
        attention.core_attention = DotProductAttention(
            attention.config, layer.layer_number, AttnMaskType.no_mask, "self"
        )
    with install(model), torch.no_grad():
        assert torch.isfinite(model(**arguments(tiny.samples(2, img_size=SIZE)))[0]).all()


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
    ours = [w for w in caught if "mcore_packing" in str(w.message)]
    assert all(Path(w.filename).name == "models.py" for w in ours)  # where install is called
    return handle, [str(w.message) for w in ours]


class Overridden(LLaVAModel):
    """A user's own expansion, with the arguments of Megatron's: it doubles image embeddings."""

    def _preprocess_data(self, image_embeddings, *args, **kwargs):
        return super()._preprocess_data(2 * image_embeddings, *args, **kwargs)


def test_an_overridden_expansion_keeps_its_own_and_is_warned_about():
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    model.__class__ = Overridden
    handle, (warning,) = caught_warnings(model)
    assert "_preprocess_data of this Overridden is not Megatron's own" in warning
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
    assert "is not Megatron's own" in warning
    assert parity.compare(model, samples).max_difference < 1e-5
    handle.remove()


def test_an_unknown_release_warns_and_still_remaps(monkeypatch):
    model, samples = model_of(), tiny.samples(4, img_size=SIZE)
    monkeypatch.setattr(releases, "RELEASES", ())
    handle, (warning,) = caught_warnings(model)
    assert "is of no known release" in warning and "the expansion is left alone" in warning
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


def test_a_forward_that_takes_what_it_does_not_name():
    class Takes(LLaVAModel):
        def forward(self, images, input_ids, *args, packed_seq_params=None, **kwargs):
            return super().forward(
                images, input_ids, *args, packed_seq_params=packed_seq_params, **kwargs
            )

    model, samples = model_of(), tiny.samples(3, img_size=SIZE)
    alone = torch.cat([pair[0] for pair in parity.run_alone(model, samples)])
    model.__class__ = Takes
    given = arguments(samples)
    with install(model), torch.no_grad():
        loss, mask = model(**given)  # learned positions restart, whoever passes them on
        assert ((loss[0] + alone) * mask[0]).abs().max() < 1e-5
        images, ids, positions = (given.pop(n) for n in ("images", "input_ids", "position_ids"))
        with pytest.raises(mp.PackingError, match=r"got 3 positional .* its signature names 2"):
            model(images, ids, positions, **given)


def test_arguments_arrive_as_the_caller_passed_them():
    # A wrapper that looks into args, or into kwargs, finds there what it found before.
    received = []

    class Looks(LLaVAModel):
        @functools.wraps(LLaVAModel.forward)
        def forward(self, *args, **kwargs):
            received.append((len(args), sorted(kwargs)))
            return super().forward(*args, **kwargs)

    model = model_of()
    model.__class__ = Looks
    given = arguments(tiny.samples(2, img_size=SIZE))
    images = given.pop("images")
    with install(model), torch.no_grad():
        model(images, **given)
        model(images=images, **given)
    assert received == [(1, sorted(given)), (0, sorted([*given, "images"]))]


@pytest.mark.parametrize(
    "old, message",
    [
        ({"space": "auto"}, "space='auto' is no more: say what boundaries count"),
        ({"fused": False}, "no fused= any more: the expansion is replaced wherever"),
        ({"capacity": 8}, "no capacity= any more: pass max_sequences="),
        ({"pad_between_seqs": True}, "no pad_between_seqs= any more: the caller's own parameters"),
        ({"strict": True}, "no strict= any more"),
    ],
)
def test_old_names_say_the_new_one(old, message):
    with pytest.raises(mp.PackingError, match=message):
        mp.install(model_of(), **old)


def test_old_functions_say_the_new_one():
    with pytest.raises(mp.PackingError, match=r"no layout_options any more: mp.row_spec\(model\)"):
        mp.layout_options  # noqa: B018
    assert "layout_options" not in dir(mp)
    with pytest.raises(TypeError, match="unexpected keyword argument 'fuesd'"):
        mp.install(model_of(), fuesd=True)


def test_rows_that_weigh_unlike_are_told_of_once():
    hook._warn_of_unlike_rows.cache_clear()
    with pytest.warns(UserWarning, match="calculate_per_token_loss is off") as found:
        for model in model_of(), model_of():
            mp.install(model)
    ours = [one for one in found if "calculate_per_token_loss" in str(one.message)]
    assert len(ours) == 1 and ours[0].filename == __file__
    hook._warn_of_unlike_rows.cache_clear()
    model = model_of(per_token_loss=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.install(model)
