"""A data-parallel rank whose row has images in one step and none in another; test_text_rows.py
starts two.

Both ranks' gradients of each step are compared with those of both rows in one process. Rank 0
prints the largest difference.
"""

import argparse
import datetime
import json
import logging
import warnings

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mcore_packing as mp
from mcore_packing import cpu
from mcore_packing.testing import tiny

SIZE = 28
DEADLINE = datetime.timedelta(seconds=30)
# Which of the ranks' rows are text, in each step.
STEPS = {
    "images first": ((), (1,), (0, 1), ()),
    "text first": ((1,), (), (0,), ()),
}


def build(frozen: list[str]):
    model = tiny.llava_model("rope", img_size=SIZE, per_token_loss=True)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    return model


def make_rows(model, texts: tuple[int, ...], step: int) -> list:
    """The row of each rank."""
    packer = mp.data.get_packer("concatenative", mp.row_spec(model))
    rows = []
    for rank in range(2):
        samples = tiny.samples(3, img_size=SIZE, seed=2 * step + rank)
        if rank in texts:
            samples = [{"input_ids": sample["input_ids"].clamp(min=1)} for sample in samples]
        rows.append(packer.join(samples))
    return rows


def backward(model, row, scale: float = 1.0) -> None:
    loss, mask = model(**row.inputs())
    ((loss * mask).sum() * scale).backward()


def wrapped(model, wrap: str):
    """Megatron's DDP with small buckets; or FSDP2 as Megatron applies it, to every layer, then to
    the model."""
    if wrap == "ddp":
        options = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=2000)
        return DistributedDataParallel(model.config, options, model)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.vision_model, model.language_model):
        for layer in part.decoder.layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_grad(parameter, wrap: str):
    if wrap == "ddp":
        return parameter.main_grad
    grad = parameter.grad
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def compare(model, reference, wrap: str) -> tuple[float, float]:
    """The largest difference of a gradient, and the largest gradient."""
    expected = dict(reference.named_parameters())
    worst = largest = 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        ours, theirs = whole_grad(parameter, wrap), expected[name].grad
        worst = max(worst, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
    return worst, largest


def run(wrap: str, steps: str, frozen: list[str]) -> dict:
    """A few steps of a model: what its gradients are off by, and how many tiles it encoded."""
    bare, reference = build(frozen), build(frozen)
    tiles, encoded = [], []
    bare.vision_model.register_forward_hook(lambda module, args, out: tiles.append(len(args[0])))
    model = wrapped(bare, wrap)
    mp.install(model)
    mp.install(reference)
    worst = largest = 0.0
    for step, texts in enumerate(STEPS[steps]):
        rows = make_rows(bare, texts, step)
        reference.zero_grad()
        for row in rows:
            backward(reference, row, 0.5)
        tiles.clear()
        row = rows[dist.get_rank()]
        if wrap == "ddp":
            model.zero_grad_buffer()
            backward(model, row, 0.5)  # with per-token losses Megatron's DDP sums gradients
            model.finish_grad_sync()
        else:
            model.zero_grad()
            backward(model, row)
        differs, size = compare(bare, reference, wrap)
        worst, largest = max(worst, differs), max(largest, size)
        encoded.append(sum(tiles))
    everyones = [None, None]
    dist.all_gather_object(everyones, (worst, largest, encoded))
    worst, largest, encoded = zip(*everyones, strict=True)
    return {"worst": max(worst), "largest": max(largest), "encoded": encoded}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("wrap", choices=("ddp", "fsdp2"))
    parser.add_argument("frozen", nargs="*")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=DEADLINE)
    with cpu.megatron_on_cpu():
        found = {steps: run(args.wrap, steps, args.frozen) for steps in STEPS}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
