"""How many tokens images and videos become, and whether a prompt has that many placeholders."""

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..errors import PackingError, PlaceholderMismatch
from .families import SETTINGS, Family, get_family, resolve
from .kinds import as_boundaries, as_ids, as_int, as_list, holds_ints, nested, require, shorten
from .rules import SIZES, apply_rule


def num_image_tokens(
    family: str | Family, height: Any = None, width: int | None = None, *, size: Any = None,
    **settings: Any,
) -> int:  # fmt: skip
    """How many placeholders an image of this size needs: begin, end and breaks are not counted.

    Libraries do not agree on which side is first, and a swapped pair is another number of
    placeholders without an error. So pass the image, or name what is said.

    Args:
        family: a family that has a count rule.
        height: of the image as it is given to the processor, in pixels; or a PIL image, which says
            both sides.
        width: likewise.
        size: in place of both ``(width, height)``, as PIL has it in ``image.size``. What is no pair
            is a setting: some processors have one of this name.
        **settings: those of the family's processor, by its own names;
            ``get_family(family).settings`` lists them with their defaults.

    Raises:
        PackingError: a size is not positive, said twice or not at all, the family or a setting is
            unknown, or the processor would refuse the image or the setting.

    Source:
        ``replace_image_token`` and the image processors of transformers 5.24.0; for Megatron's
        models its ``get_num_image_embeddings``, and ``dynamic_preprocess`` of Megatron-LM's
        examples/multimodal/image_processing.py.

    Example:
        >>> num_image_tokens("qwen2_vl", 224, 224), num_image_tokens("gemma4", size=(900, 3))
        (64, 280)
    """
    sides = _sides(height, width, size, settings)
    return _count(family, "count", sides, settings)


def num_video_tokens(
    family: str | Family, frames: int, height: Any = None, width: int | None = None, *,
    size: Any = None, **settings: Any,
) -> int:  # fmt: skip
    """How many placeholders a video needs, in all its frames: no timestamps, no markers.

    Args:
        family: a family that has a video rule.
        frames: how many are given to the model, after sampling.
        height, width, size: of each frame, in pixels, as ``num_image_tokens`` takes them.
        **settings: those of the family's video processor, as in ``Family.video_settings``.

    Raises:
        PackingError: as for ``num_image_tokens``.

    Source:
        ``replace_video_token`` and the video processors of transformers 5.24.0.

    Example:
        >>> num_video_tokens("qwen3_vl", 8, 224, 224), num_video_tokens("internvl3", 8, 224, 224)
        (196, 2048)
    """
    sides = _sides(height, width, size, settings)
    return _count(family, "video_count", (frames, *sides), settings)


_SAY = "the image itself, size=(width, height) as PIL has it, or height= and width="


def _sides(height, width, size, settings: dict) -> tuple:
    """``(height, width)``, said in one of three ways; what is no pair goes to ``settings``."""
    if size is not None and not _is_pair(size):
        settings["size"], size = size, None
    said = [value is not None for value in (height, width, size)]
    found = f"{height!r} is a pair, and does not say which side is first"
    require(not _is_pair(height), f"{found}; say {_SAY}")
    if _is_image(height):
        require(sum(said) == 1, "an image says its own size; leave out width and size")
        return height.size[::-1]
    if said == [False, False, True]:
        return tuple(size)[::-1]
    require(not said[2], "height or width, and size too, are said; say one of them")
    require(all(said[:2]), f"the size of the image is not said; say {_SAY}")
    return height, width


