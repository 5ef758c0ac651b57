"""Kernels compiled ahead of time, without a GPU, and the machine code that they became.

``python -m mcore_packing.testing.cubins`` prints a table, with whichever Triton is installed.
"""

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

VARIANTS = {
    "layout": ("layout", "layout_kernel", {"EXPANDED": False}),
    "layout, expanded": ("layout", "layout_kernel", {"EXPANDED": True}),
    "tokens": (
        "expand_tokens", "expand_tokens_kernel", {"HAS_LABELS": True, "HAS_LOSS_MASK": True},
    ),
    "tokens, no loss mask": (
        "expand_tokens", "expand_tokens_kernel", {"HAS_LABELS": True, "HAS_LOSS_MASK": False},
    ),
    "tokens, maps only": (
        "expand_tokens", "expand_tokens_kernel", {"HAS_LABELS": False, "HAS_LOSS_MASK": False},
    ),
    "positions": ("source_positions", "source_positions_kernel", {}),
    **{
        f"vectors, {width} wide": ("copy_vectors", "copy_vectors_kernel", {"width": width})
        for width in (64, 512, 1024, 2048, 4096)
    },
}  # fmt: skip
_KERNELS = "mcore_packing.kernels"
_BLOCKS = {"BLOCK": 256, "BLOCK_T": 4096, "BLOCK_B": 1024}
_TYPES = {
    "*i64": ("input_ids_ptr", "tokens_per_image_ptr", "status_ptr", "labels_ptr", "new_labels_ptr",
             "position_ids_ptr", "token_ids_ptr"),
    "*bf16": ("table_ptr", "images_ptr", "out_ptr", "loss_mask_ptr", "new_loss_mask_ptr"),
}  # fmt: skip


def compiled(variant: str, arch: int):
    """A kernel as Triton compiles it for ``sm_<arch>``: ``.asm["cubin"]``, ``.asm["ptx"]``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, name, constants = VARIANTS[variant]
    kernel = getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)
    if "width" in constants:
        blocks = importlib.import_module(f"{_KERNELS}.copy_vectors").blocks
        constants = dict(zip(("BLOCK_V", "BLOCK_H"), blocks(constants["width"]), strict=True))
    constants = {**_BLOCKS, **constants}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {argument: kind for kind, arguments in _TYPES.items() for argument in arguments}
    signature = {
        argument: types.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr") or argument == "width"
    }
    return compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": 16 if module == "layout" else 4},
    )


@dataclass(frozen=True)
class Code:
    """What a kernel is for the machine.

    Attributes:
        instructions: of SASS.
        loops: instructions of the body of each loop, in their order, outer ones after inner ones.
        barriers: of the CTA.
        stack: bytes of local memory a thread, where registers did not suffice.
        registers: of a thread.
    """

    instructions: int
    loops: tuple[int, ...]
    barriers: int
    stack: int
    registers: int


def disassembled(cubin: bytes) -> Code | None:
    """A cubin's machine code, counted; None where this Triton brings no ``cuobjdump``."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(option: str) -> str:
            command = [tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = output("-res-usage"), output("-sass")
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass, re.M)
    code = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\S* (?:\S+, )?`?\(?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append(sum(int(target[1], 16) <= other <= address for other, _ in code))
    return Code(
        instructions=len(code),
        loops=tuple(loops),
        barriers=sum("BAR.SYNC" in text for _, text in code),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
    )


def main() -> None:
    """Print what every kernel is on an H100."""
    import triton

    print(f"Triton {triton.__version__}, sm_90")
    print(f"{'kernel':22}{'instructions':>13}{'barriers':>9}{'registers':>10}{'stack':>6}  loops")
    for variant in VARIANTS:
        code = disassembled(compiled(variant, 90).asm["cubin"])
        print(
            f"{variant:22}{code.instructions:13}{code.barriers:9}{code.registers:10}{code.stack:6}"
            f"  {', '.join(map(str, code.loops))}"
        )


if __name__ == "__main__":
    main()
