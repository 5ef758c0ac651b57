"""Megatron's sources, read from git clones: trees of a release, functions taken out of a file.

A package registry has releases of Megatron-Core up to 0.16.1, and neither their tests nor their
examples. Everything newer is read out of a clone of Megatron-LM, without touching its work tree.
"""

import argparse
import ast
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


class SourcesMissing(FileNotFoundError):
    """There is no clone, or it does not have that commit."""


@dataclass(frozen=True)
class Clone:
    """A clone of somebody's repository, bare or not.

    Attributes:
        name: what it is a clone of.
        url: where to get one.
        variable: the environment variable that names its folder.
        default: its folder where that is not set.
        commits: ``{version: tag or commit}``.
        folders: what is taken out of it.
    """

    name: str
    url: str
    variable: str
    default: str
    commits: Mapping[str, str]
    folders: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the clone is looked for."""
        return Path(os.environ.get(self.variable) or Path(self.default).expanduser())

    @property
    def how(self) -> str:
        """In words, how to get one."""
        return f"git clone {self.url} {self.default}, or name a clone in {self.variable}."

    def commit(self, version: str) -> str:
        """The full commit of a version, or of ``HEAD``, a tag or a commit.

        Raises:
            SourcesMissing: there is no clone, or it has no such commit; says where it was looked
                for.
        """
        wanted = self.commits.get(version, version)
        found = self._git("rev-parse", "--verify", "--quiet", f"{wanted}^{{commit}}")
        if found.returncode:
            raise SourcesMissing(
                f"no sources of {self.name} {version} ({wanted}) in {self.folder}. {self.how}"
            )
        return found.stdout.decode().strip()

    def has(self, version: str) -> bool:
        """Whether there is a clone with this version."""
        try:
            return bool(self.commit(version))
        except SourcesMissing:
            return False

    def unpacked(self, version: str) -> Path:
        """The folder of a version's sources, unpacked into ``.versions`` once.

        Raises:
            SourcesMissing: as ``commit`` does.
        """
        commit = self.commit(version)
        target = CHECKOUT / ".versions" / f"{self.folder.name}-{commit[:12]}"
        marker, folders = target / "complete", " ".join(self.folders)
        if not marker.is_file() or marker.read_text() != folders:
            made = self._git("archive", commit, *self.folders)
            if made.returncode:
                raise SourcesMissing(f"{self.folder}: {made.stderr.decode().strip()}")
            with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
                archive.extractall(target, filter="data")
            marker.write_text(folders)
        return target

    def _git(self, *arguments: str) -> subprocess.CompletedProcess:
        # Whoever owns the clone: nothing in it is run.
        command = ["git", "-c", "safe.directory=*", "-C", str(self.folder), *arguments]
        return subprocess.run(command, capture_output=True)


MEGATRON = Clone(
    name="Megatron-Core",
    url="https://github.com/NVIDIA/Megatron-LM",
    variable="MCORE_PACKING_MEGATRON_LM",
    default="~/.cache/mcore_packing/megatron-lm",
    commits={
        "0.17.1": "core_v0.17.1",
        "0.18.2": "core_v0.18.2",
        "0.19.0": "core_v0.19.0",
        "main": "d98e8a64ddf34856e74b24714e3bedb2f5a39553",  # of 2026-08-22
        "newest": "HEAD",
    },
    folders=("megatron", "tests/unit_tests", "examples/multimodal", "LICENSE"),
)
BRIDGE = Clone(
    name="Megatron-Bridge",
    url="https://github.com/NVIDIA-NeMo/Megatron-Bridge",
    variable="MCORE_PACKING_MEGATRON_BRIDGE",
    default="~/.cache/mcore_packing/megatron-bridge",
    commits={"main": "067f987df03b8355b03192d88d70f1709fedf51a", "0.6.0": "v0.6.0"},
    folders=("src", "LICENSE"),
)


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
        print(MEGATRON.unpacked(options.version))
    except SourcesMissing as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
