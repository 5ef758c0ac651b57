"""What only a GPU can show: Transformer Engine, host synchronisations, graphs, memory, bounds."""

import contextlib

import pytest
import torch

import mcore_packing as mp
from mcore_packing import PackedLayout, parity
from mcore_packing.expand import expand_tokens
from mcore_packing.megatron.vision import routes
from mcore_packing.testing import tiny

from . import packs
from .models import both_expansions, install
from .packs import IMAGE, NAMED, lay_out, make_row

pytestmark = pytest.mark.gpu
SIZE = 28
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def build(row, **options):
    """A layout that does not look: one launch, no synchronisation."""
    return packs.build(row, num_image_embeddings=row.num_image_embeddings, **options)


def long_row(num_seqs=8, hidden_size=256, dtype=torch.bfloat16):
    """About 20 k positions on the GPU."""
    sequence = [0] * 300 + [1] + [0] * 100 + [3] + [0] * 30
    shape = {"tokens_per_tile": 576, "hidden_size": hidden_size, "dtype": dtype}
    return make_row([sequence] * num_seqs, **shape, device="cuda")


@contextlib.contextmanager
def no_synchronisation():
    """Any operation that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("positions", ["learned_absolute", "rope", "rope, fused"])
@pytest.mark.parametrize("count", [1, 4, 16])
@both_expansions
def test_forward_packed_vs_batched(count, positions, ours):
    positions, _, fused = positions.partition(", ")
    if fused and not tiny.HAVE_TE:
        pytest.skip("fused RoPE is Transformer Engine's")
    size = {"img_size": 28 if hasattr(torch.cuda, "PRETENDED") else 336}
    model = tiny.llava_model(positions, language={"apply_rope_fusion": bool(fused)}, **size)
    samples = tiny.samples(count, **size)
    alone = parity.run_alone(model, samples)
    with install(model, ours):
        result = parity.compare(model, samples, alone)
    assert result.token_mult_prob_error < 1.02 and result.lost_labels == 0, tiny.attention_name()
    # Of one sample, only attention is wrong: past the boundary, where memory may hold what is
    # right.
    if positions == "learned_absolute" and count > 1:
        with_collapsed = parity.compare(model, samples, alone).token_mult_prob_error
        assert not with_collapsed < 1.05  # nan counts as wrong


@pytest.mark.parametrize("structure", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expansion_equals_the_cpu(structure, dtype):
    rows = {device: make_row(structure, dtype=dtype, device=device) for device in ("cuda", "cpu")}
    results = {}
    for device, row in rows.items():
        layout = build(row, seq_multiple=4, fixed_length=400)
        layout.check()
        text, images = row.text.requires_grad_(), row.images.requires_grad_()
        embeddings = mp.expand_embeddings(layout, text, images)
        embeddings.backward(
            torch.arange(400, device=device)[:, None].expand_as(embeddings).to(dtype)
        )
        labels, loss_mask = mp.expand_labels(layout, row.labels, row.loss_mask)
        maps = (layout.position_ids, layout.position_ids_collapsed, layout.padding_mask)
        results[device] = embeddings, text.grad, images.grad, labels, loss_mask, *maps
        results[device] += (layout.cu_seqlens_padded, layout.cu_seqlens_expanded)
    for found, expected in zip(results["cuda"], results["cpu"], strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("cp_rank", [0, 3])
def test_what_travels_between_ranks_equals_the_cpu(cp_rank):
    row = make_row(NAMED["T63-N5-B3"])
    on_cpu = packs.build(row, seq_multiple=8, cp_size=4)
    on_cpu = on_cpu.with_shares(mp.vision.shares(on_cpu, row.num_image_tiles, 4))
    found = {}
    for device in "cpu", "cuda":
        layout = on_cpu.to(device)
        source = expand_tokens(layout, cp_size=4, cp_rank=cp_rank).source
        with no_synchronisation() if device == "cuda" else contextlib.nullcontext():
            found[device] = routes(layout, layout.shares, source, cp_rank)
    for on_gpu, expected in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(on_gpu.cpu(), expected, rtol=0, atol=0)


def test_no_synchronisation_forward_and_backward():
    row = long_row()
    text, images = row.text.requires_grad_(), row.images.requires_grad_()
    known = row.num_image_embeddings
    with no_synchronisation():
        layout = packs.build(row, num_image_embeddings=known, seq_multiple=8, total_multiple=64)
        embeddings = mp.expand_embeddings(layout, text, images)
        mp.expand_labels(layout, row.labels, row.loss_mask)
        mp.packed_seq_params(layout, seq_idx=True)
        embeddings.backward(torch.ones_like(embeddings))
    layout.check()


@pytest.fixture
def waits(monkeypatch):
    """Names every wait for a status, where the language model has not run yet."""
    found = []
    wait = torch.cuda.Event.synchronize

    def counted(event):
        found.append("wait")
        return wait(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", counted)
    return found


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("rides_along", [False, True], ids=["built-in-the-model", "rides-along"])
def test_one_wait_before_the_language_model_or_none(rides_along, waits):
    model, samples = tiny.llava_model("rope", img_size=SIZE), tiny.samples(4, img_size=SIZE)
    row = parity.collate(samples)
    events, lengths = [], []
    if rides_along:
        counts = row["num_image_tiles"].cpu() * model.img_seq_len
        ids, edges = row["input_ids"].cpu(), row["cu_seqlens"].cpu()
        layout = PackedLayout.build(ids, edges, counts, mp.row_spec(model), space="collapsed")
        row["packed_seq_params"] = mp.packed_seq_params(layout.to("cuda"))

    def before(module, args, kwargs):
        torch.cuda.set_sync_debug_mode("default")
        events.append(list(waits))
        params = kwargs["packed_seq_params"]
        lengths.append((params.max_seqlen_q, int(params.cu_seqlens_q.diff().max())))

    with mp.install(model, space="collapsed"):
        parity.forward(model, row)  # compile, allocate
        model.language_model.register_forward_pre_hook(before, with_kwargs=True)
        waits.clear()
        with no_synchronisation():  # the copy to pinned memory and its event are none of these
            parity.forward(model, row)
    assert events == [[] if rides_along else ["wait"]]
    (found, longest), *_ = lengths
    assert found == longest  # exact


@pytest.mark.usefixtures("megatron")
def test_a_bad_row_raises_before_any_layer():
    model, samples = tiny.llava_model("rope", img_size=SIZE), tiny.samples(4, img_size=SIZE)
    row = parity.collate(samples)
    layers = []
    model.language_model.decoder.layers[0].register_forward_pre_hook(lambda *_: layers.append(1))
    with mp.install(model, space="collapsed") as handle:
        parity.forward(model, row)
        handle.check()
        layers.clear()
        row["cu_seqlens"] = row["cu_seqlens"].flip(0)
        with pytest.raises(mp.PackingError, match="cu_seqlens"):
            parity.forward(model, row)
        assert layers == []
        with pytest.raises(mp.PackingError, match="cu_seqlens"):
            handle.check()


def test_a_bad_layout_stays_in_bounds():
    # Guards around every tensor: no kernel writes outside, whatever it is given.
    row = make_row(NAMED["T63-N5-B3"], device="cuda")
    row.tokens_per_image[2] = -7
    layout = build(row, fixed_length=400)
    layout.num_image_embeddings = row.images.shape[:2].numel()
    mp.expand_embeddings(layout, row.text, row.images)
    torch.cuda.synchronize()
    with pytest.raises(mp.PackingError, match="image 2: tokens_per_image is -7"):
        layout.check()


def test_offsets_beyond_int32():
    hidden_size, tiles, per_tile = 8192, 500, 576  # 2.4 G elements, 4.7 GB
    ids = torch.full((2 * tiles,), 7, device="cuda")
    ids[1::2] = IMAGE
    cu_seqlens = torch.tensor([0, 2 * tiles], dtype=torch.int32, device="cuda")
    counts = torch.full((tiles,), per_tile, dtype=torch.int32, device="cuda")
    layout = lay_out(ids, cu_seqlens, counts, num_image_embeddings=tiles * per_tile)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    text = torch.randn(2 * tiles, hidden_size, **options)
    images = torch.randn(per_tile, tiles, hidden_size, **options)
    out = mp.expand_embeddings(layout, text, images)
    layout.check()
    assert out.numel() > 2**31
    for tile in (0, 1, tiles // 2, tiles - 1):  # each text, then the embeddings of its tile
        start = tile * (per_tile + 1)
        assert torch.equal(out[start], text[2 * tile])
        assert torch.equal(out[start + 1 : start + 1 + per_tile], images[:, tile])


def test_memory_is_the_output_and_the_index():
    row = long_row(hidden_size=2048)
    layout = build(row)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = mp.expand_embeddings(layout, row.text, row.images)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= out.numel() * out.element_size() + (1 << 21)


def test_a_captured_graph_replays_with_other_boundaries():
    # The same numbers of tokens, images and embeddings in all; fewer sequences repeat the last
    # value.
    a, b, c = [0] * 300 + [1] + [0] * 99, [0] * 50 + [2, 0], [3] + [0] * 147
    structures = [[a, b, c, a, b, c], [c, a, b + a, c + b], [a + b + c + c + b + a]]
    shape = {"tokens_per_tile": 576, "hidden_size": 256, "device": "cuda"}
    rows = [make_row(structure, seed=seed, **shape) for seed, structure in enumerate(structures)]
    entries, known = 7, rows[0].num_image_embeddings
    length = -(-(rows[0].input_ids.numel() + known + 6 * 3) // 64) * 64
    names = ("input_ids", "cu_seqlens", "tokens_per_image", "text", "images", "labels", "loss_mask")
    static = {name: getattr(rows[0], name).clone() for name in names}
    sources = static["text"].requires_grad_(), static["images"].requires_grad_()
    y = torch.randn(length, shape["hidden_size"], device="cuda")

    def step():
        layout = lay_out(
            static["input_ids"], static["cu_seqlens"], static["tokens_per_image"],
            num_image_embeddings=known, fixed_length=length, seq_multiple=4,
        )  # fmt: skip
        embeddings = mp.expand_embeddings(layout, static["text"], static["images"])
        labels, loss_mask = mp.expand_labels(layout, static["labels"], static["loss_mask"])
        gradients = torch.autograd.grad(embeddings, sources, y)
        embeddings = embeddings.detach()
        return embeddings, *gradients, labels, loss_mask, layout.cu_seqlens_padded, layout.status

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for row in rows:
        spare = entries - row.cu_seqlens.numel()
        last = row.cu_seqlens[-1:]
        row.cu_seqlens = torch.cat([row.cu_seqlens, last.expand(spare)])
        with torch.no_grad():
            for name in names:
                static[name].copy_(getattr(row, name))
        graph.replay()
        replayed = [x.clone() for x in captured]
        for found, expected in zip(replayed, step(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert int(replayed[-1][0]) == 0


@pytest.mark.usefixtures("megatron")
def test_a_captured_hook_asserts_instead(monkeypatch):
    # Nothing is read while a stream captures: the bound serves, and an assertion on the GPU.
    model, samples = tiny.llava_model("rope", img_size=SIZE), tiny.samples(4, img_size=SIZE)
    row = parity.collate(samples)
    with torch.no_grad():
        images = model.vision_model(row["images"])
    # The tower's attention forks Megatron's generator, whose state cannot be had in a capture.
    monkeypatch.setattr(model.vision_model, "forward", lambda *args, **kwargs: images)
    given, lengths = [], []

    def reach(module, args, kwargs):
        params = kwargs["packed_seq_params"]
        given.append(params.cu_seqlens_q)
        lengths.append(params.max_seqlen_q)
        raise Reached

    with mp.install(model, space="collapsed"), torch.no_grad():
        expected, _ = parity.forward(model, row)
        model.language_model.register_forward_pre_hook(reach, with_kwargs=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), contextlib.suppress(Reached):
            parity.forward(model, row)
        graph.replay()
        torch.cuda.synchronize()
    assert int(given[0][-1]) == expected.shape[1]
    assert lengths[0] % 1024 == 0 and lengths[0] > expected.shape[1]


class Reached(Exception):
    """The language model was called."""


@pytest.mark.parametrize("cp_size", [1, 2, 4, 8])
def test_partition_equals_transformer_engines(cp_size):
    tex = pytest.importorskip("transformer_engine_torch")
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 40, (6,), generator=generator) * 2 * cp_size
        lengths[0] += 2 * cp_size
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().cuda()
        total = int(cu_seqlens[-1])
        for rank in range(cp_size):
            expected = tex.thd_get_partitioned_indices(cu_seqlens, total, cp_size, rank)
            found = mp.cp_partition(cu_seqlens, total, cp_size, rank)
            assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize(
    "op",
    ["layout", "expand_tokens", "source_positions", "expand_embeddings", "collect_gradients"],
)
def test_opcheck_on_a_gpu(op):
    from . import test_ops

    given = test_ops.arguments(NAMED["T63-N5-B3"])
    function = getattr(test_ops.ops, op)
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in given[function]]
    torch.library.opcheck(function, moved)


def test_compiled_with_inductor():
    row = long_row(num_seqs=2, dtype=torch.float32)
    layout = build(row)

    def step(text, images):
        return mp.expand_embeddings(layout, text * 2, images).sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    given = row.text.requires_grad_(), row.images.requires_grad_()
    found, expected = compiled(*given), step(*given)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(out.sum(), given) for out in (found, expected))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.usefixtures("megatron")
def test_varlen_attention_equals_sdpa():
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from .test_attention import thd

    config = TransformerConfig(num_layers=1, hidden_size=256, num_attention_heads=4,
                               num_query_groups=2, attention_dropout=0.0)  # fmt: skip
    params = thd([0, 50, 51, 300])
    params.cu_seqlens_q = params.cu_seqlens_kv = params.cu_seqlens_q.cuda()
    query, key, value = (
        torch.randn(320, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)
    )
    for mask_type in (AttnMaskType.causal, AttnMaskType.no_mask):
        attention = mp.attention.PackedAttention(config, 1, mask_type, "self")
        found = attention(query, key, value, None, packed_seq_params=params)
        expected = attention._per_sequence(
            query.float(), key.float(), value.float(), params, mask_type == AttnMaskType.causal
        )
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
