"""Is my own VLM right on packed rows? A model of Megatron-Core's classes that is no LLaVAModel.

Its ids are expanded by its processor, as Qwen-VL's are. All that the checks need is a ``step``.

    python examples/verify_any_vlm.py
    torchrun --nproc-per-node 2 examples/verify_any_vlm.py --cp 2      (or --tp 2, --pp 2)
"""

import argparse
import dataclasses
import os
import warnings

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

import mcore_packing as mp
from mcore_packing.testing import tiny

IMAGE, VOCAB, PER_IMAGE, PATCH, LONGEST = 9, 256, 4, 14, 512
FAMILY = mp.media.Family("patch_vlm", image_token_id=IMAGE, layout={"pixel_values": "image"})


class PatchVLM(MegatronModule):
    """Embeds patches by one matrix, in the place of image tokens, in front of a GPT."""

    def __init__(self, config: TransformerConfig, vp_stage: int | None = None):
        super().__init__(config)
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        self.pre_process = parallel_state.is_pipeline_first_stage(**stage)
        self.post_process = parallel_state.is_pipeline_last_stage(**stage)
        if self.pre_process:
            self.patches = torch.nn.Linear(3 * PATCH**2, config.hidden_size)
        self.language_model = GPTModel(
            config,
            mp.cpu.layer_spec(),
            vocab_size=VOCAB,
            max_sequence_length=LONGEST,
            pre_process=self.pre_process,
            post_process=self.post_process,
            position_embedding_type="learned_absolute",
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )

    def set_input_tensor(self, hidden):
        self.language_model.set_input_tensor(hidden[0] if isinstance(hidden, list) else hidden)

    def forward(self, input_ids, position_ids, image_at, images, labels, packed_seq_params):
        """Positions are those of one rank; ``image_at`` says which patch each has, -1 for text."""
        hidden = None
        if self.pre_process:
            hidden = self.language_model.embedding(input_ids, position_ids)  # [s, 1, h]
            if len(images):
                patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
                patches = self.patches(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2))
                is_image = (image_at >= 0)[0, :, None, None]
                hidden = torch.where(is_image, patches[image_at[0].clamp(min=0)][:, None], hidden)
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return self.language_model(
            None, None, None,
            decoder_input=hidden, labels=labels, packed_seq_params=packed_seq_params,
        )  # fmt: skip


def step(model, inputs: dict):
    """What the checks run: one stage of the model, on what ``row.inputs()`` gives."""
    ids, edges = inputs["input_ids"], inputs["packed_seq_params"].cu_seqlens_q
    image_at = torch.where(ids == IMAGE, (ids == IMAGE).cumsum(1) - 1, -1)
    cp_size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    here = mp.cp_partition(edges, ids.shape[1], cp_size, rank)
    of_tokens = {"input_ids": ids, "position_ids": inputs["position_ids"], "image_at": image_at,
                 "labels": inputs["labels"]}  # fmt: skip
    of_rank = {name: tensor[:, here] for name, tensor in of_tokens.items()}
    return model(**of_rank, images=inputs["pixel_values"],
                 packed_seq_params=inputs["packed_seq_params"])  # fmt: skip


def without_boundaries(model, inputs: dict):
    """The same, where nobody passes the boundaries on."""
    params = one_sequence(inputs["packed_seq_params"])
    return step(model, {**inputs, "packed_seq_params": params})


def one_sequence(params):
    """Parameters that know the ends of a row only."""
    ends = params.cu_seqlens_q[[0, -1]]
    names = "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"
    return dataclasses.replace(params, **dict.fromkeys(names, ends))


def without_restart(model, inputs: dict):
    """The same, where position ids count the whole row."""
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    return step(model, {**inputs, "position_ids": positions.to(inputs["position_ids"])})


def build(vp_stage: int | None = None, chunks: int | None = None) -> PatchVLM:
    """This rank's part of a small model."""
    torch.manual_seed(0)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    pp_size = parallel_state.get_pipeline_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, init_method_std=0.05,
        tensor_model_parallel_size=tp_size, sequence_parallel=tp_size > 1,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        pipeline_model_parallel_size=pp_size, pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=chunks,
        overlap_p2p_comm=chunks is not None, batch_p2p_comm=chunks is None,  # as Megatron asks
    )  # fmt: skip
    return PatchVLM(config, vp_stage)


def row_spec() -> mp.RowSpec:
    """What the model asks of a row."""
    cp_size = parallel_state.get_context_parallel_world_size()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    per_sequence, per_row = mp.alignment(cp_size, tp_size, sequence_parallel=tp_size > 1)
    is_pipeline = parallel_state.get_pipeline_model_parallel_world_size() > 1
    return mp.RowSpec(
        image_token_id=IMAGE, seq_multiple=per_sequence, total_multiple=per_row, cp_size=cp_size,
        expands=False, fixed_length=LONGEST if is_pipeline else None,
    )  # fmt: skip


def make_samples(count: int, seed: int = 0) -> list[dict]:
    """Samples with one image each, ids as a processor expands them."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        length = int(torch.randint(16, 48, (), generator=generator))
        ids = torch.randint(10, VOCAB, (length,), generator=generator)
        begin = 3 * (index % 3)
        ids[begin : begin + PER_IMAGE] = IMAGE
        image = torch.randn(1, 3, 2 * PATCH, 2 * PATCH, generator=generator)
        samples.append({"input_ids": ids, "pixel_values": image})
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for size in ("cp", "tp", "pp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--vp", type=int, help="chunks of the model on a pipeline stage")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    sizes = {
        "context_parallel_size": options.cp,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "virtual_pipeline_model_parallel_size": options.vp,
    }
    with tiny.megatron(**sizes):
        model = [build(stage, options.vp) for stage in range(options.vp or 1)]
        samples = make_samples(6, seed=parallel_state.get_data_parallel_rank())
        (row,), _ = mp.data.pack(samples, row_spec(), family=FAMILY)
        said = []
        for run in (step, without_boundaries, without_restart):
            said += [run.__name__, mp.parity.isolation(model, row, run),
                     mp.parity.verify(model, row, run, gradients=run is step)]  # fmt: skip
        if dist.get_rank() == 0:
            print(*said, sep="\n", flush=True)
        dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
