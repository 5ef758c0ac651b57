"""Models that are broken on purpose: what a check of packed rows has to find.

Each function breaks a small ``LLaVAModel`` in place, with hooks of torch's around real modules of
Megatron's; ``LAST`` names the one sequence of a row that some of them hit.
"""

import dataclasses
from collections.abc import Callable

import torch
from megatron.core import parallel_state

# Of the row that the checks are shown.
AT_IMAGE = 1  # a sequence that begins with an image
UNTRAINED = 3  # the first of two sequences without trained tokens


def deaf(model) -> None:
    """Attention ignores boundaries altogether."""
    _edit_boundaries(model, lambda inner: [])


def deaf_in_one_layer(model) -> None:
    """So does that of the last layer only."""
    _edit_boundaries(model, lambda inner: [], layers=slice(-1, None))


def one_late(model) -> None:
    """Every boundary is one position late."""
    _edit_boundaries(model, lambda inner: [edge + 1 for edge in inner])


def one_early(model) -> None:
    """Every boundary is one position early."""
    _edit_boundaries(model, lambda inner: [edge - 1 for edge in inner])


def last_one_late(model) -> None:
    """Only the last boundary is one position late."""
    _edit_boundaries(model, lambda inner: [*inner[:-1], inner[-1] + 1])


def late_at_an_image(model) -> None:
    """The boundary before a sample that begins with an image is one position late."""
    _shift_one(model, AT_IMAGE)


def late_where_nothing_is_trained(model) -> None:
    """The boundary between two samples without trained tokens is one position late."""
    _shift_one(model, UNTRAINED + 1)


def positions_run_on(model) -> None:
    """Position ids count the whole row, for ``learned_absolute`` embeddings."""

    def run_on(module, args, kwargs):
        ids = kwargs["position_ids"]
        return args, {**kwargs, "position_ids": torch.arange(ids.shape[1])[None].to(ids)}

    embedding = model.language_model.embedding
    embedding.register_forward_pre_hook(run_on, with_kwargs=True)


def tower_mixes_tiles(model) -> None:
    """The vision tower adds a tenth of the mean of all tiles to each."""
    model.vision_model.register_forward_hook(lambda module, args, out: out + out.mean(0) / 10)


def tiles_swapped(model) -> None:
    """The first and the last tile of a row change places."""

    def swap(module, args):
        order = torch.arange(len(args[0]))
        order[[0, -1]] = order[[-1, 0]]
        return (args[0][order], *args[1:])

    model.vision_model.register_forward_pre_hook(swap)


def one_rank_is_deaf(model) -> None:
    """On the last context-parallel rank attention ignores boundaries."""
    if (
        parallel_state.get_context_parallel_rank()
        == parallel_state.get_context_parallel_world_size() - 1
    ):
        deaf(model)


EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "add_bias_linear": False,
}
# Experts that drop tokens, by how many a whole row has: a model that is broken by its config.
DROPPING_EXPERTS = {**EXPERTS, "moe_expert_capacity_factor": 1.0}


def _shift_one(model, sequence: int) -> None:
    def shift(inner):
        return [*inner[: sequence - 1], inner[sequence - 1] + 1, *inner[sequence:]]

    _edit_boundaries(model, shift, at_least=sequence)


def _edit_boundaries(
    model, edit: Callable[[list[int]], list[int]], layers: slice = slice(None), at_least: int = 1
) -> None:
    """Give attention other boundaries.

    Args:
        model: a ``LLaVAModel``.
        edit: of those between sequences.
        layers: of the language model.
        at_least: rows with fewer such boundaries, samples alone among them, are left as they are.
    """

    def attend(module, args, kwargs):
        params = kwargs["packed_seq_params"]
        if params is None:
            return None
        padded = params.cu_seqlens_q_padded
        given = params.cu_seqlens_q if padded is None else padded
        edges = sorted({*given.tolist()})
        if len(edges) - 2 < at_least:
            return None
        made = given.new_tensor([edges[0], *edit(edges[1:-1]), edges[-1]])
        names = "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"
        params = dataclasses.replace(params, **dict.fromkeys(names, made))
        return args, {**kwargs, "packed_seq_params": params}

    for layer in model.language_model.decoder.layers[layers]:
        attention = layer.self_attention.core_attention
        attention.register_forward_pre_hook(attend, with_kwargs=True)
