"""The wheel, and what imports without Megatron, Triton or a GPU."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])

sys.meta_path.insert(0, Missing())
sys.path.insert(0, {folder!r})
"""


def run(code, folder, names=("megatron", "triton", "matplotlib")):
    code = WITHOUT.format(folder=str(folder), names=set(names)) + code
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={"PATH": "/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, "."]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_carries_everything(wheel):
    names = {str(path.relative_to(wheel)) for path in wheel.rglob("*.py")}
    for source, target in (
        ("mcore_packing", "mcore_packing"),
        ("kernels", "mcore_packing/kernels"),
    ):
        for path in (ROOT / source).rglob("*.py"):
            assert f"{target}/{path.relative_to(ROOT / source)}" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "scripts/"))]
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Name: mcore-packing" in text and "Requires-Python: >=3.10" in text
    required = re.findall("^Requires-Dist: ([a-z-]+)[^;\n]*$", text, re.M)
    assert required == [
        "torch",
        "numpy",
        "megatron-core",
    ]  # and no Triton beside the one that torch pins
    assert (wheel / "mcore_packing/py.typed").is_file()
    for extra in ("te", "energon", "plot", "dev"):
        assert f"Provides-Extra: {extra}" in text


@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_imports_without_megatron_or_triton(wheel, place):
    folder = wheel if place == "wheel" else ROOT
    code = """
import torch, mcore_packing as mp
layout = mp.PackedLayout.build(torch.tensor([1, -200]), torch.tensor([0, 2], dtype=torch.int32),
                               [20], space="collapsed")
rows, report = mp.data.pack([{"input_ids": torch.arange(3)}], mp.RowSpec(), 8)
assert rows[0].layout.num_expanded == 3
print(layout.num_expanded, mp.__file__)
"""
    out = run(code, folder)
    assert out.startswith("21 ") and str(folder) in out


def test_what_is_missing_is_named_when_it_is_needed(wheel):
    for code, missing in (("mp.install(None)", "megatron"), ("mp.kernels", "triton")):
        code = f"""
import importlib
import mcore_packing as mp
try:
    {code.replace("mp.kernels", "importlib.import_module('mcore_packing.kernels.layout')")}
except ModuleNotFoundError as error:
    print(error.name)
"""
        assert run(code, wheel).strip() == missing


@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_kernels_are_found_as_mcore_packing_kernels(wheel, place):
    folder = wheel if place == "wheel" else ROOT
    code = "import mcore_packing.kernels.layout as kernel; print(kernel.__file__)"
    assert str(folder) in run(code, folder, names=("megatron",))
