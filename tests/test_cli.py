"""The command line, from the outside."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import mcore_packing as mp
from mcore_packing import cli

ROW = {"input_ids": [5, -200, 6, 7], "cu_seqlens": [0, 3, 4], "tokens_per_image": [20]}
FILES = {
    "broken.json": "{",
    "list.json": "[]",
    "key.json": {"input_ids": [5]},
    "unknown.json": {**ROW, "spaec": "expanded"},
    "words.json": {**ROW, "input_ids": ["five"]},
    "empty.json": {**ROW, "input_ids": [], "cu_seqlens": [0, 0], "tokens_per_image": []},
    "none.json": {**ROW, "cu_seqlens": []},
    "counts.json": {**ROW, "tokens_per_image": [20, 30]},
    "negative.json": {**ROW, "tokens_per_image": [-20]},
    "decreases.json": {**ROW, "cu_seqlens": [0, -3, 4]},
    "either.json": {**ROW, "cu_seqlens": [0, 3, 9]},
    "long.json": {**ROW, "tokens_per_image": [2147483640]},
    "many.json": {"input_ids": [5] * 2000, "cu_seqlens": [*range(2001)], "tokens_per_image": []},
    "deep.json": "[" * 100_000,
    "huge.json": {**ROW, "input_ids": [5, -200, 6, 2**40]},
    "hugest.json": {**ROW, "image_token_id": 10**30},
    "tiles.json": {**ROW, "tokens_per_image": [3]},
    "row.json": ROW,
    "mine.py": "def nothing(): pass\ndef fails(): 1 / 0\ndef no_llava(): return 1, []\n"
    "def build():\n"
    "    from mcore_packing.testing import tiny\n"
    "    return tiny.llava_model('rope', img_size=28), tiny.samples(3, img_size=28)\n"
    "def empty(): return build()[0], []\n"
    "def strange(): return build()[0], [{'ids': [1]}]\n"
    "def masks():\n"
    "    model, samples = build()\n"
    "    mask = lambda m, args, out: (out[0], out[1] * (out[1].cumsum(1) < 100))\n"
    "    model.register_forward_hook(mask)\n"
    "    return model, samples\n"
    "def deaf():\n"
    "    import mcore_packing as mp\n"
    "    from mcore_packing.testing import broken\n"
    "    model, samples = build()\n"
    "    mp.install(model)\n"
    "    broken.deaf(model)\n"
    "    row = mp.data.get_packer('concatenative', mp.row_spec(model)).join(samples)\n"
    "    return model, row, lambda model, inputs: model(**inputs)\n"
    "def bad_id():\n"
    "    model, samples = build()\n"
    "    samples[1]['input_ids'][9] = 5000\n"
    "    return model, samples\n"
    "def bad_tiles():\n"
    "    model, samples = build()\n"
    "    return model, [{**samples[0], 'num_image_tiles': [3]}]\n"
    "def plain():\n"
    "    from megatron.core.transformer.dot_product_attention import DotProductAttention\n"
    "    from megatron.core.transformer.enums import AttnMaskType\n"
    "    model, samples = build()\n"
    "    for layer in model.language_model.decoder.layers:\n"
    "        layer.self_attention.core_attention = DotProductAttention(\n"
    "            layer.self_attention.config, 1, AttnMaskType.causal, 'self')\n"
    "    return model, samples\n"
    "def bad_step(): return *deaf()[:2], lambda model, inputs: model(1)\n",
}
# What a user can get wrong, and the one line that answers it.
ERRORS = {
    "": "the following arguments are required: command; see --help",
    "shwo": r"argument command: invalid choice: 'shwo' \(.*\); see --help",
    "show no.json": "no.json: No such file or directory",
    "show broken.json": "broken.json is not JSON: Expecting property name .*",
    "show list.json": "list.json is no object with input_ids, cu_seqlens, tokens_per_image",
    "show key.json": "key.json has no cu_seqlens, tokens_per_image",
    "show unknown.json": "unknown.json: spaec is no key of a row; it takes input_ids, .*",
    "show words.json": "words.json: input_ids is not a list of whole numbers",
    "show empty.json": "empty.json: input_ids is empty; there is nothing to draw",
    "show none.json": "none.json: cu_seqlens is empty; there is nothing to draw",
    "show counts.json": "sequence 0: 1 placeholders .* but 2 entries in tokens_per_image; .*",
    "show negative.json": "image 0: tokens_per_image is -20, expected at least 1; .*",
    "show decreases.json": "sequence 0: cu_seqlens decreases by 3, expected never",
    "show either.json": "the boundaries end at 9 and could count neither: .*",
    "show long.json": "long.json: 2 sequences and 2147483643 positions are too much to draw, .*",
    "show tiles.json": r"tiles.json: tokens_per_image \[3\] makes image 0 3 .* multiply by .*",
    "show evil.pt": r"evil.pt holds \S+system, which is no part of a row; expected .*",
    "show dict.pt": "dict.pt holds a dict with rows, expected a mp.data.Row",
    "show half.pt": "half.pt cannot be read; expected a mp.data.Row that torch.save wrote",
    "show dict.pt --space expanded": "--space is for rows in JSON; dict.pt has its layout with it",
    "show many.json": "many.json: 2000 sequences and 2000 positions are too much to draw, .*",
    "show deep.json": "deep.json: its lists lie too deep in each other",
    "show huge.json": "input_ids hold an id beyond int32, more than a layout can",
    "show hugest.json": "image_token_id is 1000000000000000000000000000000, more than int32 holds",
    "show row.json --output .": "--output .: that is a folder, expected a file such as row.png",
    "show row.json --space both": r"argument --space: invalid choice: 'both' \(.*\); see --help",
    "show row.json --output no/row.png": "--output no/row.png: there is no folder no",
    "show row.json --output row.xyz": "--output row.xyz: Format 'xyz' is not supported .*",
    "parity --samples 0": ".*--samples: expected a whole number of at least 1, not 0; see --help",
    "parity --samples x": ".*--samples: expected a whole number of at least 1, not x; see --help",
    "parity --threshold x": "argument --threshold: invalid float value: 'x'; see --help",
    "parity --model mine:build --samples 2": "--samples is for the small model; .*",
    "parity --model mine": "--model mine: expected MODULE:FUNCTION, for example my_module:build",
    "parity --model no:build": r"--model no:build: ModuleNotFoundError: No module named 'no'",
    "parity --model mine:no": r"--model mine:no: AttributeError: module 'mine' .* attribute 'no'",
    "parity --model mine:fails": r"--model mine:fails: ZeroDivisionError: .* \(mine.py, line 2\)",
    "parity --model mine:nothing": r"--model .* returned None, expected \(model, samples\)",
    "parity --model mine:no_llava": ".*LLaVAModel.*",
    "parity --model mine:empty": "--model mine:empty: samples is empty, expected a list of samples",
    "parity --model mine:strange": "--model .*: sample 0 is a dict with ids, expected .*",
    "parity --model mine:bad_id": "sample 1 alone: the model raises IndexError: .*",
    "parity --model mine:bad_tiles": r"sample 0 alone: num_image_tiles \[3\] are 3 tiles, but .*",
    "parity --model mine:plain": ".*DotProductAttention, .* put mp.attention.PackedAttention .*",
    "isolate --model mine:bad_id": "the model raises IndexError: .*",
    "isolate --model mine:plain": ".*DotProductAttention, .* put mp.attention.PackedAttention .*",
    "isolate --model mine:nothing": r"--model .* returned None, expected \(model, samples\)",
    "isolate --model mine:bad_step": "the model raises TypeError: .*",
}


class Evil:
    """What runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with ``FILES``."""
    for name, content in FILES.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    torch.save({"rows": []}, tmp_path / "dict.pt")
    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "dict.pt").read_bytes()[:200])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run(*arguments):
    command = [sys.executable, "-m", "mcore_packing.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def answer(command, capsys):
    """Exit status and what was said on both streams."""
    try:
        status = cli.main(command.split())
    except SystemExit as error:  # argparse's
        status = error.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("command", ERRORS)
def test_what_a_user_gets_wrong_is_answered_with_one_line_and_status_2(command, capsys):
    if command.startswith("show"):
        pytest.importorskip("matplotlib")
    status, out, error = answer(command, capsys)
    assert status == 2 and out == ""
    assert re.fullmatch(rf"mcore-packing( \w+)?: {ERRORS[command]}\n", error), error
    assert not os.path.exists("was_run")


@pytest.mark.parametrize(
    "command, package, line",
    [
        ("show row.json", "matplotlib", "it needs matplotlib: pip install matplotlib"),
        ("parity", "megatron", r"it needs megatron-core \(.*\): pip install megatron-core"),
    ],
)
def test_a_missing_package_is_named(command, package, line):
    done = run_without(package, *command.split())
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"mcore-packing {command.split()[0]}: {line}\n", done.stderr), done.stderr


def run_without(package, *arguments):
    """The command line where a package cannot be imported."""
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from mcore_packing import cli
sys.exit(cli.main({list(arguments)}))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_parity_passes_with_the_hook():
    done = run("parity", "--samples", 1, 2)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # none of Megatron's remarks
    assert done.stdout.count("token_mult_prob_error 1.000000") == 2


def test_parity_fails_without_the_hook(capsys):
    status, _, error = answer("parity --samples 2 --without-hook", capsys)
    assert status == 1 and error == "FAILED: wrong\n"


def test_a_threshold_of_zero_counts(capsys):
    status, _, error = answer("parity --samples 1 --threshold 0", capsys)
    assert status == 1 and error == "FAILED: wrong, or above 0.0\n"


def test_parity_of_a_model_in_the_current_folder(capsys):
    status, out, _ = answer("parity --model mine:build", capsys)
    assert status == 0 and out.startswith("3 samples, 4 images")
    status, out, _ = answer("parity --model mine:build --without-hook", capsys)
    assert status == 1 and out.startswith("3 samples: the model raises RuntimeError: ")


def test_parity_fails_where_labels_are_lost(capsys):
    status, out, _ = answer("parity --model mine:masks", capsys)
    assert status == 1 and re.search(r"; [1-9]\d* labels lost", out), out


def test_isolate(capsys):
    status, out, error = answer("isolate --samples 3 --exhaustive", capsys)
    assert status == 0 and error == "" and out == "isolation: right, bit by bit, 6 passes\n"
    status, out, _ = answer("isolate --samples 1", capsys)
    assert status == 0 and out.startswith("isolation: inconclusive")
    status, out, error = answer("isolate --model mine:deaf", capsys)
    assert status == 1 and error == "FAILED: samples see each other\n"
    assert "WRONG on rank 0: sequence 2 sees 0, 1 (" in out
    assert answer("isolate --model mine:build", capsys)[0] == 0


def test_doctor():
    found = cli.doctor()
    assert found["torch"] == torch.__version__ and found["mcore-packing"] == mp.__version__
    assert "understood" in found["LLaVAModel"] and found["small model"].startswith(
        "PackedAttention"
    )
    assert found["found in"].endswith(os.path.join("megatron", "core"))
    done = run("doctor")
    assert done.returncode == 0 and "megatron-core" in done.stdout and done.stderr == ""


MISSING = {
    "megatron": [
        "megatron-core +not installed: no hook and no parity: pip install megatron-core",
        "LLaVAModel +unknown, ModuleNotFoundError: No module named 'megatron'",
    ],
    "triton": ["triton +not installed: no kernels, which rows on a GPU need", "LLaVAModel +under"],
    "matplotlib": ["matplotlib +not installed: no pictures", "LLaVAModel +understood"],
}


@pytest.mark.parametrize("package", MISSING)
def test_doctor_says_what_is_missing(package):
    done = run_without(package, "doctor")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for line in MISSING[package]:
        assert re.search(f"^{line}", done.stdout, re.M), done.stdout


def test_doctor_reads_megatrons_files_before_pips_records(folder, monkeypatch):
    core = folder / "megatron/core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('broken')")
    (core / "package_info.py").write_text("__version__ = '0.99.0'")
    code = "from mcore_packing import cli; cli.main(['doctor'])"
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}, check=False)  # fmt: skip
    assert re.search(r"^megatron-core +0\.99\.0; pip recorded \d", done.stdout, re.M), done.stdout
    assert re.search("^LLaVAModel +unknown, RuntimeError: broken$", done.stdout, re.M)


def test_version(capsys):
    status, out, _ = answer("--version", capsys)
    assert not status and out == f"mcore-packing {mp.__version__}\n"


@pytest.mark.parametrize("space", ["collapsed", "expanded"])
def test_show(space, folder, capsys):
    pytest.importorskip("matplotlib")
    row = ROW if space == "collapsed" else {**ROW, "cu_seqlens": [0, 22, 23], "space": space}
    (folder / "row.json").write_text(json.dumps(row))
    assert cli.main(["show", "row.json"]) == 0
    assert (folder / "row.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"given      cu_seqlens {row['cu_seqlens']}" in out and space in out
    assert "collapsed  4 tokens, cu_seqlens [0, 3, 4]" in out
    assert "expanded   23 positions, cu_seqlens [0, 22, 23], longest sequence 22" in out
    assert "wrote row.png" in out


@pytest.mark.parametrize("expands", [True, False], ids=["llava", "plain"])
def test_show_a_saved_row(expands, folder, capsys):
    pytest.importorskip("matplotlib")
    spec = mp.RowSpec(img_seq_len=20, seq_multiple=4, expands=expands)
    images = {"images": torch.zeros(1, 3, 28, 28)} if expands else {}
    first = {"input_ids": torch.tensor([5, -200 if expands else 8, 6]), **images, "__key__": "a"}
    samples = [first, {"input_ids": torch.arange(5)}]
    rows, _ = mp.data.pack(samples, spec, algorithm="concatenative")
    torch.save(rows[0], folder / "row.pt")
    assert cli.main(["show", "row.pt"]) == 0
    out = capsys.readouterr().out
    end = 22 if expands else 3
    assert "samples [0, 1]" in out
    assert f"cu_seqlens [0, {end}, {end + 5}], longest sequence {max(end, 5)}" in out
    assert f"padded     cu_seqlens [0, {24 if expands else 4}, {32 if expands else 12}]" in out
    assert (folder / "row.png").read_bytes().startswith(b"\x89PNG")


def test_the_space_that_the_command_line_says_counts(capsys):
    pytest.importorskip("matplotlib")
    status, _, error = answer("show row.json --space expanded", capsys)
    assert status == 2 and "expanded" in error


@pytest.mark.parametrize("num_seqs", [1, 3, 64])
def test_a_picture_has_whole_ticks_and_names_the_grey_tail(num_seqs, monkeypatch, folder):
    plot = pytest.importorskip("mcore_packing.plot")
    seen = []
    monkeypatch.setattr(plot.plt, "close", seen.append)
    ids = torch.tensor([7, 8] * num_seqs + [9])
    edges = torch.arange(num_seqs + 1, dtype=torch.int32) * 2
    plot.draw_row(mp.PackedLayout.build(ids, edges, [], space="collapsed"), folder / "row.png")
    (figure,) = seen
    for axis in figure.axes:
        assert all(tick == int(tick) for tick in axis.get_xticks())
    (legend,) = figure.legends
    assert "padding, or behind the last sequence" in [text.get_text() for text in legend.texts]
