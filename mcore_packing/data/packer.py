"""Many samples into rows: which go together, and what becomes of those that fit nowhere."""

import copy
import dataclasses
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple, NoReturn, overload

from torch.utils.data import Dataset, IterableDataset

from ..context_parallel import check_rank
from ..errors import INT32_MAX, PackingError
from ..inputs import as_choice, as_int, as_positive, refuse_old
from ..media.families import Family
from ..spec import RowSpec, as_spec, round_up
from .algorithms import check_algorithm, imbalance_of, place, split_bins
from .cutting import cut
from .media import Form, as_forms, check_forms, commonest_forms
from .report import Refused, Report, Truncated, key_of, name_of
from .rows import Row, join, join_tokens, without_training
from .samples import (
    Contents,
    EmptySample,
    Length,
    Sample,
    SampleTooLong,
    UntrainedSample,
    as_lengths,
    look,
    read,
)
from .weights import LOSS_WEIGHTS, scale_of, weight_of

logger = logging.getLogger(__name__)

# What a patch costs in the vision tower, in squared positions, which is what attention costs in the
# language model: ViT-L beside a model of 7 billion parameters, (24 h^2 + 4 p h) l / (2 H L) of a
# tile of p = 576 patches, h = 1024, l = 24, H = 4096, L = 32.
VISION_COST = 2_500.0


AT_A_TIME = 64  # samples that are looked at together
MANY = 10_000  # samples that take so long that progress is shown


class Measured(NamedTuple):
    """What packing asks of samples that can be packed.

    Attributes:
        kept: which ones these are, as indices into all.
        keys: of each, its ``__key__``.
        lengths: of each, in positions, not aligned.
        trained: how many tokens of each are trained, None where nobody said.
        tiles: how many images each has, or tiles where images have several.
        patches: how many positions its images become, or patches where those are counted.
        left_out: what samples have that is in no row, by name, and how many have it.
        truncated: those that were cut to fit, by index.
    """

    kept: list[int]
    keys: list[str | None]
    lengths: list[int]
    trained: list[int | None]
    tiles: list[int]
    patches: list[int]
    left_out: Counter
    truncated: dict[int, Truncated]

    @classmethod
    def nothing(cls) -> "Measured":
        """Of no sample yet."""
        return cls([], [], [], [], [], [], Counter(), {})

    def add(self, index: int, key: str | None, length: Length) -> None:
        """One more that can be packed."""
        self.kept.append(index)
        self.keys.append(key)
        self.lengths.append(length.positions)
        self.trained.append(length.trained)
        self.tiles.append(length.tiles or 0)
        self.patches.append(length.patches or 0)

    def drop(self, wrong: Mapping) -> None:
        """Without those."""
        stays = [at for at, index in enumerate(self.kept) if index not in wrong]
        for values in self[:6]:
            values[:] = [values[at] for at in stays]
        for index in self.truncated.keys() & wrong.keys():
            del self.truncated[index]


