"""Real models in real processes: context, tensor, sequence, pipeline parallelism against one.

Of two micro-batches the first brings its layout along, as one tensor through the data path; the
second has Energon's expanded boundaries, and is laid out in the model. Nobody looks at a value but
as on a GPU, where that would cost: what the hook reads and launches is counted.

Without arguments of torchrun it is the reference; ``parallel_parity.sh`` starts it for every case.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

import mcore_packing as mp
from mcore_packing import cpu, layout, ops, parity
from mcore_packing.megatron import call, hook, params
from mcore_packing.testing import tiny
from mcore_packing.testing.host_reads import HostReads

SIZE = 28  # pixels: 5 positions a tile
LONGEST = 512  # positions of the language model, and of every row under pipeline parallelism
CAPACITY = 8  # sequences that a stage without tokens has room for
LAYERS = 4


def build(positions: str, sequence_parallel: bool):
    """This rank's part of the model."""
    return tiny.llava_stage(
        positions,
        img_size=SIZE,
        max_sequence_length=LONGEST,
        language_layers=LAYERS,
        per_token_loss=True,
        sequence_parallel=sequence_parallel,
    )


def load(model, state: dict) -> dict:
    """Copy this rank's share of the reference weights; return each parameter's name there."""
    names = {name: tiny.name_in_whole(model, name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(share(parameter, state[names[name]]))
    return names


def share(parameter, full):
    """This tensor-parallel rank's part of a full tensor."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return full.chunk(size, dim=parameter.partition_dim)[rank]


def rows(model):
    """Two micro-batches of packed rows, with what the data path sends of them to every stage."""
    first, second = (parity.collate(tiny.samples(n, img_size=SIZE, seed=n)) for n in (4, 3))
    tiles = second["num_image_tiles"] * model.img_seq_len
    second["cu_seqlens"] = mp.remap_cu_seqlens(
        second["cu_seqlens"], second["input_ids"], tiles, tiny.IMAGE_TOKEN_ID
    )
    second["space"] = "expanded"
    second["max_seqlen"] = int(second["cu_seqlens"].diff().max())
    for row in (first, second):
        row["layout"] = mp.PackedLayout.build(
            row["input_ids"],
            row["cu_seqlens"],
            row["num_image_tiles"] * model.img_seq_len,
            mp.row_spec(model),
            space=row["space"],
        )
        size = mp.PackedLayout.tensor_size(CAPACITY)
        row["boundaries"] = row["layout"].to_tensor(size, boundaries_only=True)
    whole, cp_size = first["layout"], parallel_state.get_context_parallel_world_size()
    if cp_size > 1:  # as mp.data.pack makes them
        whole = whole.with_shares(mp.vision.shares(whole, first["num_image_tiles"], cp_size))
    received = mp.PackedLayout.from_tensor(whole.to_tensor())
    first["packed_seq_params"] = mp.packed_seq_params(received)
    return first, second


def forward_step(iterator, model):
    """Megatron's forward step: what each stage hands its model, and the loss."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    row = next(iterator)
    if first or last:
        images = row["images"] if first else None
        output, mask = parity.forward(model, {**row, "images": images})
    else:  # no tokens here: the boundaries that the data path computed
        nothing = dict.fromkeys(("images", "input_ids", "position_ids", "attention_mask"))
        received = mp.PackedLayout.from_tensor(row["boundaries"])
        output, mask = model(**nothing, packed_seq_params=mp.packed_seq_params(received))

    def loss_function(output):
        loss = (output * mask).sum()
        return loss, mask.sum().int(), {"loss": loss.detach().clone()}

    return output, loss_function


class Spy:
    """What the hook did for each micro-batch: values read, layouts launched; and whether the
    language model got the exact length of the longest sequence."""

    def __init__(self, model):
        self.reads, self.launches, self.exact = [], [], []
        model.language_model.register_forward_pre_hook(self.see_lengths, with_kwargs=True)

    def see_lengths(self, module, args, kwargs):
        params = kwargs["packed_seq_params"]
        longest = int(params.cu_seqlens_q_padded.diff().max())
        self.exact.append(params.max_seqlen_q == params.max_seqlen_kv == longest)

    @contextlib.contextmanager
    def watching(self):
        """As on a GPU, where looking at a value would cost."""
        begin, build = call.packed_call, ops.layout

        def watched(*args):
            self.launches.append(0)
            with HostReads() as reads:
                packed = begin(*args)
            self.reads.append(len(reads.found))
            return packed

        def launched(*args):
            self.launches[-1] += 1
            return build(*args)

        with contextlib.ExitStack() as stack:
            for room in (layout, params):
                stack.enter_context(patch.object(room, "may_look", lambda tensor: False))
            stack.enter_context(patch.object(hook, "packed_call", watched))
            stack.enter_context(patch.object(ops, "layout", launched))
            yield


def run(model, vision_dp_over_cp: bool = False):
    """Loss of every micro-batch, the summed gradients, by Megatron's own schedule; and the spy."""
    options = {"vision_dp_over_cp": vision_dp_over_cp, "compare_ranks": False}
    with mp.install(model, **options):  # comparing is what the first row alone would pay for
        batches = rows(model)
        spy = Spy(model)
        with spy.watching():
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=[model],
                num_microbatches=len(batches),
                seq_length=LONGEST,
                micro_batch_size=1,
                forward_only=False,
            )
    reduce_gradients(model)
    total = torch.tensor([loss["loss"] for loss in losses] or [0.0] * len(batches))
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total, gradients, spy


def reduce_gradients(model):
    """What Megatron's DDP and finalize_model_grads do, for plain gradients."""
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if getattr(parameter, "sequence_parallel", False):
            group = parallel_state.get_tensor_model_parallel_group()
            dist.all_reduce(parameter.grad, group=group)
        dist.all_reduce(parameter.grad, group=parallel_state.get_context_parallel_group())


def one_by_one(model):
    """The same, every sample by itself and unpacked."""
    losses = []
    for count in (4, 3):
        total = 0.0
        for sample in tiny.samples(count, img_size=SIZE, seed=count):
            loss, mask = parity.forward(model, {**parity.collate([sample]), "cu_seqlens": None})
            (loss * mask).sum().backward()
            total += (loss * mask).sum().item()
        losses.append(total)
    return torch.tensor(losses), {n: p.grad for n, p in model.named_parameters()}


def observed(spies: list[Spy]) -> dict:
    """The most that any stage and rank read and launched for each micro-batch."""
    return {
        "reads": [max(counts) for counts in zip(*(spy.reads for spy in spies), strict=True)],
        "launches": [max(counts) for counts in zip(*(spy.launches for spy in spies), strict=True)],
        "exact_max_seqlen": all(all(spy.exact) for spy in spies),
    }


def relative(found, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


def make_reference(path: Path, positions: str) -> dict:
    """One process: weights, losses and gradients of the packed run; and it equals one by one."""
    with cpu.megatron_on_cpu():
        model = build(positions, False)
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses, gradients, spy = run(model)
        alone_losses, alone = one_by_one(build(positions, False))
    torch.save({"state": state, "losses": losses, "gradients": gradients}, path)
    return {
        "case": "one process, packed",
        "against": "one by one",
        "positions": positions,
        "loss": relative(losses, alone_losses),
        "gradient": max(relative(gradients[name], alone[name]) for name in gradients),
        "parameters": len(gradients),
        **observed([spy]),
    }


def compare(path: Path, options) -> dict:
    """This process's part of a parallel run against the reference; the worst over all of them."""
    reference = torch.load(path)
    dist.init_process_group("gloo")
    sizes = {
        "context_parallel_size": options.cp,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
    }
    with cpu.megatron_on_cpu(**sizes):
        model = build(options.positions, options.sp)
        names = load(model, reference["state"])
        losses, gradients, spy = run(model, options.vision_dp_over_cp)
        loss = 0.0
        if parallel_state.is_pipeline_last_stage():
            loss = relative(losses, reference["losses"])
        parameters = dict(model.named_parameters())
        errors = {
            names[name]: relative(
                gradient, share(parameters[name], reference["gradients"][names[name]])
            )
            for name, gradient in gradients.items()
        }
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (loss, errors, spy))
    dist.barrier()
    dist.destroy_process_group()  # else gloo's threads can abort the interpreter's exit
    worst = max((error, name) for _, mine, _ in found for name, error in mine.items())
    name = [f"cp {options.cp}"] * (options.cp > 1) + [f"tp {options.tp}"] * (options.tp > 1)
    name += ["sequence parallel"] * options.sp + [f"pp {options.pp}"] * (options.pp > 1)
    name += ["shared tower"] * options.vision_dp_over_cp
    return {
        "case": ", ".join(name),
        "against": "one process, packed",
        "positions": options.positions,
        "loss": max(loss for loss, _, _ in found),
        "gradient": worst[0],
        "parameters": len({name for _, mine, _ in found for name in mine}),
        **observed([spy for _, _, spy in found]),
        "worst": worst[1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="file of the reference run")
    parser.add_argument("--positions", default="rope", choices=["rope", "learned_absolute"])
    for size in ("cp", "tp", "pp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    parser.add_argument("--vision-dp-over-cp", action="store_true", help="share the vision tower")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parallel = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if parallel:
        result = compare(options.reference, options)
    else:
        result = make_reference(options.reference, options.positions)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result), flush=True)
    passed = result["loss"] <= options.tolerance and result["gradient"] <= options.tolerance
    passed &= result["exact_max_seqlen"] and result["reads"] == [0, 0]
    passed &= result["launches"][0] == 0
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
