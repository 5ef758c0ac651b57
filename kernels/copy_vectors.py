"""Copy vectors through an index: forward from text and images, backward to either, each once."""

import torch
import triton
import triton.language as tl

PAD = tl.constexpr(-1)
FIRST_IMAGE = tl.constexpr(-2)

_INTEGERS = ("num_vectors", "table_length", "length", "tiles", "out_length", "out_tiles")


@triton.jit(do_not_specialize=_INTEGERS)
def copy_vectors_kernel(
    table_ptr,  # [table_length, H], addressed by index >= 0
    images_ptr,  # [length, tiles, H], addressed by index <= -2; counted tile by tile
    index_ptr,  # [num_vectors] int32; PAD, and what points outside, makes zeros
    out_ptr,  # [out_length, out_tiles, H], out; counted tile by tile
    num_vectors,
    table_length,
    width,
    length,
    tiles,
    out_length,
    out_tiles,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    vector = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = vector < num_vectors
    index = tl.load(index_ptr + vector, mask=live, other=PAD)
    embedding = FIRST_IMAGE - index
    from_table = (index >= 0) & (index < table_length)
    from_images = (embedding >= 0) & (embedding < length * tiles)
    embedding = tl.maximum(embedding, 0)
    source = tl.where(index >= 0, index, embedding % length * tiles + embedding // length)
    target = vector % out_length * out_tiles + vector // out_length
    source = source.to(tl.int64)[:, None] * width
    target = target.to(tl.int64)[:, None] * width
    from_table, from_images = from_table[:, None], from_images[:, None]
    for begin in range(0, width, BLOCK_H):
        h = (begin + tl.arange(0, BLOCK_H))[None, :]
        inside = h < width
        value = tl.load(table_ptr + source + h, mask=from_table & inside, other=0.0)
        image = tl.load(images_ptr + source + h, mask=from_images & inside, other=0.0)
        value = tl.where(from_images, image, value)
        tl.store(out_ptr + target + h, value, mask=live[:, None] & inside)


def blocks(width: int) -> tuple[int, int]:
    """Vectors, and how much of each, that one program copies: 4,096 values in all. Two vectors of
    2,048 would spill registers."""
    block_h = min(triton.next_power_of_2(width), 4096)
    block_h = 1024 if block_h == 2048 else block_h
    return 4096 // block_h, block_h


def _launch(table, images, index, out, out_length, out_tiles):
    num_vectors, width = index.numel(), out.shape[-1]
    if num_vectors == 0 or width == 0:
        return out
    length, tiles = images.shape[:2]
    block_v, block_h = blocks(width)
    with torch.cuda.device_of(table):
        copy_vectors_kernel[(triton.cdiv(num_vectors, block_v),)](
            table,
            images,
            index,
            out,
            num_vectors,
            table.shape[0],
            width,
            max(length, 1),
            tiles,
            out_length,
            out_tiles,
            BLOCK_V=block_v,
            BLOCK_H=block_h,
            num_warps=4,
        )
    return out


def expand_embeddings(text, images, source, text_position=None, image_position=None):
    """Launch the kernel forward; arguments and results are those of
    ``reference.expand_embeddings``."""
    out = text.new_empty(source.numel(), text.shape[1])
    text = text.contiguous()
    images = text[None, :0] if images is None else images.contiguous()
    return _launch(text, images, source, out, source.numel(), 1)


def collect_gradients(grad, index, length, tiles):
    """Launch the kernel backward; arguments and results are those of
    ``reference.collect_gradients``."""
    out = grad.new_empty(length, tiles, grad.shape[1])
    grad = grad.contiguous()
    return _launch(grad, grad[None, :0], index, out, length, tiles)
