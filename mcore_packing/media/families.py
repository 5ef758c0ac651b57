"""What each model family is: token ids, turn openers, count settings, tensor layouts; as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from ..errors import PackingError
from .kinds import as_flag, as_ids, as_token, require
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
        image_token_id: the placeholder that stands once per image row.
        video_token_id: the same for videos; None where they are written with ``image_token_id``.
        vision_start_id, vision_end_id: the markers around an image, and each frame of a video.
        video_start_id, video_end_id: the markers around a whole video and its timestamps.
        break_token_ids: tokens that stand inside an image, before or between its placeholders.
        pad_token_id: padding at the ends of a sequence.
        prompt_token_id, video_prompt_token_id: what stands for an image, a video, in an unprocessed
            prompt, where that is not ``image_token_id``, ``video_token_id``.
        bos_token_id: what a prompt begins with.
        turn_opener, turn_opener_text: the token ids that open a user's turn, and the same as text.
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
            name, value = item.name, getattr(self, item.name)
            if name in ("layout", "settings", "video_settings", "choices"):
                kind = type(value).__name__
                require(isinstance(value, Mapping), f"{where}{name} is a {kind}, expected a dict")
                value = MappingProxyType(dict(value))
            elif name in ("break_token_ids", "turn_opener"):
                value = tuple(as_ids(value, where + name))
            elif name in ("shifted", "drop_dangling"):
                value = as_flag(value, where + name)
            elif name.endswith("_id"):
                value = as_token(value, where + name)
            object.__setattr__(self, name, value)
        for key, word in self.layout.items():
            expected = f"expected one of {', '.join(LAYOUT_WORDS)}"
            require(word in LAYOUT_WORDS, f"{where}layout[{key!r}] is {word!r}, {expected}")
        for name, settings, num_sizes in _RULES_OF:
            rule, given = self.rule(name), getattr(self, settings)
            declared = rule and settings_of(rule, num_sizes)
            if declared:
                unknown = ", ".join(sorted(set(given) - set(declared[0])))
                require(not unknown, f"{where}{settings} has {unknown}, which {name} lacks")
                object.__setattr__(self, settings, MappingProxyType({**declared[0], **given}))
        for name, values in self.choices.items():
            value, kind = self.settings.get(name), isinstance(values, (list, tuple))
            require(name in self.settings, f"{where}it has choices of {name}, which is no setting")
            require(kind, f"{where}choices of {name} are {values!r}, expected a tuple")
            allowed = ", ".join(map(str, values))
            require(value in values, f"{where}{name} is {value!r}, expected one of {allowed}")

    def rule(self, name: str) -> Callable | None:
        """The function that ``count`` or ``video_count`` is, or is the name of."""
        rule, named = getattr(self, name), RULES if name == "count" else VIDEO_RULES
        found = named.get(rule) if isinstance(rule, str) else rule
        require(
            rule is None or callable(found),
            f"family {self.name!r}: {name} is {rule!r}, expected a function or one of "
            f"{', '.join(sorted(named))}",
        )
        return found

    def __reduce__(self):
        values = (getattr(self, item.name) for item in fields(self))
        return Family, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)


_RULES_OF = (("count", "settings", 2), ("video_count", "video_settings", 3))
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
    unknown = ", ".join(sorted(set(overrides) - {item.name for item in fields(Family)}))
    require(not unknown, f"{unknown} is no argument and no attribute of a family")
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
    require(isinstance(name, str) and name, f"name is {name!r}, expected a string")
    taken = name in _FAMILIES and not as_flag(overwrite, "overwrite")
    require(not taken, f"family {name!r} is registered already; pass overwrite=True")
    known = {item.name for item in fields(Family)} - {"name"}
    unknown = ", ".join(sorted(set(attributes) - known))
    require(
        not unknown,
        f"family {name!r}: {unknown} is no attribute of a family, expected some of "
        f"{', '.join(sorted(known))}",
    )
    base = Family(name) if like is None else get_family(like)
    for rule, settings, _ in _RULES_OF:
        given = attributes.get(settings, {})
        if attributes.get(rule, getattr(base, rule)) != getattr(base, rule):
            attributes.setdefault(settings, {})  # those of another rule
        elif isinstance(given, Mapping):
            attributes[settings] = {**getattr(base, settings), **given}
    _FAMILIES[name] = replace(base, name=name, **attributes)
    return _FAMILIES[name]


def _layout(**keys: str) -> dict[str, str]:
    """The keys by what they count, beside those that every processor gives for each sample."""
    every = "input_ids attention_mask labels loss_mask mm_token_type_ids token_type_ids "
    keys["sample"] = every + keys.get("sample", "")
    return {key: word for word, names in keys.items() for key in names.split()}


_HF = "transformers 5.23.0: "
_GRIDS = _layout(
    patch="pixel_values",
    image="image_grid_thw",
    video_patch="pixel_values_videos",
    video="video_grid_thw second_per_grid_ts video_second_per_grid",
)
_TILES, _IMAGES = _layout(tile="pixel_values"), _layout(image="pixel_values")
_SIZED = _layout(image="pixel_values image_sizes")
_PIXELS = "pixel_values pixel_attention_mask "
_CHATML = {"turn_opener": (151644, 872, 198), "turn_opener_text": "<|im_start|>user\n"}


def _row(image=None, start=None, end=None, video=None, bos=None, **others) -> dict[str, Any]:
    """A row of the table, of which the attributes that most families have come by position."""
    named = {"image_token_id": image, "vision_start_id": start, "vision_end_id": end}
    named |= {"video_token_id": video, "bos_token_id": bos}
    return {name: token for name, token in named.items() if token is not None} | others


# One row a family: ids, opener, layout, rules with their settings, source.
# fmt: off
_TABLE: dict[str, dict[str, Any]] = {
    "qwen2_vl": _row(
        151655, 151652, 151653, 151656, layout=_GRIDS, count="qwen_vl", video_count="qwen2_vl",
        video_settings={"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}, **_CHATML,
        source=_HF + "Qwen2VLConfig, Qwen2VLProcessor; opener as in TRL's qwen2_vl template"),
    "qwen2_5_vl": _row(
        like="qwen2_vl", settings={"max_pixels": 28 * 28 * 16384},
        source=_HF + "Qwen2_5_VLConfig; max_pixels of Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen2_5_omni": _row(
        like="qwen2_5_vl",
        source=_HF + "Qwen2_5OmniThinkerConfig, Qwen2_5OmniProcessor, audio in videos left out"),
    "qwen3_vl": _row(
        like="qwen2_vl", video_start_id=151652, video_end_id=151653,
        settings={"patch_size": 16, "min_pixels": 256**2, "max_pixels": 4096**2},
        video_count="volume",
        source=_HF + "Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor; image settings of "
        "Qwen/Qwen3-VL-8B-Instruct"),
    "qwen3_omni": _row(
        like="qwen3_vl", video_start_id=None, video_end_id=None, video_count="qwen2_vl",
        settings={"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384},
        video_settings={"patch_size": 16, "min_pixels": 128 * 32 * 32, "max_pixels": 768 * 32 * 32},
        source=_HF + "Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeProcessor, audio in videos left out"),
    "qwen3_5": _row(
        248056, 248053, 248054, 248057, like="qwen3_vl", video_start_id=248053, video_end_id=248054,
        turn_opener=(248045, 846, 198),
        source=_HF + "Qwen3_5Config, which Qwen3.6 shares; Qwen3VLProcessor; its tokenizer"),
    "glm4v": _row(
        151343, 151339, 151340, bos=151331, video_start_id=151341, video_end_id=151342,
        video_prompt_token_id=151344, turn_opener=(151336, 198), turn_opener_text="<|user|>\n",
        layout=_GRIDS, count="glm_vl", video_count="volume",
        settings={"patch_size": 14, "min_pixels": 112**2, "max_pixels": 28 * 28 * 15000},
        video_settings={"patch_size": 14, "min_pixels": 112**2, "max_pixels": 28 * 28 * 2 * 30000},
        source=_HF + "Glm4vConfig (GLM-4.1V), Glm4vProcessor and its model test (opener)"),
    "glm4_5v": _row(
        151363, like="glm4v", video_prompt_token_id=151364,
        source=_HF + "Glm4vMoeConfig (GLM-4.5V, and GLM-4.6V by its model test), Glm46VProcessor"),
    "kimi_k2_5": _row(  # video_grid_thw has one row for each chunk of four frames: count chunks
        163605, 163602, 163604, 163840, 163584, break_token_ids=(163603,), layout=_GRIDS,
        turn_opener=(163587, 2482, 163601), turn_opener_text="<|im_user|>user<|im_middle|>",
        count="kimi_vl", video_count="kimi_vl", video_settings={"max_patches": 4096},
        source=_HF + "Kimi_K25Config, Kimi_K25Processor, which Kimi-K2.6 shares; the paddle port's "
        "processor test (opener)"),
    "kimi_vl": _row(
        like="kimi_k2_5", video_token_id=None, video_count=None, settings={"max_patches": 4096},
        source="vLLM's example and image processor of moonshotai/Kimi-VL-A3B-Instruct, whose rule "
        "is that of transformers 5.23.0: Kimi_K25ImageProcessor"),
    "llama4": _row(
        200092, 200080, 200081, bos=200000, break_token_ids=(200084, 200085, 200090),
        prompt_token_id=200090, turn_opener=(200005, 1556, 200006, 368), layout=_TILES,
        turn_opener_text="<|header_start|>user<|header_end|>\n\n",
        source=_HF + "Llama4Config, Llama4Processor; special tokens of Meta's Llama 4 tokenizer"),
    "gemma4": _row(
        258880, 255999, 258882, 258884, 2, turn_opener=(105, 2364, 107),
        turn_opener_text="<|turn>user\n",
        layout=_layout(
            image="pixel_values image_position_ids num_soft_tokens_per_image",
            video_frame="pixel_values_videos video_position_ids",
            video="num_frames_per_video num_soft_tokens_per_video"),
        count="gemma4", choices={"max_soft_tokens": (70, 140, 280, 560, 1120)},
        video_count="gemma4", video_settings={"max_soft_tokens": 70},
        source=_HF + "Gemma4Config, Gemma4Processor; tokenizer of google/gemma-4-E4B-it (opener)"),
    "gemma3": _row(
        262144, 255999, 256000, bos=2, prompt_token_id=255999, turn_opener=(105, 2364, 107),
        turn_opener_text="<start_of_turn>user\n", layout=_IMAGES, count="gemma3",
        source=_HF + "Gemma3Config, Gemma3Processor; TRL's gemma3 chat template"),
    "gemma3_pan_and_scan": _row(
        like="gemma3", layout=_TILES, settings={"do_pan_and_scan": True},
        source=_HF + "Gemma3ImageProcessorPil, which puts an image before its crops"),
    "internvl3": _row(
        151667, 151665, 151666, layout=_TILES, count="internvl3", video_count="internvl3",
        video_settings={"crop_to_patches": False}, **_CHATML,
        source=_HF + "InternVLConfig, InternVLProcessor; tokenizer of OpenGVLab/InternVL3-1B-hf"),
    "internvl3_5": _row(
        151671, 151669, 151670, like="internvl3",
        source=_HF + "InternVLProcessor; img_context_token_id that MindSpeed-MM gives InternVL3_5"),
    "llava15": _row(
        32000, bos=1, turn_opener=(3148, 1001, 29901), turn_opener_text="USER:", layout=_IMAGES,
        count="llava15", choices={"vision_feature_select_strategy": ("default", "full")},
        source=_HF + "LlavaConfig, LlavaProcessor and its test for llava-1.5-7b-hf (opener)"),
    "llava_onevision": _row(
        151646, video=151647, video_count="llava_onevision", **_CHATML,
        layout=_SIZED | _layout(nonempty_sample="batch_num_images", video="pixel_values_videos"),
        source=_HF + "LlavaOnevisionConfig, LlavaOnevisionProcessor; its tokenizer (opener)"),
    "pixtral": _row(
        10, end=13, bos=1, break_token_ids=(12,), turn_opener=(3,), turn_opener_text="[INST]",
        layout=_SIZED,
        source=_HF + "PixtralProcessor; special tokens of mistralai/Pixtral-12B-2409 (Tekken)"),
    "mistral3": _row(
        like="pixtral", source=_HF + "Mistral3Config, PixtralProcessor; special tokens of "
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503 (Tekken)"),
    "megatron_llava": _row(
        -200, count="megatron_llava",
        layout=_TILES | _layout(
            sample="tokens", tile="images", image="num_image_tiles num_tiles imgs_sizes"),
        source="Megatron-Core 0.12.3 to main: DEFAULT_IMAGE_TOKEN_INDEX and LLaVAModel.forward, "
        "get_num_image_embeddings in clip_vit_model.py; Megatron-LM main: "
        "examples/multimodal/image_processing.py and multimodal_args.py"),
    "nemotron_nano_vl_v2": _row(
        131072, 131073, 131074, like="megatron_llava", turn_opener_text="<SPECIAL_11>User\n",
        layout=_layout(sample="tokens", tile="images pixel_values",
                       image="num_image_tiles num_patches imgs_sizes"),
        settings={
            "img_h": 512, "img_w": 512, "patch_dim": 16, "vision_model_type": "radio",
            "class_token_len": 10, "disable_vision_class_token": True, "pixel_shuffle": True,
            "max_num_tiles": 12, "use_thumbnail": True},
        source="Megatron-Bridge main: NemotronNano12Bv2VLModelProvider and the collate function; "
        "rows of Megatron-Core's get_num_image_embeddings"),
    "nemotron_omni": _row(
        18, 21, 22, video_prompt_token_id=131081, turn_opener=(10, 3263, 1010),
        turn_opener_text="<|im_start|>user\n", count="nemotron_omni", video_count="nemotron",
        layout=_layout(
            patch="pixel_values", image="image_grid_hw", video_frame="pixel_values_videos"),
        source=_HF + "NemotronH_Omni_Reasoning_V3Processor; Megatron-Bridge main: "
        "NemotronOmniBridge (ids); tokenizer of Nemotron 3 Nano (opener)"),
    # On no trainer's list: kept for their layouts.
    "idefics3": _row(
        128257, bos=128000, turn_opener_text="User:", layout=_layout(sample=_PIXELS)),
    "smolvlm": _row(49190, bos=1, turn_opener_text="User:", layout=_layout(sample=_PIXELS)),
    "mllama": _row(
        128256, bos=128000, turn_opener_text="<|start_header_id|>user<|end_header_id|>\n\n",
        layout=_layout(
            sample="pixel_values aspect_ratio_ids aspect_ratio_mask cross_attention_mask")),
    "llava_next": _row(32000, bos=1, turn_opener_text="[INST] ", layout=_SIZED),
    "lfm2_vl": _row(
        396, turn_opener_text="<|im_start|>user\n",
        layout=_layout(tile=_PIXELS + "spatial_shapes")),
}
# fmt: on
for _name, _family in _TABLE.items():
    _source = _HF + f"configuration and processor of {_name}; TRL's chat template"
    register_family(_name, **{"source": _source, **_family})
