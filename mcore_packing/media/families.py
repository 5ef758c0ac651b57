"""What each model family is: token ids, turn openers, count settings, tensor layouts; as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from ..errors import PackingError
from .kinds import as_flag, as_ids, as_token
from .rules import RULES, VIDEO_RULES, settings_of

# What the first dimension of a tensor can count; slicing.py knows how many of each a sample has.
LAYOUT_WORDS = (
    "sample",
    "nonempty_sample",  # samples with at least one image
    "image",
    "patch",  # the product of an image's row of image_grid_thw (or image_grid_hw)
    "tile",
    "video",
    "video_patch",  # the product of a video's row of video_grid_thw
    "video_frame",
)


@dataclass(frozen=True, eq=False)
class Family:
    """One model family. What is None or empty is not known, or differs between its checkpoints.

    Attributes:
        name: what it is asked for by.
        image_token_id: the placeholder that stands once per image row.
        video_token_id: the same for videos; None where they are written with ``image_token_id``.
        vision_start_id, vision_end_id: the markers around an image, and each frame of a video.
        video_start_id, video_end_id: the markers around a whole video and its timestamps.
        break_token_ids: tokens that stand inside an image, before or between its placeholders.
        pad_token_id: padding at the ends of a sequence.
        prompt_token_id: what stands for an image in an unprocessed prompt, where that is not
            ``image_token_id``.
        video_prompt_token_id: the same for a video, where that is not ``video_token_id``.
        bos_token_id: what a prompt begins with.
        turn_opener: the token ids that open a user's turn.
        turn_opener_text: the same as text.
        shifted: labels and loss mask are shifted, as Megatron's are: entry ``t`` is about token
            ``t + 1``.
        drop_dangling: the markers, and the timestamps, of an image or video go with it.
        layout: what the first dimension of each tensor of a batch counts, in ``LAYOUT_WORDS``.
        count: the rule of ``num_image_tokens``: one of ``rules.RULES`` by name, or
            ``(height, width, *, its settings) -> int``, or ``(height, width, settings) -> int``.
        settings: the settings of that rule, with what differs from the rule's own defaults.
        video_count, video_settings: the same for videos, of (frames, height, width).
        choices: the values that a setting is limited to.
        source: where all this was read.
    """

    name: str
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_id: int | None = None
    vision_end_id: int | None = None
    video_start_id: int | None = None
    video_end_id: int | None = None
    break_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    prompt_token_id: int | None = None
    video_prompt_token_id: int | None = None
    bos_token_id: int | None = None
    turn_opener: tuple[int, ...] = ()
    turn_opener_text: str = ""
    shifted: bool = False
    drop_dangling: bool = True
    layout: Mapping[str, str] = field(default_factory=dict)
    count: str | Callable | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    video_count: str | Callable | None = None
    video_settings: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self):
        where = f"family {self.name!r}: " if self.name else ""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("layout", "settings", "video_settings", "choices"):
                if not isinstance(value, Mapping):
                    kind = type(value).__name__
                    raise PackingError(f"{where}{item.name} is a {kind}, expected a dict")
                value = MappingProxyType(dict(value))
            elif item.name in ("break_token_ids", "turn_opener"):
                value = tuple(as_ids(value, where + item.name))
            elif item.name in ("shifted", "drop_dangling"):
                value = as_flag(value, where + item.name)
            elif item.name.endswith("_id"):
                value = as_token(value, where + item.name)
            object.__setattr__(self, item.name, value)
        for key, word in self.layout.items():
            if word not in LAYOUT_WORDS:
                raise PackingError(
                    f"{where}layout[{key!r}] is {word!r}, expected one of {', '.join(LAYOUT_WORDS)}"
                )
        self._read_rule(where, "count", "settings", RULES, num_sizes=2)
        self._read_rule(where, "video_count", "video_settings", VIDEO_RULES, num_sizes=3)
        for name, values in self.choices.items():
            if name not in self.settings:
                raise PackingError(f"{where}it has choices of {name}, which is no setting")
            if not isinstance(values, (list, tuple)):
                raise PackingError(f"{where}choices of {name} are {values!r}, expected a tuple")
            if self.settings[name] not in values:
                allowed = ", ".join(map(str, values))
                raise PackingError(
                    f"{where}{name} is {self.settings[name]!r}, expected one of {allowed}"
                )

    def _read_rule(self, where: str, name: str, settings: str, named: Mapping, num_sizes: int):
        """A rule that exists, and all the settings that it declares."""
        rule, given = getattr(self, name), getattr(self, settings)
        rule = named.get(rule) if isinstance(rule, str) else rule
        if rule is None and getattr(self, name) is None:
            return
        if not callable(rule):
            raise PackingError(
                f"{where}{name} is {getattr(self, name)!r}, expected a function or one of "
                f"{', '.join(sorted(named))}"
            )
        declared = settings_of(rule, num_sizes)
        if declared is not None:
            unknown = sorted(set(given) - set(declared[0]))
            if unknown:
                raise PackingError(
                    f"{where}{settings} has {', '.join(unknown)}, which {name} lacks"
                )
            object.__setattr__(self, settings, MappingProxyType({**declared[0], **given}))

    def __reduce__(self):
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return _rebuild_family, (plain,)


def _rebuild_family(attributes: dict) -> Family:
    return Family(**attributes)


_FAMILIES: dict[str, Family] = {}
FAMILIES: Mapping[str, Family] = MappingProxyType(_FAMILIES)


def get_family(name: "str | Family") -> Family:
    """The family of that name; a ``Family`` is itself.

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
    if isinstance(name, Family):
        return name
    try:
        return _FAMILIES[name]
    except (KeyError, TypeError):
        raise PackingError(
            f"family {name!r} is not registered, expected one of {', '.join(sorted(_FAMILIES))}; "
            f"register_family adds one, count_with_processor needs none"
        ) from None


