"""Public bug reports, by their smallest inputs: what each must give, or that it is refused."""

import json
from pathlib import Path

import pytest
import torch

import mcore_packing as mp
from mcore_packing.media import get_family, split_samples

CASES = json.loads(Path(__file__).with_name("reports.json").read_text())["cases"]
# What needs a model or several processes is tested with the hook, and in test_energon.py.
ELSEWHERE = {"clamped-at-the-maximum", "text-row-ddp-overlap", "text-row-fsdp2", "refused-in-a-row"}


def of_kind(kind: str) -> list:
    return [pytest.param(case, id=case["id"]) for case in CASES if case["kind"] == kind]


def sample_of(case: dict) -> dict:
    """The sample that a case describes."""
    shape = case.get("images_shape", [sum(case.get("tiles", [])), 3, 28, 28])
    sample = {
        name: torch.tensor(case[name], dtype=torch.int64)
        for name in ("input_ids", "labels", "attention_mask", "position_ids")
        if name in case
    }
    if "tiles" in case or "images_shape" in case:
        sample |= {"images": torch.zeros(shape), "num_image_tiles": case.get("tiles", [])}
    return sample


def says(right: dict, rows: list, report) -> bool:
    """Whether rows are what one alternative of a case says."""
    found = {
        "input_ids": rows[0].input_ids[0].tolist(),
        "trained": rows[0].num_trained,
        "loss_mask_sum": sum(float(row.loss_mask.sum()) for row in rows),
        "num_rows": len(rows),
        "untrained": report.num_untrained,
    }
    return all(found[name] == value for name, value in right.items())


@pytest.mark.parametrize("case", of_kind("pack"))
def test_rows_of_a_report(case):
    spec = mp.RowSpec(img_seq_len=case["img_seq_len"])
    samples = list(map(sample_of, case["samples"]))
    rows, report = mp.data.pack(samples, spec)
    rows = list(rows)
    if "refused" in case["right"] and report.refused:
        return
    assert not report.refused, report
    assert any(says(right, rows, report) for right in case["right"] if right != "refused")


@pytest.mark.parametrize("case", of_kind("slice"))
def test_parts_of_a_report(case):
    videos = torch.zeros(case["pixel_values_videos"])
    parts = split_samples(
        {"pixel_values_videos": videos}, get_family(case["family"]), [0] * len(case["num_videos"]),
        1, num_videos=case["num_videos"], frames_per_video=case["frames_per_video"],
    )  # fmt: skip
    (right,) = case["right"]
    assert [list(part["pixel_values_videos"].shape) for part in parts] == right["parts"]


def test_no_report_is_forgotten():
    others = {case["id"] for case in CASES if case["kind"] not in ("pack", "slice")}
    assert others == ELSEWHERE
