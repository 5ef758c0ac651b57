"""Lengths into bins of one capacity, by algorithms under the names that NeMo-RL uses for them.

A bin is a list of indices into the lengths. Every length is at least 1 and fits a bin; callers see
to that. Nothing here knows tokens, images or torch.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from ..errors import PackingError

Bins = list[list[int]]


def place(
    lengths: Sequence[int],
    capacity: int,
    algorithm: str = "modified_first_fit_decreasing",
    *,
    keep_order: bool = False,
    balance: bool = False,
    seed: int = 0,
) -> Bins:
    """Put every length into a bin.

    Args:
        lengths: positive ints.
        capacity: what the lengths of one bin may add up to.
        algorithm: one of ``ALGORITHMS``.
        keep_order: give bins in the order in which their longest members arrived, and members in
            the order in which they arrived. Otherwise the algorithms that take the longest first
            also give the bins of the longest first. The bins themselves are the same.
        balance: spread the lengths anew so that the bins' sums of squares, which is what attention
            costs, are close to each other. There are as many bins as ``algorithm`` needs, or a few
            more where the spread lengths do not fit into that many.
        seed: of ``first_fit_shuffle``.

    Returns:
        The bins; every index is in exactly one of them.

    Raises:
        PackingError: an unknown algorithm, or a length that is not in ``1 .. capacity``.

    Example:
        >>> place([5, 5, 3, 3, 2], capacity=8, algorithm="concatenative")
        [[0], [1, 2], [3, 4]]
        >>> place([5, 5, 3, 3, 2], capacity=8, algorithm="first_fit_decreasing")
        [[0, 2], [1, 3], [4]]
        >>> place([3, 1, 1, 3], capacity=6, algorithm="concatenative", balance=True)
        [[0, 1], [3, 2]]
    """
    check_algorithm(algorithm)
    lengths = list(map(int, lengths))  # of an array or tensor too
    if lengths and not 0 < min(lengths) <= max(lengths) <= capacity:
        wrong = next(i for i, length in enumerate(lengths) if not 0 < length <= capacity)
        raise PackingError(
            f"length {wrong} is {lengths[wrong]}, expected 1 to {capacity}, the capacity of a bin"
        )
    bins = ALGORITHMS[algorithm](lengths, capacity, seed)
    if balance:
        bins = _balanced(lengths, capacity, len(bins))
    if keep_order:
        bins = sorted(map(sorted, bins), key=lambda bin_: max(bin_, key=lengths.__getitem__))
    return bins


def check_algorithm(name: str) -> str:
    """``name`` itself, one of ``ALGORITHMS``."""
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise PackingError(f"algorithm is {name!r}, expected one of {', '.join(ALGORITHMS)}")
    return name


class _Shelf:
    """Things by their size, asked for by size: a bitset says at once which sizes there are."""

    def __init__(self):
        self.sizes = 0  # bit s is set where something of size s is there
        self.things = defaultdict(list)

    def add(self, size: int, thing: int) -> None:
        self.things[size].append(thing)
        self.sizes |= 1 << size

    def smallest(self, at_least: int) -> int | None:
        """The smallest size there is from ``at_least`` on."""
        larger = self.sizes >> at_least
        return at_least + (larger & -larger).bit_length() - 1 if larger else None

    def largest(self, at_most: int) -> int | None:
        """The largest size there is up to ``at_most``."""
        smaller = self.sizes & ((2 << at_most) - 1)
        return smaller.bit_length() - 1 if smaller else None

    def take(self, size: int) -> int:
        things = self.things[size]
        thing = things.pop()
        if not things:
            self.sizes ^= 1 << size
        return thing


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def _concatenative(lengths, capacity: int, seed: int) -> Bins:
    """One bin at a time, in the order of arrival."""
    bins, free = [], 0
    for index, length in enumerate(lengths):
        if length > free:
            bins.append([])
            free = capacity
        bins[-1].append(index)
        free -= length
    return bins


def _first_fit(lengths, capacity: int, order: Iterable[int]) -> Bins:
    """Each into the first bin that has room: a binary tree knows the most room below each node.

    A bin that nobody opened is empty, so opening one is no special case. Equal lengths in a row go
    on in the bin of the first, and the tree is told when they leave it.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins = [[] for _ in lengths]
    length, node, free = 0, leaves, capacity
    for index in order:
        if lengths[index] != length or free < length:
            room[node] = most = free
            while node > 1:
                other = room[node ^ 1]
                node //= 2
                most = other if other > most else most
                if room[node] == most:
                    break
                room[node] = most
            length, node = lengths[index], 1
            while node < leaves:
                node *= 2
                if room[node] < length:
                    node += 1
            free = room[node]
        bins[node - leaves].append(index)
        free -= length
    return [bin_ for bin_ in bins if bin_]


