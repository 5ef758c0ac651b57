"""A packed row: joined from its samples, moved, and split into them again."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..context_parallel import cp_partition
from ..errors import PackingError
from ..expand import Column, expand_column
from ..layout import PackedLayout
from ..reference import IGNORE_INDEX
from ..spec import RowSpec
from ..vision import shares
from .columns import Tokens, join_column
from .media import check_alike, join_media, join_tiles
from .samples import Contents, Member, Sample, look, read


@dataclass(eq=False, repr=False, kw_only=True)
class Row:
    """One packed row: what the model's ``forward`` takes, and the layout that says where it stands.

    For a model that expands images, ``LLaVAModel``, its tensors are collapsed, ``[1, T]``, and it
    has ``images`` and ``num_image_tiles``. For a plain model they are physical, ``[1, S]``: filled
    up as the boundaries say, and images and videos are what its family calls them.

    It travels light: a row holds tensors of its own, and of a sample only what is plain. Other
    tensors of the data set would take a file descriptor each on their way out of a worker.

    Attributes:
        input_ids: int64 ``[1, T]``, one placeholder per image; or ``[1, S]``.
        labels: int64, shifted inside each sample: the next token of the same sample, and -100 at
            each sample's last token, before an image, and where nothing is trained.
        loss_mask: fp32, above 0 where the model trains: where there is a label, and not behind an
            image where the model expands. It holds the weights of ``loss_weights``.
        positions: int64 ``[axes, 1, S]`` or ``[1, S]``, where samples brought position ids.
        media: what samples have of images and videos, joined; for an expanding model always
            ``images``, ``[tiles, 3, h, w]``, ``[0]`` where there are none, and ``num_image_tiles``,
            int32 ``[N]``, possibly empty.
        columns: what samples had for each of their tokens, ``[1, T, ...]`` or ``[1, S, ...]``:
            ``labels`` as they were given, where they were, and the columns of ``pack``.
        num_trained: how many tokens are trained: what the sum of losses is divided by.
        layout: of the row; it rides along in ``packed_seq_params``.
        indices: which samples these are, of those that were packed; empty for a row that only fills
            up a job.
        members: what else is known of each sample.
        vision_share: the context-parallel rank whose tiles alone are in ``images``, and of how many
            ranks; None where all are.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor | None
    media: dict[str, Tensor]
    columns: dict[str, Tensor]
    num_trained: int
    layout: PackedLayout
    indices: tuple[int, ...]
    members: tuple[Member, ...]
    vision_share: tuple[int, int] | None = None

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
        """int64 ``[1, T]`` or ``[1, S]``, restarting in every sample; or what samples brought."""
        if self.positions is not None:
            return self.positions
        layout = self.layout
        ids = layout.position_ids_collapsed if layout.spec.expands else layout.position_ids
        return ids.unsqueeze(0)

    @property
    def packed_seq_params(self):
        """Megatron's ``PackedSeqParams``. For a model that expands they remember the layout; a
        plain one gets nothing that is not Megatron's, since captured layers compare fields."""
        from ..megatron import params  # lazy: rows need no Megatron

        if self.layout.spec.expands:
            return params.packed_seq_params(self.layout, vision_share=self.vision_share)
        return params.megatron_params(self.layout, params.PackedSeqParams(qkv_format="thd"))

    def inputs(self, cp_rank: int | None = None) -> dict:
        """Keyword arguments of the model's ``forward``: ``model(**row.inputs())``.

        Args:
            cp_rank: of a plain model, give only the positions of this context-parallel rank (of
                ``spec.cp_size``), in Transformer Engine's order; images, videos and boundaries stay
                whole. By default everything, for models that split rows themselves.

        Raises:
            PackingError: a rank that there is not, or a model that expands: it splits rows itself.
        """
        own = {name: getattr(self, name) for name in self._tokens}
        if cp_rank is not None:
            if self.layout.spec.expands:
                raise PackingError("cp_rank is for plain models: LLaVAModel splits rows itself")
            local = self.positions_of(cp_rank)
            own = {name: tensor.index_select(-1, local) for name, tensor in own.items()}
        return {
            **self.media,
            **own,
            "packed_seq_params": self.packed_seq_params,
            "attention_mask": None,
        }

    def positions_of(self, cp_rank: int) -> Tensor:
        """int64 ``[S / cp]``, which positions of the row a context-parallel rank has."""
        edges, total = self.layout.cu_seqlens_padded, self.layout.num_expanded
        return cp_partition(edges, total, self.layout.spec.cp_size, cp_rank)

    _tokens = ("input_ids", "position_ids", "labels", "loss_mask")

    def to(self, device=None, dtype=None, non_blocking: bool | None = None) -> "Row":
        """The same row elsewhere.

        Args:
            device: where to.
            dtype: that of images and videos.
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
            media = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in row.media.items()
            }
            row = dataclasses.replace(row, media=media)
        return row

    def pin_memory(self) -> "Row":
        """The same row in pinned memory; a ``DataLoader`` calls this."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function) -> "Row":
        def moved(value):
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            return None if value is None else function(value)

        names = ("input_ids", "labels", "loss_mask", "positions", "media", "columns", "layout")
        return dataclasses.replace(self, **{name: moved(getattr(self, name)) for name in names})

    def __repr__(self) -> str:
        return f"Row({len(self.indices)} samples, {self.layout})"