Refuse = Callable[[int, str | None, PackingError], None]


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
    on_too_long: str = "refuse"
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
    progress: bool = True

    def __post_init__(self):
        as_spec(self.spec)
        check_algorithm(self.algorithm)
        as_choice(self.on_refused, "on_refused", ("report", "raise"))
        as_choice(self.on_too_long, "on_too_long", ("refuse", "truncate"))
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
        """How many positions a sample takes in a row, without alignment.

        Raises:
            PackingError: what is wrong with the sample, as ``pack`` would report it.
        """
        part, _ = self._fit(sample, read(sample, self.contents))
        self._trained([part])
        return part.num_positions

    def length(self, sample: dict) -> Length:
        """How long a sample is: one entry of what ``pack`` takes as ``lengths``.

        Raises:
            PackingError: what is wrong with the sample, as ``pack`` would report it; but how long
                it is, and whether any of it is trained, is asked when it is packed.
        """
        found = read(sample, self.contents)
        return found.length(self._look_at([found])[0])

    def measure(self, samples: Sequence[dict], refuse: Refuse, progress: bool = False) -> Measured:
        """Look at samples; ``refuse`` is told the index and key of every one that cannot be packed,
        and what is wrong with it."""
        measured, keys, wrong, forms = Measured.nothing(), {}, {}, {}
        for indices in _in_parts(len(samples), progress):
            parts = {}
            for index in indices:
                sample = samples[index]
                keys[index] = key_of(sample)
                try:
                    part, gone = self._fit(sample, read(sample, self.contents))
                except PackingError as error:
                    wrong[index] = error
                    continue
                parts[index] = part
                if gone is not None:
                    measured.truncated[index] = Truncated(index, keys[index], *gone)
            for index, trained in self._look(parts, wrong).items():
                sample = parts[index]
                forms[index] = sample.forms
                measured.add(index, keys[index], sample.length(trained))
                measured.left_out.update(sample.left_out)
        self._refuse_rare_forms(wrong, forms)
        if wrong:
            measured.drop(wrong)
        for index in sorted(wrong):
            refuse(index, keys[index], wrong[index])
        return measured

    def measure_said(
        self, samples: Sequence[dict], lengths: Sequence[Length], refuse: Refuse
    ) -> Measured:
        """The same, by what is said of samples: only those that have to be cut are looked at."""
        measured = Measured.nothing()
        for index, length in enumerate(lengths):
            key = gone = None
            try:
                if not length.positions:
                    raise EmptySample("lengths say that it has no position")
                if not self._fits(length.positions):
                    if self.on_too_long == "refuse":
                        raise self._too_long(length.positions)
                    sample = samples[index]
                    key = key_of(sample)
                    part, gone = self._fit(sample, read(sample, self.contents), length)
                    length = part.length(*self._trained([part]))
                if self.refuse_untrained and not length.trained:
                    raise _untrained()
            except PackingError as error:
                refuse(index, key, error)
                continue
            if gone is not None:
                measured.truncated[index] = Truncated(index, key, *gone)
            measured.add(index, key, length)
        return measured

    def _refuse_rare_forms(self, wrong: dict, forms: dict) -> None:
        """Media of a row are one tensor. What most samples have says what it holds, so that one
        strange sample does not refuse all others; or ``forms`` does."""
        wanted = commonest_forms(forms.values()) | self.forms
        for index, found in forms.items():
            try:
                check_forms(found, wanted)
            except PackingError as error:
                wrong[index] = error

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
        trained = self._look_at(parts) if parts else []
        if self.refuse_untrained and not all(trained):
            raise _untrained()
        for part in parts:
            self.check_length(part)
        return trained

    def _look_at(self, parts: list[Sample]) -> list[int]:
        """The same, however long they are, and whether any is."""
        ids, given = join_tokens(parts)
        return look(parts, ids, given, self.contents).trained_per_sample

    def _fit(
        self, sample: dict, found: Sample, said: Length | None = None
    ) -> tuple[Sample, tuple[int, int, int] | None]:
        """A sample that was read, cut where it has to be, and how many tokens, trained tokens and
        images are gone then. Where it is too long and is not cut, it is as it was.

        Raises:
            PackingError: what is wrong with one that has to be cut.
            WrongLength: it is not as it was said.
        """
        if said is not None:
            said.check(found.length())
        if self.on_too_long == "refuse" or self._fits(found.num_positions):
            return found, None
        (before,) = self._look_at([found])
        if said is not None:
            said.check(found.length(before))
        left, images = cut(sample, found, self.contents, self.usable)
        part = read(left, self.contents)
        (after,) = self._look_at([part])
        return part, (found.member.num_tokens - part.member.num_tokens, before - after, images)

    def _fits(self, num_positions: int) -> bool:
        return round_up(num_positions, self.spec.seq_multiple) <= self.usable

    def check_length(self, sample: Sample) -> None:
        """Refuse a sample that no row has room for."""
        if not self._fits(sample.num_positions):
            raise self._too_long(sample.num_positions)

    def _too_long(self, length: int) -> SampleTooLong:
        aligned = round_up(length, self.spec.seq_multiple)
        padded = "" if aligned == length else f", {aligned} when aligned"
        longest = self.spec.longest
        can_grow = longest is None or aligned <= longest
        before = "space='collapsed'" if self.spec.expands else "family="
        return SampleTooLong(
            f"{length} positions{padded}, but a row has room for {self.usable}; have it cut "
            f"(on_too_long='truncate', or mp.media.truncate({before}) before)"
            + (", or raise the capacity" if can_grow else "")
        )

    def pack(
        self, samples: Sequence[dict] | Iterable[dict] | Dataset, lengths: Sequence | None = None
    ) -> tuple["Rows", Report]:
        """As the function ``pack`` does."""
        if isinstance(samples, Mapping):
            raise PackingError("samples are one mapping, expected a list of samples")
        is_stream = isinstance(samples, IterableDataset) or not hasattr(samples, "__getitem__")
        if lengths is not None:
            if is_stream:
                raise PackingError("lengths are of a list or a map-style dataset, not of a stream")
            lengths = as_lengths(lengths, len(samples))
            self._check_said(lengths)
        if is_stream:
            samples = list(iter(samples))
        refused = []

        def refuse(index: int, key: str | None, error: PackingError) -> None:
            if self.on_refused == "raise":
                raise _named(error, index, key)
            refused.append(Refused(index, key, type(error).__name__, str(error)))

        if lengths is None:
            found = self.measure(samples, refuse, self.progress)
        else:
            found = self.measure_said(samples, lengths, refuse)
        placed = self.place_samples(found)
        bins = [[found.kept[i] for i in bin_] for bin_ in placed]
        num_empty = -len(bins) % self.num_rows_multiple if bins else 0
        num_aligned = sum(round_up(length, self.spec.seq_multiple) for length in found.lengths)
        known = zip(found.kept, found.keys, found.trained, strict=True)
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
            untrained=tuple((index, key) for index, key, trained in known if trained == 0),
            num_empty=num_empty,
            imbalance=self._imbalance(found, placed),
            truncated=tuple(found.truncated.values()),
        )
        if refused and not bins:
            causes = ", ".join(f"{count:,} {cause}" for cause, count in report.causes.items())
            warnings.warn(
                f"mcore_packing: all {len(refused):,} samples were refused ({causes}), so there is "
                f"no row; {refused[0]}",
                stacklevel=3,
            )
        if report.truncated:
            logger.warning("%s (on_too_long='truncate')", report.say_cut())
        scale = scale_of(self.loss_weights, found.trained)
        return Rows(self, samples, bins, scale, num_empty, lengths), report

    def _check_said(self, lengths: Sequence[Length]) -> None:
        """Refuse lengths that do not say what these settings ask for."""
        asks = {
            "trained": self.refuse_untrained or self.loss_weights != "token",
            "tiles": self.max_tiles is not None,
            "patches": self.balance and self.vision_cost > 0,
        }
        why = {
            "trained": "loss_weights and refuse_untrained count trained tokens",
            "tiles": "max_tiles counts tiles",
            "patches": "balance counts patches, unless vision_cost is 0",
        }
        for name, asked in asks.items():
            for index, length in enumerate(lengths if asked else ()):
                if getattr(length, name) is None:
                    raise PackingError(
                        f"lengths[{index}] does not say {name}, but {why[name]}: give what "
                        f"packer.length(sample) does, mp.data.Length({', '.join(Length._fields)})"
                    )

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
        lengths: Sequence[Length] | None = None,
        vision_share: tuple[int, int] | None = None,
    ) -> Row:
        """One row of these samples, in this order.

        Args:
            samples: dicts, as ``pack`` takes them.
            indices: which samples these are; by default counted from 0. An error names them.
            scale: of the loss weights, as ``pack`` found it over all its samples; by default the
                mean weight of this row's trained tokens is 1.
            lengths: what was said of each.
            vision_share: as ``Rows.shard_vision`` takes it, to hold that rank's tiles only.

        Raises:
            PackingError: they do not fit, or what is wrong with one.
            WrongLength: one is not as long as it was said.
        """
        parts, said, is_cut = [], lengths or [None] * len(samples), []
        for at, sample in enumerate(samples):
            try:
                part, gone = self._fit(sample, read(sample, self.contents), said[at])
                self.check_length(part)
            except PackingError as error:
                raise _named_of(error, indices, at, sample) from error.__cause__
            parts.append(part)
            is_cut.append(gone is not None)
        kind = self.loss_weights

        def weigh(trained: list[int]) -> list[float]:
            for at, number in enumerate(trained):
                if said[at] is not None and not is_cut[at]:
                    try:
                        said[at].check(Length(said[at].positions, number))
                    except PackingError as error:
                        raise _named_of(error, indices, at, samples[at]) from None
            by = scale_of(kind, trained) if scale is None else scale
            return [by * weight_of(kind, number) for number in trained]

        counts = kind != "token" or any(one and one.trained is not None for one in said)
        try:
            return join(parts, self.contents, indices, weigh if counts else None, vision_share)
        except PackingError as error:
            raise self._blame(error, parts, indices, samples) from None

    def _blame(self, error: PackingError, parts: list[Sample], indices, samples) -> PackingError:
        """The error of the sample that is wrong by itself, where one is."""
        for at, part in enumerate(parts):
            try:
                self._look_at([part])
            except PackingError as own:
                return _named_of(own, indices, at, samples[at])
        return error


