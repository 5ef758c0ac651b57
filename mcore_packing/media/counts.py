"""How many tokens an image becomes, and whether a prompt has that many placeholders.

The rules of ``num_image_tokens`` need nothing but the size of the image. They follow the processors
in float arithmetic too: one rounding more or less is another number of placeholders.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any

from ..errors import PackingError, PlaceholderMismatch
from .families import (
    GEMMA3_MIN_CROPS,
    MEGATRON_CLASS_TOKEN_LEN,
    MEGATRON_ENCODER_PREFIX,
    MEGATRON_ENCODERS,
    MEGATRON_MAX_COVERED_AREA,
    MEGATRON_MAX_TAGGED_TILES,
    MEGATRON_PIXEL_SHUFFLE,
    MEGATRON_TILE_TAG_TOKENS,
    MEGATRON_TILE_TAG_TOKENS_BY_PREFIX,
    MEGATRON_TWO_DIGIT_TILES,
    MEGATRON_WITHOUT_CLASS_TOKEN,
    MIN_AREA_OF_LARGER_GRID,
    QWEN_MAX_ASPECT_RATIO,
    get_family,
)
from .kinds import as_boundaries, as_counts, as_ids, as_int, as_list, holds_ints, nested, shorten


def num_image_tokens(family: str, height: int, width: int, **settings: Any) -> int:
    """How many placeholders an image of this size needs.

    Begin, end and break tokens are not placeholders and not counted.

    Args:
        family: a registered family that has a count rule: ``megatron_llava``, ``gemma4``,
            ``gemma3``, ``qwen2_vl``, ``qwen2_5_vl``, ``qwen3_vl``, ``llava15``, ``internvl3``, or
            one of ``register_family``.
        height: of the image as it is loaded, in pixels.
        width: likewise.
        **settings: those of the family's processor, by its own names;
            ``get_family(family).settings`` lists them with their defaults.

    Returns:
        The number of placeholders, which is the number of feature rows.

    Raises:
        PackingError: a size is not positive, the family or a setting is unknown, or the processor
            would refuse the image or the setting.

    Source:
        ``replace_image_token`` and the image processors of transformers 5.23.0, which the tests
        run; for ``megatron_llava`` ``get_num_image_embeddings`` of Megatron-Core 0.16.1 and
        ``dynamic_preprocess`` of Megatron-LM's examples/multimodal/image_processing.py.

    Example:
        >>> num_image_tokens("qwen2_vl", 224, 224), num_image_tokens("gemma4", 3, 900)
        (64, 280)
        >>> num_image_tokens("megatron_llava", 480, 640, img_h=448, img_w=448, pixel_shuffle=True,
        ...                  vision_model_type="siglip", max_num_tiles=12, use_thumbnail=True)
        3328
    """
    known = get_family(family)
    height, width = _as_size(height, width)
    rule = _RULES.get(known.count) if isinstance(known.count, str) else known.count
    if rule is None:
        raise PackingError(
            f"family {family!r} has no count rule; ask its processor with count_with_processor, or "
            f"give register_family a count"
        )
    unknown = sorted(set(settings) - set(known.settings))
    if unknown:
        raise PackingError(
            f"family {family!r} has no setting {', '.join(unknown)}, expected some of "
            f"{', '.join(known.settings)}"
        )
    merged = {**known.settings, **settings}
    try:
        for name, values in known.choices.items():
            if merged[name] not in values:
                raise PackingError(
                    f"{name} is {merged[name]!r}, expected one of {', '.join(map(str, values))}"
                )
        count = rule(height, width, merged)
    except PackingError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise PackingError(
            f"family {family!r} cannot count with this size and these settings: {error}"
        ) from error
    return as_int(count, f"the count of family {family!r}", minimum=1)


def count_with_processor(
    processor: Any,
    sizes: Iterable[Sequence[int]],
    *,
    image_token_id: int | None = None,
    **images_kwargs: Any,
) -> list[int]:
    """How many placeholders each image needs, as a Hugging Face processor itself says.

    Processors have a helper for this, made for vLLM, but its answer counts more than placeholders
    for some (InternVL's begin and end, Pixtral's breaks, Idefics' row and column tags), ignores
    pan and scan for Gemma 3 and is missing for others. Where it is known what the helper counts, it
    is asked; for Gemma 3, Pixtral, Idefics 3 and SmolVLM the count follows from the processor's
    settings instead. Any other processor, one that does not resize or does not crop, and any with
    ``images_kwargs``, is handed a blank image of that size, alone in its sample, and the
    placeholders that it writes are counted.

    Args:
        processor: a processor object with its image processor and tokenizer.
        sizes: ``(height, width)`` of each image.
        image_token_id: the placeholder in ``input_ids``, where a blank image is processed; by
            default what the processor says.
        **images_kwargs: passed on to the image processor.

    Returns:
        One count for every size.

    Raises:
        PackingError: a size is not positive, the processor refuses it, or it cannot be asked.

    Source:
        ``_get_num_multimodal_tokens`` and ``replace_image_token`` of the processors in transformers
        5.23.0.

    Example:
        >>> count_with_processor(processor, [(480, 640)])  # doctest: +SKIP
        [391]
    """
    checked = []
    for i, size in enumerate(as_list(sizes, "sizes")):
        try:
            height, width = size
        except (TypeError, ValueError):
            raise PackingError(f"sizes[{i}] is {size!r}, expected (height, width)") from None
        checked.append(_as_size(height, width, f"sizes[{i}]: "))
    names = [base.__name__ for base in type(processor).__mro__]
    ask = next((_HELPERS[name] for name in names if name in _HELPERS), None)
    images = getattr(processor, "image_processor", None)
    made_to_size = all(getattr(images, step, None) is not False for step in _MADE_TO_SIZE_BY)
    try:
        if ask is not None and made_to_size and not images_kwargs:
            counts = [int(count) for count in ask(processor, checked)]
            for size, count in zip(checked, counts, strict=True):
                if count < 1:
                    raise PackingError(f"{names[0]} resizes {size[0]} x {size[1]} to nothing")
            return counts
        return [_count_blank(processor, size, image_token_id, images_kwargs) for size in checked]
    except PackingError:
        raise
    except Exception as error:
        raise PackingError(f"{names[0]} refused: {type(error).__name__}: {error}") from error


def check_placeholders(
    input_ids: Any,
    features: Any,
    image_token_id: int,
    *,
    cu_seqlens: Any = None,
    num_images: Sequence[int] | None = None,
) -> None:
    """Raise if there are not as many placeholders as feature rows, sample by sample.

    Totals alone do not do: samples of 4 and 6 placeholders with features of 6 and 4 rows add up and
    train on each other's images.

    Args:
        input_ids: token ids ``[T]`` or ``[1, T]``, one prompt or one packed row; or a batch
            ``[B, T]``, or a list of ``B`` rows, each of them a sample.
        features: what should replace the placeholders. A tensor ``[rows, H]``, or ``[images, rows,
            H]``; or tensors nested in lists and tuples; an int, also one of a 1-D integer tensor,
            counts for that many rows. With samples one entry for each of them (empty or None where
            it has no images), or one for each image together with ``num_images``. A batch may also
            have all its features in one tensor ``[rows, H]``, as Hugging Face gives them: it does
            not say where a sample ends, and only totals are compared.
        image_token_id: the placeholder.
        cu_seqlens: ``[B + 1]``, the samples of a packed row.
        num_images: how many entries of ``features`` each sample has.

    Raises:
        PlaceholderMismatch: ``expected`` placeholders but ``actual`` feature rows, of the first
            sample that is wrong.
        PackingError: the features cannot be told apart by sample.

    Example:
        >>> check_placeholders([5, 9, 9, 6, 9], [2, 1], 9, cu_seqlens=[0, 3, 5])
        >>> check_placeholders([5, 9, 9, 6, 9], [1, 2], 9, cu_seqlens=[0, 3, 5])
        Traceback (most recent call last):
        mcore_packing.errors.PlaceholderMismatch: sequence 0: 2 placeholders (id 9) but 1 feature \
rows; the row has 3 placeholders and 3 feature rows
    """
    image_token_id = as_int(image_token_id, "image_token_id")
    placeholders = _placeholders_per_sample(input_ids, image_token_id, cu_seqlens)
    flat_batch = cu_seqlens is None and getattr(features, "ndim", 0) == 2
    if num_images is None and (flat_batch or len(placeholders) == 1):
        placeholders = [sum(placeholders)]
        rows = [_num_rows(features, "features")]
    else:
        rows = _rows_per_sample(features, len(placeholders), num_images)
    for seq, (expected, actual) in enumerate(zip(placeholders, rows, strict=True)):
        if expected != actual:
            where = f"sequence {seq}: " if len(rows) > 1 else ""
            total = f"; the row has {sum(placeholders)} placeholders and {sum(rows)} feature rows"
            raise PlaceholderMismatch(
                actual=actual,
                expected=expected,
                message=f"{where}{expected} placeholders (id {image_token_id}) but {actual} "
                f"feature rows{total if len(rows) > 1 else ''}",
            )


def _placeholders_per_sample(input_ids, image_token_id: int, cu_seqlens) -> list[int]:
    batch = getattr(input_ids, "ndim", 1) == 2 and input_ids.shape[0] != 1
    if isinstance(input_ids, (list, tuple)) and input_ids:
        batch = nested(input_ids[0])
    if batch and cu_seqlens is not None:
        raise PackingError("cu_seqlens go with one packed row, but input_ids hold several rows")
    if batch:
        rows = [as_ids(row, f"input_ids[{i}]") for i, row in enumerate(input_ids)]
        return [row.count(image_token_id) for row in rows]
    ids = as_ids(input_ids, "input_ids")
    if cu_seqlens is None:
        return [ids.count(image_token_id)]
    bounds = as_boundaries(cu_seqlens, len(ids))
    counts = [ids[start:stop].count(image_token_id) for start, stop in pairwise(bounds)]
    tail = ids[bounds[-1] :].count(image_token_id)
    if tail:
        raise PlaceholderMismatch(
            actual=0,
            expected=tail,
            message=f"{tail} placeholders (id {image_token_id}) lie past the last boundary at "
            f"{bounds[-1]}, in no sequence",
        )
    return counts


def _num_rows(features, name: str) -> int:
    """Feature rows of a tensor, of tensors nested in lists, or of counts."""
    if features is None:
        return 0
    if isinstance(features, (list, tuple)):
        return sum(_num_rows(entry, f"{name}[{i}]") for i, entry in enumerate(features))
    shape = getattr(features, "shape", None)
    if _are_counts(features):
        return sum(as_counts(features, name))
    if shape is not None and len(shape):
        return math.prod(shape[:-1]) if len(shape) > 1 else int(shape[0])
    return as_int(features, name, minimum=0)


def _are_counts(features) -> bool:
    return getattr(features, "ndim", 0) == 1 and holds_ints(features)


def _rows_per_sample(features, num_samples: int, num_images) -> list[int]:
    shape = getattr(features, "shape", None)
    images_known = num_images is not None and shape is not None and len(shape) > 2
    if features is None:
        features = [None] * num_samples if num_images is None else []
    elif images_known or _are_counts(features):
        features = list(features)  # [images, rows, H]
    elif not isinstance(features, (list, tuple)):
        found = f"one tensor {list(shape)}" if shape is not None else f"a {type(features).__name__}"
        raise PackingError(
            f"features are {found} for {num_samples} samples, which does not say where each sample "
            f"ends; pass one entry per sample, or one per image and say num_images"
        )
    rows = [_num_rows(entry, f"features[{i}]") for i, entry in enumerate(features)]
    if num_images is None:
        if len(rows) != num_samples:
            raise PackingError(
                f"features have {len(rows)} entries for {num_samples} samples; pass one per "
                f"sample, empty where it has no images, or say num_images"
            )
        return rows
    images = as_counts(num_images, "num_images")
    if len(images) != num_samples or sum(images) != len(rows):
        raise PackingError(
            f"num_images {shorten(images)} is for {len(images)} samples and {sum(images)} entries, "
            f"but there are {num_samples} samples and {len(rows)} entries of features"
        )
    return [sum(rows[start:stop]) for start, stop in pairwise([0, *accumulate(images)])]


def _as_size(height, width, where: str = "") -> tuple[int, int]:
    return as_int(height, f"{where}height", 1), as_int(width, f"{where}width", 1)


def _positive(settings: Mapping, *names: str) -> list[int]:
    return [as_int(settings[name], name, minimum=1) for name in names]


def _flag(settings: Mapping, name: str) -> bool:
    """A switch; the string "false" is none, and would be true."""
    value = settings[name]
    if value is None or isinstance(value, bool):
        return bool(value)
    raise PackingError(f"{name} is {value!r}, expected True or False")


def _square(value, name: str) -> tuple[int, int]:
    """``(height, width)`` of a setting that is an int or has both by name."""
    if isinstance(value, Mapping):
        missing = {"height", "width"} - set(value)
        if missing:
            raise PackingError(f"{name} is {dict(value)}, expected an int or height and width")
        return _as_size(value["height"], value["width"], f"{name}: ")
    return _as_size(value, value, f"{name}: ")


def _qwen_vl(height: int, width: int, settings: Mapping) -> int:
    """Both sides to multiples of a merged patch, half to even; then between min and max pixels."""
    patch, merge, low, high = _positive(
        settings, "patch_size", "merge_size", "min_pixels", "max_pixels"
    )
    ratio = max(height, width) / min(height, width)
    if ratio > QWEN_MAX_ASPECT_RATIO:
        raise PackingError(
            f"{height} x {width} has an aspect ratio of {ratio:.1f}, expected at most "
            f"{QWEN_MAX_ASPECT_RATIO}"
        )
    unit = patch * merge
    rows, columns = round(height / unit), round(width / unit)  # may be 0: there is no clamp here
    pixels = rows * unit * columns * unit
    if pixels > high:
        beta = math.sqrt(height * width / high)
        rows = max(1, math.floor(height / beta / unit))
        columns = max(1, math.floor(width / beta / unit))
    elif pixels < low:
        beta = math.sqrt(low / (height * width))
        rows, columns = math.ceil(height * beta / unit), math.ceil(width * beta / unit)
    return rows * columns


def _gemma4(height: int, width: int, settings: Mapping) -> int:
    """The largest grid of pooled patches that keeps the aspect ratio and fits the budget."""
    patch, pool, budget = _positive(
        settings, "patch_size", "pooling_kernel_size", "max_soft_tokens"
    )
    pixels = budget * pool**2 * patch**2
    unit = pool * patch
    scale = math.sqrt(pixels / (height * width))
    rows = math.floor(scale * height / unit)
    columns = math.floor(scale * width / unit)
    if rows == 0 and columns == 0:
        raise PackingError(f"{height} x {width} is resized to nothing at max_soft_tokens {budget}")
    if rows == 0:  # the long side alone decides, and the budget is its limit
        rows, columns = 1, min(math.floor(width / height), budget)
    elif columns == 0:
        rows, columns = min(math.floor(height / width), budget), 1
    if rows * columns > budget:
        raise PackingError(
            f"{height} x {width} is resized to {rows * columns} tokens, more than max_soft_tokens "
            f"{budget}"
        )
    return rows * columns


def _gemma3(height: int, width: int, settings: Mapping) -> int:
    """One sequence for the image, one more for each crop of pan and scan along its long side."""
    (length,) = _positive(settings, "image_seq_length")
    if not _flag(settings, "do_pan_and_scan"):
        return length
    smallest, most = _positive(settings, "pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops")
    long, short = max(height, width), min(height, width)
    activate = settings["pan_and_scan_min_ratio_to_activate"]
    if not isinstance(activate, Real) or isinstance(activate, bool) or not activate > 0:
        raise PackingError(
            f"pan_and_scan_min_ratio_to_activate is {activate!r}, expected a positive number"
        )
    if long / short < activate:
        return length
    crops = min(math.floor(long / short + 0.5), math.floor(long / smallest))
    crops = min(most, max(GEMMA3_MIN_CROPS, crops))
    if min(math.ceil(long / crops), short) < smallest:
        return length
    return length * (1 + crops)


def _llava15(height: int, width: int, settings: Mapping) -> int:
    """The grid of the centre crop, whatever the image: class token added, or dropped again."""
    crop_height, crop_width = _square(settings["crop_size"], "crop_size")
    (patch,) = _positive(settings, "patch_size")
    extra = as_int(settings["num_additional_image_tokens"], "num_additional_image_tokens", 0)
    dropped = settings["vision_feature_select_strategy"] == "default"
    return (crop_height // patch) * (crop_width // patch) + extra - dropped


def _internvl3(height: int, width: int, settings: Mapping) -> int:
    """Tiles of the best grid, and a thumbnail where there is more than one."""
    length, fewest, most = _positive(settings, "image_seq_length", "min_patches", "max_patches")
    tile_height, tile_width = _square(settings["size"], "size")
    if not _flag(settings, "crop_to_patches") or most == 1:
        return length
    tiles = _closest_grid(height, width, fewest, most, tile_height * tile_width)
    return length * (tiles + (tiles > 1))


def _megatron_llava(height: int, width: int, settings: Mapping) -> int:
    """Rows of one tile of Megatron's vision encoder, times the tiles of its dynamic tiling."""
    img_h, img_w, patch = _positive(settings, "img_h", "img_w", "patch_dim")
    most = as_int(settings["max_num_tiles"], "max_num_tiles", 0)
    rows = (img_h // patch) * (img_w // patch) + _num_class_tokens(settings)
    if _flag(settings, "pixel_shuffle"):
        rows //= MEGATRON_PIXEL_SHUFFLE
    if _flag(settings, "use_tile_tags"):
        rows += _num_tile_tag_tokens(settings["tokenizer_type"], most)
    if not _flag(settings, "use_tiling") or most <= 1:
        return rows
    if img_h != img_w:
        raise PackingError(f"img_h is {img_h} and img_w {img_w}, but tiles are square")
    area_weighted = _flag(settings, "use_area_weighted_aspect_ratio")
    choose = _most_covering_grid if area_weighted else _closest_grid
    tiles = choose(height, width, 1, most, img_h * img_w)
    return rows * (tiles + (_flag(settings, "use_thumbnail") and tiles > 1))


def _num_class_tokens(settings: Mapping) -> int:
    """The class tokens that Megatron's encoder keeps in front of its patches."""
    kind = str(settings["vision_model_type"])
    length = as_int(settings["class_token_len"], "class_token_len", 0)
    if kind not in MEGATRON_ENCODERS and not kind.startswith(MEGATRON_ENCODER_PREFIX):
        raise PackingError(
            f"vision_model_type is {kind!r}, expected {', '.join(MEGATRON_ENCODERS)} or "
            f"{MEGATRON_ENCODER_PREFIX}*; for an hf:// encoder that is a siglip say siglip"
        )
    if _flag(settings, "disable_vision_class_token") or kind in MEGATRON_WITHOUT_CLASS_TOKEN:
        return 0
    return MEGATRON_CLASS_TOKEN_LEN.get(kind, length)


def _num_tile_tag_tokens(tokenizer_type, max_num_tiles: int) -> int:
    """The tokens of the text tag in front of each tile, NVLM's way."""
    kind = str(tokenizer_type)
    tokens = MEGATRON_TILE_TAG_TOKENS.get(kind)
    for prefix, number in MEGATRON_TILE_TAG_TOKENS_BY_PREFIX.items():
        tokens = number if tokens is None and kind.startswith(prefix) else tokens
    if tokens is None:
        raise PackingError(
            f"tokenizer_type is {tokenizer_type!r}, but tile tags are known for "
            f"{', '.join(MEGATRON_TILE_TAG_TOKENS)}, "
            f"{', '.join(f'{prefix}*' for prefix in MEGATRON_TILE_TAG_TOKENS_BY_PREFIX)}"
        )
    if max_num_tiles > MEGATRON_MAX_TAGGED_TILES:
        raise PackingError(
            f"max_num_tiles is {max_num_tiles}, expected at most {MEGATRON_MAX_TAGGED_TILES} with "
            f"tile tags"
        )
    return tokens + (max_num_tiles in MEGATRON_TWO_DIGIT_TILES and kind.startswith("qwen"))


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
        ratio, target = width / height, columns / rows
        covered = min(columns * rows * tile_area / (height * width), MEGATRON_MAX_COVERED_AREA)
        factor = covered * min(target / ratio, ratio / target)
        if factor > highest:
            best, highest = columns * rows, factor
    return best


_RULES: dict[str, Callable[[int, int, Mapping], int]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "internvl3": _internvl3,
    "llava15": _llava15,
    "megatron_llava": _megatron_llava,
    "qwen_vl": _qwen_vl,
}


def _helper(processor, sizes) -> list[int]:
    """The processor's own answer, which for these families is placeholders and nothing else."""
    answer = processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in sizes])
    return list(answer["num_image_tokens"])


