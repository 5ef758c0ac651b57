"""Everything at once, for an hour: is memory flat, and do kills leave the losses as they were?

Two data-parallel ranks (gloo) train as scripts/train_llava.py does, on long and on short rows, some
of them text alone, which worker processes make; no process may open more than 256 descriptors. They
are graded in between. Every few minutes a rank is killed, or a worker of one, and the run goes on
from its last checkpoint. The same run is left alone beside it, to compare.

    python scripts/long_run.py --minutes 60 --output out/long_run
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).parent))
import train_llava

import mcore_packing as mp

DESCRIPTORS, WORKERS, RANKS, ROWS_PER_STEP = 256, 2, 2, 4
BUFFER = 192  # samples that are packed together, into rows of one of these lengths
CAPACITIES = (1152, 320, 640)
MIB = 2**20

# What the ranks run


class Mixture(Sequence):
    """Conversations, some of them three times as long, and stretches that are text alone."""

    def __init__(self, conversations):
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict:
        rng = random.Random(index)
        picked = [self.conversations[index] for _ in range(rng.choice((1, 1, 1, 1, 3)))]
        ids = torch.cat([one["input_ids"] for one in picked])
        labels = torch.cat([one["labels"] for one in picked])
        if index // 64 % 3 == 0:
            is_text = ids != train_llava.tiny.IMAGE_TOKEN_ID
            return {"input_ids": ids[is_text], "labels": labels[is_text]}
        return {
            "input_ids": ids,
            "labels": labels,
            "images": torch.cat([one["images"] for one in picked]),
            "num_image_tiles": [n for one in picked for n in one["num_image_tiles"]],
        }


class WorkersLoader(train_llava.RowLoader):
    """Rows of the mixture, made in worker processes: each buffer has some of its own."""

    def __init__(self, samples, packer):
        self.rank = parallel_state.get_data_parallel_rank()
        super().__init__(Mixture(samples), packer)

    def take(self, count: int, rank: int, size: int) -> list:
        if self.state["rows_taken"] == len(self.rows):
            first = self.state["first_sample"] + BUFFER
            self.load_state_dict({"first_sample": first, "rows_taken": 0})
        self.state["rows_taken"] += count
        return [next(self.coming) for _ in range(count // size)]

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)
        self.rows = rows_of(self.samples, self.packer, state["first_sample"])
        mine = range(state["rows_taken"] + self.rank, len(self.rows), RANKS)
        self.coming = iter(
            DataLoader(Subset(self.rows, mine), batch_size=None, num_workers=WORKERS)
        )


def rows_of(samples, packer, first: int):
    """The rows of a buffer, as many as its steps take."""
    packer = dataclasses.replace(
        packer,
        capacity=CAPACITIES[first // BUFFER % len(CAPACITIES)],
        num_rows_multiple=ROWS_PER_STEP,
        on_refused="raise",
    )
    rows, _ = packer.pack([samples[index] for index in range(first, first + BUFFER)])
    return rows


def train() -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    train_llava.RowLoader = WorkersLoader
    return train_llava.main()


# What watches them


class Job:
    """One run: its processes, and what was seen of them."""

    def __init__(self, folder: Path, began: float):
        self.folder, self.began = folder, began
        self.kills, self.seen, self.is_hit = [], [], False
        folder.mkdir(parents=True)
        self.start()

    def start(self, *options: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(RANKS), __file__, "--output", str(self.folder)]
        command += ["--steps", "100000", "--rows-per-step", str(ROWS_PER_STEP)]
        command += ["--evaluate-every", "100", "--save-every", "40", *options]
        with open(self.folder / "said", "a") as said:
            self.process = subprocess.Popen(
                command,
                stdout=said,
                stderr=said,
                start_new_session=True,
                # oneDNN keeps 1,024 primitives, one for each shape it meets: that is no leak.
                env={**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"},
            )

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def ranks(self) -> list[int]:
        return children(self.process.pid)

    def workers(self) -> list[int]:
        return [worker for rank in self.ranks() for worker in children(rank)]

    def look(self) -> None:
        """What every process has of memory and of descriptors."""
        for kind, pids in (("rank", self.ranks()), ("worker", self.workers())):
            for place, pid in enumerate(pids):
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    number = len(os.listdir(f"/proc/{pid}/fd"))
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it has ended since
                rss = pages * os.sysconf("SC_PAGE_SIZE") / MIB
                self.seen.append((self.minutes, kind, place, pid, rss, number))

    def kill(self, kind: str) -> None:
        """Kill a rank or a worker, as the kernel does where memory runs out."""
        victims = self.ranks() if kind == "rank" else self.workers()
        if victims:
            now = {"minute": self.minutes, "step": len(self.log())}
            self.kills.append({"what": kind, "ended_the_run": False, **now})
            os.kill(random.choice(victims), signal.SIGKILL)
            self.is_hit = True

    def go_on(self) -> None:
        """Go on from the last checkpoint where a kill has ended the run. A worker's need not: its
        rows may all be taken."""
        if self.process.poll() is None:
            return
        self.end()
        if not self.is_hit:
            raise SystemExit(f"{self.folder.name} ended: see {self.folder}/said")
        self.is_hit = False
        self.kills[-1]["ended_the_run"] = True
        self.start("--resume")

    def end(self) -> None:
        """End what is left of the run's processes."""
        self.process.terminate()
        self.process.wait(timeout=120)
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            try:
                if os.getsid(pid) == self.process.pid:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def log(self) -> list[dict]:
        path = self.folder / "hook/log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


