"""A small plain VLM: Megatron's real ``GPTModel``, and patches that become embeddings before it."""

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from .. import cpu
from ..context_parallel import cp_partition

IMAGE_TOKEN_ID, VOCAB_SIZE, PATCH_SIZE, MERGED = 500, 512, 6, 4


class PlainVLM(MegatronModule):
    """As Qwen-VL takes a row: expanded ids, patches, and grids that count them.

    Every four patches become one embedding, at the next ``IMAGE_TOKEN_ID`` of the row.
    """

    def __init__(self, config: TransformerConfig, position_embedding_type: str, patch: int):
        super().__init__(config)
        self.visual = torch.nn.Linear(patch * MERGED, config.hidden_size)
        self.language_model = GPTModel(
            config,
            cpu.layer_spec(),
            VOCAB_SIZE,
            4096,
            position_embedding_type=position_embedding_type,
            scatter_embedding_sequence_parallel=False,
        )
        self.model_type = ModelType.encoder_or_decoder  # as megatron.training does

    def set_input_tensor(self, input_tensor) -> None:
        """What Megatron's schedules call."""
        self.language_model.set_input_tensor(input_tensor[0])

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """``[1, S]`` losses, not masked; under context parallelism those of this rank, of a whole
        row, as Megatron-Bridge's Qwen3-VL splits it."""
        is_image = input_ids == IMAGE_TOKEN_ID
        text = self.language_model.embedding(input_ids.masked_fill(is_image, 0), position_ids)
        if pixel_values is not None:
            assert pixel_values.shape[0] == int(image_grid_thw.prod(dim=1).sum())
            images = self.visual(pixel_values.reshape(-1, self.visual.in_features))
            where = is_image.t().unsqueeze(-1).expand_as(text)
            text = text.masked_scatter(where, images.to(text.dtype))
        if self.config.context_parallel_size > 1:
            edges = packed_seq_params.cu_seqlens_q_padded
            rank = parallel_state.get_context_parallel_rank()
            here = cp_partition(edges, input_ids.shape[1], self.config.context_parallel_size, rank)
            text, position_ids = text[here], position_ids[:, here]
            labels = None if labels is None else labels[:, here]
        if self.config.sequence_parallel:
            text = scatter_to_sequence_parallel_region(text)
        return self.language_model(
            None,
            position_ids,
            attention_mask,
            decoder_input=text,
            labels=labels,
            packed_seq_params=packed_seq_params,
        )


def plain_vlm(
    position_embedding_type: str = "rope", seed: int = 0, patch: int = PATCH_SIZE, **config
) -> PlainVLM:
    """A ``PlainVLM`` with random weights, for patches of so many numbers; ``config`` is for its
    ``TransformerConfig``."""
    torch.manual_seed(seed)
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        **config,
    }
    model = PlainVLM(TransformerConfig(**settings), position_embedding_type, patch)
    model.config.image_token_id = IMAGE_TOKEN_ID
    return model


def plain_samples(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[dict]:
    """Samples as a processor gives them: with no image, with one, with two."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        grids = [[1, 2, 2 * (1 + image)] for image in range(index % 3)]
        pieces = [torch.randint(1, 499, (3 + index,), generator=generator)]
        for grid in grids:
            pieces.append(torch.full((grid[1] * grid[2] // MERGED,), IMAGE_TOKEN_ID))
            pieces.append(torch.randint(1, 499, (2,), generator=generator))
        sample = {"input_ids": torch.cat(pieces)}
        if grids:
            size = sum(grid[1] * grid[2] for grid in grids)
            sample["pixel_values"] = torch.randn(size, PATCH_SIZE, generator=generator, dtype=dtype)
            sample["image_grid_thw"] = torch.tensor(grids)
        samples.append(sample)
    return samples
