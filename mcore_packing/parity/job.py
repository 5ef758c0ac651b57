"""The running job: rows through Megatron's schedule, and what its ranks tell each other."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ..errors import PackingError
from ..expand import expand_labels
from ..layout import PackedLayout
from ..megatron.spec import row_spec
from ..reference import local_positions
from ..spec import round_up
from .runs import evaluating, run_stage


class Run(NamedTuple):
    """What the last stage computed of a row, on the CPU.

    Attributes:
        logprobs: fp32 ``[real positions]``, of the labels.
        mask: fp32, likewise: above 0 where a position is trained.
    """

    logprobs: Tensor
    mask: Tensor


def gather(value, group=None) -> list:
    """A value of every rank, by rank."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def together(work: Callable):
    """What ``work`` gives on this rank, if it fails on none.

    Where it fails on one, all ranks raise, so that none waits for another in a collective. Ranks
    that share one call of the model must fail together by themselves.

    Raises:
        PackingError: it failed on another rank; names the first. A rank's own error goes before.
    """
    result = error = None
    try:
        result = work()
    except Exception as caught:  # theirs, whatever it is
        error = caught
    said = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(said):
        if message is not None:
            raise PackingError(f"rank {rank} could not go on: {message}")
    return result


class Job:
    """A model as its job has it, and how rows run on it.

    Args:
        model: a model, wrapped or not, or the list of its pipeline chunks on this rank.
        row: what is to run on it.
        forward: the step of a model that is no ``LLaVAModel``; see ``isolation``.

    Attributes:
        row: on the model's device, its images in the model's precision.
        cp_size, cp_rank: context parallelism.
        replica: which data-parallel replica this rank belongs to.
        rank: of all ranks.

    Raises:
        PackingError: there is no ``LLaVAModel`` in it and no step, or no Megatron config; or the
            row was laid out for another model.
    """

    def __init__(self, model, row, forward: Callable | None = None):
        self.chunks = list(model) if isinstance(model, list | tuple) else [model]
        self.forward = forward or run_stage
        if forward is None:
            row_spec(self.chunks).check(row.layout)
        num_tokens, size = row.input_ids.numel(), row.layout.num_expanded
        if not row.layout.spec.expands and num_tokens != size:
            raise PackingError(
                f"the row has {num_tokens} tokens, but its layout {size} positions: a row for a "
                f"model that does not expand is filled up as its boundaries say"
            )
        self.config = _config_of(self.chunks[0])
        weight = next(self.chunks[0].parameters())
        self.row = row.to(weight.device, weight.dtype)
        self.cp_size = self.config.context_parallel_size
        self.cp_rank, self.cp_group = 0, None
        if self.cp_size > 1:
            self.cp_group = parallel_state.get_context_parallel_group()
            self.cp_rank = self.cp_group.rank()
        self.replica = parallel_state.get_data_parallel_rank()
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    @torch.no_grad()
    def run(self, rows: Sequence) -> list[Run]:
        """What the model computes of every row: on ranks of the last stage, elsewhere nothing.

        All ranks run as many rows: those that have fewer run one more often.
        """
        filled = [*rows, *[self.row] * (self._num_passes(len(rows)) - len(rows))]
        if not filled:
            return []
        with evaluating(self.chunks):
            runs = together(lambda: self._forward(filled))[: len(rows)]
        parts = gather(runs, self.cp_group) if self.cp_size > 1 else [runs]
        return [
            self._in_order(pieces, row.layout)
            for *pieces, row in zip(*parts, rows if runs else [], strict=True)
        ]

    def _forward(self, rows: Sequence) -> list[Run]:
        """This rank's part of every row. A loss that is no loss stops no schedule half-way."""
        wrong = []

        def step(iterator, chunk):
            row = next(iterator)
            output, mask = self._outputs(chunk, row)
            return output, partial(collect, row, mask)

        def collect(row, mask, loss, non_loss_data=True):
            try:
                loss, mask = self._loss_and_mask(row, loss, mask)
            except PackingError as error:
                wrong.append(error)
            return Run(-loss.detach().float().cpu(), None if wrong else mask.float().cpu())

        runs = self._schedule(step, rows, rows, forward_only=True)
        if wrong:
            raise wrong[0]
        return runs

    def backward(self, rows: Sequence, weights: Sequence[Tensor | None]) -> None:
        """Add up the gradients of all rows, in evaluation mode.

        Args:
            rows: what is run.
            weights: of each row, ``[real positions]``, how much the loss of each counts; on stages
                before the last one None.
        """
        count = self._num_passes(len(rows))
        pairs = [
            (row, None if weight is None else self._share(weight, row.layout))
            for row, weight in zip(rows, weights, strict=True)
        ]
        row, weight = pairs[0]
        pairs += [(row, None if weight is None else weight * 0)] * (count - len(pairs))

        def step(iterator, chunk):
            row, weight = next(iterator)
            output, _ = self._outputs(chunk, row)

            def loss_function(loss):
                loss, _ = self._loss_and_mask(row, loss, weight)
                total = (loss.float() * weight.to(loss.device)).sum()
                return total * count / self.cp_size, {}  # the schedule takes the mean

            return output, loss_function

        with evaluating(self.chunks), torch.enable_grad():
            together(lambda: self._schedule(step, rows, pairs, forward_only=False))

    def _schedule(self, step: Callable, rows: Sequence, batches: Sequence, *, forward_only: bool):
        """Run micro-batches through Megatron's schedule; what it collected."""
        iterators = [iter(batches) for _ in self.chunks]
        with _with_model_type(self.chunks):
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=max(row.layout.num_expanded for row in rows),
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _outputs(self, chunk, row) -> tuple[Tensor, Tensor | None]:
        """What the step gives for a row: losses or hidden states, and a mask if it knows one."""
        outputs = self.forward(chunk, row.inputs())
        return outputs if isinstance(outputs, tuple) else (outputs, None)

    def _loss_and_mask(self, row, loss: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[positions of this rank]`` each, of a step of the last stage."""
        size = row.layout.num_expanded // self.cp_size
        if loss.numel() != size:
            raise PackingError(
                f"the last stage gave {list(loss.shape)}, expected the loss of each of its {size} "
                f"positions, [1, {size}]; were boundaries other than the row's used?"
            )
        if mask is None and not row.layout.spec.expands:
            mask = row.loss_mask[0].cpu()[self._places(row.layout, self.cp_rank)]
        elif mask is None:
            places = {"cp_size": self.cp_size, "cp_rank": self.cp_rank}
            _, mask = expand_labels(row.layout, row.labels, row.loss_mask, **places)
        return loss.reshape(-1), mask.reshape(-1)

    def _num_passes(self, wanted: int) -> int:
        """As many on all ranks, and what an interleaved schedule takes."""
        most = max(gather(wanted))
        if len(self.chunks) == 1:
            return most
        return round_up(most, self.config.microbatch_group_size_per_vp_stage)

    @property
    def pads_rows(self) -> bool:
        """Whether all rows must be equally long: pipelines send hidden states of one shape."""
        is_pipeline = parallel_state.get_pipeline_model_parallel_world_size() > 1
        return is_pipeline and not self.config.variable_seq_lengths

    def owned(self, layout: PackedLayout) -> Tensor:
        """bool ``[real positions]``, those that this rank has."""
        found = torch.zeros(layout.num_expanded, dtype=torch.bool)
        found[self._places(layout, self.cp_rank)] = True
        return found[~layout.padding_mask.cpu()]

    def _share(self, values: Tensor, layout: PackedLayout) -> Tensor:
        """This rank's ``[positions]`` of ``[real positions]``, 0 for padding."""
        whole = torch.zeros(layout.num_expanded)
        whole[~layout.padding_mask.cpu()] = values
        return whole[self._places(layout, self.cp_rank)]

    def _in_order(self, parts: Sequence[Run], layout: PackedLayout) -> Run:
        """A whole row, without its padding, of what its ranks have."""
        places = [self._places(layout, rank) for rank in range(self.cp_size)]
        order = torch.cat(places).argsort()[~layout.padding_mask.cpu()]
        return Run(*(torch.cat(column)[order] for column in zip(*parts, strict=True)))

    def _places(self, layout: PackedLayout, rank: int) -> Tensor:
        edges = layout.cu_seqlens_padded.cpu()
        return local_positions(edges, layout.num_expanded, self.cp_size, rank)


def _config_of(model) -> ModelParallelConfig:
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    for module in modules:
        config = getattr(module, "config", None)
        if isinstance(config, ModelParallelConfig):
            return config
    raise PackingError(f"{type(model).__name__} has no config of Megatron's, so it is no model")


@contextlib.contextmanager
def _with_model_type(chunks):
    """Megatron's schedules ask every model for its ``model_type``, which only its own training
    loop sets."""
    bare = []
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        if not hasattr(chunk, "model_type"):
            bare.append(chunk)
            chunk.model_type = ModelType.encoder_or_decoder
    try:
        yield
    finally:
        for chunk in bare:
            del chunk.model_type