class Rows(Dataset[Row], Sequence[Row]):
    """Packed rows, each made when it is asked for: of a list of samples, or of a map-style dataset.

    It is a map-style dataset itself: ``DataLoader(rows, batch_size=None)`` makes rows in workers.

    Attributes:
        bins: the samples of each row, as indices into what was packed; at the end a bin without any
            for each row that only fills up a job.
        scale: of the loss weights.
        lengths: what was said of each sample, None where it was looked at.
        vision_share: the context-parallel rank, and of how many, whose tiles alone rows hold.
    """

    def __init__(
        self,
        packer: Packer,
        samples: Sequence[dict],
        bins: list[list[int]],
        scale: float = 1.0,
        num_empty: int = 0,
        lengths: Sequence[Length] | None = None,
    ):
        self.packer, self.samples, self.scale, self.lengths = packer, samples, scale, lengths
        self._stand_in = min(bins, key=len) if bins else []  # what an empty row is made of
        self.bins = [*bins, *([] for _ in range(num_empty))]
        self.vision_share: tuple[int, int] | None = None

    def shard_vision(self, cp_rank: int, cp_size: int) -> "Rows":
        """The same rows with the tiles of one context-parallel rank only.

        For a model that shares its vision tower (``vision_dp_over_cp`` of ``mp.install``): a rank's
        tiles are all that it decodes, keeps and copies to the GPU. Where ``images`` of a sample are
        a callable, from tiles ``list[int]`` to a tensor ``[tiles, 3, h, w]``, it is called for
        those; ``num_image_tiles`` then says how many the sample has.

        Args:
            cp_rank: ``parallel_state.get_context_parallel_rank()``.
            cp_size: context-parallel size, that of the spec.

        Raises:
            PackingError: a rank that there is not, or another size.
        """
        check_rank(cp_size, cp_rank)
        if cp_size != self.packer.spec.cp_size:
            raise PackingError(
                f"cp_size is {cp_size}, but rows are packed for {self.packer.spec.cp_size} "
                f"context-parallel ranks: see mp.row_spec"
            )
        rows = copy.copy(self)
        rows.vision_share = (cp_rank, cp_size) if cp_size > 1 else None
        return rows

    def __len__(self) -> int:
        return len(self.bins)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            rows = Rows(
                self.packer, self.samples, self.bins[index], self.scale, lengths=self.lengths
            )
            rows._stand_in, rows.vision_share = self._stand_in, self.vision_share
            return rows
        members = self.bins[index]
        return self._join(members) if members else without_training(self._join(self._stand_in))

    def _join(self, members: list[int]) -> Row:
        samples = [self.samples[i] for i in members]
        said = None if self.lengths is None else [self.lengths[i] for i in members]
        return self.packer.join(samples, members, self.scale, said, self.vision_share)

    def __repr__(self) -> str:
        number, empty = sum(map(len, self.bins)), self.bins.count([])
        filled = f", {empty:,} of them empty" if empty else ""
        capacity = self.packer.capacity
        limit = "" if capacity == INT32_MAX else f" of at most {capacity:,} positions"
        return f"Rows({len(self):,} rows{limit}{filled}, with {number:,} samples)"


