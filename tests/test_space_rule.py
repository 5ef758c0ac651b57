"""``mp.find_space`` on rows that the functions of Megatron's own example make."""

import re

import pytest

from mcore_packing.testing.sources import CHECKOUT, MEGATRON

from . import processes


@pytest.mark.parametrize("version", ["0.17.1", "main"])
def test_no_row_of_megatrons_example_is_misread(version):
    if not MEGATRON.has(version):
        pytest.skip(f"no sources of Megatron-Core {version}. {MEGATRON.how}")
    script = CHECKOUT / "scripts/space_rule.py"
    said = processes.run(script, "--versions", version, "--rows", "5", processes=1)
    lines = re.findall(r"(\w+) +(\w+) +(\d+) +(\d+) +(\d+) +(\d+)$", said, re.M)
    rows = {line[:2]: list(map(int, line[2:])) for line in lines}
    assert rows.keys() == {("collapsed", "uncut")} | {
        ("expanded", cut) for cut in ("uncut", "unclipped", "clamped")
    }
    for (space, cut), (right, both, refused, wrong) in rows.items():
        assert right + both + refused + wrong == 200
        assert wrong == 0
        assert cut == "unclipped" or right > 150, (space, cut)
