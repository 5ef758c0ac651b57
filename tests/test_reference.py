"""mkdocs.yml: the reference has every public name once. That it builds is shown by
scripts/docs.sh."""

from operator import attrgetter
from pathlib import Path
from types import ModuleType

import yaml

import mcore_packing as mp
from mcore_packing.data import energon

ROOMS = {"mcore_packing": mp, "mcore_packing.data": mp.data, "mcore_packing.media": mp.media,
         "mcore_packing.parity": mp.parity}  # fmt: skip


def listed() -> list[str]:
    """The names in the reference."""
    text = (Path(__file__).parents[1] / "mkdocs.yml").read_text()
    groups = yaml.safe_load(text)["extra"]["reference"]
    return [name for names in groups.values() for name in names]


def public() -> set[str]:
    names = {
        f"{room}.{name}"
        for room, module in ROOMS.items()
        for name in module.__all__
        if not isinstance(getattr(module, name), ModuleType)
    }
    own = [name for name, value in vars(energon).items() if not name.startswith("_")
           and getattr(value, "__module__", "") == energon.__name__]  # fmt: skip
    return names | {f"mcore_packing.data.energon.{name}" for name in own}


def test_the_reference_has_every_public_name_once():
    found = listed()
    assert len(set(found)) == len(found)
    # One thing under two names stands there once.
    assert public() - set(found) <= {"mcore_packing.parity.token_mult_prob_error"}


def test_what_the_reference_names_is_there():
    for name in listed():
        assert attrgetter(name.removeprefix("mcore_packing."))(mp), name
