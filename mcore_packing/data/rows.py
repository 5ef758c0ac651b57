"""A packed row: joined from its samples, moved, and split into them again."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import PackingError
from ..layout import PackedLayout
from ..spec import RowSpec
from .samples import Member, Sample, look, read


@dataclass(eq=False, repr=False, kw_only=True)
class Row:
    """One packed row: what ``LLaVAModel.forward`` takes, and the layout that says where it stands.

    It travels light: a row holds tensors of its own, and of a sample only what is plain. Other
    tensors of the data set would take a file descriptor each on their way out of a worker.

    Attributes:
        input_ids: int64 ``[1, T]``, one placeholder per image.
        labels: int64 ``[1, T]``, shifted inside each sample: the next token of the same sample, and
            -100 at each sample's last token, before a placeholder, and where nothing is trained.
        loss_mask: fp32 ``[1, T]``, 1 where there is a label.
        media: ``images``, ``[tiles, 3, h, w]`` of all samples, ``[0]`` where there are none; and
            ``num_image_tiles``, int32 ``[N]``, possibly empty.
        columns: what samples had for each of their tokens, ``[1, T]``: ``labels`` as they were
            given, where they were.
        layout: of the row; it rides along in ``packed_seq_params``.
        indices: which samples these are, of those that were packed.
        members: what else is known of each sample.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    media: dict[str, Tensor]
    columns: dict[str, Tensor]
    layout: PackedLayout
    indices: tuple[int, ...]
    members: tuple[Member, ...]

    @property
    def images(self) -> Tensor:
        """``media["images"]``."""
        return self.media["images"]

    @property
    def num_image_tiles(self) -> Tensor:
        """``media["num_image_tiles"]``."""
        return self.media["num_image_tiles"]

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[1, T]``, restarting in every sample."""
        return self.layout.position_ids_collapsed.unsqueeze(0)

    @property
    def packed_seq_params(self):
        """Megatron's ``PackedSeqParams``, which remember the layout."""
        from ..megatron.params import packed_seq_params  # lazy: rows need no Megatron

        return packed_seq_params(self.layout)

    def inputs(self) -> dict:
        """Keyword arguments of ``LLaVAModel.forward``: ``model(**row.inputs())``."""
        names = ("images", "input_ids", "position_ids", "labels", "loss_mask", "num_image_tiles")
        return {name: getattr(self, name) for name in (*names, "packed_seq_params")} | {
            "attention_mask": None
        }

    def to(self, device=None, dtype=None, non_blocking: bool | None = None) -> "Row":
        """The same row elsewhere.

        Args:
            device: where to.
            dtype: that of the images.
            non_blocking: whether the host goes on while tensors are copied. By default it does, but
                not on the way to a CPU, where what is read next would not be there yet. From pinned
                memory (``DataLoader(rows, batch_size=None, pin_memory=True)``) copies overlap with
                what the GPU computes.
        """
        row = self
        if device is not None:
            if non_blocking is None:
                non_blocking = torch.device(device).type != "cpu"
            row = self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if dtype is not None:
            row = dataclasses.replace(row, media=row.media | {"images": row.images.to(dtype)})
        return row

    def pin_memory(self) -> "Row":
        """The same row in pinned memory; a ``DataLoader`` calls this."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function) -> "Row":
        def moved(value):
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            return function(value)

        names = ("input_ids", "labels", "loss_mask", "media", "columns", "layout")
        return dataclasses.replace(self, **{name: moved(getattr(self, name)) for name in names})

    def __repr__(self) -> str:
        return f"Row({len(self.indices)} samples, {self.layout})"


def split(row: Row) -> list[dict]:
    """The samples of a row: the inverse of packing.

    Args:
        row: as ``pack`` made it, on any device.

    Returns:
        A dict per sample, in the order of ``row.indices``: ``input_ids``, ``images`` and ``labels``
        as views of the row's tensors, and what the sample had that is plain. Other tensors of a
        sample are in no row; ``report.left_out`` names them.

    Raises:
        PackingError: the boundaries of the row are not those that it was packed with.
    """
    lengths = row.layout.cu_seqlens_collapsed.diff().tolist()
    for index, (length, member) in enumerate(zip(lengths, row.members, strict=True)):
        if length != member.num_tokens:
            raise PackingError(
                f"sequence {index} of the row is not its sample: it has {length} tokens, but the "
                f"sample {member.num_tokens}"
            )
    ids = row.input_ids[0].split(lengths)
    labels = row.columns["labels"][0].split(lengths) if "labels" in row.columns else None
    images = iter(row.images.split([m.tiles for m in row.members if m.tiles is not None]))
    placeholders = row.layout.placeholders_per_seq()
    counts = {
        "num_image_tiles": row.num_image_tiles.split(placeholders),
        "tokens_per_image": row.layout.cu_image_embeddings.diff().split(placeholders),
    }
    samples = []
    for index, member in enumerate(row.members):
        sample = {**member.plain, "input_ids": ids[index]}
        if member.tiles is not None:
            sample["images"] = next(images)
        if member.has_labels:
            sample["labels"] = labels[index]
        for name, dtype in member.counts.items():
            sample[name] = counts[name][index].to(dtype)
        samples.append(sample)
    return samples


def join(parts: Sequence[Sample], spec: RowSpec, indices: Sequence[int] | None = None) -> Row:
    """One row of samples that were read, in this order.

    Raises:
        PackingError: they do not fit, or what is wrong with the values of one.
    """
    tensors = join_tensors(parts, spec)
    ids = tensors["input_ids"]
    bounds = np.array([0, *(part.member.num_tokens for part in parts)], dtype=np.int32)
    layout = PackedLayout.build(
        ids,
        torch.from_numpy(bounds.cumsum(dtype=np.int32)).to(ids.device),
        _on([count for part in parts for count in part.tokens_per_image], torch.int64, ids),
        spec,
        space="collapsed",
    )
    return Row(
        **tensors,
        layout=layout,
        indices=tuple(range(len(parts)) if indices is None else indices),
        members=tuple(part.member for part in parts),
    )


def concatenate(samples: Sequence[dict]) -> dict:
    """The tensors of a row, as ``Row`` has them, for a data path that knows no layouts."""
    spec = RowSpec(img_seq_len=1)  # any: nothing is laid out
    return join_tensors([read(sample, spec) for sample in samples], spec)


def join_tensors(parts: Sequence[Sample], spec: RowSpec) -> dict:
    """The tensors of a row, as ``Row`` has them."""
    ids = torch.cat([part.ids for part in parts])
    given = None
    if any(part.labels is not None for part in parts):
        given = torch.cat([part.ids if part.labels is None else part.labels for part in parts])
    tokens = look(parts, ids, given, spec)
    images = [part.images for part in parts if part.images is not None]
    tiles = [count for part in parts for count in part.num_image_tiles]
    return {
        "input_ids": ids[None],
        "labels": torch.from_numpy(tokens.labels).to(ids.device)[None],
        "loss_mask": torch.from_numpy(tokens.trains).to(ids.device, torch.float32)[None],
        "media": {
            "images": torch.cat(images) if images else torch.empty(0, device=ids.device),
            "num_image_tiles": _on(tiles, torch.int32, ids),
        },
        "columns": {} if given is None else {"labels": given[None]},
    }


def _on(values: list[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)
