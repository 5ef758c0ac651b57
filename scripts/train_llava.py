"""LLaVA fine-tuning on packed rows with Megatron-Core's schedules, DDP, optimizer and checkpoints.

A small model learns to answer questions about coloured shapes, on a CPU in a minute, on a GPU with
Transformer Engine in bf16 where there is one; in one process, or under torchrun in many. Each step
trains on the same samples however they are packed, so that runs can be laid over each other.
"""

import argparse
import dataclasses
import logging
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import bench
import torch
import torch.distributed as dist
from checkpoints import RunFolder, on_rank_0
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn.utils.rnn import pad_sequence

import mcore_packing as mp
from mcore_packing.cli import Parser
from mcore_packing.data import Packer, Row
from mcore_packing.reference import IGNORE_INDEX
from mcore_packing.testing import shapes, tiny

PACKINGS = ("hook", "dropped", "one-by-one", "padded")
BUFFER = 1000  # samples that are packed together
HELD_OUT = 200  # conversations that are graded and never trained on
LEARNING_RATE, WARM_UP, CLIP = 3e-3, 20, 1.0


class RowLoader:
    """Packed rows of an endless data set: one global list, the same on every rank.

    Samples are packed a buffer at a time. Its state is how far it came: the buffer is packed again
    from there, with the same result.
    """

    def __init__(self, samples, packer: Packer):
        self.samples, self.packer = samples, packer
        self.load_state_dict({"first_sample": 0, "rows_taken": 0})

    def take(self, count: int, rank: int, size: int) -> list[Row]:
        """This rank's share of the next ``count`` rows."""
        taken = []
        for index in range(count):
            if self.state["rows_taken"] == len(self.rows):
                first = self.state["first_sample"] + BUFFER
                self.load_state_dict({"first_sample": first, "rows_taken": 0})
            if index % size == rank:
                taken.append(self.rows[self.state["rows_taken"]])
            self.state["rows_taken"] += 1
        return taken

    def state_dict(self) -> dict:
        return dict(self.state)

    def load_state_dict(self, state: dict) -> None:
        self.state = dict(state)
        buffer = range(state["first_sample"], state["first_sample"] + BUFFER)
        self.rows, report = self.packer.pack([self.samples[index] for index in buffer])
        if report.refused:
            say(str(report))
        if not self.rows:
            raise mp.PackingError(
                f"no sample fits into a row of {self.packer.capacity} positions: raise --row-length"
            )


def micro_batches(packing: str, row: Row, packer: Packer) -> list[dict]:
    """The samples of a row as a user without this package would feed them, or with it."""
    if packing == "hook":
        return [row.inputs()]
    if packing == "dropped":
        return [without_boundaries(row)]
    alone = [without_boundaries(packer.join([sample])) for sample in mp.data.split(row)]
    return alone if packing == "one-by-one" else [padded(alone)]


def without_boundaries(row: Row) -> dict:
    """The row as one sequence."""
    positions = torch.arange(row.input_ids.numel(), device=row.input_ids.device)[None]
    return {**row.inputs(), "packed_seq_params": None, "position_ids": positions}


def padded(samples: list[dict]) -> dict:
    """One batch ``[B, longest]``."""
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "loss_mask": 0.0}
    batch = {
        name: pad_sequence([sample[name][0] for sample in samples], True, value)
        for name, value in fill.items()
    }
    length = batch["input_ids"].shape[1]
    positions = torch.arange(length, device=batch["input_ids"].device).expand(len(samples), -1)
    together = {
        name: torch.cat([sample[name] for sample in samples])
        for name in ("images", "num_image_tiles")
    }
    return {**samples[0], **batch, **together, "position_ids": positions}


def train_step(iterator, model):
    """Megatron's forward step: what this stage computes, and the summed loss of its tokens."""
    output, mask = mp.parity.run_stage(model, next(iterator))

    def loss_function(output):
        loss, num_tokens = (output.float() * mask).sum(), mask.sum()
        return loss, num_tokens.int(), torch.stack([loss.detach(), num_tokens])

    return output, loss_function


def grade_step(iterator, model):
    """The same for grading: how many of the labels are the likeliest token."""
    row = next(iterator)
    logits, _ = mp.parity.run_stage(
        model, {**row.inputs(), "labels": None, "runtime_gather_output": True}
    )

    def grade(logits, non_loss_data=True):
        labels, mask = mp.expand_labels(
            row.layout,
            row.labels,
            row.loss_mask,
            cp_size=parallel_state.get_context_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
        )
        right = (logits[0].argmax(-1) == labels) * mask
        return torch.stack([right.sum(), mask.sum()])

    return logits, grade


