"""Which space boundaries can be in: a diagnosis, by the rule of the reference."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from .errors import BoundarySpaceError
from .inputs import as_boundaries, as_int, as_row, as_size, as_tokens_per_image
from .reference import expanded_starts, spaces_of

Space = Literal["collapsed", "expanded"]
SPACES = ("collapsed", "expanded")


def find_space(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    tokens_per_image: Tensor | Sequence,
    image_token_id: int = -200,
    *,
    max_length: int | None = None,
) -> Space | None:
    """The only space that boundaries can be in, where there is only one.

    For finding out what a data path counts; nothing in this package relies on its answer. A space
    belongs to a data path, not to a row: most rows could be in either, and those are refused.

    Args:
        input_ids: integer ``[T]`` or ``[1, T]``.
        cu_seqlens: int32 ``[B + 1]``, physical boundaries: the padded ones, where there are any.
        tokens_per_image: integer ``[N]``, or one list per sequence.
        image_token_id: the placeholder's id.
        max_length: the model's maximum, where a data path may have cut boundaries.

    Returns:
        The space; None where both are the same for this row, or where the row has another fault,
        which its layout will report. Reads values, so it synchronises on a GPU.

    Raises:
        BoundarySpaceError: either space is possible, or neither.
        PackingError: arguments of another kind.

    Example:
        >>> import torch
        >>> ids = torch.tensor([11, -200, 12, 21, 22])
        >>> find_space(ids, torch.tensor([0, 3, 5], dtype=torch.int32), [576])
        'collapsed'
        >>> find_space(ids, torch.tensor([0, 578, 580], dtype=torch.int32), [576])
        'expanded'
    """
    ids = as_row(input_ids, "input_ids")
    edges = as_boundaries(cu_seqlens, "cu_seqlens", like=ids)
    counts, _ = as_tokens_per_image(tokens_per_image, ids, edges.numel() - 1)
    ids, edges, counts = (x.cpu().numpy() for x in (ids, edges, counts))
    placeholders = np.flatnonzero(ids == as_int(image_token_id, "image_token_id"))
    if edges[0] != 0 or (np.diff(edges) < 0).any() or placeholders.size != counts.size:
        return None
    start = expanded_starts(ids.size, placeholders, counts)
    images_end = int(placeholders[-1]) + 1 if placeholders.size else 0
    longest = as_size(max_length, "max_length")
    spaces = spaces_of(edges, start, images_end, -1 if longest is None else longest)
    if spaces.collapsed and (start[edges] == edges).all():
        return None
    if spaces.collapsed != spaces.expanded:
        return "collapsed" if spaces.collapsed else "expanded"
    word = "either" if spaces.collapsed else "neither"
    inside = "" if spaces.inside_image is None else ", and a boundary lies inside an image"
    raise BoundarySpaceError(
        f"the boundaries end at {int(edges[-1])} and could count {word}: the row has {ids.size} "
        f"tokens, {int(start[-1])} expanded, and its last image ends at token {images_end}, or "
        f"{int(start[images_end])} expanded{inside}; pass space='collapsed' if they count tokens, "
        f"space='expanded' if they count positions"
    )
