"""What a training run leaves: its log, and Megatron's sharded checkpoints, from which it goes on on
any number of ranks."""

import json
import queue
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

import mcore_packing as mp

Found = TypeVar("Found")
SUMS = "checksums.json"  # written last: a folder without it is not whole
# Megatron's own is a server in another process, which takes seconds to start and outlives a run
# that is killed. Only writing in the background needs it.
filesystem_async._results_queue = queue.SimpleQueue()


class RunFolder:
    """The folder of one run: a line for each step in ``log.jsonl``, and its checkpoints."""

    def __init__(self, path: Path):
        self.path, self.log = path, path / "log.jsonl"
        self.checkpoints = Checkpoints(path / "checkpoints")

    @property
    def holds_a_run(self) -> bool:
        return bool(self.checkpoints.steps or (self.log.exists() and self.log.stat().st_size))

    def make(self, empty: bool) -> None:
        """Make the folder, where it is not there; delete the run in it, where that is asked for."""
        if empty:
            self.log.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def begin_log(self, entries: list[dict]) -> None:
        self.log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def log_entry(self, entry: dict) -> None:
        with open(self.log, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self, steps: int) -> list[dict]:
        """The entries of the first steps; what a killed run wrote behind its checkpoint is left
        out."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines, entries = text.splitlines()[:steps], []
        for step, line in enumerate([*lines, *[""] * (steps - len(lines))], start=1):
            try:
                entry = json.loads(line)
                is_right = entry["step"] == step
            except (ValueError, KeyError, TypeError):
                is_right = False
            if not is_right:
                raise mp.PackingError(
                    f"{self.log}, line {step}: expected the entry of step {step}, found "
                    f"{line[:40]!r}; mend it, or start again with --overwrite"
                )
            entries.append(entry)
        return entries


class Checkpoints:
    """The checkpoints of one run: folders ``step-000050``, the newest few.

    Methods are called on all ranks together. A folder is written under another name, and gets its
    own once it is whole.

    Args:
        folder: where they are, on a file system that all ranks share.
        kept: how many; older ones are deleted.
    """

    def __init__(self, folder: Path, kept: int = 2):
        self.folder, self.kept = folder, kept

    @property
    def steps(self) -> list[int]:
        names = [path.name[5:] for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06}"

    def save(self, step: int, state: dict) -> None:
        """Write a state.

        Args:
            step: its name; one that is there already is replaced.
            state: what ``sharded_state_dict`` of Megatron's model and optimizer give, and beside
                them what is the same on every rank.
        """
        unfinished = self.folder / "unfinished"

        def prepare():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

        def finish():
            sums = {path.name: checksum(path) for path in sorted(unfinished.iterdir())}
            (unfinished / SUMS).write_text(json.dumps(sums))
            shutil.rmtree(self.path(step), ignore_errors=True)
            unfinished.rename(self.path(step))
            # What is newer is damaged: the run went on from one before it.
            for old in [other for other in self.steps if other <= step][: -self.kept]:
                shutil.rmtree(self.path(old))

        on_rank_0(prepare)
        dist_checkpointing.save(state, str(unfinished))
        on_rank_0(finish)

    def newest(self, say: Callable[[str], None]) -> int | None:
        """The newest step whose checkpoint is whole, None where there is no checkpoint at all.

        Args:
            say: is told, on rank 0, which ones are not whole, and why.
        """

        def look():
            for step in reversed(self.steps):
                fault = self.fault(step)
                if not fault:
                    return step
                say(f"{self.path(step)} is passed over: {fault}")
            if self.steps:
                raise mp.PackingError(f"no checkpoint in {self.folder} is whole")
            return None

        return on_rank_0(look)

    def fault(self, step: int) -> str:
        """Why a checkpoint is not whole; nothing where it is."""
        folder = self.path(step)
        try:
            sums = json.loads((folder / SUMS).read_text())
            for name, expected in sums.items():
                if checksum(folder / name) != expected:
                    return f"{name} is not what was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except ValueError:
            return f"{SUMS} is cut short"
        return ""

    def common(self, step: int) -> dict:
        """What a state has beside its tensors."""
        return dist_checkpointing.load_common_state_dict(str(self.path(step)))

    def load(self, step: int, state: dict) -> dict:
        """A state as this rank needs it: like ``state``, with what was saved."""
        return dist_checkpointing.load(state, str(self.path(step)))


def checksum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def on_rank_0(function: Callable[[], Found]) -> Found:
    """Call a function on rank 0 alone; what it returns, or its error, on every rank."""
    found = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = function()
        except (mp.PackingError, OSError) as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
