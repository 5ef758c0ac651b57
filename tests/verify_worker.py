"""A process of a parallel job that verifies its rows; test_verify.py starts several of them.

Rank 0 prints what ``verify`` found for a good row, and for one with a boundary off by one token.
"""

import argparse
import json
import logging

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

import mcore_packing as mp
from mcore_packing import cpu
from mcore_packing.data import Row
from mcore_packing.testing import tiny

SIZE = 28
MOVED = 2  # the sequence whose first token goes to the one before


def make_row(model, seed: int) -> Row:
    """A row of six samples."""
    packer = mp.data.get_packer("concatenative", mp.row_spec(model))
    return packer.join(tiny.samples(6, img_size=SIZE, seed=seed))


def with_moved_boundary(row: Row) -> Row:
    """The row as a data path brings it that is off by one."""
    cu_seqlens = row.layout.cu_seqlens_collapsed.clone()
    cu_seqlens[MOVED] += 1
    counts = row.layout.cu_image_embeddings.diff()
    layout = mp.PackedLayout.build(
        row.input_ids, cu_seqlens, counts, row.layout.spec, space="collapsed"
    )

    class Moved(Row):
        packed_seq_params = property(lambda self: mp.packed_seq_params(layout))

    return Moved(**vars(row))


def main():
    parser = argparse.ArgumentParser()
    for size in ("cp", "tp", "pp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    sizes = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with cpu.megatron_on_cpu(
        context_parallel_size=sizes.cp,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
    ):
        model = tiny.llava_stage(
            "rope",
            img_size=SIZE,
            max_sequence_length=768,
            language_layers=2,
            sequence_parallel=sizes.tp > 1,
        )
        mp.install(model)
        job = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        row = make_row(model, seed=parallel_state.get_data_parallel_rank())
        good = mp.parity.verify(job, row)
        moved = with_moved_boundary(row)
        bad = mp.parity.verify(job, moved)
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, [str(good), str(bad)])
        result = {
            "by_rank": good.by_rank,
            "is_right": good.is_right,
            "num_compared": sum(found.num_compared for found in good.sequences),
            "num_trained": int(mp.expand_labels(row.layout, row.labels, row.loss_mask)[1].sum()),
            "wrong": sorted({(found.rank, found.sequence) for found in bad.wrong}),
            "says": str(bad),
            "all_agree": all(answer == answers[0] for answer in answers),
            "is_training": job.training,
            "has_gradients": any(p.grad is not None for p in job.parameters()),
        }
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()  # else gloo's threads can abort the interpreter's exit


if __name__ == "__main__":
    main()
