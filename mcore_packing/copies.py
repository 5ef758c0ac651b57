"""Expansion on a CPU: vectors copied run by run, several times faster than one by one.

The same answers as ``reference.expand_embeddings`` and ``reference.collect_gradients``, bit for
bit.
"""

import torch
from torch import Tensor

from .reference import FIRST_IMAGE, PAD


def expand_embeddings(
    text: Tensor,
    images: Tensor | None,
    source: Tensor,
    text_position: Tensor | None = None,
    image_position: Tensor | None = None,
) -> Tensor:
    """As ``reference.expand_embeddings``."""
    out = text.new_empty(source.numel(), text.shape[1])
    length = images.shape[0] if images is not None else 1
    begins_tile = (source < PAD) & ((FIRST_IMAGE - source) % max(length, 1) == 0)
    for begin, end, first in _runs(source, begins_tile):
        if first >= 0:
            out[begin:end] = text[first : first + end - begin]
        elif first == PAD:
            out[begin:end] = 0
        else:
            tile, place = divmod(FIRST_IMAGE - first, length)
            out[begin:end] = images[place : place + end - begin, tile]
    return out


def collect_gradients(grad: Tensor, index: Tensor, length: int, tiles: int) -> Tensor:
    """As ``reference.collect_gradients``."""
    out = grad.new_empty(length, tiles, grad.shape[1])
    begins_tile = torch.arange(index.numel()) % max(length, 1) == 0
    for begin, end, first in _runs(index, begins_tile):
        tile, place = divmod(begin, length)
        part = out[place : place + end - begin, tile]
        if first == PAD:
            part.zero_()
        else:
            part.copy_(grad[first : first + end - begin])
    return out


def _runs(index: Tensor, begins_tile: Tensor) -> list[tuple[int, int, int]]:
    """``(begin, end, index[begin])`` of every run that one slice can copy.

    Text and positions count up by one, image embeddings (below ``PAD``) count down, padding stays.
    """
    kind = (index - PAD).sign()
    goes_on = (kind[1:] == kind[:-1]) & (index.diff() == kind[1:]) & ~begins_tile[1:]
    begins = [0, *((~goes_on).nonzero().squeeze(1) + 1).tolist()] if index.numel() else []
    firsts = index[begins].tolist()
    return list(zip(begins, [*begins[1:], index.numel()], firsts, strict=True)) if begins else []
