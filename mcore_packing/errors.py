"""The errors this package raises."""

from collections.abc import Sequence

INT32_MAX = 2**31 - 1


class PackingError(ValueError):
    """Placeholders, features and boundaries of a packed row do not agree."""


class BoundarySpaceError(PackingError):
    """Boundaries that could count either, or are not what they were said to be: say ``space=``."""


class PlaceholderMismatch(PackingError):
    """The number of placeholders differs from the number of features that should replace them.

    Args:
        message: where it happened and what to do; names both numbers.
        actual: how many features there are (feature rows, or entries of ``tokens_per_image``).
            None where only the message survived: a ``DataLoader`` rebuilds the errors of its
            workers from their messages.
        expected: how many the prompt asks for (placeholders).

    Example:
        >>> error = PlaceholderMismatch(actual=576, expected=577)
        >>> error.actual, error.expected, str(error)
        (576, 577, '577 placeholders but 576 features')
    """

    def __init__(
        self, message: str = "", *, actual: int | None = None, expected: int | None = None
    ):
        self.actual, self.expected = actual, expected
        super().__init__(message or f"{expected} placeholders but {actual} features")

    def __reduce__(self):
        return _rebuild_mismatch, (str(self), self.actual, self.expected)


def _rebuild_mismatch(message, actual, expected):
    return PlaceholderMismatch(message, actual=actual, expected=expected)


class AmbiguousTruncation(PackingError):
    """More than one set of surviving images explains what is left of a cut prompt.

    ``candidates`` are the first few: dicts of kept images (videos) and orphaned placeholders.
    """

    candidates: Sequence[dict] = ()
