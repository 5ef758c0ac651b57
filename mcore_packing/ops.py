"""Schema, fake, dispatch and gradient of every op.

The dispatcher chooses: ``reference`` and ``copies`` on a CPU, the Triton kernels on a GPU. Nothing
here looks at a value, so every op traces, compiles and captures.
"""

import importlib

import torch
from torch.autograd.function import once_differentiable

from . import copies, reference
from .reference import parts_of


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
    sizes = cu_seqlens.numel() - 1, input_ids.numel(), tokens_per_image.numel()
    parts = parts_of.__wrapped__(*sizes)  # symbolic sizes have no hash
    return cu_seqlens.new_empty(parts["end"][0])


layout = _define(
    "layout",
    "(Tensor input_ids, Tensor cu_seqlens, Tensor? cu_seqlens_padded, Tensor tokens_per_image, "
    "int image_token_id, bool expanded, SymInt num_image_embeddings, SymInt cut_at, "
    "SymInt num_positions, SymInt seq_multiple, bool truncate) -> Tensor",
    _fake_layout,
    reference.layout,
)


def _fake_expand_tokens(layout, labels, loss_mask, *rest):
    size = rest[4] // rest[5]  # num_positions // cp_size
    of_none = layout.new_empty(0, dtype=torch.int64)
    return (
        layout.new_empty(size),
        layout.new_empty(size, dtype=torch.int64),
        layout.new_empty(size, dtype=torch.int64),
        of_none if labels is None else labels.new_empty(size),
        of_none.clone() if loss_mask is None else loss_mask.new_empty(size),
    )


expand_tokens = _define(
    "expand_tokens",
    "(Tensor layout, Tensor? labels, Tensor? loss_mask, SymInt num_tokens, SymInt num_images, "
    "SymInt num_seqs, int image_token_id, SymInt num_positions, int cp_size, int cp_rank) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_expand_tokens,
    reference.expand_tokens,
)

source_positions = _define(
    "source_positions",
    "(Tensor layout, SymInt num_tokens, SymInt num_images, SymInt num_seqs, "
    "SymInt num_image_embeddings, int cp_size, int cp_rank) -> (Tensor, Tensor)",
    lambda layout, *rest: (layout.new_empty(rest[0]), layout.new_empty(rest[3])),
    reference.source_positions,
)

expand_embeddings = _define(
    "expand_embeddings",
    "(Tensor text, Tensor? images, Tensor source, Tensor? text_position=None, "
    "Tensor? image_position=None) -> Tensor",
    lambda text, images, source, *_: text.new_empty(source.numel(), text.shape[1]),
    copies.expand_embeddings,
    "copy_vectors",
)

collect_gradients = _define(
    "collect_gradients",
    "(Tensor grad, Tensor index, SymInt length, SymInt tiles) -> Tensor",
    lambda grad, index, length, tiles: grad.new_empty(length, tiles, grad.shape[1]),
    copies.collect_gradients,
    "copy_vectors",
)


class _ExpandEmbeddings(torch.autograd.Function):
    """Vectors are copied at most once each, so the gradient of one is a copy too: no atomics."""

    @staticmethod
    def forward(ctx, text, images, source, text_position=None, image_position=None):
        ctx.save_for_backward(text_position, image_position)
        ctx.num_tokens = text.shape[0]
        ctx.image_shape = (0, 0) if images is None else images.shape[:2]
        with torch._C._AutoDispatchBelowAutograd():
            return expand_embeddings(text, images, source, text_position, image_position)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        text_position, image_position = ctx.saved_tensors
        grad_text = grad_images = None
        if ctx.needs_input_grad[0]:
            grad_text = collect_gradients(grad, text_position, ctx.num_tokens, 1).squeeze(1)
        if ctx.needs_input_grad[1]:
            grad_images = collect_gradients(grad, image_position, *ctx.image_shape)
        return grad_text, grad_images, None, None, None


# At the Autograd key, so that opcheck and AOTAutograd see the gradient of the op itself.
torch.library.impl("mcore_packing::expand_embeddings", "Autograd", _ExpandEmbeddings.apply)
