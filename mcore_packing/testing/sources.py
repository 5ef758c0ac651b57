"""Megatron's sources: where the archives are, and functions taken out of files of theirs.

Releases newer than those of a package registry, Megatron's own tests and its examples come as
``megatron_core-<version>.tar.xz``, in the folder that ``MCORE_PACKING_MEGATRON_SOURCES`` names, by
default ``../shared/megatron`` beside the checkout.
"""

import argparse
import ast
import os
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
VARIABLE = "MCORE_PACKING_MEGATRON_SOURCES"
PREFIX, SUFFIX = "megatron_core-", ".tar.xz"
HOW = f"Put {PREFIX}<version>{SUFFIX} into ../shared/megatron, or name a folder in {VARIABLE}."


class SourcesMissing(FileNotFoundError):
    """There is no archive of that release."""


def folder() -> Path:
    """Where the archives are looked for."""
    return Path(os.environ.get(VARIABLE) or CHECKOUT.parent / "shared/megatron")


def archives() -> dict[str, Path]:
    """``{"0.18.2": path, ..., "main": path}`` of the archives that are there."""
    found = {}
    for path in sorted(folder().glob(f"{PREFIX}*{SUFFIX}")):
        version = path.name.removeprefix(PREFIX).removesuffix(SUFFIX)
        found["main" if version.startswith("main") else version] = path
    return found


def unpacked(version: str) -> Path:
    """The folder of a release's sources, unpacked into ``.versions`` once.

    Raises:
        SourcesMissing: there is no archive of it; says where it was looked for.
    """
    path = archives().get(version)
    if path is None:
        raise SourcesMissing(f"no sources of Megatron-Core {version} in {folder()}. {HOW}")
    target = CHECKOUT / ".versions" / path.name.removesuffix(SUFFIX)
    if not (target / "complete").is_file():
        with tarfile.open(path) as archive:
            archive.extractall(target, filter="data")
        (target / "complete").touch()
    return target


def functions(file: Path, names: Iterable[str], namespace: dict) -> dict:
    """Functions and classes of a source file, compiled as they stand there, and nothing else of it.

    Its examples import what no machine of ours has; the functions themselves do not need it.

    Args:
        file: the source file.
        names: functions, classes or methods ("Class.method", without their decorators).
        namespace: what they find as globals; they are added to it.

    Returns:
        ``{name: function}``.
    """
    tree = ast.parse(file.read_text())
    found = {}
    for name in names:
        nodes = tree.body
        for part in name.split("."):
            node = next(n for n in nodes if getattr(n, "name", None) == part)
            nodes = getattr(node, "body", ())
        if "." in name:
            node.decorator_list = []
        exec(compile(ast.Module([node], []), str(file), "exec"), namespace)
        found[name] = namespace[name.rpartition(".")[2]]
    return found


def main() -> int:
    """Print the folder of a release's sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help='"0.18.2", say, or "main"')
    options = parser.parse_args()
    try:
        print(unpacked(options.version))
    except SourcesMissing as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
