"""A process that runs packed rows on a Megatron-Core whose ``LLaVAModel`` nobody knows yet.

test_next_megatron.py starts one or two, with the changed sources in front. Rank 0 prints what the
hook said, and whether samples are packed what they are alone.
"""

import argparse
import json
import logging
import warnings

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing import cpu
from mcore_packing.megatron.find import hook_of
from mcore_packing.megatron.releases import describe
from mcore_packing.testing import tiny

SIZE = 28  # pixels: 5 positions a tile
CHUNKS = 4  # Megatron's own expansion pads no sequence; two context-parallel ranks cut it into 4


def samples() -> list[dict]:
    """None begins with an image: Megatron's expansion loses the label before that one."""
    found = [tiny.samples(6, img_size=SIZE)[index] for index in (0, 2, 3, 4, 5)]
    for sample in found:
        tiles = int(sample["num_image_tiles"].sum())
        positions = len(sample["input_ids"]) - len(sample["num_image_tiles"]) + 5 * tiles
        more = torch.arange(1, 1 + -positions % CHUNKS)
        sample["input_ids"] = torch.cat([more, sample["input_ids"]])
    return found


@torch.no_grad()
def forward(model, row, params):
    """The loss and the loss mask of this rank's positions."""
    return model(**{**row.inputs(), "packed_seq_params": params})


def see_call(model, calls: set) -> None:
    """Note what kind of call is in progress when the language model runs."""

    def see(module, args):
        calls.add(type(hook_of(model).current.call).__name__)

    model.language_model.register_forward_pre_hook(see)


def weights(layout, mask) -> list:
    """Of every sequence: the different weights of its trained tokens, and how many these are."""
    found = []
    for begin, end in layout.cu_seqlens_expanded.unfold(0, 2, 1).tolist():
        trained = mask[0, begin:end][mask[0, begin:end] > 0]
        found.append([sorted({round(weight, 5) for weight in trained.tolist()}), len(trained)])
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    sizes = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with cpu.megatron_on_cpu(context_parallel_size=sizes.cp, tensor_model_parallel_size=sizes.tp):
        model = tiny.llava_model(
            "rope", img_size=SIZE, sequence_parallel=sizes.tp > 1, per_token_loss=True
        )
        tiles, calls = [], set()
        model.vision_model.register_forward_pre_hook(
            lambda module, args: tiles.append(len(args[0]))
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            mp.install(model, space="collapsed")
            row = mp.data.get_packer("concatenative", mp.row_spec(model)).join(samples())
            edges = row.layout.cu_seqlens_collapsed
            see_call(model, calls)
            loss, mask = forward(model, row, row.packed_seq_params)
            plain, _ = forward(model, row, PackedSeqParams("thd", edges, edges, None, None, 1, 1))
            right = mp.parity.verify(model, row)
        result = {
            "said": [str(warning.message) for warning in said],
            "call": calls.pop(),
            "described": describe(),
            "is_right": right.is_right,
            "found": str(right),
            "difference": float((loss - plain).abs().max()),
            "tiles": [tiles[0], len(row.images)],
            "weights": weights(row.layout, mask) if dist.get_world_size() == 1 else None,
        }
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()  # else gloo's threads can abort the interpreter's exit


if __name__ == "__main__":
    main()
