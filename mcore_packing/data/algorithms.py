"""Lengths into bins of one capacity, by algorithms that have NeMo-RL's names where it has them.

A bin is a list of indices into the lengths. Nothing here knows tokens, images or torch.
"""

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import inf
from sys import maxsize

from ..errors import PackingError

Bins = list[list[int]]


def place(
    lengths: Sequence[int],
    capacity: int,
    algorithm: str = "fullest",
    *,
    keep_order: bool = False,
    balance: bool = False,
    seed: int = 0,
    costs: Sequence[float] | None = None,
    max_members: int | None = None,
    weights: Sequence[int] | None = None,
    max_weight: int | None = None,
) -> Bins:
    """Put every length into a bin.

    Args:
        lengths: positive ints.
        capacity: what the lengths of one bin may add up to.
        algorithm: one of ``ALGORITHMS``, or of ``ALIASES``.
        keep_order: give bins in the order in which their longest members arrived, and members in
            the order in which they arrived. Otherwise the algorithms that take the longest first
            also give the bins of the longest first. The bins themselves are the same.
        balance: place the lengths anew, so that the costs of the bins are close to each other.
            There may be more bins, since what costs the same need not fit: hardly any where many
            lengths are short, up to a sixth more where none are (docs/data.md).
        seed: of ``first_fit_shuffle``.
        costs: what each length adds to the cost of its bin, for ``balance``; by default its
            square, which is what attention costs.
        max_members: how many lengths a bin may hold.
        weights: a second measure of each length, at least 0, such as its image tiles. There is a
            search for each different weight, so these should be few.
        max_weight: what the weights of one bin may add up to.

    Returns:
        The bins; every index is in exactly one of them.

    Raises:
        PackingError: an unknown algorithm, a length or weight that no bin holds, or arguments that
            do not belong together.

    Example:
        >>> place([5, 5, 3, 3, 2], capacity=8, algorithm="concatenative")
        [[0], [1, 2], [3, 4]]
        >>> place([5, 5, 3, 3, 2], capacity=8, algorithm="first_fit_decreasing")
        [[0, 2], [1, 3], [4]]
        >>> place([5, 5, 3, 3, 2], capacity=8, weights=[1, 0, 1, 0, 0], max_weight=1)
        [[0, 3], [1, 2], [4]]
        >>> place([3, 1, 1, 3], capacity=6, algorithm="concatenative", balance=True)
        [[0, 1], [3, 2]]
    """
    algorithm = check_algorithm(algorithm)
    if costs is not None and not balance:
        raise PackingError("costs are what balance=True looks at, but balance is False")
    task = _task(lengths, capacity, max_members, weights, max_weight)
    bins = ALGORITHMS[algorithm](task, seed)
    if balance:
        bins = _balanced(task, costs, len(bins))
    if keep_order:
        longest = task.lengths.__getitem__
        bins = sorted(map(sorted, bins), key=lambda bin_: max(bin_, key=longest))
    return bins


def split_bins(bins: Bins, costs: Sequence[float], number: int) -> None:
    """Divide the bins that cost most, in place, until there are ``number`` more.

    Raises:
        PackingError: there are not enough members for so many.
    """
    queue = [(-sum(costs[i] for i in bin_), at) for at, bin_ in enumerate(bins) if len(bin_) > 1]
    heapify(queue)
    for missing in range(number, 0, -1):
        if not queue:
            raise PackingError(
                f"{sum(map(len, bins))} samples are {missing} too few to fill up the rows of a "
                f"job: pack more at a time, or fill_rows='empty'"
            )
        _, at = heappop(queue)
        halves = [[], []]
        sums = [0.0, 0.0]
        for index in sorted(bins[at], key=costs.__getitem__, reverse=True):
            half = int(sums[1] < sums[0]) if halves[0] else 0
            halves[half].append(index)
            sums[half] += costs[index]
        bins[at] = halves[0]
        bins.append(halves[1])
        for place_, half in ((at, 0), (len(bins) - 1, 1)):
            if len(halves[half]) > 1:
                heappush(queue, (-sums[half], place_))


def imbalance_of(bins: Bins, costs: Sequence[float]) -> float:
    """How much more the bin that costs most does than the mean: 0 is none."""
    sums = [sum(costs[i] for i in bin_) for bin_ in bins]
    mean = sum(sums) / len(sums)
    return max(sums) / mean - 1 if mean else 0.0


def check_algorithm(name: str) -> str:
    """The one of ``ALGORITHMS`` that ``name`` stands for.

    Raises:
        PackingError: there is none; of what was here once, it says what to use.
    """
    if isinstance(name, str):
        name = ALIASES.get(name, name)
        if name in ALGORITHMS:
            return name
    instead = ""
    if name in ("best_fit", "best_fit_decreasing"):
        instead = ": 'fullest' has taken its place"
    raise PackingError(f"algorithm is {name!r}, expected one of {', '.join(ALGORITHMS)}{instead}")


@dataclass(frozen=True)
class _Task:
    """What to put into bins, and how much of it one bin holds."""

    lengths: list[int]
    capacity: int
    max_members: int
    weights: list[int]
    max_weight: int


