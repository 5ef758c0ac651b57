"""Schema, fake, dispatch and gradient of every op.

The dispatcher chooses: ``reference`` and ``runs`` on a CPU, the Triton kernels on a GPU. Nothing
here looks at a value, so every op traces, compiles and captures.
"""

import importlib

import torch
from torch.autograd.function import once_differentiable

from . import reference, runs
from .faults import Status


def _kernel(module, name):
    """The launcher of that name in ``kernels/<module>.py``, imported when it is first needed."""

    def launch(*args):
        try:
            kernels = importlib.import_module(f"mcore_packing.kernels.{module}")
        except ImportError as error:
            if error.name != "triton":
                raise
            raise ImportError("mcore_packing needs Triton on a GPU: pip install triton") from error
        return getattr(kernels, name)(*args)

    return launch


KERNELS = {}  # {op: the file of its kernel}


def _define(name, schema, fake, on_cpu, module=None):
    qualname = f"mcore_packing::{name}"
    KERNELS[name] = module or name
    torch.library.define(qualname, schema)
    torch.library.impl(qualname, "CPU", on_cpu)
    torch.library.impl(qualname, "CUDA", _kernel(KERNELS[name], name))
    torch.library.register_fake(qualname, fake)
    return getattr(torch.ops.mcore_packing, name).default


def _fake_layout(input_ids, cu_seqlens, cu_seqlens_padded, tokens_per_image, *_):
    num_tokens, num_images = input_ids.numel(), tokens_per_image.numel()
    num_seqs = cu_seqlens.numel() - 1
    sizes = (num_tokens + 1, num_images, num_images + 1, num_seqs + 2, num_seqs + 2)
    boundaries = (num_seqs + 1, num_seqs + 1, num_seqs + 2)
    status = cu_seqlens.new_empty(len(Status._fields), dtype=torch.int64)
    return *(cu_seqlens.new_empty(size) for size in (*sizes, *boundaries)), status


layout = _define(
    "layout",
    "(Tensor input_ids, Tensor cu_seqlens, Tensor? cu_seqlens_padded, Tensor tokens_per_image, "
    "int image_token_id, bool expanded, bool strict, SymInt num_image_rows, SymInt longest_row, "
    "SymInt num_rows, SymInt seq_multiple, bool truncate) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_layout,
    reference.layout,
)


def _fake_expand_tokens(input_ids, labels, loss_mask, expanded_start, *rest):
    num_rows, cp_size = rest[5:7]
    size = num_rows // cp_size
    return (
        expanded_start.new_empty(size),
        expanded_start.new_empty(size, dtype=torch.int64),
        input_ids.new_empty(size),
        input_ids.new_empty(0) if labels is None else labels.new_empty(size),
        input_ids.new_empty(0) if loss_mask is None else loss_mask.new_empty(size),
    )


expand_tokens = _define(
    "expand_tokens",
    "(Tensor input_ids, Tensor? labels, Tensor? loss_mask, Tensor expanded_start, "
    "Tensor image_start, Tensor cu_image_rows, Tensor seq_start_expanded, "
    "Tensor cu_seqlens_padded, int image_token_id, SymInt num_rows, int cp_size, int cp_rank) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_expand_tokens,
    reference.expand_tokens,
)

source_positions = _define(
    "source_positions",
    "(Tensor expanded_start, Tensor image_start, Tensor cu_image_rows, Tensor seq_start_expanded, "
    "Tensor cu_seqlens_padded, SymInt num_image_rows, int cp_size, int cp_rank) "
    "-> (Tensor, Tensor)",
    lambda expanded_start, *rest: (
        expanded_start.new_empty(expanded_start.numel() - 1),
        expanded_start.new_empty(rest[4]),
    ),
    reference.source_positions,
)

expand_rows = _define(
    "expand_rows",
    "(Tensor text, Tensor? images, Tensor source, Tensor? text_position=None, "
    "Tensor? image_position=None) -> Tensor",
    lambda text, images, source, *_: text.new_empty(source.numel(), text.shape[1]),
    runs.expand_rows,
)

collect_rows = _define(
    "collect_rows",
    "(Tensor grad, Tensor index, SymInt length, SymInt tiles) -> Tensor",
    lambda grad, index, length, tiles: grad.new_empty(length, tiles, grad.shape[1]),
    runs.collect_rows,
    "expand_rows",
)


class _ExpandRows(torch.autograd.Function):
    """Rows are copied at most once each, so the gradient of a row is a copy too: no atomics."""

    @staticmethod
    def forward(ctx, text, images, source, text_position=None, image_position=None):
        ctx.save_for_backward(text_position, image_position)
        ctx.num_tokens = text.shape[0]
        ctx.image_shape = (0, 0) if images is None else images.shape[:2]
        with torch._C._AutoDispatchBelowAutograd():
            return expand_rows(text, images, source, text_position, image_position)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        text_position, image_position = ctx.saved_tensors
        grad_text = grad_images = None
        if ctx.needs_input_grad[0]:
            grad_text = collect_rows(grad, text_position, ctx.num_tokens, 1).squeeze(1)
        if ctx.needs_input_grad[1]:
            grad_images = collect_rows(grad, image_position, *ctx.image_shape)
        return grad_text, grad_images, None, None, None


# At the Autograd key, so that opcheck and AOTAutograd see the gradient of the op itself.
torch.library.impl("mcore_packing::expand_rows", "Autograd", _ExpandRows.apply)
