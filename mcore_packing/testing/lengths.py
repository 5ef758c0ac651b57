"""Lengths of samples as fine-tuning has them, to pack without the samples."""

import random


def llava_mix(count: int, seed: int = 0) -> list[int]:
    """Expanded lengths like those of LLaVA-1.5's 665k instructions.

    Of those 6 % are text only and up to 2,048 tokens long; all others have one image of 576
    positions and some 200 tokens of questions and answers.
    """
    rng = random.Random(seed)
    return [
        min(2048, max(16, int(rng.lognormvariate(6.6, 0.7))))
        if rng.random() < 0.06
        else 576 + min(1472, max(20, int(rng.lognormvariate(5.3, 0.6))))
        for _ in range(count)
    ]
