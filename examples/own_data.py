"""A LLaVAModel of your own on samples of your own: copy this file, and change what is yours.

    python examples/own_data.py
    torchrun --nproc-per-node 2 examples/own_data.py --cp 2
    python examples/own_data.py --epochs 4 --resume      (goes on, in the middle of an epoch too)

It runs on a CPU in half a minute. docs/your-model.md goes through it, and says what a GPU changes.
"""

import argparse
import contextlib
import json
import random
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import distributed, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.data import DataLoader, Dataset

import mcore_packing as mp

wandb = SummaryWriter = None  # where they are not installed
with contextlib.suppress(ImportError):
    import wandb
with contextlib.suppress(ImportError):
    from torch.utils.tensorboard import SummaryWriter

IMAGE, ASK, ANSWER, END, WHICH, COLOUR = -200, 1, 2, 3, 4, 8  # tokens; those behind them count on
COLOURS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
SIZE, VOCAB, LONGEST = 28, 16, 256
MICRO_BATCHES, SAVE_EVERY = 2, 10  # rows that a replica takes for one step; steps


class Pictures(Dataset):
    """Yours: one to three pictures of one colour each. Which colour has the second one?"""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        rng = random.Random(f"{self.seed}-{index}")
        colours = [rng.randrange(len(COLOURS)) for _ in range(rng.randint(1, 3))]
        which = rng.randrange(len(colours))
        prompt = [IMAGE] * len(colours) + [ASK, WHICH + which, ANSWER]  # one placeholder a picture
        answer = [COLOUR + colours[which], END]
        return {
            "input_ids": torch.tensor(prompt + answer),
            "labels": torch.tensor([-100] * len(prompt) + answer),  # not shifted: pack does that
            "images": COLOURS[colours, :, None, None].expand(-1, 3, SIZE, SIZE),
            "__key__": f"{self.seed}-{index}",  # names it in reports
        }


def build_model(cp_size: int) -> LLaVAModel:
    """Yours."""
    torch.manual_seed(0)
    config = partial(
        TransformerConfig, num_layers=2, hidden_size=64, num_attention_heads=4,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    language = config(context_parallel_size=cp_size, calculate_per_token_loss=True)
    vision, projector = config(), config()
    language.language_model_type, vision.vision_model_type = "mine", "clip"
    layer, vision_layer = mp.cpu.layer_spec(), mp.cpu.layer_spec()  # with PackedAttention
    vision_layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    model = LLaVAModel(
        language, layer, VOCAB, LONGEST, vision, vision_layer, True, projector, mlp, img_h=SIZE,
        img_w=SIZE, patch_dim=14, image_token_index=IMAGE, language_position_embedding_type="rope",
    )  # fmt: skip
    model.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
    return model


def loader_of(rows, epoch: int = 0, first_step: int = 0) -> DataLoader:
    """This replica's rows of an epoch, shuffled, from a step on: one order for all its ranks."""
    order, group = [*range(len(rows))], parallel_state.get_data_parallel_group()
    random.Random(epoch).shuffle(order)
    mine = order[group.rank() :: group.size()][first_step * MICRO_BATCHES :]
    return DataLoader(rows, batch_size=None, sampler=mine, num_workers=2)


def forward_step(iterator, model):
    """As Megatron's schedules take it. The loss has the positions of this context-parallel rank."""
    row = next(iterator)
    loss, _ = model(**row.inputs())
    cp_rank = parallel_state.get_context_parallel_rank()
    return loss, partial(mp.data.loss_func, row=row, cp_rank=cp_rank)


def mean_loss(model, iterator, num_rows: int, forward_only: bool = False) -> float:
    """Of so many rows of every replica, over all ranks; with gradients, unless forward only."""
    found = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iterator, model=[model], seq_length=LONGEST,
        micro_batch_size=1, num_microbatches=num_rows, forward_only=forward_only,
    )  # fmt: skip
    total = torch.stack([one["lm loss"] for one in found]).sum(0)  # of losses; of trained tokens
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return (total[0] / total[1]).item()


class Log:
    """Of rank 0: lines of JSON, and wandb and TensorBoard where they are installed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run = wandb and wandb.init(project="own_data", dir=folder, mode="offline")
        self.board = SummaryWriter and SummaryWriter(folder)

    def __call__(self, step: int, name: str, found) -> None:
        """Log a number, or the figures of a report."""
        print(f"step {step}, {name}: {found}", flush=True)
        figures = {name: found} if isinstance(found, float) else found.to_dict()
        with open(self.folder / "log.jsonl", "a") as file:
            print(json.dumps({"step": step, "name": name, **figures}), file=file)
        numbers = {key: x for key, x in figures.items() if isinstance(x, int | float)}
        if self.run:
            self.run.log(numbers, step=step)
        for key, number in numbers.items() if self.board else ():
            self.board.add_scalar(key, number, step)


def train(options) -> None:
    model = build_model(options.cp)
    mp.install(model)
    settings = distributed.DistributedDataParallelConfig()
    ddp = distributed.DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = distributed.finalize_model_grads
    adam = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=0.0)  # Megatron clips on GPUs only
    optimizer = get_megatron_optimizer(adam, [ddp])

    a_step = MICRO_BATCHES * parallel_state.get_data_parallel_world_size()  # in rows
    packer = mp.data.get_packer("first_fit_shuffle", mp.row_spec(model), num_rows_multiple=a_step)
    rows, report = packer.pack(Pictures(1000, seed=0))
    held_out, _ = packer.pack(Pictures(100, seed=1))
    options.output.mkdir(parents=True, exist_ok=True)
    log = Log(options.output) if dist.get_rank() == 0 else lambda *figure: None
    log(0, "packing", report)
    for check in (mp.parity.isolation, mp.parity.verify):  # on every rank; ddp as the job has it
        found = check(ddp, rows[parallel_state.get_data_parallel_rank()])
        log(0, check.__name__, found)
        if found.verdict == "wrong":
            raise SystemExit(1)

    step, checkpoint = 0, options.output / "checkpoint.pt"
    if options.resume:
        state = torch.load(checkpoint, weights_only=True)
        ddp.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]  # that was trained: workers have read more
    steps = len(rows) // a_step  # of an epoch

    for epoch in range(step // steps, options.epochs):
        batches = iter(loader_of(rows, epoch, first_step=step % steps))
        while step < (epoch + 1) * steps:
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            loss = mean_loss(ddp, batches, MICRO_BATCHES)
            optimizer.step()
            step += 1
            log(step, "loss", loss)
            if step % SAVE_EVERY == 0 and dist.get_rank() == 0:
                state = {"model": ddp.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step}, options.output / "unfinished")
                (options.output / "unfinished").replace(checkpoint)
        ddp.eval()
        with torch.no_grad():
            loader = loader_of(held_out)
            loss = mean_loss(ddp, iter(loader), len(loader), forward_only=True)
        ddp.train()
        log(step, "held_out_loss", loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cp", type=int, default=1, help="context-parallel size, under torchrun")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --output")
    parser.add_argument("--output", type=Path, default=Path("out/own_data"))
    torch.set_num_threads(1)
    options = parser.parse_args()
    with mp.cpu.megatron_on_cpu(context_parallel_size=options.cp):
        train(options)


if __name__ == "__main__":
    main()
