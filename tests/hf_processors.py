"""Real Hugging Face processors without weights or hub, for the tests of counts.

Without torchvision a stand-in gives its tensors the right shapes and no pixels: counts need none.
"""

import sys
from enum import Enum
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from PIL import Image


class _InterpolationMode(Enum):
    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(6)


def _resize(image, size, **_):
    return image.new_zeros(*image.shape[:-2], *size)


def _pad(image, padding, **_):
    left, top, right, bottom = padding
    *rest, height, width = image.shape
    return image.new_zeros(*rest, top + height + bottom, left + width + right)


def _stand_in() -> dict[str, ModuleType]:
    """The parts of torchvision that the processors import, by their module names."""
    names = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".io")
    modules = {f"torchvision{name}": ModuleType(f"torchvision{name}") for name in names}
    functional = modules["torchvision.transforms.v2.functional"] = ModuleType("functional")
    functional.InterpolationMode = _InterpolationMode
    functional.resize, functional.pad = _resize, _pad
    functional.normalize = functional.to_dtype = lambda image, *_, **__: image
    functional.grayscale_to_rgb = lambda image: image
    modules["torchvision.transforms"].InterpolationMode = _InterpolationMode
    of_pil = modules["torchvision.transforms.functional"]
    of_pil.pil_to_tensor = lambda image: torch.zeros(
        3, image.height, image.width, dtype=torch.uint8
    )
    of_pil.to_pil_image = None  # draws timestamps on frames, where it is asked to
    for name, module in modules.items():
        module.__spec__, module.__version__ = ModuleSpec(name, None), "0.28"
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


def _without_torchvision(patch) -> None:
    """Lets transformers import what needs torchvision, in whatever order it was imported."""
    if find_spec("torchvision") is not None:
        return
    modules = _stand_in()
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    functional = modules["torchvision.transforms.v2.functional"]
    utils = import_module("transformers.image_utils")
    utils.InterpolationMode = _InterpolationMode
    utils.pil_to_tensor = modules["torchvision.transforms.functional"].pil_to_tensor
    by_pil = {Image.Resampling[mode.name].value: mode for mode in _InterpolationMode}
    utils.pil_torch_interpolation_mapping = by_pil
    utils.torch_pil_interpolation_mapping = {mode: value for value, mode in by_pil.items()}
    for package in ("transformers.utils", "transformers.utils.import_utils"):
        for name in ("is_torchvision_available", "is_torchvision_v2_available"):
            patch.setattr(import_module(package), name, lambda: True)
    for name in ("image_processing_backends", "video_processing_utils"):
        module = import_module(f"transformers.{name}")
        module.tvF = functional
        module.pil_torch_interpolation_mapping = by_pil
        module.is_torchvision_greater_or_equal = lambda version: True


def make_processor(family: str, **settings):
    """The processor of a family, as transformers has it, with a tokenizer of special tokens."""
    from transformers.processing_utils import ProcessorMixin

    check = ProcessorMixin.check_argument_for_proper_class
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ProcessorMixin,
            "check_argument_for_proper_class",
            lambda self, name, value: (
                None if value is None or name == "video_processor" else check(self, name, value)
            ),
        )
        _without_torchvision(patch)
        return _MAKERS[family](patch, **settings)


def placeholder_of(family: str) -> str:
    return _PLACEHOLDERS.get(family, "<image>")


def write(processor, placeholder: str, height: int, width: int) -> tuple[int, int]:
    """What the processor writes for one blank image: placeholders, and all tokens."""
    blank = Image.new("RGB", (width, height))
    output = processor(images=[[blank]], text=[processor.image_token])
    ids = output["input_ids"][0]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return ids.count(processor.tokenizer.convert_tokens_to_ids(placeholder)), len(ids)


def write_video(processor, frames: int, height: int, width: int, **videos_kwargs) -> list[str]:
    """What the processor writes for one blank video, as tokens."""
    video = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    text = [processor.video_token]
    videos_kwargs["do_sample_frames"] = False
    output = processor(videos=[video], text=text, videos_kwargs=videos_kwargs)
    ids = output["input_ids"][0]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return processor.tokenizer.convert_ids_to_tokens(ids)


def image_class(path: str):
    module, name = path.rsplit(".", 1)
    return getattr(import_module(f"transformers.models.{module}"), name)


