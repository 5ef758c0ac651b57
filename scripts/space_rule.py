"""Ask ``space="auto"`` about rows that Megatron's own example makes, and count its answers.

``TaskEncoder.pack_selected_samples``, ``TaskEncoder.batch`` and ``get_batch`` of Megatron's
``examples/multimodal`` make the rows, under every combination of parallelism, precision, pad id,
fixed length and cut. They know which space they count. A wrong answer is a failure; a refusal asks
the user to say the space.
"""

import argparse
import dataclasses
import itertools
import random
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.models.multimodal import context_parallel
from megatron.core.models.multimodal.llava_model import IGNORE_INDEX, LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams

from mcore_packing.errors import BoundarySpaceError
from mcore_packing.space import find_space
from mcore_packing.testing import sources

IMAGE, ROWS_PER_TILE = -200, 9
PARALLELISM = [  # tp, cp, sequence parallel, FP8
    (1, 1, False, None), (2, 1, True, None), (1, 2, False, None), (2, 2, True, None),
    (1, 8, False, None), (4, 4, True, None), (1, 1, False, "tensorwise"), (1, 1, False, "mxfp8"),
    (2, 1, True, "mxfp8"), (1, 2, False, "tensorwise"),
]  # fmt: skip
CUTS = "uncut", "unclipped", "clamped"


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


def cases() -> list[Case]:
    """Every combination that a data path can have.

    Only expanded rows come cut: collapsed boundaries past the end of their row are a fault, which
    ``space="collapsed"`` reports.
    """
    combinations = itertools.product(
        ("collapsed", "expanded"), PARALLELISM, (0, 11), (False, True), CUTS
    )
    return [
        Case(space, *parallel, pad, fixed, cut)
        for space, parallel, pad, fixed, cut in combinations
        if space == "expanded" or cut == "uncut"
    ]


class Example:
    """Megatron's example of one release."""

    def __init__(self, version: str):
        folder = sources.unpacked(version) / "examples/multimodal"
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
        common = {"torch": torch, "dataclass": dataclasses.dataclass, **vars(__import__("typing"))}
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
             "TaskEncoder.pack_selected_samples", "TaskEncoder.batch",
             "TaskEncoder._get_total_seq_length"],
            common,
        )  # fmt: skip
        self.made |= sources.functions(
            folder / "train.py", ["get_ltor_masks_and_position_ids", "get_batch"], common
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
        """``input_ids`` ``[T]``, boundaries, rows of each image, and the model's maximum."""
        self.case, rng = case, random.Random(f"{seed} {case}")
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
            img_h=14, img_w=14, patch_dim=14,
        )  # fmt: skip
        encoder._get_total_seq_length = lambda tokens, tiles: (
            len(tokens) + (ROWS_PER_TILE * tiles.sum() - (tokens == IMAGE).sum()).item()
        )
        pack, batch = (
            self.made[f"TaskEncoder.{name}"] for name in ("pack_selected_samples", "batch")
        )
        made = batch(encoder, [pack(encoder, samples)])
        data = {name: getattr(made, name) for name in ("tokens", "labels", "imgs", "num_tiles")}
        data |= {"cu_lengths": made.cu_lengths, "max_lengths": made.max_lengths}
        with mock.patch.multiple(torch.cuda.nvtx, range_push=no_mark, range_pop=no_mark):
            tokens, *_ = self.made["get_batch"](iter([data]), IMAGE, ROWS_PER_TILE)
        boundaries, longest = made.cu_lengths[0], 10**6
        if case.cut == "clamped":
            longest = int(boundaries[-1]) - rng.randint(1, len(samples[-1].tokens))
            boundaries = boundaries.clamp(max=longest)
        tiles = torch.tensor([tiles for sample in samples for tiles in sample.num_tiles])
        return tokens[0], boundaries, tiles.long() * ROWS_PER_TILE, longest

    def sample(self, rng: random.Random, number: int):
        """A conversation of up to 40 tokens and 3 images, as the example's encoder gives it."""
        tokens = torch.tensor([rng.randint(1000, 2000) for _ in range(rng.randint(2, 40))])
        places = rng.sample(range(len(tokens)), rng.randint(0, min(3, len(tokens) - 1)))
        tokens[places] = IMAGE
        tiles = [rng.randint(1, 4) for _ in places]
        rows = sum(tiles) * ROWS_PER_TILE - len(tiles)
        sample: Any = self.made["ImageTaskSample"].__new__(self.made["ImageTaskSample"])
        sample.__key__, sample.__subflavors__ = str(number), {}
        sample.tokens = tokens
        sample.labels = torch.cat([tokens, tokens.new_tensor([7])])[: len(tokens)]
        sample.imgs = [torch.zeros(3, 14, 14) for _ in range(sum(tiles))]
        sample.num_tiles = tiles
        sample.total_len = len(tokens) + (rows if self.case.space == "expanded" else 0)
        return sample


def no_mark(*args) -> None:
    """In place of profiler marks, which need CUDA."""


def last_image(tokens) -> int:
    """The place of the last placeholder, -1 where there is none."""
    places = (tokens == IMAGE).nonzero()
    return int(places[-1]) if len(places) else -1


def answer(case: Case, tokens, boundaries, tokens_per_image, longest) -> str:
    """What the rule says of a row: "right", "WRONG", "both" (the same) or "refused"."""
    try:
        found = find_space(tokens, boundaries, tokens_per_image, IMAGE, longest)
    except BoundarySpaceError:
        return "refused"
    if found is None:
        return "both"
    return "right" if found == case.space else "WRONG"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=["0.17.1", "main"], metavar="V")
    parser.add_argument("--rows", type=int, default=20, help="rows of every combination")
    options = parser.parse_args()
    print(f"{'megatron-core':14}{'space':11}{'rows':11}{'right':>8}{'both':>8}{'refused':>9}"
          f"{'WRONG':>7}")  # fmt: skip
    wrong = 0
    for version in options.versions:
        example, counts = Example(version), Counter()
        for case, seed in itertools.product(cases(), range(options.rows)):
            row = example.row(case, seed)
            counts[case.space, case.cut, answer(case, *row)] += 1
        for space, cut in dict.fromkeys(key[:2] for key in counts):
            found = [counts[space, cut, name] for name in ("right", "both", "refused", "WRONG")]
            print(f"{version:14}{space:11}{cut:11}{found[0]:8}{found[1]:8}{found[2]:9}{found[3]:7}")
            wrong += found[3]
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except sources.SourcesMissing as error:
        print(error, file=sys.stderr)
        sys.exit(3)
