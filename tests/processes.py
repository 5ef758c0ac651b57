"""Workers of tests in real processes, started as a job is."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

LAUNCHER = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")


def run(
    script: Path,
    *arguments: str,
    processes: int = 2,
    env: Mapping | None = None,
    timeout: int = 240,
) -> str:
    """What a script prints that torchrun starts, once all its processes have ended well."""
    command = [*LAUNCHER, "--nproc-per-node", str(processes), str(script), *arguments]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def result(script: Path, *arguments: str, **options) -> dict:
    """The first line of JSON among what it prints; options as for ``run``."""
    printed = run(script, *arguments, **options)
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    assert lines, printed[-2000:]
    return json.loads(lines[0])
