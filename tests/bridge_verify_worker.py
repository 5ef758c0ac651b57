"""A process that checks Bridge's Qwen2.5-VL on a packed row; test_verify.py starts it."""

import argparse
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import mcore_packing as mp
from mcore_packing.testing import bridge

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import verify_any_vlm as example

IMAGE = 151_655


def step(model, inputs: dict):
    names = ["input_ids", "labels", "packed_seq_params"]
    given = {name: inputs[name] for name in names}
    names = [name for name in ("pixel_values", "image_grid_thw") if name in inputs]
    return model(**given, **{name: inputs[name] for name in names})  # not in every sample


def without_boundaries(model, inputs: dict):
    params = example.one_sequence(inputs["packed_seq_params"])
    return step(model, {**inputs, "packed_seq_params": params})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    tp = parser.parse_args().tp
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    bridge.make_importable()
    dist.init_process_group("gloo")
    with bridge.on_cpu(tensor_model_parallel_size=tp):
        split = {"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1}
        model = bridge.built(bridge.qwen25_vl(**split))
        per_sequence, per_row = mp.alignment(1, tp, sequence_parallel=tp > 1)
        spec = mp.RowSpec(
            image_token_id=IMAGE,
            seq_multiple=per_sequence,
            total_multiple=per_row,
            expands=False,
        )
        samples = bridge.qwen25_vl_samples(5)
        (row,), _ = mp.data.pack(samples, spec, family="qwen2_5_vl")
        for run in step, without_boundaries:
            is_right = run is step
            found = [
                mp.parity.isolation(model, row, run),
                mp.parity.verify(model, row, run, gradients=is_right),
            ]
            if dist.get_rank() == 0:
                print(run.__name__, *found, sep="\n", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
