"""Rows as Megatron's ``examples/multimodal`` makes them, by its own functions."""

import dataclasses
import random
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.models.multimodal import context_parallel
from megatron.core.models.multimodal.llava_model import IGNORE_INDEX, LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams

from . import sources

IMAGE, TOKENS_PER_TILE, SIZE = -200, 5, 28  # of tiny.llava_model(img_size=28)


@dataclasses.dataclass
class Case:
    """How a data path makes its rows.

    Attributes:
        space: what its sample lengths count.
        tp, cp, sp, fp8: parallelism and FP8 recipe.
        pad: the tokenizer's pad id.
        fixed: whether rows are padded to ``--dataloader-seq-length``.
        cut: "unclipped": tokens are cut at that length, boundaries stay as they were; "clamped":
            expanded boundaries are cut at the model's maximum, as Bridge and main do.
    """

    space: str
    tp: int
    cp: int
    sp: bool
    fp8: str | None
    pad: int
    fixed: bool
    cut: str


class Example:
    """Megatron's example of one release.

    Args:
        version: of Megatron-LM.
        train: a changed copy of its ``train.py``.
    """

    def __init__(self, version: str, train: Path | None = None):
        folder = sources.MEGATRON.unpacked(version) / "examples/multimodal"
        self.case = None
        no_parallelism = {
            "get_pipeline_model_parallel_world_size": lambda: 1,
            "get_tensor_model_parallel_rank": lambda: 0,
            "is_first_or_last_stage": lambda size: True,
            "is_pipeline_last_stage": lambda: True,
            "nvtx_range_push": lambda name: None,
            "nvtx_range_pop": lambda name=None: None,
        }
        broadcast = SimpleNamespace(
            broadcast_data=lambda names, data, dtype: {name: data[name] for name in names}
        )
        common = {"torch": torch, "dataclass": dataclasses.dataclass, **vars(typing)}
        common |= {
            "get_args": self.arguments,
            "get_tokenizer": lambda: SimpleNamespace(pad=self.case.pad),
            "get_padding": context_parallel.get_padding,
            "context_parallel": context_parallel,
            "IGNORE_INDEX": IGNORE_INDEX,
            "PackedSeqParams": PackedSeqParams,
            "LLaVAModel": LLaVAModel,
            "tensor_parallel": broadcast,
            "Sample": object,
            "Batch": object,
            **no_parallelism,
        }
        self.made = sources.functions(
            folder / "dataset_helpers.py",
            ["ImageTaskSample", "ImageTaskSamplePacked", "ImageTaskBatchPacked",
             "TaskEncoder.pack_selected_samples", "TaskEncoder.batch"],
            common,
        )  # fmt: skip
        self.made |= sources.functions(
            train or folder / "train.py", ["get_ltor_masks_and_position_ids", "get_batch"], common
        )

    def arguments(self) -> SimpleNamespace:
        """What the case makes of Megatron's command line."""
        case = self.case
        return SimpleNamespace(
            context_parallel_size=case.cp,
            tensor_model_parallel_size=case.tp,
            sequence_parallel=case.sp,
            fp8=case.fp8,
            fp8_recipe=case.fp8,
            use_torch_fsdp2=False,
        )

    def row(self, case: Case, seed: int):
        """``input_ids`` ``[T]``, boundaries, positions of each image, and the model's maximum."""
        rng = random.Random(f"{seed} {case}")
        samples, data = self.data(case, rng)
        tokens, *_ = self.batch(data)
        boundaries, longest = data["cu_lengths"][0], 10**6
        if case.cut == "clamped":
            longest = int(boundaries[-1]) - rng.randint(1, len(samples[-1].tokens))
            boundaries = boundaries.clamp(max=longest)
        tiles = torch.tensor([tiles for sample in samples for tiles in sample.num_tiles])
        return tokens[0], boundaries, tiles.long() * TOKENS_PER_TILE, longest

    def batch(self, data: dict) -> tuple:
        """What the example's ``get_batch`` makes of what its data loader gives."""
        with mock.patch.multiple(torch.cuda.nvtx, range_push=no_mark, range_pop=no_mark):
            return self.made["get_batch"](iter([data]), IMAGE, TOKENS_PER_TILE)

    def data(self, case: Case, rng: random.Random) -> tuple[list, dict]:
        """The samples of a row, and what the example's data loader gives for it."""
        self.case = case
        samples = [self.sample(rng, number) for number in range(rng.randint(1, 6))]
        num_tokens = sum(len(sample.tokens) for sample in samples)
        length = None
        if case.cut == "unclipped":  # only text of the last sample is lost
            tail = len(samples[-1].tokens) - 1 - last_image(samples[-1].tokens)
            length = num_tokens - rng.randint(0, max(tail - 1, 0))
        elif case.fixed:
            length = num_tokens + rng.randint(0, 40)
        encoder = SimpleNamespace(
            packing_seq_length=10**6,
            dataloader_seq_length=length,
            tokenizer=SimpleNamespace(pad=case.pad),
            args=self.arguments(),
        )
        encoder._get_total_seq_length = lambda tokens, tiles: (
            len(tokens) + (TOKENS_PER_TILE * tiles.sum() - (tokens == IMAGE).sum()).item()
        )
        pack, batch = (
            self.made[f"TaskEncoder.{name}"] for name in ("pack_selected_samples", "batch")
        )
        made = batch(encoder, [pack(encoder, samples)])
        names = "tokens", "labels", "imgs", "num_tiles", "cu_lengths", "max_lengths"
        return samples, {name: getattr(made, name) for name in names}

    def sample(self, rng: random.Random, number: int):
        """A conversation of up to 40 tokens and 3 images, as the example's encoder gives it."""
        tokens = torch.tensor([rng.randint(20, 500) for _ in range(rng.randint(2, 40))])
        places = rng.sample(range(len(tokens)), rng.randint(0, min(3, len(tokens) - 1)))
        tokens[places] = IMAGE
        tiles = [rng.randint(1, 4) for _ in places]
        grown = sum(tiles) * TOKENS_PER_TILE - len(tiles)
        sample: Any = self.made["ImageTaskSample"].__new__(self.made["ImageTaskSample"])
        sample.__key__, sample.__subflavors__ = str(number), {}
        sample.tokens = tokens
        sample.labels = tokens.clone()
        sample.imgs = [torch.full((3, SIZE, SIZE), rng.random()) for _ in range(sum(tiles))]
        sample.num_tiles = tiles
        sample.total_len = len(tokens) + (grown if self.case.space == "expanded" else 0)
        return sample


def no_mark(*args) -> None:
    """In place of profiler marks, which need CUDA."""


def last_image(tokens) -> int:
    """The place of the last placeholder, -1 where there is none."""
    places = (tokens == IMAGE).nonzero()
    return int(places[-1]) if len(places) else -1
