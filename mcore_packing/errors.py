"""The errors this package raises: what is wrong with a packed row, where, and what to do."""

from collections.abc import Sequence
from enum import IntEnum

INT32_MAX = 2**31 - 1


class PackingError(ValueError):
    """Placeholders, features and boundaries of a packed row do not agree."""


class BoundarySpaceError(PackingError):
    """Boundaries that could be collapsed as well as expanded: say which with ``space=``."""


class PlaceholderMismatch(PackingError):
    """The number of placeholders differs from the number of features that should replace them.

    Args:
        actual: how many features there are (feature rows, or entries of ``tokens_per_image``).
        expected: how many the prompt asks for (placeholders).
        message: where it happened and what to do; names both numbers.

    Example:
        >>> error = PlaceholderMismatch(actual=576, expected=577)
        >>> error.actual, error.expected, str(error)
        (576, 577, '577 placeholders but 576 features')
    """

    def __init__(self, *, actual: int, expected: int, message: str = ""):
        self.actual, self.expected = actual, expected
        super().__init__(message or f"{expected} placeholders but {actual} features")

    def __reduce__(self):
        return _rebuild_mismatch, (self.actual, self.expected, str(self))


def _rebuild_mismatch(actual, expected, message):
    return PlaceholderMismatch(actual=actual, expected=expected, message=message)


class AmbiguousTruncation(PackingError):
    """More than one set of surviving images explains what is left of a cut prompt.

    ``candidates`` are the first few: dicts of kept images (videos) and orphaned placeholders.
    """

    candidates: Sequence[dict] = ()


class Space(IntEnum):
    """The space that boundaries live in. ``AUTO`` asks, the others answer."""

    AUTO = 0
    COLLAPSED = 1
    EXPANDED = 2
    SAME = 3  # every image is one row: both spaces coincide


class Fault(IntEnum):
    """First word of a layout's status: what is wrong with the row (0: nothing).

    A status is int64 ``[5]``: fault, space found, where, found, expected. The kernels write the
    same numbers, so that an error found on a GPU reads like one found on a CPU.
    """

    NONE = 0
    START = 1  # cu_seqlens[0] is not 0
    DECREASING = 2  # where: the first sequence of negative length
    TOO_FEW_IMAGES = 3  # where: token index of the first placeholder without an entry
    TOO_MANY_IMAGES = 4
    TOKENS_PER_IMAGE = 5  # where: the first image whose entry is not positive
    OVERFLOW = 6  # the expanded row does not fit int32
    IMAGE_ROWS = 7  # sum of tokens_per_image is not what the host said
    AMBIGUOUS = 8  # either space is possible
    PAST_END = 9  # the last boundary lies beyond the row
    REAL_LENGTH = 10  # where: the first sequence that is longer than its padded length
    PADDED_ROWS = 11  # the row does not fit the physical length that the host said


STATUS_SIZE = 5
