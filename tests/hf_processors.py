"""Real Hugging Face processors without weights, hub or torchvision, for the tests of counts."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
from PIL import Image

_TORCHVISION = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def make_processor(family: str, **settings):
    """The processor of a family, as transformers has it, with a tokenizer of special tokens.

    Only images go through it, so the video processor, which needs torchvision, is left out.
    """
    from transformers.processing_utils import ProcessorMixin

    check = ProcessorMixin.check_argument_for_proper_class
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ProcessorMixin,
            "check_argument_for_proper_class",
            lambda self, name, value: None if value is None else check(self, name, value),
        )
        return _MAKERS[family](patch, **settings)


def placeholder_of(family: str) -> str:
    return _PLACEHOLDERS[family]


def write(processor, placeholder: str, height: int, width: int) -> tuple[int, int]:
    """What the processor writes for one blank image: placeholders, and all tokens."""
    blank = Image.new("RGB", (width, height))
    output = processor(images=[[blank]], text=[processor.image_token])
    ids = output["input_ids"][0]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return ids.count(processor.tokenizer.convert_tokens_to_ids(placeholder)), len(ids)


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


def _qwen(processor_path: str):
    def make(patch, patch_size=14, merge_size=2, min_pixels=3136, max_pixels=1003520):
        images = image_class("qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil")
        images = images(
            patch_size=patch_size,
            merge_size=merge_size,
            size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        )
        tokens = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        return image_class(processor_path)(images, tokens, None)

    return make


_GEMMA_TOKENS = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}


def _gemma3(patch, image_seq_length=256, side=32, **pan_and_scan):
    images = image_class("gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil")
    cls = image_class("gemma3.processing_gemma3.Gemma3Processor")
    # The processor's own defaults win over its image processor's.
    cls = type(cls.__name__, (cls,), {"images_kwargs": cls.images_kwargs | pan_and_scan})
    tokens = _tokenizer("<boi>", "<img>", "<eoi>", **_GEMMA_TOKENS)
    return cls(images(size=_square(side)), tokens, image_seq_length=image_seq_length)


def _gemma4(patch, **settings):
    images = image_class("gemma4.image_processing_pil_gemma4.Gemma4ImageProcessorPil")
    audio = {"boa_token": "<boa>", "eoa_token": "<eoa>"}
    tokens = _tokenizer("<boi>", "<img>", "<eoi>", "<boa>", "<eoa>", **_GEMMA_TOKENS, **audio)
    cls = image_class("gemma4.processing_gemma4.Gemma4Processor")
    return cls(None, images(**settings), tokens, None)


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
    return cls(image_class(name)(), _tokenizer("<image>", "<video>"), None, **settings)


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
    return cls(images, tokens, None, image_seq_length=image_seq_length)


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
    if find_spec("torchvision") is None:
        # Its module imports torchvision for the other image processor; counting needs none of it.
        for name in _TORCHVISION:
            patch.setitem(sys.modules, name, ModuleType(name))
        for name in _TORCHVISION[1:]:
            parent, child = name.rsplit(".", 1)
            setattr(sys.modules[parent], child, sys.modules[name])
    cls = image_class("pixtral.processing_pixtral.PixtralProcessor")
    images = image_class("pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil")
    images = images(size={"longest_edge": longest_edge}, patch_size=_square(patch_size))
    return cls(
        images,
        _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=patch_size,
        spatial_merge_size=spatial_merge_size,
    )


_MAKERS = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "idefics3": _idefics3,
    "internvl3": _internvl3,
    "llava15": _llava15,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "mistral3": _pixtral,
    "mllama": _mllama,
    "pixtral": _pixtral,
    "qwen2_vl": _qwen("qwen2_vl.processing_qwen2_vl.Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("qwen2_5_vl.processing_qwen2_5_vl.Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("qwen3_vl.processing_qwen3_vl.Qwen3VLProcessor"),
    "smolvlm": _smolvlm,
}
_PLACEHOLDERS = {
    "gemma3": "<img>",
    "gemma4": "<img>",
    "idefics3": "<image>",
    "internvl3": "<IMG_CONTEXT>",
    "llava15": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "mistral3": "[IMG]",
    "mllama": "<|image|>",
    "pixtral": "[IMG]",
    "qwen2_vl": "<|image_pad|>",
    "qwen2_5_vl": "<|image_pad|>",
    "qwen3_vl": "<|image_pad|>",
    "smolvlm": "<image>",
}
