"""The errors this package raises, and each fault of a layout's status in words."""

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .layout import PackedLayout

INT32_MAX = 2**31 - 1


class PackingError(ValueError):
    """Placeholders, features and boundaries of a packed row do not agree."""


class BoundarySpaceError(PackingError):
    """Boundaries that could count either, or are not what they were said to be: say ``space=``."""


class PlaceholderMismatch(PackingError):
    """The number of placeholders differs from the number of features that should replace them.

    Args:
        message: where it happened and what to do; names both numbers.
        actual: how many features there are (image embeddings, or entries of ``tokens_per_image``).
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


class Fault(IntEnum):
    """What is wrong with a row. The kernels write the same numbers, and the first that applies, so
    that an error found on a GPU reads like one found on a CPU."""

    NONE = 0
    START = 1  # cu_seqlens[0] is not 0
    DECREASING = 2  # where: the first sequence of negative length
    TOO_FEW_IMAGES = 3  # where: the first placeholder without an entry, a token
    TOO_MANY_IMAGES = 4
    TOKENS_PER_IMAGE = 5  # where: the first image whose entry is not positive
    OVERFLOW = 6  # the expanded row does not fit int32
    IMAGE_EMBEDDINGS = 7  # the sum of tokens_per_image is not what the host said
    OTHER_SPACE = 8  # where: the first boundary inside an image, B + 1 if none
    PAST_END = 9  # the last boundary lies beyond the row
    REAL_LENGTH = 10  # where: the first sequence that is longer than its padded length
    NO_ROOM = 11  # the padded sequences do not fit the row
    STAGE_LENGTH = 12  # a stage without tokens: the last boundary lies beyond its positions
    STAGE_MULTIPLE = 13  # a stage without tokens: where: the first sequence that does not divide


class Status(NamedTuple):
    """The entries of a layout's ``status``, int64 ``[6]``."""

    fault: int
    where: int
    found: int
    expected: int
    max_seqlen: int  # the longest padded sequence, the tail included
    num_image_embeddings: int


def explain(layout: "PackedLayout", status: Status) -> PackingError:
    """The error for a status: where, what was found, what was expected, what to do."""
    fault, where, found, expected = status[:4]
    if fault == Fault.START:
        return PackingError(f"cu_seqlens starts at {found}, expected 0")
    if fault == Fault.DECREASING:
        return PackingError(f"sequence {where}: cu_seqlens decreases by {-found}, expected never")
    if fault in (Fault.TOO_FEW_IMAGES, Fault.TOO_MANY_IMAGES):
        return _explain_number_of_images(layout, status)
    if fault == Fault.TOKENS_PER_IMAGE:
        return PackingError(
            f"image {where}: tokens_per_image is {found}, expected at least {expected}; drop the "
            f"placeholder of an image without embeddings"
        )
    if fault == Fault.OVERFLOW:
        return PackingError(
            f"the expanded row has {found} positions, more than int32 can count ({INT32_MAX})"
        )
    if fault == Fault.IMAGE_EMBEDDINGS:
        return PlaceholderMismatch(
            actual=expected,
            expected=found,
            message=f"the row's placeholders become {found} image embeddings, but there are "
            f"{expected}",
        )
    if fault == Fault.OTHER_SPACE:
        return _explain_other_space(layout, status)
    if fault == Fault.PAST_END:
        message = (
            f"the last boundary is {found}, past the end of the row at {expected} "
            f"({describe_lengths(layout)})"
        )
        if layout.space == "expanded" or not _may_be_expanded(layout, found):
            return PackingError(message)
        return BoundarySpaceError(
            f"{message}. The boundaries are said to be collapsed; if they count positions, pass "
            f"space='expanded'"
        )
    if fault == Fault.REAL_LENGTH:
        return PackingError(
            f"sequence {where}: {found} long by cu_seqlens, but only {expected} by "
            f"cu_seqlens_padded"
        )
    if fault == Fault.NO_ROOM:
        return _explain_no_room(layout, status)
    if fault == Fault.STAGE_LENGTH:
        return PackingError(
            f"the last boundary is {found}, but this stage has {expected} positions; without "
            f"tokens it needs the boundaries of this row in expanded space, see "
            f"PackedLayout.to_tensor"
        )
    if fault == Fault.STAGE_MULTIPLE:
        return PackingError(
            f"sequence {where}: {found} positions, expected a multiple of {expected}; a stage "
            f"without tokens needs the padded boundaries that the others have, see "
            f"PackedLayout.to_tensor"
        )
    raise AssertionError(f"no fault {fault}")


def describe_lengths(layout: "PackedLayout") -> str:
    """How long the row is in either space."""
    return f"{layout.num_collapsed} tokens, {int(layout.seq_start_expanded[-1])} expanded"


def _may_be_expanded(layout, last: int) -> bool:
    """Whether a last boundary lies behind all images, in an expanded row that goes on so far."""
    start, images = layout.expanded_start, layout.is_placeholder.nonzero()
    images_end = int(start[images[-1] + 1]) if images.numel() else 0
    return images_end <= last <= int(layout.seq_start_expanded[-1])


def _explain_number_of_images(layout, status: Status) -> PlaceholderMismatch:
    counts = layout.placeholders_per_seq()
    if status.fault == Fault.TOO_FEW_IMAGES:
        starts = layout.seq_start_collapsed[1:-1]
        seq = int(torch.searchsorted(starts, status.where, right=True))
        seq = min(seq, len(counts) - 1)  # the tail's count to the last
        entries = status.found - sum(counts[:seq])
    else:
        seq = max((s for s, count in enumerate(counts) if count), default=0)
        entries = counts[seq] + status.found - status.expected
    return PlaceholderMismatch(
        actual=status.found,
        expected=status.expected,
        message=f"sequence {seq}: {counts[seq]} placeholders (id {layout.spec.image_token_id}) but "
        f"{entries} entries in tokens_per_image; the row has {status.expected} placeholders and "
        f"{status.found} entries, pass one for each placeholder",
    )


def _explain_other_space(layout, status: Status) -> BoundarySpaceError:
    other = {"collapsed": "expanded", "expanded": "collapsed"}[layout.space]
    end = int(layout.expanded_start[status.expected])
    what = f"the last one is {status.found}"
    if status.where <= layout.num_seqs:
        what = f"boundary {status.where} lies inside an image, and {what}"
    return BoundarySpaceError(
        f"the boundaries are said to be {layout.space}, but cannot be: {what}; the row has "
        f"{describe_lengths(layout)}, and its last image ends at token {status.expected}, or {end} "
        f"expanded. If this row is right, pass space={other!r}, or the layout with the row "
        f"(mp.packed_seq_params)"
    )


def _explain_no_room(layout, status: Status) -> PackingError:
    starts = layout.seq_start_expanded
    real = int(starts[-2])
    padding = status.found - real
    message = (
        f"the padded row has {status.found} positions, but there is room for {status.expected}"
    )
    if padding:
        message += (
            f": {real} of its sequences, and {padding} of padding to multiples of "
            f"{layout.spec.seq_multiple}"
        )
    return PackingError(
        f"{message}; pack rows by their padded lengths, or cut off what does not fit with "
        f"on_overflow='truncate'"
    )
