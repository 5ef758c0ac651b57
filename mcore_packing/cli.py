"""``mcore-packing parity | isolate | doctor | show``."""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import torch

from . import __version__
from .errors import PackingError
from .layout import PackedLayout, _rebuild
from .space import SPACES, find_space
from .spec import RowSpec

EXAMPLE = {
    "input_ids": [11, 12, -200, 13, -200, 21, 22, 31, 32, 33],
    "cu_seqlens": [0, 4, 7, 10],
    "tokens_per_image": [6, 9],
}
REQUIRED = tuple(EXAMPLE)
OPTIONAL = "image_token_id", "space"

FEWEST = 4  # positions of an image: where it has fewer, somebody counted tiles

MOST_SEQUENCES, MOST_POSITIONS = 500, 4_000_000  # of a picture in which anything can be seen

# What it means that a package is missing.
WITHOUT = {
    "triton": "no kernels, which rows on a GPU need; it comes with torch for CUDA",
    "megatron-core": "no hook and no parity: pip install megatron-core",
    "transformer-engine": "a model of yours needs mp.attention.PackedAttention in its layer spec",
    "matplotlib": "no pictures: pip install matplotlib",
}
MODULES = {"transformer-engine": "transformer_engine"}


class UserError(Exception):
    """What the user can put right, in one line."""


class ModelError(UserError):
    """What a user's model raised, or a user's step."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. The exit status is 1 where a check failed, and 2 with one line that
    says why where it could not run."""
    parser = Parser(prog="mcore-packing", description=main.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    parity = commands.add_parser("parity", help="run a LLaVAModel packed and one by one")
    _add_model(parity, "a model and a list of samples for parity.compare")
    parity.add_argument("--samples", type=_count, nargs="+", metavar="N",
                        help="samples of the small model in a row, by default 1 4 16")  # fmt: skip
    parity.add_argument("--threshold", type=float, help="also fail where the error is above this")
    parity.set_defaults(run=_parity)

    isolate = commands.add_parser(
        "isolate", help="change other samples of a row: a sample must give the same, bit by bit"
    )
    _add_model(isolate, "a model and a list of samples; or a model, a row and a step, as "
                        "parity.isolation takes them")  # fmt: skip
    isolate.add_argument("--samples", type=_count, nargs="+", metavar="N",
                         help="samples of the small model in a row, by default 6")  # fmt: skip
    isolate.add_argument("--exhaustive", action="store_true", help="so that no pair hides")
    isolate.set_defaults(run=_isolate)

    doctor = commands.add_parser("doctor", help="say what this machine has, and what is missing")
    doctor.set_defaults(run=_doctor)

    show = commands.add_parser("show", help="draw one packed row in both spaces")
    show.add_argument("row", nargs="?", help=f"a mp.data.Row that torch.save wrote; or a JSON file "
                      f"with {', '.join(REQUIRED)} and, if you like, {' and '.join(OPTIONAL)}; by "
                      f"default an example")  # fmt: skip
    show.add_argument("--space", choices=SPACES, help="what the cu_seqlens of JSON count; by "
                      "default what the file says, else what they can only be")  # fmt: skip
    show.add_argument("--output", default="row.png", help="where to put the picture")
    show.set_defaults(run=_show)

    options = parser.parse_args(arguments)
    try:
        with _silent_megatron():
            return options.run(options)
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (UserError, PackingError) as error:
        said = str(error)
    print(f"{parser.prog} {options.command}: {' '.join(said.split())}", file=sys.stderr)
    return 2


def _add_model(parser: Parser, returned: str) -> None:
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help=f"a function that returns {returned}; the current folder is searched first; by "
        f"default a small model with random weights",
    )
    parser.add_argument("--without-hook", action="store_true", help="leave the model as it is")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text}")
    return int(text)


