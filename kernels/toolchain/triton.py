"""Compile kernels ahead of time, without a GPU, and read what the compiler made.

`python -m megadiff.kernels.toolchain.triton [--op NAME ...] [--arch 80 90] [--usual]` prints a JSON object per kernel that the
cases of an op launch. TRITON_INTERPRET must not be set: Triton reads it where a kernel is defined.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from megadiff.kernels import toolchain, tuning
from megadiff.kernels.tuning import Target

DEFAULT_TARGETS = (Target(80), Target(90))
_INSTRUCTIONS = {
    "spill_stores": r"\bSTL\b",
    "spill_loads": r"\bLDL\b",
    "wgmma": r"\bHGMMA\b",
    "mma": r"\bHMMA\b",
    "tma_loads": r"\bUTMALDG\b",
}
_PRODUCT_OF_16_BITS = re.compile(r"tt\.dot .*: tensor<[\dx]+x(?:bf16|f16)")


class Case(NamedTuple):
    """What an op's `cases()` yields: one way to launch its kernels.

    Attributes:
        name: what of shape and dtype matters.
        launch: calls the op's launchers with random tensors on a device ("meta": for shapes alone); gives what they fill.
        usual: of the shapes and the dtype that most runs have: compiled in `make test`, the rest in `make test-all`.
    """

    name: str
    launch: Callable[[torch.device], Any]
    usual: bool = False


def texts(samples: int, longest: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """For cases: int32 [B] lengths from 0 to the longest, int32 [B] starts of packed rows, the number of rows."""
    numbers = [index * 41 % (longest + 1) for index in range(samples)]
    starts = [sum(numbers[:index]) for index in range(samples)]
    lengths, firsts = (torch.tensor(column, dtype=torch.int32, device=device) for column in (numbers, starts))
    return lengths, firsts, sum(numbers)


class Launch(NamedTuple):
    """A kernel's launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    grid: tuple[int, ...]

    def make(self) -> None:
        self.kernel.run(*self.arguments, grid=self.grid, warmup=False, **self.keywords)


class Report(NamedTuple):
    """What the compiler made of a launch.

    Attributes:
        name: op, case, kernel and, of a measured configuration, GPU.
        architecture: 80, 90, ...
        registers, stack: per thread; bytes of the stack.
        shared: bytes per block.
        product: whether it multiplies matrices of 16 bits, which must run on tensor cores (WGMMA on Hopper, else MMA).
        descriptors: whether it takes tensor descriptors, so that it must load by TMA on Hopper.
        spill_stores, spill_loads, wgmma, mma, tma_loads: numbers of instructions.
    """

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    warps: int
    product: bool
    descriptors: bool
    spill_stores: int
    spill_loads: int
    wgmma: int
    mma: int
    tma_loads: int


@contextmanager
def recording(run: bool) -> Iterator[list[Launch]]:
    """The launches in the block, which are made if `run`."""
    launches: list[Launch] = []
    classes = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def record(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(kernel, arguments, keywords, grid))
        if run:
            classes[type(kernel)](kernel, *arguments, grid=grid, warmup=warmup, **keywords)

    for kind in classes:
        kind.run = record
    try:
        yield launches
    finally:
        for kind, own in classes.items():
            kind.run = own


def recorded(case: Case, target: Target) -> list[Launch]:
    """The launches of a case, with the configurations of a target; nothing runs."""
    with tuning.assumed(target), recording(run=False) as launches:
        case.launch(torch.device("meta"))
    return launches


def compile_ahead(launch: Launch, name: str, architecture: int) -> Report:
    """Compile as Triton would for this launch; counts are of `cuobjdump -res-usage` and `-sass`."""
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    keywords = {"debug": False, "instrumentation_mode": "", **launch.keywords}
    bound, specialization, options = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = launch.kernel._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, assembly = (_cuobjdump(flag, cubin) for flag in ("-res-usage", "-sass"))
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump says nothing of the registers of {name}: {usage}")
    return Report(
        name,
        architecture,
        registers=int(match[1]),
        stack=int(match[2]),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        product=bool(_PRODUCT_OF_16_BITS.search(kernel.asm["ttir"])),
        descriptors="tensordesc" in str(signature),
        **{name: len(re.findall(pattern, assembly)) for name, pattern in _INSTRUCTIONS.items()},
    )


def _cuobjdump(flag: str, cubin: Path) -> str:
    return subprocess.run([toolchain.binaries() / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout


def ops() -> list[str]:
    """Folders of the ops that have kernels."""
    return sorted(
        path.parent.name for path in toolchain.ROOM.glob("*/triton.py") if path.parent.name not in ("toolchain", "tuning")
    )


def reports(op: str, architectures: tuple[int, ...], usual: bool) -> Iterator[Report]:
    """Of an op's cases with every configuration: defaults, and those of tuning tables."""
    measured = {Target(entry.architecture, entry.gpu) for entry in tuning.entries() if entry.kernel.startswith(f"{op}.")}
    targets = [target for target in (*DEFAULT_TARGETS, *sorted(measured)) if target.architecture in architectures]
    for case in importlib.import_module(f"megadiff.kernels.{op}.triton").cases():
        for target in targets:
            if case.usual >= usual:
                for launch in recorded(case, target):
                    name = f"{op} {case.name} {launch.kernel.__name__} {target.gpu}".strip()
                    yield compile_ahead(launch, name, target.architecture)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time; print what the compiler made.")
    parser.add_argument("--op", nargs="+", choices=ops(), default=ops())
    parser.add_argument("--arch", nargs="+", type=int, default=[target.architecture for target in DEFAULT_TARGETS])
    parser.add_argument("--usual", action="store_true", help="only what most runs take")
    arguments = parser.parse_args()
    if (newer := toolchain.newer_assembler()) is not None:
        os.environ[toolchain.PTXAS_VARIABLE] = str(newer)
    for op in arguments.op:
        for report in reports(op, tuple(arguments.arch), arguments.usual):
            print(json.dumps(report._asdict()), flush=True)


if __name__ == "__main__":
    main()
