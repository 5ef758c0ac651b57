"""``mcore-packing parity | doctor | show``."""

import argparse
import importlib
import importlib.metadata
import inspect
import json
import platform
import sys

import torch

EXAMPLE = {
    "input_ids": [11, 12, -200, 13, -200, 21, 22, 31, 32, 33],
    "cu_seqlens": [0, 4, 7, 10],
    "tokens_per_image": [6, 9],
    "image_token_id": -200,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="mcore-packing", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    parity = commands.add_parser("parity", help="run a LLaVAModel packed and one by one")
    parity.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="a function that builds a model and a list of samples for parity.compare; by "
        "default a small model with random weights",
    )
    parity.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parity.add_argument("--without-hook", action="store_true", help="leave the model as it is")
    parity.add_argument("--threshold", type=float, help="the error to fail at; by default 1.00001, "
                        "1.05 in 16-bit precision")  # fmt: skip
    parity.set_defaults(run=_parity)

    doctor = commands.add_parser("doctor", help="say what this machine has")
    doctor.set_defaults(run=_doctor)

    show = commands.add_parser("show", help="draw one packed row in both spaces")
    show.add_argument(
        "row", nargs="?", help="JSON with input_ids, cu_seqlens, tokens_per_image, image_token_id"
    )
    show.add_argument("--output", default="row.png", help="where to put the PNG")
    show.set_defaults(run=_show)

    options = parser.parse_args(arguments)
    return options.run(options)


def _parity(options) -> int:
    from . import parity
    from .llava import install
    from .testing import tiny

    failed = False
    with tiny.megatron():
        if options.model:
            module, _, function = options.model.partition(":")
            model, samples = getattr(importlib.import_module(module), function)()
            batches = [samples]
        else:
            model = tiny.llava_model()
            batches = [tiny.samples(count) for count in options.samples]
        dtype = next(model.parameters()).dtype
        threshold = options.threshold or (1.00001 if dtype == torch.float32 else 1.05)
        for samples in batches:
            alone = parity.run_alone(model, samples)
            if options.without_hook:
                result = parity.compare(model, samples, alone)
            else:
                with install(model):
                    result = parity.compare(model, samples, alone)
            print(result, flush=True)
            failed |= not result.token_mult_prob_error <= threshold
    if failed:
        print(f"FAILED: above {threshold}", file=sys.stderr)
    return int(failed)


def _doctor(options) -> int:
    lines = doctor()
    width = max(map(len, lines))
    for name, finding in lines.items():
        print(f"{name:{width}}  {finding}")
    return 0


def doctor() -> dict[str, str]:
    """What this machine has, and what that means for packed rows."""
    packages = ("mcore-packing", "torch", "triton", "megatron-core", "transformer-engine")
    lines = {"python": platform.python_version()}
    lines |= {package: _version(package) for package in packages}
    lines["GPU"] = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        lines["GPU"] = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    lines["attention"] = _attention()
    lines |= _llava()
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _attention() -> str:
    from .testing import tiny

    try:
        return tiny.attention_name()
    except ImportError as error:
        return f"unknown: {error}"


def _llava() -> dict[str, str]:
    try:
        from .versions import LLaVAModel, describe
    except ImportError as error:
        return {"LLaVAModel": f"cannot be imported: {error}"}
    return {"LLaVAModel": describe(LLaVAModel), "found in": inspect.getfile(LLaVAModel)}


def _show(options) -> int:
    from .layout import PackedLayout
    from .plot import draw_row

    row = EXAMPLE
    if options.row:
        with open(options.row) as file:
            row = json.load(file)
    layout = PackedLayout.build(
        torch.tensor(row["input_ids"]),
        torch.tensor(row["cu_seqlens"], dtype=torch.int32),
        row["tokens_per_image"],
        row.get("image_token_id", -200),
    )
    draw_row(layout, options.output)
    print(f"{layout}\ncu_seqlens {layout.cu_seqlens_collapsed.tolist()} -> "
          f"{layout.cu_seqlens_expanded.tolist()}\nwrote {options.output}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