def _is_pair(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def _is_image(value) -> bool:
    """Whether it is a PIL image: there is none where nobody has imported PIL."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def _count(family: str | Family, count: str, size: tuple, given: dict) -> int:
    """What the rule says with the family's settings and those of the call."""
    family = get_family(family)
    size = _as_size(size, SIZES[count])
    rule, known, name = family.rule(count), getattr(family, SETTINGS[count]), family.name
    advice = f"ask its processor with count_with_processor, or give register_family a {count}"
    require(rule is not None, f"family {name!r} has no count rule; {advice}")
    unknown, expected = ", ".join(sorted(set(given) - set(known))), ", ".join(known)
    require(not unknown, f"family {name!r} has no setting {unknown}, expected some of {expected}")
    settings = {**known, **given}
    try:
        family.check_choices(settings)
        return as_int(apply_rule(rule, size, settings), f"the count of family {name!r}", 1)
    except PackingError:
        raise
    except Exception as error:  # whatever a rule says of sizes and settings beyond reason
        found = f"family {name!r} cannot count {' x '.join(map(str, size))} with {settings}"
        raise PackingError(f"{found}: {type(error).__name__}: {error}") from error


def _as_size(sides: Sequence, names: Sequence[str], where: str = "") -> tuple[int, ...]:
    return tuple(as_int(side, where + name, 1) for side, name in zip(sides, names, strict=True))


def count_with_processor(
    processor: Any, sizes: Iterable | None = None, *, size: Any = None,
    image_token_id: int | None = None, family: str | Family | None = None, **images_kwargs: Any,
) -> list[int]:  # fmt: skip
    """How many placeholders each image of one sample needs, as its processor itself writes them.

    Blank images of these sizes go through the processor together, as one sample: some processors
    give an image among others fewer tokens than an image alone (LLaVA-OneVision).

    Args:
        processor: a processor object with its image processor and tokenizer.
        sizes: of each image of the sample ``(height, width)`` in pixels, or the PIL image.
        size: in their place ``(width, height)`` of one image, as PIL has it in ``image.size``. What
            is no pair goes to the image processor.
        image_token_id: the placeholder in ``input_ids``; by default what ``family`` says, else what
            the processor says.
        family: a registered family, or a ``Family``, where the processor has its real tokenizer.
        **images_kwargs: passed on to the image processor.

    Raises:
        PackingError: a size is not positive, or said twice, the processor refuses it, or it cannot
            be asked.

    Source:
        ``replace_image_token`` of the processors in transformers 5.24.0.

    Example:
        >>> count_with_processor(processor, [(480, 640)])  # doctest: +SKIP
        [391]
    """
    name, checked = type(processor).__name__, []
    if size is not None and not _is_pair(size):
        images_kwargs["size"], size = size, None
    one = (sizes is None) != (size is None)
    require(one, "say sizes of all images, or size=(width, height) of one: one of both")
    if sizes is None or _is_image(sizes):
        each = [tuple(size)[::-1] if sizes is None else sizes]
    else:
        each = as_list(sizes, "sizes")
    for i, one in enumerate(each):
        sides = one.size[::-1] if _is_image(one) else as_list(one, f"sizes[{i}]")
        require(len(sides) == 2, f"sizes[{i}] is {one!r}, expected (height, width), or an image")
        checked.append(_as_size(sides, SIZES["count"], f"sizes[{i}]: "))
    if not checked:
        return []
    if image_token_id is None:
        image_token_id = resolve(family, {}).image_token_id
    try:
        counts = _count_blanks(processor, checked, image_token_id, images_kwargs)
    except PackingError:
        raise
    except Exception as error:
        raise PackingError(f"{name} refused: {type(error).__name__}: {error}") from error
    found = f"{name} wrote placeholders for {len(counts)} of the images {shorten(checked, 4)}"
    require(len(counts) == len(checked), f"{found}; pass the image_token_id it writes")
    return counts


def _count_blanks(processor, sizes, image_token_id: int | None, images_kwargs) -> list[int]:
    """The placeholders between separators, which are special tokens and so never merged."""
    text, tokens = getattr(processor, "image_token", None), getattr(processor, "tokenizer", None)
    if image_token_id is None:
        # What stands once per line of an image is not always the token in the prompt (Llama 4), and
        # the list has begin, end and break tokens too, but the placeholder comes first.
        patch = getattr(processor, "img_patch_token", None)
        first, *_ = getattr(processor, "image_token_ids", None) or [None]
        image_token_id = first if patch is None else tokens.convert_tokens_to_ids(patch)
    known = image_token_id is not None and text is not None
    name = type(processor).__name__
    require(known, f"{name} does not say its image token; pass image_token_id")
    from PIL import Image

    between, ends = "", None
    if len(sizes) > 1:
        names = (getattr(tokens, f"{kind}_token", None) for kind in ("eos", "pad", "bos"))
        between = next(name for name in names if name not in (None, text))
        ends = tokens.convert_tokens_to_ids(between)
    blanks = [Image.new("RGB", (width, height)) for height, width in sizes]
    prompt = between.join([text] * len(blanks))
    output = processor(images=[blanks], text=[prompt], images_kwargs=images_kwargs)
    counts = [0]
    for token in as_ids(output["input_ids"][0], "input_ids"):
        if token == ends:
            counts.append(0)
        counts[-1] += token == image_token_id
    return [count for count in counts if count]


def check_placeholders(
    input_ids: Any, features: Any, image_token_id: int | None = None, *,
    family: str | Family | None = None, cu_seqlens: Any = None,
    num_images: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Raise if there are not as many placeholders as features, sample by sample.

    Totals alone do not do: samples of 4 and 6 placeholders with 6 and 4 features add up and
    train on each other's images.

    Args:
        input_ids: token ids ``[T]`` or ``[1, T]``, one prompt or one packed row; or a batch
            ``[B, T]``, or a list of ``B`` lists, each of them a sample.
        features: what should replace the placeholders: a tensor ``[n, H]`` or ``[images, n, H]``,
            tensors nested in lists, or ints for so many of them. With samples one entry for
            each of them (empty or None where it has no images), or one for each image together
            with ``num_images``. One tensor ``[n, H]`` does not say where a sample ends, so that
            with it only the totals of a batch are compared.
        image_token_id: the placeholder; by default that of ``family``.
        family: a registered family, or a ``Family``.
        cu_seqlens: ``[B + 1]``, the samples of a packed row.
        num_images: how many entries of ``features`` each sample has.

    Raises:
        PlaceholderMismatch: ``expected`` placeholders but ``actual`` features, of the first
            sample that is wrong.
        PackingError: the features cannot be told apart by sample.

    Example:
        >>> check_placeholders([5, 9, 9, 6, 9], [2, 1], 9, cu_seqlens=[0, 3, 5])
        >>> check_placeholders([5, 9, 9, 6, 9], [1, 2], 9, cu_seqlens=[0, 3, 5])
        Traceback (most recent call last):
        mcore_packing.errors.PlaceholderMismatch: sequence 0: 2 placeholders (id 9) but features \
for 1
    """
    if image_token_id is None:
        image_token_id = resolve(family, {}).image_token_id
    token = as_int(image_token_id, "image_token_id")
    placeholders = _placeholders_per_sample(input_ids, token, cu_seqlens)
    flat_batch = cu_seqlens is None and getattr(features, "ndim", 0) == 2
    if num_images is None and (flat_batch or len(placeholders) == 1):
        placeholders, given = [sum(placeholders)], [_num_features(features, "features")]
    else:
        given = _features_per_sample(features, len(placeholders), num_images)
    for seq, (expected, actual) in enumerate(zip(placeholders, given, strict=True)):
        if expected != actual:
            where = f"sequence {seq}: " if len(given) > 1 else ""
            message = f"{where}{expected} placeholders (id {token}) but features for {actual}"
            raise PlaceholderMismatch(message, actual=actual, expected=expected)


def _placeholders_per_sample(input_ids, token: int, cu_seqlens) -> list[int]:
    batch = getattr(input_ids, "ndim", 1) == 2 and len(input_ids) != 1
    if batch or (isinstance(input_ids, (list, tuple)) and input_ids and nested(input_ids[0])):
        require(cu_seqlens is None, "cu_seqlens go with one packed row, not with a batch")
        return [as_ids(ids, f"input_ids[{i}]").count(token) for i, ids in enumerate(input_ids)]
    ids = as_ids(input_ids, "input_ids")
    bounds = as_boundaries(cu_seqlens, len(ids))
    if tail := ids[bounds[-1] :].count(token):
        found = f"{tail} placeholders (id {token}) lie past the last boundary at {bounds[-1]}"
        raise PlaceholderMismatch(f"{found}, in no sequence", actual=0, expected=tail)
    return [ids[start:stop].count(token) for start, stop in pairwise(bounds)]


def _num_features(features, name: str) -> int:
    """How many features a tensor, tensors nested in lists, or counts are."""
    if features is None:
        return 0
    if isinstance(features, (list, tuple)):
        return sum(_num_features(entry, f"{name}[{i}]") for i, entry in enumerate(features))
    if not (shape := getattr(features, "shape", None)):
        return as_int(features, name, minimum=0)
    if len(shape) == 1 and holds_ints(features):
        return sum(as_ids(features, name, minimum=0))
    return math.prod(shape[:-1] or shape)


def _features_per_sample(features, num_samples: int, num_images) -> list[int]:
    """How many features each sample has, whose entries are its own, or ``num_images`` of them."""
    shape = getattr(features, "shape", ())
    if features is None:
        features = [None] * num_samples if num_images is None else []
    elif (len(shape) == 1 and holds_ints(features)) or (len(shape) > 2 and num_images is not None):
        features = list(features)  # counts, or [images, n, H]
    known = isinstance(features, (list, tuple))
    found = f"features are a {type(features).__name__} {[*shape]} for {num_samples} samples"
    require(known, f"{found}, which does not say where each sample ends; say num_images")
    counts = [_num_features(entry, f"features[{i}]") for i, entry in enumerate(features)]
    images = [1] * len(counts) if num_images is None else as_ids(num_images, "num_images", 0)
    found = (
        f"features have {len(counts)} entries for {num_samples} samples of {shorten(images)} images"
    )
    require(len(images) == num_samples and sum(images) == len(counts), f"{found}; say num_images")
    return [sum(counts[start:stop]) for start, stop in pairwise([0, *accumulate(images)])]
