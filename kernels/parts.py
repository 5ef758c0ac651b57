"""Where the parts of a layout's tensor begin, computed from T, N and B."""

import triton
import triton.language as tl

HEADER_SIZE = tl.constexpr(28)
STATUS_SIZE = tl.constexpr(12)


@triton.jit
def _room(size):
    """Parts begin at multiples of four."""
    return (size + 3) // 4 * 4


@triton.jit
def cu_seqlens_expanded(layout_ptr):  # [B + 1]
    return layout_ptr + HEADER_SIZE + STATUS_SIZE


@triton.jit
def cu_seqlens_padded(layout_ptr, num_seqs):  # [B + 2]
    return layout_ptr + HEADER_SIZE + STATUS_SIZE + _room(num_seqs + 2)


@triton.jit
def seq_start_expanded(layout_ptr, num_seqs):  # [B + 2]
    return layout_ptr + HEADER_SIZE + STATUS_SIZE + 2 * _room(num_seqs + 2)


@triton.jit
def cu_seqlens_collapsed(layout_ptr, num_seqs):  # [B + 1]
    return layout_ptr + HEADER_SIZE + STATUS_SIZE + 3 * _room(num_seqs + 2)


@triton.jit
def seq_start_collapsed(layout_ptr, num_seqs):  # [B + 2]
    return layout_ptr + HEADER_SIZE + STATUS_SIZE + 4 * _room(num_seqs + 2)


@triton.jit
def input_ids(layout_ptr, num_seqs):  # [T]
    return layout_ptr + HEADER_SIZE + STATUS_SIZE + 5 * _room(num_seqs + 2)


@triton.jit
def expanded_start(layout_ptr, num_seqs, num_tokens):  # [T + 1]
    return input_ids(layout_ptr, num_seqs) + _room(num_tokens + 1)


@triton.jit
def image_start(layout_ptr, num_seqs, num_tokens):  # [N]
    return input_ids(layout_ptr, num_seqs) + 2 * _room(num_tokens + 1)


@triton.jit
def cu_image_embeddings(layout_ptr, num_seqs, num_tokens, num_images):  # [N + 1]
    return image_start(layout_ptr, num_seqs, num_tokens) + _room(num_images + 1)


def size(num_seqs: int, num_tokens: int, num_images: int) -> int:
    """How many int32 the tensor holds, as ``reference.parts_of`` says."""

    def room(count):
        return -(-count // 4) * 4

    boundaries = 5 * room(num_seqs + 2)
    front = HEADER_SIZE.value + STATUS_SIZE.value
    return front + boundaries + 2 * room(num_tokens + 1) + 2 * room(num_images + 1)
