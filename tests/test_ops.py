"""Every op: opcheck, torch.compile, fakes on a GPU that is not there, no value ever read."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import mcore_packing as mp
from mcore_packing import ops
from mcore_packing.expand import expand_tokens, source_positions
from mcore_packing.testing.host_reads import HostReads

from . import oracle
from .packs import IMAGE, NAMED, build, lay_out, make_row

NAMES = [name for name in NAMED if name not in ("one-token",)]


def arguments(structure, grad=False):
    """``{op: its arguments}`` for one row."""
    row = make_row(structure)
    layout = build(row, seq_multiple=4)
    sizes = layout.num_collapsed, layout.num_images, layout.num_seqs
    source = expand_tokens(layout).source
    text, images = row.text.requires_grad_(grad), row.images.requires_grad_(grad)
    positions = source_positions(layout, row.num_image_embeddings)
    length = layout.num_expanded
    return {
        ops.layout: (
            row.input_ids, row.cu_seqlens, None, row.tokens_per_image, IMAGE, False, -1, -1, length,
            4, False,
        ),
        ops.expand_tokens: (layout.tensor, row.labels, row.loss_mask, *sizes, IMAGE, length, 2, 1),
        ops.source_positions: (layout.tensor, *sizes, row.num_image_embeddings, 2, 0),
        ops.expand_embeddings: (text, images, source, *positions),
        ops.collect_gradients: (
            torch.randn(length, 4), positions.images, row.images.shape[0], row.images.shape[1],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", arguments(NAMED["T63-N5-B3"]), ids=lambda op: op.name())
@pytest.mark.parametrize("structure", [NAMED["T63-N5-B3"], NAMED["text-only"]], ids=["N5", "N0"])
def test_opcheck(op, structure):
    torch.library.opcheck(op, arguments(structure)[op])


@pytest.mark.parametrize("structure", [NAMED["T63-N5-B3"], NAMED["text-only"]], ids=["N5", "N0"])
def test_opcheck_with_gradients(structure):
    torch.library.opcheck(
        ops.expand_embeddings, arguments(structure, grad=True)[ops.expand_embeddings]
    )


def whole_path(input_ids, cu_seqlens, counts, known, text, images, labels, loss_mask):
    """Everything between the tokens and the language model."""
    layout = lay_out(input_ids, cu_seqlens, counts, num_image_embeddings=known, seq_multiple=4)
    embeddings = mp.expand_embeddings(layout, text, images)
    labels, loss_mask = mp.expand_labels(layout, labels, loss_mask)
    # Backward, spelled out: without a GPU, autograd itself cannot run on tensors that claim one.
    positions = source_positions(layout, known)
    grad_text = ops.collect_gradients(embeddings, positions.text, text.shape[0], 1)
    grad_images = ops.collect_gradients(embeddings, positions.images, *images.shape[:2])
    boundaries = layout.cu_seqlens_padded, layout.position_ids, layout.position_ids_collapsed
    masks = layout.padding_mask, layout.is_cut
    return embeddings, labels, loss_mask, grad_text, grad_images, *boundaries, *masks


def inputs_of(row):
    return (
        row.input_ids, row.cu_seqlens, row.tokens_per_image, row.num_image_embeddings,
        row.text, row.images, row.labels, row.loss_mask,
    )  # fmt: skip


def expand_only(text, images, source, text_position, image_position):
    return ops.expand_embeddings(text, images, source, text_position, image_position) * 2


def test_compiles_whole_and_dynamic():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(expand_only, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, name in enumerate(("T63-N5-B3", "adjacent-images", "image-first")):
        given = arguments(NAMED[name], grad=True)[ops.expand_embeddings]
        found, expected = compiled(*given), expand_only(*given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        y = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
        for x in given[:2]:
            gradients = [
                torch.autograd.grad(out, x, y, retain_graph=True)[0] for out in (found, expected)
            ]
            torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # no graph per shape


def expand_with_layout(layout, text, images, labels, loss_mask):
    embeddings = mp.expand_embeddings(layout, text, images)
    return embeddings, *mp.expand_labels(layout, labels, loss_mask)


def test_expansion_compiles_around_a_layout():
    torch._dynamo.reset()
    compiled = torch.compile(expand_with_layout, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("T63-N5-B3", "adjacent-images"):
        row = make_row(NAMED[name])
        found, expected = (
            function(
                build(row),
                row.text.requires_grad_(), row.images.requires_grad_(), row.labels, row.loss_mask,
            )
            for function in (compiled, expand_with_layout)
        )  # fmt: skip
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        found[0].sum().backward()
        assert torch.equal(row.images.grad, torch.ones_like(row.images))


@pytest.mark.parametrize("op", arguments(NAMED["T63-N5-B3"]), ids=lambda op: op.name())
def test_every_op_compiles(op):
    torch._dynamo.reset()

    def call(*args):
        return op(*args)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("T63-N5-B3", "adjacent-images"):
        given = arguments(NAMED[name])[op]
        found, expected = compiled(*given), op(*given)
        if isinstance(found, torch.Tensor):
            found, expected = (found,), (expected,)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_no_value_is_read_between_tokens_and_language_model():
    row = make_row(NAMED["T63-N5-B3"])
    inputs = inputs_of(row)
    with FakeTensorMode():  # its tensors are on a GPU that need not be there
        given = [
            torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x
            for x in inputs
        ]
        with HostReads() as reads:
            outputs = whole_path(*given)
    assert reads.found == []
    assert {output.device.type for output in outputs} == {"cuda"}
    assert outputs[4].shape == row.images.shape


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(1).copy_(x),
        lambda x: x.item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
    ],
    ids=["cpu", "to", "copy_", "item", "nonzero", "index", "bool"],
)
def test_every_way_to_the_host_is_seen(read):
    with FakeTensorMode():
        on_gpu = torch.empty(1, device="cuda")
        with HostReads() as reads:
            try:
                read(on_gpu)
            except Exception:  # a fake has no values to give
                return
    assert len(reads.found) == 1, reads.found


def fake(mode, values):
    return [
        mode.from_tensor(value.detach()) if isinstance(value, torch.Tensor) else value
        for value in values
    ]


def test_the_proof_catches_megatrons_own(megatron):
    row = make_row(NAMED["T63-N5-B3"])
    with HostReads() as reads:
        oracle.preprocess(row)
    assert len(reads.found) > 10, reads.found
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = fake(mode, vars(row).values())
    with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        oracle.preprocess(type(row)(*fakes))
