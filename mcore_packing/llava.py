"""``install``: the forward hook on Megatron's ``LLaVAModel``, and its removal."""

import contextlib
import dataclasses
import functools
import inspect
import logging
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor

from . import model_rows, versions
from .errors import PackingError, PlaceholderMismatch
from .expand import count_lost, expand_tokens, fill_rows
from .layout import PackedLayout, check_on_overflow, max_seqlen_bound, read_later, round_up
from .packed_seq import (
    layout_of,
    megatron_params,
    physical_boundaries,
    riding_layout,
    says,
    stage_layout,
    with_capacity,
)
from .reference import local_positions
from .space import check_space

logger = logging.getLogger(__name__)

_NO_IMAGE = -(2**31)  # an id that no tokenizer has: the layout finds no placeholder
_CAPACITY_STEP = 64


def install(
    model,
    space: str = "auto",
    fused: bool = True,
    on_missing: str = "pass",
    on_overflow: str = "raise",
    pad_between_seqs: bool | None = None,
    capacity: int | None = None,
) -> "Installation":
    """Make packed rows correct in a ``LLaVAModel``, by a hook around its ``forward``.

    Whenever ``forward`` gets ``thd`` boundaries, they are moved to expanded space before anything
    reads them; for ``learned_absolute`` position embeddings the position ids are restarted at every
    sequence. Parameters that came with their layout (``mp.packed_seq_params``) are used as they
    are. Calls without boundaries, in another format, or with lists of tokens (inference) pass
    through untouched.

    Args:
        model: a ``LLaVAModel``, any wrapper around one (``Float16Module``, DDP, FSDP), or a list of
            pipeline chunks.
        space: what boundaries without a layout count: "collapsed" tokens, "expanded" rows (as
            Megatron's Energon loader makes them), or "auto": ask the values of the first rows,
            refuse what is not certain, and keep the first answer, for training and evaluation
            apart. Say it where you know it.
        fused: also replace the expansion itself: one kernel, no host synchronisation, and labels
            that never cross a boundary. Without it only boundaries and position ids change.
        on_missing: "raise" makes a call without ``thd`` boundaries an error (stages without a
            language model and inference pass), "pass" lets it through. A pipeline stage that gets
            neither tokens nor boundaries silently attends across samples.
        on_overflow: "raise" makes samples that do not fit the language model's maximum, with the
            padding that parallelism asks for, an error; "truncate" cuts them off, as Megatron does,
            and logs how many trained tokens went. What lies behind the last boundary is cut off
            either way, unless it is trained.
        pad_between_seqs: whether ``cu_seqlens_q`` counts real rows, padding excluded, and
            ``cu_seqlens_q_padded`` says where sequences are. By default one tensor, the padded
            boundaries, serves as both, unless the caller's own parameters tell them apart.
        capacity: where layers are captured as CUDA graphs, which reject boundaries of another
            length: room for so many sequences, the tail included. By default what the first row
            needs, rounded up to 64.

    Returns:
        A handle: ``check()`` raises what the last row had wrong, ``remove()`` restores the model.
        Also a context manager.

    Raises:
        PackingError: no ``LLaVAModel`` in there, installed twice, a ``forward`` without
            ``packed_seq_params``, or a language model that drops its boundaries (hybrids before
            Megatron-Core 0.16).

    Source:
        ``LLaVAModel.forward`` of Megatron-Core 0.12.3 to main.
    """
    check_space(space)
    check_on_overflow(on_overflow)
    if on_missing not in ("pass", "raise"):
        raise PackingError(f"on_missing is {on_missing!r}, expected 'pass' or 'raise'")
    models = [find_llava(chunk) for chunk in _chunks(model)]
    if len(set(map(id, models))) < len(models):
        raise PackingError("the same LLaVAModel is in the list twice")
    settings = Settings(
        _SpaceOfRows(space), fused, on_missing == "raise", on_overflow, pad_between_seqs, capacity
    )
    hooks = [_Hook(llava, settings) for llava in models]
    for llava, hook in zip(models, hooks, strict=True):
        hook.install(llava)
    return Installation(models, settings)


