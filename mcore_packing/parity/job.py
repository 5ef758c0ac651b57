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
from ..megatron.find import find_llavas
from ..reference import local_positions
from ..spec import round_up
from .runs import evaluating, run_stage


class Run(NamedTuple):
    """What a rank of the last stage computed of a row, on the CPU.

    Attributes:
        logprobs: fp32 ``[positions of this rank]``, of the labels.
        mask: fp32, likewise: above 0 where a position is trained.
    """

    logprobs: Tensor
    mask: Tensor


def gather(value) -> list:
    """A value of every rank, by rank."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
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
        forward: the step of a model that is no ``LLaVAModel``; see ``verify``.

    Attributes:
        cp_size, cp_rank: context parallelism.
        replica: which data-parallel replica this rank belongs to.

    Raises:
        PackingError: there is no ``LLaVAModel`` in it and no step, or no Megatron config.
    """

    def __init__(self, model, forward: Callable | None = None):
        self.chunks = list(model) if isinstance(model, list | tuple) else [model]
        if forward is None:
            find_llavas(self.chunks)
        self.forward = forward or run_stage
        self.config = _config_of(self.chunks[0])
        self.weight = next(self.chunks[0].parameters())
        self.cp_size = self.config.context_parallel_size
        self.cp_rank, self.cp_group = 0, None
        if self.cp_size > 1:
            self.cp_group = parallel_state.get_context_parallel_group()
            self.cp_rank = self.cp_group.rank()
        self.replica = parallel_state.get_data_parallel_rank()

    @torch.no_grad()
    def run(self, rows: Sequence) -> list[Run]:
        """What this rank computes of every row: on the last pipeline stage, elsewhere nothing.

        All ranks run as many rows: those that have fewer run their first one again.
        """
        filled = [*rows, *[rows[0]] * (self._num_passes(len(rows)) - len(rows))]
        with evaluating(self.chunks):
            runs = together(lambda: self._schedule(self._collect_step, filled, forward_only=True))
        return runs[: len(rows)]

    def backward(self, rows: Sequence, weights: Sequence[Tensor | None]) -> None:
        """Add up the gradients of all rows, in evaluation mode.

        Args:
            rows: what is run.
            weights: of each row, ``[real positions]``, how much the loss of each counts; on stages
                before the last one nothing.
        """
        count = self._num_passes(len(rows))
        pairs = [
            (row, None if weight is None else self._share(weight, row.layout))
            for row, weight in zip(rows, weights, strict=True)
        ]
        row, weight = pairs[0]
        filler = (row, None if weight is None else torch.zeros_like(weight))
        pairs += [filler] * (count - len(pairs))
        step = partial(self._backward_step, count)
        with evaluating(self.chunks), torch.enable_grad():
            together(lambda: self._schedule(step, rows, pairs, forward_only=False))

    def _schedule(self, step: Callable, rows: Sequence, batches=None, *, forward_only: bool):
        """Run rows as micro-batches of Megatron's schedule; what it collected."""
        batches = rows if batches is None else batches
        iterators = [iter(batches) for _ in self.chunks]
        is_interleaved = len(self.chunks) > 1
        with _with_model_type(self.chunks):
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iterators if is_interleaved else iterators[0],
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=max(row.layout.num_expanded for row in rows),
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def outputs(self, chunk, row) -> tuple[Tensor, Tensor | None]:
        """What the step gives for a row: losses or hidden states, and a mask if it knows one."""
        outputs = self.forward(chunk, row.inputs())
        return outputs if isinstance(outputs, tuple) else (outputs, None)

    def loss_and_mask(self, row, loss: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[positions of this rank]`` each, of a step of the last stage.

        Raises:
            PackingError: the losses are not one for each position of this rank.
        """
        size = row.layout.num_expanded // self.cp_size
        if loss.numel() != size:
            raise PackingError(
                f"the last stage gave {list(loss.shape)}, expected the loss of each of its {size} "
                f"positions, [1, {size}]; were boundaries other than the row's used?"
            )
        if mask is None:
            places = {"cp_size": self.cp_size, "cp_rank": self.cp_rank}
            _, mask = expand_labels(row.layout, row.labels, row.loss_mask, **places)
        return loss.reshape(-1), mask.reshape(-1)

    def _collect_step(self, iterator, chunk):
        row = next(iterator)
        output, mask = self.outputs(chunk, row)
        return output, partial(self._collect, row, mask)

    def _collect(self, row, mask, loss, non_loss_data=True) -> Run:
        loss, mask = self.loss_and_mask(row, loss, mask)
        return Run(-loss.float().cpu(), mask.float().cpu())

    def _backward_step(self, count: int, iterator, chunk):
        row, weight = next(iterator)
        output, _ = self.outputs(chunk, row)

        def loss_function(loss):
            loss, _ = self.loss_and_mask(row, loss, weight)
            total = (loss.float() * weight.to(loss.device)).sum()
            return total * count / self.cp_size, {}  # the schedule divides by what is multiplied

        return output, loss_function

    def _share(self, values: Tensor, layout: PackedLayout) -> Tensor:
        """This rank's ``[positions]`` of ``[real positions]``, 0 for padding."""
        whole = torch.zeros(layout.num_expanded)
        whole[~layout.padding_mask.cpu()] = values
        return whole[self.positions(layout)]

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

    def positions(self, layout: PackedLayout) -> Tensor:
        """int64, the positions of the row that this rank has, in its order."""
        edges = layout.cu_seqlens_padded.cpu()
        return local_positions(edges, layout.num_expanded, self.cp_size, self.cp_rank)

    def in_order(self, run: Run, layout: PackedLayout) -> Run:
        """The whole row of a run on the last stage, without its padding: ``[real positions]``."""
        parts = [run]
        if self.cp_size > 1:
            parts = [None] * self.cp_size
            dist.all_gather_object(parts, run, group=self.cp_group)
        order = torch.cat(self._places(layout)).argsort()[~layout.padding_mask.cpu()]
        return Run(*(torch.cat(column)[order] for column in zip(*parts, strict=True)))

    def owners(self, layout: PackedLayout) -> Tensor:
        """int64 ``[real positions]``, the context-parallel rank that has each."""
        found = torch.empty(layout.num_expanded, dtype=torch.int64)
        for rank, places in enumerate(self._places(layout)):
            found[places] = rank
        return found[~layout.padding_mask.cpu()]

    def _places(self, layout: PackedLayout) -> list[Tensor]:
        edges, size = layout.cu_seqlens_padded.cpu(), layout.num_expanded
        return [local_positions(edges, size, self.cp_size, rank) for rank in range(self.cp_size)]


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
