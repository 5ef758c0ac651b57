"""The vision tower shared over context-parallel ranks: shares, what travels, and whole models."""

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

import mcore_packing as mp
from mcore_packing.expand import expand_tokens
from mcore_packing.megatron import vision
from mcore_packing.megatron.find import hook_of
from mcore_packing.megatron.vision import routes
from mcore_packing.reference import FIRST_IMAGE, PAD
from mcore_packing.testing import tiny
from mcore_packing.testing.host_reads import HostReads

from . import processes
from .laws import examples
from .models import OwnExpansion, model_of
from .packs import build, make_row, structures

WORKER = Path(__file__).parent / "vision_worker.py"
CP_SIZES = (2, 4, 8)


def make_layout(structure, cp_size, **options):
    row = make_row(structure, tokens_per_tile=5)
    multiple = 2 * cp_size if cp_size > 1 else 1
    return row, build(row, **{"seq_multiple": multiple, "cp_size": cp_size, **options})


def needs(layout, row, cp_size):
    """By looking at every position: how many embeddings of each tile every rank needs."""
    need = torch.zeros(int(row.num_image_tiles.sum()), cp_size, dtype=torch.int32)
    for rank in range(cp_size):
        for source in expand_tokens(layout, cp_size=cp_size, cp_rank=rank).source.tolist():
            if source < PAD:
                need[(FIRST_IMAGE - source) // 5, rank] += 1
    return need


@given(structures(), st.sampled_from(CP_SIZES), st.data())
@examples(400)
def test_shares_are_balanced_and_count_what_travels(structure, cp_size, data):
    row, layout = make_layout(structure, cp_size)
    num_tiles = int(row.num_image_tiles.sum())
    costs = st.lists(st.integers(1, 50), min_size=num_tiles, max_size=num_tiles)
    cost = data.draw(st.none() | costs)
    shares = mp.vision.shares(layout, row.num_image_tiles, cp_size, cost)
    assert shares.encoder.shape == (num_tiles,) and shares.counts.shape == (cp_size, cp_size)
    cost = torch.ones(num_tiles) if cost is None else torch.tensor(cost).float()
    loads = torch.zeros(cp_size).index_add(0, shares.encoder, cost)
    assert loads.max() - loads.min() <= cost.max() if num_tiles else True
    expected = torch.zeros(cp_size, cp_size, dtype=torch.int32)
    need = needs(layout, row, cp_size)
    assert torch.equal(shares.counts, expected.index_add(0, shares.encoder, need))
    of_ranks = [shares.tiles_of(rank) for rank in range(cp_size)]
    assert sorted(tile for tiles in of_ranks for tile in tiles) == list(range(num_tiles))
    made = sum(shares.num_embeddings_of(rank) for rank in range(cp_size))
    assert made == row.num_image_embeddings


@given(structures(max_tokens=20), st.sampled_from(CP_SIZES))
@examples(200)
def test_a_row_that_is_cut_asks_for_less(structure, cp_size):
    limit = 2 * cp_size * (3 + len(structure))
    row, layout = make_layout(structure, cp_size, max_length=limit, on_overflow="truncate")
    shares = mp.vision.shares(layout, row.num_image_tiles, cp_size)
    assert int(shares.counts.sum()) == int(needs(layout, row, cp_size).sum())


@pytest.mark.parametrize(
    "structure, encoder",
    [
        # One sequence, a tile a chunk: every tile is where it is used, the ends with rank 0.
        ([[4]], [0, 1, 1, 0]),
        # Short sequences in which all ranks need as much: ties go to the lowest rank.
        ([[1], [1], [1]], [0, 1, 0]),
        # A tile that costs more than a rank's part goes where it is used all the same.
        ([[0, 0, 0, 1, 0, 0, 0]], [1]),
    ],
    ids=["where-it-is-used", "ties", "alone"],
)
def test_who_encodes_what(structure, encoder):
    row = make_row(structure, tokens_per_tile=4)
    layout = build(row, seq_multiple=4, cp_size=2)
    assert mp.vision.shares(layout, row.num_image_tiles, 2).encoder.tolist() == encoder


def test_most_of_a_long_document_stays():
    row, layout = make_layout([[1, 0] * 200], 8)
    counts = mp.vision.shares(layout, row.num_image_tiles, 8).counts
    assert counts.diagonal().sum() > 0.97 * counts.sum()


def test_tiles_of_unlike_sizes():
    _, layout = make_layout([[2, 0, 1]], 2)
    shares = mp.vision.shares(layout, [2, 1], 2, embeddings_per_tile=[7, 3, 5])
    assert shares.cu_tile_embeddings.tolist() == [0, 7, 10, 15]
    assert int(shares.counts.sum()) == 15


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([2, 1], 2, [1.0]), r"cost is \[1\], expected \[3\]"),
        (([2, 1], 2, [1.0, -1.0, 1.0]), r"expected \[3\], none below 0"),
        (([2], 2), "tiles_per_image has 1 entries, expected one of at least 1 for each of 2"),
        (([3, 1], 2), "image 0: 10 embeddings are not 3 equal tiles"),
        (([2, 1], 3), "cp_size 3 needs every sequence to be a multiple of 6"),
        (([2, 1], 0), "cp_size is 0, expected a positive int"),
    ],
)
def test_shares_that_cannot_be(arguments, message):
    _, layout = make_layout([[2, 0, 1]], 2)
    with pytest.raises(mp.PackingError, match=message):
        mp.vision.shares(layout, *arguments)
    for sizes in ([7, 2, 5], [10, 0, 5], [7, 3, 5, 1], [10, 5]):
        with pytest.raises(mp.PackingError, match="embeddings_per_tile does not say"):
            mp.vision.shares(layout, [2, 1], 2, embeddings_per_tile=sizes)