def _without_begin_and_end(processor, sizes) -> list[int]:
    """InternVL counts both markers."""
    markers = len((processor.start_image_token_id, processor.end_image_token_id))
    return [count - markers for count in _helper(processor, sizes)]


def _without_breaks(processor, sizes) -> list[int]:
    """Pixtral: patches of the resized image, not the breaks between their rows.

    Its helper is not asked: an image 1 or 3 pixels high it takes for channels, and turns it round.
    """
    longest = processor.image_processor.size["longest_edge"]
    patch = processor.patch_size * processor.spatial_merge_size
    counts = []
    for height, width in sizes:
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        counts.append(math.ceil(height / patch) * math.ceil(width / patch))
    return counts


def _all_tiles(processor, sizes) -> list[int]:
    """Idefics and SmolVLM: a fixed number for every tile, counted without tags and newlines."""
    count_tiles = processor.image_processor.get_number_of_image_patches
    return [processor.image_seq_len * max(1, count_tiles(*size)[0]) for size in sizes]


def _with_pan_and_scan(processor, sizes) -> list[int]:
    """Gemma 3's helper leaves pan and scan out."""
    merged = processor._merge_kwargs()["images_kwargs"]
    settings = {name: merged[name] for name in get_family("gemma3").settings if name in merged}
    settings["image_seq_length"] = processor.image_seq_length
    return [num_image_tokens("gemma3", height, width, **settings) for height, width in sizes]