def split(row: Row) -> list[dict]:
    """The samples of a row: the inverse of packing.

    Args:
        row: as ``pack`` made it, on any device.

    Returns:
        A dict per sample, in the order of ``row.indices``: ``input_ids``, ``labels``, columns and
        media as views of the row's tensors, and what the sample had that is plain. A sample that
        had padding comes back without. Other tensors of a sample are in no row;
        ``report.left_out`` names them.

    Raises:
        PackingError: the boundaries of the row are not those that it was packed with; or it has but
            a share of its tiles.
    """
    if not row.members:
        return []
    layout, expands = row.layout, row.layout.spec.expands
    check_members(row)
    starts = (layout.cu_seqlens_collapsed if expands else layout.cu_seqlens_padded).tolist()
    media = {name: iter(_split_media(row, name)) for name in row.media}
    counts = {}
    if expands:
        placeholders = layout.placeholders_per_seq()
        counts = {
            "num_image_tiles": row.num_image_tiles.split(placeholders),
            "tokens_per_image": layout.cu_image_embeddings.diff().split(placeholders),
        }
    samples = []
    for index, (member, start) in enumerate(zip(row.members, starts, strict=False)):
        here = slice(start, start + member.num_tokens)
        sample = {"input_ids": row.input_ids[0, here]}
        for name in member.columns:
            sample[name] = row.columns[name][0, here]
        for name, size in member.media.items():
            if isinstance(size, int):
                sample[name] = next(media[name])
            else:
                dtype, shape = size
                sample[name] = torch.empty(shape, dtype=dtype, device=row.input_ids.device)
        if member.position_dims:
            own = row.positions.squeeze(-2)[..., here]
            sample["position_ids"] = own if own.dim() == member.position_dims else own[0]
        sample |= member.plain
        for name, dtype in member.counts.items():
            if name == "attention_mask":
                sample[name] = torch.ones_like(sample["input_ids"], dtype=dtype)
            elif name in member.plain:
                sample[name] = torch.tensor(member.plain[name], dtype=dtype)
            elif name in counts:
                sample[name] = counts[name][index].to(dtype)
        samples.append(sample)
    return samples


