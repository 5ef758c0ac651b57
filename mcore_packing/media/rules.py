"""The rules that say, from its size alone, how many placeholders an image or a video becomes.

They follow the processors in float arithmetic too: one rounding more or less is another number of
placeholders. The keyword arguments of a rule are the settings of the family's processor, by its own
names: each is declared here only, with its default, and is read by its annotation: an int is at
least 0, a float positive, a bool neither a string nor an array.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import Parameter, Signature, signature
from numbers import Real
from typing import Any

from .kinds import as_flag, as_int, require

MAX_ASPECT_RATIO = 200  # smart_resize of transformers 5.24.0
GEMMA3_MIN_CROPS = 2  # Gemma3ImageProcessorPil of transformers 5.24.0
# Of two equally close grids the larger, if the image has this share of its pixels:
# dynamic_preprocess of Megatron-LM main, get_optimal_tiled_canvas of transformers 5.24.0.
MIN_AREA_OF_LARGER_GRID = 0.5
MAX_COVERED_AREA = 0.6  # find_closest_area_weighted_aspect_ratio of Megatron-LM main
# What a rule takes first: an image's, a video's.
SIZES = {"count": ("height", "width"), "video_count": ("frames", "height", "width")}


@lru_cache
def settings_of(rule: Callable, num_sizes: int) -> dict[str, Parameter] | None:
    """What a rule declares behind its sizes; None if it takes all settings as one mapping."""
    try:
        every = list(signature(rule).parameters.values())
    except ValueError:  # of a builtin
        return None
    declared = [p for p in every[num_sizes:] if p.kind is not p.VAR_KEYWORD]
    mapping = any(p.kind is p.VAR_POSITIONAL for p in every)
    mapping = mapping or any(p.default is p.empty for p in declared)
    return None if mapping else {p.name: p for p in declared}


def apply_rule(rule: Callable, size: tuple[int, ...], settings: Mapping[str, Any]) -> Any:
    """What the rule says of this size, its settings read and checked first."""
    declared = settings_of(rule, len(size))
    if declared is None:
        return rule(*size, settings)
    return rule(*size, **{name: _read(declared[name], value) for name, value in settings.items()})


def _read(setting: Parameter, value: Any) -> Any:
    if setting.annotation is bool:
        return as_flag(value, setting.name)
    if setting.annotation is int:
        return as_int(value, setting.name, minimum=min(0, setting.default))
    if setting.annotation is float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        fits = number and (value > 0 or setting.default <= 0)
        require(fits, f"{setting.name} is {value!r}, expected a positive number")
    return value


def _sides(side: Any, name: str) -> tuple[int, int]:
    """Of a setting that is a side, or has height and width by name: height and width."""
    both = side if isinstance(side, Mapping) else {"height": side, "width": side}
    known = {"height", "width"} <= set(both)
    require(known, f"{name} is {both}, expected an int or height and width")
    return tuple(as_int(both[key], f"{name}: {key}", 1) for key in ("height", "width"))


def _area(side: Any, name: str, unit: int = 1) -> int:
    """The area of such a setting, in squares of ``unit``."""
    height, width = _sides(side, name)
    return (height // unit) * (width // unit)


def _square(side: Any, name: str) -> int:
    """The side of such a setting, where it has to be a square."""
    height, width = _sides(side, name)
    require(height == width, f"{name} is {height} x {width}, expected a square")
    return height


def qwen_vl(
    height, width, *, patch_size: int = 14, merge_size: int = 2, min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
):  # fmt: skip
    """Both sides to multiples of a merged patch, then between min and max pixels."""
    return _smart_resize(height, width, patch_size * merge_size, min_pixels, max_pixels)


def volume_video(
    frames, height, width, *, patch_size: int = 16, merge_size: int = 2,
    temporal_patch_size: int = 2, min_pixels: int = 128 * 32 * 32, max_pixels: int = 768 * 32 * 32,
    cap_pixels_per_frame: bool = False, max_video_tokens: int = 768,
):  # fmt: skip
    """Qwen3 and GLM: all frames together between min and max pixels, or each under a cap."""
    unit = patch_size * merge_size
    if cap_pixels_per_frame:
        share = min(max_video_tokens * unit**2, max_pixels // frames)
        max_pixels = frames * max(share, int(min_pixels * 1.05))
    resized = height, width, unit, min_pixels, max_pixels, frames, temporal_patch_size, True
    return math.ceil(frames / temporal_patch_size) * _smart_resize(*resized)


def glm_vl(
    height, width, *, patch_size: int = 14, merge_size: int = 2, temporal_patch_size: int = 2,
    min_pixels: int = 112 * 112, max_pixels: int = 28 * 28 * 15000,
):  # fmt: skip
    """An image as a video of as many frames as are merged into one."""
    unit, frames = patch_size * merge_size, temporal_patch_size
    return _smart_resize(height, width, unit, min_pixels, max_pixels, frames, frames, True)


def minimax_video(
    frames, height, width, *, patch_size: int = 14, merge_size: int = 2,
    temporal_patch_size: int = 2, min_pixels: int = 4 * 28 * 28, max_pixels: int = 768 * 28 * 28,
    do_resize: bool = False,
):  # fmt: skip
    """Frames of a size that they have been given already, unless they are to be resized."""
    unit = patch_size * merge_size
    fits = do_resize or height % unit == width % unit == 0
    found = f"frames of {height} x {width} with do_resize=False"
    require(fits, f"{found}, expected multiples of {unit}")
    merged = (height // unit) * (width // unit)
    if do_resize:
        merged = _smart_resize(height, width, unit, min_pixels, max_pixels)
    return math.ceil(frames / temporal_patch_size) * merged


def _smart_resize(height, width, unit, least, most, frames=1, temporal=1, enlarge=False) -> int:
    """Merged patches of one frame, rounded half to even."""
    require(frames >= temporal, f"a video of {frames} frames, expected at least {temporal}")
    if enlarge and min(height, width) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    aspect = max(height, width) / min(height, width)
    found = f"{height} x {width} has an aspect ratio of {aspect:.1f}"
    require(aspect <= MAX_ASPECT_RATIO, f"{found}, expected at most {MAX_ASPECT_RATIO}")
    high, wide = round(height / unit), round(width / unit)  # may be 0: there is no clamp here
    pixels = round(frames / temporal) * temporal * high * unit * wide * unit
    if pixels > most:
        beta = math.sqrt(frames * height * width / most)
        high = max(1, math.floor(height / beta / unit))
        wide = max(1, math.floor(width / beta / unit))
    elif pixels < least:
        beta = math.sqrt(least / (frames * height * width))
        high, wide = math.ceil(height * beta / unit), math.ceil(width * beta / unit)
    return high * wide


def kimi_vl(
    height, width, *, patch_size: int = 14, merge_size: int = 2, max_patches: int = 16384,
    max_size_per_side: int = 512,
):  # fmt: skip
    """Shrunk to a budget of patches and of patches a side, then padded to merged patches."""
    patches = max(1.0, height // patch_size) * max(1.0, width // patch_size)
    longest = max_size_per_side * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
    sides = (min(max(1, int(side * scale)), longest) for side in (height, width))
    return math.prod(math.ceil(side / (patch_size * merge_size)) for side in sides)


def nemotron_omni(
    height, width, *, patch_size: int = 16, downsample_ratio: float = 0.5,
    min_num_patches: int = 1024, max_num_patches: int = 13312, max_model_len: int = 16384,
):  # fmt: skip
    """RADIO's dynamic resolution: the image's own grid, scaled between two numbers of patches."""
    merge = round(1 / downsample_ratio)
    budget = max((max_model_len - 4) * merge**2, min_num_patches)
    budget = max(min(budget, max_num_patches or budget), min_num_patches)
    high, wide = round(height / patch_size + 0.5), round(width / patch_size + 0.5)
    factor = min(math.sqrt(budget / (high * wide)), 1.0)
    high, wide = math.floor(factor * high), math.floor(factor * wide)
    if budget > min_num_patches and high * wide < min_num_patches:
        factor = math.sqrt(min_num_patches / (high * wide))
        high, wide = math.ceil(factor * high), math.ceil(factor * wide)
    for _ in range(2):  # the height first, then the width against what that became
        if remainder := high % merge:
            fits = (high + merge - remainder) * wide <= budget
            high = high + merge - remainder if fits else max(merge, high - remainder)
        high, wide = wide, high
    return high * wide // merge**2


def nemotron_video(
    frames, height, width, *, downsample_ratio: float = 0.5, video_target_num_patches: int = 1024,
    video_maintain_aspect_ratio: bool = True, video_temporal_patch_dim: int = 2,
):  # fmt: skip
    """One tile of about so many patches for every few frames."""
    merge, target = round(1 / downsample_ratio), video_target_num_patches
    grid = [int(math.sqrt(target))] * 2
    if video_maintain_aspect_ratio:
        aspect = width / height
        grid = [max(round(math.sqrt(patches)), 1) for patches in (target / aspect, target * aspect)]
        larger = [side + -side % merge for side in grid]
        grid = larger if math.prod(larger) <= target else grid
    high, wide = (max(merge, side - side % merge) for side in grid)
    return math.ceil(frames / video_temporal_patch_dim) * (high * wide // merge**2)


def gemma4(
    height, width, *, patch_size: int = 16, pooling_kernel_size: int = 3,
    max_soft_tokens: int = 280,
):  # fmt: skip
    """The largest grid of pooled patches that keeps the aspect ratio and fits the budget."""
    pixels = max_soft_tokens * pooling_kernel_size**2 * patch_size**2
    unit = pooling_kernel_size * patch_size
    scale = math.sqrt(pixels / (height * width))
    high, wide = math.floor(scale * height / unit), math.floor(scale * width / unit)
    budget = f"max_soft_tokens {max_soft_tokens}"
    require(high or wide, f"{height} x {width} is resized to nothing at {budget}")
    tokens = high * wide
    if tokens == 0:  # the long side alone decides, and the budget is its limit
        aspect = height / width if high else width / height
        tokens = min(math.floor(aspect), max_soft_tokens)
    require(tokens <= max_soft_tokens, f"{height} x {width} has {tokens} tokens, over {budget}")
    return tokens


def gemma3(
    height, width, *, image_seq_length: int = 256, do_pan_and_scan: bool = False,
    pan_and_scan_min_crop_size: int = 256, pan_and_scan_max_num_crops: int = 4,
    pan_and_scan_min_ratio_to_activate: float = 1.2,
):  # fmt: skip
    """One sequence for the image, one more for each crop of pan and scan along its long side."""
    long, short = max(height, width), min(height, width)
    if not do_pan_and_scan or long / short < pan_and_scan_min_ratio_to_activate:
        return image_seq_length
    smallest = pan_and_scan_min_crop_size
    crops = min(math.floor(long / short + 0.5), math.floor(long / smallest))
    crops = min(pan_and_scan_max_num_crops, max(GEMMA3_MIN_CROPS, crops))
    if min(math.ceil(long / crops), short) < smallest:
        return image_seq_length
    return image_seq_length * (1 + crops)


def llama4(
    height, width, *, size: Any = 336, max_patches: int = 16, resize_to_max_canvas: bool = False,
    patch_size: int = 14, pixel_shuffle_ratio: float = 0.5,
):  # fmt: skip
    """Tiles of the smallest canvas that scales the image best, and all of it where they are many.

    A canvas scales it best that enlarges it least, or most if asked to; failing that, that shrinks
    it least.
    """
    side = _square(size, "size")
    # The processor's are float32: no other ties while a side has less than 100,000 pixels.
    scales = {
        (wide, high): min(wide * side / width, high * side / height)
        for wide, high in _grids(1, max_patches)
    }
    larger = [scale for scale in scales.values() if scale >= 1]
    best = min(larger) if larger and not resize_to_max_canvas else max(scales.values())
    tiles = min(math.prod(canvas) for canvas, scale in scales.items() if scale == best)
    return (tiles + (tiles > 1)) * ((side // patch_size) ** 2 // round(1 / pixel_shuffle_ratio**2))


def llava15(
    height, width, *, crop_size: Any = 336, patch_size: int = 14,
    vision_feature_select_strategy: str = "default", num_additional_image_tokens: int = 1,
):  # fmt: skip
    """The grid of the centre crop, whatever the image: class token added, or dropped again."""
    dropped = vision_feature_select_strategy == "default"
    return _area(crop_size, "crop_size", patch_size) + num_additional_image_tokens - dropped


def pixtral(
    height, width, *, longest_edge: int = 1024, patch_size: int = 16, spatial_merge_size: int = 1
):  # fmt: skip
    """Shrunk to the longest edge, then enlarged to whole merged patches."""
    ratio, unit = max(height / longest_edge, width / longest_edge), patch_size * spatial_merge_size
    sides = [math.floor(side / ratio) if ratio > 1 else side for side in (height, width)]
    edge = f"longest_edge {longest_edge}"
    require(min(sides), f"{height} x {width} is resized to nothing at {edge}")
    return math.prod((side - 1) // unit + 1 for side in sides)


def step3p7(
    height, width, *, size: Any = 728, patch_size: int = 504, max_image_size: int = 3024,
    vision_patch_size: int = 14, downsampler_stride: int = 4,
):  # fmt: skip
    """All of the image, and windows over it where it is large or long."""
    side, stride = _square(size, "size"), vision_patch_size * downsampler_stride
    sides = height, width
    if min(sides) < 32 and max(height / width, width / height) > 4:  # padded to a square
        sides = max(sides), max(sides)
    if max(sides) > max_image_size:
        scale = max_image_size / max(sides)
        sides = int(sides[0] * scale), int(sides[1] * scale)
    short, long, windows = min(sides), max(sides), 0
    if long > side or long / short > 1.5:
        window = short if long <= side else patch_size
        window = min(short, window) if long / short > 4 else window
        left = [s >= window and s % window > 0.2 * window for s in sides]  # is worth one more
        windows = math.prod(max(1, s // window + more) for s, more in zip(sides, left, strict=True))
    return (side // stride) ** 2 + windows * (patch_size // stride) ** 2


def llava_onevision_video(frames, height, width, *, num_image_tokens: int = 729):
    """Every frame pooled 2 x 2, and one newline."""
    return frames * math.ceil(int(math.sqrt(num_image_tokens)) / 2) ** 2 + 1


def internvl3(
    height, width, *, image_seq_length: int = 256, crop_to_patches: bool = True,
    min_patches: int = 1, max_patches: int = 12, size: Any = 448,
):  # fmt: skip
    """Tiles of the best grid, and a thumbnail where there is more than one."""
    if not crop_to_patches or max_patches == 1:
        return image_seq_length
    tiles = _closest_grid(height, width, min_patches, max_patches, _area(size, "size"))
    return image_seq_length * (tiles + (tiles > 1))


def megatron_llava(
    height, width, *, img_h: int = 336, img_w: int = 336, patch_dim: int = 14,
    vision_model_type: str = "clip", tokenizer_type: str | None = None,
    disable_vision_class_token: bool = False, class_token_len: int = 1, pixel_shuffle: bool = False,
    use_tile_tags: bool = False, use_tiling: bool = True, max_num_tiles: int = 1,
    use_thumbnail: bool = False, use_area_weighted_aspect_ratio: bool = False,
    dynamic_resolution: bool = False,
):  # fmt: skip
    """Positions of one tile, as Megatron-Core says, times the tiles of Megatron-LM's dynamic
    tiling.

    With ``dynamic_resolution`` the image is one tile of the size that it has already been given.
    """
    from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings

    tile = (height, width) if dynamic_resolution else (img_h, img_w)
    per_tile = get_num_image_embeddings(
        img_h=tile[0], img_w=tile[1], patch_dim=patch_dim, vision_model_type=vision_model_type,
        disable_vision_class_token=disable_vision_class_token, class_token_len=class_token_len,
        pixel_shuffle=pixel_shuffle, use_tile_tags=use_tile_tags, max_num_tiles=max_num_tiles,
        tokenizer_type=tokenizer_type,
    )  # fmt: skip
    if dynamic_resolution or not use_tiling or max_num_tiles <= 1:
        return per_tile
    require(img_h == img_w, f"img_h is {img_h} and img_w {img_w}, but tiles are square")
    choose = _most_covering_grid if use_area_weighted_aspect_ratio else _closest_grid
    tiles = choose(height, width, 1, max_num_tiles, img_h * img_w)
    return per_tile * (tiles + (use_thumbnail and tiles > 1))


@lru_cache
def _grids(fewest: int, most: int) -> list[tuple[int, int]]:
    """All ``(wide, high)`` of ``fewest`` to ``most`` tiles, small grids first."""
    every = ((x, y) for x in range(1, most + 1) for y in range(1, most // x + 1))
    return sorted((grid for grid in every if math.prod(grid) >= fewest), key=math.prod) or [(1, 1)]


def _closest_grid(height: int, width: int, fewest: int, most: int, tile_area: int) -> int:
    """Tiles of the grid closest in aspect ratio; of equals the largest up to twice the image."""
    off = {grid: abs(width / height - grid[0] / grid[1]) for grid in _grids(fewest, most)}
    closest = min(off.values())
    first, *others = (math.prod(grid) for grid, difference in off.items() if difference == closest)
    fits = [n for n in others if height * width > MIN_AREA_OF_LARGER_GRID * tile_area * n]
    return fits[-1] if fits else first


def _most_covering_grid(height: int, width: int, fewest: int, most: int, tile_area: int) -> int:
    """Tiles of the grid with the best product of covered area, up to 0.6, and aspect ratio."""

    def quality(grid: tuple[int, int]) -> float:
        aspect, target = width / height, grid[0] / grid[1]
        covered = min(math.prod(grid) * tile_area / (height * width), MAX_COVERED_AREA)
        return covered * min(target / aspect, aspect / target)

    return math.prod(max(_grids(fewest, most), key=quality))


def _frame_by_frame(image_rule: Callable, merged: int = 1) -> Callable:
    """The rule of a video every few frames of which count as one image, with its settings."""

    def rule(frames, height, width, *, temporal_patch_size: int = merged, **settings):
        return math.ceil(frames / temporal_patch_size) * image_rule(height, width, **settings)

    declared = {**signature(rule).parameters, **signature(image_rule).parameters}
    del declared["settings"]
    rule.__signature__ = Signature([*declared.values()])
    return rule


_IMAGES = (
    gemma3, gemma4, glm_vl, internvl3, kimi_vl, llama4, llava15, megatron_llava, nemotron_omni,
    pixtral, qwen_vl, step3p7,
)  # fmt: skip
RULES = {
    "count": {rule.__name__: rule for rule in _IMAGES},
    "video_count": {
        "gemma4": _frame_by_frame(gemma4),
        "internvl3": _frame_by_frame(internvl3),
        "kimi_vl": _frame_by_frame(kimi_vl, merged=4),
        "llava_onevision": llava_onevision_video,
        "minimax": minimax_video,
        "nemotron": nemotron_video,
        "qwen2_vl": _frame_by_frame(qwen_vl, merged=2),
        "volume": volume_video,
    },
}
