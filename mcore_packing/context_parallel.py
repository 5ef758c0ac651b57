"""What parallelism asks of a packed row: lengths that divide, and the positions each rank owns."""

import math

import torch
from torch import Tensor

from . import reference
from .errors import PackingError
from .inputs import as_positive


def chunks_of(cp_size: int) -> int:
    """Into how many chunks context parallelism cuts every sequence: two for each rank."""
    return 2 * cp_size if cp_size > 1 else 1


def check_rank(cp_size: int, cp_rank: int) -> None:
    """Refuse a rank that is none of ``cp_size``."""
    if not 0 <= cp_rank < cp_size:
        raise PackingError(f"cp_rank is {cp_rank}, expected 0 <= cp_rank < cp_size = {cp_size}")


def check_multiple(cp_size: int, seq_multiple: int, num_positions: int) -> None:
    """Refuse a layout whose sequences, or whose row, context parallelism could not cut."""
    multiple = chunks_of(cp_size)
    if seq_multiple % multiple or num_positions % multiple:
        raise PackingError(
            f"cp_size {cp_size} needs every sequence to be a multiple of {multiple} positions, but "
            f"the layout was built with seq_multiple={seq_multiple}; see mp.alignment"
        )


def alignment(
    cp_size: int = 1, tp_size: int = 1, sequence_parallel: bool = False, fp8_align: int = 1
) -> tuple[int, int]:
    """The multiples that a row must be padded to.

    Context parallelism cuts every sequence into ``2 * cp_size`` chunks; sequence parallelism cuts a
    rank's positions by ``tp_size``; FP8 matrix products want a multiple of ``fp8_align`` positions
    *per rank*, which ``get_padding`` of Megatron-Core forgets as soon as either is on.

    Args:
        cp_size: context-parallel size.
        tp_size: tensor-parallel size.
        sequence_parallel: whether positions are split over tensor-parallel ranks.
        fp8_align: 16; 32 for mxfp8; 128 for blockwise; 1 without FP8.

    Returns:
        ``(seq_multiple, total_multiple)`` in positions, for a ``RowSpec``.

    Raises:
        PackingError: a size that is no positive int.

    Source:
        ``_process_embedding_token_parallel`` and ``context_parallel.get_padding`` of Megatron-Core
        0.16.1.

    Example:
        >>> alignment(cp_size=2, tp_size=4, sequence_parallel=True)
        (4, 16)
        >>> alignment(cp_size=2, fp8_align=16)
        (4, 32)
    """
    for name, size in (("cp_size", cp_size), ("tp_size", tp_size), ("fp8_align", fp8_align)):
        as_positive(size, name)
    seq_multiple = chunks_of(cp_size)
    split = tp_size if sequence_parallel else 1
    return seq_multiple, math.lcm(seq_multiple * split, fp8_align * cp_size * split)


def cp_partition(cu_seqlens_padded: Tensor, total: int, cp_size: int, cp_rank: int) -> Tensor:
    """The physical positions that a context-parallel rank owns, in Transformer Engine's order.

    Every sequence is cut into ``2 * cp_size`` chunks; rank ``r`` owns the ``r``-th from either end,
    so that causal attention costs every rank the same.

    Args:
        cu_seqlens_padded: int32 ``[B + 1]`` physical offsets; the last one is ``total``.
        total: physical length of the row.
        cp_size: context-parallel size.
        cp_rank: the rank.

    Returns:
        int64 ``[total / cp_size]``.

    Raises:
        PackingError: a sequence is not a multiple of ``2 * cp_size``, or positions lie past the
            last boundary: Transformer Engine would duplicate some positions and lose others. On a
            GPU, where looking would synchronise, a device-side assertion takes the error's place.

    Source:
        ``thd_get_partitioned_indices`` of Transformer Engine 2.x.

    Example:
        >>> cu_seqlens = torch.tensor([0, 8, 16], dtype=torch.int32)
        >>> cp_partition(cu_seqlens, 16, 2, 0).tolist()
        [0, 1, 6, 7, 8, 9, 14, 15]
        >>> cp_partition(cu_seqlens, 16, 2, 1).tolist()
        [2, 3, 4, 5, 10, 11, 12, 13]
    """
    check_rank(cp_size, cp_rank)
    multiple = chunks_of(cp_size)
    if total % multiple:
        raise PackingError(
            f"the row has {total} positions, not a multiple of 2 * cp_size = {multiple}"
        )
    lengths = cu_seqlens_padded.diff()
    wrong = (lengths % multiple != 0) | (lengths < 0)
    if cu_seqlens_padded.device.type == "cpu":
        if bool(wrong.any()):
            seq = int(wrong.nonzero()[0])
            raise PackingError(
                f"sequence {seq}: {int(lengths[seq])} positions, not a multiple of 2 * cp_size = "
                f"{multiple}; build the layout with seq_multiple={multiple}"
            )
        if int(cu_seqlens_padded[0]) != 0 or int(cu_seqlens_padded[-1]) != total:
            raise PackingError(
                f"boundaries run from {int(cu_seqlens_padded[0])} to {int(cu_seqlens_padded[-1])}, "
                f"but the row from 0 to {total}"
            )
    else:
        covers = (cu_seqlens_padded[0] == 0) & (cu_seqlens_padded[-1] == total)
        torch._assert_async(covers & ~wrong.any())
    return reference.local_positions(cu_seqlens_padded, total, cp_size, cp_rank)
