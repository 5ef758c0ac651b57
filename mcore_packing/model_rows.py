"""What a ``LLaVAModel`` asks of a row: its length, its multiples, and how many rows a stage has.

Written against ``LLaVAModel.__init__`` and ``_preprocess_data`` of Megatron-Core 0.12.3 to main.
"""

from typing import Any

from . import versions
from .context_parallel import alignment
from .errors import PackingError
from .layout import PackedLayout, round_up


def splits_rows(model) -> bool:
    """Whether a rank has a part of the row only: context or sequence parallelism."""
    return model.context_parallel_lm > 1 or model.sequence_parallel_lm


def _megatron_fixes_length(model) -> bool:
    """Whether Megatron pads every row to the language model's maximum: for pipelines, and for
    communication that overlaps."""
    overlaps = model.sequence_parallel_lm and model.tp_comm_overlap_lm
    return model._language_is_pipeline_parallel or overlaps


def _alignment(model, gemm_alignment: int = 1) -> tuple[int, int]:
    """What the parallelism of the language model asks of sequences, and of the row."""
    return alignment(
        model.context_parallel_lm,
        model.tensor_model_parallel_size_lm,
        model.sequence_parallel_lm,
        gemm_alignment,
    )


def layout_options(model, space: str, on_overflow: str) -> dict:
    """Keywords of ``PackedLayout.build`` for rows of this model."""
    seq_multiple, total_multiple = _alignment(model, versions.gemm_alignment(model.config))
    longest = model._language_max_sequence_length
    # Layers that are captured take no other length.
    is_fixed = _megatron_fixes_length(model) or versions.asks_for_layer_graphs(model.config)
    if is_fixed and longest % total_multiple:
        raise PackingError(
            f"language_max_sequence_length is {longest}, expected a multiple of "
            f"{total_multiple}: the pipeline expects rows of exactly this length"
        )
    longest = longest // total_multiple * total_multiple
    return {
        "space": space,
        "seq_multiple": seq_multiple,
        "total_multiple": total_multiple,
        "num_padded_rows": longest if is_fixed else None,
        "max_expanded": longest,
        "on_overflow": on_overflow,
    }


def megatrons_layout_options(model, release, infers: bool, space: str, on_overflow: str) -> dict:
    """What Megatron's own expansion does: it pads no sequence, a row for pipelines, and from 0.18
    on one that parallelism could not divide."""
    longest, is_fixed = model._language_max_sequence_length, _megatron_fixes_length(model)
    total_multiple = 1
    if release is not None and release.pads_rows:
        _, total_multiple = _alignment(model)
    return {
        "space": space,
        "seq_multiple": 1,
        "total_multiple": total_multiple,
        "num_padded_rows": longest if is_fixed and not infers else None,
        "max_expanded": longest // total_multiple * total_multiple,
        "on_overflow": on_overflow,
    }


def num_stage_rows(model) -> int:
    """How many rows a stage without tokens has, those of all its ranks together."""
    hidden = getattr(getattr(model.language_model, "decoder", None), "input_tensor", None)
    if hidden is None:
        raise PackingError(
            "input_ids are None, but this stage has no hidden states to compare its boundaries with"
        )
    num_rows = hidden.shape[0] * model.context_parallel_lm
    return num_rows * (model.tensor_model_parallel_size_lm if model.sequence_parallel_lm else 1)


def check_context_parallel(model, params: Any) -> None:
    """Refuse parameters for another context-parallel size than the model's."""
    size = getattr(params, "local_cp_size", None)
    if size not in (None, model.context_parallel_lm):
        raise PackingError(
            f"local_cp_size is {size}, but the model's context_parallel_size "
            f"{model.context_parallel_lm}: LLaVAModel cannot change it from row to row"
        )


def check_megatrons_row(model, layout: PackedLayout, options: dict) -> None:
    """Megatron's own expansion pads no sequence, and a row only as ``options`` say; neither
    attention nor TE's partition would complain."""
    lengths = layout.cu_seqlens_padded.diff()
    if layout.seq_multiple > 1 and bool((lengths[:-1] != layout.cu_seqlens_expanded.diff()).any()):
        raise PackingError(
            f"the layout pads sequences to multiples of {layout.seq_multiple}, which only "
            f"fused=True does"
        )
    multiple, _ = _alignment(model)
    wrong = lengths % multiple != 0
    if multiple > 1 and bool(wrong.any()):
        seq = int(wrong.nonzero()[0])
        raise PackingError(
            f"sequence {seq}: {int(lengths[seq])} rows, expected a multiple of 2 * cp_size = "
            f"{multiple}; only fused=True pads sequences"
        )
    num_rows = options["num_padded_rows"]
    if num_rows is None:
        num_rows = layout.num_collapsed - layout.image_start.numel() + layout.num_image_rows
        num_rows = round_up(num_rows, options["total_multiple"])
        num_rows = min(num_rows, options["max_expanded"])
    if layout.num_expanded != num_rows:
        raise PackingError(
            f"the layout has {layout.num_expanded} rows, but Megatron's own expansion makes "
            f"{num_rows}: only fused=True pads rows; build it with **mp.layout_options(model) of "
            f"the installed model"
        )
