"""Ask ``mp.find_space`` about rows that Megatron's own example makes, and count its answers.

``TaskEncoder.pack_selected_samples``, ``TaskEncoder.batch`` and ``get_batch`` of Megatron's
``examples/multimodal`` make the rows, under every combination of parallelism, precision, pad id,
fixed length and cut. They know which space they count. A wrong answer is a failure; a refusal asks
the user to say the space.
"""

import argparse
import itertools
import sys
from collections import Counter

from mcore_packing.errors import BoundarySpaceError
from mcore_packing.space import find_space
from mcore_packing.testing.megatron_example import IMAGE, Case, Example
from mcore_packing.testing.sources import SourcesMissing

PARALLELISM = [  # tp, cp, sequence parallel, FP8
    (1, 1, False, None), (2, 1, True, None), (1, 2, False, None), (2, 2, True, None),
    (1, 8, False, None), (4, 4, True, None), (1, 1, False, "tensorwise"), (1, 1, False, "mxfp8"),
    (2, 1, True, "mxfp8"), (1, 2, False, "tensorwise"),
]  # fmt: skip
CUTS = "uncut", "unclipped", "clamped"


def cases() -> list[Case]:
    """Every combination that a data path can have.

    Only expanded rows come cut: collapsed boundaries past the end of their row are a fault, which
    ``space="collapsed"`` reports.
    """
    combinations = itertools.product(
        ("collapsed", "expanded"), PARALLELISM, (0, 11), (False, True), CUTS
    )
    return [
        Case(space, *parallel, pad, fixed, cut)
        for space, parallel, pad, fixed, cut in combinations
        if space == "expanded" or cut == "uncut"
    ]


def answer(case: Case, tokens, boundaries, tokens_per_image, longest) -> str:
    """What the rule says of a row: "right", "WRONG", "both" (the same) or "refused"."""
    try:
        found = find_space(tokens, boundaries.int(), tokens_per_image, IMAGE, max_length=longest)
    except BoundarySpaceError:
        return "refused"
    if found is None:
        return "both"
    return "right" if found == case.space else "WRONG"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=["0.17.1", "main"], metavar="V")
    parser.add_argument("--rows", type=int, default=20, help="rows of every combination")
    options = parser.parse_args()
    print(f"{'megatron-core':14}{'space':11}{'rows':11}{'right':>8}{'both':>8}{'refused':>9}"
          f"{'WRONG':>7}")  # fmt: skip
    wrong = 0
    for version in options.versions:
        example, counts = Example(version), Counter()
        for case, seed in itertools.product(cases(), range(options.rows)):
            row = example.row(case, seed)
            counts[case.space, case.cut, answer(case, *row)] += 1
        for space, cut in dict.fromkeys(key[:2] for key in counts):
            found = [counts[space, cut, name] for name in ("right", "both", "refused", "WRONG")]
            print(f"{version:14}{space:11}{cut:11}{found[0]:8}{found[1]:8}{found[2]:9}{found[3]:7}")
            wrong += found[3]
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SourcesMissing as error:
        print(error, file=sys.stderr)
        sys.exit(3)
