"""What a type checker sees of the public names: mypy reads this file, nothing runs it."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import assert_type

import mcore_packing as mp
from mcore_packing.megatron.hook import Installation


def layouts(ids: Tensor, cu_seqlens: Tensor) -> None:
    layout = mp.PackedLayout.build(ids, cu_seqlens, [3, 4], space="collapsed")
    assert_type(layout, mp.PackedLayout)
    assert_type(layout.max_seqlen, int)
    assert_type(layout.cu_seqlens_padded, Tensor)
    assert_type(layout.to("cuda"), mp.PackedLayout)
    assert_type(mp.PackedLayout.from_tensor(layout.to_tensor()), mp.PackedLayout)
    spec = mp.RowSpec(seq_multiple=8, max_length=4096)
    assert_type(
        mp.PackedLayout.build(ids, cu_seqlens, [3], spec, space="expanded").spec, mp.RowSpec
    )
    mp.find_space(ids, cu_seqlens, [3, 4])
    assert_type(mp.remap_cu_seqlens(cu_seqlens, ids, [3, 4], -200), Tensor)
    mp.packed_seq_params(layout)


def expansion(layout: mp.PackedLayout, text: Tensor, images: Tensor) -> None:
    assert_type(mp.expand_embeddings(layout, text, images, cp_size=2, cp_rank=1), Tensor)
    assert_type(mp.expand_labels(layout, None, None), tuple[Tensor | None, Tensor | None])
    assert_type(mp.alignment(cp_size=2), tuple[int, int])
    assert_type(mp.cp_partition(layout.cu_seqlens_padded, 64, 2, 0), Tensor)


def hook(model: torch.nn.Module) -> None:
    with mp.install(model, space="collapsed", on_missing="raise", max_sequences=8) as handle:
        assert_type(handle, Installation)
        handle.check()
    handle.remove()
    assert_type(mp.row_spec(model), mp.RowSpec)
    with mp.unpacked(model):
        pass


def comparison(model: torch.nn.Module, a: Tensor, b: Tensor, mask: Tensor) -> None:
    assert_type(mp.token_mult_prob_error(a, b, mask), Tensor)
    result = mp.parity.compare(model, [{"input_ids": a}])
    assert_type(result.token_mult_prob_error, float)
    assert_type(result.layout, mp.PackedLayout)


def images(prompt: list[int]) -> None:
    assert_type(mp.media.num_image_tokens("qwen2_vl", 224, 308), int)
    assert_type(mp.media.num_image_tokens("qwen2_vl", size=(308, 224)), int)
    mp.media.splice_image_blocks(prompt, [[1]], turn_opener=[2])


def errors(error: mp.PackingError) -> None:
    assert isinstance(error, ValueError)
    mp.PlaceholderMismatch(actual=1, expected=2)


def rows(model: torch.nn.Module, samples: list[dict], dataset: Dataset[dict]) -> None:
    packed, report = mp.data.pack(samples, mp.row_spec(model), capacity=4096)
    assert_type(packed, mp.data.Rows)
    mp.data.pack(dataset, mp.row_spec(model))
    assert_type(DataLoader(packed, batch_size=None), DataLoader[mp.data.Row])
    assert_type(next(iter(packed)).num_trained, int)
    assert_type(report, mp.data.Report)
    assert_type(mp.data.split(packed[0]), list[dict])
    columns = {"advantages": mp.data.Column(0.0, shifted=True)}
    mp.data.pack(samples, mp.row_spec(model), family="qwen2_5_vl", columns=columns)
    packer = mp.data.get_packer("fullest", mp.row_spec(model), on_too_long="truncate")
    packed, report = packer.pack(samples, lengths=[packer.length(one) for one in samples])
    assert_type(report.cut_off, dict[str, int])
    assert_type(packed[0].inputs(cp_rank=0), dict)
    assert_type(packed[0].num_trained, int)
    assert_type(mp.expand_column(packed[0].layout, torch.zeros(3), 0.0, cp_size=2), Tensor)
