"""What a model asks of a row: of a ``LLaVAModel``, read here.

Written against ``LLaVAModel.__init__`` and ``_preprocess_data`` of Megatron-Core 0.12.3 to main.
"""

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel

from ..context_parallel import alignment
from ..errors import PackingError
from ..spec import RowSpec
from .config import captures_layers, fp8_align_of
from .find import find_llavas, holds_llava, hook_of
from .plain import plain_spec
from .releases import release_of, why_not_ours


def row_spec(model, max_sequences: int | None = None) -> RowSpec:
    """What a model asks of a row, the same before and after ``install``.

    For a data path that makes layouts where it makes rows, on the CPU.

    Args:
        model: a ``LLaVAModel``, any wrapper around one, or a list of pipeline chunks; or a plain
            model, a ``GPTModel`` or a VLM around one, whose processor expands ids.
        max_sequences: how many sequences attention gets of every row, where its layers are captured
            as CUDA graphs; as ``install`` takes it. By default what ``install`` was told.

    Returns:
        The multiples and lengths that the parallelism, the precision and the maximum of the model
        ask for. Where its expansion is not replaced (see ``install``), what Megatron's own makes.

    Raises:
        PackingError: no such model in there, or a maximum that pipelines cannot use.
    """
    if not holds_llava(model):
        return plain_spec(model, max_sequences)
    llavas = find_llavas(model)
    llava = next((llava for llava in llavas if llava.add_decoder), llavas[0])
    hook = hook_of(llava)
    if hook is None:
        return spec_of(llava, max_sequences, why_not_ours(llava) is None)
    if max_sequences in (None, hook.plan.spec.max_sequences):
        return hook.plan.spec
    return spec_of(llava, max_sequences, hook.plan.replaces_expansion)


def spec_of(model: LLaVAModel, max_sequences: int | None, replaces_expansion: bool) -> RowSpec:
    """``row_spec`` of a model whose expansion is replaced, or not."""
    if not model.add_decoder:  # a stage that has no rows
        return RowSpec(image_token_id=model.image_token_index, img_seq_len=model.img_seq_len)
    if not replaces_expansion:
        return megatrons_spec(model)
    seq_multiple, total_multiple = _alignment(model, fp8_align_of(model.config))
    # Layers that are captured take no other length.
    is_fixed = _megatron_fixes_length(model) or max_sequences is not None
    is_fixed |= captures_layers(model.config)
    return _spec(model, seq_multiple, total_multiple, is_fixed, max_sequences)


def megatrons_spec(model: LLaVAModel, infers: bool = False) -> RowSpec:
    """What Megatron's own expansion makes: it pads no sequence, a row for pipelines, and from 0.18
    on one that parallelism could not divide (where an unknown one does not, it raises)."""
    total_multiple, release = 1, release_of(type(model))
    if release is not None and release.pads_rows:
        _, total_multiple = _alignment(model)
    return _spec(model, 1, total_multiple, _megatron_fixes_length(model) and not infers, None)


def _spec(model, seq_multiple, total_multiple, is_fixed, max_sequences) -> RowSpec:
    longest = model._language_max_sequence_length
    if is_fixed and longest % total_multiple:
        raise PackingError(
            f"language_max_sequence_length is {longest}, expected a multiple of "
            f"{total_multiple}: the pipeline expects rows of exactly this length"
        )
    longest = longest // total_multiple * total_multiple
    return RowSpec(
        image_token_id=model.image_token_index,
        img_seq_len=getattr(model, "img_seq_len", None),
        seq_multiple=seq_multiple,
        total_multiple=total_multiple,
        max_length=longest,
        fixed_length=longest if is_fixed else None,
        max_sequences=max_sequences,
        cp_size=model.context_parallel_lm if seq_multiple > 1 else 1,
    )


def sequences_must_divide_by(model: LLaVAModel) -> int:
    """What context parallelism asks of the length of every sequence."""
    return _alignment(model)[0]


def stage_length(model: LLaVAModel) -> tuple[int, torch.device]:
    """How many positions a stage without tokens has, those of all its ranks together, and where."""
    hidden = getattr(getattr(model.language_model, "decoder", None), "input_tensor", None)
    if hidden is None:
        raise PackingError(
            "input_ids are None, but this stage has no hidden states to compare its boundaries with"
        )
    length = hidden.shape[0] * model.context_parallel_lm
    if model.sequence_parallel_lm:
        length *= model.tensor_model_parallel_size_lm
    return length, hidden.device


def _alignment(model, fp8_align: int = 1) -> tuple[int, int]:
    """What the parallelism of the language model asks of sequences, and of the row."""
    return alignment(
        model.context_parallel_lm,
        model.tensor_model_parallel_size_lm,
        model.sequence_parallel_lm,
        fp8_align,
    )


def _megatron_fixes_length(model) -> bool:
    """Whether Megatron pads every row to the language model's maximum: for pipelines, and for
    communication that overlaps."""
    overlaps = model.sequence_parallel_lm and model.tp_comm_overlap_lm
    return model._language_is_pipeline_parallel or overlaps
