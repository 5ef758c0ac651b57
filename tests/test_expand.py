"""Expansion of embeddings and labels against Megatron's real ``_preprocess_data``."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import mcore_packing as mp
from mcore_packing import PackedLayout
from mcore_packing.expand import expand_tokens, source_positions

from . import oracle
from .laws import examples
from .packs import IMAGE, NAMED, Row, build, make_row, structures

pytestmark = pytest.mark.usefixtures("megatron", "poisoned_memory")


def expand(row: Row, layout: PackedLayout, **rank):
    embeddings = mp.expand_embeddings(layout, row.text, row.images, **rank)
    return embeddings, *mp.expand_labels(layout, row.labels, row.loss_mask, **rank)


def assert_equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("structure", NAMED.values(), ids=NAMED)
def test_equals_megatron_one_by_one_named(structure):
    row = make_row(structure)
    assert_equal(expand(row, build(row)), oracle.concatenated(row))


@examples(5000)
@hypothesis.given(structures(max_sequences=1, max_tokens=16))
def test_one_sequence_equals_megatron(structure):
    row = make_row(structure)
    assert_equal(expand(row, build(row)), oracle.preprocess(row))


@examples(2000)
@hypothesis.given(structures())
def test_pack_equals_megatron_one_by_one(structure):
    row = make_row(structure)
    assert_equal(expand(row, build(row)), oracle.concatenated(row))


def test_an_image_first_costs_the_previous_sequence_nothing():
    # The pack that Megatron gets wrong: A = [11, 12, 13], then [<img>, 21, 22].
    row = make_row([[0, 0, 0], [1, 0, 0]])
    embeddings, labels, loss_mask = expand(row, build(row))
    packed = oracle.preprocess(row)
    assert packed[1][2] == -100 and packed[2][2] == 0  # A's last label is lost
    assert labels[2] == row.labels[2] and loss_mask[2] == row.loss_mask[2]
    torch.testing.assert_close(embeddings, packed[0], rtol=0, atol=0)


def test_an_image_of_one_position_that_ends_a_sequence():
    row = make_row([[0, 0, 1], [0, 1]], tokens_per_tile=1)
    labels = torch.full_like(row.labels, 5)
    labels, loss_mask = mp.expand_labels(build(row), labels, torch.ones_like(row.loss_mask))
    # The token before an image predicts nothing; its last position has its label, masked.
    assert labels.tolist() == [5, -100, 5, -100, 5] and loss_mask.tolist() == [1, 0, 0, 0, 0]


def test_a_label_from_the_next_sequence_is_dropped():
    # Labels shifted over the whole row: the last of A is the placeholder that B begins with.
    row = make_row([[0, 0, 0], [1, 0, 0]])
    labels = torch.cat([row.input_ids[1:], row.input_ids.new_tensor([7])])
    assert labels[2] == IMAGE
    loss_mask = torch.ones_like(row.loss_mask)
    new_labels, new_loss_mask = mp.expand_labels(build(row), labels, loss_mask)
    assert new_labels[2] == -100 and new_loss_mask[2] == 0
    labels[2] = 99
    new_labels, new_loss_mask = mp.expand_labels(build(row), labels, loss_mask)
    assert new_labels[2] == 99 and new_loss_mask[2] == 1


@hypothesis.given(structures(), st.integers(1, 6), st.integers(1, 3))
def test_padding_is_zero_and_masked(structure, seq_multiple, factor):
    row = make_row(structure)
    layout = build(row, seq_multiple=seq_multiple, total_multiple=seq_multiple * factor)
    embeddings, labels, loss_mask = expand(row, layout)
    expected = oracle.concatenated(row)
    real = ~layout.padding_mask
    assert_equal((embeddings[real], labels[real], loss_mask[real]), expected)
    for x, value in ((embeddings, 0), (labels, -100), (loss_mask, 0)):
        assert (x[~real] == value).all()


@hypothesis.given(structures(), st.integers(1, 40))
def test_truncation_equals_megatrons_front(structure, longest):
    row = make_row(structure)
    expected = (x[:longest] for x in oracle.concatenated(row))
    layout = build(row, max_length=longest, on_overflow="truncate")
    assert_equal(expand(row, layout), expected)


@hypothesis.given(structures(), st.sampled_from([1, 2, 4]), st.data())
def test_adjoint(structure, cp_size, data):
    # Law 8, and Law 3: every source row is used at most once.
    row = make_row(structure, dtype=torch.float64)
    rank = {"cp_size": cp_size, "cp_rank": data.draw(st.integers(0, cp_size - 1))}
    longest = data.draw(st.one_of(st.none(), st.integers(1, 8).map(lambda n: 8 * n)))
    options = {"seq_multiple": 2 * cp_size, "max_length": longest}
    layout = build(row, on_overflow="truncate", **options)
    text, images = row.text.requires_grad_(), row.images.requires_grad_()
    embeddings = mp.expand_embeddings(layout, text, images, **rank)
    y = torch.randn(embeddings.shape, dtype=torch.float64)
    grad_text, grad_images = torch.autograd.grad(embeddings, (text, images), y)
    inner = (embeddings * y).sum()
    adjoint = (grad_text * text).sum() + (grad_images * images).sum()
    torch.testing.assert_close(inner, adjoint, rtol=1e-12, atol=1e-12)
    source = expand_tokens(layout, **rank).source
    used = source[source != -1]
    assert used.unique().numel() == used.numel()


def test_collapsing_gives_the_text_back():
    row = make_row(NAMED["T63-N5-B3"])
    layout = build(row)
    embeddings = mp.expand_embeddings(layout, row.text, row.images)
    is_text = row.input_ids != IMAGE
    positions = source_positions(layout, row.num_image_embeddings).text[is_text].long()
    torch.testing.assert_close(embeddings[positions], row.text[is_text], rtol=0, atol=0)


@examples(300)
@hypothesis.given(structures(), st.sampled_from([2, 4, 8]))
def test_ranks_are_the_row(structure, cp_size):
    row = make_row(structure)
    layout = build(row, seq_multiple=2 * cp_size)
    whole = expand(row, layout)
    parts = [expand(row, layout, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
    order = torch.cat(
        [
            mp.cp_partition(layout.cu_seqlens_padded, layout.num_expanded, cp_size, rank)
            for rank in range(cp_size)
        ]
    )
    assert sorted(order.tolist()) == list(range(layout.num_expanded))
    for x, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), x[order], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("hidden_size", [1, 3, 8, 65])
def test_any_width_and_dtype(dtype, hidden_size):
    row = make_row(NAMED["T63-N5-B3"], dtype=dtype, hidden_size=hidden_size)
    assert_equal(expand(row, build(row)), oracle.concatenated(row))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_any_loss_mask(dtype):
    row = make_row(NAMED["T63-N5-B3"])
    row.loss_mask = row.loss_mask.to(dtype)
    assert_equal(expand(row, build(row)), oracle.concatenated(row))


def test_flat_images_are_the_same():
    row = make_row(NAMED["adjacent-images"])
    flat = row.images.transpose(0, 1).reshape(-1, row.images.shape[2])
    layout = build(row)
    torch.testing.assert_close(
        mp.expand_embeddings(layout, row.text, flat),
        mp.expand_embeddings(layout, row.text, row.images),
        rtol=0,
        atol=0,
    )


def test_strided_inputs_are_the_same():
    row = make_row(NAMED["adjacent-images"])
    layout = build(row)
    text = row.text.t().contiguous().t().requires_grad_()
    images = row.images.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    embeddings = mp.expand_embeddings(layout, text, images)
    torch.testing.assert_close(
        embeddings, mp.expand_embeddings(layout, row.text, row.images), rtol=0, atol=0
    )
    embeddings.sum().backward()  # an expanded gradient of stride 0
    assert torch.equal(text.grad, (row.input_ids != IMAGE).float()[:, None].expand_as(text))
    assert torch.equal(images.grad, torch.ones_like(images))


@pytest.mark.parametrize("frozen", ["text", "images"])
def test_a_frozen_side_has_no_gradient(frozen):
    row = make_row(NAMED["image-first"])
    text, images = row.text.requires_grad_(), row.images.requires_grad_()
    (text if frozen == "text" else images).requires_grad_(False)
    mp.expand_embeddings(build(row), text, images).sum().backward()
    assert (text.grad is None) == (frozen == "text")
    assert (images.grad is None) == (frozen == "images")


def test_what_the_caller_writes_into_its_tokens_later_changes_no_gradient():
    row = make_row(NAMED["T63-N5-B3"])
    sources = row.text.requires_grad_(), row.images.requires_grad_()
    expected = torch.autograd.grad(expand(row, build(row))[0].sum(), sources)
    layout = build(row)
    row.input_ids[:] = IMAGE
    found = torch.autograd.grad(expand(row, layout)[0].sum(), sources)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_differentiating_twice_is_refused():
    row = make_row(NAMED["T63-N5-B3"])
    text, images = row.text.requires_grad_(), row.images.requires_grad_()
    embeddings = mp.expand_embeddings(build(row), text, images)
    grads = torch.autograd.grad(embeddings.pow(2).sum(), (text, images), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[1].sum().backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"text": torch.ones(5, 4)}, mp.PackingError, r"text is \[5, 4\], expected \[4, H\]"),
        ({"images": torch.ones(4, 1, 4)}, mp.PlaceholderMismatch, "images hold 4 embeddings, but"),
        ({"images": None}, mp.PlaceholderMismatch, "images hold 0 embeddings, but"),
        ({"images": torch.ones(5, 1, 3)}, mp.PackingError, r"images are \[5, 1, 3\]"),
        ({"images": torch.ones(5, 1, 4).half()}, mp.PackingError, r"expected .* like text"),
        ({"images": torch.ones(5)}, mp.PackingError, r"images are \[5\]"),
        ({"images": [torch.ones(5, 1, 4)]}, mp.PackingError, "images are a list, expected"),
        ({"text": None}, mp.PackingError, r"text is NoneType, expected \[4, H\]"),
    ],
)
def test_bad_embeddings(change, error, message):
    row = make_row([[0, 1, 0, 0]])
    with pytest.raises(error, match=message):
        mp.expand_embeddings(
            build(row), **{"text": torch.ones(4, 4), "images": torch.ones(5, 1, 4), **change}
        )


@pytest.mark.parametrize(
    "cp_size, cp_rank, options, message",
    [
        (2, 2, {"seq_multiple": 4}, "cp_rank is 2"),
        (2, 0, {}, "built with seq_multiple=1"),
        (2, 0, {"seq_multiple": 2, "total_multiple": 4}, "built with seq_multiple=2"),
    ],
)
def test_a_row_that_does_not_split_is_refused(cp_size, cp_rank, options, message):
    row, rank = make_row([[0, 1, 0, 0], [0]]), {"cp_size": cp_size, "cp_rank": cp_rank}
    layout = build(row, **options)
    for expands in (
        lambda: mp.expand_labels(layout, row.labels, row.loss_mask, **rank),
        lambda: mp.expand_embeddings(layout, row.text, row.images, **rank),
        lambda: source_positions(layout, 5, **rank),
    ):
        with pytest.raises(mp.PackingError, match=message):
            expands()


def test_bad_labels():
    row = make_row([[0, 1, 0, 0]])
    with pytest.raises(mp.PackingError, match="labels has 3 entries, but the row has 4 tokens"):
        mp.expand_labels(build(row), row.labels[:3], row.loss_mask)
    for labels in (row.loss_mask, row.labels.to(torch.uint8)):  # -100 would become 156
        with pytest.raises(mp.PackingError, match=f"labels is {labels.dtype}"):
            mp.expand_labels(build(row), labels, row.loss_mask)
    labels, loss_mask = mp.expand_labels(build(row), row.labels[None], None)
    assert labels.shape == (8,) and loss_mask is None
