"""Binary search in global memory, for blocks of values."""

import triton
import triton.language as tl


def num_steps(size: int) -> int:
    """How many halvings decide among ``size + 1`` answers."""
    return size.bit_length()


@triton.jit
def lower_bound(ptr, value, size, halvings):
    """First index in [0, size] with ptr[index] >= value, for a block of int64 values."""
    low = tl.zeros_like(value)
    high = low + size
    for _ in range(halvings):
        middle = (low + high) // 2
        below = (low < high) & (
            tl.load(ptr + middle, mask=low < high, other=0).to(tl.int64) < value
        )
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def last_at_or_below(ptr, value, size, halvings):
    """Last index in [0, size) with ptr[index] <= value, clamped: the sequence ``value`` lies in."""
    index = lower_bound(ptr, value + 1, size + 1, halvings) - 1
    return tl.minimum(tl.maximum(index, 0), size - 1)