def same(first, second):
    names = ("encoder", "cu_tile_embeddings", "counts")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def test_shares_follow_the_layout():
    row, layout = make_layout([[2, 0, 1], [0, 3]], 2)
    shares = mp.vision.shares(layout, row.num_image_tiles, 2)
    brings = layout.with_shares(shares)
    assert layout.shares is None and same(brings.shares, shares)
    assert torch.equal(brings.encoder, shares.encoder)
    assert torch.equal(brings.tensor[: len(layout.tensor) - 1], layout.tensor[:-1])
    size = mp.PackedLayout.tensor_size(3, 20, 9, 30, 2)
    for sent in (brings.to_tensor(), brings.to_tensor(size), brings.to_tensor().long()):
        assert same(mp.PackedLayout.from_tensor(sent).shares, shares)
    assert same(pickle.loads(pickle.dumps(brings)).shares, shares)
    stage = mp.PackedLayout.from_tensor(brings.to_tensor(boundaries_only=True))
    assert stage.shares is None and not stage.has_tokens
    assert mp.PackedLayout.from_tensor(layout.to_tensor()).shares is None


@pytest.mark.parametrize(
    "other",
    [[[1, 0], [0, 2]], [[1, 0, 0], [1]], [[0, 1, 0, 0], [2]]],
    ids=["shorter", "fewer tiles", "other places"],
)
def test_shares_of_another_row(other):
    row, layout = make_layout([[1, 0, 0], [2]], 2)
    shares = mp.vision.shares(layout, row.num_image_tiles, 2)
    _, other = make_layout(other, 2)
    with pytest.raises(mp.PackingError, match="are of another row"):
        other.with_shares(shares)


@given(structures(), st.sampled_from(CP_SIZES))
@examples(200)
def test_what_travels_fills_every_rank(structure, cp_size):
    row, layout = make_layout(structure, cp_size)
    if not layout.num_images:
        return
    layout = layout.with_shares(mp.vision.shares(layout, row.num_image_tiles, cp_size))
    parts = layout.shares
    sources = [expand_tokens(layout, None, None, cp_size, r).source for r in range(cp_size)]
    ways = [routes(layout, parts, sources[r], r) for r in range(cp_size)]
    own = [row.images[:, parts.tiles_of(r)].transpose(0, 1).flatten(0, 1) for r in range(cp_size)]
    sent = []
    for rank, way in enumerate(ways):
        sizes = parts.counts[rank].clone()
        sizes[rank] = 0
        sent.append(own[rank][way.sent].split(sizes.tolist()))
    for rank, way in enumerate(ways):
        images = row.images[:, parts.tiles_of(rank)]
        filled = torch.ops.mcore_packing.expand_embeddings(row.text, images, way.source)
        filled[way.arrives] = torch.cat([vectors[rank] for vectors in sent])
        expected = mp.expand_embeddings(layout, row.text, row.images, cp_size=cp_size, cp_rank=rank)
        assert torch.equal(filled, expected)
        stays = way.image_position >= 0
        assert torch.equal(filled[way.image_position[stays].long()], own[rank][stays])