def _tokenizer(*special: str, **named: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n\n", "\n", *map(chr, range(32, 127))]
    words = {word: i for i, word in enumerate(["<unk>", "<s>", *special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        pad_token="<s>",
        additional_special_tokens=list(special),
        **({"extra_special_tokens": named} if named else {}),
    )


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _qwen(processor_path: str, video_path: str = ""):
    def make(patch, patch_size=14, merge_size=2, min_pixels=3136, max_pixels=1003520):
        images = image_class("qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil")
        images = images(
            patch_size=patch_size,
            merge_size=merge_size,
            size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        )
        tokens = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        videos = image_class(video_path)() if video_path else None
        return image_class(processor_path)(images, tokens, videos)

    return make


_GEMMA_TOKENS = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}


def _gemma3(patch, image_seq_length=256, side=32, **pan_and_scan):
    images = image_class("gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil")
    cls = image_class("gemma3.processing_gemma3.Gemma3Processor")
    # The processor's own defaults win over its image processor's.
    cls = type(cls.__name__, (cls,), {"images_kwargs": cls.images_kwargs | pan_and_scan})
    tokens = _tokenizer("<boi>", "<img>", "<eoi>", **_GEMMA_TOKENS)
    return cls(images(size=_square(side)), tokens, image_seq_length=image_seq_length)


def _gemma4(name: str, prefix: str, backend: str = ""):
    def make(patch, **settings):
        module = f"{name}.image_processing{'_' * bool(backend)}{backend.lower()}_{name}"
        images = image_class(f"{module}.{prefix}ImageProcessor{backend}")
        audio = {"boa_token": "<boa>", "eoa_token": "<eoa>"}
        tokens = _tokenizer("<boi>", "<img>", "<eoi>", "<boa>", "<eoa>", **_GEMMA_TOKENS, **audio)
        videos = image_class(f"{name}.video_processing_{name}.{prefix}VideoProcessor")()
        cls = image_class(f"{name}.processing_{name}.{prefix}Processor")
        return cls(None, images(**settings), tokens, videos)

    return make


def _llava15(patch, crop_size=336, **settings):
    images = image_class("llava.image_processing_pil_llava.LlavaImageProcessorPil")
    images = images(size={"shortest_edge": crop_size}, crop_size=_square(crop_size))
    cls = image_class("llava.processing_llava.LlavaProcessor")
    return cls(images, _tokenizer("<image>"), **settings)


def _llava_next(patch, size=336, **settings):
    images = image_class("llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil")
    images = images(size={"shortest_edge": size}, crop_size=_square(size))
    cls = image_class("llava_next.processing_llava_next.LlavaNextProcessor")
    return cls(images, _tokenizer("<image>"), **settings)


def _llava_onevision(patch, **settings):
    name = "llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil"
    cls = image_class("llava_onevision.processing_llava_onevision.LlavaOnevisionProcessor")
    videos = "llava_onevision.video_processing_llava_onevision.LlavaOnevisionVideoProcessor"
    videos = image_class(videos)()
    return cls(image_class(name)(), _tokenizer("<image>", "<video>"), videos, **settings)


def _internvl3(patch, size=448, min_patches=1, max_patches=12, image_seq_length=256):
    images = image_class("got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil")
    images = images(size=_square(size), min_patches=min_patches, max_patches=max_patches)
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    cls = image_class("internvl.processing_internvl.InternVLProcessor")
    tokens = _tokenizer(*named.values(), **named)
    videos = image_class("internvl.video_processing_internvl.InternVLVideoProcessor")()
    return cls(images, tokens, videos, image_seq_length=image_seq_length)


def _idefics3(patch, longest_edge=1456, max_image_size=364, image_seq_len=169):
    images = image_class("idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil")
    images = images(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": max_image_size}
    )
    cls = image_class("idefics3.processing_idefics3.Idefics3Processor")
    return cls(images, _tokenizer("<image>"), image_seq_len=image_seq_len)


def _smolvlm(patch, longest_edge=2048, max_image_size=512, image_seq_len=64):
    module = import_module("transformers.models.smolvlm.processing_smolvlm")
    patch.setattr(module, "num2words", str)  # writes the number of video frames
    images = image_class("smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil")
    images = images(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": max_image_size}
    )
    tokens = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>")
    return module.SmolVLMProcessor(images, tokens, None, image_seq_len=image_seq_len)


def _mllama(patch, size=560, max_image_tiles=4):
    images = image_class("mllama.image_processing_pil_mllama.MllamaImageProcessorPil")
    images = images(size=_square(size), max_image_tiles=max_image_tiles)
    return image_class("mllama.processing_mllama.MllamaProcessor")(images, _tokenizer("<|image|>"))


def _pixtral(patch, longest_edge=1024, patch_size=16, spatial_merge_size=1):
    cls = image_class("pixtral.processing_pixtral.PixtralProcessor")
    images = image_class("pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil")
    images = images(size={"longest_edge": longest_edge}, patch_size=_square(patch_size))
    return cls(
        images,
        _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=patch_size,
        spatial_merge_size=spatial_merge_size,
    )


def _glm(name: str, prefix: str):
    def make(patch, min_pixels=112 * 112, max_pixels=28 * 28 * 15000, **video):
        module = f"{name}.image_processing_pil_{name}.{prefix}ImageProcessorPil"
        images = image_class(module)(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})
        videos = image_class(f"{name}.video_processing_{name}.{prefix}VideoProcessor")(**video)
        special = "<|image|> <|video|> <|begin_of_image|> <|end_of_image|>"
        tokens = _tokenizer(*special.split(), "<|begin_of_video|>", "<|end_of_video|>")
        return image_class(f"{name}.processing_{name}.{prefix}Processor")(images, tokens, videos)

    return make


def _kimi(patch, **settings):
    images = image_class("kimi_k25.image_processing_kimi_k25.Kimi_K25ImageProcessor")(**settings)
    videos = image_class("kimi_k25.video_processing_kimi_k25.Kimi_K25VideoProcessor")()
    special = "<|media_pad|> <|kimi_k25_video_placeholder|> <|media_begin|> <|media_content|>"
    tokens = _tokenizer(*special.split(), "<|media_end|>")
    return image_class("kimi_k25.processing_kimi_k25.Kimi_K25Processor")(images, tokens, videos)


def _nemotron(patch, **settings):
    name = "nemotron_h_omni"
    cls = "NemotronH_Omni_Reasoning_V3"
    images = image_class(f"{name}.image_processing_{name}.{cls}ImageProcessor")(**settings)
    pixels = {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}
    videos = image_class(f"{name}.video_processing_{name}.{cls}VideoProcessor")(**pixels)
    tokens = _tokenizer("<image>", "<video>", "<img>", "</img>", "<so_embedding>")
    return image_class(f"{name}.processing_{name}.{cls}Processor")(images, videos, tokens, None)


def _llama4(patch, **settings):
    images = image_class("llama4.image_processing_llama4.Llama4ImageProcessor")(**settings)
    special = "<|image|> <|patch|> <|image_start|> <|image_end|> <|tile_x_separator|>"
    tokens = _tokenizer(*special.split(), "<|tile_y_separator|>")
    return image_class("llama4.processing_llama4.Llama4Processor")(images, tokens)


def _lfm2(patch, **settings):
    images = image_class("lfm2_vl.image_processing_lfm2_vl.Lfm2VlImageProcessor")(**settings)
    special = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    rows = [f"<|img_row_{row}_col_{col}|>" for row in range(1, 11) for col in range(1, 11)]
    cls = image_class("lfm2_vl.processing_lfm2_vl.Lfm2VlProcessor")
    return cls(images, _tokenizer(*special, *rows))


def _ernie(patch, min_pixels=56 * 56, max_pixels=28 * 28 * 6177, **settings):
    name, cls = "ernie4_5_vl_moe", "Ernie4_5_VLMoe"
    images = image_class(f"{name}.image_processing_pil_{name}.{cls}ImageProcessorPil")
    images = images(size={"shortest_edge": min_pixels, "longest_edge": max_pixels}, **settings)
    # It draws timestamps on the frames in a font that comes with the checkpoint.
    videos = image_class(f"{name}.video_processing_{name}.{cls}VideoProcessor")
    videos = videos(draw_on_frames=False)
    named = {
        "image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>",
        "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
    }  # fmt: skip
    tokens = _tokenizer(*named.values(), **named)
    return image_class(f"{name}.processing_{name}.{cls}Processor")(images, tokens, videos)


def _minimax(patch, **settings):
    name, cls = "minimax_m3_vl", "MiniMaxM3VL"
    images = image_class(f"{name}.image_processing_{name}.{cls}ImageProcessor")(**settings)
    videos = image_class(f"{name}.video_processing_{name}.{cls}VideoProcessor")()
    special = ("image", "video", "start of image", "end of image")
    tokens = _tokenizer(*(f"]<]{word}[>[" for word in special))
    return image_class(f"{name}.processing_{name}.{cls}Processor")(images, tokens, videos)


def _step(patch, **settings):
    images = image_class("step3p7.image_processing_step3p7.Step3p7ImageProcessor")(**settings)
    special = "<im_patch> <im_start> <im_end> <patch_start> <patch_end> <patch_newline>"
    cls = image_class("step3p7.processing_step3p7.Step3p7Processor")
    return cls(images, _tokenizer(*special.split()))


def _omni(processor_path: str, patch_size: int):
    def make(patch):
        images = image_class("qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil")
        size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
        images = images(patch_size=patch_size, merge_size=2, size=size)
        videos = image_class("qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor")
        named = {
            "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>",
            "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
        }  # fmt: skip
        tokens = _tokenizer(*named.values(), **named)
        videos = videos(patch_size=patch_size)
        return image_class(processor_path)(images, videos, None, tokens)

    return make


_QWEN2_VIDEO = "qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor"
_QWEN3 = (
    "qwen3_vl.processing_qwen3_vl.Qwen3VLProcessor",
    "qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor",
)
_OMNI2 = "qwen2_5_omni.processing_qwen2_5_omni.Qwen2_5OmniProcessor"
_OMNI3 = "qwen3_omni_moe.processing_qwen3_omni_moe.Qwen3OmniMoeProcessor"
_MAKERS = {
    "ernie4_5_vl": _ernie,
    "gemma3": _gemma3,
    "gemma4": _gemma4("gemma4", "Gemma4", "Pil"),
    "gemma4_unified": _gemma4("gemma4_unified", "Gemma4Unified"),
    "glm4v": _glm("glm4v", "Glm4v"),
    "glm4_5v": _glm("glm46v", "Glm46V"),
    "idefics3": _idefics3,
    "internvl3": _internvl3,
    "internvl3_5": _internvl3,
    "kimi_k2_5": _kimi,
    "kimi_vl": _kimi,
    "lfm2_vl": _lfm2,
    "llama4": _llama4,
    "llava15": _llava15,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "minimax_m3_vl": _minimax,
    "ministral3": _pixtral,
    "mistral3": _pixtral,
    "mllama": _mllama,
    "nemotron_omni": _nemotron,
    "pixtral": _pixtral,
    "qwen2_vl": _qwen("qwen2_vl.processing_qwen2_vl.Qwen2VLProcessor", _QWEN2_VIDEO),
    "qwen2_5_vl": _qwen("qwen2_5_vl.processing_qwen2_5_vl.Qwen2_5_VLProcessor", _QWEN2_VIDEO),
    "qwen2_5_omni": _omni(_OMNI2, 14),
    "qwen3_omni": _omni(_OMNI3, 16),
    "qwen3_vl": _qwen(*_QWEN3),
    "qwen3_5": _qwen(*_QWEN3),
    "smolvlm": _smolvlm,
    "step3p7": _step,
}
# The placeholder, where it is not "<image>".
_PLACEHOLDERS = {
    "ernie4_5_vl": "<|IMAGE_PLACEHOLDER|>",
    "gemma3": "<img>",
    "gemma4": "<img>",
    "gemma4_unified": "<img>",
    "glm4v": "<|image|>",
    "glm4_5v": "<|image|>",
    "internvl3": "<IMG_CONTEXT>",
    "internvl3_5": "<IMG_CONTEXT>",
    "kimi_k2_5": "<|media_pad|>",
    "kimi_vl": "<|media_pad|>",
    "llama4": "<|patch|>",
    "minimax_m3_vl": "]<]image[>[",
    "ministral3": "[IMG]",
    "mistral3": "[IMG]",
    "mllama": "<|image|>",
    "pixtral": "[IMG]",
    "qwen2_5_omni": "<|IMAGE|>",
    "qwen3_omni": "<|IMAGE|>",
    "step3p7": "<im_patch>",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), "<|image_pad|>"),
}


