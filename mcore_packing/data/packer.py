"""Many samples into rows: which go together, and what becomes of those that fit nowhere."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple, NoReturn, overload

from torch.utils.data import IterableDataset

from ..errors import INT32_MAX, PackingError
from ..inputs import as_choice, as_int, as_positive, refuse_old
from ..media.families import Family
from ..spec import RowSpec, as_spec, round_up
from .algorithms import check_algorithm, imbalance_of, place, split_bins
from .media import Form, as_forms, check_forms, commonest_forms
from .report import Refused, Report, key_of, name_of
from .rows import Row, join, join_tokens, without_training
from .samples import Contents, Sample, SampleTooLong, UntrainedSample, look, read
from .weights import LOSS_WEIGHTS, scale_of, weight_of

# What a patch costs in the vision tower, in squared positions, which is what attention costs in the
# language model: ViT-L beside a model of 7 billion parameters, (24 h^2 + 4 p h) l / (2 H L) of a
# tile of p = 576 patches, h = 1024, l = 24, H = 4096, L = 32.
VISION_COST = 2_500.0


AT_A_TIME = 64  # samples that are looked at together


class Measured(NamedTuple):
    """What packing asks of samples that can be packed.

    Attributes:
        kept: which ones these are, as indices into all.
        lengths: of each, in positions, not aligned.
        trained: how many tokens of each are trained.
        tiles: how many images each has, or tiles where images have several.
        patches: how many positions its images become, or patches where those are counted.
        left_out: what samples have that is in no row, by name, and how many have it.
    """

    kept: list[int]
    lengths: list[int]
    trained: list[int]
    tiles: list[int]
    patches: list[int]
    left_out: Counter


@dataclass(frozen=True, kw_only=True)
class Packer:
    """The settings of ``pack``, which explains them, to pack with again and again."""

    spec: RowSpec
    capacity: int | None = None
    algorithm: str = "fullest"
    family: str | Family | None = None
    columns: Mapping | None = None
    forms: Mapping[str, Form] | None = None
    on_refused: str = "report"
    refuse_untrained: bool = False
    loss_weights: str = "token"
    num_rows_multiple: int = 1
    fill_rows: str = "split"
    max_sequences: int | None = None
    max_tiles: int | None = None
    keep_order: bool = False
    balance: bool = False
    vision_cost: float = VISION_COST
    seed: int = 0

    def __post_init__(self):
        as_spec(self.spec)
        check_algorithm(self.algorithm)
        as_choice(self.on_refused, "on_refused", ("report", "raise"))
        as_choice(self.loss_weights, "loss_weights", LOSS_WEIGHTS)
        as_choice(self.fill_rows, "fill_rows", ("split", "empty"))
        as_positive(self.num_rows_multiple, "num_rows_multiple")
        for name in ("max_sequences", "max_tiles"):
            if getattr(self, name) is not None:
                as_positive(getattr(self, name), name)
        if not isinstance(self.vision_cost, int | float) or not 0 <= self.vision_cost < inf:
            raise PackingError(f"vision_cost is {self.vision_cost!r}, expected at least 0")
        object.__setattr__(self, "forms", as_forms(self.forms))
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
        _ = self.contents  # refuses a family or columns that there are not

    @cached_property
    def usable(self) -> int:
        """What the aligned lengths of a row may add up to, so that the row fits when padded."""
        return self.capacity // self.spec.total_multiple * self.spec.total_multiple

    @property
    def most_sequences(self) -> int | None:
        """How many samples a row may have: captured layers have room for the tail besides."""
        captured = self.spec.max_sequences
        limits = [self.max_sequences, None if captured is None else captured - 1]
        return min((limit for limit in limits if limit is not None), default=None)

    @cached_property
    def row_spec(self) -> RowSpec:
        """What a row is laid out for: the model, and this capacity."""
        if self.spec.fixed_length is not None:
            return self.spec
        return dataclasses.replace(self.spec, max_length=self.usable)

    @cached_property
    def contents(self) -> Contents:
        """What a row takes of its samples."""
        return Contents.of(self.row_spec, self.family, self.columns)

    def place(self, lengths: Sequence[int]) -> list[list[int]]:
        """Bins of expanded lengths: indices into ``lengths``, which are aligned here."""
        return self._place(lengths, self.balance)

    def place_samples(self, found: Measured) -> list[list[int]]:
        """Bins of samples: indices into ``found.kept``, as many bins as a job takes, unless empty
        rows fill it up."""
        tiles = {}
        if self.max_tiles is not None:
            tiles = {"weights": found.tiles, "max_weight": self.max_tiles}
        costs = {"costs": self.costs(found)} if self.balance else {}
        bins = self._place(found.lengths, self.balance, **tiles, **costs)
        if self.fill_rows == "split":
            split_bins(bins, self.costs(found), -len(bins) % self.num_rows_multiple)
        return bins

    def costs(self, found: Measured) -> list[float]:
        """What each sample costs in attention and in the vision tower, in squared positions."""
        both = zip(found.lengths, found.patches, strict=True)
        return [
            round_up(length, self.spec.seq_multiple) ** 2 + self.vision_cost * patches
            for length, patches in both
        ]

    def _place(self, lengths: Sequence[int], balance: bool, **options) -> list[list[int]]:
        return place(
            [round_up(length, self.spec.seq_multiple) for length in lengths],
            self.usable,
            self.algorithm,
            max_members=self.most_sequences,
            keep_order=self.keep_order,
            balance=balance,
            seed=self.seed,
            **options,
        )

    def num_positions(self, sample: dict) -> int:
        """How many positions a sample becomes, without alignment.

        Raises:
            PackingError: what is wrong with the sample, as ``pack`` would report it.
        """
        found = read(sample, self.contents)
        self._trained([found])
        return found.num_positions

    def measure(
        self, samples: Sequence[dict], refuse: Callable[[int, PackingError], None]
    ) -> Measured:
        """Look at samples; ``refuse`` is told the index of every one that cannot be packed, and
        what is wrong with it."""
        measured, wrong, forms = Measured([], [], [], [], [], Counter()), {}, {}
        for begin in range(0, len(samples), AT_A_TIME):
            parts = {}
            for index in range(begin, min(begin + AT_A_TIME, len(samples))):
                try:
                    parts[index] = read(samples[index], self.contents)
                except PackingError as error:
                    wrong[index] = error
            for index, trained in self._look(parts, wrong).items():
                sample = parts[index]
                forms[index] = sample.forms
                measured.kept.append(index)
                measured.lengths.append(sample.num_positions)
                measured.trained.append(trained)
                measured.tiles.append(sample.num_tiles)
                measured.patches.append(sample.num_patches)
                measured.left_out.update(sample.left_out)
        self._refuse_rare_forms(measured, wrong, forms)
        for index in sorted(wrong):
            refuse(index, wrong[index])
        return measured

    def _refuse_rare_forms(self, measured: Measured, wrong: dict, forms: dict) -> None:
        """Media of a row are one tensor. What most samples have says what it holds, so that one
        strange sample does not refuse all others; or ``forms`` does."""
        wanted = commonest_forms(forms.values()) | self.forms
        for index, found in forms.items():
            try:
                check_forms(found, wanted)
            except PackingError as error:
                wrong[index] = error
        if not wrong:
            return
        kept = [at for at, index in enumerate(measured.kept) if index not in wrong]
        for values in measured[:-1]:
            values[:] = [values[at] for at in kept]

    def _look(self, parts: dict[int, Sample], wrong: dict[int, PackingError]) -> dict[int, int]:
        """How many tokens of each sample are trained; what is wrong with others goes to ``wrong``.

        All are looked at together: one by one only where one of them is wrong.
        """
        try:
            found = dict(zip(parts, self._trained(list(parts.values())), strict=True))
        except PackingError as error:
            if len(parts) == 1:
                wrong |= dict.fromkeys(parts, error)
                return {}
            alone = [self._look({index: part}, wrong) for index, part in parts.items()]
            return {index: trained for one in alone for index, trained in one.items()}
        return found

    def _trained(self, parts: list[Sample]) -> list[int]:
        """How many tokens of each of these are trained, once all that is wrong is refused."""
        if not parts:
            return []
        ids, given = join_tokens(parts)
        trained = look(parts, ids, given, self.contents).trained_per_sample
        if self.refuse_untrained and not all(trained):
            raise UntrainedSample("no token of it is trained: all labels are -100")
        for part in parts:
            self.check_length(part)
        return trained

    def check_length(self, sample: Sample) -> None:
        """Refuse a sample that no row has room for."""
        length = sample.num_positions
        aligned = round_up(length, self.spec.seq_multiple)
        if aligned > self.usable:
            padded = "" if aligned == length else f", {aligned} when aligned"
            raise SampleTooLong(
                f"{length} positions{padded}, but a row has room for {self.usable}; cut it "
                f"(mp.media.truncate) or raise the capacity"
            )

    def pack(self, samples: Sequence[dict] | Iterable[dict]) -> tuple["Rows", Report]:
        """As the function ``pack`` does."""
        if isinstance(samples, Mapping):
            raise PackingError("samples are one mapping, expected a list of samples")
        if isinstance(samples, IterableDataset) or not hasattr(samples, "__getitem__"):
            samples = list(iter(samples))
        refused = []

        def refuse(index: int, error: PackingError) -> None:
            key = key_of(samples[index])
            if self.on_refused == "raise":
                error.args = (f"{name_of(index, key)}: {error}",)
                raise error
            refused.append(Refused(index, key, type(error).__name__, str(error)))

        found = self.measure(samples, refuse)
        placed = self.place_samples(found)
        bins = [[found.kept[i] for i in bin_] for bin_ in placed]
        num_empty = -len(bins) % self.num_rows_multiple if bins else 0
        num_aligned = sum(round_up(length, self.spec.seq_multiple) for length in found.lengths)
        untrained = [i for i, trained in zip(found.kept, found.trained, strict=True) if not trained]
        capacity = self.capacity
        if capacity == INT32_MAX:  # no limit: one row, as long as it needs to be
            capacity = round_up(num_aligned, self.spec.total_multiple)
        report = Report(
            num_samples=len(samples),
            num_rows=len(bins) + num_empty,
            capacity=capacity,
            num_real=sum(found.lengths),
            num_aligned=num_aligned,
            refused=tuple(refused),
            left_out=dict(found.left_out),
            untrained=tuple((index, key_of(samples[index])) for index in untrained),
            num_empty=num_empty,
            imbalance=self._imbalance(found, placed),
        )
        scale = scale_of(self.loss_weights, found.trained)
        return Rows(self, samples, bins, scale, num_empty), report

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

    def _imbalance(self, found: Measured, placed: list[list[int]]) -> tuple[float, float] | None:
        if not self.balance or not placed:
            return None
        costs, before = self.costs(found), self._place(found.lengths, balance=False)
        return imbalance_of(before, costs), imbalance_of(placed, costs)

    def join(
        self,
        samples: Sequence[dict],
        indices: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Row:
        """One row of these samples, in this order.

        Args:
            samples: dicts, as ``pack`` takes them.
            indices: which samples these are; by default counted from 0.
            scale: of the loss weights, as ``pack`` found it over all its samples; by default the
                mean weight of this row's trained tokens is 1.

        Raises:
            PackingError: they do not fit, or what is wrong with one.
        """
        parts = [read(sample, self.contents) for sample in samples]
        for part in parts:
            self.check_length(part)
        kind, weigh = self.loss_weights, None
        if kind != "token":

            def weigh(trained: list[int]) -> list[float]:
                by = scale_of(kind, trained) if scale is None else scale
                return [by * weight_of(kind, number) for number in trained]

        return join(parts, self.contents, indices, weigh)


class Rows(Sequence):
    """Packed rows, each made when it is asked for: of a list of samples, or of a map-style dataset.

    It is a map-style dataset itself: ``DataLoader(rows, batch_size=None)`` makes rows in workers.

    Attributes:
        bins: the samples of each row, as indices into what was packed; at the end a bin without any
            for each row that only fills up a job.
        scale: of the loss weights.
    """

    def __init__(
        self,
        packer: Packer,
        samples: Sequence[dict],
        bins: list[list[int]],
        scale: float = 1.0,
        num_empty: int = 0,
    ):
        self.packer, self.samples, self.scale = packer, samples, scale
        self._stand_in = min(bins, key=len) if bins else []  # what an empty row is made of
        self.bins = [*bins, *([] for _ in range(num_empty))]

    def __len__(self) -> int:
        return len(self.bins)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            rows = Rows(self.packer, self.samples, self.bins[index], self.scale)
            rows._stand_in = self._stand_in
            return rows
        members = self.bins[index]
        if members:
            return self.packer.join([self.samples[i] for i in members], members, self.scale)
        stand_in = [self.samples[i] for i in self._stand_in]
        return without_training(self.packer.join(stand_in))


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
    family: str | Family | None = None,
    columns: Mapping | None = None,
    forms: Mapping[str, Form] | None = None,
    on_refused: str = "report",
    refuse_untrained: bool = False,
    loss_weights: str = "token",
    num_rows_multiple: int = 1,
    fill_rows: str = "split",
    max_sequences: int | None = None,
    max_tiles: int | None = None,
    keep_order: bool = False,
    balance: bool = False,
    vision_cost: float = VISION_COST,
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
    - ``attention_mask``: ``[t]``, optional: zeros at either end are padding, and are left out.
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
        family: whose processor made the samples, where the model does not expand images.
        columns: ``{name: mp.data.Column}`` of what samples have for each token, or of what such a
            column is filled with.
        forms: ``{"images": (dtype, shape of a tile)}``: what rows take. By default what most of
            these samples have.
        on_refused: "report" leaves out a sample that cannot be packed and reports it, "raise"
            raises its error.
        refuse_untrained: whether to refuse samples without a trained token too; by default they are
            packed, and ``report.untrained`` names them.
        loss_weights: "token" counts each trained token alike, "sample" each sample, "square" a
            token ``1 / sqrt(n)`` of a sample with ``n``, as InternVL does. Scaled so that the mean
            weight of all tokens trained here is 1; ``mp.data.loss_func`` divides as that needs.
        num_rows_multiple: rows that a job takes at a time: data-parallel size times micro-batches.
        fill_rows: how the rows become as many: "split" divides those that cost most, "empty" adds
            rows of which nothing is trained.
        max_sequences: how many samples a row may have.
        max_tiles: how many tiles (images, where their patches are counted) a row may have.
        balance: place samples anew, so that rows cost about the same in attention and in the vision
            tower; ``algorithms.place`` says at which price. ``report.imbalance`` has the result.
        vision_cost: what a patch costs in the vision tower, in squared positions of attention.
        keep_order, seed: as ``algorithms.place`` has them.

    Returns:
        The rows, and a report. Every sample is in exactly one of both.

    Raises:
        PackingError: options that contradict each other; with ``on_refused="raise"`` also a sample
            that is empty (``EmptySample``), too long (``SampleTooLong``), whose placeholders and
            images differ in number (``PlaceholderMismatch``), or that is malformed.
        TypeError: an unknown option; no ``spec.img_seq_len`` where it is needed.

    Example:
        >>> import torch
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
    packer = get_packer(
        algorithm, spec, capacity, family=family, columns=columns, forms=forms,
        on_refused=on_refused, refuse_untrained=refuse_untrained, loss_weights=loss_weights,
        num_rows_multiple=num_rows_multiple, fill_rows=fill_rows, max_sequences=max_sequences,
        max_tiles=max_tiles, keep_order=keep_order, balance=balance, vision_cost=vision_cost,
        seed=seed,
    )  # fmt: skip
    return packer.pack(samples)


def get_packer(algorithm: str, spec: RowSpec, capacity: int | None = None, **options) -> Packer:
    """A packer with the options of ``pack``, for streams and for lengths alone.

    Example:
        >>> import torch
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