class Training:
    """One run: its model, its rows, and how far it came."""

    def __init__(self, options, packing: str):
        self.options, self.packing, self.step = options, packing, 0
        self.folder = RunFolder(options.output / packing)
        self.model = build_model(options)
        # The other packings show what happens without boundaries.
        on_missing = "raise" if packing == "hook" else "pass"
        mp.install(self.model, on_missing=on_missing, vision_dp_over_cp=options.vision_dp_over_cp)
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.num_rows = options.rows_per_step or self.dp_size
        if self.num_rows % self.dp_size:
            raise mp.PackingError(
                f"--rows-per-step is {self.num_rows}, expected a multiple of the {self.dp_size} "
                f"data-parallel ranks"
            )
        self.packer = make_packer(self.model, options)
        self.loader = RowLoader(self.conversations(sys.maxsize), self.packer)
        self.optimizer, self.scheduler = build_optimizer(self.model, options.steps)
        held_out = self.conversations(HELD_OUT, seed=1, train_on="colours")
        rows, _ = self.packer.pack(held_out)
        self.held_out = [
            rows[i].to(tiny.DEVICE, tiny.DTYPE)
            for i in range(self.dp_rank, len(rows), self.dp_size)
        ]

    def conversations(self, count: int, **settings) -> shapes.Conversations:
        return shapes.Conversations(count, most_images=self.options.images, **settings)

    def run(self) -> list[dict]:
        """Train to the last step, from the last checkpoint if asked to; the log."""
        log = self.resume() if self.options.resume else []
        if self.is_logger:
            self.folder.begin_log(log)
        options, first, last = self.options, self.step, self.options.steps
        while self.step < last:
            rows = self.loader.take(self.num_rows, self.dp_rank, self.dp_size)
            rows = [row.to(tiny.DEVICE, tiny.DTYPE) for row in rows]
            every = options.verify_packing
            if every and (self.step == first or self.step % every == 0):
                self.verify(rows[0])
            batches = [
                batch for row in rows for batch in micro_batches(self.packing, row, self.packer)
            ]
            begin = time.perf_counter()
            sums = self.train(batches)
            seconds = time.perf_counter() - begin
            self.step += 1
            entry = {"step": self.step, **self.describe(rows, sums), "seconds": seconds}
            if self.step % options.evaluate_every == 0 or self.step == last:
                entry["accuracy"] = self.evaluate()
            self.report(entry)
            log.append(entry)
            if self.step % options.save_every == 0 or self.step == last:
                self.folder.checkpoints.save(self.step, self.state())
        return log

    def train(self, batches: list[dict]) -> torch.Tensor:
        """One optimizer step; the summed loss and the number of trained tokens."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.schedule(train_step, batches)
        self.update()
        self.scheduler.step(1)
        return sums

    def describe(self, rows: list[Row], sums: torch.Tensor) -> dict:
        """The loss of a step, and what its rows held on all replicas."""
        num_samples = sum(len(row.indices) for row in rows)
        num_filled = sum(int(row.layout.cu_seqlens_expanded[-1]) for row in rows)
        counts = torch.tensor([num_samples, num_filled], device=tiny.DEVICE)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        num_samples, num_filled = counts.tolist()
        loss, num_tokens = sums.tolist()
        return {
            "loss": loss / max(num_tokens, 1),
            "samples": num_samples,
            "filled": num_filled / (self.num_rows * self.packer.capacity),
        }

    def evaluate(self) -> float:
        """The share of held-out questions that are answered right."""
        self.model.eval()
        right, asked = self.schedule(grade_step, self.held_out, forward_only=True).tolist()
        self.model.train()
        return right / max(asked, 1)

    def schedule(self, step, batches: list, forward_only: bool = False) -> torch.Tensor:
        """Run micro-batches through the pipeline; what the last stage counted, of all ranks."""
        with torch.set_grad_enabled(not forward_only):
            counted = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(batches),
                model=[self.model],
                num_microbatches=len(batches),
                seq_length=self.options.row_length,
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )
        sums = torch.zeros(2, device=tiny.DEVICE)
        for counts in counted:
            sums += counts
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(True))
        return sums

    def update(self) -> None:
        """The optimizer's step. On a CPU its clipping is done here: Megatron's insists on CUDA."""
        if tiny.HAVE_GPU:
            self.optimizer.step()
            return
        self.optimizer.prepare_grads()
        norm = self.optimizer.get_grad_norm()
        for parameter in self.optimizer.get_parameters():
            parameter.grad.mul_(min(1.0, CLIP / (norm + 1e-6)))
        self.optimizer.step_with_ready_grads()

    def verify(self, row: Row) -> None:
        """Stop where a check says wrong; where it could not have told, its line is the warning."""
        for check in (mp.parity.isolation, mp.parity.verify):
            found = check(self.model, row)
            if self.is_logger:
                say(f"step {self.step:5}  {found}")
            if found.verdict == "wrong":
                raise SystemExit(1)

    # What is said

    @property
    def is_logger(self) -> bool:
        """The last rank has the loss."""
        return dist.get_rank() == dist.get_world_size() - 1

    def report(self, entry: dict) -> None:
        if not self.is_logger:
            return
        self.folder.log_entry(entry)
        if "accuracy" in entry or entry["step"] == 1:
            accuracy = f"  accuracy {entry['accuracy']:.3f}" if "accuracy" in entry else ""
            say(
                f"{self.packing:10}  step {entry['step']:5}  loss {entry['loss']:.4f}  "
                f"{entry['samples'] / entry['seconds']:6.1f} samples/s  "
                f"rows filled {entry['filled']:.1%}{accuracy}"
            )

    # Checkpoints

    @property
    def settings(self) -> dict:
        """What has to be the same for a run to go on as it began; parallel sizes need not be."""
        return {
            "packing": self.packing,
            "steps": self.options.steps,
            "images": self.options.images,
            "row_length": self.options.row_length,
            "rows_per_step": self.num_rows,
            "seq_multiple": self.packer.spec.seq_multiple,
            "seed": self.options.seed,
        }

    def state(self, is_loading: bool = False) -> dict:
        """Each tensor with its place in the whole model; the rest is the same on all ranks."""
        model = self.model.module.sharded_state_dict()  # under the names it has without DDP
        return {
            "settings": self.settings,
            "step": self.step,
            "loader": self.loader.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading),
        }

    def resume(self) -> list[dict]:
        """Go on from the newest checkpoint that is whole; the log until there."""
        folder, checkpoints = self.folder.path, self.folder.checkpoints
        step = checkpoints.newest(say)
        if step is None:
            if self.is_logger:
                say(f"nothing to resume in {folder}: starting from the first step")
            return []
        saved = checkpoints.common(step)["settings"]
        for name, value in self.settings.items():
            if saved.get(name) != value:
                raise mp.PackingError(
                    f"the run in {folder} has {name} {saved.get(name)}, not {value}; "
                    f"resume it with the same settings, or choose another --output"
                )
        log = on_rank_0(lambda: self.folder.read_log(step))
        state = checkpoints.load(step, self.state(is_loading=True))
        self.step = state["step"]
        self.model.module.load_state_dict(state["model"])
        for name in ("loader", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        if self.is_logger:
            say(f"{self.packing}: going on from step {self.step}")
        return log


def make_room(options) -> None:
    """The folder of each run. One that holds a run already is resumed, emptied or refused."""
    folders = [RunFolder(options.output / packing) for packing in options.packing]
    for folder in folders:
        if folder.holds_a_run and not (options.resume or options.overwrite):
            raise mp.PackingError(
                f"{folder.path} holds a run: go on with it (--resume), delete it (--overwrite), "
                f"or choose another --output"
            )
    for folder in folders:
        folder.make(empty=options.overwrite)


def build_model(options) -> DistributedDataParallel:
    """This rank's part of a LLaVA of 250,000 parameters: 4 rows a tile."""
    model = tiny.llava_stage(
        "rope",
        img_size=2 * shapes.PATCH,
        language_layers=2,
        max_sequence_length=options.row_length,
        vocab_size=shapes.VOCAB_SIZE,
        per_token_loss=True,
        sequence_parallel=options.tp > 1,
        drop_vision_class_token=True,
        seed=options.seed,
    )
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    return ddp