def processor_name(family: str) -> str:
    """The class of the processor of a family."""
    return _NAMES[family]


_NAMES = {
    "ernie4_5_vl": "Ernie4_5_VLMoeProcessor",
    "gemma3": "Gemma3Processor",
    "gemma4": "Gemma4Processor",
    "gemma4_unified": "Gemma4UnifiedProcessor",
    "glm4_5v": "Glm46VProcessor",
    "glm4v": "Glm4vProcessor",
    "idefics3": "Idefics3Processor",
    "kimi_k2_5": "Kimi_K25Processor",
    "kimi_vl": "Kimi_K25Processor",
    "lfm2_vl": "Lfm2VlProcessor",
    "llama4": "Llama4Processor",
    "llava15": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "minimax_m3_vl": "MiniMaxM3VLProcessor",
    "mllama": "MllamaProcessor",
    "nemotron_omni": "NemotronH_Omni_Reasoning_V3Processor",
    "qwen2_5_omni": "Qwen2_5OmniProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_omni": "Qwen3OmniMoeProcessor",
    "smolvlm": "SmolVLMProcessor",
    "step3p7": "Step3p7Processor",
    **dict.fromkeys(("qwen3_vl", "qwen3_5"), "Qwen3VLProcessor"),
    **dict.fromkeys(("internvl3", "internvl3_5"), "InternVLProcessor"),
    **dict.fromkeys(("pixtral", "mistral3", "ministral3"), "PixtralProcessor"),
}
