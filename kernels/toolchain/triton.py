"""Compile kernels ahead of time, without a GPU, and read what the compiler made.

`python -m megadiff.kernels.toolchain.triton [--op NAME ...] [--arch 80 90] [--usual]` prints a JSON object per kernel and
configuration. TRITON_INTERPRET must not be set: Triton reads it where a kernel is defined.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megadiff.kernels import toolchain

ARCHITECTURES = (80, 90)
_INSTRUCTIONS = {
    "spill_stores": r"\bSTL\b",
    "spill_loads": r"\bLDL\b",
    "wgmma": r"\bHGMMA\b",
    "mma": r"\bHMMA\b",
    "tma_loads": r"\bUTMALDG\b",
    "tma_stores": r"\bUTMASTG\b",
}


class Variant(NamedTuple):
    """A kernel with one of its configurations. `variants()` of an op's triton.py lists all that it ships.

    Attributes:
        name: "op.kernel", then what of shape and dtype matters, and the GPU of a measured entry.
        kernel: the @triton.jit function.
        signature: types of arguments that are not compile-time constants ("*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>").
        constants: values of compile-time constants, by name; None for absent pointers.
        options: num_warps, num_stages, maxnreg.
        architecture: 80, 90.
        usual: of the shapes and the dtype that most runs have: compiled in `make test`, the rest in `make test-all`.
        product: has matrix products, which must run on tensor cores (WGMMA on Hopper).
        tma: loads by TMA.
        unaligned: pointers and integers that are not multiples of 16; the other pointers are, the other integers are not.
        aligned: integers that are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    options: Mapping[str, int]
    architecture: int
    usual: bool = False
    product: bool = False
    tma: bool = False
    unaligned: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()


class Report(NamedTuple):
    """What ptxas made: registers and bytes of stack per thread, bytes of shared memory per block, counts of instructions."""

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    warps: int
    spill_stores: int
    spill_loads: int
    wgmma: int
    mma: int
    tma_loads: int
    tma_stores: int
    product: bool
    tma: bool


def compile_ahead(variant: Variant) -> Report:
    """Compile and count; counts are of `cuobjdump -res-usage` and `-sass`."""
    names = variant.kernel.arg_names
    if missing := [name for name in names if name not in variant.signature and name not in variant.constants]:
        raise ValueError(f"{variant.name}: no type and no constant for {', '.join(missing)}")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    pointers = {name for name, kind in signature.items() if kind.startswith("*")}
    aligned = (pointers - {*variant.unaligned}) | {*variant.aligned}
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=dict(variant.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, assembly = (_cuobjdump(flag, cubin) for flag in ("-res-usage", "-sass"))
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump says nothing of the registers of {variant.name}: {usage}")
    return Report(
        variant.name,
        variant.architecture,
        registers=int(match[1]),
        stack=int(match[2]),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        product=variant.product,
        tma=variant.tma,
        **{name: len(re.findall(pattern, assembly)) for name, pattern in _INSTRUCTIONS.items()},
    )


def _cuobjdump(flag: str, cubin: Path) -> str:
    return subprocess.run([toolchain.binaries() / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout


def ops() -> list[str]:
    """Folders of the ops that have kernels."""
    return sorted(path.parent.name for path in toolchain.ROOM.glob("*/op.py"))


def shipped(op: str) -> list[Variant]:
    """Every kernel of an op with every configuration: defaults, and entries of tuning tables."""
    variants: list[Variant] = importlib.import_module(f"megadiff.kernels.{op}.triton").variants()
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time; print what ptxas made.")
    parser.add_argument("--op", nargs="+", choices=ops(), default=ops())
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--usual", action="store_true", help="only what most runs take")
    arguments = parser.parse_args()
    if (newer := toolchain.newer_assembler()) is not None:
        os.environ[toolchain.PTXAS_VARIABLE] = str(newer)
    for variant in (variant for op in arguments.op for variant in shipped(op)):
        if variant.architecture in arguments.arch and variant.usual >= arguments.usual:
            print(json.dumps(compile_ahead(variant)._asdict()), flush=True)


if __name__ == "__main__":
    main()