def _task(lengths, capacity: int, max_members, weights, max_weight) -> _Task:
    """The arguments of ``place``, checked; a limit that is None is one that no bin reaches."""
    lengths = list(map(int, lengths))  # of an array or tensor too
    _check("length", lengths, 1, capacity, "capacity")
    if max_members is None:
        max_members = len(lengths)
    elif type(max_members) is not int or max_members < 1:
        raise PackingError(f"max_members is {max_members!r}, expected a positive int")
    if (weights is None) != (max_weight is None):
        raise PackingError("weights and max_weight belong together: give both, or none")
    if weights is None:
        return _Task(lengths, capacity, max_members, [0] * len(lengths), 0)
    weights = list(map(int, weights))
    if len(weights) != len(lengths):
        raise PackingError(f"there are {len(weights)} weights, but {len(lengths)} lengths")
    _check("weight", weights, 0, max_weight, "max_weight")
    return _Task(lengths, capacity, max_members, weights, max_weight)


def _check(what: str, values: list[int], least: int, most: int, limit: str) -> None:
    if values and not least <= min(values) <= max(values) <= most:
        wrong = next(i for i, value in enumerate(values) if not least <= value <= most)
        raise PackingError(
            f"{what} {wrong} is {values[wrong]}, expected {least} to {most}, the {limit} of a bin"
        )


def _concatenative(task: _Task) -> Bins:
    """One bin at a time, in the order of arrival."""
    bins, room, slots, spare = [], 0, 0, 0
    for index, (length, weight) in enumerate(zip(task.lengths, task.weights, strict=True)):
        if length > room or weight > spare or not slots:
            bins.append([])
            room, slots, spare = task.capacity, task.max_members, task.max_weight
        bins[-1].append(index)
        room -= length
        slots -= 1
        spare -= weight
    return bins


class _ByArrival:
    """A line in the order of arrival: a tree knows the shortest one left below each node.

    Each place has a length, and a rank that compares it with those of other lines. Behind the last
    place is one that stands for none, and its rank is ``maxsize``.
    """

    def __init__(self, indices: Sequence[int], lengths: list[int]):
        self.ranks = [*indices, maxsize]
        self.lengths = [lengths[index] for index in indices]
        self.leaves = 1 << len(indices).bit_length()
        gone = [maxsize] * (self.leaves - len(indices))  # no room is as large
        self.tree = level = self.lengths + gone
        while len(level) > 1:
            level = list(map(min, level[::2], level[1::2]))
            self.tree = level + self.tree
        self.tree.insert(0, 0)  # the root is 1, and below a node are twice it and the one behind

    def first(self, most: int) -> int:
        """The first place whose length is at most ``most``."""
        tree, leaves, node = self.tree, self.leaves, 1
        if tree[1] > most:
            return len(self.lengths)
        while node < leaves:
            node *= 2
            if tree[node] > most:
                node += 1
        return node - leaves

    def take(self, place: int, most: int) -> list[int]:
        """The index at a place, which is gone from here on."""
        tree, node = self.tree, place + self.leaves
        tree[node] = least = maxsize
        while node > 1:
            other = tree[node ^ 1]
            node //= 2
            if other < least:
                least = other
            if tree[node] == least:
                break
            tree[node] = least
        return [self.ranks[place]]


class _ByLength:
    """A line of the longest first, where all of one length share a place, in order of arrival.

    It offers what ``_ByArrival`` does. A place that is empty points onwards.
    """

    def __init__(self, indices: Sequence[int], lengths: list[int]):
        stacks = defaultdict(list)
        for index in reversed(indices):
            stacks[lengths[index]].append(index)
        self.lengths = sorted(stacks, reverse=True)
        self.stacks = [stacks[length] for length in self.lengths]
        self.ranks = [*(-length for length in self.lengths), maxsize]
        self.onwards = list(range(len(self.ranks)))

    def first(self, most: int) -> int:
        onwards = self.onwards
        place = bisect_left(self.ranks, -most)
        while (after := onwards[place]) != place:
            onwards[place] = place = onwards[after]  # the way is half as long next time
        return place

    def take(self, place: int, most: int) -> list[int]:
        """Up to ``most`` indices of a place, which are gone from here on."""
        stack = self.stacks[place]
        taken = stack[: -most - 1 : -1]
        del stack[-most:]
        if not stack:
            self.onwards[place] = place + 1
        return taken


