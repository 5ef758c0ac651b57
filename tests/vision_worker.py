"""Context-parallel ranks that share the vision tower of a LLaVAModel; test_vision.py starts them.

Losses and gradients of each case are compared with those of one process, in fp64. Rank 0 prints
the worst of all ranks, what they encoded, and what they sent.
"""

import contextlib
import json
import logging
import warnings
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from models import RELEASE, radio, resolution_row, resolution_samples

import mcore_packing as mp
from mcore_packing import cpu, parity
from mcore_packing.megatron.hook import hook_of
from mcore_packing.testing import tiny

SIZE = 28  # pixels: 5 positions a tile, 4 without the class token
RECOMPUTES = {"recompute_granularity": "full", "recompute_method": "uniform"}
RECOMPUTES |= {"recompute_num_layers": 1}
TOWER = ("vision_model", "vision_projection")
COLLAPSED = ("collapsed", "no counts", "sizes")  # how rows come that have no layout


def text_sample(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(1, 500, (length,), generator=generator), "images": None}


def one_tile():
    return [tiny.samples(1, img_size=SIZE, dtype=torch.float64)[0], text_sample(30, 1)]


def one_image():
    return resolution_samples([[1], [1, 1], [1]])[:1]


def of_one_tile():
    """Samples whose images are a tile each: nobody has to count them."""
    samples = tiny.samples(20, img_size=SIZE, dtype=torch.float64, seed=7)
    samples = [one for one in samples if max(one["num_image_tiles"].tolist(), default=0) == 1]
    assert len(samples) > 4
    return samples


CASES = {
    # name: (seeds and samples of the rows, options of the model, what is frozen, how rows come)
    "packs": ([(6, 0), (3, 1), (5, 2)], {}, (), "shares"),
    "no shares": ([(5, 3)], {}, (), "layouts"),
    "no layouts": ([(5, 3)], {}, (), "collapsed"),
    "no counts": ([of_one_tile], {}, (), "no counts"),
    "rows of a share": ([(6, 0), (1, 1), lambda: [text_sample(30, 1)]], {}, (), "rows"),
    "one tile": ([one_tile], {}, (), "shares"),
    "text row": ([lambda: [text_sample(40, 2), text_sample(9, 3)], (4, 1)], {}, (), "shares"),
    "frozen tower": ([(4, 4)], {}, ("vision_model",), "shares"),
    "frozen projector": ([(4, 4)], {}, ("vision_projection",), "shares"),
    "frozen both, one tile": ([one_tile], {}, TOWER, "shares"),
    "recomputed": (
        [(4, 5)],
        {"language": RECOMPUTES, "vision": RECOMPUTES, "per_token_loss": True},
        (),
        "shares",
    ),
    "no class tokens": ([(4, 6)], {"drop_vision_class_token": True}, (), "shares"),
    "pixel shuffle": (
        [(4, 6)],
        {"drop_vision_class_token": True, "pixel_shuffle": True},
        (),
        "shares",
    ),
}

if RELEASE.name != "0.12 to 0.17":
    CASES |= {
        "sizes": ([[[1], [1, 1], [1]]], {}, (), "sizes"),
        "sizes, shuffled": ([[[1], [1, 1], [1]]], {"pixel_shuffle": True}, (), "sizes"),
        "sizes, one image": ([one_image], {}, (), "sizes"),
        "sizes, one image, frozen": ([one_image], {}, TOWER, "sizes"),
    }
if RELEASE.name == "main":
    CASES["sizes, tiles"] = ([[[2], [1, 1], [1]]], {"max_num_tiles": 4}, (), "sizes")


def samples_of(row):
    if isinstance(row, list):
        return resolution_samples(row)
    if callable(row):
        return row()
    count, seed = row
    return tiny.samples(count, img_size=SIZE, dtype=torch.float64, seed=seed)


def build(options, frozen, how=None):
    if how == "sizes":
        model = radio(**options).double()
    else:
        options = {"per_token_loss": True, **options}
        model = tiny.llava_model("rope", img_size=SIZE, **options).double()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    return model


def arguments(model, samples, how, cp_size):
    """Of ``forward``."""
    if how == "rows":
        rows = mp.data.pack(samples, mp.row_spec(model), algorithm="concatenative")[0]
        rank = dist.get_rank() if cp_size > 1 else 0
        row = rows.shard_vision(rank, cp_size)[0]
        if row.layout.shares is not None:
            assert len(row.images) == len(row.layout.shares.tiles_of(rank))
        return row.inputs()
    if how == "sizes":
        row = resolution_row(samples, list(range(0, 12 * len(samples) + 1, 12)))
        return row | {"images": row["images"].double()}
    row = parity.collate(samples)
    given = {name: row[name] for name in NAMES} | {"attention_mask": None}
    counts = row["num_image_tiles"] * model.img_seq_len
    layout = mp.PackedLayout.build(
        row["input_ids"], row["cu_seqlens"], counts, mp.row_spec(model), space="collapsed"
    )
    if how == "no counts":
        given["num_image_tiles"] = None
    if how in COLLAPSED:
        edges, longest = row["cu_seqlens"], row["max_seqlen"]
        params = PackedSeqParams("thd", edges, edges, None, None, longest, longest)
        return given | {"packed_seq_params": params}
    if how == "shares" and cp_size > 1 and layout.num_images:
        layout = layout.with_shares(mp.vision.shares(layout, row["num_image_tiles"], cp_size))
    return given | {"packed_seq_params": mp.packed_seq_params(layout)}


