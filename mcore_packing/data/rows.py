"""Samples into packed rows that a model can run, and rows back into their samples."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import INT32_MAX, PackingError, PlaceholderMismatch
from ..inputs import as_choice, as_int, refuse_old
from ..layout import PackedLayout
from ..reference import IGNORE_INDEX
from ..spec import RowSpec, as_spec, round_up
from .algorithms import check_algorithm, place
from .report import Refused, Report, name_of


class EmptySample(PackingError):
    """A sample without tokens."""


class SampleTooLong(PackingError):
    """A sample that does not fit a row by itself."""


class Member(NamedTuple):
    """What a row remembers of one of its samples, beside tensors.

    Attributes:
        num_tokens: how long it is, collapsed.
        plain: what the sample had that is plain: numbers, text, and lists and dicts of them.
        tiles: how many entries of ``images`` it has, None where it has none.
        counts: what it had in tensors that the row knows otherwise, by name, with their dtypes.
        has_labels: whether it came with labels.
    """

    num_tokens: int
    plain: dict
    tiles: int | None
    counts: dict[str, torch.dtype]
    has_labels: bool


@dataclass(eq=False, repr=False, kw_only=True)
class Row:
    """One packed row: what ``LLaVAModel.forward`` takes, and the layout that says where it stands.

    It travels light: a row holds tensors of its own, and of a sample only what is plain. Other
    tensors of the data set would take a file descriptor each on their way out of a worker.

    Attributes:
        input_ids: int64 ``[1, T]``, one placeholder per image.
        labels: int64 ``[1, T]``, shifted inside each sample: the next token of the same sample, and
            -100 at each sample's last token, before a placeholder, and where nothing is trained.
        loss_mask: fp32 ``[1, T]``, 1 where there is a label.
        media: ``images``, ``[tiles, 3, h, w]`` of all samples, ``[0]`` where there are none; and
            ``num_image_tiles``, int32 ``[N]``, possibly empty.
        columns: what samples had for each of their tokens, ``[1, T]``: ``labels`` as they were
            given, where they were.
        layout: of the row; it rides along in ``packed_seq_params``.
        indices: which samples these are, of those that were packed.
        members: what else is known of each sample.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    media: dict[str, Tensor]
    columns: dict[str, Tensor]
    layout: PackedLayout
    indices: tuple[int, ...]
    members: tuple[Member, ...]

    @property
    def images(self) -> Tensor:
        """``media["images"]``."""
        return self.media["images"]

    @property
    def num_image_tiles(self) -> Tensor:
        """``media["num_image_tiles"]``."""
        return self.media["num_image_tiles"]

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[1, T]``, restarting in every sample; ``[1, S]`` for a model that does not
        expand."""
        layout = self.layout
        ids = layout.position_ids_collapsed if layout.spec.expands else layout.position_ids
        return ids.unsqueeze(0)

    @property
    def packed_seq_params(self):
        """Megatron's ``PackedSeqParams``, which remember the layout."""
        from ..megatron.params import packed_seq_params  # lazy: rows need no Megatron

        return packed_seq_params(self.layout)

    def inputs(self) -> dict:
        """Keyword arguments of ``LLaVAModel.forward``: ``model(**row.inputs())``; and whatever else
        there is in ``media``."""
        names = ("input_ids", "position_ids", "labels", "loss_mask", "packed_seq_params")
        own = {name: getattr(self, name) for name in names}
        return {**self.media, **own, "attention_mask": None}

    def to(self, device=None, dtype=None, non_blocking: bool | None = None) -> "Row":
        """The same row elsewhere.

        Args:
            device: where to.
            dtype: that of the images.
            non_blocking: whether the host goes on while tensors are copied. By default it does, but
                not on the way to a CPU, where what is read next would not be there yet. From pinned
                memory (``DataLoader(rows, batch_size=None, pin_memory=True)``) copies overlap with
                what the GPU computes.
        """
        row = self
        if device is not None:
            if non_blocking is None:
                non_blocking = torch.device(device).type != "cpu"
            row = self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if dtype is not None:
            row = dataclasses.replace(row, media=row.media | {"images": row.images.to(dtype)})
        return row

    def pin_memory(self) -> "Row":
        """The same row in pinned memory; a ``DataLoader`` calls this."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function) -> "Row":
        def moved(value):
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            return function(value)

        names = ("input_ids", "labels", "loss_mask", "media", "columns", "layout")
        return dataclasses.replace(self, **{name: moved(getattr(self, name)) for name in names})

    def __repr__(self) -> str:
        return f"Row({len(self.indices)} samples, {self.layout})"


def split(row: Row) -> list[dict]:
    """The samples of a row: the inverse of packing.

    Args:
        row: as ``pack`` made it, on any device.

    Returns:
        A dict per sample, in the order of ``row.indices``: ``input_ids``, ``images`` and ``labels``
        as views of the row's tensors, and what the sample had that is plain. Other tensors of a
        sample are in no row; ``report.left_out`` names them.

    Raises:
        PackingError: the boundaries of the row are not those that it was packed with.
    """
    lengths = check_members(row)
    ids = row.input_ids[0].split(lengths)
    labels = row.columns["labels"][0].split(lengths) if "labels" in row.columns else None
    images = iter(row.images.split([m.tiles for m in row.members if m.tiles is not None]))
    placeholders = row.layout.placeholders_per_seq()
    counts = {
        "num_image_tiles": row.num_image_tiles.split(placeholders),
        "tokens_per_image": row.layout.cu_image_embeddings.diff().split(placeholders),
    }
    samples = []
    for index, member in enumerate(row.members):
        sample = {**member.plain, "input_ids": ids[index]}
        if member.tiles is not None:
            sample["images"] = next(images)
        if member.has_labels:
            sample["labels"] = labels[index]
        for name, dtype in member.counts.items():
            sample[name] = counts[name][index].to(dtype)
        samples.append(sample)
    return samples


def check_members(row: Row) -> list[int]:
    """How many tokens each sample of a row has.

    Raises:
        PackingError: the boundaries of the row are not those that it was packed with.
    """
    lengths = row.layout.cu_seqlens_collapsed.diff().tolist()
    if len(lengths) != len(row.members):
        raise PackingError(
            f"the row has {len(lengths)} sequences, but was packed with {len(row.members)} samples"
        )
    for index, (length, member) in enumerate(zip(lengths, row.members, strict=True)):
        if length != member.num_tokens:
            raise PackingError(
                f"sequence {index} of the row is not its sample: it has {length} tokens, but the "
                f"sample {member.num_tokens}"
            )
    return lengths


class _Size(NamedTuple):
    """How long a sample is: all that packing asks of it."""

    num_positions: int  # not aligned
    tokens_per_image: list[int]
    num_image_tiles: list[int]


@dataclass(frozen=True, kw_only=True)
class Packer:
    """The settings of ``pack``, which explains them, to pack with again and again."""

    spec: RowSpec
    capacity: int | None = None
    algorithm: str = "fullest"
    on_refused: str = "report"
    keep_order: bool = False
    balance: bool = False
    seed: int = 0

    def __post_init__(self):
        as_spec(self.spec)
        check_algorithm(self.algorithm)
        as_choice(self.on_refused, "on_refused", ("report", "raise"))
        longest = INT32_MAX if self.spec.longest is None else self.spec.longest
        if self.capacity is None:
            object.__setattr__(self, "capacity", longest)
        if as_int(self.capacity, "capacity") > longest:
            raise PackingError(
                f"capacity is {self.capacity}, but the model takes rows of at most {longest}"
            )
        if self.capacity < self.spec.total_multiple:
            raise PackingError(
                f"capacity is {self.capacity}, expected at least {self.spec.total_multiple}: rows "
                f"are padded to multiples of that"
            )

    @cached_property
    def usable(self) -> int:
        """What the aligned lengths of a row may add up to, so that the row fits when padded."""
        return self.capacity // self.spec.total_multiple * self.spec.total_multiple

    @property
    def max_sequences(self) -> int | None:
        """How many samples a row may have: captured layers have room for the tail besides."""
        most = self.spec.max_sequences
        return None if most is None else most - 1

    @cached_property
    def row_spec(self) -> RowSpec:
        """What a row is laid out for: the model, and this capacity."""
        if self.spec.fixed_length is not None:
            return self.spec
        return dataclasses.replace(self.spec, max_length=self.usable)

    def place(self, lengths: Sequence[int]) -> list[list[int]]:
        """Bins of expanded lengths: indices into ``lengths``, which are aligned here."""
        return place(
            [round_up(length, self.spec.seq_multiple) for length in lengths],
            self.usable,
            self.algorithm,
            max_members=self.max_sequences,
            keep_order=self.keep_order,
            balance=self.balance,
            seed=self.seed,
        )

    def num_positions(self, sample: dict) -> int:
        """How many positions a sample becomes, without alignment.

        Raises:
            PackingError: what is wrong with the sample, as ``pack`` would report it.
        """
        return self._size(sample).num_positions

    def measure(
        self,
        samples: Sequence[dict],
        refuse: Callable[[int, PackingError], None],
        left_out: Counter | None = None,
    ) -> tuple[list[int], list[int]]:
        """The lengths of the samples that can be packed, not aligned, and which ones these are.

        ``refuse`` is told the index of every other one, and what is wrong with it; ``left_out``
        counts what samples have that is in no row.
        """
        lengths, kept, form = [], [], None
        for index in range(len(samples)):
            sample = samples[index]
            try:
                length = self.num_positions(sample)
                form = _check_form(sample, form)
            except PackingError as error:
                refuse(index, error)
            else:
                lengths.append(length)
                kept.append(index)
                if left_out is not None:
                    left_out.update(_left_out(sample))
        return lengths, kept

    def pack(self, samples: Sequence[dict] | Iterable[dict]) -> tuple["Rows", Report]:
        """As the function ``pack`` does."""
        if isinstance(samples, Mapping):
            raise PackingError("samples are one mapping, expected a list of samples")
        if isinstance(samples, IterableDataset) or not hasattr(samples, "__getitem__"):
            samples = list(iter(samples))
        refused = []

        def refuse(index: int, error: PackingError) -> None:
            sample = samples[index]
            key = sample.get("__key__") if isinstance(sample, dict) else None
            if self.on_refused == "raise":
                error.args = (f"{name_of(index, key)}: {error}",)
                raise error
            refused.append(Refused(index, key, type(error).__name__, str(error)))

        left_out = Counter()
        lengths, kept = self.measure(samples, refuse, left_out)
        bins = [[kept[i] for i in bin_] for bin_ in self.place(lengths)]
        num_aligned = sum(round_up(length, self.spec.seq_multiple) for length in lengths)
        capacity = self.capacity
        if capacity == INT32_MAX:  # no limit: one row, as long as it needs to be
            capacity = round_up(num_aligned, self.spec.total_multiple)
        report = Report(
            num_samples=len(samples),
            num_rows=len(bins),
            capacity=capacity,
            num_real=sum(lengths),
            num_aligned=num_aligned,
            refused=tuple(refused),
            left_out=dict(left_out),
        )
        return Rows(self, samples, bins), report

    def stream(self, samples: Iterable[dict], buffer_size: int) -> Iterator[tuple["Rows", Report]]:
        """Rows and the report of every ``buffer_size`` samples, and of what is left at the end."""
        if type(buffer_size) is not int or buffer_size < 1:
            raise PackingError(f"buffer_size is {buffer_size!r}, expected a positive int")
        buffer = []
        for sample in samples:
            buffer.append(sample)
            if len(buffer) == buffer_size:
                yield self.pack(buffer)
                buffer = []
        if buffer:
            yield self.pack(buffer)

    def join(self, samples: Sequence[dict], indices: Sequence[int] | None = None) -> Row:
        """One row of these samples, in this order.

        Raises:
            PackingError: they do not fit, or what is wrong with one.
        """
        sizes = [self._size(sample) for sample in samples]
        row = concatenate(samples, self.spec.image_token_id)
        device = row["input_ids"].device
        lengths = torch.tensor([0, *(sample["input_ids"].numel() for sample in samples)])
        layout = PackedLayout.build(
            row["input_ids"],
            lengths.cumsum(0).int().to(device),
            [size.tokens_per_image for size in sizes],
            self.row_spec,
            space="collapsed",
        )
        return Row(
            **row,
            layout=layout,
            indices=tuple(range(len(samples)) if indices is None else indices),
            members=tuple(map(_member, samples)),
        )

    def _size(self, sample: dict) -> _Size:
        ids = _check_ids(sample)
        num_placeholders = _count(ids, self.spec.image_token_id)
        _check_labels(sample.get("labels"), self.spec.image_token_id)
        counts, tiles = _as_ints(sample, "tokens_per_image"), _tiles_of(sample)
        images = sample.get("images")
        num_given = 0
        if images is not None:
            if not isinstance(images, Tensor) or images.dim() == 0:
                raise PackingError(
                    f"images: found {_kind(images)}, expected a tensor [tiles, 3, h, w] or None"
                )
            num_given = images.shape[0]
        counts_tiles = counts is None or sample.get("num_image_tiles") is not None
        if counts_tiles and sum(tiles) != num_given:
            raise PackingError(
                f"num_image_tiles {tiles} are {sum(tiles)} tiles, but images hold {num_given}"
            )
        if counts is None:
            if tiles and self.spec.img_seq_len is None:
                raise TypeError(
                    "samples with images need spec.img_seq_len, how many positions a tile becomes, "
                    "or tokens_per_image in each sample"
                )
            counts = [count * self.spec.img_seq_len for count in tiles]
        elif counts and not num_given:
            raise PackingError(f"tokens_per_image names {len(counts)} images, but there are none")
        if num_placeholders != len(counts):
            raise PlaceholderMismatch(
                f"{num_placeholders} placeholders (id {self.spec.image_token_id}) but "
                f"{len(counts)} images; give every image one placeholder",
                actual=len(counts),
                expected=num_placeholders,
            )
        if len(tiles) != len(counts):
            raise PackingError(
                f"num_image_tiles has {len(tiles)} entries, but tokens_per_image {len(counts)}"
            )
        length = ids.numel() - num_placeholders + sum(counts)
        aligned = round_up(length, self.spec.seq_multiple)
        if aligned > self.usable:
            padded = "" if aligned == length else f", {aligned} when aligned"
            raise SampleTooLong(
                f"{length} positions{padded}, but a row has room for {self.usable}; cut it "
                f"(mp.media.truncate) or raise the capacity"
            )
        return _Size(length, counts, tiles)


class Rows(Sequence):
    """Packed rows, each made when it is asked for: of a list of samples, or of a map-style dataset.

    It is a map-style dataset itself: ``DataLoader(rows, batch_size=None)`` makes rows in workers.

    Attributes:
        bins: the samples of each row, as indices into what was packed.
    """

    def __init__(self, packer: Packer, samples: Sequence[dict], bins: list[list[int]]):
        self.packer, self.samples, self.bins = packer, samples, bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self.packer, self.samples, self.bins[index])
        members = self.bins[index]
        return self.packer.join([self.samples[i] for i in members], members)


_RENAMED = dict.fromkeys(
    ("image_token_id", "img_seq_len", "seq_multiple", "total_multiple", "num_padded_rows",
     "max_expanded", "space", "on_overflow"),
    "spec=mp.row_spec(model), or mp.RowSpec(...), says it",
)  # fmt: skip


def pack(
    samples: Sequence[dict] | Iterable[dict],
    spec: RowSpec,
    capacity: int | None = None,
    algorithm: str = "fullest",
    *,
    on_refused: str = "report",
    keep_order: bool = False,
    balance: bool = False,
    seed: int = 0,
    **old: NoReturn,
) -> tuple[Rows, Report]:
    """Pack samples into rows that fit the model, each with its layout.

    A sample is a dict of

    - ``input_ids``: int64 ``[t]``, one placeholder per image.
    - ``images``: ``[tiles, 3, h, w]``, or None.
    - ``num_image_tiles``: ``[n]``, by default one tile per image; or ``tokens_per_image``: ``[n]``,
      the positions of each image where they are not ``spec.img_seq_len`` per tile.
    - ``labels``: int64 ``[t]``, optional: what each token itself is trained as, not shifted, -100
      where it is not trained, as Hugging Face has it. By default every token that is no image.
    - whatever else is plain (numbers, text, lists and dicts of them): ``split`` gives it back, and
      reports name a sample by its ``__key__``. Other tensors go into no row, and are counted in
      ``report.left_out``.

    Labels are shifted here, inside each sample, so that no sample predicts the next one's start.

    Args:
        samples: a list, a map-style dataset, or anything that can be iterated over.
        spec: what the model asks of a row: ``mp.row_spec(model)``. Every sample is padded to its
            ``seq_multiple`` and the row to its ``total_multiple``.
        capacity: positions that a row may have. By default the longest row of the spec; where it
            has none, one row takes all samples.
        algorithm: "fullest", "first_fit_decreasing", "first_fit", "first_fit_shuffle" or
            "concatenative"; see docs/data.md.
        on_refused: "report" leaves out a sample that cannot be packed and reports it, "raise"
            raises its error.
        keep_order, balance, seed: as ``algorithms.place`` has them.

    Returns:
        The rows, and a report. Every sample is in exactly one of both.

    Raises:
        PackingError: options that contradict each other; with ``on_refused="raise"`` also a sample
            that is empty (``EmptySample``), too long (``SampleTooLong``), whose placeholders and
            images differ in number (``PlaceholderMismatch``), or that is malformed.
        TypeError: an unknown option; no ``spec.img_seq_len`` where it is needed.

    Example:
        >>> ids = [torch.tensor(x) for x in ([1, -200, 2, 3], [4, 5, 6], [7, 8], [])]
        >>> samples = [{"input_ids": x} for x in ids]
        >>> samples[0]["images"] = torch.zeros(1, 3, 28, 28)
        >>> rows, report = pack(samples, RowSpec(img_seq_len=4, seq_multiple=2), capacity=8)
        >>> print(report)
        3 of 4 samples in 2 rows of 8: 75.0% filled, 87.5% with alignment; wasted: 12.5% alignment, 12.5% row tails
        refused 1: 1 EmptySample
          sample 3: input_ids are empty
        >>> rows[0].input_ids.tolist(), rows[0].layout.cu_seqlens_padded.tolist()
        ([[1, -200, 2, 3]], [0, 8, 8])
        >>> rows[1].labels.tolist()
        [[5, 6, -100, 8, -100]]
    """  # noqa: E501
    refuse_old("mp.data.pack", old, _RENAMED)
    options = {"on_refused": on_refused, "keep_order": keep_order, "balance": balance, "seed": seed}
    packer = get_packer(algorithm, spec, capacity, **options)
    return packer.pack(samples)


def get_packer(algorithm: str, spec: RowSpec, capacity: int | None = None, **options) -> Packer:
    """A packer with the options of ``pack``, for streams and for lengths alone.

    Example:
        >>> packer = get_packer("first_fit_decreasing", RowSpec(seq_multiple=2), capacity=8)
        >>> packer.place([5, 1, 2, 3])
        [[0, 1], [3, 2]]
        >>> samples = ({"input_ids": torch.arange(n)} for n in (5, 1, 2, 3))
        >>> for rows, report in packer.stream(samples, buffer_size=3):
        ...     print([row.indices for row in rows], report.num_samples)
        [(0, 1), (2,)] 3
        [(0,)] 1
    """
    old = {name: options[name] for name in options if name in _RENAMED}
    refuse_old("mp.data.get_packer", old, _RENAMED)
    return Packer(algorithm=algorithm, spec=spec, capacity=capacity, **options)


def concatenate(samples: Sequence[dict], image_token_id: int = -200) -> dict:
    """The tensors of a row, as ``Row`` has them, of samples that are known to be right."""
    ids = torch.cat([sample["input_ids"] for sample in samples])
    labels = torch.cat([_shifted_labels(sample, image_token_id) for sample in samples])
    images = [image for sample in samples if (image := sample.get("images")) is not None]
    tiles = [count for sample in samples for count in _tiles_of(sample)]
    columns = {}
    if any(sample.get("labels") is not None for sample in samples):
        given = [
            sample["input_ids"] if sample.get("labels") is None else sample["labels"]
            for sample in samples
        ]
        columns["labels"] = torch.cat(given)[None]
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "loss_mask": (labels != IGNORE_INDEX).float()[None],
        "media": {
            "images": torch.cat(images) if images else torch.empty(0, device=ids.device),
            "num_image_tiles": torch.tensor(tiles, dtype=torch.int32, device=ids.device),
        },
        "columns": columns,
    }


_OF_ROWS = ("input_ids", "images", "labels")  # in tensors of the row
_COUNTS = ("num_image_tiles", "tokens_per_image")
_PLAIN = (str, int, float, bool, bytes, type(None))


def _member(sample: dict) -> Member:
    images = sample.get("images")
    is_plain = {name: _is_plain(value) for name, value in sample.items() if name not in _OF_ROWS}
    plain = {name: sample[name] for name, fits in is_plain.items() if fits}
    if images is None and "images" in sample:
        plain["images"] = None
    return Member(
        len(sample["input_ids"]),
        plain,
        len(images) if isinstance(images, Tensor) else None,
        {name: sample[name].dtype for name in _COUNTS if is_plain.get(name) is False},
        sample.get("labels") is not None,
    )


def _left_out(sample: dict) -> list[str]:
    """What of a sample no row has; what a loader adds for itself is not told."""
    known = (*_OF_ROWS, *_COUNTS)
    return [
        name
        for name, value in sample.items()
        if name not in known and not _is_plain(value) and not str(name).startswith("__")
    ]


def _is_plain(value) -> bool:
    """Whether a value is numbers or text, or lists and dicts of them."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(one) for key, one in value.items())
    return isinstance(value, _PLAIN)