def test_nothing_waits_for_what_travels(monkeypatch):
    # A sort waits for nothing, but a fake one wants a torch with CUDA.
    monkeypatch.setattr(vision, "_first", lambda key, count: key.new_empty(count).long())
    row, layout = make_layout([[2, 0, 1], [0, 3, 0]], 2)
    layout = layout.with_shares(mp.vision.shares(layout, row.num_image_tiles, 2))
    counts, made = layout.shares.num_sent, layout.shares.num_embeddings_of(0)
    with FakeTensorMode():  # its tensors are on a GPU that need not be there
        there = layout._with(torch.empty(layout.tensor.shape, dtype=torch.int32, device="cuda"))
        with HostReads() as reads:
            source = expand_tokens(there, cp_size=2, cp_rank=0).source
            way = routes(there, layout.shares, source, 0)
        assert reads.found == []
        assert {one.device.type for one in way} == {"cuda"}
    assert way.image_position.shape == (made,)
    assert way.sent.shape == (counts[0][1],) and way.arrives.shape == (counts[1][0],)


# Rows


SPEC = mp.RowSpec(image_token_id=tiny.IMAGE_TOKEN_ID, img_seq_len=5, cp_size=2, seq_multiple=4)


def pack(samples, spec=SPEC):
    return mp.data.pack(samples, spec, capacity=256, algorithm="concatenative")[0]


def test_rows_bring_shares_and_hold_the_tiles_of_a_rank():
    rows = pack(tiny.samples(9, img_size=28))
    assert len(rows) > 1
    for at, whole in enumerate(rows):
        shares = whole.layout.shares
        found = mp.vision.shares(whole.layout, whole.num_image_tiles, 2)
        assert same(shares, found)
        for rank in range(2):
            row = rows.shard_vision(rank, 2)[at:][0]
            assert torch.equal(row.images, whole.images[shares.tiles_of(rank)])
            assert torch.equal(row.layout.tensor, whole.layout.tensor)
            assert torch.equal(row.num_image_tiles, whole.num_image_tiles)
    assert pack(tiny.samples(3, img_size=28), mp.RowSpec(img_seq_len=5))[0].layout.shares is None


def test_images_that_are_made_later_are_made_by_the_rank_that_encodes_them():
    samples, made = tiny.samples(9, img_size=28), []

    def later(sample):
        images = sample["images"]
        if images is None:
            return sample
        return sample | {"images": lambda tiles: made.append(len(tiles)) or images[tiles]}

    whole, lazy = pack(samples), pack([later(sample) for sample in samples])
    assert not made  # packing decodes nothing
    for at, row in enumerate(whole):
        assert torch.equal(lazy[at].images, row.images)
        made.clear()
        for rank in range(2):
            mine = row.images[row.layout.shares.tiles_of(rank)]
            for rows in (lazy, whole):
                assert torch.equal(rows.shard_vision(rank, 2)[at].images, mine)
        assert sum(made) == len(row.images)
        made.clear()


@pytest.mark.parametrize("cp_size", CP_SIZES)
def test_a_rank_keeps_its_part_of_the_pixels(cp_size):
    spec = dataclasses.replace(SPEC, cp_size=cp_size, seq_multiple=2 * cp_size)
    rows, _ = mp.data.pack(tiny.samples(90, img_size=28), spec, capacity=16384)
    of_all = rows[0].images.nbytes
    for rank in range(cp_size):
        assert rows.shard_vision(rank, cp_size)[0].images.nbytes <= 1.1 * of_all / cp_size


def test_a_sample_that_is_cut_makes_fewer_tiles():
    sample = tiny.samples(3, img_size=28)[2]
    images = sample["images"]
    later = sample | {"images": lambda tiles: images[tiles]}
    packed = [
        mp.data.pack([one], SPEC, capacity=12, on_too_long="truncate")[0][0]
        for one in (sample, later)
    ]
    assert 0 < len(packed[0].images) < len(images)
    assert torch.equal(packed[0].images, packed[1].images)


@pytest.mark.parametrize(
    "images, message",
    [
        (lambda tiles: torch.zeros(7, 3, 28, 28), r"images made torch.float32 \[7"),
        (lambda tiles: None, "images made"),
    ],
)
def test_images_that_are_made_wrong(images, message):
    sample = tiny.samples(1, img_size=28)[0] | {"images": images}
    with pytest.raises(mp.PackingError, match=message):
        _ = pack([sample])[0]
    without = {name: value for name, value in sample.items() if name != "num_image_tiles"}
    rows, report = mp.data.pack([without], SPEC, capacity=256)
    assert not rows and "num_image_tiles has to say" in str(report.refused[0])


def test_images_that_are_made_unlike():
    samples = tiny.samples(1, img_size=28) * 2
    for made in (torch.zeros(1, 3, 14, 14), torch.zeros(1), samples[0]["images"].double()):
        later = samples[1] | {"images": lambda tiles, made=made: made}
        with pytest.raises(mp.PackingError, match="rows hold those of one kind"):
            _ = pack([samples[0], later])[0]


