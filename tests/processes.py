"""Workers of tests in real processes, started as a job is.

They are forked from one process that has imported, once, what they all import: that takes several
seconds, and a worker often less than one.
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

LAUNCHER = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "mcore_packing.data",
        "mcore_packing.parity",
        "mcore_packing.testing.plain",
        "mcore_packing.testing.tiny",
        "megatron.core.distributed",
        "megatron.core.optimizer",
        "megatron.core.pipeline_parallel",
        "torch.distributed.fsdp",
    ]
)


def run(
    script: Path,
    *arguments: str,
    processes: int = 2,
    env: Mapping | None = None,
    timeout: int = 240,
) -> str:
    """What a script prints, once all its processes have ended well.

    With ``env``, which may say where else modules are, torchrun starts them.
    """
    if env is not None:
        command = [*LAUNCHER, "--nproc-per-node", str(processes), str(script), *arguments]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=timeout
        )
        status, printed, said = done.returncode, done.stdout, done.stderr
    else:
        status, printed, said = fork(script, *arguments, processes=processes, timeout=timeout)
    assert status == 0, f"{status}\n{printed[-2000:]}{said[-4000:]}"
    return printed


def fork(
    script: Path, *arguments: str, processes: int = 1, timeout: int = 240
) -> tuple[int, str, str]:
    """The status of a script, what it prints and what it says of errors."""
    with TemporaryDirectory() as folder:
        with started(script, *arguments, processes=processes, folder=folder) as ranks:
            status = _wait(ranks, timeout)
        printed, said = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return status, printed, said


@contextlib.contextmanager
def started(script: Path, *arguments: str, processes: int, folder: Path | str):
    """The processes of a script, which are killed in the end; they write into the folder."""
    world = {}
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    ranks = [
        FORKS.Process(target=_work, args=(rank, world, str(folder), str(script), arguments))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _wait(ranks: list, timeout: float) -> int:
    """The first status that is bad, at once, or 0 when all have ended."""
    end = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.exitcode is None]:
        if not connection.wait([rank.sentinel for rank in running], end - time.monotonic()):
            raise TimeoutError(f"{len(running)} of {len(ranks)} processes run after {timeout} s")
        if bad := [rank.exitcode for rank in ranks if rank.exitcode]:
            return bad[0]
    return max(rank.exitcode for rank in ranks)


def _work(rank: int, world: dict, folder: str, script: str, arguments: tuple[str, ...]) -> None:
    """Be ``python script arguments``, and a rank of a world, where there is one."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    if world:
        os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def result(script: Path, *arguments: str, **options) -> dict:
    """The first line of JSON among what it prints; options as for ``run``."""
    printed = run(script, *arguments, **options)
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    assert lines, printed[-2000:]
    return json.loads(lines[0])
