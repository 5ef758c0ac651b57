"""Conversations about coloured shapes: a data set that a small model learns in seconds."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import IGNORE_INDEX
from .tiny import IMAGE_TOKEN_ID

PATCH = 14  # pixels, as the small model has them
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "purple": (1, 0, 1),
}
WORDS = ("<pad>", "<user>", "<assistant>", "<end>", "describe", "colour", *SHAPES, *COLOURS)
TOKENS = {word: token for token, word in enumerate(WORDS)}
VOCAB_SIZE = 32  # more than there are words: tensor parallelism divides it


class Conversations(Sequence):
    """Samples for ``mp.data.pack``: one to four images, and as many turns about them.

    An image is one coloured shape on one to three tiles; no two images of a conversation share
    their shape or their colour. Half of the turns ask to describe all images in order ("circle red
    ring blue"), which is where a model learns to see. The others ask for the colour of a shape,
    which needs the right image of the right conversation: those packed beside it show the same
    shapes in other colours.

    Sample ``i`` is the same whenever and wherever it is made.

    Args:
        count: how many there are.
        seed: of the conversations; another seed gives others.
        train_on: "answers" labels all that the assistant says, "colours" only the word that answers
            a question, for grading.
        most_images: that one conversation has. With 1 the image right before a question is always
            the right one, so that the task asks little of boundaries.

    Example:
        >>> sample = Conversations(1, seed=13)[0]
        >>> words = [WORDS[token] if token >= 0 else "<img>" for token in sample["input_ids"]]
        >>> print(" ".join(words).replace(" <user>", "\\n<user>"))
        <img> <img>
        <user> describe <assistant> cross blue ring green <end>
        <user> colour cross <assistant> cross blue <end>
        >>> list(sample["images"].shape), sample["num_image_tiles"]
        ([6, 3, 28, 28], [3, 3])
        >>> {len(sample["num_image_tiles"]) for sample in Conversations(50, most_images=1)}
        {1}
    """

    def __init__(self, count: int, seed: int = 0, train_on: str = "answers", most_images: int = 4):
        self.count, self.seed, self.train_on = count, seed, train_on
        self.most_images = most_images

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}-{index}")
        size = rng.randint(1, self.most_images)
        images = [*zip(rng.sample(SHAPES, size), rng.sample([*COLOURS], size), strict=True)]
        num_tiles = [rng.randint(1, 3) for _ in images]
        ids, labels = [IMAGE_TOKEN_ID] * size, [IGNORE_INDEX] * size
        for _ in images:
            shape, colour = rng.choice(images)
            question, answer = ["colour", shape], [shape, colour]
            is_colour = rng.random() < 0.5
            if not is_colour:
                question, answer = ["describe"], [word for image in images for word in image]
            asked = [TOKENS[word] for word in ("<user>", *question, "<assistant>")]
            said = [TOKENS[word] for word in (*answer, "<end>")]
            ids += asked + said
            if self.train_on == "colours":
                said = [
                    token if is_colour and i == 1 else IGNORE_INDEX for i, token in enumerate(said)
                ]
            labels += [IGNORE_INDEX] * len(asked) + said
        tiles = [
            PIXELS[image].repeat(n, 1, 2, 2) for image, n in zip(images, num_tiles, strict=True)
        ]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "images": torch.cat(tiles),
            "num_image_tiles": num_tiles,
            "__key__": f"{self.seed}-{index}",
        }


def _pixels() -> dict[tuple[str, str], Tensor]:
    """fp32 ``[3, 14, 14]`` of every coloured shape: it fills a patch, on black."""
    at = (torch.arange(PATCH) - (PATCH - 1) / 2) / (PATCH / 2)
    y, x = at[:, None], at[None, :]
    radius = (x**2 + y**2).sqrt()
    inside = {
        "circle": radius <= 1,
        "square": (x.abs() <= 0.9) & (y.abs() <= 0.9),
        "triangle": x.abs() <= (y + 1) / 2,
        "cross": (x.abs() <= 0.3) | (y.abs() <= 0.3),
        "ring": (radius <= 1) & (radius >= 0.6),
    }
    return {
        (shape, colour): 2.0 * torch.tensor(light)[:, None, None] * inside[shape]
        for shape in SHAPES
        for colour, light in COLOURS.items()
    }


PIXELS = _pixels()
