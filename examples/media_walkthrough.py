"""One conversation of two turns and two images, from its prompt to a packed row."""

import torch

import mcore_packing as mp

family = mp.media.get_family("qwen2_vl")
image, begin, end = family.image_token_id, family.vision_start_id, family.vision_end_id
user, assistant, stop = [*family.turn_opener], [151644, 77091, 198], [151645, 198]
prompt = [*user, 101, 102, *stop, *assistant, 201, 202, *stop]  # a question and its answer
prompt += [*user, 103, *stop, *assistant, 203, *stop]

# Counts: what the family's processor would write. Placement: each image into its own turn.
counts = [mp.media.num_image_tokens(family, *size) for size in [(224, 308), (112, 112)]]
blocks = [[begin, *[image] * count, end] for count in counts]
placed = mp.media.place_image_blocks(prompt, blocks, family=family, images_per_turn=[1, 1])
mp.media.check_placeholders(placed.output_ids, counts, family=family)
print("tokens per image", counts, "at", placed.block_spans, "of", len(placed.output_ids))

# Truncation: 64 tokens may stay. The cut runs through the first image: all that is left of it goes.
cut = mp.media.truncate(placed.output_ids, counts, 64, side="left", family=family)
print("kept images", cut.kept_images, "orphans", len(cut.orphan_positions))
pixels = cut.apply(torch.randn(16 * 22 + 8 * 8, 1176), per="image", rows=[16 * 22, 8 * 8])
grid = cut.apply(torch.tensor([[1, 16, 22], [1, 8, 8]]), per="image")

# Slicing: a batch of this sample and a text, and one micro-batch for each of them again.
batch = {"input_ids": [cut.output_ids, user], "pixel_values": pixels, "image_grid_thw": grid}
for part in mp.media.split_samples(batch, family, num_images=[1, 0], chunks=1):
    print({key: len(value) for key, value in part.items()})

# Into a packed row, as Megatron takes it: one placeholder for each image.
left = [counts[kept] for kept in cut.kept_images]
row = [cut.output_ids[at] for at in mp.media.collapse(cut.output_ids, left, family=family)]
bounds = torch.tensor([0, len(row), len(row + user)], dtype=torch.int32)
spec, ids = mp.RowSpec(image_token_id=image), torch.tensor(row + user)
layout = mp.PackedLayout.build(ids, bounds, [left, []], spec, space="collapsed")
print(bounds.tolist(), "->", layout.cu_seqlens_expanded.tolist())
