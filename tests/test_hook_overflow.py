"""Rows that do not fit: nothing trained is lost in silence."""

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.megatron.call import PackedCall
from mcore_packing.megatron.params import LaidOutParams
from mcore_packing.testing import tiny

from . import packs
from .models import RELEASE, SIZE, arguments, both_expansions, install, model_of

pytestmark = pytest.mark.usefixtures("megatron")


def alone_mask(model, samples):
    """The loss mask of samples that are run one by one, one behind the other."""
    return torch.cat([pair[1] for pair in parity.run_alone(model, samples)])


@both_expansions
def test_truncation_at_the_models_length(ours, seen, caplog):
    samples = tiny.samples(4, img_size=SIZE)
    whole = model_of("rope")
    short = model_of("rope", max_sequence_length=150)
    calls = seen(short)
    with install(short, ours=ours), pytest.raises(mp.PackingError, match="there is room for 150"):
        short(**arguments(samples))
    cut = {"ours": ours, "on_overflow": "truncate"}
    with install(whole, ours=ours), install(short, **cut), torch.no_grad():
        expected, expected_mask = whole(**arguments(samples))
        loss, mask = short(**arguments(samples))
    lost = int(alone_mask(whole, samples)[150:].sum())
    (said,) = [r.getMessage() for r in caplog.records if "trained tokens" in r.getMessage()]
    assert said.startswith(f"{lost} trained tokens do not fit the row of 150")
    assert loss.shape == mask.shape == (1, 150) and expected.shape[1] > 150
    assert calls[-1]["packed_seq_params"].cu_seqlens_q.max() == 150
    torch.testing.assert_close(mask, expected_mask[:, :150], rtol=0, atol=0)
    torch.testing.assert_close(loss * mask, (expected * expected_mask)[:, :150], rtol=0, atol=1e-5)


@both_expansions
@pytest.mark.parametrize("longest", [120, 400])
def test_the_fixed_length_of_pipelines(ours, longest, seen):
    model, samples = model_of("rope", max_sequence_length=longest), tiny.samples(3, img_size=SIZE)
    calls = seen(model)
    model._language_is_pipeline_parallel = True
    with install(model, ours=ours, on_overflow="truncate"), torch.no_grad():
        loss, mask = model(**arguments(samples))
    cu_seqlens = calls[-1]["packed_seq_params"].cu_seqlens_q
    assert loss.shape == mask.shape == (1, longest) and cu_seqlens[-1] == longest
    alone = torch.cat([pair[0] for pair in parity.run_alone(model_of("rope"), samples)])[:longest]
    size = alone.numel()
    assert ((loss[0, :size] + alone) * mask[0, :size]).abs().max() < 1e-5
    assert not mask[0, size:].any()


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


def test_a_riding_layout_that_was_cut_loses_no_trained_token_in_silence(caplog):
    model = model_of("rope", max_sequence_length=64)
    ids = torch.arange(10, 90)
    given = arguments([{"input_ids": ids}], torch.tensor([0, 30], dtype=torch.int32))
    edges = given[
        "packed_seq_params"
    ].cu_seqlens_q  # what is behind them is trained, and does not fit
    layout = mp.PackedLayout.build(ids, edges, [], mp.row_spec(model), space="collapsed")
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


LONGEST = 96
IN_TOKENS = LONGEST - 4  # there is one image, of five positions, at the start


def long_row(clamped: bool, tokens_cut: bool, padded: bool = False):
    """Arguments of a row of 130 positions for a model of 96, with expanded boundaries, and how many
    trained tokens are behind position 96."""
    samples = [{"input_ids": torch.randint(1, 500, (n,))} for n in (46, 36, 44)]
    samples[0]["input_ids"][0] = packs.IMAGE
    samples[0]["images"] = torch.randn(1, 3, SIZE, SIZE)
    given = arguments(samples)
    given["loss_mask"][:] = 1
    edges = given["packed_seq_params"].cu_seqlens_q + 4
    edges[0] = 0
    if padded:  # as Megatron's loader fills its rows up
        given["loss_mask"][:, IN_TOKENS:] = 0
    if tokens_cut:  # --dataloader-seq-length cuts them, whatever the boundaries say
        for name in ("input_ids", "labels", "loss_mask", "position_ids"):
            given[name] = given[name][:, :116]
    if clamped:  # as Megatron-Bridge's llava_step and Megatron's main do
        edges = edges.clamp(max=LONGEST)
    given["packed_seq_params"] = LaidOutParams(
        "thd", edges, edges, max_seqlen_q=50, max_seqlen_kv=50, space="expanded"
    )
    return given, int(given["loss_mask"][:, IN_TOKENS:].sum())


