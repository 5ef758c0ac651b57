"""Packed rows from Energon: a task encoder to derive from, and what it skipped.

Needs ``megatron-energon``, and is imported when ``mp.data.energon`` is first used.
"""

import contextlib
import dataclasses
import json
import logging
import os
import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.energon import SkipSample, TaskEncoder, WorkerConfig, stateless
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

from ..errors import PackingError
from .packer import Packer
from .report import SHOWN
from .rows import Row

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False, kw_only=True)
class EnergonRow(Row):
    """A ``Row`` that Energon can name and find again.

    Attributes:
        __key__: of each sample.
        __restore_key__: for Energon to fill in.
    """

    __key__: list[str]
    __restore_key__: tuple = ()


class PackingTaskEncoder(TaskEncoder):
    """A task encoder whose loader yields packed rows, each with its layout.

    Derive from it, alone or beside another task encoder, set ``packer``, and say in ``make_sample``
    what a sample is. Then ask for ``packing_buffer_size`` samples to pack at a time, and for no
    batches: ``get_train_dataset(..., batch_size=None, packing_buffer_size=1000)``.

    A sample that cannot be packed goes to the ``global_error_handler`` of the ``WorkerConfig``, as
    every error in Energon does; make that a ``SkipLog``. Everything else of its buffer is packed.

    Attributes:
        packer: from ``mp.data.get_packer``.
        max_refused_in_a_row: after how many samples in a row that cannot be made, packed or joined
            the job ends, with Energon's ``FatalSampleError``; 0 is never. Energon's own 100 would
            end it in a folder of samples that are too long. Samples that Energon cannot *decode*
            end it after 100 in a row, whatever is said here.
    """

    packer: Packer
    max_refused_in_a_row: int = 10_000

    @property
    def __default_failure_tolerance__(self) -> int:
        """Energon's name for it."""
        return self.max_refused_in_a_row

    def make_sample(self, sample: Any) -> dict:
        """A sample as ``mp.data.pack`` takes it, from one of the data set.

        A function of its argument only: when a run is resumed, it is called again. Whatever it
        raises is the reason for which the sample is skipped, ``SkipSample`` included. What in it is
        neither the row's nor plain is in no row, in silence.
        """
        raise NotImplementedError("say in make_sample what mp.data.pack should take")

    @stateless
    def encode_sample(self, sample: Any) -> dict:
        try:
            made = self.make_sample(sample)
        except SkipSample as error:  # Energon would say nothing
            _report(error, sample)
            raise
        try:
            self.packer.num_positions(made)
        except TypeError as error:  # a setting is missing: every sample would be skipped
            raise FatalSampleError(str(error)) from error
        sources = getattr(sample, "__sources__", None)
        return {
            **made,
            "__key__": sample.__key__,
            "__restore_key__": sample.__restore_key__,
            **({"__sources__": sources} if sources else {}),
        }

    def select_samples_to_pack(self, samples: list[dict]) -> list[list[dict]]:
        """The samples of each row, the rows in any order.

        An exception from here would cost the whole buffer, so a sample that does not fit the others
        is reported and left out.
        """
        found = self.packer.measure(samples, lambda i, _, error: _report(error, samples[i]))
        for one in found.truncated.values():
            logger.warning(
                "cut sample %s to fit: %d tokens, %d of them trained, and %d images are gone",
                one.key, one.tokens, one.trained, one.images,
            )  # fmt: skip
        kept = found.kept
        rows = [[samples[kept[i]] for i in bin_] for bin_ in self.packer.place_samples(found)]
        # Longest-first algorithms give the longest samples first. Keys as the seed: the same buffer
        # gives the same rows in the same order, whenever a run was resumed.
        keys = [samples[i]["__key__"] for i in kept]
        random.Random(f"{self.packer.seed} {keys}").shuffle(rows)
        return rows

    @stateless
    def pack_selected_samples(self, samples: list[dict]) -> EnergonRow:
        row = self.packer.join(samples)
        return EnergonRow(**vars(row), __key__=[sample["__key__"] for sample in samples])


def _report(error: Exception, sample: Any) -> None:
    """Tell Energon's error handler, which knows what to do."""
    sources = sample.get("__sources__") if isinstance(sample, dict) else sample.__sources__
    WorkerConfig.active_worker_config.global_error_handler(error, sample, sources)


