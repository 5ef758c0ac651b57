"""A process that runs Bridge's Qwen2.5-VL, whose ids are expanded before it; test_bridge.py starts
it.
"""

import json
import logging

import torch
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing.testing import bridge


@torch.no_grad()
def losses(model, samples: list[dict], boundaries=None) -> torch.Tensor:
    """The loss of every position of samples in one row."""
    lengths = torch.tensor([0, *(len(sample["input_ids"]) for sample in samples)])
    edges = (lengths.cumsum(0) if boundaries is None else boundaries).int()
    longest = int(edges.diff().max())
    media = {
        name: torch.cat([sample[name] for sample in samples if name in sample])
        for name in ("pixel_values", "image_grid_thw")
        if any(name in sample for sample in samples)
    }
    ids = torch.cat([sample["input_ids"] for sample in samples])[None]
    params = PackedSeqParams("thd", edges, edges, None, None, longest, longest)
    return model(input_ids=ids, labels=ids, packed_seq_params=params, **media)[0]


@torch.no_grad()
def difference_of_rows(model, samples: list[dict]) -> float:
    """Of the trained losses of ``mp.data``'s row, and of a row of each sample."""
    packer = mp.data.get_packer("concatenative", mp.row_spec(model), family="qwen2_5_vl")
    row = packer.join(samples)
    alone = [packer.join([sample]) for sample in samples]
    losses = [model(**one.inputs())[0] * one.loss_mask[0] for one in (row, *alone)]
    assert row.num_trained == sum(one.num_trained for one in alone) > 20
    return (losses[0] - torch.cat(losses[1:])).abs().max().item()


def main():
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    bridge.make_importable()
    with bridge.on_cpu():
        model, samples = bridge.built(bridge.qwen25_vl()), bridge.qwen25_vl_samples(4)
        alone = torch.cat([losses(model, [sample]) for sample in samples])
        packed = losses(model, samples)
        dropped = losses(model, samples, torch.tensor([0, len(packed)]))
        rows = difference_of_rows(model, samples)
    result = {
        "difference": (packed - alone).abs().max().item(),
        "dropped": (dropped - alone).abs().max().item(),
        "rows": rows,
        "images": sum("pixel_values" in sample for sample in samples),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
