"""``install``: the forward hook on Megatron's ``LLaVAModel``, and its removal."""

import functools
import inspect
import logging
import warnings

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor

from .context_parallel import alignment
from .errors import Fault, PackingError, Space
from .layout import PackedLayout, expand_embeddings, expand_labels
from .packed_seq import expand_params, layouts_of, physical_boundaries, with_seq_idx
from .reference import local_positions

logger = logging.getLogger(__name__)

# ``_preprocess_data`` by its arguments: releases return three values, main returns five.
_RELEASED = frozenset({
    "image_embeddings", "language_embeddings", "input_ids", "loss_mask", "labels",
    "use_inference_kv_cache", "inference_context", "image_token_index", "num_image_tiles",
    "inference_params",
})  # fmt: skip
_MAIN = _RELEASED | {
    "imgs_sizes", "position_ids", "sound_embeddings", "sound_embeddings_len", "sound_timestamps",
}  # fmt: skip
_METHODS = ("_preprocess_data", "_process_embedding_token_parallel")
_INFERENCE = ("inference_context", "inference_params")

_NO_IMAGE = -(2**31)  # an id that no tokenizer has


def install(
    model,
    space: str = "auto",
    fused: bool = True,
    on_missing: str = "pass",
    pad_between_seqs: bool | None = None,
) -> "Installation":
    """Make packed rows correct in a ``LLaVAModel``, by a hook around its ``forward``.

    Whenever ``forward`` gets ``thd`` boundaries, they are moved to expanded space before anything
    reads them; for ``learned_absolute`` position embeddings the position ids are restarted at every
    sequence. Calls without boundaries, in another format, or with lists of tokens (inference) pass
    through untouched.

    Args:
        model: a ``LLaVAModel``, any wrapper around one (``Float16Module``, DDP, FSDP), or a list of
            pipeline chunks.
        space: what the boundaries count: "collapsed" tokens, "expanded" rows, or "auto": ask each
            row. Boundaries that are expanded already (Megatron's Energon loader makes such) stay as
            they are.
        fused: also replace the expansion itself: one kernel, no host synchronisation, and labels
            that never cross a boundary. Without it only boundaries and position ids change.
        on_missing: "raise" makes a call without ``thd`` boundaries an error, "pass" lets it
            through. A pipeline stage that gets neither tokens nor boundaries silently attends
            across samples.
        pad_between_seqs: whether ``cu_seqlens_q`` counts real rows, padding excluded, and
            ``cu_seqlens_q_padded`` says where sequences are. By default one tensor, the padded
            boundaries, serves as both, unless the caller's own parameters tell them apart.

    Returns:
        A handle: ``check()`` raises what the last row had wrong, ``remove()`` restores the model.
        Also a context manager.

    Raises:
        PackingError: no ``LLaVAModel`` in there, installed twice, or a language model that drops
            its boundaries (hybrids before Megatron-Core 0.16).

    Source:
        ``LLaVAModel.forward`` of Megatron-Core 0.12.3 to 0.16.1 and main.
    """
    if space not in ("auto", "collapsed", "expanded"):
        raise PackingError(f"space is {space!r}, expected 'auto', 'collapsed' or 'expanded'")
    if on_missing not in ("pass", "raise"):
        raise PackingError(f"on_missing is {on_missing!r}, expected 'pass' or 'raise'")
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    hooks = [
        _Hook(find_llava(chunk), space, fused, on_missing == "raise", pad_between_seqs)
        for chunk in chunks
    ]
    if len({id(hook.model) for hook in hooks}) < len(hooks):
        raise PackingError("the same LLaVAModel is in the list twice")
    for hook in hooks:
        hook.install()
    return Installation(hooks)


