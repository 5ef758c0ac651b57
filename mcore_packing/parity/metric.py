"""The metric: by what factor two runs disagree about the probability of a token."""

import torch
from torch import Tensor


def token_mult_prob_error(logprobs_a: Tensor, logprobs_b: Tensor, mask: Tensor) -> Tensor:
    """Mean factor by which two runs disagree about the probability of a token; 1.0 is perfect.

    ``sum(exp(|a - b| * mask) * mask) / (sum(mask) + 1e-8)``.

    Args:
        logprobs_a: log-probabilities of the target tokens, any shape; shifting is left to the
            caller.
        logprobs_b: the same tokens in another run.
        mask: 1 for the tokens that count; same shape.

    Returns:
        0-d tensor of the same dtype.

    Source:
        ``token_mult_prob_error`` as NeMo-RL's ``ClippedPGLossFn`` reports it.

    Example:
        >>> a, b = torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-1.0, -2.5, 0.0])
        >>> round(token_mult_prob_error(a, b, torch.tensor([1.0, 1.0, 0.0])).item(), 4)
        1.3244
    """
    difference = (logprobs_a - logprobs_b).abs()
    return (torch.exp(difference * mask) * mask).sum() / (mask.sum() + 1e-8)
