"""From samples to a loss, on a CPU: pack, install, run; and check that it is right."""

import torch

import mcore_packing as mp
from mcore_packing.testing import tiny

with tiny.megatron():  # a small real LLaVAModel, as Megatron builds it
    model = tiny.llava_model("rope", img_size=28, max_sequence_length=1024)
    samples = tiny.samples(6, img_size=28)
    rows, report = mp.data.pack(samples, mp.row_spec(model))
    print(report)
    with mp.install(model), torch.no_grad():
        for row in rows:
            loss, loss_mask = model(**row.to(tiny.DEVICE, tiny.DTYPE).inputs())
            print(row, "loss", f"{(loss * loss_mask).sum() / loss_mask.sum():.4f}")
        print(mp.parity.verify(model, rows[0]))