def _fill(task: _Task, line_type: type, even: bool = False) -> Bins:
    """One bin after the other, each with the first in line that fits it, until none does.

    These are the bins of first fit, since a bin has no use later for what it once passed over.

    Args:
        line_type: what the lengths wait in, one line for each weight, the heaviest first.
        even: only what fits an even share of the room is taken, among as many as would fill it if
            they had the mean length of those that wait, rounded up from three quarters. So the
            long go with the short, and the last one fills what is left.
    """
    by_weight = defaultdict(list)
    for index, weight in enumerate(task.weights):
        by_weight[weight].append(index)
    lines = [
        (weight, line_type(by_weight[weight], task.lengths))
        for weight in sorted(by_weight, reverse=True)
    ]
    one_by_one = even or line_type is _ByArrival
    bins, left, total = [], len(task.lengths), sum(task.lengths)
    while left:
        bin_, share = [], 1
        room, slots, spare = task.capacity, task.max_members, task.max_weight
        while share and slots and room:
            best, most = maxsize, room // share
            for weight, line in lines:
                if weight <= spare:
                    place = line.first(most)
                    if line.ranks[place] < best:
                        best = line.ranks[place]
                        from_weight, from_line, from_place = weight, line, place
            if best == maxsize:
                share -= 1
                continue
            length, count = from_line.lengths[from_place], 1
            if not one_by_one:
                by_spare = spare // from_weight if from_weight else slots
                count = min(slots, room // length, by_spare)
            taken = from_line.take(from_place, count)
            bin_ += taken
            count = len(taken)
            room -= count * length
            slots -= count
            spare -= count * from_weight
            left -= count
            if even:
                total -= length
                share = left and max(1, min(slots, (4 * room * left + total) // (4 * total)))
        bins.append(bin_)
    return bins


def _first_fit_shuffle(task: _Task, seed: int) -> Bins:
    order = list(range(len(task.lengths)))
    random.Random(seed).shuffle(order)
    lengths = [task.lengths[index] for index in order]
    weights = [task.weights[index] for index in order]
    bins = _fill(replace(task, lengths=lengths, weights=weights), _ByArrival)
    for bin_ in bins:
        bin_[:] = [order[place] for place in bin_]
    return bins


def _fullest(task: _Task) -> Bins:
    """First fit of the longest first, or even shares where those need fewer bins.

    Where nothing is short, as with an image in every sample, first fit puts the long with the long
    and in the end the short with the short, and neither may fill a bin; even shares do. Where short
    ones are there to fill what the long leave, first fit makes more of them.
    """
    bins = _fill(task, _ByLength)
    if len(bins) == -(-sum(task.lengths) // task.capacity):
        return bins  # nothing needs fewer
    return min(bins, _fill(task, _ByLength, even=True), key=len)


def _balanced(task: _Task, costs: Sequence[float] | None, num_bins: int) -> Bins:
    """The lengths spread over as many bins, or over some more where they do not fit."""
    if costs is None:
        costs = [length * length for length in task.lengths]
    costs = list(map(float, costs))
    if len(costs) != len(task.lengths) or not all(0 <= cost < inf for cost in costs):
        raise PackingError(
            f"there are {len(costs)} costs for {len(task.lengths)} lengths, expected a finite "
            f"number of at least 0 for each"
        )
    bins = _spread(task, costs, num_bins)
    if len(bins) > num_bins + 1:  # half of those, had they been there at once, may be enough
        bins = min(bins, _spread(task, costs, (num_bins + len(bins)) // 2), key=len)
    return bins


def _spread(task: _Task, costs: list[float], num_bins: int) -> Bins:
    """The costliest first, each into the bin of the least cost that it fits, else into a new one.

    Bins wait in a heap by their cost, one for each weight that they have to spare; those that have
    no room for the present length wait by their room until a shorter one comes.
    """
    bins, room, spare = [], [], []
    by_cost, by_room = defaultdict(list), []

    def open_bin() -> tuple[float, int]:
        bins.append([])
        room.append(task.capacity)
        spare.append(task.max_weight)
        return 0, len(bins) - 1

    by_cost[task.max_weight] = [open_bin() for _ in range(num_bins)]
    order = sorted(range(len(costs)), key=task.lengths.__getitem__, reverse=True)
    for index in sorted(order, key=costs.__getitem__, reverse=True):
        length, weight = task.lengths[index], task.weights[index]
        while by_room and -by_room[0][0] >= length:
            _, cost, bin_ = heappop(by_room)
            heappush(by_cost[spare[bin_]], (cost, bin_))
        best = None
        for to_spare, heap in by_cost.items():
            if to_spare < weight:
                continue
            while heap and room[heap[0][1]] < length:
                cost, bin_ = heappop(heap)
                heappush(by_room, (-room[bin_], cost, bin_))
            if heap and (best is None or heap[0] < best[0]):
                best = heap
        cost, bin_ = heappop(best) if best else open_bin()
        bins[bin_].append(index)
        room[bin_] -= length
        spare[bin_] -= weight
        if len(bins[bin_]) < task.max_members:
            heappush(by_cost[spare[bin_]], (cost + costs[index], bin_))
    return [bin_ for bin_ in bins if bin_]


ALGORITHMS: dict[str, Callable[[_Task, int], Bins]] = {
    "fullest": lambda task, _: _fullest(task),
    "first_fit_decreasing": lambda task, _: _fill(task, _ByLength),
    "first_fit": lambda task, _: _fill(task, _ByArrival),
    "first_fit_shuffle": _first_fit_shuffle,
    "concatenative": lambda task, _: _concatenative(task),
}
# What NeMo-RL's configurations say can stay: while its own algorithm was here, it filled no mix of
# scripts/bench_pack.py better than "fullest" does, and some worse. Few lengths may differ.
ALIASES = {"modified_first_fit_decreasing": "fullest"}