class Installation:
    """What ``install`` returns: the hook of every pipeline chunk."""

    def __init__(self, hooks: list["_Hook"]):
        self._hooks = hooks

    @property
    def layout_options(self) -> dict:
        """Arguments with which ``PackedLayout.build`` lays a row out exactly as the model will.

        For a data path that computes boundaries once, on the CPU, and hands them to every pipeline
        stage.
        """
        return self._live()[0].layout_options

    def _live(self) -> list["_Hook"]:
        if not self._hooks:
            raise PackingError("the hook was removed before")
        return self._hooks

    def check(self) -> None:
        """Raise what is wrong with the last packed row of any chunk (synchronises on a GPU)."""
        for hook in self._live():
            if hook.last_layout is not None:
                hook.last_layout.check()

    def remove(self) -> None:
        """Restore the model exactly.

        Raises:
            PackingError: it was removed before, or someone else replaced the hook since.
        """
        for hook in self._live():
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *exception) -> None:
        if self._hooks:
            self.remove()


class _Replacement:
    """A method replaced on an instance, that will not be copied along with it."""

    _mcore_packing = True

    def __init__(self, method, original):
        functools.update_wrapper(self, original)
        self._call = functools.partial(method, original)

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        raise PackingError(
            "a copy of this model would run the original's forward; remove() the hook, copy or "
            "pickle the model, then install() on both"
        )