def layout_options(model) -> dict:
    """Arguments with which ``PackedLayout.build`` lays a row out exactly as the model will.

    For a data path that makes layouts where it makes rows, on the CPU.

    Args:
        model: as ``install`` takes it, installed or not.

    Returns:
        ``space``, ``on_overflow``, and the multiples and lengths that the parallelism, the
        precision and the maximum of the model ask for.

    Raises:
        PackingError: no ``LLaVAModel`` in there, or a maximum that pipelines cannot use.
    """
    llava = find_llava(_chunks(model)[0])
    hook = _hook_of(llava)
    if hook is not None:
        return hook.layout_options(llava)
    return model_rows.layout_options(llava, "auto", "raise")


class Installation:
    """What ``install`` returns: the hook of every pipeline chunk. It does not keep models alive."""

    def __init__(self, models: list[LLaVAModel], settings: "Settings"):
        self._models = [weakref.ref(model) for model in models]
        self._settings = settings

    @property
    def layout_options(self) -> dict:
        """As ``mp.layout_options`` of the model."""
        return layout_options(self._live()[0])

    @property
    def space(self) -> str:
        """What boundaries without a layout count: as said, or as found, in the model's present mode
        or else in the other; "auto" until a row tells."""
        space, training = self._settings.space, self._live()[0].training
        return space.of(training) or space.of(not training) or "auto"

    def _live(self) -> list[LLaVAModel]:
        if not self._models:
            raise PackingError("the hook was removed before")
        models = [model for ref in self._models if (model := ref()) is not None]
        if not models:
            raise PackingError("the model is gone")
        return models

    def check(self) -> None:
        """Raise what is wrong with the last packed row of any chunk (synchronises on a GPU)."""
        for model in self._live():
            _hook_of(model).check()

    def remove(self) -> None:
        """Restore the model exactly.

        Raises:
            PackingError: it was removed before, or someone else changed the model's class or
                ``forward`` since.
        """
        models = self._live()
        for model in models:
            _hook_of(model).check_removable(model)
        for model in models:
            _hook_of(model).remove(model)
        self._models = []

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *exception) -> None:
        if self._models:
            self.remove()


class _SpaceOfRows:
    """What the boundaries of a data path count: said, or found once and kept."""

    def __init__(self, space: str):
        self.said = None if space == "auto" else space
        self.found = {}  # by whether the model was training

    def of(self, training: bool) -> str | None:
        return self.said or self.found.get(training)

    def learn(self, space: str | None, training: bool) -> None:
        if space is None or self.of(training) is not None:
            return
        self.found[training] = space
        logger.info("the boundaries of the first packed row are %s", space)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            warnings.warn(
                f"mcore_packing found the boundaries to be {space} by looking at a row; processes "
                f"that see other rows could find otherwise, so say it: install(space={space!r})",
                stacklevel=2,
            )


@dataclass(frozen=True)
class Settings:
    """What ``install`` was told, for all chunks."""

    space: _SpaceOfRows
    fused: bool
    raises_if_missing: bool
    on_overflow: str
    pad_between_seqs: bool | None
    capacity: int | None


@dataclass
class _Call:
    """One packed ``forward`` in progress."""

    layout: PackedLayout
    given: PackedSeqParams
    fused: bool
    cp_size: int
    cp_rank: int
    params: PackedSeqParams | None = None  # what the language model gets
    wait: Callable[[], PackedLayout] | None = None  # for the layout's status
    wait_for_lost: Callable[[], list[int]] | None = None  # for the number of trained tokens cut off
    waits_for_end: bool = False  # only a fault is still to be read, after the forward
    num_image_rows: int | None = None  # that the vision model gave
    has_params: bool = False  # whether the language model got them


