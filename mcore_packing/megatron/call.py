"""One packed forward of a ``LLaVAModel``, at its four moments."""

import copy
import dataclasses
import functools
import logging
import threading
import warnings
from itertools import islice

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor

from ..errors import BoundarySpaceError, PackingError, PlaceholderMismatch, Status
from ..expand import count_lost, expand_tokens, fill
from ..inputs import may_look
from ..layout import NO_IMAGE, PackedLayout, read_later
from ..reference import local_positions
from ..space import find_space
from ..spec import RowSpec, round_up
from .dummy import KeepInGraph, dummy_image
from .params import check_keys, laid_out, megatron_params, physical_boundaries, stage_layout
from .plan import Plan
from .ranks import compare, fingerprint, shares_rows
from .releases import tokens_per_image
from .spec import megatrons_spec, sequences_must_divide_by, stage_length
from .vision import share_of

logger = logging.getLogger(__name__)


@torch.compiler.disable
def packed_call(plan: Plan, model: LLaVAModel, args: tuple, kwargs: dict) -> "PackedCall | None":
    """The packed call that ``forward`` is to be with these arguments; None where there are no
    boundaries to move, and ``forward`` is to run as it is.

    Raises:
        PackingError: boundaries are missing where they must not; or what is wrong with the row; or
            other ranks have another row.
    """
    if model.training in plan.seen.compared:
        return _begin(plan, model, args, kwargs)
    compares = plan.compares_ranks and shares_rows()
    try:
        call = _begin(plan, model, args, kwargs)
        if call is not None and compares:
            call.read()
    except Exception:
        if compares:
            compare(None, model)  # so that nobody waits for this rank
        raise
    if call is not None:
        plan.seen.compared |= {model.training}
        if compares:
            compare(fingerprint(call.layout, call.given.get("input_ids")), model)
    return call


def _begin(plan: Plan, model: LLaVAModel, args: tuple, kwargs: dict) -> "PackedCall | None":
    if len(args) > len(plan.parameters):
        raise PackingError(
            f"forward got {len(args)} positional arguments, but its signature names "
            f"{len(plan.parameters)}: pass the others by name, or set __wrapped__ (functools.wraps)"
        )
    given = dict(zip(plan.parameters, args, strict=False)) | kwargs
    if not _has_boundaries(model, given):
        _check_may_be_missing(plan, model, given)
        return None
    spec = plan.spec_of_calls
    if plan.replaces_expansion and not _keeps_megatrons_expansion(given):
        return PackedCall(plan, model, spec, given, args, kwargs)
    spec = dataclasses.replace(megatrons_spec(model, _infers(given)), on_overflow=spec.on_overflow)
    return BoundariesOnly(plan, model, spec, given, args, kwargs)