@both_expansions
@pytest.mark.parametrize("riding", [False, True], ids=["plain", "riding"])
@pytest.mark.parametrize(
    "clamped, tokens_cut", [(True, False), (True, True)], ids=["boundaries", "both"]
)
def test_boundaries_that_end_at_the_maximum_are_no_consent(
    clamped, tokens_cut, riding, ours, caplog
):
    model = model_of("rope", max_sequence_length=LONGEST)
    given, trained = long_row(clamped, tokens_cut)
    assert trained == (24 if tokens_cut else 34)

    def run(**options):
        with install(model, ours, **options), torch.no_grad():
            if riding:
                params = given["packed_seq_params"]
                layout = mp.PackedLayout.build(
                    given["input_ids"], params.cu_seqlens_q, [5], mp.row_spec(model),
                    space="expanded",
                )  # fmt: skip
                return model(**given | {"packed_seq_params": mp.packed_seq_params(layout)})
            return model(**given)

    with pytest.raises(mp.PackingError, match=f"{trained} trained tokens do not fit the row of 96"):
        run()
    caplog.set_level(logging.WARNING, logger="mcore_packing")
    loss, _ = run(on_overflow="truncate")
    assert loss.shape == (1, LONGEST)
    assert f"{trained} trained tokens do not fit" in caplog.text


@both_expansions
def test_tokens_that_were_cut_without_their_boundaries_are_refused(ours):
    model = model_of("rope", max_sequence_length=1024)
    given, _ = long_row(clamped=False, tokens_cut=True)
    for on_overflow in ("raise", "truncate"):
        with (
            install(model, ours, on_overflow=on_overflow),
            pytest.raises(mp.PackingError, match="the last boundary is 130, past the end"),
        ):
            model(**given)


@both_expansions
def test_padding_that_falls_off_is_no_loss(ours, caplog):
    model = model_of("rope", max_sequence_length=LONGEST)
    given, trained = long_row(clamped=True, tokens_cut=False, padded=True)
    assert trained == 0
    with install(model, ours), torch.no_grad():
        loss, mask = model(**given)
    assert loss.shape == (1, LONGEST) and mask.sum() == LONGEST - 5
    assert "do not fit" not in caplog.text


@pytest.mark.skipif(not RELEASE.keeps_text_rows, reason="it cuts and pads such a row like others")
def test_a_text_row_is_as_long_as_megatron_leaves_it(seen):
    model = model_of("rope", max_sequence_length=LONGEST)
    calls = seen(model)
    given = arguments([{"input_ids": torch.randint(1, 500, (n,))} for n in (50, 36, 44)])
    edges = given["packed_seq_params"].cu_seqlens_q
    with install(model, ours=False), torch.no_grad():
        loss, mask = model(**given)
        assert loss.shape == mask.shape == (1, 130)
        assert torch.equal(calls[-1]["packed_seq_params"].cu_seqlens_q[: len(edges)], edges)
        model._language_is_pipeline_parallel = True
    with install(model, ours=False), pytest.raises(mp.PackingError, match="130 positions, where"):
        model(**given)


@pytest.mark.skipif(RELEASE.keeps_text_rows, reason="it takes no such row")
@pytest.mark.parametrize("raises", [True, False])
def test_a_replay_dies_of_what_an_eager_call_would_raise(raises):
    # While a stream captures, asserts take the place of what is read.
    call = SimpleNamespace(plan=SimpleNamespace(raises_on_overflow=raises))
    for status, lost, dies in ((0, 0, False), (3, 0, True), (0, 5, raises)):
        queued = {"status": torch.tensor([status, 0]), "lost": torch.tensor([lost])}
        with pytest.raises(RuntimeError) if dies else contextlib.nullcontext():
            PackedCall._assert_on_gpu(call, queued)
    PackedCall._assert_on_gpu(call, {})


def test_a_stage_without_a_loss_mask_says_nothing():
    # The last stage has one, and raises.
    model = model_of("rope", max_sequence_length=LONGEST)
    given, _ = long_row(clamped=True, tokens_cut=False)
    with install(model), torch.no_grad():
        model(**{**given, "labels": None, "loss_mask": None})