class _Hook:
    """The hook on one ``LLaVAModel``.

    ``forward`` lays the row out and passes expanded boundaries on. Where the expansion is fused,
    the two methods that Megatron calls in between find the layout in ``self.call``. Right before
    the language model, with the vision model queued on the GPU, what only the GPU knew is read.
    """

    def __init__(self, model: LLaVAModel, settings: Settings):
        if _hook_of(model) is not None:
            raise PackingError(
                "mcore_packing is installed on this model already; remove() it first"
            )
        self.settings = settings
        self.forward_signature = inspect.signature(model.forward)
        if "packed_seq_params" not in self.forward_signature.parameters:
            raise PackingError(
                f"the forward of this {type(model).__name__} has no parameter packed_seq_params "
                f"({', '.join(self.forward_signature.parameters)}), so its boundaries cannot be "
                f"found; name it in the signature, or set __wrapped__ (functools.wraps)"
            )
        self.preprocess_signature = inspect.signature(model._preprocess_data)
        self.release = versions.release_of(type(model))
        self.fused = settings.fused and model._tile_tags is None and self._is_known(model)
        language_model = getattr(model, "language_model", None)
        if language_model is not None and not versions.takes_boundaries(language_model):
            raise PackingError(
                "this megatron-core passes no packed_seq_params to "
                f"{type(language_model).__name__}, so packed samples leak into each other; hybrid "
                "models need megatron-core >= 0.16"
            )
        self.restarts_positions = (
            getattr(language_model, "position_embedding_type", None) == "learned_absolute"
        )
        self.overrides = {}  # arguments of megatron_params
        if versions.is_hybrid(language_model):
            self.overrides["seq_idx"] = True
        if settings.pad_between_seqs is not None:
            self.overrides["pad_between_seqs"] = settings.pad_between_seqs
        # Routers of experts count padding otherwise.
        self.masks_padding = self.fused and versions.wants_padding_mask(language_model)
        self.has_layer_graphs = versions.asks_for_layer_graphs(model.config)
        self.capacity = settings.capacity
        self.class_before = self.forward_before = self.pre_hook = None
        self.last_layout = self.last_input_ids = None
        self._local = threading.local()  # a call belongs to its thread

    def _is_known(self, model) -> bool:
        """Whether the expansion may be replaced: it must be Megatron's own, of a known release."""
        names = ["_preprocess_data"]
        if model_rows.splits_rows(model):
            names.append("_process_embedding_token_parallel")
        why = None
        if changed := versions.overridden(model, names):
            why = f"{' and '.join(changed)} of this {type(model).__name__} are not Megatron's own"
        elif self.release is None:
            takes = sorted(self.preprocess_signature.parameters)
            why = f"this LLaVAModel._preprocess_data is of no known release (it takes {takes})"
        if why is not None:
            warnings.warn(
                f"mcore_packing: {why}; boundaries are remapped, the expansion is left alone "
                f"(fused=False)",
                stacklevel=5,
            )
        return why is None

    # Installation

    def install(self, model: LLaVAModel) -> None:
        self.class_before = type(model)
        self.forward_before = vars(model).pop("forward", None)  # someone's own wrapper
        model._packing_hook = self
        model.__class__ = _with_hook(self.class_before)
        language_model = getattr(model, "language_model", None)
        if language_model is not None:
            self.pre_hook = language_model.register_forward_pre_hook(
                self.before_language_model, prepend=True, with_kwargs=True
            )

    def check_removable(self, model: LLaVAModel) -> None:
        if "forward" in vars(model):
            raise PackingError("someone replaced forward of the model since; remove that first")
        if type(model) is not _with_hook(self.class_before):
            raise PackingError(
                f"someone made the model a {type(model).__name__} since; remove that first"
            )

    def remove(self, model: LLaVAModel) -> None:
        model.__class__ = self.class_before
        del model._packing_hook
        if self.forward_before is not None:
            model.forward = self.forward_before
        if self.pre_hook is not None:
            self.pre_hook.remove()
        self.class_before = None

    def check(self) -> None:
        if self.last_layout is None:
            return
        self.last_layout.check()
        ids = self.last_input_ids
        if ids is not None and not torch.equal(self.last_layout.input_ids, ids.reshape(-1)):
            raise PackingError("the layout that came with the last row was made of other input_ids")

    # What Megatron calls

    @property
    def call(self) -> _Call | None:
        """The packed call in progress in this thread."""
        return getattr(self._local, "call", None)

    @contextlib.contextmanager
    def _during(self, call: _Call):
        before, self._local.call = self.call, call
        try:
            yield
        finally:
            self._local.call = before

    def forward(self, model, original, args, kwargs):
        bound = self.forward_signature.bind(*args, **kwargs)
        given = bound.arguments
        if not self._is_packed(model, given):
            return original(*args, **kwargs)
        call = self._prepare(model, given)
        try:
            with self._during(call):
                outputs = original(*bound.args, **bound.kwargs)
        except Exception:
            if call.waits_for_end:  # what is wrong with the row may be why
                self._settle(call)
            raise
        self._settle(call)
        # The blank parameters that main got in their place were never replaced.
        if not call.has_params and given["packed_seq_params"].cu_seqlens_q is None:
            raise PackingError(
                "the language model ran without its boundaries: it was compiled before the hook "
                "was installed; call mp.install first"
            )
        return outputs

    def preprocess_data(self, model, original, args, kwargs):
        call = self.call
        if call is None or not call.fused or not call.layout.has_tokens:
            return original(*args, **kwargs)
        given = self.preprocess_signature.bind(*args, **kwargs).arguments
        sound = given.get("sound_embeddings")
        if sound is not None and sound.numel():
            raise PackingError(
                f"sound_clips were [1, 1], which stands for no sound, but gave "
                f"{list(sound.shape)} embeddings; pass sound_clips=None where there is none"
            )
        layout = call.layout
        has_labels = model.post_process and given["labels"] is not None
        labels, loss_mask = (given["labels"], given["loss_mask"]) if has_labels else (None, None)
        tokens = expand_tokens(layout, labels, loss_mask, call.cp_size, call.cp_rank)
        embeddings = None
        if model.pre_process:
            text, images = given["language_embeddings"][0], given["image_embeddings"]
            if images is not None and images.numel() == 0:
                images = None
            dummy = None
            if images is not None and self._allows_dummy(model, layout):
                dummy, images = images, None
            call.num_image_rows = 0 if images is None else images.shape[:2].numel()
            embeddings = fill_rows(layout, text, images, tokens.source, call.cp_size, call.cp_rank)
            if dummy is not None:
                embeddings = _KeepInGraph.apply(embeddings, dummy)
            embeddings = embeddings[:, None]
        expanded = (
            embeddings,
            None if labels is None else tokens.labels[None],
            None if loss_mask is None else tokens.loss_mask[None],
        )
        if not self.release.returns_ids:
            return expanded
        position_ids = None if given.get("position_ids") is None else tokens.position_ids[None]
        return *expanded, tokens.token_ids[None], position_ids

    def process_embedding_token_parallel(self, model, original, args, kwargs):
        call = self.call
        if call is None or not call.fused:
            return original(*args, **kwargs)
        embeddings, labels, loss_mask, params = args  # this rank's already
        if model.sequence_parallel_lm and embeddings is not None:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        return embeddings, labels, loss_mask, params

    @torch.compiler.disable
    def before_language_model(self, language_model, args, kwargs):
        """Give the language model its boundaries, and its routers the padding."""
        call = self.call
        if call is None:
            return None
        if not call.waits_for_end:
            self._settle(call)
        call.has_params = True
        kwargs = {**kwargs, "packed_seq_params": call.params}
        if self.masks_padding and call.fused:
            kwargs["padding_mask"] = _padding_mask(language_model, call)
        return args, kwargs

    def _allows_dummy(self, model, layout: PackedLayout) -> bool:
        """Whether a row without images may carry one that only keeps the vision model in the graph.
        Callers add it under FSDP, Megatron's main by itself."""
        is_fsdp = getattr(model.vision_model, "_is_fsdp_managed_module", False)
        return layout.image_start.numel() == 0 and (is_fsdp or self.release.keeps_text_rows)

    # One packed call

    def _is_packed(self, model, given) -> bool:
        """Whether there are boundaries to move.

        Raises:
            PackingError: there are none, and ``on_missing="raise"``.
        """
        params = given.get("packed_seq_params")
        is_thd = params is not None and params.qkv_format == "thd"
        has_tensors = isinstance(given.get("input_ids"), Tensor | None)
        if is_thd and model.add_decoder and has_tensors:
            return True
        passes = not model.add_decoder or not has_tensors or _infers(given)
        passes = passes or getattr(self._local, "is_unpacked", False)
        if is_thd or passes or not self.settings.raises_if_missing:
            return False
        found = "none" if params is None else f"qkv_format {params.qkv_format!r}"
        raise PackingError(
            f"this stage got no packed_seq_params in thd format ({found}), so packed samples "
            f"would leak into each other; hand every pipeline stage the boundaries of its "
            f"micro-batch"
        )

    @torch.compiler.disable
    def _prepare(self, model, given) -> _Call:
        """Lay the row out, and put into ``given`` what ``forward`` is to see instead."""
        if self.class_before is None:
            raise PackingError(
                "the hook was removed from the model that this one is a shallow copy of"
            )
        params, input_ids = given["packed_seq_params"], given.get("input_ids")
        model_rows.check_context_parallel(model, params)
        fused = self.fused and not _infers(given) and not _has_sound(given)
        if input_ids is None:
            options = self.layout_options(model, fused)
            layout = stage_layout(params, model_rows.num_stage_rows(model), **options)
        else:
            layout = self._lay_out(model, given, fused)
        cp_size = model.context_parallel_lm
        cp_rank = model.cp_group.rank() if cp_size > 1 else 0
        call = _Call(layout, params, fused, cp_size, cp_rank)
        self.last_layout = layout
        self.last_input_ids = None if riding_layout(params) is None else input_ids
        self._start_reading(model, given, call)
        if self.restarts_positions and model.pre_process:
            given["position_ids"] = layout.position_ids_collapsed.unsqueeze(0)
        given["packed_seq_params"] = self._first_params(call)
        return call

    def _lay_out(self, model, given, fused: bool) -> PackedLayout:
        params, input_ids = given["packed_seq_params"], given["input_ids"]
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise PackingError(
                f"input_ids are {list(input_ids.shape)}, expected one packed row, [1, T]: Megatron "
                f"has no batch of rows in thd format"
            )
        token = given.get("image_token_index")
        token = model.image_token_index if token is None else token
        tokens_per_image, num_image_rows = self._tokens_per_image(model, given)
        options = self.layout_options(model, fused, _infers(given))
        if tokens_per_image.numel() == 0 and getattr(self.release, "keeps_text_rows", False):
            # Megatron expands nothing here, and pads only where the hook does.
            token = _NO_IMAGE
            options["num_padded_rows"] = options["num_padded_rows"] if fused else None
        space, declared = self.settings.space, getattr(params, "space", None)
        options["space"] = declared or space.of(model.training) or "auto"
        # What was only found must hold for every row; what was said is taken at its word.
        options["strict"] = not declared and space.said is None
        if fused:
            options["num_image_rows"] = num_image_rows
        layout = layout_of(params, input_ids, tokens_per_image, token, **options)
        if not declared and riding_layout(params) is None:
            space.learn(layout.space, model.training)
        if not fused:
            layout = layout if layout.is_exact else layout.exact_later()()
            model_rows.check_megatrons_row(model, layout, options)
        return layout

    def _tokens_per_image(self, model, given) -> tuple[Tensor, int | None]:
        """How many rows each placeholder becomes, and their sum where the host knows it."""
        images, input_ids = given.get("images"), given["input_ids"]
        layout = riding_layout(given["packed_seq_params"])
        if layout is not None and not model.add_encoder:  # which may count what this stage cannot
            return layout.cu_image_rows.diff().long(), layout.num_image_rows
        num_image_tiles = given.get("num_image_tiles")
        if num_image_tiles is None and isinstance(images, Tensor):
            num_image_tiles = torch.ones(images.shape[0], dtype=torch.int, device=input_ids.device)
        if not isinstance(num_image_tiles, Tensor) or num_image_tiles.dim() != 1:
            found = getattr(num_image_tiles, "shape", type(num_image_tiles).__name__)
            raise PackingError(f"num_image_tiles is {found}, expected a tensor [N] on every stage")
        if num_image_tiles.numel() == 0:
            return num_image_tiles.long(), 0  # images may still hold a dummy
        if self.release is not None:
            dynamic = self.release.dynamic_tokens(model, given, num_image_tiles)
            if dynamic is not None:
                known = int(dynamic.sum()) if dynamic.device.type == "cpu" else None
                return dynamic.to(input_ids.device, non_blocking=True), known
        elif given.get("imgs_sizes") is not None:
            raise PackingError("mcore_packing does not know this LLaVAModel's dynamic resolution")
        num_rows = None
        if model.pre_process and isinstance(images, Tensor):
            num_rows = images.shape[0] * model.img_seq_len
        elif model.pre_process and model.encoder_hidden_state is not None:
            num_rows = model.encoder_hidden_state.shape[:2].numel()
        return num_image_tiles.long() * model.img_seq_len, num_rows

    def layout_options(self, model, fused: bool | None = None, infers: bool = False) -> dict:
        """As ``mp.layout_options``; for a call that is not fused, what Megatron's own expansion
        does."""
        space = self.settings.space.of(model.training) or "auto"
        on_overflow = self.settings.on_overflow
        if self.fused if fused is None else fused:
            return model_rows.layout_options(model, space, on_overflow)
        return model_rows.megatrons_layout_options(model, self.release, infers, space, on_overflow)

    # What only the GPU knows

    def _start_reading(self, model, given, call: _Call) -> None:
        """Queue what has to be read before the language model."""
        layout = call.layout
        is_capturing = layout.status.is_cuda and torch.cuda.is_current_stream_capturing()
        if is_capturing:
            torch._assert_async(layout.status[0] == 0)
            return
        if not layout.is_exact:
            call.wait = layout.exact_later()
            longest = _longest_of_text(layout, call.given)
            if longest is not None:
                call.waits_for_end = True
                call.layout = dataclasses.replace(layout, max_seqlen=longest)
        loss_mask, has_layout = given.get("loss_mask"), riding_layout(call.given) is not None
        if loss_mask is not None and layout.has_tokens and _may_be_cut(layout):
            lost = count_lost(layout, loss_mask)
            if (
                layout.space == "expanded" and not has_layout
            ):  # rows that Energon cut at the maximum lost them there
                last = physical_boundaries(call.given)[-1]
                lost = lost * (last != model._language_max_sequence_length)
            call.wait_for_lost = read_later(lost.reshape(1))

    def _settle(self, call: _Call) -> None:
        """Read what was queued: raise what is wrong with the row, or make its exact boundaries."""
        if call.wait is not None:
            layout, call.wait = call.wait(), None
            if not call.waits_for_end:
                call.params = None
            elif layout.max_seqlen > call.layout.max_seqlen:
                raise PackingError(
                    f"max_seqlen_q is {call.given.max_seqlen_q}, but the longest sequence has "
                    f"{layout.max_seqlen} rows"
                )
            self.last_layout = call.layout = layout
        if call.wait_for_lost is not None:
            (lost,), call.wait_for_lost = call.wait_for_lost(), None
            self._report_lost(call.layout, lost)
        expected = call.layout.num_image_rows
        if call.num_image_rows is not None and expected not in (None, call.num_image_rows):
            raise PlaceholderMismatch(
                actual=call.num_image_rows,
                expected=expected,
                message=f"images have {call.num_image_rows} rows, but the placeholders become "
                f"{expected} rows",
            )
        if call.params is None:
            call.params = self._params(call)

    def _report_lost(self, layout: PackedLayout, lost: int) -> None:
        if not lost:
            return
        message = f"{lost} trained tokens do not fit the row of {layout.num_expanded}"
        if self.settings.on_overflow == "raise":
            raise PackingError(
                f"{message}: they lie behind the last boundary; give them one, or mask their loss"
            )
        logger.warning("%s and were cut off (on_overflow='truncate')", message)

    def _first_params(self, call: _Call) -> PackedSeqParams:
        """What ``forward`` sees until the language model gets its own."""
        call.params = self._params(call)
        if call.fused and self.release.reads_boundaries:
            return PackedSeqParams(qkv_format="thd")
        return call.params

    def _params(self, call: _Call) -> PackedSeqParams:
        layout = call.layout
        if self.has_layer_graphs:
            return self._constant_params(layout, call.given)
        rides_along = riding_layout(call.given) is not None
        if not self.overrides and not rides_along and says(call.given, layout):
            return call.given
        return megatron_params(layout, call.given, **self.overrides)

    def _constant_params(self, layout: PackedLayout, given: PackedSeqParams) -> PackedSeqParams:
        """Nothing but the values of tensors changes from row to row."""
        if self.capacity is None:
            self.capacity = round_up(layout.num_seqs + 1, _CAPACITY_STEP)
            logger.info("captured layers have room for %d sequences", self.capacity)
        bound = max_seqlen_bound(layout.num_expanded)
        layout = dataclasses.replace(layout, max_seqlen=bound, has_tail=True)
        return with_capacity(megatron_params(layout, given, **self.overrides), self.capacity)