def check_members(row: Row) -> list[int]:
    """How many tokens each sample of a row has.

    Raises:
        PackingError: the boundaries of the row are not those that it was packed with; or it has but
            a share of its tiles.
    """
    if row.vision_share is not None:
        rank, size = row.vision_share
        raise PackingError(
            f"this row holds the tiles of context-parallel rank {rank} of {size} only: take it "
            f"from the rows before shard_vision"
        )
    lengths = row.layout.cu_seqlens_collapsed.diff().tolist()
    if len(lengths) != len(row.members):
        raise PackingError(
            f"the row has {len(lengths)} sequences, but was packed with {len(row.members)} samples"
        )
    for index, (length, member) in enumerate(zip(lengths, row.members, strict=True)):
        if length != member.num_tokens:
            raise PackingError(
                f"sequence {index} of the row is not its sample: it has {length} tokens, but the "
                f"sample {member.num_tokens}"
            )
    return lengths


def _split_media(row: Row, name: str) -> tuple[Tensor, ...]:
    """What each sample that has entries of a medium has."""
    sizes = [member.media.get(name) for member in row.members]
    sizes = [size for size in sizes if isinstance(size, int)]
    return row.media[name].split(sizes) if sizes else ()


def join(
    parts: Sequence[Sample],
    contents: Contents,
    indices: Sequence[int] | None = None,
    weigh: Callable[[list[int]], list[float]] | None = None,
    vision_share: tuple[int, int] | None = None,
) -> Row:
    """One row of samples that were read, in this order.

    Args:
        parts: the samples.
        contents: what the row takes of them.
        indices: which samples these are.
        weigh: from how many tokens of each sample are trained to what each of these counts; by
            default 1.
        vision_share: a context-parallel rank, and of how many, whose tiles alone to take.

    Raises:
        PackingError: they do not fit, or what is wrong with the values of one.
    """
    ids, tokens, tensors = join_tensors(parts, contents, weigh)
    counts = [count for part in parts for count in part.tokens_per_image]
    layout = PackedLayout.build(
        ids,
        _on(ids.device, tokens.bounds.astype(np.int32)),
        _on(ids.device, np.array(counts, dtype=np.int64)),
        contents.spec,
        space="collapsed",
        num_image_embeddings=sum(counts),
    )
    if not contents.spec.expands:
        _fill_up(tensors, layout, contents)
    else:
        tiles = [count for part in parts for count in part.num_image_tiles]
        # What unequal tiles become, only the model can say.
        equal = "imgs_sizes" not in tensors["media"]
        equal = equal and not any(count % of for count, of in zip(counts, tiles, strict=True))
        if contents.spec.cp_size > 1 and counts and equal:
            layout = layout.with_shares(shares(layout, tiles, contents.spec.cp_size))
        if layout.shares is None:
            vision_share = None  # every rank has all tiles
        kept = None if vision_share is None else layout.shares.tiles_of(vision_share[0])
        tensors["media"]["images"] = join_tiles([part.media for part in parts], ids.device, kept)
    return Row(
        **tensors,
        layout=layout,
        vision_share=vision_share,
        indices=tuple(range(len(parts)) if indices is None else indices),
        members=tuple(part.member for part in parts),
    )


def without_training(row: Row) -> Row:
    """The same row, of which nothing is trained and no sample is told: it fills up a job."""
    labels = torch.full_like(row.labels, IGNORE_INDEX)
    loss_mask = torch.zeros_like(row.loss_mask)
    return dataclasses.replace(
        row, labels=labels, loss_mask=loss_mask, num_trained=0, indices=(), members=()
    )


def concatenate(samples: Sequence[dict], image_token_id: int) -> dict:
    """The tensors of a collapsed row, for a data path that knows no layouts."""
    spec = RowSpec(image_token_id=image_token_id, img_seq_len=1)  # any: nothing is laid out
    contents = Contents.of(spec)
    parts = [read(sample, contents) for sample in samples]
    ids, _, tensors = join_tensors(parts, contents)
    tensors["media"]["images"] = join_tiles([part.media for part in parts], ids.device)
    names = ("input_ids", "labels", "loss_mask", "media", "columns")
    return {name: tensors[name] for name in names}


