"""Random packs against plain Python: what every position of a row must be.

The oracle shares no code with the package: lists, loops and the words of docs/design.md. One case
in ten is hostile, and must end in a typed error.

    python scripts/soak.py --packs 1000000 --state out/soak.json    # goes on where it was stopped
"""

import argparse
import itertools
import json
import math
import multiprocessing
import random
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

import mcore_packing as mp

IMAGE, PAD = -200, 0
FAMILY, FAMILY_IMAGE, MERGE = "qwen2_5_vl", 151655, 2  # of a plain model, whose ids are expanded
PLACEHOLDERS = (IMAGE, FAMILY_IMAGE)
ALGORITHMS = ("fullest", "first_fit_decreasing", "first_fit", "first_fit_shuffle", "concatenative")
CHUNK = 100  # cases of a task


class Wrong(Exception):
    """The package does not say what the oracle says."""


def expect(name: str, found, expected) -> None:
    """Raise where two plain values differ."""
    if found != expected:
        raise Wrong(f"{name}: {found}, expected {expected}")


# What is packed


def make_case(seed: int) -> dict:
    """Samples, and what a model asks of their rows, as plain values."""
    rng = random.Random(seed)
    cp, tp = rng.choice((1, 1, 2, 3, 4)), rng.choice((1, 1, 2))
    fp8 = rng.choice((1, 1, 1, 16))
    per_sequence = 2 * cp if cp > 1 else 1
    multiple = math.lcm(per_sequence * tp, fp8 * cp * tp)
    expands = rng.random() < 0.8
    capacity = multiple * max(1, rng.randint(40, 200) // multiple)
    img_seq_len = rng.randint(1, 9)
    axes = 0 if expands else rng.choice((0, 0, 1, 3))  # of position ids that samples bring
    is_family = not expands and rng.random() < 0.6
    samples = [make_sample(rng, expands, is_family, axes) for _ in range(rng.randint(1, 12))]
    return {
        "seed": seed, "cp": cp, "seq_multiple": per_sequence, "total_multiple": multiple,
        "expands": expands, "capacity": capacity, "img_seq_len": img_seq_len, "samples": samples,
        "algorithm": rng.choice(ALGORITHMS), "weights": rng.choice(("token", "sample", "square")),
        "repeats": rng.random() < 0.5, "shifted": rng.random() < 0.5,
        "num_rows_multiple": rng.choice((1, 1, 2, 4)), "fill_rows": rng.choice(("split", "empty")),
        "balance": rng.random() < 0.2, "row": rng.random(), "is_family": is_family,
        "max_sequences": rng.choice((None, None, None, 2, 4)), "gaps": rng.random() < 0.5,
    }  # fmt: skip


def make_sample(rng: random.Random, expands: bool, is_family: bool, axes: int) -> dict:
    """Ids, tiles of its images or their grids of patches, labels or None, a column or None,
    position ids by axis or None, how much padding at either end its attention mask hides."""
    size = rng.choice((1, 2, 3, rng.randint(1, 12), rng.randint(1, 60)))
    ids = [rng.randint(1, 99) for _ in range(size)]
    tiles = []
    if expands and rng.random() < 0.7:
        for at in sorted(rng.sample(range(size), rng.randint(0, min(size, 4)))):
            ids[at] = IMAGE
            tiles.append(rng.randint(1, 3))
    grids = []
    if is_family and rng.random() < 0.7:
        for at in sorted(rng.sample(range(size), rng.randint(1, min(size, 3))), reverse=True):
            grid = [rng.randint(1, 2), MERGE * rng.randint(1, 2), MERGE * rng.randint(1, 2)]
            ids[at:at] = [FAMILY_IMAGE] * (math.prod(grid) // MERGE**2)
            grids.append(grid)
    labels = None
    if rng.random() < 0.5:
        labels = [-100 if i in PLACEHOLDERS or rng.random() < 0.4 else i for i in ids]
    column = [rng.randint(-50, 50) for _ in ids] if rng.random() < 0.7 else None
    hidden = (rng.randint(0, 3), rng.randint(0, 3)) if rng.random() < 0.2 else None
    positions = None
    if axes and rng.random() < 0.8:
        axes = rng.choice((1, axes))
        positions = [[rng.randint(0, 99) for _ in ids] for _ in range(axes)]
    return {
        "ids": ids, "tiles": tiles, "grids": grids[::-1], "labels": labels, "column": column,
        "positions": positions, "hidden": hidden,
    }  # fmt: skip


def pixels_of(sample: dict, index: int) -> list[float]:
    """Of every tile or patch: its own number in the sample's name."""
    patches = sum(sample["tiles"]) or sum(math.prod(grid) for grid in sample["grids"])
    return [1000.0 * index + patch for patch in range(patches)]


def as_sample(sample: dict, index: int) -> dict:
    """As ``mp.data.pack`` takes it."""
    before, behind = sample["hidden"] or (0, 0)

    def padded(values, fill, dtype):
        return torch.tensor([fill] * before + values + [fill] * behind, dtype=dtype)

    given = {"input_ids": padded(sample["ids"], PAD, torch.int64), "name": f"sample {index}"}
    if sample["labels"] is not None:
        given["labels"] = padded(sample["labels"], -100, torch.int64)
    if sample["column"] is not None:
        given["column"] = padded(sample["column"], 0, torch.int64)
    if sample["hidden"] is not None:
        given["attention_mask"] = padded([1] * len(sample["ids"]), 0, torch.int64)
    if sample["tiles"]:
        pixels = torch.tensor(pixels_of(sample, index))
        given["images"] = pixels.view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        given["num_image_tiles"] = torch.tensor(sample["tiles"], dtype=torch.int32)
    if sample["grids"]:
        given["pixel_values"] = torch.tensor(pixels_of(sample, index))[:, None]
        given["image_grid_thw"] = torch.tensor(sample["grids"])
    if sample["positions"] is not None:
        axes = torch.stack([padded(axis, 0, torch.int64) for axis in sample["positions"]])
        given["position_ids"] = axes if len(axes) > 1 else axes[0]
    return given


# What a row must be, in plain Python


def expanded(case: dict, sample: dict) -> list[tuple[int, int | None]]:
    """Of every position of a sample: its token, and which embedding of the image, None for text."""
    tiles, positions = iter(sample["tiles"]), []
    for token, number in enumerate(sample["ids"]):
        if number != IMAGE:
            positions.append((token, None))
            continue
        positions += [(token, k) for k in range(next(tiles) * case["img_seq_len"])]
    return positions


def aligned(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def trained(case: dict, sample: dict) -> list[bool]:
    """Whether each token is trained, as what its predecessor predicts."""
    ids = sample["ids"]
    labels = labels_of(sample)
    return [
        token > 0
        and labels[token] != -100
        and not (case["expands"] and ids[token - 1] == IMAGE)
        and ids[token] not in PLACEHOLDERS
        for token in range(len(ids))
    ]


def labels_of(sample: dict) -> list[int]:
    return sample["labels"] or [-100 if i in PLACEHOLDERS else i for i in sample["ids"]]


def weight(kind: str, count: int) -> float:
    return {"token": 1.0, "sample": 1 / count, "square": 1 / math.sqrt(count)}[kind]


def oracle_row(case: dict, members: list[int], scale: float, gaps: list[int] = ()) -> dict:
    """Everything about the row of these samples, position by position.

    ``gaps`` are tokens of padding that the row has of its own, behind each sample and, the last,
    as its tail.
    """
    gaps = gaps or [0] * (len(members) + 1)
    row = {
        "edges": [0], "real": [0], "source": [], "labels": [], "mask": [], "positions": [],
        "is_padding": [], "column": [], "ids": [], "given": [],
    }  # fmt: skip
    embedding, first_token = 0, 0
    own = [case["samples"][member]["positions"] for member in members]
    axes = max((len(one) for one in own if one), default=0)
    for member, gap in zip(members, gaps, strict=False):
        sample = case["samples"][member]
        places, ids = expanded(case, sample), sample["ids"]
        labels = labels_of(sample)
        counts = trained(case, sample)
        total = sum(counts)
        each = scale * weight(case["weights"], total) if total else 0.0
        for at, (token, k) in enumerate(places):
            is_last = at + 1 == len(places) or places[at + 1][0] != token
            behind = token + 1
            predicts = is_last and behind < len(ids) and ids[behind] not in PLACEHOLDERS
            row["source"].append(first_token + token if k is None else ("image", embedding))
            embedding += k is not None
            row["labels"].append(labels[behind] if predicts else -100)
            is_trained = predicts and k is None and counts[behind]
            row["mask"].append(each if is_trained else 0.0)
            row["positions"].append(at)
            row["is_padding"].append(False)
            row["ids"].append(ids[token])
            row["column"].append(oracle_entry(case, sample, token, k))
            at_token = [axis[token] for axis in sample["positions"] or [range(len(ids))]]
            row["given"].append(at_token * (axes if len(at_token) < axes else 1))
        length = aligned(len(places) + gap, case["seq_multiple"])
        pad(row, length - len(places), len(places), first_token + len(ids), gap)
        row["edges"].append(row["edges"][-1] + length)
        row["real"].append(row["real"][-1] + len(places))
        first_token += len(ids) + gap
    tail = aligned(row["edges"][-1] + gaps[-1], case["total_multiple"]) - row["edges"][-1]
    pad(row, tail, 0, first_token, gaps[-1])
    row["edges"].append(row["edges"][-1] + tail)
    row["given"] = [list(axis) for axis in zip(*row["given"], strict=True)]
    return row


def oracle_entry(case: dict, sample: dict, token: int, k: int | None) -> int:
    """What the column of a sample has at a position."""
    column, ids = sample["column"], sample["ids"]
    if column is None:
        return 7
    if case["expands"] and case["shifted"] and token + 1 < len(ids) and ids[token + 1] == IMAGE:
        return 7  # it is about a prediction that there is not
    return column[token] if k is None or case["repeats"] else 7


def pad(row: dict, count: int, position: int, token: int, gap: int) -> None:
    """Padding, of which the first ``gap`` positions are tokens of the row's own."""
    for at in range(count):
        row["source"].append(token + at if at < gap else None)
        row["given"].append([0] * len(row["given"][0]))
        row["labels"].append(-100)
        row["mask"].append(0.0)
        row["positions"].append(position + at)
        row["is_padding"].append(True)
        row["ids"].append(PAD)
        row["column"].append(7)


def positions_of_rank(edges: list[int], cp: int, rank: int) -> list[int]:
    """The ``rank``-th chunk of every sequence from either end."""
    if cp == 1:
        return list(range(edges[-1]))
    found = []
    for begin, end in itertools.pairwise(edges):
        size = (end - begin) // (2 * cp)
        for chunk in rank, 2 * cp - 1 - rank:
            found += range(begin + chunk * size, begin + (chunk + 1) * size)
    return found


# What is compared


def check_case(case: dict) -> None:
    """Pack the samples of a case and compare one of its rows.

    Raises:
        Wrong: it is not what it must be.
    """
    spec = spec_of(case)
    images = "repeat" if case["repeats"] else "fill"
    lengths = [
        aligned(len(expanded(case, sample)), case["seq_multiple"]) for sample in case["samples"]
    ]
    num_fit = sum(length <= case["capacity"] for length in lengths)
    is_enough = num_fit % case["num_rows_multiple"] == 0  # to divide any number of rows
    samples = [as_sample(sample, index) for index, sample in enumerate(case["samples"])]
    rows, report = mp.data.pack(
        samples, spec, case["capacity"], case["algorithm"], loss_weights=case["weights"],
        columns={"column": mp.data.Column(7, case["shifted"], images)}, balance=case["balance"],
        num_rows_multiple=case["num_rows_multiple"],
        fill_rows=case["fill_rows"] if is_enough else "empty",
        max_sequences=case["max_sequences"], family=FAMILY if case["is_family"] else None,
    )  # fmt: skip
    refused = {one.index for one in report.refused}
    expect("refused", refused, {i for i, n in enumerate(lengths) if n > case["capacity"]})
    packed = sorted(i for bin_ in rows.bins for i in bin_)
    expect("packed", packed, [i for i in range(len(samples)) if i not in refused])
    for bin_ in rows.bins:
        expect("fits", sum(lengths[i] for i in bin_) <= case["capacity"], True)
        expect("sequences", len(bin_) <= (case["max_sequences"] or len(bin_)), True)
    totals = [sum(trained(case, case["samples"][i])) for i in packed]
    expect("untrained", report.num_untrained, totals.count(0))
    scale = sum(n * weight(case["weights"], n) for n in totals if n)
    scale = sum(totals) / scale if scale else 1.0
    if not packed:
        return
    expect("rows of a job", len(rows) % case["num_rows_multiple"], 0)
    full = [index for index, bin_ in enumerate(rows.bins) if bin_]
    index = full[int(case["row"] * len(full))]
    check_row(case, rows[index], rows.bins[index], scale, samples)
    if case["gaps"]:
        check_gaps(case, rows.bins[index], scale)


def spec_of(case: dict) -> mp.RowSpec:
    return mp.RowSpec(
        image_token_id=IMAGE, img_seq_len=case["img_seq_len"], seq_multiple=case["seq_multiple"],
        total_multiple=case["total_multiple"], expands=case["expands"], cp_size=case["cp"],
        pad_token_id=PAD,
    )  # fmt: skip


def check_row(case: dict, row, members: list[int], scale: float, samples: list[dict]) -> None:
    """Compare a row, and its layout in every form, with the oracle's."""
    right = oracle_row(case, members, scale)
    own = [case["samples"][i] for i in members]
    tokens = [0]
    for sample in own:
        tokens.append(tokens[-1] + len(sample["ids"]))
    check_layout(case, row.layout, right, "pack")
    check_layout(case, mp.PackedLayout.from_tensor(row.layout.to_tensor()), right, "tensor")
    expect("num_trained", row.num_trained, sum(sum(trained(case, sample)) for sample in own))
    if not case["expands"]:
        expect("ids", row.input_ids[0].tolist(), right["ids"])
        expect("labels", row.labels[0].tolist(), right["labels"])
        found = row.position_ids.reshape(-1, right["edges"][-1]).tolist()
        is_given = any(sample["positions"] for sample in own)
        expect("position_ids", found, right["given"] if is_given else [right["positions"]])
        if "column" in row.columns:
            expect("column", row.columns["column"][0].tolist(), right["column"])
        close("mask", row.loss_mask[0], right["mask"])
        for rank in range(case["cp"]):
            mine = positions_of_rank(right["edges"], case["cp"], rank)
            ids = row.inputs(cp_rank=rank)["input_ids"][0].tolist()
            expect(f"ids of rank {rank}", ids, [right["ids"][p] for p in mine])
    else:
        check_other_forms(case, row, own, tokens, right)
        check_shares(case, row.layout, right)
        for rank in range(case["cp"]):
            check_rank(case, row, right, rank)
    found = {name: row.media[name].tolist() for name in COUNTED if name in row.media}
    counted = [[x for sample in own for x in sample[name]] for name in COUNTED.values()]
    expect("counts", [found.get(name, []) for name in COUNTED], counted)
    pixels = [x for i in members for x in pixels_of(case["samples"][i], i)]
    for name in ("images", "pixel_values"):
        expected = pixels if case["expands"] == (name == "images") else []
        expect(name, first_of(row.media.get(name)), expected)
    for sample, given, back in zip(members, own, mp.data.split(row), strict=True):
        expect("split ids", back["input_ids"].tolist(), given["ids"])
        expect("split name", back["name"], samples[sample]["name"])
        for name in ("labels", "column"):
            if given[name] is not None:
                expect(f"split {name}", back[name].tolist(), given[name])
        if given["positions"] is not None:
            found = back["position_ids"].reshape(-1, len(given["ids"])).tolist()
            expect("split position_ids", found, given["positions"])
        for name, counted in (("images", "tiles"), ("pixel_values", "grids")):
            if given[counted]:
                expect(f"split {name}", first_of(back[name]), pixels_of(given, sample))


def first_of(media: torch.Tensor | None) -> list[float]:
    """The first number of every tile or patch."""
    if media is None or not media.numel():
        return []
    return media.reshape(len(media), -1)[:, 0].tolist()


COUNTED = {"num_image_tiles": "tiles", "image_grid_thw": "grids"}


def check_layout(case: dict, layout, right: dict, form: str) -> None:
    expect(f"{form} padded", layout.cu_seqlens_padded.tolist(), right["edges"])
    expect(f"{form} real", layout.cu_seqlens_expanded.tolist(), right["real"])
    expect(f"{form} size", layout.num_expanded, right["edges"][-1])
    steps = [b - a for a, b in itertools.pairwise(right["edges"])]
    expect(f"{form} max_seqlen", layout.max_seqlen, max(steps))
    expect(f"{form} position_ids", layout.position_ids.tolist(), right["positions"])
    expect(f"{form} padding", layout.padding_mask.tolist(), right["is_padding"])


def check_shares(case: dict, layout, right: dict) -> None:
    """Tiles are shared evenly, and what travels is counted position by position."""
    cp, is_image = case["cp"], [isinstance(source, tuple) for source in right["source"]]
    if cp == 1 or not any(is_image):
        return expect("shares", layout.shares, None)
    encoder = layout.shares.encoder.tolist()
    counts = [[0] * cp for _ in range(cp)]
    for rank in range(cp):
        for position in positions_of_rank(right["edges"], cp, rank):
            if is_image[position]:
                tile = right["source"][position][1] // case["img_seq_len"]
                counts[encoder[tile]][rank] += 1
    sent = mp.PackedLayout.from_tensor(layout.to_tensor()).shares
    expect("shares", [layout.shares.counts.tolist(), sent.counts.tolist()], [counts] * 2)
    loads = [encoder.count(rank) for rank in range(cp)]
    return expect("loads", max(loads) - min(loads) <= 1, True)


def check_other_forms(case: dict, row, own: list[dict], tokens: list[int], right: dict) -> None:
    """The same row from boundaries of either space."""
    counts = [[n * case["img_seq_len"] for n in sample["tiles"]] for sample in own]
    collapsed = torch.tensor(tokens, dtype=torch.int32)
    real = torch.tensor(right["real"], dtype=torch.int32)
    spec = row.layout.spec
    for space, edges in (("collapsed", collapsed), ("expanded", real)):
        layout = mp.PackedLayout.build(row.input_ids, edges, counts, spec, space=space)
        check_layout(case, layout, right, space)


def check_gaps(case: dict, members: list[int], scale: float) -> None:
    """Real and padded boundaries: the same samples in a row that has padding of its own."""
    rng = random.Random(case["seed"])
    gaps = [rng.choice((0, 0, 1, 5)) for _ in range(len(members) + 1)]
    right = oracle_row(case, members, scale, gaps)
    rows = {"ids": [], "labels": [], "mask": [], "column": []}
    real, physical = {"collapsed": [0], "expanded": [0]}, {"collapsed": [0], "expanded": [0]}
    for member, gap in zip(members, gaps, strict=False):
        sample = case["samples"][member]
        ids, counts = sample["ids"], trained(case, sample)
        each = scale * weight(case["weights"], sum(counts)) if any(counts) else 0.0
        rows["ids"] += ids + [PAD] * gap
        rows["labels"] += labels_of(sample)[1:] + [-100] * (gap + 1)
        rows["mask"] += [each * is_trained for is_trained in counts[1:]] + [0.0] * (gap + 1)
        rows["column"] += (sample["column"] or [7] * len(ids)) + [7] * gap
        for space, length in (("collapsed", len(ids)), ("expanded", len(expanded(case, sample)))):
            real[space].append(real[space][-1] + length)
            physical[space].append(physical[space][-1] + length + gap)
    for name, fill in (("ids", PAD), ("labels", -100), ("mask", 0.0), ("column", 7)):
        rows[name] = torch.tensor(rows[name] + [fill] * gaps[-1])
    tiles = [n * case["img_seq_len"] for i in members for n in case["samples"][i]["tiles"]]
    spec = spec_of(case)
    for space in ("collapsed", "expanded"):
        layout = mp.PackedLayout.build(
            rows["ids"], torch.tensor(real[space], dtype=torch.int32),
            torch.tensor(tiles, dtype=torch.int64), spec, space=space,
            cu_seqlens_padded=torch.tensor(physical[space], dtype=torch.int32),
        )  # fmt: skip
        check_layout(case, layout, right, f"{space} with gaps")
    row = SimpleNamespace(
        input_ids=rows["ids"], labels=rows["labels"], loss_mask=rows["mask"].float(),
        columns={"column": rows["column"]}, layout=layout,
    )  # fmt: skip
    check_rank(case, row, right, case["seed"] % case["cp"])


def check_rank(case: dict, row, right: dict, rank: int) -> None:
    """What a context-parallel rank gets of labels, weights, embeddings and a column."""
    mine = positions_of_rank(right["edges"], case["cp"], rank)
    parallel = {"cp_size": case["cp"], "cp_rank": rank}
    partition = mp.cp_partition(
        row.layout.cu_seqlens_padded, row.layout.num_expanded, case["cp"], rank
    )
    expect(f"partition of rank {rank}", partition.tolist(), mine)
    labels, mask = mp.expand_labels(row.layout, row.labels, row.loss_mask, **parallel)
    expect(f"labels of rank {rank}", labels.tolist(), [right["labels"][p] for p in mine])
    close(f"mask of rank {rank}", mask, [right["mask"][p] for p in mine])
    num_tokens, num_images = row.input_ids.numel(), row.layout.num_image_embeddings
    text = torch.arange(num_tokens, dtype=torch.float32)[:, None]
    images = 1000.0 + torch.arange(num_images, dtype=torch.float32)[:, None]
    found = mp.expand_embeddings(row.layout, text, images if num_images else None, **parallel)
    expected = [right["source"][p] for p in mine]
    expected = [
        0.0 if one is None else 1000.0 + one[1] if isinstance(one, tuple) else float(one)
        for one in expected
    ]
    expect(f"embeddings of rank {rank}", found[:, 0].tolist(), expected)
    if "column" in row.columns:
        images = "repeat" if case["repeats"] else "fill"
        column = mp.data.Column(7, case["shifted"], images)
        found = mp.expand_column(row.layout, row.columns["column"], column, **parallel)
        expect(
            f"column of rank {rank}", found.flatten().tolist(), [right["column"][p] for p in mine]
        )


def close(name: str, found: torch.Tensor, expected: list[float]) -> None:
    """Weights: fp32 of what Python computes in fp64."""
    found = found.tolist()
    if len(found) != len(expected) or any(
        abs(a - b) > 1e-6 * max(1.0, abs(b)) for a, b in zip(found, expected, strict=True)
    ):
        raise Wrong(f"{name}: {found}, expected {expected}")


# Hostile input


def check_hostile(seed: int) -> None:
    """Something that cannot be right must end in a typed error.

    Raises:
        Wrong: it did not.
    """
    rng = random.Random(seed)
    size = rng.randint(2, 20)
    ids = [rng.randint(1, 99) for _ in range(size)]
    ids[rng.randrange(size)] = IMAGE
    cut = rng.randint(1, size - 1)
    row = {
        "input_ids": torch.tensor([ids]),
        "cu_seqlens": torch.tensor([0, cut, size], dtype=torch.int32),
        "tokens_per_image": [[3] if IMAGE in ids[:cut] else [], [3] if IMAGE in ids[cut:] else []],
        "spec": mp.RowSpec(image_token_id=IMAGE, img_seq_len=3),
        "space": "collapsed",
    }
    name, spoil = rng.choice(list(HOSTILE.items()))
    spoil(rng, row)
    try:
        layout = mp.PackedLayout.build(
            row["input_ids"], row["cu_seqlens"], row["tokens_per_image"], row["spec"],
            space=row["space"],
        )  # fmt: skip
        if "tensor" in row:
            tensor = layout.to_tensor()
            row["tensor"](tensor)
            if is_same(mp.PackedLayout.from_tensor(tensor), layout):
                return  # it fell into a gap between two parts
    except mp.PackingError:
        return
    except Exception as error:
        raise Wrong(f"{name}: {type(error).__name__}: {error}, expected a PackingError") from error
    raise Wrong(f"{name}: no error")


def is_same(one, other) -> bool:
    """Whether two layouts are of one row."""
    names = ("input_ids", "expanded_start", "cu_image_embeddings", "cu_seqlens_expanded")
    names += ("cu_seqlens_padded", "cu_seqlens_collapsed", "position_ids", "padding_mask")
    same = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return same and one.spec == other.spec


def _set(key: str, make):
    def spoil(rng, row):
        row[key] = make(rng, row[key])

    return spoil


def _flip(rng, row):
    def spoil(tensor):
        at = rng.randrange(tensor.numel())
        tensor[at] ^= 1 << rng.randrange(31)

    row["tensor"] = spoil


HOSTILE = {
    "boundaries go back": _set("cu_seqlens", lambda rng, x: x[[0, 2, 1]]),
    "boundaries past the end": _set("cu_seqlens", lambda rng, x: x + torch.tensor([0, 0, 9])),
    "boundaries do not begin at 0": _set("cu_seqlens", lambda rng, x: x + 1),
    "boundaries of one": _set("cu_seqlens", lambda rng, x: x[:1]),
    "boundaries of two dimensions": _set("cu_seqlens", lambda rng, x: x.expand(2, -1)),
    "boundaries of floats": _set("cu_seqlens", lambda rng, x: x.float()),
    "no boundaries": _set("cu_seqlens", lambda rng, x: None),
    "a count too many": _set("tokens_per_image", lambda rng, x: [x[0] + [3], x[1]]),
    "a count too few": _set("tokens_per_image", lambda rng, x: [[], []]),
    "a count of another sequence": _set("tokens_per_image", lambda rng, x: x[::-1]),
    "a count of 0": _set("tokens_per_image", lambda rng, x: [[0 for _ in y] for y in x]),
    "a negative count": _set("tokens_per_image", lambda rng, x: [[-1 for _ in y] for y in x]),
    "a huge count": _set("tokens_per_image", lambda rng, x: [[2**31 - 1 for _ in y] for y in x]),
    "a count of text": _set("tokens_per_image", lambda rng, x: "three"),
    "ids of floats": _set("input_ids", lambda rng, x: x.float()),
    "two rows": _set("input_ids", lambda rng, x: x.expand(2, -1)),
    "no ids": _set("input_ids", lambda rng, x: x[:, :0]),
    "another space": _set("space", lambda rng, x: "auto"),
    "no spec": _set("spec", lambda rng, x: "spec"),
    "a row too long": _set("spec", lambda rng, x: mp.RowSpec(image_token_id=IMAGE, max_length=1)),
    "a damaged tensor": _flip,
}  # fmt: skip


# Many of them


def check(seed: int) -> str | None:
    """What is wrong with a case, None if nothing is."""
    try:
        if seed % 10 == 9:
            check_hostile(seed)
        else:
            check_case(make_case(seed))
    except Wrong as wrong:
        return str(wrong)
    except Exception:
        return traceback.format_exc(limit=-4)
    return None


def check_many(first: int) -> tuple[int, int, str] | None:
    """The first of a chunk that is wrong: the chunk, the seed, what."""
    torch.set_num_threads(1)
    for seed in range(first, first + CHUNK):
        wrong = check(seed)
        if wrong is not None:
            return first, seed, wrong
    return None


def smallest(case: dict) -> dict:
    """The same case with as few samples as are still wrong."""
    for index in reversed(range(len(case["samples"]))):
        fewer = {**case, "samples": case["samples"][:index] + case["samples"][index + 1 :]}
        if not fewer["samples"]:
            break
        try:
            check_case(fewer)
        except Exception:
            case = fewer
    return case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=int, default=10_000, help="how many cases")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--state", type=Path, help="a file: where to go on, if it is there")
    args = parser.parse_args()
    first = args.first
    if args.state and args.state.exists():
        first = json.loads(args.state.read_text())["next"]
    end, began, done = args.first + args.packs, time.monotonic(), 0
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:
        for wrong in pool.imap(check_many, range(first, end, CHUNK)):
            if wrong is not None:
                _, seed, what = wrong
                print(f"\nseed {seed}: {what}", file=sys.stderr)
                if seed % 10 != 9:
                    print(json.dumps(smallest(make_case(seed))), file=sys.stderr)
                return 1
            done += CHUNK
            if args.state:
                args.state.parent.mkdir(parents=True, exist_ok=True)
                args.state.write_text(json.dumps({"next": first + done}))
            if done % (10 * CHUNK) == 0:
                rate = done / (time.monotonic() - began)
                so_far = first + done - args.first
                print(f"\r{so_far:,} packs, none wrong ({rate:.0f} a second)", end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
