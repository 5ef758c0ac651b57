"""What each model family is: token ids, turn openers, count settings, tensor layouts; as data."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, get_origin

from .kinds import as_flag, as_ids, as_int, require
from .rules import RULES, SIZES, settings_of

# What the first dimension of a tensor can count.
LAYOUT_WORDS = (
    "sample",
    "nonempty_sample",  # with at least one image
    "image",
    "patch",  # t * h * w of the image's entry of image_grid_thw, or h * w of image_grid_hw
    "tile",  # as tiles_per_image says
    "video",
    "video_patch",  # t * h * w of the video's entry of video_grid_thw
    "video_frame",  # as frames_per_video says
    "video_or_frame",  # as its own dimensions say: [frames, C, H, W] or [C, H, W]
)
SETTINGS = {"count": "settings", "video_count": "video_settings"}  # of which rule


@dataclass(frozen=True, eq=False)
class Family:
    """One model family. What is None or empty is not known, or differs between its checkpoints.

    Attributes:
        image_token_id: the placeholder that stands once per image embedding.
        video_token_id: the same for videos; None where they are written with ``image_token_id``.
        vision_start_id, vision_end_id: the markers around an image, and each frame of a video.
        video_start_id, video_end_id: the markers around a whole video and its timestamps.
        break_token_ids: tokens that stand inside an image, before or between its placeholders.
        pad_token_id: padding at the ends of a sequence.
        prompt_token_id, video_prompt_token_id: what stands for an image, a video, in an unprocessed
            prompt, where that is not ``image_token_id``, ``video_token_id``.
        bos_token_id: what a prompt begins with.
        turn_opener, turn_opener_text: the token ids that open a user's turn, and the same as text.
        shifted: entry ``t`` of labels and loss mask is about token ``t + 1``, as Megatron's; for
            ``place_image_blocks`` and ``Truncation.apply``.
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
            value, name, kind = getattr(self, item.name), where + item.name, item.type
            if get_origin(kind) is Mapping:
                found = type(value).__name__
                require(isinstance(value, Mapping), f"{name} is a {found}, expected a dict")
                value = MappingProxyType(dict(value))
            elif kind == tuple[int, ...]:
                value = tuple(as_ids(value, name))
            elif kind is bool:
                value = as_flag(value, name)
            elif kind == int | None and value is not None:
                value = as_int(value, name)
            vars(self)[item.name] = value  # frozen for everybody else
        for key, word in self.layout.items():
            expected = f"expected one of {', '.join(LAYOUT_WORDS)}"
            require(word in LAYOUT_WORDS, f"{where}layout[{key!r}] is {word!r}, {expected}")
        for count, settings in SETTINGS.items():
            given, rule = getattr(self, settings), self.rule(count)
            declared = settings_of(rule, len(SIZES[count])) if rule else None
            if declared is not None:
                unknown = ", ".join(sorted(set(given) - set(declared)))
                require(not unknown, f"{where}{settings} has {unknown}, which {count} lacks")
                defaults = {name: parameter.default for name, parameter in declared.items()}
                vars(self)[settings] = MappingProxyType({**defaults, **given})
        for name, values in self.choices.items():
            require(name in self.settings, f"{where}it has choices of {name}, which is no setting")
            found = f"{where}choices of {name} are {values!r}"
            require(isinstance(values, (list, tuple)), f"{found}, expected a tuple")
        self.check_choices(self.settings, where)

    def check_choices(self, settings: Mapping[str, Any], where: str = "") -> None:
        """Refuse a setting that is none of its choices."""
        for name in self.choices.keys() & settings.keys():
            value, allowed = settings[name], self.choices[name]
            expected = f"expected one of {', '.join(map(str, allowed))}"
            require(value in allowed, f"{where}{name} is {value!r}, {expected}")

    def rule(self, count: str) -> Callable | None:
        """The function that ``count`` or ``video_count`` is, or is the name of."""
        rule, named = getattr(self, count), RULES[count]
        found = named.get(rule) if isinstance(rule, str) else rule
        expected = f"expected a function or one of {', '.join(sorted(named))}"
        known = rule is None or (callable(found) and isinstance(found, Hashable))
        require(known, f"family {self.name!r}: {count} is {rule!r}, {expected}")
        return found

    def __reduce__(self):
        values = (getattr(self, item.name) for item in fields(self))
        return Family, tuple(dict(v) if isinstance(v, Mapping) else v for v in values)


_FAMILIES: dict[str, Family] = {}
FAMILIES: Mapping[str, Family] = MappingProxyType(_FAMILIES)