def resolve(family: "str | Family | None", overrides: Mapping[str, Any]) -> Family:
    """A family, or none at all, with what a call says instead."""
    base = Family("") if family is None else get_family(family)
    unknown = sorted(set(overrides) - {item.name for item in fields(Family)})
    if unknown:
        raise PackingError(f"{', '.join(unknown)} is no argument and no attribute of a family")
    return replace(base, **overrides) if overrides else base


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
            word or count rule is unknown, or a rule lacks a setting.

    Example:
        >>> family = register_family("my_qwen", like="qwen2_vl", image_token_id=7)
        >>> family.image_token_id, family.layout["pixel_values"]
        (7, 'patch')
    """
    if not isinstance(name, str) or not name:
        raise PackingError(f"name is {name!r}, expected a string")
    if name in _FAMILIES and not as_flag(overwrite, "overwrite"):
        raise PackingError(f"family {name!r} is registered already; pass overwrite=True")
    known = {item.name for item in fields(Family)} - {"name"}
    unknown = sorted(set(attributes) - known)
    if unknown:
        raise PackingError(
            f"family {name!r}: {', '.join(unknown)} is no attribute of a family, expected some of "
            f"{', '.join(sorted(known))}"
        )
    base = Family(name) if like is None else get_family(like)
    for rule, settings in (("count", "settings"), ("video_count", "video_settings")):
        given = attributes.get(settings, {})
        if attributes.get(rule, getattr(base, rule)) != getattr(base, rule):
            attributes.setdefault(settings, {})  # those of another rule
        elif isinstance(given, Mapping):
            attributes[settings] = {**getattr(base, settings), **given}
    _FAMILIES[name] = replace(base, name=name, **attributes)
    return _FAMILIES[name]


def _layout(**keys: str) -> dict[str, str]:
    """The keys by what they count, beside those that every processor gives for each sample."""
    keys["sample"] = (
        "input_ids attention_mask labels loss_mask mm_token_type_ids token_type_ids "
        + keys.get("sample", "")
    )
    return {key: word for word, names in keys.items() for key in names.split()}


_HF = "transformers 5.23.0: "
_GRIDS = _layout(
    patch="pixel_values",
    image="image_grid_thw",
    video_patch="pixel_values_videos",
    video="video_grid_thw second_per_grid_ts video_second_per_grid",
)
_TILES = _layout(tile="pixel_values")

register_family(
    "qwen2_vl",
    image_token_id=151655,
    video_token_id=151656,
    vision_start_id=151652,
    vision_end_id=151653,
    turn_opener=(151644, 872, 198),
    turn_opener_text="<|im_start|>user\n",
    layout=_GRIDS,
    count="qwen_vl",
    video_count="qwen2_vl",
    video_settings={"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28},
    source=_HF + "Qwen2VLConfig, Qwen2VLProcessor; ChatML opener as in TRL's qwen2_vl template",
)
register_family(
    "qwen2_5_vl",
    like="qwen2_vl",
    settings={"max_pixels": 28 * 28 * 16384},
    source=_HF + "Qwen2_5_VLConfig; max_pixels of Qwen/Qwen2.5-VL-7B-Instruct",
)
register_family(
    "qwen2_5_omni",
    like="qwen2_5_vl",
    source=_HF + "Qwen2_5OmniThinkerConfig, Qwen2_5OmniProcessor, audio in videos left out",
)
register_family(
    "qwen3_vl",
    like="qwen2_vl",
    video_start_id=151652,
    video_end_id=151653,
    settings={"patch_size": 16, "min_pixels": 256**2, "max_pixels": 4096**2},
    video_count="volume",
    video_settings={},
    source=_HF + "Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor; image settings of "
    "Qwen/Qwen3-VL-8B-Instruct",
)
register_family(
    "qwen3_omni",
    like="qwen3_vl",
    video_start_id=None,
    video_end_id=None,
    settings={"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384},
    video_count="qwen2_vl",
    video_settings={"patch_size": 16, "min_pixels": 128 * 32 * 32, "max_pixels": 768 * 32 * 32},
    source=_HF + "Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeProcessor, audio in videos left out",
)
register_family(
    "qwen3_5",
    like="qwen3_vl",
    image_token_id=248056,
    video_token_id=248057,
    vision_start_id=248053,
    vision_end_id=248054,
    video_start_id=248053,
    video_end_id=248054,
    turn_opener=(248045, 846, 198),
    source=_HF + "Qwen3_5Config, which Qwen3.6 shares; Qwen3VLProcessor; its tokenizer (opener)",
)
register_family(
    "glm4v",
    image_token_id=151343,
    vision_start_id=151339,
    vision_end_id=151340,
    video_start_id=151341,
    video_end_id=151342,
    video_prompt_token_id=151344,
    bos_token_id=151331,
    turn_opener=(151336, 198),
    turn_opener_text="<|user|>\n",
    layout=_GRIDS,
    count="glm_vl",
    settings={"patch_size": 14, "min_pixels": 112 * 112, "max_pixels": 28 * 28 * 15000},
    video_count="volume",
    video_settings={
        "patch_size": 14, "min_pixels": 112 * 112, "max_pixels": 28 * 28 * 2 * 30000,
    },
    source=_HF + "Glm4vConfig (GLM-4.1V), Glm4vProcessor and its model test (opener)",
)  # fmt: skip
register_family(
    "glm4_5v",
    like="glm4v",
    image_token_id=151363,
    video_prompt_token_id=151364,
    source=_HF + "Glm4vMoeConfig (GLM-4.5V, and GLM-4.6V by its model test), Glm46VProcessor",
)
register_family(
    "kimi_k2_5",
    image_token_id=163605,
    video_token_id=163840,
    vision_start_id=163602,
    vision_end_id=163604,
    break_token_ids=(163603,),
    bos_token_id=163584,
    turn_opener=(163587, 2482, 163601),
    turn_opener_text="<|im_user|>user<|im_middle|>",
    layout=_GRIDS,  # video_grid_thw has one row for each chunk of four frames: count chunks
    count="kimi_vl",
    video_count="kimi_vl",
    video_settings={"max_patches": 4096},
    source=_HF + "Kimi_K25Config, Kimi_K25Processor, which Kimi-K2.6 shares; the paddle port's "
    "processor test (opener)",
)
register_family(
    "kimi_vl",
    like="kimi_k2_5",
    video_token_id=None,
    video_count=None,
    settings={"max_patches": 4096},
    source="vLLM's example and image processor of moonshotai/Kimi-VL-A3B-Instruct, whose rule is "
    "that of transformers 5.23.0: Kimi_K25ImageProcessor",
)
register_family(
    "llama4",
    image_token_id=200092,
    vision_start_id=200080,
    vision_end_id=200081,
    break_token_ids=(200084, 200085, 200090),
    prompt_token_id=200090,
    bos_token_id=200000,
    turn_opener=(200005, 1556, 200006, 368),
    turn_opener_text="<|header_start|>user<|header_end|>\n\n",
    layout=_TILES,
    source=_HF + "Llama4Config, Llama4Processor; special tokens of Meta's Llama 4 tokenizer",
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
    layout=_layout(
        image="pixel_values image_position_ids num_soft_tokens_per_image",
        video_frame="pixel_values_videos video_position_ids",
        video="num_frames_per_video num_soft_tokens_per_video",
    ),
    count="gemma4",
    choices={"max_soft_tokens": (70, 140, 280, 560, 1120)},
    video_count="gemma4",
    video_settings={"max_soft_tokens": 70},
    source=_HF + "Gemma4Config, Gemma4Processor; tokenizer of google/gemma-4-E4B-it (opener)",
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
    layout=_layout(image="pixel_values"),
    count="gemma3",
    source=_HF + "Gemma3Config, Gemma3Processor; TRL's gemma3 chat template",
)
register_family(
    "gemma3_pan_and_scan",
    like="gemma3",
    layout=_TILES,
    settings={"do_pan_and_scan": True},
    source=_HF + "Gemma3ImageProcessorPil, which puts an image before its crops",
)
register_family(
    "internvl3",
    image_token_id=151667,
    vision_start_id=151665,
    vision_end_id=151666,
    turn_opener=(151644, 872, 198),
    turn_opener_text="<|im_start|>user\n",
    layout=_TILES,
    count="internvl3",
    video_count="internvl3",
    video_settings={"crop_to_patches": False},
    source=_HF + "InternVLConfig, InternVLProcessor; tokenizer of OpenGVLab/InternVL3-1B-hf",
)
register_family(
    "internvl3_5",
    like="internvl3",
    image_token_id=151671,
    vision_start_id=151669,
    vision_end_id=151670,
    source=_HF + "InternVLProcessor; img_context_token_id that MindSpeed-MM gives InternVL3_5",
)
register_family(
    "llava15",
    image_token_id=32000,
    bos_token_id=1,
    turn_opener=(3148, 1001, 29901),
    turn_opener_text="USER:",
    layout=_layout(image="pixel_values"),
    count="llava15",
    choices={"vision_feature_select_strategy": ("default", "full")},
    source=_HF + "LlavaConfig, LlavaProcessor and its test for llava-hf/llava-1.5-7b-hf (opener)",
)
register_family(
    "llava_onevision",
    image_token_id=151646,
    video_token_id=151647,
    turn_opener=(151644, 872, 198),
    turn_opener_text="<|im_start|>user\n",
    layout=_layout(
        image="pixel_values image_sizes",
        nonempty_sample="batch_num_images",
        video="pixel_values_videos",
    ),
    video_count="llava_onevision",
    source=_HF + "LlavaOnevisionConfig, LlavaOnevisionProcessor; ChatML opener of its tokenizer",
)
register_family(
    "pixtral",
    image_token_id=10,
    vision_end_id=13,
    break_token_ids=(12,),
    bos_token_id=1,
    turn_opener=(3,),
    turn_opener_text="[INST]",
    layout=_layout(image="pixel_values image_sizes"),
    source=_HF + "PixtralProcessor; special tokens of mistralai/Pixtral-12B-2409 (Tekken)",
)
register_family(
    "mistral3",
    like="pixtral",
    source=_HF + "Mistral3Config, PixtralProcessor; special tokens of "
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503 (Tekken)",
)
register_family(
    "megatron_llava",
    image_token_id=-200,
    layout=_TILES
    | _layout(sample="tokens", tile="images", image="num_image_tiles num_tiles imgs_sizes"),
    count="megatron_llava",
    source="Megatron-Core 0.12.3 to main: DEFAULT_IMAGE_TOKEN_INDEX and LLaVAModel.forward, "
    "get_num_image_embeddings in clip_vit_model.py; Megatron-LM main: "
    "examples/multimodal/image_processing.py and multimodal_args.py",
)
register_family(
    "nemotron_nano_vl_v2",
    like="megatron_llava",
    image_token_id=131072,
    vision_start_id=131073,
    vision_end_id=131074,
    turn_opener_text="<SPECIAL_11>User\n",
    layout=_layout(
        sample="tokens", tile="images pixel_values", image="num_image_tiles num_patches imgs_sizes"
    ),
    settings={
        "img_h": 512, "img_w": 512, "patch_dim": 16, "vision_model_type": "radio",
        "class_token_len": 10, "disable_vision_class_token": True, "pixel_shuffle": True,
        "max_num_tiles": 12, "use_thumbnail": True,
    },
    source="Megatron-Bridge main: NemotronNano12Bv2VLModelProvider and the collate function; rows "
    "of Megatron-Core's get_num_image_embeddings",
)  # fmt: skip
register_family(
    "nemotron_omni",
    image_token_id=18,
    vision_start_id=21,
    vision_end_id=22,
    video_prompt_token_id=131081,
    turn_opener=(10, 3263, 1010),
    turn_opener_text="<|im_start|>user\n",
    layout=_layout(patch="pixel_values", image="image_grid_hw", video_frame="pixel_values_videos"),
    count="nemotron_omni",
    video_count="nemotron",
    source=_HF + "NemotronH_Omni_Reasoning_V3Processor; Megatron-Bridge main: "
    "NemotronOmniBridge (ids); tokenizer of Nemotron 3 Nano (opener)",
)

# On no trainer's list: kept for their layouts, which cost a line each.
for _name, _image, _bos, _opener, _keys in (
    ("idefics3", 128257, 128000, "User:", _layout(sample="pixel_values pixel_attention_mask")),
    ("smolvlm", 49190, 1, "User:", _layout(sample="pixel_values pixel_attention_mask")),
    ("mllama", 128256, 128000, "<|start_header_id|>user<|end_header_id|>\n\n", _layout(
        sample="pixel_values aspect_ratio_ids aspect_ratio_mask cross_attention_mask")),
    ("llava_next", 32000, 1, "[INST] ", _layout(image="pixel_values image_sizes")),
    ("lfm2_vl", 396, None, "<|im_start|>user\n", _layout(
        tile="pixel_values pixel_attention_mask spatial_shapes")),
):  # fmt: skip
    register_family(
        _name,
        image_token_id=_image,
        bos_token_id=_bos,
        turn_opener_text=_opener,
        layout=_keys,
        source=_HF + f"configuration and processor of {_name}; TRL's chat template",
    )
