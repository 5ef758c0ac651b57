"""Copy rows through an index: forward from text and images, backward to either, each row once."""

import triton
import triton.language as tl

PAD = tl.constexpr(-1)


@triton.jit(do_not_specialize=("num_rows", "length", "tiles", "out_length", "out_tiles"))
def copy_rows_kernel(
    rows_ptr,  # [R, H], addressed by index >= 0
    images_ptr,  # [length, tiles, H], addressed by index <= -2; rows count tile by tile
    index_ptr,  # [num_rows] int32; PAD makes a row of zeros
    status_ptr,  # [5] int64; an unsound layout makes rows of NaN
    out_ptr,  # [out_length, out_tiles, H], out; rows count tile by tile
    num_rows,
    width,
    length,
    tiles,
    out_length,
    out_tiles,
    POISON: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < num_rows
    index = tl.load(index_ptr + row, mask=live, other=PAD)
    filler = 0.0
    if POISON:
        sound = tl.load(status_ptr) == 0
        index = tl.where(sound, index, PAD)  # an unsound index points anywhere
        filler = tl.where(sound, 0.0, float("nan"))
    image_row = tl.maximum(-2 - index, 0)
    source = tl.where(index >= 0, index, image_row % length * tiles + image_row // length)
    target = row % out_length * out_tiles + row // out_length
    source = source.to(tl.int64)[:, None] * width
    target = target.to(tl.int64)[:, None] * width
    from_rows = (live & (index >= 0))[:, None]
    from_images = (live & (index < PAD))[:, None]
    for begin in range(0, width, BLOCK_H):
        h = (begin + tl.arange(0, BLOCK_H))[None, :]
        inside = h < width
        value = tl.load(rows_ptr + source + h, mask=from_rows & inside, other=filler)
        image = tl.load(images_ptr + source + h, mask=from_images & inside, other=0.0)
        value = tl.where(from_images, image, value)
        tl.store(out_ptr + target + h, value, mask=live[:, None] & inside)


def _launch(rows, images, index, status, out, length, tiles, out_length, out_tiles):
    num_rows, width = index.numel(), out.shape[-1]
    if num_rows == 0 or width == 0:
        return out
    block_h = min(triton.next_power_of_2(width), 4096)
    block_r = max(4096 // block_h, 1)
    copy_rows_kernel[(triton.cdiv(num_rows, block_r),)](
        rows,
        images,
        index,
        status,
        out,
        num_rows,
        width,
        length,
        tiles,
        out_length,
        out_tiles,
        POISON=status is not None,
        BLOCK_R=block_r,
        BLOCK_H=block_h,
        num_warps=4,
    )
    return out


def expand_rows(text, images, source, status, text_position=None, image_position=None):
    """Launch the kernel forward; arguments and results are those of ``reference.expand_rows``."""
    out = text.new_empty(source.numel(), text.shape[1])
    text = text.contiguous()
    images = text[None] if images is None else images.contiguous()
    return _launch(text, images, source, status, out, *images.shape[:2], source.numel(), 1)


def collect_rows(grad, index, length, tiles):
    """Launch the kernel backward; arguments and results are those of ``reference.collect_rows``."""
    out = grad.new_empty(length, tiles, grad.shape[1])
    grad = grad.contiguous()
    return _launch(grad, grad, index, None, out, 1, 1, length, tiles)
