"""How many examples a law is tried on: all of them in CI, a tenth in daily use."""

import os

import hypothesis

IS_FULL = os.environ.get("MCORE_PACKING_TESTS") == "full"


def examples(full: int) -> hypothesis.settings:
    """Hypothesis without randomness, so many examples in CI."""
    daily = max(full // 10, 20)
    return hypothesis.settings(
        derandomize=True, deadline=None, database=None, max_examples=full if IS_FULL else daily
    )
