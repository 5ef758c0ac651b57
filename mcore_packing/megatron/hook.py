"""``install``: the hook in front of a ``LLaVAModel``, by a class that takes the place of its
own."""

import contextlib
import functools
import warnings
import weakref
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core.models.multimodal.llava_model import LLaVAModel

from ..errors import PackingError
from ..inputs import refuse_old
from .call import Current, packed_call
from .find import HOOK, find_llavas, hook_of
from .params import check_boundaries
from .plan import Plan
from .ranks import compare, fingerprint, shares_rows

_RENAMED = {
    "fused": "the expansion is replaced wherever it is Megatron's own",
    "strict": "a space that is said is taken at its word",
    "capacity": "pass max_sequences=",
    "pad_between_seqs": "the caller's own parameters say it, see mp.packed_seq_params",
}


def install(
    model,
    space: str | None = None,
    on_missing: str = "raise",
    on_overflow: str = "raise",
    max_sequences: int | None = None,
    vision_dp_over_cp: bool = False,
    compare_ranks: bool = True,
    **old: NoReturn,
) -> "Installation":
    """Make packed rows correct in a ``LLaVAModel``, by a hook around its ``forward``.

    Whenever ``forward`` gets ``thd`` boundaries, they are moved to expanded space before anything
    reads them, and the expansion itself is two kernels, without a host synchronisation, whose
    labels never cross a boundary; for ``learned_absolute`` position embeddings the position ids are
    restarted at every sequence. Parameters that came with their layout (``mp.packed_seq_params``)
    are used as they are. Calls in another format, or with lists of tokens (inference), pass through
    untouched. Where the expansion is not Megatron's own, or of no known release, and for inference
    and sounds, it is left alone: only boundaries are moved.

    Args:
        model: a ``LLaVAModel``, any wrapper around one (``Float16Module``, DDP, FSDP), or a list of
            pipeline chunks.
        space: what boundaries without a layout count: "collapsed" tokens, or "expanded" positions
            (as Megatron's Energon loader makes them). None takes only rows that bring their layout,
            or a ``space`` of their own (``LaidOutParams``).
        on_missing: "raise" makes a call without ``thd`` boundaries an error in training mode, on
            every stage; in evaluation mode such a call passes, with one warning, unless evaluation
            had packed calls before. "pass" lets all of them through. Inference passes, and so does
            what runs inside ``mp.unpacked(model)``.
        on_overflow: "raise" makes it an error if the row is longer than the language model's
            maximum, with the padding that parallelism asks for, and a sequence or a trained token
            would be lost; "truncate" cuts it off, as Megatron does, and logs how many trained
            tokens went.
        max_sequences: how many sequences attention gets of every row, the tail included, where
            layers are captured as CUDA graphs: boundaries of one length for all rows.
        vision_dp_over_cp: share the vision tower over context-parallel ranks: every tile is encoded
            once, mostly where it is used (``mp.vision.shares``). Without context parallelism it
            does nothing.
        compare_ranks: the first packed call in training, and the first in evaluation, compare 16
            bytes over the tensor- and context-parallel ranks of a row: all were given the same one.

    Returns:
        A handle: ``check()`` raises what the last row had wrong, ``remove()`` restores the model.
        Also a context manager.

    Raises:
        PackingError: no ``LLaVAModel`` in there, installed twice, a ``forward`` without
            ``packed_seq_params``, a language model that drops its boundaries (hybrids before
            Megatron-Core 0.16), captured layers without ``max_sequences``, or a vision tower that
            cannot be shared: with tile tags, captured, or of an expansion that is left alone.

    Source:
        ``LLaVAModel.forward`` of Megatron-Core 0.12.3 to main.
    """
    refuse_old("mp.install", old, _RENAMED)
    if space == "auto":
        raise PackingError(
            "space='auto' is no more: say what boundaries count, which mp.find_space tells of a row"
        )
    models = find_llavas(model)
    if len(set(map(id, models))) < len(models):
        raise PackingError("the same LLaVAModel is in the list twice")
    if any(hook_of(llava) is not None for llava in models):
        raise PackingError("mcore_packing is installed on this model already; remove() it first")
    options = space, on_missing, on_overflow, max_sequences, vision_dp_over_cp, compare_ranks
    plans = [Plan(llava, *options) for llava in models]
    for llava, plan in zip(models, plans, strict=True):
        if plan.why_kept is not None:
            warnings.warn(
                f"mcore_packing: {plan.why_kept}; boundaries are moved, the expansion is left "
                f"alone",
                stacklevel=2,
            )
        Hook(plan).install(llava)
    if not all(getattr(llava.config, "calculate_per_token_loss", True) for llava in models):
        _warn_of_unlike_rows()
    return Installation(models)