def _untrained() -> UntrainedSample:
    return UntrainedSample("no token of it is trained: all labels are -100")


def _named(error: PackingError, index: int, key: str | None) -> PackingError:
    """The same error, which says first of which sample it is."""
    error.args = (f"{name_of(index, key)}: {error}",)
    return error


def _named_of(error: PackingError, indices, at: int, sample) -> PackingError:
    """The same, where it is known which samples a row is made of."""
    return error if indices is None else _named(error, indices[at], key_of(sample))


def _in_parts(number: int, progress: bool) -> Iterator[range]:
    """Indices of samples, a few at a time, beside a progress bar where they are many."""
    bar = None
    if progress and number > MANY:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:  # a log gets a line now and then
            often = 0.1 if sys.stderr.isatty() else 30
            bar = tqdm(total=number, desc="packing", unit=" samples", mininterval=often)
    for begin in range(0, number, AT_A_TIME):
        part = range(begin, min(begin + AT_A_TIME, number))
        yield part
        if bar is not None:
            bar.update(len(part))
    if bar is not None:
        bar.close()


_RENAMED = dict.fromkeys(
    ("image_token_id", "img_seq_len", "seq_multiple", "total_multiple", "num_padded_rows",
     "max_expanded", "space", "on_overflow"),
    "spec=mp.row_spec(model), or mp.RowSpec(...), says it",
)  # fmt: skip


