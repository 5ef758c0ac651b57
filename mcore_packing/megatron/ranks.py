"""Whether the ranks that share a row were given the same one.

Tensor- and context-parallel ranks of a pipeline stage work on one row. A loader that shards by
global rank hands each its own, and where lengths are equal nothing fails: losses are wrong.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ..errors import PackingError
from ..layout import PackedLayout

_PRIME = 0x9E3779B1  # spreads positions over int32


def shares_rows() -> bool:
    """Whether this rank shares its rows with others, and could ask them: not while a CUDA graph is
    captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return parallel_state.is_initialized() and _group().size() > 1


def fingerprint(layout: PackedLayout, input_ids: Tensor | None) -> Tensor:
    """int64 ``[2]``, never 0: of the ids, the boundaries, the counts and the shares of a row; on a
    stage without tokens, of its boundaries."""
    parts = [layout.cu_seqlens_expanded, layout.cu_seqlens_padded]
    if input_ids is not None:
        parts += [input_ids.reshape(-1), layout.cu_image_embeddings]
    if layout.encoder is not None:
        parts.append(layout.encoder)
    values = torch.cat([part.long() for part in parts])
    places = torch.arange(1, len(values) + 1, device=values.device)
    mixed = (values + 1) * (places * _PRIME ^ (places >> 7))
    sizes = sum(len(part) * (place + 1) for place, part in enumerate(parts))
    return torch.stack([mixed.sum() | 1, (mixed ^ (mixed >> 29)).sum() + sizes])


def compare(mine: Tensor | None, model: torch.nn.Module) -> None:
    """Compare 16 bytes over the ranks of a row: a collective of all of them.

    Args:
        mine: the ``fingerprint`` of this rank's row, None where it found a fault in it: it is to
            raise that afterwards.
        model: whose device the collective takes.

    Raises:
        PackingError: ranks have different rows, or one found a fault in its own; names them.
    """
    group = _group()
    mine = torch.zeros(2, dtype=torch.int64) if mine is None else mine
    mine = mine.to(next(model.parameters()).device)
    everyones = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyones, mine, group=group)
    found = [tuple(words) for words in torch.stack(everyones).tolist()]
    ranks = dist.get_process_group_ranks(group)
    faulty = [rank for rank, words in zip(ranks, found, strict=True) if words == (0, 0)]
    if dist.get_rank() in faulty:
        return
    if faulty:
        raise PackingError(
            f"rank {', '.join(map(str, faulty))} found a fault in its row, which this rank shares; "
            f"its own error says what is wrong"
        )
    others = [rank for rank, words in zip(ranks, found, strict=True) if words != found[0]]
    if others:
        raise PackingError(
            f"rank {', '.join(map(str, others))} was given another row than rank {ranks[0]}, but "
            f"ranks {ranks} share one (tensor and context parallelism): shard data by "
            f"parallel_state.get_data_parallel_rank(), not by global rank"
        )


def _group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_and_context_parallel_group()
