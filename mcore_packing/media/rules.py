"""The rules that say, from its size alone, how many placeholders an image or a video becomes.

They follow the processors in float arithmetic too: one rounding more or less is another number of
placeholders. The keyword arguments of a rule are the settings of the family's processor, by its own
names: each is declared here only, with its default and, as annotation, with what reads its value.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import Signature, signature
from numbers import Real
from types import MappingProxyType
from typing import Any

from .kinds import as_flag as flag
from .kinds import as_int, require

MAX_ASPECT_RATIO = 200  # smart_resize of transformers 5.23.0
GEMMA3_MIN_CROPS = 2  # Gemma3ImageProcessorPil of transformers 5.23.0
# Of two equally close grids the larger, if the image has this share of its pixels:
# dynamic_preprocess of Megatron-LM main, get_optimal_tiled_canvas of transformers 5.23.0.
MIN_AREA_OF_LARGER_GRID = 0.5
MAX_COVERED_AREA = 0.6  # find_closest_area_weighted_aspect_ratio of Megatron-LM main


def positive(value: Any, name: str) -> int:
    return as_int(value, name, minimum=1)


def not_negative(value: Any, name: str) -> int:
    return as_int(value, name, minimum=0)


def ratio(value: Any, name: str) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    require(number and value > 0, f"{name} is {value!r}, expected a positive number")
    return value


def sides(value: Any, name: str) -> tuple[int, int]:
    """``(height, width)`` of a setting that is an int or has both by name."""
    if not isinstance(value, Mapping):
        return (positive(value, name),) * 2
    both = {"height", "width"} <= set(value)
    require(both, f"{name} is {dict(value)}, expected an int or height and width")
    return positive(value["height"], f"{name}: height"), positive(value["width"], f"{name}: width")


_READERS = (positive, not_negative, ratio, sides, flag)


@lru_cache
def settings_of(rule: Callable, num_sizes: int) -> tuple[dict, dict] | None:
    """Defaults and readers of what a rule declares; None if it takes all settings as one mapping.

    ``num_sizes`` is 2 for images (height, width), 3 for videos (frames, height, width).
    """
    parameters = list(signature(rule).parameters.values())
    declared = [p for p in parameters[num_sizes:] if p.kind is not p.VAR_KEYWORD]
    if any(p.default is p.empty for p in declared) or any(
        p.kind is p.VAR_POSITIONAL for p in parameters
    ):
        return None
    readers = {p.name: p.annotation for p in declared if p.annotation in _READERS}
    return {p.name: p.default for p in declared}, readers


def apply_rule(rule: Callable, size: tuple[int, ...], settings: Mapping[str, Any]) -> Any:
    """What the rule says of this size, its settings read and checked first."""
    declared = settings_of(rule, len(size))
    if declared is None:
        return rule(*size, settings)
    _, readers = declared
    read = {name: readers[name](v, name) if name in readers else v for name, v in settings.items()}
    return rule(*size, **read)


def qwen_vl(
    height: int, width: int, *, patch_size: positive = 14, merge_size: positive = 2,
    min_pixels: positive = 56 * 56, max_pixels: positive = 28 * 28 * 1280,
) -> int:  # fmt: skip
    """Both sides to multiples of a merged patch, then between min and max pixels."""
    return _smart_resize(height, width, patch_size * merge_size, min_pixels, max_pixels)


def volume_video(
    frames: int, height: int, width: int, *, patch_size: positive = 16, merge_size: positive = 2,
    temporal_patch_size: positive = 2, min_pixels: positive = 128 * 32 * 32,
    max_pixels: positive = 768 * 32 * 32, cap_pixels_per_frame: flag = False,
    max_video_tokens: positive = 768,
) -> int:  # fmt: skip
    """Qwen3 and GLM: all frames together between min and max pixels, or each under a cap."""
    unit = patch_size * merge_size
    if cap_pixels_per_frame:
        share = min(max_video_tokens * unit**2, max_pixels // frames)
        max_pixels = frames * max(share, int(min_pixels * 1.05))
    limits = min_pixels, max_pixels
    per_group = _smart_resize(height, width, unit, *limits, frames, temporal_patch_size)
    return math.ceil(frames / temporal_patch_size) * per_group


def _smart_resize(height, width, unit, low, high, frames=1, temporal=None) -> int:
    """Merged patches of one frame, rounded half to even; ``temporal`` where all frames count."""
    if temporal is not None:
        require(frames >= temporal, f"a video of {frames} frames, expected at least {temporal}")
        if min(height, width) < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
    aspect = max(height, width) / min(height, width)
    found = f"{height} x {width} has an aspect ratio of {aspect:.1f}"
    require(aspect <= MAX_ASPECT_RATIO, f"{found}, expected at most {MAX_ASPECT_RATIO}")
    rows, columns = round(height / unit), round(width / unit)  # may be 0: there is no clamp here
    depth = 1 if temporal is None else round(frames / temporal) * temporal
    pixels = depth * rows * unit * columns * unit
    if pixels > high:
        beta = math.sqrt(frames * height * width / high)
        rows = max(1, math.floor(height / beta / unit))
        columns = max(1, math.floor(width / beta / unit))
    elif pixels < low:
        beta = math.sqrt(low / (frames * height * width))
        rows, columns = math.ceil(height * beta / unit), math.ceil(width * beta / unit)
    return rows * columns


def kimi_vl(
    height: int, width: int, *, patch_size: positive = 14, merge_size: positive = 2,
    max_patches: positive = 16384, max_size_per_side: positive = 512,
) -> int:  # fmt: skip
    """Shrunk to a budget of patches and of patches a side, then padded to merged patches."""
    patches = max(1.0, height // patch_size) * max(1.0, width // patch_size)
    longest = max_size_per_side * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
    unit, count = patch_size * merge_size, 1
    for side in (height, width):
        count *= math.ceil(min(max(1, int(side * scale)), longest) / unit)
    return count


def nemotron_omni(
    height: int, width: int, *, patch_size: positive = 16, downsample_ratio: ratio = 0.5,
    min_num_patches: positive = 1024, max_num_patches: not_negative = 13312,
    max_model_len: positive = 16384,
) -> int:  # fmt: skip
    """RADIO's dynamic resolution: the image's own grid, scaled between two numbers of patches."""
    merge = round(1 / downsample_ratio)
    budget = max((max_model_len - 4) * merge**2, min_num_patches)
    budget = max(min(budget, max_num_patches or budget), min_num_patches)
    rows, columns = round(height / patch_size + 0.5), round(width / patch_size + 0.5)
    factor = min(math.sqrt(budget / (rows * columns)), 1.0)
    rows, columns = math.floor(factor * rows), math.floor(factor * columns)
    if budget > min_num_patches and rows * columns < min_num_patches:
        factor = math.sqrt(min_num_patches / (rows * columns))
        rows, columns = math.ceil(factor * rows), math.ceil(factor * columns)
    for _ in range(2):  # rows first, then columns against the rows that they have become
        if remainder := rows % merge:
            fits = (rows + merge - remainder) * columns <= budget
            rows = rows + merge - remainder if fits else max(merge, rows - remainder)
        rows, columns = columns, rows
    return rows * columns // merge**2


def nemotron_video(
    frames: int, height: int, width: int, *, downsample_ratio: ratio = 0.5,
    video_target_num_patches: positive = 1024, video_maintain_aspect_ratio: flag = True,
    video_temporal_patch_dim: positive = 2,
) -> int:  # fmt: skip
    """One tile of about so many patches for every few frames."""
    merge, target = round(1 / downsample_ratio), video_target_num_patches
    grid = [int(math.sqrt(target))] * 2
    if video_maintain_aspect_ratio:
        aspect = width / height
        grid = [max(round(math.sqrt(patches)), 1) for patches in (target / aspect, target * aspect)]
        larger = [side + -side % merge for side in grid]
        grid = larger if math.prod(larger) <= target else grid
    rows, columns = (max(merge, side - side % merge) for side in grid)
    return math.ceil(frames / video_temporal_patch_dim) * (rows * columns // merge**2)


def gemma4(
    height: int, width: int, *, patch_size: positive = 16, pooling_kernel_size: positive = 3,
    max_soft_tokens: positive = 280,
) -> int:  # fmt: skip
    """The largest grid of pooled patches that keeps the aspect ratio and fits the budget."""
    pixels = max_soft_tokens * pooling_kernel_size**2 * patch_size**2
    unit = pooling_kernel_size * patch_size
    scale = math.sqrt(pixels / (height * width))
    rows, columns = math.floor(scale * height / unit), math.floor(scale * width / unit)
    what, budget = f"{height} x {width} is resized to", f"max_soft_tokens {max_soft_tokens}"
    require(rows or columns, f"{what} nothing at {budget}")
    if rows == 0:  # the long side alone decides, and the budget is its limit
        rows, columns = 1, min(math.floor(width / height), max_soft_tokens)
    elif columns == 0:
        rows, columns = min(math.floor(height / width), max_soft_tokens), 1
    tokens = rows * columns
    require(tokens <= max_soft_tokens, f"{what} {tokens} tokens, more than {budget}")
    return tokens


def gemma3(
    height: int, width: int, *, image_seq_length: positive = 256, do_pan_and_scan: flag = False,
    pan_and_scan_min_crop_size: positive = 256, pan_and_scan_max_num_crops: positive = 4,
    pan_and_scan_min_ratio_to_activate: ratio = 1.2,
) -> int:  # fmt: skip
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


def llava15(
    height: int, width: int, *, crop_size: sides = 336, patch_size: positive = 14,
    vision_feature_select_strategy: str = "default", num_additional_image_tokens: not_negative = 1,
) -> int:  # fmt: skip
    """The grid of the centre crop, whatever the image: class token added, or dropped again."""
    dropped = vision_feature_select_strategy == "default"
    grid = (crop_size[0] // patch_size) * (crop_size[1] // patch_size)
    return grid + num_additional_image_tokens - dropped


def llava_onevision_video(
    frames: int, height: int, width: int, *, num_image_tokens: positive = 729
) -> int:
    """Every frame pooled 2 x 2, and one newline."""
    return frames * math.ceil(int(math.sqrt(num_image_tokens)) / 2) ** 2 + 1


def internvl3(
    height: int, width: int, *, image_seq_length: positive = 256, crop_to_patches: flag = True,
    min_patches: positive = 1, max_patches: positive = 12, size: sides = 448,
) -> int:  # fmt: skip
    """Tiles of the best grid, and a thumbnail where there is more than one."""
    if not crop_to_patches or max_patches == 1:
        return image_seq_length
    tiles = _closest_grid(height, width, min_patches, max_patches, size[0] * size[1])
    return image_seq_length * (tiles + (tiles > 1))


def megatron_llava(
    height: int, width: int, *, img_h: positive = 336, img_w: positive = 336,
    patch_dim: positive = 14, vision_model_type: str = "clip",
    disable_vision_class_token: flag = False, class_token_len: not_negative = 1,
    pixel_shuffle: flag = False, use_tile_tags: flag = False, tokenizer_type: str | None = None,
    use_tiling: flag = True, max_num_tiles: not_negative = 1, use_thumbnail: flag = False,
    use_area_weighted_aspect_ratio: flag = False, dynamic_resolution: flag = False,
) -> int:  # fmt: skip
    """Rows of one tile, as Megatron-Core says, times the tiles of Megatron-LM's dynamic tiling.

    With ``dynamic_resolution`` the image is one tile of the size that it has already been given.
    """
    from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings

    tile = (height, width) if dynamic_resolution else (img_h, img_w)
    rows = get_num_image_embeddings(
        img_h=tile[0], img_w=tile[1], patch_dim=patch_dim, vision_model_type=vision_model_type,
        disable_vision_class_token=disable_vision_class_token, class_token_len=class_token_len,
        pixel_shuffle=pixel_shuffle, use_tile_tags=use_tile_tags, max_num_tiles=max_num_tiles,
        tokenizer_type=tokenizer_type,
    )  # fmt: skip
    if dynamic_resolution or not use_tiling or max_num_tiles <= 1:
        return rows
    require(img_h == img_w, f"img_h is {img_h} and img_w {img_w}, but tiles are square")
    choose = _most_covering_grid if use_area_weighted_aspect_ratio else _closest_grid
    tiles = choose(height, width, 1, max_num_tiles, img_h * img_w)
    return rows * (tiles + (use_thumbnail and tiles > 1))


@lru_cache
def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """All ``(columns, rows)`` of ``fewest`` to ``most`` tiles, small grids first."""
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= fewest
    ]
    return tuple(sorted(grids, key=math.prod))


def _closest_grid(height: int, width: int, fewest: int, most: int, tile_area: int) -> int:
    """Tiles of the grid closest in aspect ratio; of equals the largest up to twice the image."""
    best, closest = 1, math.inf
    for columns, rows in _grids(fewest, most):
        tiles = columns * rows
        difference = abs(width / height - columns / rows)
        if difference < closest:
            best, closest = tiles, difference
        elif difference == closest and height * width > MIN_AREA_OF_LARGER_GRID * tile_area * tiles:
            best = tiles
    return best


def _most_covering_grid(height: int, width: int, fewest: int, most: int, tile_area: int) -> int:
    """Tiles of the grid with the best product of covered area, up to 0.6, and aspect ratio."""
    best, highest = 1, -math.inf
    for columns, rows in _grids(fewest, most):
        aspect, target = width / height, columns / rows
        covered = min(columns * rows * tile_area / (height * width), MAX_COVERED_AREA)
        factor = covered * min(target / aspect, aspect / target)
        if factor > highest:
            best, highest = columns * rows, factor
    return best


def _still(video_rule: Callable) -> Callable:
    """The rule of an image that is taken for a video of as many frames as are merged into one."""

    def rule(height: int, width: int, *, temporal_patch_size: positive = 2, **settings) -> int:
        frames = temporal_patch_size
        return video_rule(frames, height, width, temporal_patch_size=frames, **settings)

    return _declaring(rule, video_rule, 2)


def _frame_by_frame(image_rule: Callable, merged: int = 1) -> Callable:
    """The rule of a video every few frames of which count as one image."""

    def rule(frames: int, height: int, width: int, *, temporal_patch_size=merged, **settings):
        return math.ceil(frames / temporal_patch_size) * image_rule(height, width, **settings)

    return _declaring(rule, image_rule, 3)


def _declaring(rule: Callable, other: Callable, num_sizes: int) -> Callable:
    """``rule`` with the settings of the rule that it asks beside its own."""
    mine, theirs = ({**signature(f).parameters} for f in (rule, other))
    del mine["settings"]
    keywords = {n: p for n, p in theirs.items() if p.kind is p.KEYWORD_ONLY}
    rule.__signature__ = Signature([*{**mine, **keywords}.values()])
    return rule


_BY_NAME = (gemma3, gemma4, internvl3, kimi_vl, llava15, megatron_llava, nemotron_omni, qwen_vl)
RULES: Mapping[str, Callable] = MappingProxyType(
    {rule.__name__: rule for rule in _BY_NAME} | {"glm_vl": _still(volume_video)}
)
VIDEO_RULES: Mapping[str, Callable] = MappingProxyType(
    {
        "gemma4": _frame_by_frame(gemma4),
        "internvl3": _frame_by_frame(internvl3),
        "kimi_vl": _frame_by_frame(kimi_vl, merged=4),
        "llava_onevision": llava_onevision_video,
        "nemotron": nemotron_video,
        "qwen2_vl": _frame_by_frame(qwen_vl, merged=2),
        "volume": volume_video,
    }
)