@dataclass(frozen=True)
class Skipped:
    """A sample that no row has: its key, the class of the error, and what it says."""

    key: str
    cause: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class SkipLog:
    """Names and counts every sample that is skipped: the ``global_error_handler`` of a
    ``WorkerConfig``.

    Each is a line of JSON in one file, which all workers append to, and a warning in the log. What
    is read again when a run is resumed is named again.

    Args:
        path: of the file; by default a temporary one. Ranks may share one.
        raises: stop at the first sample that is skipped, with a ``PackingError``.
    """

    def __init__(self, path: str | os.PathLike | None = None, raises: bool = False):
        if path is None:
            handle, path = tempfile.mkstemp(prefix="skipped-", suffix=".jsonl")
            os.close(handle)
        self.path, self.raises = os.fspath(path), raises

    def __call__(self, error: Exception, sample: Any, sources: Any = None) -> None:
        """What Energon calls: with a sample, or all samples of a row."""
        reason = error.__cause__ or error  # a decoder wraps what went wrong
        cause = type(reason).__name__
        reason = str(reason) or repr(reason)
        keys = [_key_of(one) for one in (sample if isinstance(sample, list) else [sample])]
        with open(self.path, "a") as file:
            file.write("".join(json.dumps([key, cause, reason]) + "\n" for key in keys))
        for key in keys:
            logger.warning("skipped sample %s: %s: %s", key, cause, reason)
        if self.raises:
            raise PackingError(f"skipped sample {', '.join(keys)}: {cause}: {reason}") from error

    @property
    def skipped(self) -> list[Skipped]:
        """All of them so far, of all workers."""
        if not os.path.exists(self.path):
            return []
        with open(self.path) as file:
            return [_skipped(line) for line in file if line.strip()]

    @property
    def causes(self) -> Counter:
        """How many, by cause."""
        return Counter(skipped.cause for skipped in self.skipped)

    def __str__(self) -> str:
        skipped = self.skipped
        causes = ", ".join(f"{count:,} {cause}" for cause, count in self.causes.most_common())
        lines = [f"skipped {len(skipped):,} samples" + (f": {causes}" if causes else "")]
        lines += [f"  {one}" for one in skipped[:SHOWN]]
        if len(skipped) > SHOWN:
            lines.append(f"  and {len(skipped) - SHOWN:,} more: see {self.path}")
        return "\n".join(lines)


def _skipped(line: str) -> Skipped:
    """A line of the file; half a line is what a worker that was killed leaves."""
    try:
        return Skipped(*map(str, json.loads(line)))
    except (ValueError, TypeError):
        return Skipped("unknown", "HalfALine", line.strip())


def _key_of(sample: Any) -> str:
    """The key of a sample in any state: encoded, decoded, or raw as it came from the tar."""
    data = getattr(sample, "data", None)
    if isinstance(data, tuple) and data and isinstance(data[0], dict):
        sample = data[0]
    key = sample.get("__key__") if isinstance(sample, dict) else getattr(sample, "__key__", None)
    return "unknown" if key is None else str(key)


@contextlib.contextmanager
def safe_globals():
    """Lets ``torch.load`` read what ``loader.save_state_rank()`` gave, and lets it run no code: the
    classes that such a state is made of are allowed by name.

    Needs torch 2.6. ``restore_state`` gives the state to a loader.

    Example:
        .. code-block:: python

            torch.save({"loader": loader.save_state_rank()}, path)
            with mp.data.energon.safe_globals():
                checkpoint = torch.load(path)
            mp.data.energon.restore_state(loader, checkpoint["loader"])

    Source:
        ``torch._weights_only_unpickler`` of torch 2.13, which fills plain dicts only: a
        ``FlexState``, a dict by another name, is read as one.
    """
    key = np.random.MT19937().state["state"]["key"]
    classes = [
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SystemRngState,
        SliceState,
        (dict, f"{FlexState.__module__}.{FlexState.__qualname__}"),
        np.ndarray,
        np.dtype,
        type(key.dtype),
        key.__reduce__()[0],
    ]
    with torch.serialization.safe_globals(classes):
        yield


def restore_state(loader, state: SavableDataLoaderState | None) -> None:
    """``loader.restore_state_rank`` of a state that was read under ``safe_globals``.

    The loader is a new one, with as many workers, of the same data set and task encoder.
    """
    if state is not None:
        states = [FlexState(one) if type(one) is dict else one for one in state.worker_states]
        state = dataclasses.replace(state, worker_states=states)
    loader.restore_state_rank(state)
