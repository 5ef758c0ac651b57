"""Inputs for tests: packed rows from a readable structure."""

from dataclasses import dataclass
from itertools import pairwise

import hypothesis.strategies as st
import torch
from torch import Tensor

from mcore_packing import PackedLayout, RowSpec

IMAGE = -200
TOKENS_PER_TILE = 5  # of the oracle model: 4 patches and a class token


@dataclass
class Row:
    """One collapsed packed row and the tensors that go with it."""

    input_ids: Tensor  # [T]
    cu_seqlens: Tensor  # [B + 1]
    num_image_tiles: Tensor  # [N]
    tokens_per_image: Tensor  # [N]
    labels: Tensor  # [T]
    loss_mask: Tensor  # [T]
    text: Tensor  # [T, H]
    images: Tensor  # [L, tiles, H]

    @property
    def num_image_embeddings(self) -> int:
        return int(self.tokens_per_image.sum())

    def split(self) -> list["Row"]:
        """The sequences of the row, each a row of its own."""
        rows, image, tile = [], 0, 0
        for begin, end in self.spans():
            count = int((self.input_ids[begin:end] == IMAGE).sum())
            num_tiles = self.num_image_tiles[image : image + count]
            stop = tile + int(num_tiles.sum())
            rows.append(
                Row(
                    self.input_ids[begin:end],
                    torch.tensor([0, end - begin], dtype=torch.int32),
                    num_tiles,
                    self.tokens_per_image[image : image + count],
                    self.labels[begin:end],
                    self.loss_mask[begin:end],
                    self.text[begin:end],
                    self.images[:, tile:stop],
                )
            )
            image, tile = image + count, stop
        return rows

    def spans(self) -> list[tuple[int, int]]:
        return list(pairwise(self.cu_seqlens.tolist()))


def lay_out(input_ids, cu_seqlens, tokens_per_image, space="collapsed", **options) -> PackedLayout:
    """``PackedLayout.build`` with the fields of a ``RowSpec`` and its own options side by side."""
    given = {name: options.pop(name) for name in _BUILD if name in options}
    spec = RowSpec(**{"image_token_id": IMAGE, **options})
    return PackedLayout.build(input_ids, cu_seqlens, tokens_per_image, spec, space=space, **given)


_BUILD = "num_image_embeddings", "cu_seqlens_padded"


def build(row: "Row", space="collapsed", **options) -> PackedLayout:
    """The layout of a row; options are those of ``lay_out``."""
    return lay_out(row.input_ids, row.cu_seqlens, row.tokens_per_image, space, **options)


def make_row(
    structure: list[list[int]],
    *,
    tokens_per_tile: int = TOKENS_PER_TILE,
    hidden_size: int = 4,
    dtype=torch.float32,
    seed: int = 0,
    device="cpu",
) -> Row:
    """A row from its structure: a list of tokens per sequence, 0 text, k an image of k tiles.

    Labels are shifted within each sequence, so the last one of a sequence is a token of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = [token for sequence in structure for token in sequence]
    tiles = torch.tensor([token for token in flat if token], dtype=torch.int32)
    ids = torch.arange(1, len(flat) + 1)
    ids[torch.tensor(flat) > 0] = IMAGE
    lengths = torch.tensor([len(sequence) for sequence in structure])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    labels = torch.cat([ids[1:], ids.new_tensor([7])])
    last = cu_seqlens[1:][lengths > 0].long() - 1
    labels[last] = 1000 + last
    shape = (tokens_per_tile, int(tiles.sum()), hidden_size)
    row = Row(
        ids,
        cu_seqlens,
        tiles,
        tiles.long() * tokens_per_tile,
        labels,
        (torch.rand(len(flat), generator=generator) < 0.8).float(),
        torch.randn(len(flat), hidden_size, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
    )
    return Row(*(value.to(device) for value in vars(row).values()))


def structures(max_sequences: int = 6, max_tokens: int = 12, max_tiles: int = 3):
    """Rows with a token or more: text only, image first, last, adjacent, empty sequences."""
    token = st.one_of(st.just(0), st.just(0), st.integers(1, max_tiles))
    sequences = st.lists(st.lists(token, max_size=max_tokens), min_size=1, max_size=max_sequences)
    return sequences.filter(any)


NAMED = {
    "text-only": [[0, 0, 0], [0, 0]],
    "image-first": [[1, 0, 0], [2, 0], [1]],
    "image-last": [[0, 0, 1], [0, 2], [3]],
    "image-starts-the-next": [[0, 0, 0], [1, 0, 0]],
    "adjacent-images": [[0, 1, 2, 1, 0], [1, 1]],
    "only-images": [[1], [2, 1]],
    "empty-sequences": [[], [0, 1, 0], [], [], [0], []],
    "one-token": [[0]],
    "one-image": [[1]],
    "T63-N5-B3": [[0] * 20 + [1, 0, 2], [0] * 30 + [3], [1, 1] + [0] * 7],
}