@functools.cache
def _with_hook(model_class: type[LLaVAModel]) -> type[LLaVAModel]:
    """The class with the hook in front of what it inherits.

    Put in place of a model's own class, so that every way to call ``forward`` meets it, and a
    shallow copy runs on itself.
    """

    class WithHook(model_class):
        @functools.wraps(model_class.forward)
        def forward(self, *args, **kwargs):
            hook = self._packing_hook
            original = hook.forward_before or super().forward
            return hook.forward(self, original, args, kwargs)

        @functools.wraps(model_class._preprocess_data)
        def _preprocess_data(self, *args, **kwargs):
            original = super()._preprocess_data
            return self._packing_hook.preprocess_data(self, original, args, kwargs)

        @functools.wraps(model_class._process_embedding_token_parallel)
        def _process_embedding_token_parallel(self, *args, **kwargs):
            original = super()._process_embedding_token_parallel
            return self._packing_hook.process_embedding_token_parallel(self, original, args, kwargs)

        def __copy__(self):
            new = type(self).__new__(type(self))
            new.__dict__.update(self.__dict__)
            return new

        def __reduce_ex__(self, protocol):
            raise PackingError(
                "a model with the hook installed is not copied or pickled as a whole; remove() the "
                "hook, copy or save the model, then install() again; or save its state_dict()"
            )

        def __deepcopy__(self, memo):
            return self.__reduce_ex__(4)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(WithHook, name, getattr(model_class, name))
    return WithHook


