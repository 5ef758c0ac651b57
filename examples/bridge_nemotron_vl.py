"""Packed rows for NemotronVL in Megatron-Bridge, under context parallelism too.

Bridge refuses both: its collate function packs no batch of this model, and ``llava_step`` takes no
packed row where a row is split over ranks. These take their places (docs/megatron-bridge.md):

    cfg = nemotron_nano_v2_vl_12b_sft_config()
    pack(cfg)
    finetune(cfg, forward_step)
"""

from dataclasses import dataclass, fields
from functools import partial

import torch
from megatron.bridge.data.base import DataloaderConfig, DatasetProvider
from megatron.bridge.data.builders.direct_hf_sft import (
    DirectHFSFTDatasetBuilder,
    DirectHFSFTDatasetConfig,
)
from megatron.bridge.models.nemotron_vl.data.collate_fn import nemotron_nano_v2_vl_collate_fn
from megatron.bridge.training.losses import masked_next_token_loss

import mcore_packing as mp


def pack(cfg) -> None:
    """Have a recipe train on packed rows.

    ``cfg.train.micro_batch_size`` samples share a row, and ``cfg.model.seq_length`` is how many
    positions the longest one has: the images of all its samples count.
    """
    shared = {field.name: getattr(cfg.dataset, field.name) for field in fields(DataloaderConfig)}
    cfg.dataset = PackedSFT(recipe=cfg.dataset, seq_length=cfg.dataset.seq_length, **shared)
    cfg.model.register_pre_wrap_hook(cfg.dataset.install)
    # Rows do not all hold the same number of trained tokens, nor do the ranks of one row.
    cfg.model.calculate_per_token_loss = True
    cfg.ddp.average_in_collective = False


@dataclass(kw_only=True)
class PackedSFT(DatasetProvider):
    """The data set of a recipe, of which every micro-batch is collated into one packed row.

    Attributes:
        recipe: the recipe's own ``cfg.dataset``.
        seq_length: as the recipe has it.
    """

    recipe: DirectHFSFTDatasetConfig
    seq_length: int

    def finalize(self) -> None:
        super().finalize()
        self.recipe.finalize()

    def install(self, chunks: list) -> list:
        """Bridge calls it with the model before it wraps it, and builds data sets later."""
        mp.install(chunks)
        self.spec = mp.row_spec(chunks)
        return chunks

    def build_datasets(self, context):
        rows = partial(collate, spec=self.spec)
        return DirectHFSFTDatasetBuilder(self.recipe, collate_impl=rows).build(context)


def collate(examples: list, processor, *, spec: mp.RowSpec) -> mp.data.Row:
    """One packed row of a micro-batch, with its layout."""
    batches = [nemotron_nano_v2_vl_collate_fn([example], processor) for example in examples]
    return mp.data.get_packer("concatenative", spec).join([sample_of(batch) for batch in batches])


def sample_of(batch: dict) -> dict:
    """A batch of one, as Bridge's collate function makes it, as a sample of ``mp.data``.

    It has one placeholder a tile. Its labels are shifted already; a row shifts those of its samples
    itself.
    """
    labels = batch["labels"][0]
    return {
        "input_ids": batch["input_ids"][0],
        "labels": torch.cat([labels.new_full((1,), -100), labels[:-1]]),
        "images": batch["visual_inputs"].pixel_values,
        "num_image_tiles": batch["num_patches"],
    }


def forward_step(state, data_iterator, model):
    """In place of ``llava_step.forward_step``; Bridge hands its ``GlobalState`` to a ``state``."""
    weight = next(model.parameters())
    row = next(data_iterator).to(weight.device, weight.dtype)
    output = model(**row.inputs())  # the losses and the loss mask of this rank's positions
    rerun = state.cfg.rerun_state_machine
    loss = partial(
        masked_next_token_loss,
        row.loss_mask,  # the output's takes its place
        check_for_nan_in_loss=rerun.check_for_nan_in_loss,
        check_for_spiky_loss=rerun.check_for_spiky_loss,
    )
    return output, loss


def check(model, row: mp.data.Row) -> list:
    """Whether packed samples are what they are alone, on the running job: every rank calls it."""
    found = [mp.parity.isolation(model, row), mp.parity.verify(model, row)]
    print(*found, sep="\n")
    return found
