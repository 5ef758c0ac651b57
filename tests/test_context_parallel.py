"""Alignment and the partition of Transformer Engine."""

import math
import random

import pytest
import torch

import mcore_packing as mp

GOLDEN = torch.tensor([0, 8, 16], dtype=torch.int32)


def test_golden_case_of_transformer_engine():
    assert mp.cp_partition(GOLDEN, 16, 2, 0).tolist() == [0, 1, 6, 7, 8, 9, 14, 15]
    assert mp.cp_partition(GOLDEN, 16, 2, 1).tolist() == [2, 3, 4, 5, 10, 11, 12, 13]


def test_ranks_partition_the_row():
    # Law 7, for cp up to 64; and within a sequence, rank r owns the r-th chunk from either end.
    rng = random.Random(0)
    for _ in range(10_000):
        cp_size = rng.choice([1, 2, 3, 4, 6, 8, 16, 32, 64])
        multiple = 2 * cp_size if cp_size > 1 else 1
        lengths = torch.tensor([rng.choice([0, 1, 1, 2, 5]) for _ in range(rng.randint(1, 5))])
        lengths[rng.randrange(lengths.numel())] += 1
        cu_seqlens = torch.cat([lengths.new_zeros(1), (lengths * multiple).cumsum(0)]).int()
        total = int(cu_seqlens[-1])
        parts = [mp.cp_partition(cu_seqlens, total, cp_size, rank) for rank in range(cp_size)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(total))
        rank = rng.randrange(cp_size)
        expected = []
        for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            size = (end - begin) // multiple
            chunks = (rank, 2 * cp_size - 1 - rank) if cp_size > 1 else (0,)
            for chunk in chunks:
                expected += range(begin + chunk * size, begin + (chunk + 1) * size)
        assert parts[rank].tolist() == expected


@pytest.mark.parametrize(
    "cu_seqlens, total, cp_size, cp_rank, message",
    [
        ([0, 6, 16], 16, 2, 0, "sequence 0: 6 positions, not a multiple of 2 \\* cp_size = 4"),
        ([0, 8, 12], 16, 2, 0, "boundaries run from 0 to 12, but the row from 0 to 16"),
        ([4, 8, 16], 16, 2, 0, "boundaries run from 4 to 16"),
        ([0, 8, 4, 16], 16, 2, 0, "sequence 1: -4 positions"),
        ([0, 8, 18], 18, 2, 0, "the row has 18 positions, not a multiple"),
        ([0, 8, 16], 16, 2, 2, "cp_rank is 2"),
    ],
)
def test_what_te_would_duplicate_is_refused(cu_seqlens, total, cp_size, cp_rank, message):
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(mp.PackingError, match=message):
        mp.cp_partition(cu_seqlens, total, cp_size, cp_rank)


@pytest.mark.parametrize("fp8_align", [16, 32, 128])
@pytest.mark.parametrize("cp, tp, sp", [(2, 1, False), (1, 4, True), (2, 2, True), (1, 1, False)])
def test_fp8_holds_on_every_rank(cp, tp, sp, fp8_align):
    seq_multiple, total_multiple = mp.alignment(cp, tp, sp, fp8_align)
    assert seq_multiple == (2 * cp if cp > 1 else 1)
    assert total_multiple % seq_multiple == 0
    share = total_multiple // cp // (tp if sp else 1)
    assert share % fp8_align == 0
    least = math.lcm(seq_multiple * (tp if sp else 1), fp8_align * cp * (tp if sp else 1))
    assert total_multiple == least


@pytest.mark.parametrize("cp, tp, sp, recipe", [(2, 1, False, "delayed"), (1, 4, True, "mxfp8"),
                                                (2, 2, True, "mxfp8")])  # fmt: skip
def test_megatrons_padding_misses_fp8(cp, tp, sp, recipe):
    context_parallel = pytest.importorskip("megatron.core.models.multimodal.context_parallel")
    align = 32 if recipe == "mxfp8" else 16
    try:
        padding = context_parallel.get_padding(99, cp, tp, sp, fp8_enabled=True, fp8_recipe=recipe)
    except TypeError:
        pytest.skip("this megatron-core's get_padding knows no FP8")
    assert (99 + padding) // cp // (tp if sp else 1) % align  # the share of a rank
    total = -(-99 // mp.alignment(cp, tp, sp, align)[1]) * mp.alignment(cp, tp, sp, align)[1]
    assert total // cp // (tp if sp else 1) % align == 0


@pytest.mark.parametrize("sizes", [(2.0,), (0,), (True,), (1, "2"), (1, 1, False, None)], ids=str)
def test_sizes_that_are_no_positive_ints(sizes):
    with pytest.raises(mp.PackingError, match="expected a positive int"):
        mp.alignment(*sizes)