@functools.cache
def _warn_of_unlike_rows() -> None:
    """Once, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(
            "mcore_packing: calculate_per_token_loss is off, so Megatron averages each micro-batch "
            "by itself, and a token weighs more in a row that trains few. Turn it on to weigh all "
            "trained tokens alike",
            stacklevel=3,
        )


class Installation:
    """What ``install`` returns: the hook of every pipeline chunk. It does not keep models alive."""

    def __init__(self, models: list[LLaVAModel]):
        self._models = [weakref.ref(model) for model in models]

    def _live(self) -> list[LLaVAModel]:
        if not self._models:
            raise PackingError("the hook was removed before")
        models = [model for ref in self._models if (model := ref()) is not None]
        if not models:
            raise PackingError("the model is gone")
        return models

    def compare_ranks(self) -> None:
        """Compare the last packed row of every chunk over the ranks that share it.

        A collective of all of them, with a wait for the GPU.

        Raises:
            PackingError: they were given different rows, or one has had none; names the ranks.
        """
        for model in self._live():
            seen = hook_of(model).plan.seen
            if shares_rows():
                mine = None if seen.layout is None else fingerprint(seen.layout, seen.input_ids)
                compare(mine, model)

    def check(self) -> None:
        """Raise what is wrong with the last packed row of any chunk (synchronises on a GPU).

        It looks at this rank alone; ``compare_ranks`` is the collective.
        """
        for model in self._live():
            seen = hook_of(model).plan.seen
            if seen.layout is None:
                continue
            seen.layout.check()
            if getattr(seen.params, "layout", None) is not None:
                check_boundaries(seen.layout, seen.params, looks=True)
            ids = seen.input_ids
            if ids is not None and not torch.equal(seen.layout.input_ids, ids.reshape(-1).int()):
                raise PackingError(
                    "the layout that came with the last row was made of other input_ids"
                )

    def remove(self) -> None:
        """Restore the model exactly.

        Raises:
            PackingError: it was removed before, or someone else changed the model's class or
                ``forward`` since.
        """
        models = self._live()
        for model in models:
            hook_of(model).check_removable(model)
        for model in models:
            hook_of(model).remove(model)
        self._models = []

    def __repr__(self) -> str:
        models = [model for ref in self._models if (model := ref()) is not None]
        plans = [hook.plan for model in models if (hook := hook_of(model)) is not None]
        if not plans:
            return f"Installation({'the model is gone' if self._models else 'removed'})"
        plan, name = plans[0], type(models[0]).__name__
        what = name if len(plans) == 1 else f"{len(plans)} chunks of {name}"
        kept = next((one.why_kept for one in plans if one.why_kept is not None), None)
        expansion = "replaced" if kept is None else f"left alone, since {kept}"
        return (
            f"Installation({what}, space={plan.space!r}, "
            f"on_missing={'raise' if plan.raises_if_missing else 'pass'!r}, "
            f"on_overflow={plan.spec_of_calls.on_overflow!r}, expansion {expansion})"
        )

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *exception) -> None:
        if self._models:
            self.remove()


class Hook:
    """The hook on one model: the class in front, the call in progress, and how to undo it.

    Args:
        plan: how packed calls of the model run.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.class_before = self.forward_before = self.pre_hook = None
        self.current = Current()

    def install(self, model: LLaVAModel) -> None:
        """Put the class with the hook in place of the model's own."""
        self.class_before = type(model)
        self.forward_before = vars(model).pop("forward", None)  # someone's own wrapper
        setattr(model, HOOK, self)
        model.__class__ = _with_hook(self.class_before)
        language_model = getattr(model, "language_model", None)
        if language_model is not None:
            self.pre_hook = language_model.register_forward_pre_hook(
                self.current.enter_language_model, prepend=True, with_kwargs=True
            )

    def check_removable(self, model: LLaVAModel) -> None:
        """Refuse to undo what others have changed since."""
        if "forward" in vars(model):
            raise PackingError("someone replaced forward of the model since; remove that first")
        if type(model) is not _with_hook(self.class_before):
            raise PackingError(
                f"someone made the model a {type(model).__name__} since; remove that first"
            )

    def remove(self, model: LLaVAModel) -> None:
        """Undo ``install``."""
        model.__class__ = self.class_before
        delattr(model, HOOK)
        if self.forward_before is not None:
            model.forward = self.forward_before
        if self.pre_hook is not None:
            self.pre_hook.remove()
        self.class_before = None


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
            own = hook.forward_before or super().forward
            if hook.class_before is None:
                raise PackingError(
                    "the hook was removed from the model that this one is a shallow copy of"
                )
            call = packed_call(hook.plan, self, args, kwargs)
            if call is None:
                return own(*args, **kwargs)
            before, hook.current.call = hook.current.call, call
            try:
                outputs = own(*call.args, **call.kwargs)
            finally:
                hook.current.call = before
            call.end()
            return outputs

        @functools.wraps(model_class._preprocess_data)
        def _preprocess_data(self, *args, **kwargs):
            own, call = super()._preprocess_data, self._packing_hook.current.call
            return own(*args, **kwargs) if call is None else call.preprocess(own, args, kwargs)

        @functools.wraps(model_class._process_embedding_token_parallel)
        def _process_embedding_token_parallel(self, *args, **kwargs):
            own = super()._process_embedding_token_parallel
            call = self._packing_hook.current.call
            if call is None:
                return own(*args, **kwargs)
            return call.split_over_ranks(own, args, kwargs)

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
    """Lets calls without boundaries pass, in this thread, whatever ``on_missing`` says.

    Args:
        model: as ``install`` takes it, installed or not.

    Example:
        .. code-block:: python

            with mp.unpacked(model), torch.no_grad():
                loss, loss_mask = model(**one_sample)
    """
    hooks = [hook for llava in find_llavas(model) if (hook := hook_of(llava)) is not None]
    depths = [hook.plan.unpacked for hook in hooks]
    for local in depths:
        local.depth = getattr(local, "depth", 0) + 1
    try:
        yield
    finally:
        for local in depths:
            local.depth -= 1
