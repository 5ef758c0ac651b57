"""Counts against the processors of transformers, Megatron's own function, and known cases."""

import json
import math
import pickle
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mcore_packing import PackingError, PlaceholderMismatch
from mcore_packing.media import (
    FAMILIES,
    check_placeholders,
    count_with_processor,
    get_family,
    num_image_tokens,
    num_video_tokens,
    register_family,
)

from .laws import examples

CASES = json.loads(Path(__file__).with_name("media_cases").joinpath("counts.json").read_text())
COUNTED_HERE = ("gemma3", "gemma4", "internvl3", "llava15", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
IMAGE = 151655

# Sides at which a family rounds, tiles or clamps, and any others.
EDGES = (1, 2, 3, 7, 10, 13, 14, 17, 20, 27, 28, 29, 42, 48, 56, 70, 99, 224, 280, 336, 448, 512)
SIDES = random.Random(5)
SIZES = [
    *((SIDES.choice(EDGES), SIDES.choice(EDGES)) for _ in range(70)),
    *((SIDES.randint(1, 700), SIDES.randint(1, 700)) for _ in range(120)),
    *((side, 70 * side) for side in range(1, 16)),  # exact ratios, where floats round either way
    *((280 * side, side) for side in range(1, 6)),
    *((SIDES.randint(1, 12), SIDES.randint(800, 2400)) for _ in range(30)),
]
# LLaVA makes the short side 336 pixels long before it crops, whatever the long side becomes.
ROUND_SIZES = [(SIDES.randint(30, 300), SIDES.randint(30, 300)) for _ in range(220)]

# InternVL counts tiles and not pixels, so small tiles make small images as good as large ones.
RUNS = {
    "ernie4_5_vl": {},
    "ernie4_5_vl-small": {"max_pixels": 50_000},
    "gemma3": {},
    "gemma3-pan-and-scan": {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 56,
        "pan_and_scan_max_num_crops": 5,
        "pan_and_scan_min_ratio_to_activate": 1.1,
    },
    "gemma4-70": {"max_soft_tokens": 70},
    "gemma4-280": {"max_soft_tokens": 280},
    "gemma4_unified-70": {"max_soft_tokens": 70},
    "internvl3": {"size": 28},
    "internvl3-2-to-6": {"size": 42, "min_patches": 2, "max_patches": 6, "image_seq_length": 64},
    "llama4": {},
    "llama4-canvas-of-9": {"max_patches": 9, "resize_to_max_canvas": True},
    "llava15": {
        "crop_size": 336,
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "llava15-full": {
        "crop_size": 224,
        "patch_size": 16,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    },
    "minimax_m3_vl": {},
    "ministral3": {"longest_edge": 600, "patch_size": 14, "spatial_merge_size": 2},
    "mistral3": {"longest_edge": 500, "patch_size": 12, "spatial_merge_size": 3},
    "pixtral": {"longest_edge": 1024, "patch_size": 16, "spatial_merge_size": 1},
    "pixtral-400": {"longest_edge": 400},
    "qwen2_5_vl": {"max_pixels": 200_000},
    "qwen2_vl": {},
    "qwen2_vl-p16": {"patch_size": 16, "min_pixels": 1000, "max_pixels": 50_000},
    "qwen3_vl": {
        "patch_size": 16, "merge_size": 2, "min_pixels": 256**2, "max_pixels": 4096**2,
    },
    "step3p7": {},
    "step3p7-600": {"max_image_size": 600, "patch_size": 224},
}  # fmt: skip


OTHERS = {
    "idefics3": {"longest_edge": 364, "max_image_size": 91},
    "llava_next": {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "llava_onevision": {"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
    "mistral3": {"longest_edge": 600, "patch_size": 14, "spatial_merge_size": 2},
    "mllama": {"size": 56},
    "pixtral": {"longest_edge": 400},
    "smolvlm": {"longest_edge": 512, "max_image_size": 128},
}


def unclamped_gemma4(height, width, max_soft_tokens=280, patch_size=16, pooling_kernel_size=3):
    """What vLLM estimated before its PR 40796: no limit on the long side."""
    unit = patch_size * pooling_kernel_size
    scale = math.sqrt(max_soft_tokens * unit**2 / (height * width))
    return max(1, int(scale * height / unit)) * max(1, int(scale * width / unit))


def gemma4_settings(case):
    return {name: case[name] for name in ("max_soft_tokens", "patch_size", "pooling_kernel_size")}


def size_id(case):
    settings = case.get("settings", case)
    limit = settings.get("max_num_tiles", settings.get("max_soft_tokens"))
    patch = settings.get("patch_dim", settings.get("patch_size"))
    return f"{case['height']}x{case['width']}-max{limit}-p{patch}"


def made(make_processor, family, settings):
    key = (family, json.dumps(settings))
    if key not in _MADE:
        _MADE[key] = make_processor(family, **settings)
    return _MADE[key]


_MADE = {}


@pytest.mark.parametrize("case", CASES["family_cases"], ids=lambda case: case["name"])
def test_family_cases(case):
    """Named families by our own rule, all others by their processor."""
    family, size = case["family"], (case["height"], case["width"])
    if "error" in case["expect"]:
        with pytest.raises(ValueError, match="aspect ratio"):
            num_image_tokens(family, *size, **case["settings"])
        return
    expected = case["expect"]["num_placeholders"]
    if family in COUNTED_HERE:
        assert num_image_tokens(family, *size, **case["settings"]) == expected
        return
    pytest.importorskip("transformers")
    from .hf_processors import make_processor

    processor = made(make_processor, family, case["settings"])
    assert count_with_processor(processor, [size]) == [expected]


@pytest.mark.parametrize("case", CASES["gemma4_cases"], ids=size_id)
def test_gemma4_cases(case):
    size = case["height"], case["width"]
    assert num_image_tokens("gemma4", *size, **gemma4_settings(case)) == case["expect"]


def test_the_unclamped_estimate_is_wrong():
    """vLLM's estimate agrees with the cases on everyday images, and fails on long ones."""
    wrong = []
    for case in CASES["gemma4_cases"]:
        estimate = unclamped_gemma4(case["height"], case["width"], **gemma4_settings(case))
        assert estimate == case["unclamped_vllm_pre_40796"]
        if estimate != case["expect"]:
            wrong.append((case["height"], case["width"]))
    assert (3, 900) in wrong and (480, 640) not in wrong
    long = [(1, side) for side in range(300, 4000, 100)]
    assert all(unclamped_gemma4(*size) > num_image_tokens("gemma4", *size) for size in long)


@pytest.mark.parametrize("case", CASES["error_cases"], ids=lambda case: case["family"])
def test_error_cases(case):
    with pytest.raises(ValueError, match=case["message"]):
        num_image_tokens(case["family"], case["height"], case["width"], **case["settings"])


@pytest.mark.parametrize("case", CASES["megatron_tiling_cases"], ids=size_id)
def test_megatron_tiling_cases(case):
    expected = case["expect"]["embeddings_at_256_per_tile"]
    assert expected == 256 * case["expect"]["num_tiles"]
    size = case["height"], case["width"]
    assert num_image_tokens("megatron_llava", *size, **case["settings"]) == expected


@pytest.mark.parametrize(
    "case",
    CASES["megatron_embeddings_per_tile"],
    ids=lambda case: case["settings"]["vision_model_type"],
)
def test_megatron_rows_of_one_tile(case):
    settings = {**case["settings"], "use_tiling": False}
    assert num_image_tokens("megatron_llava", 300, 500, **settings) == case["expect"]


@pytest.mark.parametrize("name", RUNS, ids=str)
def test_against_what_the_processor_writes(name):
    """A blank image of each of at least 200 sizes that it takes, through the whole processor."""
    pytest.importorskip("transformers")
    from .hf_processors import make_processor, placeholder_of, write

    family, settings = name.split("-")[0], RUNS[name]
    processor = made(make_processor, family, settings)
    sizes = ROUND_SIZES if family == "llava15" else SIZES
    refused = 0
    for height, width in sizes:
        try:
            expected = write(processor, placeholder_of(family), height, width)[0]
        except ValueError:
            with pytest.raises(ValueError):
                num_image_tokens(family, height, width, **settings)
            with pytest.raises(ValueError):
                count_with_processor(processor, [(height, width)])
            refused += 1
            continue
        assert num_image_tokens(family, height, width, **settings) == expected, (height, width)
        assert count_with_processor(processor, [(height, width)]) == [expected], (height, width)
    assert len(sizes) - refused >= 200


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl3", "gemma4"])
def test_against_the_helpers_of_transformers(family):
    """Large images too, without making them: the public helpers say the same."""
    pytest.importorskip("transformers")
    from .hf_processors import image_class

    if family == "qwen3_vl":
        make = image_class("qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil")
        limits = {"shortest_edge": 256**2, "longest_edge": 4096**2}
        images = make(patch_size=16, merge_size=2, size=limits)
        per_token, settings = 4, {}
    elif family == "internvl3":
        make = image_class("got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil")
        images = make(size={"height": 448, "width": 448}, crop_to_patches=True)
        per_token, settings = 1 / 256, {}
    sides = random.Random(9)
    for _ in range(2000):
        height = sides.randint(40, 8000)
        width = sides.randint(max(1, height // 190), min(8000, height * 190))
        if family == "gemma4":
            fit = image_class("gemma4.image_processing_pil_gemma4.get_aspect_ratio_preserving_size")
            budget = sides.choice(get_family("gemma4").choices["max_soft_tokens"])
            resized = fit(height, width, 16, budget * 9, 3)
            expected, settings = math.prod(resized) // 48**2, {"max_soft_tokens": budget}
        else:
            expected = images.get_number_of_image_patches(height, width) / per_token
        assert num_image_tokens(family, height, width, **settings) == expected, (height, width)


def tiles_of_llama4(height, width, size, max_patches, resize_to_max_canvas):
    from transformers.image_utils import SizeDict
    from transformers.models.llama4 import image_processing_llama4 as llama4

    canvases = llama4.find_supported_resolutions(max_patches, SizeDict(height=size, width=size))
    best = llama4.get_best_fit((height, width), torch.tensor(canvases), resize_to_max_canvas)
    tiles = math.prod(best.tolist()) // size**2
    return (tiles + (tiles > 1)) * ((size // 14) ** 2 // 4)


def patches_of_pixtral(height, width, longest_edge, patch_size, spatial_merge_size):
    from transformers.models.pixtral import image_processing_pil_pixtral as pixtral

    blank = np.broadcast_to(np.uint8(0), (3, height, width))  # takes no memory
    unit = patch_size * spatial_merge_size
    size = pixtral.get_resize_output_image_size(blank, longest_edge, unit, "channels_first")
    return math.prod(size) // unit**2


def patches_of_step(height, width, size, patch_size):
    from .hf_processors import make_processor

    images = made(make_processor, "step3p7", {}).image_processor
    settings = {"size": {"height": size}, "patch_size": patch_size}
    windows = images.get_number_of_image_patches(height, width, settings)
    return (size // 56) ** 2 + windows * (patch_size // 56) ** 2


PIXTRAL = ("longest_edge", "patch_size", "spatial_merge_size")
FUNCTIONS = {
    "llama4": (
        tiles_of_llama4,
        ("size", "max_patches", "resize_to_max_canvas"),
        [(336, 16, False), (336, 16, True), (336, 12, False), (224, 25, True), (112, 1, False)],
    ),
    "ministral3": (patches_of_pixtral, PIXTRAL, [(1540, 14, 2)]),
    "mistral3": (patches_of_pixtral, PIXTRAL, [(1540, 14, 2), (999, 13, 3)]),
    "pixtral": (patches_of_pixtral, PIXTRAL, [(1024, 16, 1), (400, 16, 1)]),
    "step3p7": (patches_of_step, ("size", "patch_size"), [(728, 504), (112, 224), (336, 168)]),
}


@pytest.mark.parametrize("family", FUNCTIONS)
def test_against_the_functions_of_transformers(family):
    """Large and extreme images too, without making them."""
    pytest.importorskip("transformers")
    from .hf_processors import make_processor

    made(make_processor, family, {})
    function, names, runs = FUNCTIONS[family]
    draw, compared = random.Random(family), 0
    for values in runs:
        settings = dict(zip(names, values, strict=True))
        for _ in range(800):
            sizes = [draw.randint(1, 4000), draw.randint(1, draw.choice([60, 4000, 30_000]))]
            if draw.random() < 0.3:  # where floats round either way
                unit = draw.choice([7, 14, 28, 32, 56, 84, 112, 168, 224, 336, 504, 728])
                sizes = [unit * draw.randint(1, 9), unit * draw.randint(1, 9) + draw.randint(-1, 1)]
            draw.shuffle(sizes)
            expected = function(*sizes, **settings)
            if not expected:
                with pytest.raises(PackingError, match="is resized to nothing"):
                    num_image_tokens(family, *sizes, **settings)
                continue
            assert num_image_tokens(family, *sizes, **settings) == expected, (sizes, settings)
            compared += 1
    assert compared >= 600 * len(runs)


def test_sizes_that_have_to_be_square():
    for family in ("llama4", "step3p7"):
        expected = num_image_tokens(family, 500, 900)
        side = get_family(family).settings["size"]
        square = {"height": side, "width": side}
        assert num_image_tokens(family, 500, 900, size=square) == expected
        with pytest.raises(PackingError, match="size is 112 x 448, expected a square"):
            num_image_tokens(family, 500, 900, size={"height": 112, "width": 448})


@pytest.mark.parametrize("family", OTHERS)
def test_count_with_processor_of_other_families(family):
    """Helpers that count breaks and tags, and processors without a helper."""
    pytest.importorskip("transformers")
    from .hf_processors import make_processor, placeholder_of, write

    processor = made(make_processor, family, OTHERS[family])
    expected, sizes = [], []
    for size in SIZES[::2]:
        try:
            expected.append(write(processor, placeholder_of(family), *size)[0])
            sizes.append(size)
        except ValueError:  # resized to nothing
            with pytest.raises(ValueError):
                count_with_processor(processor, [size])
    assert len(sizes) > 80
    assert [count_with_processor(processor, [size])[0] for size in sizes] == expected
    if family != "llava_onevision":  # an image alone in its sample has more tokens there
        assert count_with_processor(processor, sizes[:20]) == expected[:20]


def test_several_images_in_a_sample_are_counted_as_a_sample():
    """LLaVA-OneVision gives an image among others one tile: 2,190 rows, where 7,357 was said."""
    pytest.importorskip("transformers")
    from .hf_processors import make_processor

    processor = made(make_processor, "llava_onevision", OTHERS["llava_onevision"])
    sizes = [(480, 640), (300, 500), (720, 480)]
    assert count_with_processor(processor, sizes) == [730, 730, 730]
    alone = [count_with_processor(processor, [size])[0] for size in sizes]
    assert min(alone) > 730


def test_settings_of_a_call_are_asked_of_the_processor_itself():
    """Gemma 3's helper ignores pan and scan; the processor does not."""
    pytest.importorskip("transformers")
    from .hf_processors import make_processor

    processor = made(make_processor, "gemma3", {})
    assert count_with_processor(processor, [(480, 640)]) == [256]
    assert count_with_processor(processor, [(480, 640)], do_pan_and_scan=True) == [768]


@pytest.mark.parametrize(
    "family, change",
    [("llava15", "do_center_crop"), ("gemma4", "do_resize"), ("pixtral", "do_resize")],
)
def test_images_that_are_not_made_to_size_are_counted_themselves(family, change):
    """The helpers speak of resized images, whatever the image processor was told."""
    pytest.importorskip("transformers")
    from .hf_processors import make_processor, placeholder_of, write

    processor = make_processor(family, **RUNS.get(family, {}))
    setattr(processor.image_processor, change, False)
    sizes = [(96, 144), (480, 960), (336, 672)]
    expected = [write(processor, placeholder_of(family), *size)[0] for size in sizes]
    assert count_with_processor(processor, sizes) == expected


def test_count_with_processor_refuses_what_it_cannot_ask():
    with pytest.raises(PackingError, match="does not say its image token"):
        count_with_processor(object(), [(10, 10)])
    with pytest.raises(PackingError, match=r"sizes\[1\]: height is 0"):
        count_with_processor(object(), [(1, 1), (0, 4)])
    with pytest.raises(PackingError, match=r"sizes\[0\] is 5"):
        count_with_processor(object(), [5])
    assert count_with_processor(object(), []) == []


def test_megatron_rows_against_megatron():
    """Megatron's own function, over every encoder, tag and shuffle."""
    clip = pytest.importorskip("megatron.core.models.vision.clip_vit_model")
    draw, compared = random.Random(3), 0
    kinds = ["clip", "siglip", "internvit", "internvit300M", "radio", "radio-g", "cradio-g", "vit"]
    tokenizers = [None, "llama3p1", "chatml", "qwen2p0", "qwen2p5", "nemotron5", "nemotron5-a", "x"]
    for _ in range(3000):
        patch = draw.choice([14, 16])
        settings = {
            "img_h": patch * draw.randint(1, 40) + draw.randint(0, 3),
            "img_w": patch * draw.randint(1, 40),
            "patch_dim": patch,
            "vision_model_type": draw.choice(kinds),
            "disable_vision_class_token": draw.random() < 0.5,
            "class_token_len": draw.choice([1, 5, 8]),
            "pixel_shuffle": draw.random() < 0.5,
            "use_tile_tags": draw.random() < 0.5,
            "max_num_tiles": draw.choice([0, 1, 6, 10, 11, 12, 99, 100, 101]),
            "tokenizer_type": draw.choice(tokenizers),
        }
        ask = {**settings, "use_tiling": False}
        try:
            expected = clip.get_num_image_embeddings(**settings)
        except (AttributeError, NotImplementedError, ValueError):
            expected = 0
        if expected == 0:  # Megatron refuses, or shuffles a single row away
            with pytest.raises(PackingError):
                num_image_tokens("megatron_llava", 640, 480, **ask)
            continue
        assert num_image_tokens("megatron_llava", 640, 480, **ask) == expected, settings
        compared += 1
    assert compared > 1000


def megatron_tiles(height, width, **settings):
    settings = {"max_num_tiles": 12, **settings}
    rows = num_image_tokens(
        "megatron_llava",
        height,
        width,
        img_h=448,
        img_w=448,
        vision_model_type="siglip",
        **settings,
    )
    assert rows % 32**2 == 0
    return rows // 32**2


def test_megatron_tiles_are_those_of_internvl():
    """Both tile as InternVL's own code does, so transformers is an oracle for Megatron too."""
    pytest.importorskip("transformers")
    from .hf_processors import image_class

    make = image_class("got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil")
    images = make(size={"height": 448, "width": 448}, crop_to_patches=True)
    for height, width in [(2 * h, 3 * w) for h, w in SIZES]:
        tiles = images.get_number_of_image_patches(height, width)
        assert megatron_tiles(height, width, use_thumbnail=True) == tiles, (height, width)
        assert megatron_tiles(height, width) == max(1, tiles - 1), (height, width)


def test_area_weighted_tiling():
    """Worked by hand: the product of covered area, at most 0.6, and the ratio of both ratios."""
    # 600 x 600: (1, 1) covers 448^2 / 600^2 = 0.557, (2, 2) covers 0.6 and comes first.
    assert megatron_tiles(600, 600, use_area_weighted_aspect_ratio=True) == 4
    assert megatron_tiles(600, 600) == 1  # 4 tiles are more than twice the area of the image
    # 448 x 600: (1, 1) covers 0.6, times 448 / 600 = 0.747; (2, 1) only 0.67; (4, 3) is 0.996.
    assert megatron_tiles(448, 600, use_area_weighted_aspect_ratio=True) == 12
    # 448 x 600 of at most 2 tiles: 0.6 * 0.747 against 0.6 * 0.67.
    few = {"use_area_weighted_aspect_ratio": True, "max_num_tiles": 2}
    assert megatron_tiles(448, 600, **few) == 1
    # 900 x 1200: (1, 1) covers 0.186 only, times 0.75; (2, 1) covers 0.372, times 0.67.
    assert megatron_tiles(900, 1200, **few) == 2
    assert megatron_tiles(900, 1200, max_num_tiles=2) == 1  # by ratio alone


def test_a_size_is_said_in_one_of_three_ways():
    """A swapped pair is silent, so that an image says its own size, and a bare pair is refused."""
    image = Image.new("RGB", (280, 560))  # width, height
    for family in ("qwen2_vl", "internvl3", "llama4", "gemma3"):
        settings = {"do_pan_and_scan": True} if family == "gemma3" else {}
        expected = num_image_tokens(family, 560, 280, **settings)
        assert num_image_tokens(family, image, **settings) == expected
        assert num_image_tokens(family, size=image.size, **settings) == expected
        assert num_image_tokens(family, width=280, height=560, **settings) == expected
    long = num_image_tokens("internvl3", size=(448, 1792))
    assert long == 5 * 256 and num_image_tokens("llama4", size=(300, 1000)) != num_image_tokens(
        "llama4", size=(1000, 300), max_patches=2
    )
    for sides, found in (
        (((280, 560),), "is a pair, and does not say which side is first"),
        ((image, 280), "an image says its own size"),
        ((280,), "the size of the image is not said"),
        ((), "the size of the image is not said"),
    ):
        with pytest.raises(PackingError, match=found):
            num_image_tokens("qwen2_vl", *sides)
        with pytest.raises(PackingError, match=found):
            num_video_tokens("qwen2_vl", 8, *sides)
    for sides in ((560, 280), (560,), (image,)):
        with pytest.raises(PackingError, match="size"):
            num_image_tokens("qwen2_vl", *sides, size=(280, 560))
    videos = [((), {"size": (280, 560)}), ((image,), {}), ((560, 280), {})]
    counts = {num_video_tokens("qwen3_vl", 8, *sides, **named) for sides, named in videos}
    assert len(counts) == 1


def test_what_is_no_pair_is_the_setting_of_that_name():
    """Of InternVL's processor, among others: a tile."""
    image = Image.new("RGB", (900, 500))
    expected = num_image_tokens("internvl3", 500, 900, size=224)
    assert expected != num_image_tokens("internvl3", 500, 900)
    for size in (224, {"height": 224, "width": 224}):
        assert num_image_tokens("internvl3", image, size=size) == expected
    with pytest.raises(PackingError, match="has no setting size"):
        num_image_tokens("qwen2_vl", image, size=224)


def test_a_processor_counts_images_too():
    pytest.importorskip("transformers")
    from .hf_processors import make_processor

    processor = made(make_processor, "qwen2_vl", {})
    image, other = Image.new("RGB", (280, 560)), Image.new("RGB", (112, 112))
    expected = count_with_processor(processor, [(560, 280), (112, 112)])
    assert count_with_processor(processor, [image, other]) == expected
    assert count_with_processor(processor, [image, (112, 112)]) == expected
    for sizes, size in ((None, image.size), (image, None)):
        assert count_with_processor(processor, sizes, size=size) == expected[:1]
    for sizes, size in ((None, None), ([image], (280, 560))):
        with pytest.raises(PackingError, match="one of both"):
            count_with_processor(processor, sizes, size=size)
    least = {"shortest_edge": 64 * 28 * 28, "longest_edge": 64 * 28 * 28}
    assert count_with_processor(processor, [image], size=least)[0] < expected[0]


def test_nobody_needs_pil():
    """To say a size without an image."""
    code = (
        "import sys; sys.modules['PIL'] = None; import mcore_packing as mp\n"
        "print(mp.media.num_image_tokens('qwen2_vl', size=(224, 224)))\n"
        "try:\n    mp.media.num_image_tokens('qwen2_vl', object(), 3)\n"
        "except mp.PackingError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.startswith("64\nheight is <object") and not found.stderr, found.stderr


@pytest.mark.parametrize("height, width", [(0, 5), (5, 0), (-1, 5), (5.0, 5), ("5", 5), (True, 5)])
@pytest.mark.parametrize("family", ["gemma4", "llava15", "megatron_llava", "qwen2_vl"])
def test_sizes_that_are_none(family, height, width):
    with pytest.raises(PackingError, match=r"height|width"):
        num_image_tokens(family, height, width)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].count])
def test_settings_that_are_not_positive_or_not_known(family):
    for name, default in get_family(family).settings.items():
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            context = {"do_pan_and_scan": True} if "pan_and_scan" in name else {}
            with pytest.raises(PackingError, match=name.split("_")[-1]):
                num_image_tokens(family, 640, 480, **context, **{name: -1})
        if isinstance(default, bool):
            context = {"max_num_tiles": 4} if family == "megatron_llava" else {}
            with pytest.raises(PackingError, match=f"{name} is 'false'"):
                num_image_tokens(family, 640, 480, **context, **{name: "false"})
    with pytest.raises(PackingError, match="has no setting patchsize"):
        num_image_tokens(family, 640, 480, patchsize=14)


def test_a_ratio_is_any_positive_number_but_no_bool():
    scan = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 56}
    expected = num_image_tokens("gemma3", 300, 500, **scan)
    for ratio in (np.float32(1.2), np.float64(1.2)):
        scan["pan_and_scan_min_ratio_to_activate"] = ratio
        assert num_image_tokens("gemma3", 300, 500, **scan) == expected
    for ratio in (True, np.bool_(True), float("nan"), "1.2", None, np.ones(2)):
        scan["pan_and_scan_min_ratio_to_activate"] = ratio
        with pytest.raises(PackingError, match="expected a positive number"):
            num_image_tokens("gemma3", 300, 500, **scan)


@pytest.mark.parametrize("family", [*COUNTED_HERE, "gemma3_pan_and_scan", "megatron_llava"])
def test_sizes_and_settings_beyond_reason_raise_the_typed_error(family):
    """What no float can hold, and what is no one value."""
    context = {"max_num_tiles": 4} if family == "megatron_llava" else {}
    context |= {"do_pan_and_scan": True} if "gemma3" in family else {}
    for size in ((10**400, 10**400), (10**400, 1), (1, 10**400)):
        with suppress(PackingError):
            assert num_image_tokens(family, *size, **context) > 0
    for name in get_family(family).settings:
        for value in (np.array([14, 14]), torch.tensor([14, 14]), [14], {"side": 14}, object()):
            with suppress(PackingError):
                assert num_image_tokens(family, 640, 480, **{**context, name: value}) > 0


def test_a_family_without_a_rule_says_so():
    with pytest.raises(PackingError, match="count_with_processor"):
        num_image_tokens("llava_next", 640, 480)
    with pytest.raises(PackingError, match="qwen2_vl"):
        num_image_tokens("qwen9_vl", 640, 480)


def test_register_family():
    family = register_family(
        "test_rows", count=lambda height, width, settings: height // settings["row"],
        settings={"row": 4}, image_token_id=3,
    )  # fmt: skip
    assert num_image_tokens("test_rows", 9, 1) == 2
    assert num_image_tokens("test_rows", 9, 1, row=3) == 3
    assert get_family("test_rows") is family is FAMILIES["test_rows"]
    with pytest.raises(PackingError, match="registered already"):
        register_family("test_rows")
    register_family("test_rows", overwrite=True, like="qwen2_vl", image_token_id=4)
    assert get_family("test_rows").layout["pixel_values"] == "patch"
    with pytest.raises(PackingError, match="no attribute"):
        register_family("test_other", image_token=4)
    with pytest.raises(PackingError, match="images"):
        register_family("test_other", layout={"pixel_values": "images"})
    with pytest.raises(PackingError, match="at least 1"):  # a rule that counts nothing
        num_image_tokens("test_rows", 1, 1, min_pixels=0)
    assert "test_other" not in FAMILIES


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"count": "qwen_vl", "settings": {"side": 4}}, "settings has side, which count lacks"),
        ({"count": "qwen9_vl"}, "count is 'qwen9_vl', expected a function or one of gemma3"),
        ({"count": lambda h, w: 3, "settings": {"row": 4}}, "settings has row, which count lacks"),
        ({"count": 5}, "count is 5"),
        ({"choices": {"size": (1, 2)}}, "choices of size, which is no setting"),
        ({"settings": {"size": 3}, "choices": {"size": (1, 2)}}, "size is 3, expected one of 1, 2"),
        ({"settings": {"size": 3}, "choices": {"size": 3}}, "choices of size are 3"),
        ({"layout": None}, "layout is a NoneType, expected a dict"),
        ({"settings": None}, "settings is a NoneType"),
        ({"choices": [1]}, "choices is a list"),
        ({"layout": {"pixel_values": ["image"]}}, "expected one of sample"),
        ({"turn_opener": None}, "turn_opener is a NoneType"),
        ({"turn_opener": "abc"}, "turn_opener is a str"),
        ({"break_token_ids": (1.5,)}, "break_token_ids holds a float"),
        ({"image_token_id": "<image>"}, "image_token_id is '<image>'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_families_that_would_crash_later_are_refused(attributes, message):
    with pytest.raises(PackingError, match=f"family 'test_crash': .*{message}"):
        register_family("test_crash", **attributes)
    assert "test_crash" not in FAMILIES


def test_rules_without_settings_and_builtins():
    register_family("test_plain", count=lambda height, width: height)
    assert num_image_tokens("test_plain", 3, 4) == 3
    register_family("test_builtin", count=max, overwrite=True)  # it has no signature to read
    with pytest.raises(PackingError, match="cannot count"):
        num_image_tokens("test_builtin", 3, 4)


def test_rules_that_fail():
    def rule(height, width, *, table: dict | None = None):
        return table["rows"]

    register_family("test_failing", count=rule, settings={"table": {}})
    with pytest.raises(PackingError, match=r"cannot count 3 x 4 with .*: KeyError: 'rows'"):
        num_image_tokens("test_failing", 3, 4)

    class Unhashable:
        __hash__ = None

        def __call__(self, height, width):
            return 1

    with pytest.raises(PackingError, match=r"count is .* expected a function"):
        register_family("test_unhashable", count=Unhashable())


def test_settings_are_merged_where_the_rule_is_the_same():
    few = register_family("test_few", like="gemma4", settings={"max_soft_tokens": 70})
    assert few.settings == {**get_family("gemma4").settings, "max_soft_tokens": 70}
    assert num_image_tokens("test_few", 3, 900) == num_image_tokens(
        "gemma4", 3, 900, max_soft_tokens=70
    )
    own = register_family(
        "test_own", like="gemma4", count=lambda *_: 4, settings={"side": 2}, choices={}
    )
    assert own.settings == {"side": 2} and num_image_tokens("test_own", 1, 1) == 4


def test_families_pickle():
    family = get_family("gemma4")
    copy = pickle.loads(pickle.dumps(family))
    assert copy.layout == family.layout and copy.turn_opener == family.turn_opener
    assert copy.settings["max_soft_tokens"] == 280


def test_every_family_names_its_source_and_cannot_be_changed():
    for family in FAMILIES.values():
        if not family.name.startswith(("test_", "my_")):
            assert "transformers 5.24.0" in family.source or "Megatron" in family.source
        with pytest.raises(TypeError):
            family.layout["pixel_values"] = "sample"
    with pytest.raises(TypeError):
        FAMILIES["qwen2_vl"] = None


INDEX = {"image_token_id": "image_token_index"}
IMAGE_AND_VIDEO = {"image_token_id": "image_token_id", "video_token_id": "video_token_id"}
QWEN = {
    **IMAGE_AND_VIDEO,
    "vision_start_id": "vision_start_token_id",
    "vision_end_id": "vision_end_token_id",
}
CONFIGS = {
    "gemma3": (
        "gemma3.Gemma3Config",
        {"vision_start_id": "boi_token_index", "vision_end_id": "eoi_token_index", **INDEX},
    ),
    "gemma4": (
        "gemma4.Gemma4Config",
        {"vision_start_id": "boi_token_id", "vision_end_id": "eoi_token_id", **IMAGE_AND_VIDEO},
    ),
    "gemma4_unified": (
        "gemma4_unified.Gemma4UnifiedConfig",
        {"vision_start_id": "boi_token_id", "vision_end_id": "eoi_token_id", **IMAGE_AND_VIDEO},
    ),
    "idefics3": ("idefics3.Idefics3Config", {"image_token_id": "image_token_id"}),
    "internvl3": ("internvl.InternVLConfig", {"image_token_id": "image_token_id"}),
    "lfm2_vl": ("lfm2_vl.Lfm2VlConfig", {"image_token_id": "image_token_id"}),
    "llava15": ("llava.LlavaConfig", INDEX),
    "llava_next": ("llava_next.LlavaNextConfig", INDEX),
    "llava_onevision": (
        "llava_onevision.LlavaOnevisionConfig",
        {"video_token_id": "video_token_index", **INDEX},
    ),
    "minimax_m3_vl": ("minimax_m3_vl.MiniMaxM3VLConfig", IMAGE_AND_VIDEO),
    "ministral3": ("mistral3.Mistral3Config", INDEX),
    "mistral3": ("mistral3.Mistral3Config", INDEX),
    "mllama": ("mllama.MllamaConfig", INDEX),
    "qwen2_vl": ("qwen2_vl.Qwen2VLConfig", QWEN),
    "qwen2_5_vl": ("qwen2_5_vl.Qwen2_5_VLConfig", QWEN),
    "qwen3_vl": ("qwen3_vl.Qwen3VLConfig", QWEN),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_token_ids_are_those_of_the_configs(family):
    pytest.importorskip("transformers")
    from .hf_processors import image_class

    config, names = CONFIGS[family]
    module, cls = config.split(".")
    found = image_class(f"{module}.configuration_{module}.{cls}")()
    for ours, theirs in names.items():
        assert getattr(get_family(family), ours) == getattr(found, theirs), ours


def as_features(dims):
    """Tensors of these leading dimensions, nested as these are."""
    return torch.zeros(dims, 4) if isinstance(dims, int) else [as_features(d) for d in dims]


@pytest.mark.parametrize("case", CASES["embedding_count_cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_embedding_count_cases(case, kind):
    ids = kind([5, *[IMAGE] * case["placeholders"], 6])
    features = as_features(case["embedding_leading_dims"])
    if case["expect"] == "ok":
        assert check_placeholders(ids, features, IMAGE) is None
        return
    with pytest.raises(ValueError) as caught:
        check_placeholders(ids, features, IMAGE)
    assert isinstance(caught.value, PlaceholderMismatch)
    assert caught.value.actual == case["expect"]["actual"]
    assert caught.value.expected == case["expect"]["expected"]
    for part in case["expect"].get("message_contains", []):
        assert part in str(caught.value)


@pytest.mark.parametrize("case", CASES["exception_cases"], ids=lambda case: case["name"])
def test_exception_cases(case):
    if "construct_positional" in case:
        with pytest.raises(TypeError):
            PlaceholderMismatch(*case["construct_positional"])
    else:
        assert issubclass(PlaceholderMismatch, ValueError)
    error = PlaceholderMismatch(actual=289, expected=280)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.actual, copy.expected, str(copy)) == (289, 280, str(error))
    assert "289" in str(error) and "280" in str(error)


def test_totals_that_agree_are_not_enough():
    ids = [5, *[IMAGE] * 4, 6, *[IMAGE] * 6]
    rows = [torch.zeros(4, 8), torch.zeros(6, 8)]
    for cu_seqlens in ([0, 5, 12], torch.tensor([0, 5, 12], dtype=torch.int32)):
        check_placeholders(ids, rows, IMAGE, cu_seqlens=cu_seqlens)
        with pytest.raises(PlaceholderMismatch, match=r"sequence 0: 4 .* features for 6") as caught:
            check_placeholders(ids, rows[::-1], IMAGE, cu_seqlens=cu_seqlens)
        assert (caught.value.expected, caught.value.actual) == (4, 6)
    check_placeholders(ids, rows[::-1], IMAGE)  # without samples nobody can tell


def test_features_by_sample_come_in_many_shapes():
    ids = [IMAGE, IMAGE, 5, IMAGE, IMAGE, IMAGE, IMAGE]
    bounds = [0, 2, 3, 7]
    one, two = torch.zeros(1, 2, 8), torch.zeros(2, 2, 8)
    check_placeholders(ids, [one, None, [one, one]], IMAGE, cu_seqlens=bounds)
    check_placeholders(ids, [one, [], two], IMAGE, cu_seqlens=bounds)
    check_placeholders(ids, [2, 0, 4], IMAGE, cu_seqlens=bounds)
    check_placeholders(ids, [2, 2, 2], IMAGE, cu_seqlens=bounds, num_images=[1, 0, 2])
    check_placeholders(ids, torch.zeros(3, 2, 8), IMAGE, cu_seqlens=bounds, num_images=[1, 0, 2])
    with pytest.raises(PlaceholderMismatch, match="sequence 0"):
        check_placeholders(ids, [2, 2, 2], IMAGE, cu_seqlens=bounds, num_images=[2, 0, 1])
    batch = [[IMAGE, 5], [5, 6], [IMAGE, IMAGE]]
    for rows in (batch, torch.tensor(batch), [torch.tensor(row) for row in batch]):
        check_placeholders(rows, [1, 0, 2], IMAGE)
        with pytest.raises(PlaceholderMismatch, match="sequence 2"):
            check_placeholders(rows, [1, 0, 3], IMAGE)


def test_flat_features_of_a_batch_are_compared_in_total():
    """Hugging Face gives one tensor for all samples, which says nothing about their ends."""
    batch = [[IMAGE, 5], [IMAGE, IMAGE]]
    for rows in (batch, torch.tensor(batch)):
        check_placeholders(rows, torch.zeros(3, 8), IMAGE)
        with pytest.raises(PlaceholderMismatch) as caught:
            check_placeholders(rows, torch.zeros(4, 8), IMAGE)
        assert (caught.value.expected, caught.value.actual) == (3, 4)


def test_an_integer_tensor_holds_counts():
    for counts in (torch.tensor([2, 4]), np.array([2, 4], dtype=np.int32), [2, 4]):
        check_placeholders([IMAGE] * 6, counts, IMAGE)
        check_placeholders([IMAGE] * 6, counts, IMAGE, cu_seqlens=[0, 2, 6])
        check_placeholders([IMAGE] * 6, counts, IMAGE, cu_seqlens=[0, 0, 6], num_images=[0, 2])
        with pytest.raises(PlaceholderMismatch, match="sequence 0"):
            check_placeholders([IMAGE] * 6, counts, IMAGE, cu_seqlens=[0, 4, 6])


def test_features_that_cannot_be_told_apart_are_refused():
    ids, bounds = [IMAGE, IMAGE, IMAGE], [0, 1, 3]
    for samples in ({"cu_seqlens": [0, 2, 4]}, {}):  # two images of two samples, or of one?
        rows = [IMAGE] * 4 if samples else [[IMAGE] * 2] * 2
        with pytest.raises(PackingError, match="say num_images"):
            check_placeholders(rows, torch.zeros(2, 2, 8), IMAGE, **samples)
    with pytest.raises(PackingError, match="does not say where each sample ends"):
        check_placeholders(ids, torch.zeros(3, 8), IMAGE, cu_seqlens=bounds)
    with pytest.raises(PackingError, match="3 entries for 2 samples"):
        check_placeholders(ids, [1, 1, 1], IMAGE, cu_seqlens=bounds)
    with pytest.raises(PackingError, match="num_images"):
        check_placeholders(ids, [1, 1, 1], IMAGE, cu_seqlens=bounds, num_images=[1, 1])
    with pytest.raises(PackingError, match="with a batch"):
        check_placeholders([[IMAGE], [IMAGE]], [1, 1], IMAGE, cu_seqlens=bounds)
    with pytest.raises(PackingError, match=r"features\[1\] is 0.5"):
        check_placeholders(ids, [2, 0.5], IMAGE)
    with pytest.raises(PlaceholderMismatch, match="past the last boundary"):
        check_placeholders(ids, [1, 1], IMAGE, cu_seqlens=[0, 1, 2])
    check_placeholders([], None, IMAGE)


@examples(300)
@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5), st.data())
def test_check_placeholders_finds_the_first_wrong_sample(images, data):
    """Any counts per image and sample pass, and moving one row to another sample never does."""
    row, bounds = [], [0]
    for counts in images:
        for count in counts:
            row += [5, *[IMAGE] * count]
        bounds.append(len(row))
    check_placeholders(row, images, IMAGE, cu_seqlens=bounds)
    flat = [count for counts in images for count in counts]
    check_placeholders(row, flat, IMAGE, cu_seqlens=bounds, num_images=[len(c) for c in images])
    totals = [sum(counts) for counts in images]
    giver = data.draw(st.integers(0, len(images) - 1))
    taker = data.draw(st.integers(0, len(images) - 1))
    if totals[giver] and giver != taker:
        totals[giver] -= 1
        totals[taker] += 1
        with pytest.raises(PlaceholderMismatch, match=f"sequence {min(giver, taker)}:"):
            check_placeholders(row, totals, IMAGE, cu_seqlens=bounds)
