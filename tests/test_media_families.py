"""Every family against its real processor: images, videos, ids; and the table that says so."""

import random
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

from mcore_packing import PackingError
from mcore_packing.media import (
    FAMILIES,
    count_with_processor,
    get_family,
    num_image_tokens,
    num_video_tokens,
    place_image_blocks,
    reconcile,
    split_samples,
    take_samples,
    truncate,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "media.md"
QWEN3 = {"patch_size": 16, "min_pixels": 256**2, "max_pixels": 4096**2}
MISTRAL3 = {"longest_edge": 1540, "patch_size": 14, "spatial_merge_size": 2}
# What the processor is made with, where its class has other defaults than the family's checkpoint.
MADE_WITH = {
    "qwen2_5_vl": {"max_pixels": 28 * 28 * 16384},
    "qwen3_vl": QWEN3,
    "qwen3_5": QWEN3,
    "kimi_vl": {"max_patches": 4096},
    "llava15": {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "llava_next": {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "llava_onevision": {"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
    "gemma3_pan_and_scan": {"do_pan_and_scan": True},
    "ministral3": MISTRAL3,
    "mistral3": MISTRAL3,
}
CHECKED = (
    "ernie4_5_vl", "gemma3", "gemma4", "gemma4_unified", "glm4_5v", "glm4v", "internvl3",
    "internvl3_5", "kimi_k2_5", "kimi_vl", "llama4", "llava15", "llava_onevision", "minimax_m3_vl",
    "ministral3", "mistral3", "nemotron_omni", "pixtral", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl",
    "qwen3_5", "qwen3_omni", "qwen3_vl", "step3p7",
)  # fmt: skip
LAYOUT_ALONE = ("idefics3", "lfm2_vl", "llava_next", "mllama", "smolvlm")
# MiniMax M3 takes frames that have been resized already.
VIDEO_SETTINGS = {"minimax_m3_vl": {"do_resize": True}}
# The same rule and layout as another, or Megatron's own function for an oracle.
ELSEWHERE = {
    "gemma3_pan_and_scan": ("Gemma3Processor, test_media_counts", 225),
    "megatron_llava": ("Megatron's get_num_image_embeddings, test_media_counts", 3000),
    "nemotron_nano_vl_v2": ("Megatron's function, GotOcr2ImageProcessorPil for its tiles", 40),
}
NUM_IMAGES, NUM_VIDEOS = 40, 12


def sizes(number, seed, longest):
    draw = random.Random(seed)
    return [(draw.randint(8, longest), draw.randint(8, longest)) for _ in range(number)]


def frames_and_sizes(number):
    draw = random.Random(7)
    spans = (draw.randint(2, 9) for _ in range(number))
    return [(frames, *size) for frames, size in zip(spans, sizes(number, 8, 300), strict=True)]


def make(family):
    pytest.importorskip("transformers")
    from .hf_processors import make_processor

    return make_processor(family, **MADE_WITH.get(family, {}))


@pytest.mark.parametrize("family", CHECKED)
def test_images_against_the_real_processor(family):
    """By its own defaults: the rule, where there is one, and the processor that is asked."""
    processor = make(family)
    from .hf_processors import placeholder_of, write

    compared = 0
    for size in sizes(NUM_IMAGES, 4, 1200 if get_family(family).count else 700):
        try:
            expected = write(processor, placeholder_of(family), *size)[0]
        except ValueError:
            with pytest.raises(ValueError):
                num_image_tokens(family, *size)
            continue
        if get_family(family).count:
            assert num_image_tokens(family, *size) == expected, size
        assert count_with_processor(processor, [size]) == [expected], size
        compared += 1
    assert compared >= NUM_IMAGES - 4


@pytest.mark.parametrize("family", [name for name in CHECKED if FAMILIES[name].video_count])
def test_videos_against_the_real_processor(family):
    processor = make(family)
    from .hf_processors import placeholder_of, write_video

    placeholder = processor.video_token
    if get_family(family).video_token_id is None or family.startswith("internvl"):
        placeholder = placeholder_of(family)
    given = VIDEO_SETTINGS.get(family, {})
    for size in frames_and_sizes(NUM_VIDEOS):
        expected = write_video(processor, *size, **given).count(placeholder)
        assert num_video_tokens(family, *size, **given) == expected, size


def test_frames_of_minimax_have_been_resized_already():
    """By its own default its processor does not resize them, and fails where they do not fit."""
    processor = make("minimax_m3_vl")
    from .hf_processors import write_video

    for frames, height, width in frames_and_sizes(NUM_VIDEOS):
        with pytest.raises(PackingError, match="do_resize=False, expected multiples of 28"):
            num_video_tokens("minimax_m3_vl", frames, 28 * height + 3, width)
        with pytest.raises(RuntimeError):
            write_video(processor, frames, 28 + height % 27, 56)
        size = frames, 28 * (1 + height // 28), 28 * (1 + width // 28)
        expected = write_video(processor, *size).count(processor.video_token)
        assert num_video_tokens("minimax_m3_vl", *size) == expected, size


def batch_of(processor, samples, color=0):
    """What the processor makes of samples of images of these sizes, each in a colour of its own."""
    from PIL import Image

    token, images, text = processor.image_token, [], []
    for sample in samples:
        images.append([])
        for height, width in sample:
            color += 1
            fill = tuple(37 * color * channel % 256 for channel in (1, 2, 3))
            images[-1].append(Image.new("RGB", (width, height), fill))
        text.append("a" + "b".join([token] * len(sample)))
    options = {"text": text, "padding": True, "return_tensors": "pt"}
    return processor(images=images, **options) if any(samples) else processor(**options)


def same_rows(part, alone):
    """The rows of samples in a batch are those of the samples alone, up to padding."""
    assert part.keys() == alone.keys()
    for key, values in alone.items():
        assert len(part[key]) == len(values), key
        if hasattr(values, "shape") and part[key].shape == values.shape:
            assert torch.equal(part[key], values), key


@pytest.mark.parametrize("family", [*CHECKED, *LAYOUT_ALONE])
def test_layouts_are_what_the_processor_writes(family):
    """A real batch of samples with two images, none and one, cut and gathered again."""
    processor, layout = make(family), get_family(family).layout
    samples = [[(90, 300), (900, 700)], [], [(400, 300)]]
    batch, numbers = batch_of(processor, samples), [2, 0, 1]
    tiled = next((key for key in batch if layout.get(key) == "tile"), None)
    images = [batch_of(processor, [[size]]) for sample in samples for size in sample]
    tiles = [len(one.get(tiled, ())) for one in images] if tiled else None
    parts = split_samples(batch, family, numbers, 1, tiles_per_image=tiles)
    padded = {key: [None] for key in batch if layout[key] == "sample"}  # with no image it has some
    for i, sample in enumerate(samples):
        same_rows(parts[i], {**padded, **batch_of(processor, [sample], sum(numbers[:i]))})
    others = take_samples(batch, family, numbers, [2, 0], tiles_per_image=tiles)
    for key in others:
        rows = [part[key] for part in (parts[2], parts[0]) if key in part]
        assert torch.equal(others[key], torch.cat(rows)), key


def videos_of(processor, videos, **given):
    """A batch of samples with one video each; Nemotron's processor takes one sample at a time."""
    given = {"videos_kwargs": {"do_sample_frames": False, **given}, "return_tensors": "pt"}
    if "Nemotron" in type(processor).__name__:
        alone = [processor(videos=[one], text=[processor.video_token], **given) for one in videos]
        return {key: torch.cat([torch.as_tensor(one[key]) for one in alone]) for key in alone[0]}
    text = [processor.video_token] * len(videos)
    return dict(processor(videos=videos, text=text, padding=True, **given))


@pytest.mark.parametrize("family", [name for name in CHECKED if FAMILIES[name].video_count])
def test_layouts_of_videos_are_what_the_processor_writes(family):
    """Of the installed release: an entry of Nemotron's is a frame before 5.24.0, then a video."""
    processor, given = make(family), VIDEO_SETTINGS.get(family, {})
    shape = (9, 3, 112, 140)  # three chunks of Kimi's, two of MiniMax's
    videos = [torch.full(shape, 50 * i + 20, dtype=torch.uint8) for i in range(3)]
    alone = [videos_of(processor, [video], **given) for video in videos]
    numbers = [len(one.get("video_grid_thw", [None])) for one in alone]
    counts, options = [0] * 3, {"num_videos": numbers, "frames_per_video": [9] * 3}
    if family.startswith("internvl"):  # a video is an image of as many tiles as it has frames
        counts, options = numbers, {"tiles_per_image": [9] * 3}
    batch = videos_of(processor, videos, **given)
    assert "pixel_values_videos" in batch or family.startswith("internvl")
    for part, expected in zip(
        split_samples(batch, family, counts, 1, **options), alone, strict=True
    ):
        same_rows(part, expected)
    gathered = take_samples(batch, family, counts, [2, 1], **options)
    for key in batch:
        assert torch.equal(gathered[key], torch.cat([alone[2][key], alone[1][key]])), key


def test_the_cap_of_qwen3_videos():
    processor = make("qwen3_vl")
    from .hf_processors import write_video

    processor.video_processor.cap_pixels_per_frame = True
    for size in ((4, 700, 900), (8, 300, 200)):
        expected = write_video(processor, *size).count("<|video_pad|>")
        assert num_video_tokens("qwen3_vl", *size, cap_pixels_per_frame=True) == expected


def test_llama4_counts_its_patches_not_its_image_token():
    processor = make("llama4")
    counted = count_with_processor(processor, [(300, 600), (100, 100), (200, 900)])
    alone = [
        count_with_processor(processor, [size])[0] for size in ((300, 600), (100, 100), (200, 900))
    ]
    assert counted == alone and min(counted) >= 144
    patch = processor.tokenizer.convert_tokens_to_ids("<|patch|>")
    assert count_with_processor(processor, [(300, 600)], image_token_id=patch) == counted[:1]


def test_nemotron_nano_vl_tiles():
    """256 rows a tile, up to 12 tiles of 512 and a thumbnail."""
    pytest.importorskip("transformers")
    pytest.importorskip("megatron.core")
    from .hf_processors import image_class

    images = image_class("got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil")
    images = images(size={"height": 512, "width": 512}, crop_to_patches=True)
    for size in sizes(NUM_IMAGES, 3, 2500):
        tiles = images.get_number_of_image_patches(*size)
        assert num_image_tokens("nemotron_nano_vl_v2", *size) == 256 * tiles, size


def test_dynamic_resolution_of_the_llava_model():
    """One tile of the image's own size, as LLaVAModel counts it from imgs_sizes."""
    pytest.importorskip("megatron.core")
    for height, width in ((512, 768), (1024, 32)):
        rows = (height // 16) * (width // 16) // 4
        found = num_image_tokens("nemotron_nano_vl_v2", height, width, dynamic_resolution=True)
        assert found == rows


CONFIGS = {
    "qwen2_5_omni": ("qwen2_5_omni.Qwen2_5OmniThinkerConfig", "token_index", ""),
    "qwen3_omni": ("qwen3_omni_moe.Qwen3OmniMoeThinkerConfig", "token_id", ""),
    "qwen3_5": ("qwen3_5.Qwen3_5Config", "token_id", "vision"),
    "kimi_k2_5": ("kimi_k25.Kimi_K25Config", "token_id", "vision"),
    "glm4v": ("glm4v.Glm4vConfig", "token_id", "image"),
    "glm4_5v": ("glm4v_moe.Glm4vMoeConfig", "token_id", "image"),
    "llama4": ("llama4.Llama4Config", "token_index", "boi"),
    "ernie4_5_vl": ("ernie4_5_vl_moe.Ernie4_5_VLMoeConfig", "token_id", "image"),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_ids_are_those_of_the_configs(family):
    pytest.importorskip("transformers")
    from .hf_processors import image_class

    path, ending, markers = CONFIGS[family]
    module, cls = path.split(".")
    config = image_class(f"{module}.configuration_{module}.{cls}")()
    known = get_family(family)
    assert known.image_token_id == getattr(config, f"image_{ending}")
    video = known.video_prompt_token_id or known.video_token_id
    assert video in (None, getattr(config, f"video_{ending}", None))
    if markers == "boi":
        assert known.vision_start_id == config.boi_token_index
        assert known.vision_end_id == config.eoi_token_index
    elif markers:
        assert known.vision_start_id == getattr(config, f"{markers}_start_token_id")
        assert known.vision_end_id == getattr(config, f"{markers}_end_token_id")
    if family.startswith(("glm", "ernie")):
        assert known.video_start_id == config.video_start_token_id
        assert known.video_end_id == config.video_end_token_id


def test_image_settings_of_mistral3_are_those_of_its_config():
    pytest.importorskip("transformers")
    from transformers import Mistral3Config

    config = Mistral3Config()
    for family in ("mistral3", "ministral3"):
        known = get_family(family).settings
        assert known["spatial_merge_size"] == config.spatial_merge_size
        assert known["longest_edge"] == config.vision_config.image_size
        assert known["patch_size"] == config.vision_config.patch_size


@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v"])
def test_a_real_video_row_is_placed_and_cut(family):
    """The row that the processor writes stays whole, or loses the video with its timestamps."""
    processor = make(family)
    from .hf_processors import placeholder_of, write_video

    tokens = processor.tokenizer
    ids = tokens.convert_tokens_to_ids
    one = get_family(family)
    if family == "qwen3_vl":
        outer = ids(["<|vision_start|>", "<|vision_end|>"])
        names = {"image_token_id": 2, "video_token_id": 3}
        assert ids(["<|image_pad|>", "<|video_pad|>"]) == [2, 3]
        markers = dict(zip(("vision_start_id", "vision_end_id"), outer, strict=True))
        markers |= dict(zip(("video_start_id", "video_end_id"), outer, strict=True))
    else:
        outer = ids(["<|begin_of_video|>", "<|end_of_video|>"])
        inner = ids(["<|begin_of_image|>", "<|end_of_image|>"])
        names = {"image_token_id": ids("<|image|>"), "video_prompt_token_id": ids("<|video|>")}
        markers = dict(zip(("vision_start_id", "vision_end_id"), inner, strict=True))
        markers |= dict(zip(("video_start_id", "video_end_id"), outer, strict=True))
    block = ids(write_video(processor, 6, 64, 96))
    placeholder = ids(processor.video_token if family == "qwen3_vl" else placeholder_of(family))
    prompt = [20, outer[0], ids(processor.video_token), outer[1], 21, 22]
    placed = place_image_blocks(prompt, [block], family=family, **names, **markers)
    row = [20, outer[0], *block, outer[1], 21, 22]
    assert placed.output_ids == row
    types = [2 * (token == placeholder) for token in row]
    assert placed.mm_token_type_ids == types
    runs, total = [], 0
    for kind in [*types, 0]:
        total += kind > 0
        if not kind and total:
            runs, total = [*runs, total], 0
    assert len(runs) == 3 and sum(runs) == num_video_tokens(one, 6, 64, 96)

    def cut(length, side="right"):
        return truncate(
            row, [], length, side=side, family=family, tokens_per_video=[runs], **markers,
            mm_token_type_ids=types, image_token_id=None, video_token_id=None,
        )  # fmt: skip

    whole = cut(len(row))
    assert whole.noop and whole.output_ids == row and whole.kept_videos == [0]
    first, last = types.index(2), len(types) - 1 - types[::-1].index(2)
    for length in range(1, last + 1):  # the cut is before the last placeholder
        assert cut(length).output_ids == [20], length
    for length in range(2, len(row) - first):
        assert cut(length, "left").output_ids == [21, 22], length


# How an image and a video stand in a prompt, and what the special tokens are in the family.
ROWS = {
    "ernie4_5_vl": (
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>",
        {
            "<|IMAGE_PLACEHOLDER|>": "image_token_id", "<|VIDEO_PLACEHOLDER|>": "video_token_id",
            "<|IMAGE_START|>": "vision_start_id", "<|IMAGE_END|>": "vision_end_id",
            "<|VIDEO_START|>": "video_start_id", "<|VIDEO_END|>": "video_end_id",
        },
    ),
    "gemma4_unified": (
        "<img>", "",
        {"<img>": "image_token_id", "<boi>": "vision_start_id", "<eoi>": "vision_end_id"},
    ),
    "llama4": (
        "<|image|>", "",
        {
            "<|patch|>": "image_token_id", "<|image_start|>": "vision_start_id",
            "<|image_end|>": "vision_end_id", "<|image|>": "prompt_token_id",
            "<|tile_x_separator|>": 200084, "<|tile_y_separator|>": 200085,
        },
    ),
    "minimax_m3_vl": (
        "]<]image[>[", "]<]video[>[",
        {
            "]<]image[>[": "image_token_id", "]<]start of image[>[": "vision_start_id",
            "]<]video[>[": "video_token_id", "]<]end of image[>[": "vision_end_id",
        },
    ),
    "ministral3": (
        "[IMG]", "",
        {"[IMG]": "image_token_id", "[IMG_BREAK]": 12, "[IMG_END]": "vision_end_id"},
    ),
    "step3p7": (
        "<im_patch>", "",
        {
            "<im_patch>": "image_token_id", "<im_start>": 128000, "<im_end>": "vision_end_id",
            "<patch_start>": 128003, "<patch_newline>": 128004, "<patch_end>": 128005,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ROWS)
def test_real_rows_are_placed_and_cut(family):
    """Images and a video in text: of one that is not whole, nothing is left in the row."""
    processor, one, (image, video, names) = make(family), get_family(family), ROWS[family]
    from PIL import Image

    def as_row(tokens):
        known = {name: getattr(one, id) if type(id) is str else id for name, id in names.items()}
        return [known.get(token, 900_000 + ord(token[0])) for token in tokens]

    def written(text, **media):
        media = {name: values for name, values in media.items() if values}
        media["videos_kwargs"] = {"do_sample_frames": False}
        ids = processor(text=[text], **media)["input_ids"][0]
        return as_row(processor.tokenizer.convert_ids_to_tokens(ids))

    sizes = ((300, 90), (90, 80), (70, 400))
    images = [Image.new("RGB", size) for size in sizes]
    clips = [torch.zeros(6, 3, 56, 84, dtype=torch.uint8)] if video else []
    blocks = [written(image, images=[[blank]]) for blank in images]
    blocks += [written(video, videos=clips)] if video else []
    row, owners = [], []  # which of them each token is of, None for text
    for i, before in enumerate(("aa", "b", "", "cc" + "d" * (not video))):  # two stand side by side
        block = blocks[i] if i < len(blocks) else []
        row += as_row(before) + block
        owners += [None] * len(before) + [i] * len(block)
    if video:
        row, owners = row + as_row("d"), [*owners, None]
    text = f"aa{image}b{image}{image}cc{video}d"
    assert row == written(text, images=[images], videos=clips)
    prompt = as_row(processor.tokenizer.tokenize(text))
    assert place_image_blocks(prompt, blocks, family=family).output_ids == row

    pads = {one.image_token_id, one.video_token_id}
    runs = [
        [len([*run]) for pad, run in groupby(block, pads.__contains__) if pad] for block in blocks
    ]
    counts = [sum(of_image) for of_image in runs[:3]]
    given = {"family": family, "tokens_per_video": runs[3:]}
    ends = [p for p in range(len(row)) if {row[p - 1], row[p]} - pads]
    for side in ("right", "left"):
        for length in {0, 1, *ends[:: 1 + len(ends) // 50], len(row)}:
            window = range(length) if side == "right" else range(len(row) - length, len(row))
            lost = {owners[p] for p in range(len(row)) if row[p] in pads and p not in window}
            expected = [row[p] for p in window if owners[p] not in lost]
            cut = truncate(row, counts, length, side=side, **given)
            assert cut.output_ids == expected, (side, length)
            assert cut.kept_images == [i for i in range(3) if i not in lost]
            assert cut.kept_videos == [0] * (bool(video) and 3 not in lost)
            left = reconcile([row[p] for p in window], counts, side=side, **given)
            assert left.output_ids == expected, (side, length)


def table():
    """The families, as docs/media.md shows them."""
    lines = [
        "| family | images | videos | opener | first dimension of its tensors | checked against |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in sorted(FAMILIES.items()):
        if name.startswith(("test_", "my_")):
            continue
        how = "rule" if one.count else "processor"
        video = "rule" if one.video_count else ""
        opener = " ".join(map(str, one.turn_opener)) or "text only"
        keys = [k for k, word in one.layout.items() if word != "sample" and k in SHOWN]
        layout = ", ".join(f"`{key}`: {one.layout[key]}" for key in keys) or "sample"
        if name in CHECKED:
            from .hf_processors import processor_name

            against = f"`{processor_name(name)}`, {NUM_IMAGES} images"
            against += f", {NUM_VIDEOS} videos" if video else ""
        elif name in LAYOUT_ALONE:
            from .hf_processors import processor_name

            against = f"`{processor_name(name)}`, its layout alone"
        elif name in ELSEWHERE:
            against = "{}, {} sizes".format(*ELSEWHERE[name])
        lines.append(f"| `{name}` | {how} | {video} | {opener} | {layout} | {against} |")
    return "\n".join(lines)


SHOWN = (
    "pixel_values", "pixel_values_local", "pixel_values_videos", "images", "image_grid_thw",
    "image_grid_hw",
)  # fmt: skip


def test_the_table_in_the_docs_is_this_one():
    pytest.importorskip("transformers")
    assert table() in DOCS.read_text()
    assert {*CHECKED, *ELSEWHERE, *LAYOUT_ALONE} <= set(FAMILIES)


def test_the_walkthrough_prints_what_the_docs_say():
    command = [sys.executable, "-W", "ignore", "examples/media_walkthrough.py"]
    environment = {"PATH": "/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout in re.findall(r"```text\n(.*?)```", DOCS.read_text(), re.DOTALL)