@contextlib.contextmanager
def unpacked(model):
    """Lets calls without boundaries pass, in this thread, whatever ``on_missing`` says."""
    hook = _hook_of(find_llava(model))
    local = threading.local() if hook is None else hook._local
    local.is_unpacked = True
    try:
        yield
    finally:
        local.is_unpacked = False


def _hook_of(model: LLaVAModel) -> _Hook | None:
    return vars(model).get("_packing_hook")


def _chunks(model) -> list:
    return list(model) if isinstance(model, list | tuple) else [model]


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


# What a call is about


def _infers(given) -> bool:
    return any(given.get(name) is not None for name in ("inference_context", "inference_params"))


def _has_sound(given) -> bool:
    """Whether there are sounds. Data paths send ``[1, 1]`` zeros where there are none."""
    clips = given.get("sound_clips")
    return isinstance(clips, Tensor) and clips.numel() > 0 and clips.shape != (1, 1)


def _may_be_cut(layout: PackedLayout) -> bool:
    """Whether the row could be longer than there is room for, as far as the host knows."""
    if layout.num_cut is not None:
        return layout.num_cut > 0
    if layout.num_image_rows is None:
        return True
    rows = layout.num_collapsed - layout.image_start.numel() + layout.num_image_rows
    return rows + layout.num_seqs * (layout.seq_multiple - 1) > layout.num_expanded


def _longest_of_text(layout: PackedLayout, params: PackedSeqParams) -> int | None:
    """The longest sequence of a row without images by what the caller says, so that nothing has to
    be read before the language model; None where the tail could be longer.

    Never the length of a row of several sequences: mcore's unfused RoPE would take it for absolute
    positions.
    """
    if not layout.has_tokens or layout.image_start.numel() or type(params.max_seqlen_q) is not int:
        return None
    longest = round_up(params.max_seqlen_q, layout.seq_multiple)
    longest_tail = layout.num_expanded - longest
    return longest if longest_tail <= longest < layout.num_expanded else None


def _padding_mask(language_model, call: _Call) -> Tensor:
    """bool ``[1, rows of this rank]``, True for padding."""
    layout, mask = call.layout, call.layout.padding_mask
    if call.cp_size > 1:
        mask = mask[
            local_positions(
                layout.cu_seqlens_padded, layout.num_expanded, call.cp_size, call.cp_rank
            )
        ]
    if language_model.config.sequence_parallel:
        group = language_model.tp_group
        mask = mask.chunk(group.size())[group.rank()]
    return mask[None]


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
