"""Hybrid language models: attention, MLP and recurrent layers, packed against one by one."""

import pytest
import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel

import mcore_packing as mp
from mcore_packing.megatron.plan import takes_boundaries
from mcore_packing.megatron.releases import PACKED_SEQ_FIELDS
from mcore_packing.testing import tiny

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel

from .models import both_expansions, install

pytestmark = [
    pytest.mark.usefixtures("megatron"),
    pytest.mark.skipif(
        not takes_boundaries(HybridModel), reason="before 0.16, hybrids drop their boundaries"
    ),
]
SIZE = 56


class RunningMean(torch.nn.Module):
    """A recurrent layer: adds the mean of all positions so far of the same ``seq_idx``."""

    def __init__(self, config, layer_number, **kwargs):
        super().__init__()
        self.layer_number = layer_number

    def forward(self, hidden_states, packed_seq_params=None, **kwargs):
        index = torch.zeros(1, hidden_states.shape[0], dtype=torch.int32)
        if packed_seq_params is not None:
            index = packed_seq_params.seq_idx
        parts = hidden_states.split(torch.unique_consecutive(index, return_counts=True)[1].tolist())
        counts = [torch.arange(1, len(part) + 1)[:, None, None] for part in parts]
        means = [part.cumsum(0) / count for part, count in zip(parts, counts, strict=True)]
        return hidden_states + torch.cat(means)


class OfOnesOwn(HybridModel):
    """A user's subclass of Megatron's hybrid."""


def hybrid(pattern: str) -> LLaVAModel:
    layers = {"hybrid_pattern": pattern, "mamba_layer": RunningMean}
    return tiny.llava_model("rope", img_size=SIZE, language_layers=len(pattern), **layers)


@both_expansions
@pytest.mark.parametrize(
    "pattern",
    [
        "*-*-",
        pytest.param(
            "M*-M*-",
            marks=pytest.mark.skipif(
                "seq_idx" not in PACKED_SEQ_FIELDS, reason="this megatron-core has no seq_idx"
            ),
        ),
    ],
)
@pytest.mark.parametrize("subclassed", [False, True], ids=["", "subclass"])
def test_hybrid_packed_vs_one_by_one(pattern, ours, subclassed):
    model = hybrid(pattern)
    assert isinstance(model.language_model, HybridModel)
    if subclassed:
        model.language_model.__class__ = OfOnesOwn
    with install(model, ours):
        found = mp.parity.compare(model, tiny.samples(5, img_size=SIZE))
    assert found.token_mult_prob_error == pytest.approx(1, abs=1e-6)
    assert found.max_difference < 1e-5
    assert not ours or found.lost_labels == 0