# By class name, so that transformers need not be imported to look at its objects.
_HELPERS: dict[str, Callable] = {
    "Gemma3Processor": _with_pan_and_scan,
    "Gemma4Processor": _helper,
    "Idefics3Processor": _all_tiles,
    "InternVLProcessor": _without_begin_and_end,
    "LlavaNextProcessor": _helper,
    "LlavaOnevisionProcessor": _helper,
    "LlavaProcessor": _helper,
    "PixtralProcessor": _without_breaks,
    "Qwen2VLProcessor": _helper,
    "Qwen2_5_VLProcessor": _helper,
    "Qwen3VLProcessor": _helper,
    "SmolVLMProcessor": _all_tiles,
}


# What the helpers take for granted, whatever the image processor was told.
_MADE_TO_SIZE_BY = ("do_resize", "do_center_crop")


def _count_blank(processor, size: tuple[int, int], image_token_id, images_kwargs) -> int:
    """The placeholders that a blank image alone in its sample gets."""
    from PIL import Image

    if image_token_id is None:
        # The list has begin, end and break tokens too, but the placeholder comes first.
        known = getattr(processor, "image_token_ids", None) or [None]
        image_token_id = known[0]
    text = getattr(processor, "image_token", None)
    if image_token_id is None or text is None:
        raise PackingError(
            f"{type(processor).__name__} does not say its image token; pass image_token_id, or "
            f"count the placeholders of its input_ids"
        )
    blank = Image.new("RGB", (size[1], size[0]))
    output = processor(images=[[blank]], text=[text], images_kwargs=images_kwargs)
    count = as_ids(output["input_ids"][0], "input_ids").count(image_token_id)
    if not count:
        raise PackingError(
            f"{type(processor).__name__} wrote no placeholder with id {image_token_id} for an "
            f"image of {size[0]} x {size[1]}; pass the image_token_id it writes"
        )
    return count
