"""Copy rows through an index: forward from text and images, backward to either, each row once."""

import torch
import triton
import triton.language as tl

PAD = tl.constexpr(-1)
FIRST_IMAGE_ROW = tl.constexpr(-2)

_INTEGERS = ("num_rows", "table_rows", "length", "tiles", "out_length", "out_tiles")


@triton.jit(do_not_specialize=_INTEGERS)
def copy_rows_kernel(
    table_ptr,  # [table_rows, H], addressed by index >= 0
    images_ptr,  # [length, tiles, H], addressed by index <= -2; rows count tile by tile
    index_ptr,  # [num_rows] int32; PAD, and what points outside, makes a row of zeros
    out_ptr,  # [out_length, out_tiles, H], out; rows count tile by tile
    num_rows,
    table_rows,
    width,
    length,
    tiles,
    out_length,
    out_tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < num_rows
    index = tl.load(index_ptr + row, mask=live, other=PAD)
    image_row = FIRST_IMAGE_ROW - index
    from_table = (index >= 0) & (index < table_rows)
    from_images = (image_row >= 0) & (image_row < length * tiles)
    image_row = tl.maximum(image_row, 0)
    source = tl.where(index >= 0, index, image_row % length * tiles + image_row // length)
    target = row % out_length * out_tiles + row // out_length
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


def _launch(table, images, index, out, out_length, out_tiles):
    num_rows, width = index.numel(), out.shape[-1]
    if num_rows == 0 or width == 0:
        return out
    length, tiles = images.shape[:2]
    block_h = min(triton.next_power_of_2(width), 4096)
    block_r = max(4096 // block_h, 1)
    with torch.cuda.device_of(table):
        copy_rows_kernel[(triton.cdiv(num_rows, block_r),)](
            table,
            images,
            index,
            out,
            num_rows,
            table.shape[0],
            width,
            max(length, 1),
            tiles,
            out_length,
            out_tiles,
            BLOCK_R=block_r,
            BLOCK_H=block_h,
            num_warps=4,
        )
    return out


def expand_rows(text, images, source, text_position=None, image_position=None):
    """Launch the kernel forward; arguments and results are those of ``reference.expand_rows``."""
    out = text.new_empty(source.numel(), text.shape[1])
    text = text.contiguous()
    images = text[None, :0] if images is None else images.contiguous()
    return _launch(text, images, source, out, source.numel(), 1)


def collect_rows(grad, index, length, tiles):
    """Launch the kernel backward; arguments and results are those of ``reference.collect_rows``."""
    out = grad.new_empty(length, tiles, grad.shape[1])
    grad = grad.contiguous()
    return _launch(grad, grad[None, :0], index, out, length, tiles)
