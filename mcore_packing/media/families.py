"""What each model family is: token ids, turn openers, count settings, tensor layouts; as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from ..errors import PackingError
from .kinds import as_ids, as_token

# What the first dimension of a tensor can count; slicing.py knows how many of each a sample has.
LAYOUT_WORDS = (
    "sample",
    "nonempty_sample",  # samples with at least one image
    "image",
    "patch",  # the product of an image's row of image_grid_thw
    "tile",
    "video",
    "video_patch",  # the product of a video's row of video_grid_thw
    "video_frame",
)


# The named rules of counts.py, and the settings that each of them reads.
COUNT_SETTINGS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "qwen_vl": frozenset({"patch_size", "merge_size", "min_pixels", "max_pixels"}),
        "gemma4": frozenset({"patch_size", "pooling_kernel_size", "max_soft_tokens"}),
        "gemma3": frozenset(
            {
                "image_seq_length",
                "do_pan_and_scan",
                "pan_and_scan_min_crop_size",
                "pan_and_scan_max_num_crops",
                "pan_and_scan_min_ratio_to_activate",
            }
        ),
        "llava15": frozenset(
            {
                "crop_size",
                "patch_size",
                "vision_feature_select_strategy",
                "num_additional_image_tokens",
            }
        ),
        "internvl3": frozenset(
            {"image_seq_length", "crop_to_patches", "min_patches", "max_patches", "size"}
        ),
        "megatron_llava": frozenset(
            {
                "img_h",
                "img_w",
                "patch_dim",
                "vision_model_type",
                "disable_vision_class_token",
                "class_token_len",
                "pixel_shuffle",
                "use_tile_tags",
                "tokenizer_type",
                "use_tiling",
                "max_num_tiles",
                "use_thumbnail",
                "use_area_weighted_aspect_ratio",
            }
        ),
    }
)


@dataclass(frozen=True, eq=False)
class Family:
    """One model family. What is None or empty is not known, or differs between its checkpoints.

    Attributes:
        name: what ``num_image_tokens`` and ``split_samples`` are asked for.
        image_token_id: the placeholder that stands once per image row.
        video_token_id: the same for videos.
        vision_start_id, vision_end_id: the markers around an image.
        break_token_ids: tokens that stand inside an image, between its placeholders.
        prompt_token_id: what stands for an image in an unprocessed prompt, where that is not
            ``image_token_id``.
        bos_token_id: what a prompt begins with.
        turn_opener: the token ids that open a user's turn.
        turn_opener_text: the same as text.
        layout: what the first dimension of each tensor of a batch counts, in ``LAYOUT_WORDS``.
        count: the rule of ``num_image_tokens``: one of its own by name, or
            ``(height, width, settings) -> int``.
        settings: the settings of that rule with their defaults.
        choices: the values that a setting is limited to.
        source: where all this was read.
    """

    name: str
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_id: int | None = None
    vision_end_id: int | None = None
    break_token_ids: tuple[int, ...] = ()
    prompt_token_id: int | None = None
    bos_token_id: int | None = None
    turn_opener: tuple[int, ...] = ()
    turn_opener_text: str = ""
    layout: Mapping[str, str] = field(default_factory=dict)
    count: str | Callable[[int, int, Mapping], int] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self):
        for name in ("layout", "settings", "choices"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise self._error(f"{name} is a {type(value).__name__}, expected a dict")
            object.__setattr__(self, name, MappingProxyType(dict(value)))
        for name in ("break_token_ids", "turn_opener"):
            ids = as_ids(getattr(self, name), f"family {self.name!r}: {name}")
            object.__setattr__(self, name, tuple(ids))
        for name in (item.name for item in fields(self) if item.name.endswith("_id")):
            token = as_token(getattr(self, name), f"family {self.name!r}: {name}")
            object.__setattr__(self, name, token)
        for key, word in self.layout.items():
            if word not in LAYOUT_WORDS:
                raise self._error(
                    f"layout[{key!r}] is {word!r}, expected one of {', '.join(LAYOUT_WORDS)}"
                )
        self._check_count()

    def _check_count(self) -> None:
        """A rule that exists, all of its settings, and choices that allow their defaults."""
        if isinstance(self.count, str) and self.count in COUNT_SETTINGS:
            missing = sorted(COUNT_SETTINGS[self.count] - set(self.settings))
            if missing:
                raise self._error(f"its settings lack {', '.join(missing)} for {self.count!r}")
        elif self.count is not None and not callable(self.count):
            raise self._error(
                f"count is {self.count!r}, expected a function or one of "
                f"{', '.join(sorted(COUNT_SETTINGS))}"
            )
        for name, values in self.choices.items():
            if name not in self.settings:
                raise self._error(f"it has choices of {name}, which is no setting")
            if not isinstance(values, (list, tuple)):
                raise self._error(f"choices of {name} are {values!r}, expected a tuple")
            if self.settings[name] not in values:
                raise self._error(
                    f"{name} is {self.settings[name]!r}, expected one of "
                    f"{', '.join(map(str, values))}"
                )

    def _error(self, what: str) -> PackingError:
        return PackingError(f"family {self.name!r}: {what}")

    def __reduce__(self):
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return _rebuild_family, (plain,)


def _rebuild_family(attributes: dict) -> Family:
    return Family(**attributes)


_FAMILIES: dict[str, Family] = {}
FAMILIES: Mapping[str, Family] = MappingProxyType(_FAMILIES)


def get_family(name: str) -> Family:
    """The family of that name.

    Args:
        name: such as ``"qwen2_5_vl"``.

    Returns:
        The ``Family``.

    Raises:
        PackingError: there is none; the message lists those that there are.

    Example:
        >>> get_family("gemma4").image_token_id
        258880
    """
    try:
        return _FAMILIES[name]
    except (KeyError, TypeError):
        raise PackingError(
            f"family {name!r} is not registered, expected one of {', '.join(sorted(_FAMILIES))}; "
            f"register_family adds one, count_with_processor needs none"
        ) from None


def register_family(
    name: str, *, like: str | None = None, overwrite: bool = False, **attributes: Any
) -> Family:
    """Make a family known by its name.

    Args:
        name: what it will be called.
        like: a registered family that gives every attribute not named here. ``settings`` go over
            its own where the count rule is the same; ``layout`` and ``choices`` replace its own.
        overwrite: allow a name that is taken.
        **attributes: of ``Family``.

    Returns:
        The new family.

    Raises:
        PackingError: the name is taken, an attribute does not exist or makes no sense, a layout
            word or count rule is unknown, a rule lacks a setting.

    Example:
        >>> family = register_family("my_qwen", like="qwen2_vl", image_token_id=7)
        >>> family.image_token_id, family.layout["pixel_values"]
        (7, 'patch')
    """
    if not isinstance(name, str) or not name:
        raise PackingError(f"name is {name!r}, expected a string")
    if name in _FAMILIES and not overwrite:
        raise PackingError(f"family {name!r} is registered already; pass overwrite=True")
    known = {item.name for item in fields(Family)} - {"name"}
    unknown = sorted(set(attributes) - known)
    if unknown:
        raise PackingError(
            f"family {name!r}: {', '.join(unknown)} is no attribute of a family, expected some of "
            f"{', '.join(sorted(known))}"
        )
    base = Family(name) if like is None else get_family(like)
    given = attributes.get("settings")
    if isinstance(given, Mapping) and attributes.get("count", base.count) == base.count:
        attributes["settings"] = {**base.settings, **given}
    _FAMILIES[name] = replace(base, name=name, **attributes)
    return _FAMILIES[name]


# Keys that every processor of transformers gives, one row per sample.
_TEXT = dict.fromkeys(
    ("input_ids", "attention_mask", "labels", "loss_mask", "mm_token_type_ids", "token_type_ids"),
    "sample",
)
_CHATML = {"turn_opener": (151644, 872, 198), "turn_opener_text": "<|im_start|>user\n"}

register_family(
    "qwen2_vl",
    image_token_id=151655,
    video_token_id=151656,
    vision_start_id=151652,
    vision_end_id=151653,
    **_CHATML,
    layout=_TEXT
    | {
        "pixel_values": "patch",
        "image_grid_thw": "image",
        "pixel_values_videos": "video_patch",
        "video_grid_thw": "video",
        "second_per_grid_ts": "video",
    },
    count="qwen_vl",
    settings={
        "patch_size": 14,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 1280,
    },
    source="transformers 5.23.0: Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor; "
    "ChatML opener and markers as in TRL's qwen2_vl chat template",
)
register_family(
    "qwen2_5_vl",
    like="qwen2_vl",
    settings={"max_pixels": 28 * 28 * 16384},
    source="transformers 5.23.0: Qwen2_5_VLConfig; max_pixels in preprocessor_config.json of "
    "Qwen/Qwen2.5-VL-7B-Instruct; otherwise as qwen2_vl",
)
register_family(
    "qwen3_vl",
    like="qwen2_vl",
    settings={"patch_size": 16, "min_pixels": 256**2, "max_pixels": 4096**2},
    source="transformers 5.23.0: Qwen3VLConfig, Qwen3VLProcessor; settings in "
    "preprocessor_config.json of Qwen/Qwen3-VL-8B-Instruct; TRL's qwen3_vl chat template",
)
register_family(
    "gemma4",
    image_token_id=258880,
    video_token_id=258884,
    vision_start_id=255999,
    vision_end_id=258882,
    bos_token_id=2,
    turn_opener=(105, 2364, 107),
    turn_opener_text="<|turn>user\n",
    layout=_TEXT
    | {
        "pixel_values": "image",
        "image_position_ids": "image",
        "num_soft_tokens_per_image": "image",
        "pixel_values_videos": "video_frame",
        "video_position_ids": "video_frame",
        "num_frames_per_video": "video",
        "num_soft_tokens_per_video": "video",
    },
    count="gemma4",
    settings={"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280},
    choices={"max_soft_tokens": (70, 140, 280, 560, 1120)},
    source="transformers 5.23.0: Gemma4Config, Gemma4ImageProcessorPil, Gemma4VideoProcessor; "
    "tokenizer of google/gemma-4-E4B-it (opener)",
)
register_family(
    "gemma3",
    image_token_id=262144,
    vision_start_id=255999,
    vision_end_id=256000,
    prompt_token_id=255999,
    bos_token_id=2,
    turn_opener=(105, 2364, 107),
    turn_opener_text="<start_of_turn>user\n",
    layout=_TEXT | {"pixel_values": "image"},
    count="gemma3",
    settings={
        "image_seq_length": 256,
        "do_pan_and_scan": False,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
    source="transformers 5.23.0: Gemma3Config, Gemma3Processor; TRL's gemma3 chat template",
)
register_family(
    "gemma3_pan_and_scan",
    like="gemma3",
    layout=_TEXT | {"pixel_values": "tile"},
    settings={"do_pan_and_scan": True},
    source="transformers 5.23.0: Gemma3ImageProcessorPil, which puts an image before its crops",
)
register_family(
    "llava15",
    image_token_id=32000,
    bos_token_id=1,
    turn_opener=(3148, 1001, 29901),
    turn_opener_text="USER:",
    layout=_TEXT | {"pixel_values": "image"},
    count="llava15",
    settings={
        "crop_size": 336,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    choices={"vision_feature_select_strategy": ("default", "full")},
    source="transformers 5.23.0: LlavaConfig, LlavaProcessor; tokens of 'USER: <image>' in its "
    "processor test for llava-hf/llava-1.5-7b-hf",
)
register_family(
    "internvl3",
    image_token_id=151667,
    vision_start_id=151665,
    vision_end_id=151666,
    **_CHATML,
    layout=_TEXT | {"pixel_values": "tile"},
    count="internvl3",
    settings={
        "image_seq_length": 256,
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "size": 448,
    },
    source="transformers 5.23.0: InternVLConfig, InternVLProcessor, GotOcr2ImageProcessorPil; "
    "tokenizer of OpenGVLab/InternVL3-1B-hf",
)
register_family(
    "megatron_llava",
    image_token_id=-200,
    layout=_TEXT
    | {"tokens": "sample", "images": "tile", "num_image_tiles": "image", "num_tiles": "image"},
    count="megatron_llava",
    settings={
        "img_h": 336,
        "img_w": 336,
        "patch_dim": 14,
        "vision_model_type": "clip",
        "disable_vision_class_token": False,
        "class_token_len": 1,
        "pixel_shuffle": False,
        "use_tile_tags": False,
        "tokenizer_type": None,
        "use_tiling": True,
        "max_num_tiles": 1,
        "use_thumbnail": False,
        "use_area_weighted_aspect_ratio": False,
    },
    source="Megatron-Core 0.16.1: DEFAULT_IMAGE_TOKEN_INDEX and the arguments of "
    "LLaVAModel.forward in llava_model.py, get_num_image_embeddings in clip_vit_model.py; "
    "Megatron-LM main: examples/multimodal/image_processing.py and multimodal_args.py",
)

# The opener of megatron_llava is its tokenizer's prompt format; ids are up to that tokenizer.
MEGATRON_TURN_OPENERS: Mapping[str, str] = MappingProxyType(
    {
        "chatml": "<|im_start|>user\n",
        "llama3": "<|start_header_id|>user<|end_header_id|>\n\n",
        "llama3p1": "<|start_header_id|>user<|end_header_id|>\n\n",
        "llama3p2": "<|start_header_id|>user<|end_header_id|>\n\n",
        "mistral": "[INST] ",
        "nemotron5": "<SPECIAL_14>user\n",
        "nemotron5-aligned": "User\n",
        "nvlm-yi-34b": "<|im_start|>user\n",
        "qwen2p0": "<|im_start|>user\n",
        "qwen2p5": "<|im_start|>user\n",
    }
)

# Constants of the count rules that nobody can set.
GEMMA3_MIN_CROPS = 2  # Gemma3ImageProcessorPil of transformers 5.23.0
# Of two equally close grids the larger, if the image has this share of its pixels:
# dynamic_preprocess of Megatron-LM main, get_optimal_tiled_canvas of transformers 5.23.0.
MIN_AREA_OF_LARGER_GRID = 0.5
QWEN_MAX_ASPECT_RATIO = 200  # smart_resize of transformers 5.23.0
MEGATRON_MAX_COVERED_AREA = 0.6  # find_closest_area_weighted_aspect_ratio of Megatron-LM main

# get_num_image_embeddings of Megatron-Core 0.16.1: which encoders exist, and who has class tokens.
MEGATRON_ENCODERS = ("clip", "siglip", "internvit", "internvit300M", "cradio-g")
MEGATRON_ENCODER_PREFIX = "radio"
MEGATRON_WITHOUT_CLASS_TOKEN = ("siglip",)
MEGATRON_CLASS_TOKEN_LEN: Mapping[str, int] = MappingProxyType({"cradio-g": 8})  # over the setting
MEGATRON_PIXEL_SHUFFLE = 4  # rows that become one

# The same function: tokens of the text tag in front of each tile, by tokenizer_type or its prefix.
MEGATRON_TILE_TAG_TOKENS: Mapping[str, int] = MappingProxyType(
    {"llama3p1": 5, "chatml": 5, "qwen2p0": 5, "qwen2p5": 5}
)
MEGATRON_TILE_TAG_TOKENS_BY_PREFIX: Mapping[str, int] = MappingProxyType({"nemotron5": 6})
MEGATRON_TWO_DIGIT_TILES = range(11, 100)  # Qwen tokenizers write their tags with one token more
MEGATRON_MAX_TAGGED_TILES = 100

# Families below have no count rule here: count_with_processor asks their processors.
register_family(
    "llava_next",
    image_token_id=32000,
    bos_token_id=1,
    turn_opener_text="[INST] ",
    layout=_TEXT | {"pixel_values": "image", "image_sizes": "image"},
    source="transformers 5.23.0: LlavaNextConfig, LlavaNextImageProcessorPil; TRL's llava_next "
    "chat template",
)
register_family(
    "llava_onevision",
    image_token_id=151646,
    video_token_id=151647,
    **_CHATML,
    layout=_TEXT
    | {
        "pixel_values": "image",
        "image_sizes": "image",
        "batch_num_images": "nonempty_sample",
        "pixel_values_videos": "video",
    },
    source="transformers 5.23.0: LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil; ChatML "
    "opener of its Qwen2 tokenizer",
)
register_family(
    "pixtral",
    image_token_id=10,
    vision_end_id=13,
    break_token_ids=(12,),
    bos_token_id=1,
    turn_opener=(3,),
    turn_opener_text="[INST]",
    layout=_TEXT | {"pixel_values": "image", "image_sizes": "image"},
    source="transformers 5.23.0: PixtralProcessor, PixtralImageProcessorPil; special tokens of "
    "mistralai/Pixtral-12B-2409 (Tekken)",
)
register_family(
    "mistral3",
    like="pixtral",
    source="transformers 5.23.0: Mistral3Config, PixtralProcessor; special tokens of "
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503 (Tekken)",
)
register_family(
    "idefics3",
    image_token_id=128257,
    bos_token_id=128000,
    turn_opener_text="User:",
    layout=_TEXT | {"pixel_values": "sample", "pixel_attention_mask": "sample"},
    source="transformers 5.23.0: Idefics3Config, Idefics3ImageProcessorPil; TRL's idefics3 chat "
    "template, which writes 'User: ' where the turn begins with text",
)
register_family(
    "smolvlm",
    like="idefics3",
    image_token_id=49190,
    bos_token_id=1,
    source="transformers 5.23.0: SmolVLMImageProcessorPil; tokenizer of "
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct; TRL's smolvlm chat template",
)
register_family(
    "mllama",
    image_token_id=128256,
    bos_token_id=128000,
    turn_opener=(128006, 882, 128007, 271),
    turn_opener_text="<|start_header_id|>user<|end_header_id|>\n\n",
    layout=_TEXT
    | {
        "pixel_values": "sample",
        "aspect_ratio_ids": "sample",
        "aspect_ratio_mask": "sample",
        "cross_attention_mask": "sample",
    },
    source="transformers 5.23.0: MllamaConfig, MllamaProcessor, MllamaImageProcessorPil; "
    "Llama 3 header tokens",
)
register_family(
    "lfm2_vl",
    image_token_id=396,
    turn_opener_text="<|im_start|>user\n",
    layout=_TEXT
    | {"pixel_values": "tile", "pixel_attention_mask": "tile", "spatial_shapes": "tile"},
    source="transformers 5.23.0: Lfm2VlConfig, Lfm2VlImageProcessor; TRL's lfm2_2_5_vl chat "
    "template",
)