class PackedCall:
    """One packed ``forward`` in progress, where the expansion is ours.

    Args:
        plan: how calls of the model run.
        model: which is called.
        spec: what it asks of this row.
        given: the arguments of ``forward``, by their names.
        args, kwargs: the same, as the caller had them.

    Attributes:
        layout: of the row; exact once its status is read.
        args, kwargs: what ``forward`` gets instead of what it was called with.
    """

    replaces_expansion = True

    # 1: begin. The row is laid out, or the layout that rides along is checked.

    def __init__(
        self,
        plan: Plan,
        model: LLaVAModel,
        spec: RowSpec,
        given: dict,
        args: tuple,
        kwargs: dict,
    ):
        self.plan, self.model, self.spec, self.given = plan, model, spec, given
        self.args, self.kwargs = list(args), dict(kwargs)
        self.num_image_embeddings = None  # that the vision model gave
        self.share = None  # of the vision tower, where it is shared over context-parallel ranks
        self.entered = False  # whether the language model got its boundaries
        self.cp_size = model.context_parallel_lm
        self.cp_rank = model.cp_group.rank() if self.cp_size > 1 else 0
        params, input_ids = given["packed_seq_params"], given.get("input_ids")
        size = getattr(params, "local_cp_size", None)
        if size not in (None, self.cp_size):
            raise PackingError(
                f"local_cp_size is {size}, but the model's context_parallel_size {self.cp_size}: "
                f"LLaVAModel cannot change it from row to row"
            )
        space = getattr(params, "space", None) or plan.space
        if input_ids is None:
            self.layout = stage_layout(params, *stage_length(model), spec, space)
        else:
            self.layout = self.lay_out(params, input_ids, space)
            if self.replaces_expansion and plan.shares_vision:
                self.share_vision()
        self.params = megatron_params(self.layout, params, plan.wants_seq_idx)
        self._read = self._start_reading()
        seen = plan.seen
        seen.in_evaluation |= not model.training
        seen.layout, seen.params, seen.input_ids = self.layout, params, input_ids
        if plan.restarts_positions and model.pre_process:
            self._pass("position_ids", self.layout.position_ids_collapsed[None])
        has_tiles = self.layout.num_images if self.share is None else self.share.tiles
        if self.layout.has_tokens and not has_tiles:
            self._add_dummy_image()
        # Where forward itself would read the boundaries, it gets none.
        self.withholds = self.replaces_expansion and plan.release.reads_boundaries
        blank = PackedSeqParams(qkv_format="thd")
        passed = blank if self.withholds else copy.copy(self.params)
        passed.packed_call = self  # a language model may be computed again, in the backward pass
        self._pass("packed_seq_params", passed)

    def lay_out(self, params, input_ids: Tensor, space: str | None) -> PackedLayout:
        """The layout of a stage with tokens."""
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise PackingError(
                f"input_ids are {list(input_ids.shape)}, expected one packed row, [1, T]: Megatron "
                f"has no batch of rows in thd format"
            )
        release, spec, riding = self.plan.release, self.spec, getattr(params, "layout", None)
        if riding is not None and riding.has_tokens and not self.model.add_encoder:
            # It may count what this stage cannot.
            counts, known = riding.cu_image_embeddings.diff().long(), riding.num_image_embeddings
        else:
            counts, known = tokens_per_image(self.model, release, self.given)
            if riding is not None and self.replaces_expansion and self.plan.shares_vision:
                known = riding.num_image_embeddings  # images may hold this rank's tiles only
        token = self.given.get("image_token_index")
        if counts.numel() == 0 and release is not None and release.keeps_text_rows:
            token = NO_IMAGE  # placeholders are text in such a row
        if token not in (None, spec.image_token_id):
            spec = dataclasses.replace(spec, image_token_id=token)
        if space is None and riding is None:
            raise _nobody_said(input_ids, params, counts, spec)
        return laid_out(params, input_ids, counts, spec, space=space, num_image_embeddings=known)

    def share_vision(self) -> None:
        """Hand ``forward`` the tiles of this rank."""
        model, release = self.model, self.plan.release
        self.layout, self.share, narrowed = share_of(model, release, self.layout, self.given)
        self.given |= narrowed
        for name, value in narrowed.items():
            self._pass(name, value)

    def _pass(self, name: str, value) -> None:
        """Another value for an argument of ``forward``, where the caller had it."""
        names = self.plan.parameters
        place = names.index(name) if name in names else len(self.args)
        if place < len(self.args):
            self.args[place] = value
        else:
            self.kwargs[name] = value

    def _add_dummy_image(self) -> None:
        images = self.given.get("images")
        if _infers(self.given) or (images is not None and images.numel()):
            return
        dummy = dummy_image(self.model, self.replaces_expansion)
        if dummy is not None:
            self._pass("images", dummy)

    # 2: in place of _preprocess_data.

    def preprocess(self, own, args: tuple, kwargs: dict):
        """Embeddings, labels and loss mask of this rank's positions."""
        layout, model, release = self.layout, self.model, self.plan.release
        if not layout.has_tokens:
            return own(*args, **kwargs)
        given = dict(zip(self.plan.preprocess_parameters, args, strict=False)) | kwargs
        sound = given.get("sound_embeddings")
        if sound is not None and sound.numel():
            raise PackingError(
                f"sound_clips were [1, 1], which stands for no sound, but gave "
                f"{list(sound.shape)} embeddings; pass sound_clips=None where there is none"
            )
        labels = loss_mask = embeddings = None
        if model.post_process and given["labels"] is not None:
            labels, loss_mask = given["labels"], given["loss_mask"]
        tokens = expand_tokens(layout, labels, loss_mask, self.cp_size, self.cp_rank)
        if model.pre_process:
            text, images = given["language_embeddings"][0], given["image_embeddings"]
            embeddings = self._fill(text, images, tokens.source)[:, None]
            if model.sequence_parallel_lm:
                embeddings = scatter_to_sequence_parallel_region(embeddings)
        expanded = (
            embeddings,
            None if labels is None else tokens.labels[None],
            None if loss_mask is None else tokens.loss_mask[None],
        )
        if not release.returns_ids:
            return expanded
        position_ids = None if given.get("position_ids") is None else tokens.position_ids[None]
        return *expanded, tokens.token_ids[None], position_ids

    def _fill(self, text: Tensor, images: Tensor | None, source: Tensor) -> Tensor:
        if images is not None and images.numel() == 0:
            images = None
        if self.share is not None:
            return self.share.fill(text, images, source)
        dummy, tiles = None, self.given.get("num_image_tiles")
        if images is not None and images.shape[1] == 1 and tiles is not None and not tiles.numel():
            dummy, images = images, None
        self.num_image_embeddings = 0 if images is None else images.shape[:2].numel()
        embeddings = fill(self.layout, text, images, source, self.cp_size, self.cp_rank)
        return embeddings if dummy is None else KeepInGraph.apply(embeddings, dummy)

    def split_over_ranks(self, own, args: tuple, kwargs: dict):
        """In place of ``_process_embedding_token_parallel``: they are this rank's already."""
        return (*args, *kwargs.values())

    # 3: right before the language model, with the vision model queued on the GPU.

    def enter_language_model(self, language_model, kwargs: dict) -> dict:
        """Give the language model its boundaries, and its routers the padding."""
        self.read()
        self.entered = True
        kwargs = {**kwargs, "packed_seq_params": self.params}
        if self.plan.masks_padding:
            kwargs["padding_mask"] = self.padding_mask(language_model)
        return kwargs

    def padding_mask(self, language_model) -> Tensor | None:
        """bool ``[1, positions of this rank]``, True for padding."""
        layout, mask = self.layout, self.layout.padding_mask
        if self.cp_size > 1:
            mask = mask[
                local_positions(
                    layout.cu_seqlens_padded, layout.num_expanded, self.cp_size, self.cp_rank
                )
            ]
        if language_model.config.sequence_parallel:
            group = language_model.tp_group
            mask = mask.chunk(group.size())[group.rank()]
        return mask[None]

    def _start_reading(self):
        """Queue what only the GPU knows: one copy, one wait. Gives None where there is nothing."""
        layout, mask, queued = self.layout, self.given.get("loss_mask"), {}
        if not layout.is_exact:
            queued["status"] = layout.status
        if mask is not None and layout.may_be_cut:
            queued["lost"] = count_lost(layout, mask).reshape(1)
        if layout.tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            self._assert_on_gpu(queued)
            return None
        is_half = mask is not None and mask.dtype in (torch.float16, torch.bfloat16)
        if is_half and (queued or may_look(mask)):
            queued["rounded"] = ((mask != 0) & (mask != 1)).sum().reshape(1)
        self._queued = {name: len(words) for name, words in queued.items()}
        return read_later(torch.cat(list(queued.values()))) if queued else None

    def _assert_on_gpu(self, queued: dict[str, Tensor]) -> None:
        """While a stream captures, nothing can be read: a replay that finds a fault dies."""
        if "status" in queued:
            torch._assert_async(queued["status"][0] == 0)
        if "lost" in queued and self.plan.raises_on_overflow:
            torch._assert_async(queued["lost"][0] == 0)

    def read(self) -> None:
        """Read what was queued: raise what is wrong with the row, or make its exact boundaries."""
        if self._read is not None:
            words, self._read = iter(self._read()), None
            found = {name: list(islice(words, size)) for name, size in self._queued.items()}
            if "status" in found:
                self.layout = self.plan.seen.layout = self.layout.exact(Status(*found["status"]))
                given = self.given["packed_seq_params"]
                self.params = megatron_params(self.layout, given, self.plan.wants_seq_idx)
            if any(found.get("lost", ())):
                self._report_lost(found["lost"][0])
            if any(found.get("rounded", ())):
                raise PackingError(
                    f"loss_mask holds weights, and came in {self.given['loss_mask'].dtype}, which "
                    f"rounds them: Float16Module casts what is passed by position; pass loss_mask= "
                    f"by keyword"
                )
        found, expected = self.num_image_embeddings, self.layout.num_image_embeddings
        if None not in (found, expected) and found != expected:
            raise PlaceholderMismatch(
                actual=found,
                expected=expected,
                message=f"images hold {found} embeddings, but the placeholders become {expected}",
            )

    def _report_lost(self, lost: int) -> None:
        message = f"{lost} trained tokens do not fit the row of {self.layout.num_expanded}"
        if self.plan.raises_on_overflow:
            raise PackingError(
                f"{message}; pack rows that fit with their padding, mask the loss of what may go, "
                f"or have it cut off and counted with on_overflow='truncate'"
            )
        logger.warning("%s and were cut off (on_overflow='truncate')", message)

    # 4: end. A language model that was compiled before the hook came never entered.

    def end(self) -> None:
        """Read what nobody has read yet."""
        self.args = self.kwargs = None  # what was passed knows this call: no circle keeps tensors
        if self.entered:
            return
        self.read()
        if self.withholds:
            raise PackingError(
                "the language model ran without its boundaries: it was compiled before the hook "
                "was installed; call mp.install first"
            )