@contextlib.contextmanager
def _silent_megatron():
    """Without Megatron's remarks on what is not installed, which bury what we have to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _parity(options) -> int:
    tiny = _room_with_models(options)
    from . import parity
    from .megatron.hook import install

    failed = False
    with tiny.megatron():
        if options.model:
            model, samples = _build(options.model)
            batches = [samples]
        else:
            model = tiny.llava_model()
            batches = [tiny.samples(count) for count in options.samples or (1, 4, 16)]
        for samples in batches:
            alone = []
            for index, sample in enumerate(samples):
                with _model_runs(f"sample {index} alone: "):
                    alone += parity.run_alone(model, [sample])
            hook = contextlib.nullcontext()
            if not options.without_hook:
                hook = install(model, space="collapsed")
            try:
                with hook, _model_runs():
                    result = parity.compare(model, samples, alone)
            except ModelError as error:
                if not options.without_hook:
                    raise
                print(f"{len(samples)} samples: {error}")
                failed = True
                continue
            print(result, flush=True)
            failed |= result.verdict == "wrong"
            if options.threshold is not None:
                failed |= not result.token_mult_prob_error <= options.threshold  # nan fails too
    if failed:
        above = "" if options.threshold is None else f", or above {options.threshold}"
        print(f"FAILED: wrong{above}", file=sys.stderr)
    return int(failed)


def _isolate(options) -> int:
    tiny = _room_with_models(options)
    from . import data, parity
    from .megatron.find import find_llavas
    from .megatron.hook import hook_of, install
    from .megatron.spec import row_spec

    with tiny.megatron():
        trials = [(tiny.llava_model(), tiny.samples(n), None) for n in options.samples or (6,)]
        if options.model:
            trials = [_build(options.model, with_step=True)]
        found = []
        for model, row, step in trials:
            hook = contextlib.nullcontext()
            is_bare = step is None and hook_of(find_llavas(model)[0]) is None
            if is_bare and not options.without_hook:
                hook = install(model)
            if not isinstance(row, data.Row):
                row = data.get_packer("concatenative", row_spec(model)).join(row)
            with hook, _model_runs():
                found.append(parity.isolation(model, row, step, exhaustive=options.exhaustive))
            print(found[-1], flush=True)
    if any(result.verdict == "wrong" for result in found):
        print("FAILED: samples see each other", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _model_runs(where: str = ""):
    """Makes one line of whatever a user's model raises, or a user's step."""
    try:
        yield
    except PackingError as error:
        raise UserError(f"{where}{error}") from error
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        raise ModelError(f"{where}the model raises {type(error).__name__}: {said}") from error


def _room_with_models(options):
    """``testing.tiny``, which needs Megatron."""
    if options.model and options.samples:
        raise UserError("--samples is for the small model; the function of --model brings its own")
    try:
        from .testing import tiny
    except ImportError as error:
        raise UserError(f"it needs megatron-core ({error}): pip install megatron-core") from error
    return tiny


def _build(name: str, with_step: bool = False) -> tuple:
    """The model and the samples that ``MODULE:FUNCTION`` returns; or ``with_step`` what
    ``parity.isolation`` takes, the step being None where there is none."""
    from .megatron.find import find_llava

    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"--model {name}: expected MODULE:FUNCTION, for example my_module:build")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)()
    except Exception as error:  # theirs, whatever it is: say where
        place = traceback.extract_tb(error.__traceback__)[-1]
        theirs = Path(place.filename).is_file() and place.filename != __file__
        where = f" ({Path(place.filename).name}, line {place.lineno})" if theirs else ""
        raise UserError(f"--model {name}: {type(error).__name__}: {error}{where}") from error
    if with_step and isinstance(found, tuple) and len(found) == 3:
        return found
    if not isinstance(found, tuple) or len(found) != 2:
        raise UserError(f"--model {name} returned {_kind(found)}, expected (model, samples)")
    model, samples = found
    find_llava(model)
    if not isinstance(samples, list | tuple) or not samples:
        raise UserError(f"--model {name}: samples is {_kind(samples)}, expected a list of samples")
    for index, sample in enumerate(samples):
        if not isinstance(sample, dict) or not isinstance(sample.get("input_ids"), torch.Tensor):
            raise UserError(
                f"--model {name}: sample {index} is {_kind(sample)}, expected a dict with a tensor "
                f"input_ids, see mcore_packing.parity.compare"
            )
    return (model, samples, None) if with_step else (model, samples)


def _kind(value) -> str:
    """What was found in place of something else: "a dict with x, y", "empty", "None"."""
    if isinstance(value, dict | list | tuple) and not value:
        return "empty"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, value))}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _doctor(options) -> int:
    lines = doctor()
    width = max(map(len, lines))
    for name, finding in lines.items():
        print(f"{name:{width}}  {finding}")
    return 0


def doctor() -> dict[str, str]:
    """What this machine has, and what that means for packed rows."""
    lines = {"python": platform.python_version(), "mcore-packing": __version__}
    lines |= {"torch": torch.__version__, "triton": _package("triton")}
    lines |= _megatron()
    lines |= {name: _package(name) for name in ("transformer-engine", "matplotlib")}
    lines["GPU"] = "none" if torch.version.cuda else "none, and this torch is built without CUDA"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        lines["GPU"] = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    with _silent_megatron():
        lines["small model"] = _said_by("testing.tiny", "attention_name")
        lines["LLaVAModel"] = _said_by("megatron.releases", "describe")
    return lines


def _package(name: str) -> str:
    """A version as pip recorded it, if the package is really there."""
    module, recorded = MODULES.get(name, name), _recorded(name)
    if _spec(module) is None:
        return f"not installed: {WITHOUT[name]}"
    return recorded or "found, without a record of its version"


def _megatron() -> dict[str, str]:
    """What is found by its files: a checkout on the path goes before what pip recorded."""
    spec, recorded = _spec("megatron.core"), _recorded("megatron-core")
    if spec is None or not spec.submodule_search_locations:
        return {"megatron-core": f"not installed: {WITHOUT['megatron-core']}"}
    folder = Path(next(iter(spec.submodule_search_locations)))
    try:
        version = runpy.run_path(str(folder / "package_info.py"))["__version__"]
    except (OSError, KeyError):
        version = "unknown version"
    differs = f"; pip recorded {recorded}" if recorded not in (None, version) else ""
    return {"megatron-core": version + differs, "found in": str(folder)}


def _spec(module: str):
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _recorded(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said_by(room: str, function: str) -> str:
    """What a room that needs Megatron says, or why it cannot be imported."""
    try:
        return getattr(importlib.import_module(f"mcore_packing.{room}"), function)()
    except Exception as error:  # a broken Megatron raises anything
        return f"unknown, {type(error).__name__}: {' '.join(str(error).split())}"


def _show(options) -> int:
    name = options.row or "the example"
    if options.row and _is_saved(options.row):
        if options.space:
            raise UserError(f"--space is for rows in JSON; {name} has its layout with it")
        row = _load(options.row)
        layout, given = row.layout, f"{row}, samples {list(row.indices)}"
    else:
        row = _read(options.row) if options.row else EXAMPLE
        layout, given = _lay_out(row, name, options.space)
    output = Path(options.output)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise UserError(f"--output {output}: that is a folder, expected a file such as row.png")
    if layout.num_seqs > MOST_SEQUENCES or layout.num_expanded > MOST_POSITIONS:
        raise UserError(
            f"{name}: {layout.num_seqs} sequences and {layout.num_expanded} positions are too much "
            f"to draw, expected at most {MOST_SEQUENCES} and {MOST_POSITIONS}"
        )
    try:
        from .plot import draw_row
    except ModuleNotFoundError as error:
        raise UserError(f"it needs {error.name}: pip install {error.name}") from error
    try:
        draw_row(layout, output)
    except ValueError as error:  # matplotlib's, about the suffix
        raise UserError(f"--output {output}: {error}") from error
    real, padded = layout.cu_seqlens_expanded, layout.cu_seqlens_padded[:-1]
    is_padded = real.tolist() != padded.tolist()
    longest = int(real.diff().max())
    print(
        f"given      {given}\n"
        f"collapsed  {layout.num_collapsed} tokens, "
        f"cu_seqlens {layout.cu_seqlens_collapsed.tolist()}\n"
        f"expanded   {layout.num_expanded} positions, "
        f"cu_seqlens {real.tolist()}, longest sequence {longest}\n"
        + (f"padded     cu_seqlens {padded.tolist()}\n" if is_padded else "")
        + f"wrote {output}"
    )
    return 0


def _lay_out(row: dict, name: str, space: str | None) -> tuple[PackedLayout, str]:
    """The layout of a row in JSON, and what was given in words."""
    ids = _integers(row, "input_ids", torch.int64, name)
    cu_seqlens = _integers(row, "cu_seqlens", torch.int32, name)
    counts, image_token_id = _tokens_per_image(row, name), row.get("image_token_id", -200)
    spec = RowSpec(image_token_id=image_token_id)
    space, said = space or row.get("space"), "as said"
    if space is None:
        found = find_space(ids, cu_seqlens, counts, image_token_id)
        space, said = (
            found or "collapsed",
            "found to be" if found else "or expanded, which is the same,",
        )
    layout = PackedLayout.build(ids, cu_seqlens, counts, spec, space=space)
    counts = layout.cu_image_embeddings.diff().tolist()
    return layout, (
        f"cu_seqlens {row['cu_seqlens']} ({said} {space}), "
        f"tokens_per_image {counts}, image_token_id {image_token_id}"
    )


def _tokens_per_image(row: dict, name: str):
    """Positions of each image, which are no tiles."""
    counts = row["tokens_per_image"]
    for image, count in enumerate(counts if isinstance(counts, list) else []):
        if type(count) is int and 0 < count < FEWEST:
            raise UserError(
                f"{name}: tokens_per_image {counts} makes image {image} {count} positions long; if "
                f"these are tiles, multiply by what a tile becomes (img_seq_len of mp.row_spec)"
            )
    return counts


def _is_saved(path: str) -> bool:
    """Whether ``torch.save`` wrote this file: a zip archive."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _load(path: str):
    """A row that was saved; nothing in the file is run."""
    from . import data
    from .data.samples import Member

    parts = [data.Row, Member, RowSpec, _rebuild]
    try:
        with torch.serialization.safe_globals(parts):
            row = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an archive of anything
        said = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {said[1]}, which is no part of a row" if said else "cannot be read"
        raise UserError(f"{path} {what}; expected a mp.data.Row that torch.save wrote") from error
    if not isinstance(row, data.Row):
        raise UserError(f"{path} holds {_kind(row)}, expected a mp.data.Row")
    return row


