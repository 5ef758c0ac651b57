"""The command line, from the outside."""

import json
import subprocess
import sys

import pytest
import torch

from mcore_packing import cli


def run(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "mcore_packing.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_parity_passes_with_the_hook_and_fails_without():
    done = run("parity", "--samples", 1, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("token_mult_prob_error 1.000000") == 2
    done = run("parity", "--samples", 2, "--without-hook")
    assert done.returncode == 1 and "FAILED" in done.stderr


def test_parity_of_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from mcore_packing.testing import tiny\n"
        "def build():\n"
        "    return tiny.llava_model('rope', img_size=28), tiny.samples(3, img_size=28)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = run("parity", "--model", "mine:build")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 samples, 4 images")


def test_doctor():
    found = cli.doctor()
    assert found["torch"] == torch.__version__
    assert "understood" in found["LLaVAModel"] and found["attention"].startswith("PackedAttention")
    assert found["found in"].endswith("llava_model.py")
    done = run("doctor")
    assert done.returncode == 0 and "megatron-core" in done.stdout


def test_show(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    row = {"input_ids": [5, -1, 6, 7], "cu_seqlens": [0, 3, 4], "tokens_per_image": [20]}
    (tmp_path / "row.json").write_text(json.dumps({**row, "image_token_id": -1}))
    output = tmp_path / "row.png"
    assert cli.main(["show", str(tmp_path / "row.json"), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "[0, 3, 4] -> [0, 22, 23]" in capsys.readouterr().out