class Current(threading.local):
    """The packed call in progress, in each thread its own."""

    call: PackedCall | None = None

    @torch.compiler.disable
    def enter_language_model(self, language_model, args: tuple, kwargs: dict):
        """The forward pre-hook of a language model."""
        call = getattr(kwargs.get("packed_seq_params"), "packed_call", self.call)
        if call is None:
            return None
        return args, call.enter_language_model(language_model, kwargs)


class BoundariesOnly(PackedCall):
    """One packed ``forward`` whose expansion is not ours: only its boundaries are moved.

    Nothing is checked later: its layout is exact before ``forward`` begins, which costs waits.
    """

    replaces_expansion = False

    def lay_out(self, params, input_ids: Tensor, space: str | None) -> PackedLayout:
        self.spec = self._spec_of_row(input_ids)
        layout = super().lay_out(params, input_ids, space)
        layout = layout if layout.is_exact else layout.exact_later()()
        self._check_length(layout)
        return layout

    def _spec_of_row(self, input_ids: Tensor) -> RowSpec:
        """Where Megatron keeps a row without images as it is, it neither pads nor cuts it."""
        spec, release = self.spec, self.plan.release
        if release is None or not release.keeps_text_rows:
            return spec
        if tokens_per_image(self.model, release, self.given)[0].numel():
            return spec
        if spec.fixed_length not in (None, input_ids.numel()):
            raise PackingError(
                f"this row has no images, and Megatron's own expansion, the one of this call, "
                f"leaves it as long as it is: {input_ids.numel()} positions, where the pipeline "
                f"expects {spec.fixed_length}; pad it to that"
            )
        return dataclasses.replace(spec, max_length=None, fixed_length=None)

    def _check_length(self, layout: PackedLayout) -> None:
        """Megatron's own expansion pads no sequence, and a row only as its spec says; neither
        attention nor TE's partition would complain."""
        lengths = layout.cu_seqlens_padded.diff()
        padded = layout.spec.seq_multiple > 1
        if padded and bool((lengths[:-1] != layout.cu_seqlens_expanded.diff()).any()):
            raise PackingError(
                f"the layout pads sequences to multiples of {layout.spec.seq_multiple}, which "
                f"Megatron's own expansion, the one of this call, does not"
            )
        multiple = sequences_must_divide_by(self.model)
        wrong = lengths % multiple != 0
        if multiple > 1 and bool(wrong.any()):
            seq = int(wrong.nonzero()[0])
            raise PackingError(
                f"sequence {seq}: {int(lengths[seq])} positions, expected a multiple of "
                f"2 * cp_size = {multiple}; Megatron's own expansion, the one of this call, pads "
                f"no sequence"
            )
        length = self.spec.fixed_length
        if length is None:
            length = layout.num_collapsed - layout.num_images + layout.num_image_embeddings
            length = round_up(length, self.spec.total_multiple)
            if self.spec.max_length is not None:
                length = min(length, self.spec.max_length)
        if layout.num_expanded != length:
            raise PackingError(
                f"the layout has {layout.num_expanded} positions, but Megatron's own expansion, "
                f"the one of this call, makes {length}"
            )

    def preprocess(self, own, args: tuple, kwargs: dict):
        return own(*args, **kwargs)

    def split_over_ranks(self, own, args: tuple, kwargs: dict):
        return own(*args, **kwargs)

    def padding_mask(self, language_model) -> None:
        return None