def join_tensors(
    parts: Sequence[Sample], contents: Contents, weigh=None
) -> tuple[Tensor, Tokens, dict]:
    """All tokens, what their values say, and a row's tensors as ``Row`` has them, collapsed; of an
    expanding model all but its ``images``."""
    if not parts:
        raise PackingError("there are no samples to join, expected one or more")
    check_alike([part.forms for part in parts])
    ids, given = join_tokens(parts)
    columns = {} if given is None else {"labels": given[None]}
    lengths = [part.member.num_tokens for part in parts]
    for name, column in contents.columns.items():
        values = [part.columns.get(name) for part in parts]
        if any(value is not None for value in values):
            columns[name] = join_column(values, lengths, column)[None]
    tokens = look(parts, ids, given, contents)
    media = {}
    for name in contents.media:
        if name == "images" and contents.spec.expands:
            continue  # the layout says which
        if values := [part.media[name] for part in parts if name in part.media]:
            media[name] = join_media(values)
    if contents.spec.expands:
        tiles = [count for part in parts for count in part.num_image_tiles]
        media["num_image_tiles"] = _on(ids.device, np.array(tiles, dtype=np.int32))
    loss_mask = tokens.trains.astype(np.float32)
    if weigh is not None:
        weights = np.array(weigh(tokens.trained_per_sample), dtype=np.float64)
        loss_mask = (weights.repeat(lengths) * loss_mask).astype(np.float32)
    tensors = {
        "input_ids": ids[None],
        "labels": _on(ids.device, tokens.labels[None]),
        "loss_mask": _on(ids.device, loss_mask[None]),
        "positions": _join_positions(parts),
        "media": media,
        "columns": columns,
        "num_trained": sum(tokens.trained_per_sample),
    }
    return ids, tokens, tensors


def join_tokens(parts: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
    """All tokens, and their labels where any sample has some."""
    ids = torch.cat([part.ids for part in parts])
    if not any("labels" in part.columns for part in parts):
        return ids, None
    return ids, torch.cat([part.columns.get("labels", part.ids) for part in parts])


def _join_positions(parts: Sequence[Sample]) -> Tensor | None:
    """``[1, T]`` or ``[axes, 1, T]`` of what samples brought; one that brought nothing counts its
    tokens, as processors do for text."""
    if all(part.positions is None for part in parts):
        return None
    axes = {part.positions.shape[0] for part in parts if getattr(part.positions, "ndim", 0) == 2}
    if len(axes) > 1:
        raise PackingError(
            f"position_ids of these samples have {' and '.join(map(str, sorted(axes)))} axes, "
            f"expected the same number in every sample of a row"
        )
    positions = []
    for part in parts:
        own = part.positions
        if own is None:
            own = torch.arange(part.member.num_tokens, device=part.ids.device)
        positions.append(own.expand(*axes, -1) if axes else own)
    return torch.cat(positions, dim=-1).unsqueeze(-2)


def _fill_up(tensors: dict, layout: PackedLayout, contents: Contents) -> None:
    """The tensors of a plain model's row, where its boundaries put them."""

    def physical(tensor: Tensor, fill) -> Tensor:
        return expand_column(layout, tensor[None], Column(fill))

    pad = contents.spec.pad_token_id
    for name, fill in (("input_ids", pad), ("labels", IGNORE_INDEX), ("loss_mask", 0.0)):
        tensors[name] = physical(tensors[name][0], fill)[None]
    if tensors["positions"] is not None:
        tensors["positions"] = physical(tensors["positions"].movedim(-1, 0), 0).movedim(0, -1)
    for name, values in tensors["columns"].items():
        fill = IGNORE_INDEX if name == "labels" else contents.columns[name].fill
        tensors["columns"][name] = physical(values[0], fill)[None]


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(device)