def pack(
    samples: Sequence[dict] | Iterable[dict] | Dataset,
    spec: RowSpec,
    capacity: int | None = None,
    algorithm: str = "fullest",
    *,
    family: str | Family | None = None,
    columns: Mapping | None = None,
    forms: Mapping[str, Form] | None = None,
    lengths: Sequence | None = None,
    on_refused: str = "report",
    on_too_long: str = "refuse",
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
    progress: bool = True,
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
        lengths: how long each sample is, so that none is read before its row is made: positions,
            or ``mp.data.Length`` with what else these settings ask for, as ``Packer.length`` says
            it. A sample that is not as it was said is an error when its row is made.
        on_refused: "report" leaves out a sample that cannot be packed and reports it, "raise"
            raises its error.
        on_too_long: "refuse" does that with a sample that no row has room for; "truncate" cuts off
            its end, but never inside an image. ``report.truncated`` and a warning in the log count
            what is gone.
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
        progress: whether to show a bar while more than 10,000 samples are looked at, where tqdm is
            installed.

    Returns:
        The rows, and a report. Every sample is in exactly one of both.

    Warns:
        UserWarning: all samples were refused.

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
        on_refused=on_refused, on_too_long=on_too_long, refuse_untrained=refuse_untrained,
        loss_weights=loss_weights, num_rows_multiple=num_rows_multiple, fill_rows=fill_rows,
        max_sequences=max_sequences, max_tiles=max_tiles, keep_order=keep_order, balance=balance,
        vision_cost=vision_cost, seed=seed, progress=progress,
    )  # fmt: skip
    return packer.pack(samples, lengths)


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