# What a call is about


def _has_boundaries(model: LLaVAModel, given: dict) -> bool:
    """Whether the call is one of a packed row."""
    params = given.get("packed_seq_params")
    is_thd = params is not None and params.qkv_format == "thd"
    return is_thd and model.add_decoder and isinstance(given.get("input_ids"), Tensor | None)


def _check_may_be_missing(plan: Plan, model: LLaVAModel, given: dict) -> None:
    """Refuse a call without boundaries, where it should have some."""
    has_lists = not isinstance(given.get("input_ids"), Tensor | None)
    passes = not model.add_decoder or has_lists or _infers(given)
    if passes or not plan.raises_if_missing or getattr(plan.unpacked, "depth", 0):
        return
    if not model.training and not plan.seen.in_evaluation:
        _warn_once(
            "a call in evaluation mode got no packed_seq_params in thd format: every row runs as "
            "one sequence. If evaluation packs rows, hand every stage their boundaries"
        )
        return
    params = given.get("packed_seq_params")
    found = "none" if params is None else f"qkv_format {params.qkv_format!r}"
    raise PackingError(
        f"this stage got no packed_seq_params in thd format ({found}), so packed samples would "
        f"leak into each other; hand every pipeline stage the boundaries of its micro-batch, or "
        f"say that they are not packed: with mp.unpacked(model)"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"mcore_packing: {message}", stacklevel=6)


def _infers(given: dict) -> bool:
    return any(given.get(name) is not None for name in ("inference_context", "inference_params"))


def _keeps_megatrons_expansion(given: dict) -> bool:
    """Whether it is a call of inference, or with sounds. Data paths send ``[1, 1]`` zeros where
    there are none."""
    clips = given.get("sound_clips")
    hears = isinstance(clips, Tensor) and clips.numel() > 0 and clips.shape != (1, 1)
    return hears or _infers(given)


def _nobody_said(input_ids, params, counts, spec: RowSpec) -> PackingError:
    """The error for boundaries of which nobody said what they count."""
    try:
        check_keys(params)
        edges = physical_boundaries(params)
        found = find_space(input_ids, edges, counts, spec.image_token_id, max_length=spec.longest)
        by_values = f"by their values they are {found}"
        if found is None:
            by_values = "by their values they could be either, or the row has another fault"
    except BoundarySpaceError as error:
        by_values = str(error)
    except PackingError as error:
        return error
    return BoundarySpaceError(
        f"this row came without its layout, and nobody said what its boundaries count: {by_values} "
        f"(mp.find_space). Say it for the whole data path, mp.install(model, space=...), or send "
        f"the layout along, mp.packed_seq_params(layout)"
    )