def get_family(name: str | Family) -> Family:
    """The family of that name, such as ``"qwen2_5_vl"``; a ``Family`` is itself.

    Raises:
        PackingError: there is none; the message lists those that there are.

    Example:
        >>> get_family("gemma4").image_token_id
        258880
    """
    if isinstance(name, Family):
        return name
    known = isinstance(name, str) and name in _FAMILIES
    expected = f"expected one of {', '.join(sorted(_FAMILIES))}; register_family adds one"
    require(known, f"family {name!r} is not registered, {expected}")
    return _FAMILIES[name]


def resolve(
    family: str | Family | None, overrides: Mapping[str, Any], also: Sequence[str] = ()
) -> Family:
    """A family, or none at all, with other ids than its own, and other attributes in ``also``."""
    base = Family("") if family is None else get_family(family)
    ids = [item.name for item in fields(Family) if item.name.endswith(("_id", "_ids"))]
    known = [*ids, *also]
    unknown = ", ".join(sorted(set(overrides) - set(known)))
    expected = f"no attribute that is used here, expected some of {', '.join(known)}"
    require(not unknown, f"{unknown} is no argument and {expected}")
    return replace(base, **overrides) if overrides else base


def register_family(
    name: str, *, like: str | None = None, overwrite: bool = False, **attributes: Any
) -> Family:
    """Make a family known by its name.

    Args:
        name: what it will be called.
        like: a registered family that gives every attribute not named here; ``settings`` go over
            its own where the count rule is the same, ``layout`` and ``choices`` replace its own.
        overwrite: allow a name that is taken.
        **attributes: of ``Family``.

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
    base = Family(name) if like is None else get_family(like)
    for count, settings in SETTINGS.items():
        same_rule = attributes.get(count, getattr(base, count)) == getattr(base, count)
        given = attributes.setdefault(settings, {})
        if same_rule and isinstance(given, Mapping):
            attributes[settings] = {**getattr(base, settings), **given}
    known = [item.name for item in fields(Family)]
    _FAMILIES[name] = resolve(base, {"name": name, **attributes}, known)
    return _FAMILIES[name]


def _layout(**keys: str) -> dict[str, str]:
    """The keys by what they count, beside those that every processor gives for each sample."""
    every = "input_ids attention_mask labels loss_mask mm_token_type_ids token_type_ids "
    keys["sample"] = every + keys.get("sample", "")
    return {key: word for word, names in keys.items() for key in names.split()}


def _add(name, *ids, hf="its configuration and processor", **others) -> None:
    """Register a line of the table: ``_IDS`` by position, and where transformers says all this."""
    known = {key: token for key, token in zip(_IDS, ids, strict=False) if token is not None}
    register_family(name, **{"source": f"transformers 5.24.0: {hf}", **known, **others})


_IDS = ("image_token_id", "vision_start_id", "vision_end_id", "video_token_id", "bos_token_id")
_GRIDS = _layout(
    patch="pixel_values", image="image_grid_thw", video_patch="pixel_values_videos",
    video="video_grid_thw second_per_grid_ts video_second_per_grid",
)  # fmt: skip
_TILES, _IMAGES = _layout(tile="pixel_values"), _layout(image="pixel_values")
_SIZED, _PIXELS = _layout(image="pixel_values image_sizes"), "pixel_values pixel_attention_mask "
_CHATML = {"turn_opener": (151644, 872, 198), "turn_opener_text": "<|im_start|>user\n"}
_GEMMA = {"turn_opener": (105, 2364, 107), "bos_token_id": 2}

# fmt: off
_add("qwen2_vl", 151655, 151652, 151653, 151656, **_CHATML, layout=_GRIDS, count="qwen_vl",
     video_count="qwen2_vl", video_settings={"min_pixels": 128 * 28**2, "max_pixels": 768 * 28**2},
     hf="Qwen2VLConfig, Qwen2VLProcessor; opener as in TRL's qwen2_vl template")
_add("qwen2_5_vl", like="qwen2_vl", settings={"max_pixels": 28**2 * 16384},
     hf="Qwen2_5_VLConfig; max_pixels of Qwen/Qwen2.5-VL-7B-Instruct")
_add("qwen2_5_omni", like="qwen2_5_vl",
     hf="Qwen2_5OmniThinkerConfig, Qwen2_5OmniProcessor, without audio")
_add("qwen3_vl", like="qwen2_vl", video_start_id=151652, video_end_id=151653, video_count="volume",
     settings={"patch_size": 16, "min_pixels": 256**2, "max_pixels": 4096**2},
     hf="Qwen3VLConfig, Qwen3VLProcessor; image settings of Qwen/Qwen3-VL-8B-Instruct")
_add("qwen3_omni", like="qwen3_vl", video_start_id=None, video_end_id=None, video_count="qwen2_vl",
     settings={"min_pixels": 56**2, "max_pixels": 28**2 * 16384},
     video_settings={"patch_size": 16, "min_pixels": 128 * 32**2, "max_pixels": 768 * 32**2},
     hf="Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeProcessor, without audio")
_add("qwen3_5", 248056, 248053, 248054, 248057, turn_opener=(248045, 846, 198), like="qwen3_vl",
     video_start_id=248053, video_end_id=248054,
     hf="Qwen3_5Config (Qwen3.6 too), Qwen3VLProcessor, its tokenizer")
_add("glm4v", 151343, 151339, 151340, None, 151331, turn_opener=(151336, 198),
     turn_opener_text="<|user|>\n", video_start_id=151341, video_end_id=151342,
     video_prompt_token_id=151344, layout=_GRIDS, count="glm_vl", video_count="volume",
     video_settings={"patch_size": 14, "min_pixels": 112**2, "max_pixels": 28**2 * 2 * 30000},
     hf="Glm4vConfig (GLM-4.1V), Glm4vProcessor and its model test (opener)")
_add("glm4_5v", 151363, like="glm4v", video_prompt_token_id=151364,
     hf="Glm4vMoeConfig (GLM-4.5V, and GLM-4.6V by its model test), Glm46VProcessor")
# video_grid_thw has one entry for each chunk of four frames: count chunks.
_add("kimi_k2_5", 163605, 163602, 163604, 163840, 163584, break_token_ids=(163603,),
     turn_opener=(163587, 2482, 163601), turn_opener_text="<|im_user|>user<|im_middle|>",
     layout=_GRIDS, count="kimi_vl", video_count="kimi_vl", video_settings={"max_patches": 4096},
     hf="Kimi_K25Config, Kimi_K25Processor (Kimi-K2.6 too); the paddle port's test (opener)")
_add("kimi_vl", like="kimi_k2_5", video_token_id=None, video_count=None,
     settings={"max_patches": 4096},
     hf="Kimi_K25ImageProcessor; vLLM's image processor of moonshotai/Kimi-VL-A3B-Instruct")
_add("ernie4_5_vl", 100295, 101304, 101305, 103367, 100273, turn_opener=(2969, 93963),
     turn_opener_text="User:", video_start_id=101306, video_end_id=101307,
     layout=_GRIDS | _layout(sample="moe_mm_token_type_ids"), count="qwen_vl",
     settings={"max_pixels": 28**2 * 6177}, video_count="qwen2_vl",
     video_settings={"min_pixels": 28**2 * 299, "max_pixels": 28**2 * 1196},
     hf="Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeProcessor and its model test (opener, begin)")
# Here it has one for each chunk of eight frames.
_add("minimax_m3_vl", 200025, 200029, 200030, 200026, 200034, turn_opener_text="]~b]user\n",
     layout=_GRIDS, count="qwen_vl", settings={"max_pixels": 451584}, video_count="minimax",
     hf="MiniMaxM3VLConfig, MiniMaxM3VLProcessor; a copy of its tokenizer (markers)")
_add("llama4", 200092, 200080, 200081, None, 200000, turn_opener=(200005, 1556, 200006, 368),
     turn_opener_text="<|header_start|>user<|header_end|>\n\n",
     break_token_ids=(200084, 200085, 200090), prompt_token_id=200090, count="llama4",
     layout=_TILES, hf="Llama4Config, Llama4Processor; special tokens of Meta's Llama 4 tokenizer")
_add("gemma4", 258880, 255999, 258882, 258884, **_GEMMA, turn_opener_text="<|turn>user\n",
     layout=_layout(
         image="pixel_values image_position_ids num_soft_tokens_per_image",
         video_frame="pixel_values_videos video_position_ids",
         video="num_frames_per_video num_soft_tokens_per_video"),
     count="gemma4", choices={"max_soft_tokens": (70, 140, 280, 560, 1120)},
     video_count="gemma4", video_settings={"max_soft_tokens": 70},
     hf="Gemma4Config, Gemma4Processor; tokenizer of google/gemma-4-E4B-it (opener)")
_add("gemma4_unified", like="gemma4",
     hf="Gemma4UnifiedConfig, Gemma4UnifiedProcessor (google/gemma-4-12B-it), without audio")
_add("gemma3", 262144, 255999, 256000, **_GEMMA, turn_opener_text="<start_of_turn>user\n",
     prompt_token_id=255999, layout=_IMAGES, count="gemma3",
     hf="Gemma3Config, Gemma3Processor; TRL's gemma3 chat template")
_add("gemma3_pan_and_scan", like="gemma3", layout=_TILES, settings={"do_pan_and_scan": True},
     hf="Gemma3ImageProcessorPil, which puts an image before its crops")
_add("internvl3", 151667, 151665, 151666, **_CHATML, layout=_TILES, count="internvl3",
     video_count="internvl3", video_settings={"crop_to_patches": False},
     hf="InternVLConfig, InternVLProcessor; tokenizer of OpenGVLab/InternVL3-1B-hf")
_add("internvl3_5", 151671, 151669, 151670, like="internvl3",
     hf="InternVLProcessor; img_context_token_id that MindSpeed-MM gives InternVL3_5")
_add("llava15", 32000, bos_token_id=1, turn_opener=(3148, 1001, 29901), turn_opener_text="USER:",
     layout=_IMAGES, count="llava15",
     choices={"vision_feature_select_strategy": ("default", "full")},
     hf="LlavaConfig, LlavaProcessor and its test for llava-1.5-7b-hf (opener)")
_add("llava_onevision", 151646, None, None, 151647, **_CHATML, video_count="llava_onevision",
     layout=_SIZED | _layout(nonempty_sample="batch_num_images", video="pixel_values_videos"),
     hf="LlavaOnevisionConfig, LlavaOnevisionProcessor; its tokenizer (opener)")
_add("pixtral", 10, None, 13, None, 1, turn_opener=(3,), turn_opener_text="[INST]",
     break_token_ids=(12,), layout=_SIZED, count="pixtral",
     hf="PixtralProcessor; tokens of mistralai/Pixtral-12B-2409 (Tekken)")
_add("mistral3", like="pixtral",
     settings={"longest_edge": 1540, "patch_size": 14, "spatial_merge_size": 2},
     hf="Mistral3Config; mistralai/Mistral-Small-3.1-24B-Instruct-2503")
_add("ministral3", like="mistral3",
     hf="Mistral3Config over Ministral3Config, PixtralProcessor; Megatron-Bridge main: "
     "Ministral3ModelProvider (image id)")
_add("megatron_llava", -200, count="megatron_llava", layout=_TILES | _layout(
         sample="tokens", tile="images", image="num_image_tiles num_tiles imgs_sizes"),
     source="Megatron-Core 0.12.3 to main: LLaVAModel, get_num_image_embeddings; Megatron-LM main: "
     "examples/multimodal/image_processing.py and multimodal_args.py")
_add("nemotron_nano_vl_v2", 131072, 131073, 131074, turn_opener_text="<SPECIAL_11>User\n",
     like="megatron_llava", layout=_layout(
         sample="tokens", tile="images pixel_values",
         image="num_image_tiles num_patches imgs_sizes"),
     settings={"img_h": 512, "img_w": 512, "patch_dim": 16, "vision_model_type": "radio",
               "class_token_len": 10, "disable_vision_class_token": True, "pixel_shuffle": True,
               "max_num_tiles": 12, "use_thumbnail": True},
     source="Megatron-Bridge main: NemotronNano12Bv2VLModelProvider and its collate function")
_add("nemotron_omni", 18, 21, 22, **_CHATML | {"turn_opener": (10, 3263, 1010)},
     video_prompt_token_id=131081, count="nemotron_omni", video_count="nemotron", layout=_layout(
         patch="pixel_values", image="image_grid_hw", video_or_frame="pixel_values_videos"),
     hf="NemotronH_Omni_Reasoning_V3Processor; tokenizer of Nemotron 3 Nano (opener); "
     "Megatron-Bridge main: NemotronOmniBridge (ids)")
_add("step3p7", 128001, None, 128002, None, 0, turn_opener_text="<|im_start|>user\n",
     break_token_ids=(128000, 128003, 128004, 128005), count="step3p7", layout=_layout(
         image="pixel_values num_local_patches patch_newline_masks", tile="pixel_values_local"),
     hf="Step3p7Processor; stepfun-ai/Step-3.7-Flash as ports of it quote it (ids)")
# On no trainer's list: kept for their layouts.
_add("idefics3", 128257, None, None, None, 128000, turn_opener_text="User:",
     layout=_layout(sample=_PIXELS))
_add("smolvlm", 49190, like="idefics3", bos_token_id=1)
_add("mllama", 128256, bos_token_id=128000,
     turn_opener_text="<|start_header_id|>user<|end_header_id|>\n\n", layout=_layout(
         sample="pixel_values aspect_ratio_ids aspect_ratio_mask cross_attention_mask"))
_add("llava_next", 32000, bos_token_id=1, turn_opener_text="[INST] ", layout=_SIZED)
_add("lfm2_vl", 396, **_CHATML | {"turn_opener": ()},
     layout=_layout(tile=_PIXELS + "spatial_shapes"))
# fmt: on