def _first_fit_shuffle(lengths, capacity: int, seed: int) -> Bins:
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    return _first_fit(lengths, capacity, order)


def _best_fit(lengths, capacity: int, order: Iterable[int]) -> Bins:
    """Each into the fullest bin that has room."""
    bins, shelf = [], _Shelf()
    for index in order:
        length = lengths[index]
        free = shelf.smallest(length)
        if free is None:
            bin_, free = len(bins), capacity
            bins.append([])
        else:
            bin_ = shelf.take(free)
        bins[bin_].append(index)
        shelf.add(free - length, bin_)
    return bins


def _modified_first_fit_decreasing(lengths, capacity: int, seed: int) -> Bins:
    """Pairs what is longer than half a bin with what fits best, before the rest is first fitted.

    Each length above a half opens a bin. From the fullest bin to the emptiest, what is above a
    third goes in where it fits, and from the emptiest to the fullest a pair of what is above a
    sixth; then whatever fits, the longest first. At worst 71/60 of the bins that are needed.
    """
    order = _longest_first(lengths)
    large = [index for index in order if 2 * lengths[index] > capacity]
    medium, small, rest = _Shelf(), _Shelf(), _Shelf()
    for index in reversed(order[len(large) :]):
        length = lengths[index]
        shelf = medium if 3 * length > capacity else small if 6 * length > capacity else rest
        shelf.add(length, index)
    bins = [[index] for index in large]
    free = [capacity - lengths[index] for index in large]

    def put(bin_: int, shelf: _Shelf, length: int) -> None:
        bins[bin_].append(shelf.take(length))
        free[bin_] -= length

    for bin_ in range(len(bins)):
        length = medium.largest(free[bin_])
        if length is not None:
            put(bin_, medium, length)
    for bin_ in reversed(range(len(bins))):
        if len(bins[bin_]) > 1:
            continue
        shortest = small.smallest(0)
        if shortest is None or shortest > free[bin_]:
            continue
        if small.largest(free[bin_] - shortest) is None:
            continue
        put(bin_, small, shortest)
        length = small.largest(free[bin_])
        if length is not None:
            put(bin_, small, length)
    for bin_ in range(len(bins)):
        for shelf in (medium, small, rest):
            while (length := shelf.largest(free[bin_])) is not None:
                put(bin_, shelf, length)
    used = {index for bin_ in bins for index in bin_}
    left = [index for index in order if index not in used]
    if left:
        found = _first_fit([lengths[index] for index in left], capacity, range(len(left)))
        bins += [[left[index] for index in bin_] for bin_ in found]
    return bins


def _balanced(lengths, capacity: int, num_bins: int) -> Bins:
    """The longest first, each into the bin with the least attention that has room."""
    bins = [[] for _ in range(num_bins)]
    free = [capacity] * num_bins
    heap = [(0, bin_) for bin_ in range(num_bins)]
    heapify(heap)
    waiting = defaultdict(list)  # bins without room for now, by how much they have
    shortest = capacity
    for index in _longest_first(lengths):
        length = lengths[index]
        for room in range(length, shortest):
            for entry in waiting.pop(room, ()):
                heappush(heap, entry)
        shortest = length
        while heap and free[heap[0][1]] < length:
            entry = heappop(heap)
            waiting[free[entry[1]]].append(entry)
        if heap:
            cost, bin_ = heap[0]
            heapreplace(heap, (cost + length * length, bin_))
        else:
            bin_ = len(bins)
            bins.append([])
            free.append(capacity)
            heappush(heap, (length * length, bin_))
        bins[bin_].append(index)
        free[bin_] -= length
    return [bin_ for bin_ in bins if bin_]


ALGORITHMS: dict[str, Callable[[Sequence[int], int, int], Bins]] = {
    "concatenative": _concatenative,
    "first_fit": lambda lengths, capacity, _: _first_fit(lengths, capacity, range(len(lengths))),
    "first_fit_shuffle": _first_fit_shuffle,
    "first_fit_decreasing": lambda lengths, capacity, _: _first_fit(
        lengths, capacity, _longest_first(lengths)
    ),
    "modified_first_fit_decreasing": _modified_first_fit_decreasing,
    "best_fit": lambda lengths, capacity, _: _best_fit(lengths, capacity, range(len(lengths))),
    "best_fit_decreasing": lambda lengths, capacity, _: _best_fit(
        lengths, capacity, _longest_first(lengths)
    ),
}