def children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in found.split()]


def watch(minutes: float, every: float, folder: Path) -> dict[str, Job]:
    began = time.monotonic()
    jobs = {name: Job(folder / name, began) for name in ("killed", "alone")}
    victims, last = 0, 0.0
    try:
        while jobs["killed"].minutes < minutes:
            time.sleep(3)
            for job in jobs.values():
                job.look()
                job.go_on()
            save(jobs, folder)
            job = jobs["killed"]
            if job.minutes - last > every and len(job.log()) > 50 and job.workers():
                last, victims = job.minutes, victims + 1
                job.kill("worker" if victims % 3 == 0 else "rank")
    finally:
        for job in jobs.values():
            job.end()
    return jobs


# What was seen


def save(jobs: dict[str, Job], folder: Path) -> None:
    seen = {name: {"kills": job.kills, "seen": job.seen} for name, job in jobs.items()}
    (folder / "seen.json").write_text(json.dumps(seen))


def report(jobs: dict[str, Job]) -> dict:
    killed, alone = jobs["killed"].log(), jobs["alone"].log()
    pairs = [(a["loss"], b["loss"]) for a, b in zip(killed, alone, strict=False)]
    found = {
        "minutes": jobs["alone"].minutes,
        "kills": jobs["killed"].kills,
        "steps": {"killed": len(killed), "alone": len(alone)},
        "steps_compared": len(pairs),
        "losses_that_differ": sum(a != b for a, b in pairs),
        "loss": {"first": killed[0]["loss"], "last": pairs[-1][0]},
        "evaluations": sum("accuracy" in entry for entry in killed[: len(pairs)]),
        "evaluations_that_differ": sum(
            a.get("accuracy") != b.get("accuracy") for a, b in zip(killed, alone, strict=False)
        ),
        "rows": composition(),
    }
    for name, job in jobs.items():
        found[name] = {
            "most_descriptors": max(one[-1] for one in job.seen),
            "mib_of_workers": max(one[4] for one in job.seen if one[1] == "worker"),
        }
    ranks = [one for one in jobs["alone"].seen if one[1] == "rank"]
    end = ranks[-1][0]
    parts = {"from 10 to 20 %": (0.1, 0.2), "from 45 to 55 %": (0.45, 0.55), "last 10 %": (0.9, 1)}
    found["alone"]["mib_of_ranks"] = {
        part: statistics.median(one[4] for one in ranks if a * end <= one[0] <= b * end)
        for part, (a, b) in parts.items()
    }
    return found


def composition() -> dict:
    """Of the first rows: how many are text alone, and how long they are."""
    spec = mp.RowSpec(img_seq_len=4, image_token_id=train_llava.tiny.IMAGE_TOKEN_ID)
    packer = mp.data.get_packer("first_fit", spec, CAPACITIES[0])
    samples = Mixture(train_llava.shapes.Conversations(sys.maxsize))
    rows = [row for at in range(6) for row in rows_of(samples, packer, at * BUFFER)]
    lengths = [row.layout.num_expanded for row in rows]
    return {
        "looked_at": len(rows),
        "text_alone": sum(row.num_image_tiles.numel() == 0 for row in rows),
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def draw(jobs: dict[str, Job], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, descriptors) = pyplot.subplots(
        2, 1, figsize=(9, 5.4), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    for (name, job), colour in zip(jobs.items(), ("tab:red", "tab:blue"), strict=True):
        for place in range(RANKS):
            seen = [one for one in job.seen if one[1] == "rank" and one[2] == place]
            by_life: dict[int, list] = {}
            for one in seen:
                by_life.setdefault(one[3], []).append(one)
            for life, points in enumerate(by_life.values()):
                said = f"rank {place}, {name}" if life == 0 else None
                style = {"color": colour, "ls": "-" if place == 0 else "--", "lw": 1.2}
                minutes = [one[0] for one in points]
                memory.plot(minutes, [one[4] for one in points], label=said, **style)
                descriptors.plot(minutes, [one[5] for one in points], **style)
    for at, kill in enumerate(jobs["killed"].kills):
        for axes in (memory, descriptors):
            said = "a kill" if at == 0 and axes is memory else None
            axes.axvline(kill["minute"], color="0.6", lw=0.8, ls=":", label=said)
    descriptors.axhline(DESCRIPTORS, color="k", lw=0.8)
    descriptors.text(0, DESCRIPTORS - 6, "the limit", va="top", fontsize=8)
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(bottom=0)
    memory.legend(ncols=3, fontsize=8, loc="lower right")
    descriptors.set_ylabel("descriptors")
    descriptors.set_ylim(0, DESCRIPTORS * 1.08)
    descriptors.set_xlabel("minutes")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kill-every", type=float, default=6, metavar="MINUTES")
    parser.add_argument("--output", type=Path, default=Path("out/long_run"))
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    jobs = watch(args.minutes, args.kill_every, args.output)
    found = report(jobs)
    (args.output / "long_run.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(jobs, args.output / "long_run.png")
    print(json.dumps(found, indent=1))
    return 1 if found["losses_that_differ"] else 0


if __name__ == "__main__":
    raise SystemExit(train() if "RANK" in os.environ else main())