def _refuse_mask(sample: dict) -> None:
    if sample.get("loss_mask") is not None:
        raise PackingError(
            "a sample has a loss_mask, which could be shifted or not; give labels instead, -100 "
            "where nothing is trained"
        )


def _shifted_labels(sample: dict, image_token_id: int) -> Tensor:
    _refuse_mask(sample)
    ids = sample["input_ids"]
    labels = sample.get("labels")
    labels = ids if labels is None else labels
    labels = labels.masked_fill(ids == image_token_id, IGNORE_INDEX)
    return torch.nn.functional.pad(labels[1:], (0, 1), value=IGNORE_INDEX)


def _check_ids(sample: dict) -> Tensor:
    if not isinstance(sample, dict):
        raise PackingError(f"a sample is a {type(sample).__name__}, expected a dict")
    _refuse_mask(sample)
    ids, labels = sample.get("input_ids"), sample.get("labels")
    if isinstance(ids, Tensor) and ids.numel() == 0:
        raise EmptySample("input_ids are empty")
    _check_tokens("input_ids", ids)
    if labels is not None:
        _check_tokens("labels", labels)
        if labels.numel() != ids.numel():
            raise PackingError(f"labels have {labels.numel()} entries, but input_ids {ids.numel()}")
    return ids


def _check_tokens(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise PackingError(f"{name}: found {_kind(tensor)}, expected torch.int64 [t]")


def _check_labels(labels: Tensor | None, image_token_id: int) -> None:
    """A negative label that is neither ignored nor a placeholder is no token."""
    if labels is None or int(labels.min()) >= 0:
        return
    wrong = (labels < 0) & (labels != IGNORE_INDEX) & (labels != image_token_id)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise PackingError(
            f"label {token} is {int(labels[token])}, expected a token id, or {IGNORE_INDEX} where "
            f"nothing is trained"
        )


def _check_form(sample: dict, form: tuple | None) -> tuple | None:
    """Images of one row are one tensor: all of them have the form of the first."""
    images = sample.get("images")
    if images is None:
        return form
    found = images.dtype, images.shape[1:]
    if found == form or images.shape[0] == 0:
        return form
    if form is not None:
        raise PackingError(
            f"images are {found[0]} {list(found[1])} each, but those before are {form[0]} "
            f"{list(form[1])}: rows hold images of one size"
        )
    return found


def _tiles_of(sample: dict) -> list[int]:
    """How many tiles each image has: by default one."""
    tiles = _as_ints(sample, "num_image_tiles")
    if tiles is not None:
        return tiles
    images, counts = sample.get("images"), sample.get("tokens_per_image")
    images = images if counts is None else counts
    return [1] * (0 if images is None else len(images))


def _as_ints(sample: dict, name: str) -> list[int] | None:
    """A sample's positive counts, from a list or a tensor ``[n]``."""
    values = sample.get(name)
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = values.tolist()
    is_right = isinstance(values, list | tuple) and {*map(type, values)} <= {int}
    if not is_right or (values and min(values) < 1):
        raise PackingError(f"{name} is {sample[name]!r}, expected positive ints [n]")
    return list(values)


def _kind(value) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _count(ids: Tensor, token: int) -> int:
    if not ids.is_cuda:
        return int(np.count_nonzero(ids.numpy() == token))  # a third of torch's time
    return int((ids == token).sum())
