"""Telling collapsed boundaries from expanded ones."""

from typing import Literal

import torch
from torch import Tensor

from .errors import BoundarySpaceError, PackingError

Space = Literal["collapsed", "expanded"]
SPACES = ("auto", "collapsed", "expanded")


def check_space(space: str) -> str:
    """``space`` itself.

    Raises:
        PackingError: it is none of "auto", "collapsed" and "expanded".
    """
    if not isinstance(space, str) or space not in SPACES:
        raise PackingError(f"space is {space!r}, expected 'auto', 'collapsed' or 'expanded'")
    return space


def find_space(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    tokens_per_image: Tensor,
    image_token_id: int,
    longest_row: int | None = None,
) -> Space | None:
    """The only space that boundaries can be in, where there is only one.

    A space belongs to a data path, not to a row, and most rows could be in either. So the rule is
    plain, and what it does not decide is refused. Boundaries can be *collapsed* if the last is at
    most ``T`` and behind the last placeholder. They can be *expanded* if each is where some token
    starts in the expanded row and the last is at or behind the end of the last image, where one
    that was cut at the model's maximum counts as both.

    Args:
        input_ids: integer ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, physical boundaries: the padded ones, where there are any.
        tokens_per_image: integer ``[N]``.
        image_token_id: the placeholder's id.
        longest_row: the model's maximum, where a data path may have cut boundaries.

    Returns:
        The space; None where both are the same for this row, or where the row has another fault,
        which its layout will report. Reads values, so it synchronises on a GPU.

    Raises:
        BoundarySpaceError: either space is possible, or neither.

    Example:
        >>> ids, rows = torch.tensor([11, -200, 12, 21, 22]), torch.tensor([576])
        >>> find_space(ids, torch.tensor([0, 3, 5]), rows, -200)
        'collapsed'
        >>> find_space(ids, torch.tensor([0, 578, 580]), rows, -200)
        'expanded'
    """
    is_image = input_ids == image_token_id
    placeholders = is_image.nonzero().squeeze(1)
    edges = cu_seqlens.long()
    is_faulty = int(edges[0]) != 0 or bool((edges.diff() < 0).any())
    if is_faulty or placeholders.numel() != tokens_per_image.numel():
        return None
    width = torch.ones_like(input_ids, dtype=torch.int64)
    width[placeholders] = tokens_per_image.long().clamp(min=1)
    start = torch.cat([width.new_zeros(1), width.cumsum(0)])
    num_tokens, last = input_ids.numel(), int(edges[-1])
    images_end = int(placeholders[-1]) + 1 if placeholders.numel() else 0

    is_collapsed = images_end <= last <= num_tokens
    token = torch.searchsorted(start, edges).clamp(max=num_tokens)
    is_start = start[token] == edges
    covers = last >= int(start[images_end])
    if longest_row is not None:
        is_start |= edges == longest_row
        covers |= last == longest_row
    is_expanded = covers and bool(is_start.all())
    if is_collapsed and torch.equal(start[edges], edges):
        return None
    if is_collapsed != is_expanded:
        return "collapsed" if is_collapsed else "expanded"
    word = "either" if is_collapsed else "neither"
    inside = "" if bool(is_start.all()) else ", and a boundary lies inside an image"
    raise BoundarySpaceError(
        f"the boundaries end at {last} and could count {word}: the row has {num_tokens} tokens, "
        f"{int(start[-1])} expanded, and its last image ends at token {images_end}, or "
        f"{int(start[images_end])} expanded{inside}; pass space='collapsed' if they count tokens, "
        f"space='expanded' if they count image rows too"
    )
