"""A rank of a plain VLM under parallelism; test_plain_model.py starts two.

Prints, from rank 0, the summed loss of each sample: in a packed row, and in a row of its own.
"""

import argparse
import json
import warnings
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state

import mcore_packing as mp
from mcore_packing.testing import plain, tiny


def losses(model, row) -> torch.Tensor:
    """Weighted losses of the whole row, ``[S]``, on every rank."""
    cp_size, rank = row.layout.spec.cp_size, parallel_state.get_context_parallel_rank()
    local, here = model(**row.inputs())[0], row.positions_of(rank)
    whole = torch.zeros(row.layout.num_expanded)
    whole[here] = local * row.loss_mask[0, here]
    if cp_size > 1:
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    total, count, _ = mp.data.loss_func(local[None], row, cp_rank=rank)
    both = torch.stack([total, count.float()])
    if cp_size > 1:
        dist.all_reduce(both, group=parallel_state.get_context_parallel_group())
    assert (both[0] - whole.sum()).abs() < 1e-3 and int(both[1]) == row.num_trained
    return whole


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    options = parser.parse_args()
    sizes = {"context_parallel_size": options.cp, "tensor_model_parallel_size": options.tp}
    with tiny.megatron(**sizes), torch.no_grad():
        model = plain.plain_vlm(sequence_parallel=options.tp > 1)
        samples, spec = plain.plain_samples(7), mp.row_spec(model)
        packer = mp.data.get_packer("concatenative", spec, family="qwen2_5_vl")
        row = packer.join(samples)
        edges, packed = row.layout.cu_seqlens_padded.tolist(), losses(model, row)
        found = {
            "packed": [float(packed[a:b].sum()) for a, b in pairwise(edges)],
            "alone": [float(losses(model, packer.join([sample])).sum()) for sample in samples],
            "multiples": [spec.seq_multiple, spec.total_multiple],
        }
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
