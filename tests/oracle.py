"""Megatron's real ``_preprocess_data``, on a real model, as the oracle of expansion."""

import functools

import torch

from mcore_packing.testing import tiny

from .packs import IMAGE, TOKENS_PER_TILE, Row


@functools.cache
def model(**kwargs):
    """A real ``LLaVAModel`` of 5 positions a tile."""
    built = tiny.llava_model(img_size=28, max_sequence_length=1 << 20, **kwargs)
    assert built.img_seq_len == TOKENS_PER_TILE
    return built


def preprocess(row: Row):
    """``embeddings [S, H], labels [S], loss_mask [S]`` as Megatron makes them of one row.

    Nothing is passed through ``forward``: this is the function that mcore_packing replaces.
    """
    outputs = model()._preprocess_data(
        row.images if row.images.numel() else row.images.new_empty(0, 0, 0),
        row.text[None],
        row.input_ids[None],
        row.loss_mask[None],
        row.labels[None],
        False,
        None,
        IMAGE,
        row.num_image_tiles,
    )
    embeddings, labels, loss_mask = outputs[:3]
    return embeddings.squeeze(1), labels[0], loss_mask[0]


def concatenated(row: Row):
    """What Megatron makes of each sequence by itself, concatenated; and the lengths."""
    parts = [preprocess(part) for part in row.split() if part.input_ids.numel()]
    embeddings, labels, loss_mask = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return embeddings, labels, loss_mask


def lengths(row: Row) -> list[int]:
    """How many positions Megatron makes of each sequence by itself."""
    return [preprocess(part)[0].shape[0] if part.input_ids.numel() else 0 for part in row.split()]
