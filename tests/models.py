"""Small LLaVAModels, how to call them, and how far."""

import functools
import warnings

import pytest
import torch
from megatron.core import __version__ as mcore_version
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.packed_seq_params import PackedSeqParams

import mcore_packing as mp
from mcore_packing import parity
from mcore_packing.megatron.find import find_llavas
from mcore_packing.megatron.releases import release_of
from mcore_packing.testing import tiny

SIZE = 28  # pixels: a tile becomes 5 positions
POSITIONS = ("learned_absolute", "rope")
OLD = tuple(map(int, mcore_version.split(".")[:2])) < (0, 16)
RELEASE = release_of()
PACKS_VISION = RELEASE.name == "0.18 and 0.19"  # its vision tower gets boundaries from the caller


class OwnExpansion(LLaVAModel):
    """A user's class: its expansion is Megatron's, but not recognised as that."""

    @functools.wraps(LLaVAModel._preprocess_data)
    def _preprocess_data(self, *args, **kwargs):
        return super()._preprocess_data(*args, **kwargs)


both_expansions = pytest.mark.parametrize("ours", [True, False], ids=["ours", "boundaries-only"])


def install(model, ours=True, **options):
    """``mp.install`` on models whose rows have collapsed boundaries, unless a test says more;
    without ``ours`` their expansion is their own, and only boundaries are moved."""
    with warnings.catch_warnings():
        if not ours:
            warnings.simplefilter("ignore")
            for llava in find_llavas(model):
                llava.__class__ = OwnExpansion
        return mp.install(model, **{"space": "collapsed", **options})


def model_of(positions="learned_absolute", **kwargs):
    return tiny.llava_model(positions, **{"img_size": SIZE, **kwargs})


def arguments(samples, cu_seqlens=None):
    """Keyword arguments of ``forward`` for one packed row."""
    row = parity.collate(samples)
    cu_seqlens = row["cu_seqlens"] if cu_seqlens is None else cu_seqlens
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=row["max_seqlen"], max_seqlen_kv=row["max_seqlen"],
    )  # fmt: skip
    names = ("images", "input_ids", "position_ids", "labels", "loss_mask", "num_image_tiles")
    return {name: row[name] for name in names} | {
        "attention_mask": None,
        "packed_seq_params": params,
    }


class Reached(Exception):
    """The language model was called with these arguments."""


def stop_at_language_model(model):
    """Raise ``Reached`` there; gives what to ``remove()`` again."""

    def stop(module, args, kwargs):
        raise Reached(kwargs)

    return model.language_model.register_forward_pre_hook(stop, with_kwargs=True)


def reached(model, given) -> dict:
    """What the language model is called with."""
    stop = stop_at_language_model(model)
    try:
        with torch.no_grad():
            model(**given)
    except Reached as error:
        return error.args[0]
    finally:
        stop.remove()
    raise AssertionError("the language model was not reached")


# Images in their own resolution

SIZES = [[(56, 84), (28, 28)], [(28, 28), (56, 28)], [(84, 28)]]
PLACES = ([2], [0, 3], [11])


def radio(**options):
    options = {"drop_vision_class_token": True, **options}
    model = model_of("rope", vision_model_type="radio", dynamic_resolution=True, **options)
    return model.eval()  # in training, RADIO moves its positions at random


def resolution_samples(tiles):
    """``(input_ids, patches, sizes, tiles)`` of three samples."""
    samples = []
    for sample, (at, count) in enumerate(zip(PLACES, tiles, strict=True)):
        ids = torch.randint(1, 500, (12,), generator=torch.Generator().manual_seed(sample))
        ids[at] = tiny.IMAGE_TOKEN_ID
        sizes = SIZES[sample][: sum(count)]
        patches = sum(height * width for height, width in sizes) // 14**2
        samples.append((ids, torch.randn(patches, 3 * 14**2), sizes, count))
    return samples


def resolution_row(samples, cu_seqlens=None):
    """Keyword arguments of ``forward``."""
    ids, patches = (torch.cat([sample[i] for sample in samples]) for i in (0, 1))
    labels = torch.cat([torch.cat([sample[0][1:], sample[0].new_ones(1)]) for sample in samples])
    sizes = torch.tensor([size for sample in samples for size in sample[2]])
    given = {
        "images": patches[None],
        "input_ids": ids[None],
        "position_ids": torch.arange(ids.numel())[None],
        "attention_mask": None,
        "labels": labels[None],
        "loss_mask": torch.ones(1, ids.numel()),
        "num_image_tiles": torch.tensor([n for s in samples for n in s[3]], dtype=torch.int),
        "imgs_sizes": sizes,
    }
    if PACKS_VISION:
        lengths = (sizes // 14).prod(-1)
        edges = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        longest = int(lengths.max())
        given["vision_packed_seq_params"] = PackedSeqParams(
            "thd", edges, edges, None, None, longest, longest
        )
    if cu_seqlens is not None:
        edges = torch.tensor(cu_seqlens, dtype=torch.int32)
        given["packed_seq_params"] = PackedSeqParams("thd", edges, edges, None, None, 12, 12)
    return given
