"""All that knows Megatron's classes: the hook on ``LLaVAModel``, and what it needs."""
