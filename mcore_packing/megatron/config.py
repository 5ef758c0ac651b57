"""What a ``TransformerConfig`` says of captured layers and of low precision."""

try:
    from megatron.core.fp4_utils import get_fp4_align_size
except ImportError:  # before 0.16
    get_fp4_align_size = None
try:
    from megatron.core.fp8_utils import get_fp8_align_size
except ImportError:  # before 0.13
    get_fp8_align_size = None


def captures_layers(config) -> bool:
    """Whether layers are captured as CUDA graphs one by one, which reject a changed int."""
    implementation = getattr(config, "cuda_graph_impl", None) or "none"
    if implementation == "none":
        return any(
            getattr(config, name, False) for name in ("enable_cuda_graph", "external_cuda_graph")
        )
    scope = getattr(config, "cuda_graph_scope", None) or ()
    scope = scope if isinstance(scope, list | tuple) else [scope]
    whole = any("full_iteration" in str(part) for part in (implementation, *scope))
    return not whole


def fp8_align_of(config) -> int:
    """How many positions FP8 or FP4 matrix products want a multiple of, on each rank.

    Source:
        ``fp8_utils.get_fp8_align_size``, which does not know blockwise scaling (128), and
        ``fp4_utils.get_fp4_align_size``, of Megatron-Core.
    """
    if getattr(config, "fp4", None):
        return 128 if get_fp4_align_size is None else get_fp4_align_size(config.fp4_recipe)
    if not getattr(config, "fp8", None):
        return 1
    recipe = str(getattr(config, "fp8_recipe", ""))
    if recipe.endswith("blockwise"):
        return 128
    if get_fp8_align_size is None:
        return 32 if recipe.endswith("mxfp8") else 16
    return get_fp8_align_size(config.fp8_recipe)
