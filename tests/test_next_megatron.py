"""A Megatron-Core of tomorrow: the real main, changed in one point that is known to come.

Pull request 7315 of September 2026 gives ``LLaVAModel`` a fourth form, of which only the tests are
public. The hook must then move boundaries and leave the rest alone, say so once, and be right.
"""

import math
import os
from pathlib import Path

import pytest

from mcore_packing.testing.sources import MEGATRON

from . import processes

pytestmark = pytest.mark.ci

WORKER = Path(__file__).parent / "next_worker.py"
FILE = Path("megatron/core/models/multimodal/llava_model.py")

# ``_preprocess_data`` takes one argument more.
ARGUMENT = {
    "            imgs_sizes=imgs_sizes,\n            position_ids=position_ids,\n": """\
            imgs_sizes=imgs_sizes,
            media_token_counts=num_image_tiles,
            position_ids=position_ids,
""",
    "        imgs_sizes=None,\n        *,\n        position_ids=None,\n": """\
        imgs_sizes=None,
        *,
        media_token_counts,
        position_ids=None,
""",
}
# The loss mask of ``forward`` becomes weights, by the boundaries of the sequences.
WEIGHTS = {
    "        # Rebuild packed_seq_params to match post-truncation tensor dims.\n": """\
        if expanded_loss_mask is not None and packed_seq_params is not None:
            ends = packed_seq_params.cu_seqlens_q[1:].long()
            trained = expanded_loss_mask[0]
            at = torch.arange(trained.numel(), device=trained.device)
            sequence = torch.bucketize(at, ends, right=True)
            counts = trained.new_zeros(len(ends) + 1).index_add(0, sequence, trained)
            weights = trained / counts.clamp(min=1).sqrt()[sequence]
            expanded_loss_mask = (weights * (trained.sum() / weights.sum()))[None]

"""
}
# ``forward`` encodes a share of the tiles on each context-parallel rank, and gathers all of them.
SHARES = {
    "        self._dynamic_resolution = dynamic_resolution\n": """\
        self._dynamic_resolution = dynamic_resolution
        self._balance_vision_context_parallel_by_tokens = True
""",
    "        has_images = images is not None and images.shape[0] > 0\n": """\
        has_images = images is not None and images.shape[0] > 0
        shares = has_images and self.context_parallel_lm > 1
        if shares:
            ranks, all_tiles = self.cp_group.size(), len(images)
            more = images.new_zeros(-all_tiles % ranks, *images.shape[1:])
            images = torch.cat([images, more]).chunk(ranks)[self.cp_group.rank()]
""",
    "            )  # [img_seq_len, num_tiles, h_language]\n": """\
            )  # [img_seq_len, num_tiles, h_language]
            if shares:
                parts = [torch.empty_like(image_embeddings) for _ in range(ranks)]
                torch.distributed.all_gather(parts, image_embeddings, group=self.cp_group)
                image_embeddings = torch.cat(parts, dim=1)[:, :all_tiles]
""",
}


def changed_main(folder: Path, changes: dict[str, str]) -> str:
    """A tree that is Megatron's main, but for these lines of its ``LLaVAModel``."""
    if not MEGATRON.has("main"):
        pytest.skip(f"no sources of Megatron-Core main. {MEGATRON.how}")
    real = MEGATRON.unpacked("main")
    for parent in reversed(FILE.parents):
        (folder / parent).mkdir(exist_ok=True)
        for entry in (real / parent).iterdir():
            link = folder / parent / entry.name
            if parent / entry.name not in (FILE, *FILE.parents):
                link.symlink_to(entry)
    text = (real / FILE).read_text()
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (folder / FILE).write_text(text)
    return str(folder)


def run(folder, changes, *sizes: str) -> dict:
    path = os.pathsep.join([changed_main(folder, changes), os.environ["PYTHONPATH"]])
    environment, count = {**os.environ, "PYTHONPATH": path}, 2 if sizes else 1
    return processes.result(WORKER, *sizes, processes=count, env=environment, timeout=600)


ONE = pytest.param((), id="cp1")
CP = pytest.param(("--cp", "2"), id="cp2")
SP = pytest.param(("--tp", "2"), id="tp2sp")


def check(found: dict, reason: str) -> None:
    """Boundaries only, said once, and right."""
    ours = [text for text in found["said"] if text.startswith("mcore_packing")]
    assert len(ours) == 1 and reason in ours[0], found["said"]
    assert "boundaries are moved, the expansion is left alone" in ours[0]
    assert found["call"] == "BoundariesOnly"
    assert found["is_right"] and found["difference"] == 0, found["found"]


@pytest.mark.parametrize("sizes", [ONE, SP])
def test_an_argument_more_of_preprocess_data(sizes, tmp_path):
    found = run(tmp_path, ARGUMENT, *sizes)
    check(found, "is of no known release (it takes ['image_embeddings', 'image_token_index'")
    assert found["described"] == "boundaries only: its _preprocess_data is not known"


@pytest.mark.parametrize("sizes", [ONE, CP])
def test_a_forward_that_uses_boundaries_for_weights(sizes, tmp_path):
    found = run(tmp_path, WEIGHTS, *sizes)
    check(found, "forward of this LLaVAModel uses its boundaries in 7 places, of which 5 are known")
    assert found["described"].startswith("boundaries only: its forward uses boundaries")
    if sizes:
        return
    by_sequence = found["weights"]
    assert len(by_sequence) == 5 and len({count for _, count in by_sequence}) > 2
    total = sum(count for _, count in by_sequence)
    scale = total / sum(math.sqrt(count) for _, count in by_sequence)
    for weights, count in by_sequence:
        assert weights == [pytest.approx(scale / math.sqrt(count), abs=1e-4)]


def test_a_model_that_shares_its_vision_by_itself(tmp_path):
    found = run(tmp_path, SHARES, "--cp", "2")
    check(found, "shares its vision model over context-parallel ranks by itself")
    mine, everyones = found["tiles"]
    assert mine == math.ceil(everyones / 2)


def test_main_itself_is_known(tmp_path):
    found = run(tmp_path, {})
    assert not [text for text in found["said"] if text.startswith("mcore_packing")]
    assert found["call"] == "PackedCall" and found["is_right"]
    assert found["described"] == "understood (as in main)"
