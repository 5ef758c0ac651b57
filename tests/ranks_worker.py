"""A rank that shares its rows with another; test_ranks.py starts two. Rank 0 prints what each was
told."""

import argparse
import json
import logging
import warnings

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing import cpu
from mcore_packing.testing import tiny

SIZE = 28


def row_of(model, seed: int, kind: str):
    """A row of 40 tokens, or one with a fault in it."""
    ids = torch.randint(1, 500, (1, 40), generator=torch.Generator().manual_seed(seed))
    edges = torch.tensor([0, 15, 40 if kind != "faulty" else 41], dtype=torch.int32)
    if kind == "moved":
        edges[1] += 1
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=25, max_seqlen_kv=25
    )
    return {
        "images": torch.empty(0, 3, SIZE, SIZE),
        "input_ids": ids,
        "position_ids": torch.arange(40)[None],
        "attention_mask": None,
        "labels": ids.roll(-1),
        "loss_mask": torch.ones(1, 40),
        "num_image_tiles": torch.tensor([], dtype=torch.int),
        "packed_seq_params": params if kind != "unpacked" else None,
    }


def told(function) -> str:
    try:
        function()
    except mp.PackingError as error:
        return str(error)
    return "nothing"


def run(rank: int, model, first: str, then: str, **options) -> list[str]:
    """What this rank is told of two rows, whose kind is another on rank 1; and at the end."""
    found = []
    with mp.install(model, space="collapsed", **options) as handle:
        for kind in first, then:
            seed = rank if kind == "other" else 0
            kind = "same" if rank == 0 or kind == "other" else kind
            found.append(told(lambda: model(**row_of(model, seed, kind))))  # noqa: B023
            if found[-1] != "nothing":
                return found
        found.append(told(handle.compare_ranks))
    return found


def main():
    parser = argparse.ArgumentParser()
    for size in ("cp", "tp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    sizes = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with cpu.megatron_on_cpu(context_parallel_size=sizes.cp, tensor_model_parallel_size=sizes.tp):
        model = tiny.llava_model("rope", img_size=SIZE)
        model.freeze(False, True, True)
        rank = dist.get_rank()
        cases = {
            "same": run(rank, model, "same", "same"),
            "other": run(rank, model, "other", "same"),
            "moved": run(rank, model, "moved", "same"),
            "faulty": run(rank, model, "faulty", "same"),
            "unpacked": run(rank, model, "unpacked", "same"),
            "later": run(rank, model, "same", "other"),
            "not asked": run(rank, model, "other", "same", compare_ranks=False),
        }
        with mp.install(model, space="collapsed"):
            model(**row_of(model, 0, "same"))
            model.eval()
            cases["evaluation"] = [told(lambda: model(**row_of(model, rank, "same")))]
    everyones = [None, None]
    dist.all_gather_object(everyones, cases)
    if rank == 0:
        print(json.dumps({case: [ranks[case] for ranks in everyones] for case in cases}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
