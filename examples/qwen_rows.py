"""Samples of a Hugging Face processor to a packed row for a plain VLM, and a look whether it is
right.

A small GPT stands in for Qwen2.5-VL; the pixels are really those of its image processor.
"""

import numpy as np
import torch
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

import mcore_packing as mp
from mcore_packing.testing import plain, tiny

IMAGE = plain.IMAGE_TOKEN_ID  # of Qwen2.5-VL it is 151655


def make_samples() -> list[dict]:
    """Text and pictures, as the processor expands them: no picture, one, two."""
    process = processing.Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=16 * 28**2)
    samples = []
    for number in range(6):
        ids, pictures = [10 + number] * 5, [np.full((56, 84, 3), 40 * number, np.uint8)]
        pictures = pictures * (number % 3)
        made = process(pictures, return_tensors="pt") if pictures else {}
        for grid in made.get("image_grid_thw", []):
            ids += [IMAGE] * int(grid.prod() // 4) + [20 + number]
        samples.append({"input_ids": torch.tensor(ids), **made})
    return samples


with tiny.megatron(), torch.no_grad():
    model, samples = plain.plain_vlm(patch=1176), make_samples()
    spec = mp.row_spec(model)  # ids are expanded already: spec.expands is False
    (row,), report = mp.data.pack(samples, spec, 512, family="qwen2_5_vl")
    packed = model(**row.inputs())[0]
    for index, start in zip(row.indices, row.layout.cu_seqlens_padded.tolist(), strict=False):
        (alone,), _ = mp.data.pack([samples[index]], spec, 512, family="qwen2_5_vl")
        difference = packed[start:][: alone.input_ids.numel()] - model(**alone.inputs())[0]
        print(f"sample {index}: differs by at most {difference[:-1].abs().max():.1e}")
    print(report, mp.data.loss_func(packed, row)[0] / row.num_trained, sep="\n")
