"""Runs of a model: on a row that a plain data path makes, on samples one by one, on a stage."""

import contextlib
import copy
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from ..data.rows import concatenate
from ..megatron.find import find_llava, hook_of
from ..megatron.hook import unpacked
from ..megatron.params import LaidOutParams


def collate(samples: Sequence[dict], image_token_id: int = -200) -> dict:
    """One collapsed row from samples, as a collate function makes it that knows no layouts.

    The tensors of ``mp.data.pack``, but position ids that run on over the whole row, and
    ``cu_seqlens`` with the ``space`` that those count.

    Args:
        samples: as ``mp.data.pack`` takes them.
        image_token_id: the placeholder of the model, which nothing is trained to predict.
    """
    row = concatenate(samples, image_token_id)
    lengths = torch.tensor([0] + [sample["input_ids"].numel() for sample in samples])
    ids = row["input_ids"]
    return {
        **row.pop("media"),
        **row,
        "position_ids": torch.arange(ids.numel(), device=ids.device)[None],
        "cu_seqlens": lengths.cumsum(0).int().to(ids.device),
        "space": "collapsed",
        "max_seqlen": int(lengths.max()),
    }


def forward(model, row: dict) -> tuple[Tensor, Tensor]:
    """Loss and expanded loss mask, ``[1, S]`` each, of a row that ``collate`` made.

    With ``cu_seqlens=None`` in the row it runs unpacked; ``packed_seq_params`` in the row go before
    its ``cu_seqlens``. The last pipeline stage has no images.
    """
    params, cu_seqlens = row.get("packed_seq_params"), row["cu_seqlens"]
    if params is None and cu_seqlens is not None:
        params = LaidOutParams(
            space=row["space"],
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=row["max_seqlen"],
            max_seqlen_kv=row["max_seqlen"],
        )
    images = row["images"]
    if images is not None:
        images = images.to(next(model.parameters()).dtype)
    return model(
        images,
        row["input_ids"],
        row["position_ids"],
        None,
        labels=row["labels"],
        loss_mask=row["loss_mask"],
        num_image_tiles=row["num_image_tiles"],
        packed_seq_params=params,
    )


def logprobs(model, row: dict) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and the expanded loss mask, fp32 ``[S]`` each."""
    loss, mask = forward(model, row)
    return -loss[0].float(), mask[0].float()


@torch.no_grad()
def run_alone(model, samples: Sequence[dict]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and loss mask, fp32 ``[S_i]`` each, of every sample by itself, unpacked."""
    image = find_llava(model).image_token_index
    with unpacked(model):
        return [
            logprobs(model, {**collate([sample], image), "cu_seqlens": None}) for sample in samples
        ]


@contextlib.contextmanager
def evaluating(model):
    """The model in evaluation mode for as long as the context is open; afterwards every module is
    in the mode that it was in, buffers and random numbers are where they were, and the hook has
    seen nothing.

    Args:
        model: or a list of pipeline chunks.
    """
    chunks = model if isinstance(model, list | tuple) else [model]
    modules = [module for chunk in chunks for module in chunk.modules()]
    modes = [(module, module.training) for module in modules]
    plans = [hook.plan for module in modules if (hook := hook_of(module)) is not None]
    seen = [plan.seen for plan in plans]
    # By hand: DDP has another thing called buffers.
    buffers = [buffer for module in modules for buffer in module._buffers.values()]
    buffers = [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]
    for plan in plans:
        plan.seen = copy.copy(plan.seen)
    for chunk in chunks:
        chunk.eval()
    try:
        with _same_random_numbers():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for plan, before in zip(plans, seen, strict=True):
            plan.seen = before
        for buffer, before in buffers:
            buffer.data.copy_(before)


@contextlib.contextmanager
def _same_random_numbers():
    """Afterwards every generator goes on as if nothing had been drawn."""
    tracker = get_cuda_rng_tracker()
    states, of_cpu = tracker.get_states(), torch.get_rng_state()
    of_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(of_cpu)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu)
        tracker.set_states(states)


def run_stage(model, inputs: dict) -> tuple[Tensor, Tensor | None]:
    """``forward`` of one pipeline stage, with what that stage reads of a micro-batch.

    The first stage has the images; those in the middle have no tokens either, only boundaries.

    Args:
        model: as ``find_llava`` takes it.
        inputs: keyword arguments for a model of one stage, as ``mp.data.Row.inputs`` gives them.

    Returns:
        What ``LLaVAModel.forward`` returns: the loss, logits or hidden states of the stage, and the
        expanded loss mask where it has labels.
    """
    llava = find_llava(model)
    missing = ()
    if not llava.pre_process:
        missing = ("images",)
    if not (llava.pre_process or llava.post_process):
        missing = [name for name in inputs if name != "packed_seq_params"]
    return model(**{**inputs, **dict.fromkeys(missing)})