def _read(path: str) -> dict:
    """A row from a JSON file."""
    try:
        row = json.loads(Path(path).read_text())
    except ValueError as error:  # broken JSON, or no text at all
        raise UserError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: its lists lie too deep in each other") from error
    if not isinstance(row, dict):
        raise UserError(f"{path} is no object with {', '.join(REQUIRED)}")
    if missing := [key for key in REQUIRED if key not in row]:
        raise UserError(f"{path} has no {', '.join(missing)}")
    if unknown := [key for key in row if key not in REQUIRED + OPTIONAL]:
        raise UserError(
            f"{path}: {', '.join(unknown)} is no key of a row; it takes "
            f"{', '.join(REQUIRED + OPTIONAL)}"
        )
    return row


def _integers(row: dict, key: str, dtype: torch.dtype, name: str) -> torch.Tensor:
    values = row[key]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{name}: {key} is not a list of whole numbers")
    if not values:
        raise UserError(f"{name}: {key} is empty; there is nothing to draw")
    limits = torch.iinfo(dtype)
    if outside := [value for value in values if not limits.min <= value <= limits.max]:
        raise UserError(f"{name}: {key} holds {outside[0]}, more than {dtype} can count")
    return torch.tensor(values, dtype=dtype)


if __name__ == "__main__":
    sys.exit(main())