NAMES = ("images", "input_ids", "position_ids", "labels", "loss_mask", "num_image_tiles")


def step(model, case, cp_size):
    """Losses of its rows, summed gradients; the layouts seen."""
    rows, _, _, how = CASES[case]
    losses, layouts = [], []
    for row in rows:
        loss, mask = model(**arguments(model, samples_of(row), how, cp_size))
        total = (loss.double() * mask).sum()
        total.backward()
        losses.append(total.detach())
        layouts.append(hook_of(model).plan.seen.layout)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return torch.stack(losses), gradients, layouts


@contextlib.contextmanager
def counted(model, wire, tiles):
    """Counts embeddings that are sent to others, and the tiles that go through the tower."""
    exchange = dist.all_to_all_single

    def counting(received, sent, gets, sends, **options):
        assert len(sent) == sum(sends) and len(received) == sum(gets)
        wire.append(sends)
        return exchange(received, sent, gets, sends, **options)

    def see(module, args, kwargs):
        sizes = kwargs.get("imgs_sizes")
        tiles.append(len(args[0] if sizes is None else sizes) if args[0].any() else 0)

    hook = model.vision_model.register_forward_pre_hook(see, with_kwargs=True)
    with patch.object(dist, "all_to_all_single", counting):
        yield
    hook.remove()


def run(case, expected, cp_size, rank):
    """One case on this rank."""
    _, options, frozen, how = CASES[case]
    model, wire, tiles = build(options, frozen, how), [], []
    space = "collapsed" if how in COLLAPSED else None
    with mp.install(model, space, vision_dp_over_cp=True), counted(model, wire, tiles):
        losses, gradients, layouts = step(model, case, cp_size)
    dist.all_reduce(losses)
    worst = 0.0
    for name, gradient in gradients.items():
        assert gradient is not None, name  # DDP would wait for it
        wanted = expected[case][1][name]
        dist.all_reduce(gradient)
        worst = max(worst, float((gradient - wanted).abs().max() / (wanted.abs().max() + 1e-12)))
    shares = [layout.shares for layout in layouts]
    predicted = []
    for one in shares:
        if one is not None:
            counts = one.counts.clone().fill_diagonal_(0)
            predicted.append(counts[rank].tolist())
            if set(frozen) < set(TOWER):
                predicted.append(counts[:, rank].tolist())
    return {
        "loss": float(((losses - expected[case][0]) / expected[case][0]).abs().max()),
        "gradient": worst,
        "encoded": sum(tiles),
        "shares": sum(len(one.tiles_of(rank)) for one in shares if one is not None),
        "sent": wire,
        "predicted": predicted,
    }


def other_shares(rank, model, given):
    """Rank 1 has other shares of the same row."""
    if rank == 1:
        layout = given["packed_seq_params"].layout
        tiles, cost = given["num_image_tiles"], range(1, layout.shares.num_tiles + 1)
        shares = mp.vision.shares(layout, tiles, dist.get_world_size(), cost)
        given["packed_seq_params"] = mp.packed_seq_params(layout.with_shares(shares))


def tiles_of_next_rank(rank, model, given):
    """As many as are its own: nothing but who they are tells them apart."""
    layout, size = given["packed_seq_params"].layout, dist.get_world_size()
    share = (rank + 1) % size, size
    given["images"] = given["images"][layout.shares.tiles_of(share[0])]
    given["packed_seq_params"] = mp.packed_seq_params(layout, vision_share=share)


def some_tiles(rank, model, given):
    """As many as a rank encodes, and nobody says that they are its own."""
    layout = given["packed_seq_params"].layout
    given["images"] = given["images"][: len(layout.shares.tiles_of(rank))]


def no_images(rank, model, given):
    given["images"] = None


def gradient_of_images(rank, model, given):
    """No rank would send it back."""
    given["images"].requires_grad_()
    model.vision_model.requires_grad_(False)
    model.vision_projection.requires_grad_(False)


def another_type(rank, model, given):
    """The tower computes in fp32, the language model in fp64."""
    model.vision_model.float()
    model.vision_projection.float()
    given["images"] = given["images"].float()


FAULTS = (
    other_shares, tiles_of_next_rank, some_tiles, no_images, gradient_of_images, another_type,
)  # fmt: skip


def told_of(fault, rank):
    """What a rank is told."""
    model = build({}, ())
    given = arguments(model, samples_of((5, 3)), "shares", dist.get_world_size())
    fault(rank, model, given)
    with mp.install(model, vision_dp_over_cp=True):
        try:
            model(**given)
        except mp.PackingError as error:
            return str(error)
    return "nothing"


def main():
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, cp_size = dist.get_rank(), dist.get_world_size()
    expected = {}
    with cpu.megatron_on_cpu():
        for case, (_, options, frozen, how) in CASES.items():
            model = build(options, frozen, how)
            with mp.install(model, "collapsed" if how in COLLAPSED else None):
                expected[case] = step(model, case, 1)
    with cpu.megatron_on_cpu(context_parallel_size=cp_size):
        mine = {case: run(case, expected, cp_size, rank) for case in CASES}
        told = {fault.__name__: told_of(fault, rank) for fault in FAULTS}
    everyones = [None] * cp_size
    dist.all_gather_object(everyones, mine)
    if rank == 0:
        found = {
            case: {
                name: max(one[case][name] for one in everyones)
                if name in ("loss", "gradient")
                else [one[case][name] for one in everyones]
                for name in mine[case]
            }
            for case in CASES
        }
        print(json.dumps({"cases": found, "told": told}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