class _Hook:
    """The hook on one ``LLaVAModel``: methods replaced on the instance.

    ``forward`` lays the row out and passes expanded boundaries on. Where the expansion is fused,
    the two methods it calls in between find the layout of the call in progress in ``self.call``.
    """

    def __init__(self, model: LLaVAModel, space: str, fused: bool, raises: bool, pad_between_seqs):
        if hasattr(model.forward, "_mcore_packing"):
            raise PackingError(
                "mcore_packing is installed on this model already; remove() it first"
            )
        self.model = model
        self.space = space
        self.raises = raises
        self.call = None
        self.last_layout = None
        self.replaced = {}
        self.space_is_said = space != "auto"
        self.forward_signature = inspect.signature(model.forward)
        self.preprocess_signature = inspect.signature(model._preprocess_data)
        takes = frozenset(self.preprocess_signature.parameters)
        self.known = takes in (_RELEASED, _MAIN)
        self.is_main = takes == _MAIN
        self.fused = fused and self.known and model._tile_tags is None
        if not self.known:
            warnings.warn(
                f"mcore_packing does not know this LLaVAModel._preprocess_data, which takes "
                f"{sorted(takes ^ _RELEASED)} more or less: boundaries are remapped, expansion "
                f"stays Megatron's own (fused=False)",
                stacklevel=4,
            )
        language_model = getattr(model, "language_model", None)
        if language_model is not None and not takes_boundaries(language_model):
            raise PackingError(
                "this megatron-core passes no packed_seq_params to "
                f"{type(language_model).__name__}, so packed samples leak into each other; hybrid "
                "models need megatron-core >= 0.16"
            )
        self.restarts = (
            getattr(language_model, "position_embedding_type", None) == "learned_absolute"
        )
        self.fields = {}  # arguments of packed_seq_params
        if type(language_model).__name__ in ("MambaModel", "HybridModel"):
            self.fields["seq_idx"] = True
        if pad_between_seqs is not None:
            self.fields["pad_between_seqs"] = pad_between_seqs
        # Routers of experts count padding otherwise.
        self.masks_padding = self.fused and _takes_padding_mask(language_model)
        self.pre_hook = None

    # Installation

    def install(self) -> None:
        self._replace("forward", self._forward)
        for name in _METHODS if self.fused else ():
            self._replace(name, getattr(self, name))
        if self.masks_padding:
            self.pre_hook = self.model.language_model.register_forward_pre_hook(
                self._add_padding_mask, with_kwargs=True
            )

    def remove(self) -> None:
        attributes = self.model.__dict__
        for name, (wrapper, _) in self.replaced.items():
            if attributes.get(name) is not wrapper:
                raise PackingError(f"someone replaced {name} of the model since; remove that first")
        for name, (_, before) in self.replaced.items():
            delattr(self.model, name)
            if before is not None:
                setattr(self.model, name, before)
        self.replaced = {}
        if self.pre_hook is not None:
            self.pre_hook.remove()

    def _replace(self, name: str, method) -> None:
        original = getattr(self.model, name)

        # On the instance: callers that use model.forward(...) skip a forward pre-hook.
        wrapper = _Replacement(method, original)
        self.replaced[name] = (wrapper, self.model.__dict__.get(name))
        setattr(self.model, name, wrapper)

    # What Megatron calls

    def _forward(self, original, *args, **kwargs):
        bound = self.forward_signature.bind(*args, **kwargs)
        given = bound.arguments
        params, input_ids = given.get("packed_seq_params"), given.get("input_ids")
        is_thd = params is not None and params.qkv_format == "thd"
        if not is_thd and self.raises:
            found = "none" if params is None else f"qkv_format {params.qkv_format!r}"
            raise PackingError(
                f"this stage got no packed_seq_params in thd format ({found}), so packed samples "
                f"would leak into each other; hand every pipeline stage the boundaries of its "
                f"micro-batch"
            )
        is_packed = is_thd and self.model.add_decoder
        if not is_packed or not isinstance(input_ids, Tensor | None):
            return original(*args, **kwargs)

        layout = None
        infers = any(given.get(name) is not None for name in _INFERENCE)
        fused = self.fused and not infers
        self._check_context_parallel(params)
        if input_ids is None:
            params, alarm = self._check_boundaries(params)
        else:
            layout, layout_kv = self._lay_out(given, params, input_ids, fused, infers)
            self.last_layout = layout
            alarm = self._watch_layout(layout)
            params = expand_params(params, layout, layout_kv, **self.fields)
            if self.restarts and self.model.pre_process:
                given["position_ids"] = layout.position_ids_collapsed.unsqueeze(0)
        given["packed_seq_params"] = params
        if fused:
            self.call = layout, params
            if self.splits_rows:
                # Ours come back from _process_embedding_token_parallel; until then main would clamp
                # them to the length of this rank's share.
                given["packed_seq_params"] = PackedSeqParams(qkv_format="thd")
        try:
            outputs = original(*bound.args, **bound.kwargs)
        finally:
            self.call = None
        if alarm is not None:
            alarm()
        return outputs

    def _preprocess_data(self, original, *args, **kwargs):
        given = self.preprocess_signature.bind(*args, **kwargs).arguments
        if self.call is None or self.call[0] is None or given["use_inference_kv_cache"]:
            return original(*args, **kwargs)
        model, layout = self.model, self.call[0]
        embeddings = labels = loss_mask = None
        if model.post_process and given["labels"] is not None:
            expanded = expand_labels(layout, given["labels"], given["loss_mask"], **self.rank)
            labels, loss_mask = (x if x is None else x[None] for x in expanded)
        if model.pre_process:
            text, images = given["language_embeddings"][0], given["image_embeddings"]
            if images is not None and images.numel() == 0:
                images = None
            is_dummy = images is not None and self._allows_dummy(layout)
            embeddings = expand_embeddings(layout, text, None if is_dummy else images, **self.rank)
            if is_dummy:
                embeddings = _KeepInGraph.apply(embeddings, images)
            embeddings = embeddings[:, None]
        if not self.is_main:
            return embeddings, labels, loss_mask
        _, position_ids, token_ids, *_ = layout.tokens(**self.rank)
        position_ids = None if given.get("position_ids") is None else position_ids[None]
        return embeddings, labels, loss_mask, token_ids[None], position_ids

    def _process_embedding_token_parallel(self, original, *args, **kwargs):
        if self.call is None:
            return original(*args, **kwargs)
        embeddings, labels, loss_mask = args[:3]  # this rank's already
        if self.model.sequence_parallel_lm and embeddings is not None:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        return embeddings, labels, loss_mask, self.call[1]

    def _allows_dummy(self, layout: PackedLayout) -> bool:
        """A row without images may carry one that only keeps the vision model in the graph: of
        FSDP's by the caller, on main of Megatron's own."""
        is_fsdp = getattr(self.model.vision_model, "_is_fsdp_managed_module", False)
        return layout.image_begin.numel() == 0 and (is_fsdp or self.is_main)

    def _add_padding_mask(self, language_model, args, kwargs):
        """bool ``[1, rows of this rank]``, True for padding."""
        if self.call is None or self.call[0] is None:
            return None
        layout, mask = self.call[0], self.call[0].padding_mask
        if self.model.context_parallel_lm > 1:
            cu_seqlens = layout.cu_seqlens_padded
            mask = mask[local_positions(cu_seqlens, layout.num_expanded, **self.rank)]
        if self.model.sequence_parallel_lm:
            group = language_model.tp_group
            mask = mask.chunk(group.size())[group.rank()]
        return args, {**kwargs, "padding_mask": mask[None]}

    # The layout of a row

    @functools.cached_property
    def splits_rows(self) -> bool:
        return self.model.context_parallel_lm > 1 or self.model.sequence_parallel_lm

    @property
    def _is_fixed(self) -> bool:
        """Whether Megatron pads every row to the language model's maximum length."""
        model = self.model
        overlaps = model.sequence_parallel_lm and model.tp_comm_overlap_lm
        return model._language_is_pipeline_parallel or overlaps

    @property
    def rank(self) -> dict:
        size = self.model.context_parallel_lm
        return {"cp_size": size, "cp_rank": self.model.cp_group.rank() if size > 1 else 0}

    @functools.cached_property
    def layout_options(self) -> dict:
        """The space, and the multiples and the length that the model's parallelism asks for."""
        model, config = self.model, self.model.config
        if not self.fused:
            return self._megatrons_layout_options(infers=False)
        seq_multiple, total_multiple = alignment(
            model.context_parallel_lm,
            model.tensor_model_parallel_size_lm,
            model.sequence_parallel_lm,
            _fp8_align(config),
        )
        longest, is_fixed = model._language_max_sequence_length, self._is_fixed
        if is_fixed and longest % total_multiple:
            raise PackingError(
                f"language_max_sequence_length is {longest}, expected a multiple of "
                f"{total_multiple}: the pipeline expects rows of exactly this length"
            )
        longest = longest // total_multiple * total_multiple
        return {
            "space": self.space,
            "seq_multiple": seq_multiple,
            "total_multiple": total_multiple,
            "num_padded_rows": longest if is_fixed else None,
            "max_expanded": longest,
        }

    def _megatrons_layout_options(self, infers: bool) -> dict:
        """What Megatron's own expansion does: it pads no sequence, and a row for pipelines only."""
        longest = self.model._language_max_sequence_length
        return {
            "space": self.space,
            "num_padded_rows": longest if self._is_fixed and not infers else None,
            "max_expanded": longest,
        }

    @torch.compiler.disable
    def _lay_out(
        self, given, params, input_ids, fused: bool, infers: bool
    ) -> tuple[PackedLayout, PackedLayout]:
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise PackingError(
                f"input_ids are {list(input_ids.shape)}, expected one packed row, [1, T]: Megatron "
                f"has no batch of rows in thd format"
            )
        if any(given.get(name) is not None for name in ("sound_clips", "sound_length")):
            raise PackingError("mcore_packing does not know the expansion of sound tokens")
        token = given.get("image_token_index")
        token = self.model.image_token_index if token is None else token
        tokens_per_image, num_rows = self._tokens_per_image(given, input_ids)
        if self.is_main and tokens_per_image.numel() == 0:
            token = _NO_IMAGE  # every image was dropped: main keeps placeholders as text
        options = self.layout_options if fused else self._megatrons_layout_options(infers)
        layouts = layouts_of(
            params, input_ids, tokens_per_image, token,
            num_image_rows=num_rows if fused else None, **options,
        )  # fmt: skip
        if not fused:
            layouts[0].check()
            self._check_lengths(layouts[0])
        return layouts

    def _tokens_per_image(self, given, input_ids) -> tuple[Tensor, int | None]:
        """How many rows each placeholder becomes, and their sum where the host knows it."""
        model, images = self.model, given.get("images")
        num_image_tiles = given.get("num_image_tiles")
        if num_image_tiles is None and isinstance(images, Tensor):
            num_image_tiles = torch.ones(images.shape[0], dtype=torch.int, device=input_ids.device)
        if not isinstance(num_image_tiles, Tensor) or num_image_tiles.dim() != 1:
            found = getattr(num_image_tiles, "shape", type(num_image_tiles).__name__)
            raise PackingError(f"num_image_tiles is {found}, expected a tensor [N] on every stage")
        sizes = given.get("imgs_sizes")
        if sizes is not None and getattr(model, "_dynamic_resolution", False):
            return self._dynamic_tokens(num_image_tiles, sizes.to(input_ids.device)), None
        if sizes is not None and not self.known:
            raise PackingError("mcore_packing does not know this LLaVAModel's dynamic resolution")

        num_rows = None
        if num_image_tiles.numel() == 0:
            num_rows = 0  # images may still hold a dummy
        elif model.pre_process and isinstance(images, Tensor):
            num_rows = images.shape[0] * model.img_seq_len
        elif model.pre_process and model.encoder_hidden_state is not None:
            num_rows = model.encoder_hidden_state.shape[:2].numel()
        return num_image_tiles.long() * model.img_seq_len, num_rows

    def _dynamic_tokens(self, num_image_tiles: Tensor, sizes: Tensor) -> Tensor:
        """Rows of each image from the pixels ``[tiles, 2]`` of its tiles.

        Source:
            ``LLaVAModel._preprocess_data`` of Megatron-Core main, ``dynamic_resolution=True``.
        """
        model = self.model
        rows = (sizes // model.patch_dim).prod(-1)
        if not model._drop_vision_class_token:
            rows = rows + model.vision_model.class_token_len
        for merges in (model._pixel_shuffle, model._conv_merging):
            rows = rows // 4 if merges else rows
        if model._max_num_tiles > 1:
            ends = num_image_tiles.cumsum(0)
            before = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
            rows = before[ends] - before[ends - num_image_tiles]
        return rows

    def _check_context_parallel(self, params: PackedSeqParams) -> None:
        size = getattr(params, "local_cp_size", None)
        if size not in (None, self.model.context_parallel_lm):
            raise PackingError(
                f"local_cp_size is {size}, but the model's context_parallel_size "
                f"{self.model.context_parallel_lm}: LLaVAModel cannot change it from row to row"
            )

    def _check_lengths(self, layout: PackedLayout) -> None:
        """Megatron's own expansion cannot pad a sequence, and TE's partition would not complain."""
        multiple, _ = alignment(self.model.context_parallel_lm)
        wrong = layout.cu_seqlens_padded.diff() % multiple != 0
        if multiple > 1 and bool(wrong.any()):
            seq = int(wrong.nonzero()[0])
            raise PackingError(
                f"sequence {seq}: {int(layout.cu_seqlens_padded.diff()[seq])} rows, expected a "
                f"multiple of 2 * cp_size = {multiple}; only fused=True pads sequences"
            )

    # Errors that a GPU finds

    @torch.compiler.disable
    def _watch_layout(self, layout: PackedLayout):
        """Arrange for what the kernel found to be raised at the end of this forward."""

        def tell(status: list[int]) -> None:
            if status[0]:
                layout.check()
            if not self.space_is_said:
                self.space_is_said = True
                space = "expanded" if status[1] == Space.EXPANDED else "collapsed"
                logger.info("the boundaries of the first packed row are %s", space)

        return _watch(layout.status, Fault.NONE, tell)

    @torch.compiler.disable
    def _check_boundaries(self, params: PackedSeqParams):
        """A stage without tokens can use expanded boundaries only: those that cover its rows."""
        hidden = getattr(getattr(self.model.language_model, "decoder", None), "input_tensor", None)
        if hidden is None:
            raise PackingError(
                "input_ids are None, but this stage has no hidden states to compare its boundaries "
                "with"
            )
        num_rows = hidden.shape[0] * self.model.context_parallel_lm
        if self.model.sequence_parallel_lm:
            num_rows *= self.model.tensor_model_parallel_size_lm

        def tell(last: list[int]) -> None:
            if last[0] != num_rows:
                raise PackingError(
                    f"the last boundary is {last[0]}, but this stage has {num_rows} rows: a stage "
                    f"without tokens needs expanded boundaries that cover the row; see "
                    f"mp.packed_seq_params and Installation.layout_options"
                )

        alarm = _watch(physical_boundaries(params)[-1:], num_rows, tell)
        if self.fields.get("seq_idx"):
            params = with_seq_idx(params, num_rows)
        return params, alarm


def _watch(word: Tensor, expected: int, tell):
    """Call ``tell`` with the values of ``word``: at once on a CPU, else by the function returned.

    Under graph capture, where nothing can be told, ``word[0] == expected`` is asserted on the GPU.

    The copy to pinned memory is queued here, right behind the kernel that wrote the word; at the
    end of the forward, with the language model queued behind it, waiting for it leaves the GPU
    busy.
    """
    if word.device.type == "cpu":
        tell(word.tolist())
        return None
    if torch.cuda.is_current_stream_capturing():
        torch._assert_async(word[0] == expected)
        return None
    host = torch.empty(word.shape, dtype=word.dtype, pin_memory=True)
    host.copy_(word, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> None:
        event.synchronize()
        tell(host.tolist())

    return wait


class _KeepInGraph(torch.autograd.Function):
    """``rows``; ``images`` take part with weight zero, so that FSDP sees their gradients."""

    @staticmethod
    def forward(ctx, rows, images):
        ctx.images = images.shape, images.dtype, images.device
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, device = ctx.images
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def find_llava(model) -> LLaVAModel:
    """The one ``LLaVAModel`` inside ``model``.

    Raises:
        PackingError: there is none, or more than one.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = [module for module in modules if isinstance(module, LLaVAModel)]
    if len(found) != 1:
        raise PackingError(
            f"{type(model).__name__} holds {len(found)} LLaVAModels, expected one; pass a "
            f"LLaVAModel, a wrapper around one, or a list of pipeline chunks"
        )
    return found[0]


def _takes_padding_mask(language_model) -> bool:
    """Whether it has experts, and hands their routers a mask (megatron-core >= 0.16)."""
    if getattr(getattr(language_model, "config", None), "num_moe_experts", None) is None:
        return False
    return "padding_mask" in inspect.signature(language_model.forward).parameters


def understanding(model_class) -> str:
    """In words, how far ``install`` understands a ``LLaVAModel`` class."""
    takes = set(inspect.signature(model_class._preprocess_data).parameters) - {"self"}
    if takes == _RELEASED:
        return "understood, fused (as in 0.12 to 0.16)"
    if takes == _MAIN:
        return "understood, fused (main)"
    return "boundaries only: its _preprocess_data is not known"


def takes_boundaries(language_model) -> bool:
    parameters = inspect.signature(language_model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return "packed_seq_params" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _fp8_align(config) -> int:
    """How many rows FP8 matrix products want a multiple of, on each rank.

    Source:
        ``megatron.core.fp8_utils.get_fp8_align_size``, which does not know blockwise scaling (128).
    """
    if not getattr(config, "fp8", None):
        return 1
    if str(getattr(config, "fp8_recipe", "")).endswith("blockwise"):
        return 128
    try:
        from megatron.core.fp8_utils import get_fp8_align_size
    except ImportError:
        return 32 if str(getattr(config, "fp8_recipe", "")).endswith("mxfp8") else 16
    return get_fp8_align_size(config.fp8_recipe)
