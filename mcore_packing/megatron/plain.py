"""What a model asks of a row whose ids its processor expanded: a GPT, or a VLM around one.

Written against ``LanguageModule`` and ``TransformerConfig`` of Megatron-Core 0.12.3 to main, and
the configurations of Megatron-Bridge's VLMs.
"""

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import nn

from ..context_parallel import alignment
from ..errors import PackingError
from ..spec import RowSpec
from .config import captures_layers, fp8_align_of


def plain_spec(model, max_sequences: int | None = None) -> RowSpec:
    """``row_spec`` of a model without a ``LLaVAModel``.

    Args:
        model: with one ``LanguageModule`` (``GPTModel``, ``MambaModel``, ...) in it, or a list of
            pipeline chunks.
        max_sequences: as ``row_spec`` takes it.

    Returns:
        The multiples that the parallelism and the precision of its config ask for, its maximum, and
        the id of its images where a config says one (``image_token_id``, as in Megatron-Bridge).

    Raises:
        PackingError: there is none, or a maximum that pipelines cannot use.
    """
    chunks = model if isinstance(model, list | tuple) else [model]
    modules = [one for chunk in chunks if isinstance(chunk, nn.Module) for one in chunk.modules()]
    found = [one for one in modules if isinstance(one, LanguageModule)]
    if not found:
        raise PackingError(
            f"{type(chunks[0]).__name__ if chunks else 'an empty list'} holds 0 LLaVAModels, "
            f"expected one, or a language model of Megatron that gets expanded ids; pass the "
            f"model, a wrapper around one, or a list of pipeline chunks"
        )
    config = found[0].config
    seq_multiple, total_multiple = alignment(
        config.context_parallel_size,
        config.tensor_model_parallel_size,
        config.sequence_parallel,
        fp8_align_of(config),
    )
    longest = getattr(found[0], "max_sequence_length", None)
    is_fixed = config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths
    is_fixed |= max_sequences is not None or captures_layers(config)
    if is_fixed and (longest is None or longest % total_multiple):
        raise PackingError(
            f"max_sequence_length is {longest}, expected a multiple of {total_multiple}: pipelines "
            f"without variable_seq_lengths, and captured layers, expect rows of one length"
        )
    if longest is not None:
        longest = longest // total_multiple * total_multiple
    configs = (getattr(one, "config", None) for one in modules)
    images = (getattr(one, "image_token_id", None) for one in configs)
    image = next((token for token in images if isinstance(token, int)), None)
    return RowSpec(
        **({} if image is None else {"image_token_id": image}),
        seq_multiple=seq_multiple,
        total_multiple=total_multiple,
        max_length=longest,
        fixed_length=longest if is_fixed else None,
        max_sequences=max_sequences,
        expands=False,
        cp_size=config.context_parallel_size,
    )