def build_optimizer(model, steps: int):
    config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        clip_grad=CLIP if tiny.HAVE_GPU else 0.0,
        bf16=tiny.HAVE_GPU,
        params_dtype=tiny.DTYPE,
    )
    optimizer = get_megatron_optimizer(config, [model])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LEARNING_RATE,
        min_lr=0.0,
        lr_warmup_steps=min(WARM_UP, steps - 1),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def make_packer(model, options) -> Packer:
    spec = mp.row_spec(model)
    multiple = math.lcm(spec.seq_multiple, options.seq_multiple)
    spec = dataclasses.replace(spec, seq_multiple=multiple)
    # As they arrive: longest first would give the longest samples first.
    return mp.data.get_packer("first_fit", spec, options.row_length)


def say(line: str) -> None:
    print(line, flush=True)


def summary(logs: dict[str, list[dict]]) -> list[str]:
    lines = [f"\n{'packing':12} {'loss':>8} {'accuracy':>9} {'samples/s':>10}"]
    for packing, log in logs.items():
        speed = statistics.median(entry["samples"] / entry["seconds"] for entry in log)
        last = log[-1]
        lines.append(f"{packing:12} {last['loss']:8.4f} {last['accuracy']:9.3f} {speed:10.1f}")
    return lines


def at_least(least: int):
    """An argument that is a whole number, of 31 bits."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, not {text}")
        return int(text)

    return number


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a .png in a folder that there is, not {text}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--packing", nargs="+", choices=PACKINGS, default=["hook"], metavar="WAY",
        help=f"how samples reach the model: {', '.join(PACKINGS)}; several are compared",
    )  # fmt: skip
    add("--cp", type=at_least(1), default=1, help="context-parallel size, under torchrun")
    add("--tp", type=int, choices=(1, 2, 4), default=1, help="tensor- and sequence-parallel size")
    add("--pp", type=int, choices=(1, 2), default=1, help="pipeline-parallel size")
    add("--vision-dp-over-cp", action="store_true", help="share the vision tower over cp ranks")
    add("--steps", type=at_least(2), default=200)
    add("--images", type=int, choices=range(1, 5), default=4, help="of a conversation, at most")
    add("--row-length", type=at_least(1), default=1152, help="positions that a row may have")
    add("--rows-per-step", type=at_least(1), help="of all ranks together; by default one a replica")
    add("--seq-multiple", type=at_least(1), default=1, help="pad samples to a multiple of this")
    add("--evaluate-every", type=at_least(1), default=20, metavar="N")
    add("--save-every", type=at_least(1), default=50, metavar="N")
    add("--verify-packing", type=at_least(0), default=0, metavar="N",
        help="at the start and every N steps, check that samples of a row do not see each other, "
        "and are what they are alone",
    )  # fmt: skip
    add("--seed", type=at_least(0), default=0, help="of the weights")
    add("--output", type=bench.folder, default="out/train_llava", help="folder of the runs")
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--resume", action="store_true", help="go on with the run in --output")
    held.add_argument("--overwrite", action="store_true", help="delete the run in --output")
    add("--plot", type=picture, help="PNG of the curves; by default training.png in --output")
    options = parser.parse_args(arguments)
    if options.cp * options.tp * options.pp > 1 and options.packing != ["hook"]:
        parser.error("--cp, --tp and --pp need --packing hook: the others are not padded for them")
    if options.verify_packing and options.packing != ["hook"]:
        parser.error("--verify-packing needs --packing hook: the others do not run packed rows so")
    if len(set(options.packing)) < len(options.packing):
        parser.error("--packing names one way twice")
    processes, split = int(os.environ.get("WORLD_SIZE", 1)), options.cp * options.tp * options.pp
    if processes % split:
        parser.error(
            f"--cp, --tp and --pp ask for {split} processes or a multiple, there is {processes}: "
            f"start it with torchrun --nproc-per-node {split}"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the model is too small for more
    if "RANK" in os.environ:
        if tiny.HAVE_GPU:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if tiny.HAVE_GPU else "gloo")
    sizes = {
        "context_parallel_size": options.cp,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
    }
    try:
        with tiny.megatron(**sizes):
            logs, is_logger = {}, dist.get_rank() == dist.get_world_size() - 1
            on_rank_0(lambda: make_room(options))
            for packing in options.packing:
                logs[packing] = Training(options, packing).run()
    except mp.PackingError as error:
        print(f"train_llava: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # else gloo's threads can abort the interpreter's exit
    if is_logger:
        say("\n".join(summary(logs)))
        draw(logs, options.plot or options.output / "training.png")
    return 0


def draw(logs: dict[str, list[dict]], path: Path) -> None:
    try:
        from mcore_packing import plot
    except ImportError:
        say(f"{path.name} needs matplotlib: pip install matplotlib")
        return
    plot.draw_training(logs, path)
    say(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