def test_images_of_unequal_tiles_stay_with_every_rank():
    sample = tiny.samples(3, img_size=28)[2] | {"tokens_per_image": [5, 7]}
    spec = dataclasses.replace(SPEC, img_seq_len=None)
    assert sample["num_image_tiles"].tolist() == [1, 3]
    row = pack([sample], spec).shard_vision(1, 2)[0]
    assert row.layout.shares is None and row.vision_share is None
    assert torch.equal(row.images, sample["images"])


def test_a_row_with_a_share_says_so():
    rows = pack(tiny.samples(3, img_size=28))
    row = rows.shard_vision(1, 2)[0]
    assert row.packed_seq_params.vision_share == (1, 2)
    assert rows[0].packed_seq_params.vision_share is None
    with pytest.raises(mp.PackingError, match="cp_rank is 2"):
        mp.packed_seq_params(row.layout, vision_share=[2, 2])
    with pytest.raises(mp.PackingError, match="context-parallel rank 1 of 2 only"):
        mp.data.split(row)
    text = pack([{"input_ids": torch.arange(1, 9)}]).shard_vision(1, 2)[0]
    assert len(mp.data.split(text)) == 1  # all that there is
    with pytest.raises(mp.PackingError, match="cp_size is 4, but rows are packed for 2"):
        rows.shard_vision(0, 4)
    with pytest.raises(mp.PackingError, match="cp_rank is 2"):
        rows.shard_vision(2, 2)


# What cannot be shared


def capture(model):
    model.vision_model.config.enable_cuda_graph = True
    model.vision_model.config.cuda_graph_impl = "local"


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda model: setattr(model, "_tile_tags", [[1]]), "has tile tags"),
        (capture, "layers of the vision tower are captured as CUDA graphs"),
        (lambda model: setattr(model, "__class__", OwnExpansion), "not Megatron's own"),
    ],
    ids=["tile-tags", "captured", "own-expansion"],
)
def test_a_tower_that_cannot_be_shared(change, why, megatron):
    model = model_of("rope")
    change(model)
    mp.install(model, vision_dp_over_cp=True).remove()  # alone it shares nothing
    model.context_parallel_lm = 2
    with pytest.raises(mp.PackingError, match=f"vision_dp_over_cp=True cannot be: .*{why}"):
        mp.install(model, vision_dp_over_cp=True)


def test_where_megatron_shares_by_itself_ours_stays_away(megatron):
    model = model_of("rope")
    model.context_parallel_lm, model._balance_vision_context_parallel_by_tokens = 2, True
    with pytest.warns(UserWarning, match="shares its vision model over context-parallel ranks"):
        mp.install(model, vision_dp_over_cp=True)
    assert not hook_of(model).plan.shares_vision


@pytest.mark.parametrize("patch, frames, has", [(1, 4, False), (2, 4, True), (2, None, False)])
def test_frames_are_videos_where_the_tower_has_temporal_patches(patch, frames, has):
    given = {"num_frames": None if frames is None else torch.tensor([frames])}
    assert vision._has_videos(SimpleNamespace(temporal_patch_dim=patch), given) == has
    assert not vision._has_videos(SimpleNamespace(), given)  # as before 0.18


# Whole models, in processes


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.ci)])
def found(request):
    """What a job of so many context-parallel ranks found, by case."""
    return processes.result(WORKER, processes=request.param)


def test_losses_and_gradients_are_those_of_one_process(found):
    for name, case in found["cases"].items():
        assert case["loss"] < 1e-9 and case["gradient"] < 1e-9, name


def test_every_rank_encodes_its_share_only(found):
    for name, case in found["cases"].items():
        dummies = 1 if name == "sizes, one image" else 0  # the smallest tile of the row
        assert case["encoded"] == [max(tiles, dummies) for tiles in case["shares"]], name
        assert max(case["encoded"]) - min(case["encoded"]) <= 3, name


def test_what_is_on_the_wire_is_what_the_shares_said(found):
    for name, case in found["cases"].items():
        assert case["sent"] == case["predicted"], name


@pytest.mark.parametrize(
    "fault, message",
    {
        "other_shares": "was given another row than rank 0",
        "tiles_of_next_rank": "images hold the tiles of context-parallel rank 1 of",
        "some_tiles": "all tiles of the row",
        "no_images": "images is a NoneType, expected a tensor of the",
        "gradient_of_images": "images ask for a gradient",
        "another_type": "torch.float64 like text",
    }.items(),
)
def test_what_rank_0_is_told(found, fault, message):
    assert message in found["told"][fault]
