"""What is known of a model when the hook is installed, and what was seen of its calls since."""

import dataclasses
import importlib
import inspect
import threading
from dataclasses import dataclass

from megatron.core import __version__ as mcore_version
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from ..errors import PackingError
from ..inputs import as_choice
from ..layout import PackedLayout
from ..space import SPACES
from ..spec import ON_OVERFLOW
from .releases import release_of, shares_by_itself, why_not_ours
from .spec import captures_layers, spec_of


@dataclass
class Seen:
    """Of the packed calls so far.

    Attributes:
        in_evaluation: whether one ran in evaluation mode.
        layout: of the last one.
        params: of the last one, as the caller gave them.
        input_ids: of the last one, None on a stage without tokens.
        compared: the modes (whether in training) in which the ranks of a row compared theirs.
    """

    in_evaluation: bool = False
    layout: PackedLayout | None = None
    params: PackedSeqParams | None = None
    input_ids: Tensor | None = None
    compared: frozenset[bool] = frozenset()


class Plan:
    """How packed calls of one model run.

    Args:
        model: whose ``forward`` names ``packed_seq_params``.
        space, on_missing, on_overflow, max_sequences, vision_dp_over_cp, compare_ranks: as
            ``install`` takes them.

    Attributes:
        spec: what the model asks of a row.
        spec_of_calls: the same, with what ``install`` said of rows that do not fit.
        release: the Megatron-Core release whose expansion the model has, None if no known one.
        why_kept: why the model's own expansion is not replaced, None where it is.
        replaces_expansion: whether it is: Megatron's own, of a known release.
        shares_vision: whether the vision tower of this stage is shared over context-parallel ranks.
        parameters: the names of ``forward``'s positional parameters, in order.
        preprocess_parameters: likewise of ``_preprocess_data``.
        restarts_positions: whether position ids are looked up, so that they have to restart.
        wants_seq_idx: whether Mamba layers read ``seq_idx``.
        masks_padding: whether routers of experts take a mask of padding, which they count else.
        unpacked: in each thread, how many ``mp.unpacked`` are open, as ``depth``.
    """

    def __init__(
        self,
        model: LLaVAModel,
        space: str | None,
        on_missing: str,
        on_overflow: str,
        max_sequences: int | None,
        vision_dp_over_cp: bool,
        compare_ranks: bool,
    ):
        self.space = space if space is None else as_choice(space, "space", SPACES)
        self.raises_if_missing = as_choice(on_missing, "on_missing", ("raise", "pass")) == "raise"
        self.raises_on_overflow = as_choice(on_overflow, "on_overflow", ON_OVERFLOW) == "raise"
        self.compares_ranks = bool(compare_ranks)
        self.parameters = _positional(model.forward)
        if "packed_seq_params" not in inspect.signature(model.forward).parameters:
            raise PackingError(
                f"the forward of this {type(model).__name__} has no parameter packed_seq_params "
                f"({', '.join(inspect.signature(model.forward).parameters)}), so its boundaries "
                f"cannot be found; name it in the signature, or set __wrapped__ (functools.wraps)"
            )
        self.preprocess_parameters = _positional(model._preprocess_data)
        language_model = getattr(model, "language_model", None)
        if language_model is not None and not takes_boundaries(language_model):
            raise PackingError(
                "this megatron-core passes no packed_seq_params to "
                f"{type(language_model).__name__}, so packed samples leak into each other; hybrid "
                "models need megatron-core >= 0.16"
            )
        if language_model is not None and (plain := plain_attention(language_model)):
            raise PackingError(
                f"{plain} of the language model is Megatron's DotProductAttention, which takes no "
                f"packed rows. Build the model with a layer spec of Transformer Engine, or put "
                f"mp.attention.PackedAttention into yours: "
                f"spec.submodules.self_attention.submodules.core_attention = "
                f"mp.attention.PackedAttention"
            )
        if max_sequences is None and captures_layers(model.config):
            raise PackingError(
                "layers are captured as CUDA graphs, which take boundaries of one length only: say "
                "with max_sequences= how many sequences a row has at most, the tail included"
            )
        self.release = release_of(type(model))
        self.why_kept = why_not_ours(model)
        self.replaces_expansion = self.why_kept is None
        self.shares_vision = vision_dp_over_cp and _may_share(model, self.why_kept)
        self.spec = spec_of(model, max_sequences, self.replaces_expansion)
        self.spec_of_calls = dataclasses.replace(self.spec, on_overflow=on_overflow)
        self.restarts_positions = (
            getattr(language_model, "position_embedding_type", None) == "learned_absolute"
        )
        self.wants_seq_idx = isinstance(language_model, _HYBRIDS)
        self.masks_padding = wants_padding_mask(language_model)
        self.unpacked = threading.local()
        self.seen = Seen()


def _may_share(model: LLaVAModel, why_kept: str | None) -> bool:
    """Whether this stage has a vision tower that context-parallel ranks can share.

    Raises:
        PackingError: it has one, and they cannot.
    """
    if model.context_parallel_lm == 1 or not (model.add_encoder and model.pre_process):
        return False
    if shares_by_itself(model):
        return False
    if why_kept is None and captures_layers(model.vision_model.config):
        why_kept = "layers of the vision tower are captured as CUDA graphs"
    if why_kept is not None:
        raise PackingError(f"vision_dp_over_cp=True cannot be: {why_kept}")
    return True


def _positional(function) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )


def takes_boundaries(language_model) -> bool:
    """Whether a language model reads ``packed_seq_params``: hybrids do from 0.16 on."""
    parameters = inspect.signature(language_model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return "packed_seq_params" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def plain_attention(language_model) -> str | None:
    """The first module whose forward asserts that there are no boundaries, None without any."""
    own = DotProductAttention.forward
    for name, module in language_model.named_modules():
        if getattr(type(module), "forward", None) is own and "forward" not in vars(module):
            return name
    return None


def wants_padding_mask(language_model) -> bool:
    """Whether it has experts whose routers count tokens, and take a mask of padding.

    They take one from 0.16 on. From there to 0.19 ``_apply_expert_bias`` cannot broadcast it, and
    quantile balancing refuses one.
    """
    config = getattr(language_model, "config", None)
    if getattr(config, "num_moe_experts", None) is None:
        return False
    if "padding_mask" not in inspect.signature(language_model.forward).parameters:
        return False
    balancing = getattr(config, "moe_router_load_balancing_type", None)
    balancing = balancing if isinstance(balancing, list | tuple) else [balancing]
    if "quantile_balancing" in balancing:
        return False
    version = tuple(map(int, mcore_version.split(".")[:2]))
    return not (version < (0, 20) and config.moe_router_enable_expert_bias)


def _hybrid_classes() -> tuple[type, ...]:
    """Language models with Mamba layers; renamed on main."""
    found = []
    for module, name in (
        ("mamba.mamba_model", "MambaModel"),
        ("hybrid.hybrid_model", "HybridModel"),
    ):
        try:
            module = importlib.import_module(f"megatron.core.models.{module}")
        except ImportError:
            continue
        if hasattr(module, name):
            found.append(getattr(module, name))
    return tuple(found)


_HYBRIDS = _hybrid_classes()
