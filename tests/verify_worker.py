"""A process of a parallel job that checks its rows; test_verify.py starts several of them.

Rank 0 prints what ``isolation`` and ``verify`` found for a good model and for a broken one, and
what they left behind.
"""

import argparse
import json
import logging
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mcore_packing as mp
from mcore_packing import cpu, parity
from mcore_packing.data import Row
from mcore_packing.parity import content
from mcore_packing.parity.job import gather
from mcore_packing.testing import broken, tiny

SIZE = 28
LONGEST = 768


def make_row(model, count: int, seed: int) -> Row:
    packer = mp.data.get_packer("concatenative", mp.row_spec(model))
    return packer.join(tiny.samples(count, img_size=SIZE, seed=seed))


def build(options, vp_stage: int | None = None):
    return tiny.llava_stage(
        "rope",
        img_size=SIZE,
        max_sequence_length=LONGEST,
        language_layers=2,
        sequence_parallel=options.tp > 1,
    )


def wrapped(model, options):
    if not options.fsdp:
        return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.language_model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def state_of(job, llava) -> list:
    """What a check must not change."""
    for module in (module for module in job.modules() if hasattr(module, "reshard")):
        module.reshard()
    gradients = [getattr(p, "main_grad", p.grad) for p in job.parameters()]
    return [
        [module.training for module in job.modules()],
        [None if g is None else g.clone().flatten().tolist()[:50] for g in gradients],
        torch.get_rng_state().tolist(),
        vars(llava._packing_hook.plan.seen),
        llava.config.finalize_model_grads_func,
        hasattr(llava, "model_type"),
    ]


def error_of(check, *args) -> tuple[str, float]:
    """What a check raises on this rank, and after how long."""
    begin = time.monotonic()
    try:
        check(*args)
    except mp.PackingError as error:
        return str(error), time.monotonic() - begin
    return "nothing", time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser()
    for size in ("cp", "tp", "pp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--share", action="store_true", help="the vision tower, over cp ranks")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with cpu.megatron_on_cpu(
        context_parallel_size=options.cp,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
    ):
        model = build(options)
        del model.model_type  # as where no training loop of Megatron's made the model
        mp.install(model, vision_dp_over_cp=options.share)
        model.config.finalize_model_grads_func = print
        job = wrapped(model, options)
        if model.vision_model is not None:
            model.vision_model.eval()  # frozen, say
        for number, parameter in enumerate(job.parameters()):
            if hasattr(parameter, "main_grad"):
                parameter.main_grad.fill_(number)
        replica = parallel_state.get_data_parallel_rank()
        row = make_row(model, 6 - 2 * replica, seed=replica)
        before = state_of(job, model)
        good = [parity.isolation(job, row), parity.verify(job, row, gradients=True)]
        after = state_of(job, model)

        # The row of the last replica has lost a boundary.
        edges = row.layout.cu_seqlens_collapsed.tolist()
        bad_row = row
        if replica == parallel_state.get_data_parallel_world_size() - 1:
            bad_row = content.laid_out_anew(row, edges[:2] + edges[3:])
        errors = [error_of(check, job, bad_row) for check in (parity.isolation, parity.verify)]

        (broken.one_rank_is_deaf if options.cp > 1 else broken.deaf)(model)
        bad = [parity.isolation(job, row), parity.verify(job, row)]
        answers = gather([str(found) for found in (*good, *bad)])
        result = {
            "verdicts": [found.verdict for found in (*good, *bad)],
            "by_rank": good[1].by_rank,
            "num_compared": sum(found.num_compared for found in good[1].sequences),
            "num_trained": int(mp.expand_labels(row.layout, row.labels, row.loss_mask)[1].sum()),
            "gradients": [[e.part, e.relative_difference, e.verdict] for e in good[1].gradients],
            "leaks": sorted({(leak.rank, leak.sequence) for leak in bad[0].leaks}),
            "wrong": sorted({(found.rank, found.sequence) for found in bad[1].wrong}),
            "says": answers[0],
            "all_agree": all(answer == answers[0] for answer in answers),
            "left_behind": gather(
                [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
            ),
            "errors": gather(errors),
            "num_samples": gather(row.layout.num_seqs),
        }
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()  # else gloo's threads can abort the interpreter's exit


if __name__ == "__main__":
    main()
