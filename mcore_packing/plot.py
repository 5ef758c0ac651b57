"""Pictures: one packed row in both spaces, where packed differs from one by one, and learning."""

import itertools
from itertools import pairwise

import matplotlib
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from .context_parallel import cp_partition
from .expand import expand_tokens
from .layout import PackedLayout
from .parity import Comparison
from .reference import FIRST_IMAGE, PAD

SEQUENCE_COLOURS = plt.get_cmap("tab10").colors
TAIL_COLOUR = "0.9"
WRONG, RIGHT = "#d62728", "black"
SMALLEST = 1e-8  # where a log axis ends; equal tokens are drawn there
RUN_STYLES = (  # lines that coincide stay visible
    {"color": "#1f77b4", "linewidth": 5},
    {"color": "black", "linewidth": 1.5, "linestyle": "dashed"},
    {"color": WRONG, "linewidth": 2},
    {"color": "#2ca02c", "linewidth": 1.5, "linestyle": "dotted"},
)
MOST_LABELS = 20  # more images than this would hide each other's numbers
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
IMAGE_WIDTH = 20  # in text tokens: true to scale, images would leave no room for text


def draw_row(layout: PackedLayout, path) -> None:
    """One packed row, collapsed above and expanded below: sequences as colours, images hatched and
    numbered, what no sequence owns in grey.

    Args:
        layout: of the row, on the CPU.
        path: of the picture.
    """
    given = layout.cu_seqlens_collapsed.tolist()
    edges = layout.cu_seqlens_padded.tolist()
    figure, (before, after) = plt.subplots(2, 1, figsize=(12, 4.8), layout="constrained")
    tokens = layout.is_placeholder.nonzero().flatten().tolist()
    real = (layout.cu_seqlens_padded[:-2] + layout.cu_seqlens_expanded.diff()).tolist()
    _draw_bar(before, layout.seq_start_collapsed.tolist(), [(t, t + 1) for t in tokens])
    _draw_bar(after, edges, _image_spans(layout), real)
    _draw_boundaries(before, given, RIGHT, "solid")
    _draw_boundaries(after, edges[: len(given)], RIGHT, "solid")
    _draw_boundaries(after, sorted({*given} - {*edges}), WRONG, "dashed")
    before.set_title(
        f"Before the model: {layout.num_collapsed} tokens, one placeholder per image.  "
        f"cu_seqlens = {_short(given)}",
        loc="left",
    )
    after.set_title(
        f"In the model: {layout.num_expanded} positions, every image expanded.  "
        f"cu_seqlens must be {_short(edges[: len(given)])}",
        loc="left",
    )
    handles = [
        Patch(facecolor=SEQUENCE_COLOURS[0], label="a sequence"),
        Patch(facecolor="white", edgecolor="0.2", hatch="////", label="an image"),
        plt.Line2D([], [], color=RIGHT, linewidth=2.5, label="boundaries that hold here"),
        plt.Line2D([], [], color=WRONG, linewidth=2.5, linestyle="dashed",
                   label="the collapsed ones, if nobody moves them"),
    ]  # fmt: skip
    if edges[-1] > edges[-2] or real != edges[1:-1]:
        handles.insert(
            2, Patch(facecolor=TAIL_COLOUR, label="padding, or behind the last sequence")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_shares(layout: PackedLayout, path) -> None:
    """One row under context parallelism: which rank owns which position, which encodes which tile,
    and the embeddings that travel.

    Args:
        layout: of the row, on the CPU, with its shares.
        path: of the picture.
    """
    shares = layout.shares
    owner = torch.empty(layout.num_expanded, dtype=torch.int64)
    encoder, tile_of = torch.full_like(owner, -1), torch.full_like(owner, -1)
    for rank in range(shares.cp_size):
        owner[cp_partition(layout.cu_seqlens_padded, len(owner), shares.cp_size, rank)] = rank
    source = expand_tokens(layout).source.long()
    at = (source < PAD).nonzero().squeeze(1)
    embedding = FIRST_IMAGE - source[at]
    tile_of[at] = torch.searchsorted(shares.cu_tile_embeddings, embedding.int(), right=True) - 1
    encoder[at] = shares.encoder.long()[tile_of[at]]
    figure, (owns, encodes) = plt.subplots(2, 1, figsize=(12, 4.2), layout="constrained")
    for begin, end in _runs(owner):
        owns.axvspan(begin, end, facecolor=SEQUENCE_COLOURS[int(owner[begin])], linewidth=0)
        owns.text((begin + end) / 2, 0.5, int(owner[begin]), ha="center", va="center", fontsize=9)
    for begin, end in _runs(tile_of):
        if tile_of[begin] < 0:
            continue
        colour = SEQUENCE_COLOURS[int(encoder[begin])]
        encodes.axvspan(begin, end, facecolor=colour, edgecolor="white", linewidth=1)
        travels = owner[begin:end] != encoder[begin]
        for left, right in _runs(travels.long()):
            if travels[left]:
                encodes.axvspan(begin + left, begin + right, facecolor="none", edgecolor="black",
                                hatch="////", linewidth=0)  # fmt: skip
        encodes.text((begin + end) / 2, 0.5, f"tile {int(tile_of[begin])}", rotation=90,
                     ha="center", va="center", fontsize=8, bbox=LABEL_BOX)  # fmt: skip
    edges = layout.cu_seqlens_padded.tolist()
    for axis in owns, encodes:
        axis.vlines(edges, 0, 1, RIGHT, linewidth=2.5, clip_on=False)
        axis.set_xlim(0, len(owner))
        axis.set_ylim(0, 1)
        axis.set_yticks([])
        for side in ("left", "right", "top"):
            axis.spines[side].set_visible(False)
    total, stays = int(shares.counts.sum()), int(shares.counts.diagonal().sum())
    owns.set_title(
        f"Which rank owns which of {len(owner)} positions: of every sequence the r-th chunk from "
        f"either end",
        loc="left",
    )
    encodes.set_title(
        f"Which rank encodes which of {shares.num_tiles} tiles: {total - stays} of {total} "
        f"embeddings travel",
        loc="left",
    )
    handles = [
        Patch(facecolor=SEQUENCE_COLOURS[rank], label=f"rank {rank}")
        for rank in range(shares.cp_size)
    ]
    handles += [
        Patch(facecolor="white", edgecolor="black", hatch="////", label="goes to the owner above"),
        plt.Line2D([], [], color=RIGHT, linewidth=2.5, label="boundaries of sequences"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _runs(values: torch.Tensor) -> list[tuple[int, int]]:
    """``(begin, end)`` of every run of equal values."""
    cuts = (values.diff() != 0).nonzero().squeeze(1) + 1
    return list(pairwise([0, *cuts.tolist(), len(values)]))


def draw_parity(results: dict[str, Comparison], attention: str, path) -> None:
    """Per token, how far packed and one by one disagree, in one panel for each way to pack.

    Args:
        results: by what was done with the boundaries; all of the same samples.
        attention: that the model has, in words.
        path: of the picture.
    """
    layout = next(iter(results.values())).layout
    spans = _image_spans(layout)
    width = torch.ones(layout.num_expanded, dtype=torch.float64)
    for begin, end in spans:
        width[begin:end] = IMAGE_WIDTH / (end - begin)
    x = torch.cat([width.new_zeros(1), width.cumsum(0)])
    edges = layout.cu_seqlens_expanded.long()
    figure, axes = plt.subplots(
        len(results), 1, figsize=(12, 1 + 1.9 * len(results)), sharex=True, sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, (name, result) in zip(axes[:, 0], results.items(), strict=True):
        for begin, end in spans:
            axis.axvspan(x[begin], x[end], facecolor="0.93", edgecolor="0.75", hatch="////", lw=0)
        for edge in x[edges]:
            axis.axvline(edge, color="black", linewidth=1.2)
        trained = result.compared.nonzero().squeeze(1)
        height = result.differences[trained].clamp(min=SMALLEST)
        colour = WRONG if result.max_difference > 1e-3 else "#1f77b4"
        axis.scatter(x[trained] + 0.5, height, s=9, color=colour, zorder=3, clip_on=False)
        axis.set_yscale("log")
        axis.set_ylim(SMALLEST, 10)
        axis.set_title(
            f"{name}: token_mult_prob_error {result.token_mult_prob_error:.6f}, largest "
            f"difference {result.max_difference:.1e}",
            loc="left",
        )
        axis.set_yticks([SMALLEST, 1e-6, 1e-4, 1e-2, 1], ["equal", "1e-6", "1e-4", "1e-2", "1"])
        axis.minorticks_off()
    last = axes[-1, 0]
    last.set_xlim(x[0], x[-1])
    last.set_xticks(x[edges], [f"position {edge}" for edge in edges.tolist()])
    last.set_xlabel(
        f"one packed row of {layout.num_seqs} samples; images are drawn {IMAGE_WIDTH} tokens wide"
    )
    figure.supylabel("|difference of log-probability|, packed against one by one")
    figure.suptitle(f"Attention: {attention}", x=0.99, ha="right", fontsize=10)
    handles = [
        plt.Line2D([], [], color="black", linewidth=1.2, label="where samples begin and end"),
        Patch(facecolor="0.93", edgecolor="0.75", hatch="////", label="an image"),
        plt.Line2D([], [], marker="o", linestyle="", color="0.4", label="a text token"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_training(logs: dict[str, list[dict]], path) -> None:
    """Loss and held-out accuracy of runs on the same samples, packed in different ways.

    Args:
        logs: of each run by its name, the ``step``, ``loss`` and now and then ``accuracy``.
        path: of the PNG.
    """
    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for (name, log), style in zip(logs.items(), itertools.cycle(RUN_STYLES)):
        graded = [entry for entry in log if "accuracy" in entry]
        for axis, entries, key in (losses, log, "loss"), (accuracies, graded, "accuracy"):
            axis.plot([e["step"] for e in entries], [e[key] for e in entries], label=name, **style)
    losses.set_title("Training loss, per token", loc="left")
    accuracies.set_title("Held-out questions answered right", loc="left")
    accuracies.set_ylim(0, 1.03)
    for axis in (losses, accuracies):
        axis.set_xlabel("step")
        axis.grid(color="0.9")
    accuracies.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _image_spans(layout: PackedLayout) -> list[tuple[int, int]]:
    """``(begin, end)`` of every image in the physical row."""
    source = expand_tokens(layout).source
    is_image = (source < -1).int()
    steps = is_image.diff(prepend=is_image.new_zeros(1), append=is_image.new_zeros(1))
    spans = zip(
        (steps == 1).nonzero().squeeze(1).tolist(),
        (steps == -1).nonzero().squeeze(1).tolist(),
        strict=True,
    )
    return list(spans)


def _draw_bar(axis, edges, images, real_ends=()) -> None:
    """Sequences and images from ``(begin, end)``; behind its real end a sequence is padding."""
    ends = [*(real_ends or edges[1:-1]), edges[-2]]  # the last sequence is the tail
    for seq, (begin, end) in enumerate(pairwise(edges)):
        colour = SEQUENCE_COLOURS[seq % len(SEQUENCE_COLOURS)]
        for left, right, face in (begin, ends[seq], colour), (ends[seq], end, TAIL_COLOUR):
            axis.add_patch(Rectangle((left, 0), right - left, 1, facecolor=face, linewidth=0))
    few = len(images) <= MOST_LABELS
    for index, (begin, end) in enumerate(images):
        axis.add_patch(Rectangle((begin, 0), end - begin, 1, fill=False, edgecolor="white",
                                 hatch="////", linewidth=1.0 if few else 0.4))  # fmt: skip
        if few:
            axis.text((begin + end) / 2, 0.5, f"image {index}", rotation=90, ha="center",
                      va="center", fontsize=8, bbox=LABEL_BOX)  # fmt: skip
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(-0.15, 1.15)
    axis.set_yticks([])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)


def _draw_boundaries(axis, edges, colour, style) -> None:
    """Across the bar; where that would hide it, right ones above it and wrong ones below."""
    if len(edges) <= MOST_LABELS:
        low, high, width = -0.12, 1.12, 2.5
    else:
        low, high, width = (1, 1.12, 1.2) if colour == RIGHT else (-0.12, 0, 1.2)
        style = "solid"
    axis.vlines(edges, low, high, colour, style, linewidth=width, clip_on=False)


def _short(values: list[int]) -> str:
    if len(values) <= 8:
        return str(values)
    return f"[{', '.join(map(str, values[:4]))}, ..., {', '.join(map(str, values[-2:]))}]"
