"""Which Triton and which assembler make the kernels of this process, and where they must not run.

Triton 3.6 and 3.7 assemble code for Hopper with ptxas 12.8, which gives wrong numbers for some kernels whose WGMMA takes its
first operand from registers (two products of attention are of that kind); 13.1 does not (triton issue 11366,
flash-linear-attention pull request 1262). Triton's wheel holds 13.1 too, named after the GPUs that it was added for. What it
makes needs a driver of CUDA 13.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Version = tuple[int, ...]

TRITON_RANGE: tuple[Version, Version] = ((3, 6), (3, 8))
"""Validated versions: from the first up to, and without, the second."""
OLDEST_CAPABILITY = (8, 0)
"""Tensor cores for bfloat16, asynchronous copies."""
HOPPER = 9
HOPPER_PTXAS: Version = (13, 1)
NEWER_PTXAS_DRIVER = 13000
"""The least value of cuDriverGetVersion for code of ptxas 13."""
PTXAS_VARIABLE, INTERPRETER_VARIABLE = "TRITON_PTXAS_PATH", "TRITON_INTERPRET"
ROOM = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Toolchain(NamedTuple):
    """Versions as text; empty where there is none."""

    triton: str
    ptxas: str


def fault() -> str | None:
    """Why no kernel can run in this process, or None; names the right ptxas to Triton, so it comes before Triton compiles."""
    if not _triton_version():
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return f"there is no NVIDIA GPU; on a CPU kernels run in Triton's interpreter only ({INTERPRETER_VARIABLE}=1)"
    choose_assembler()
    return refusal(torch.cuda.get_device_capability(), toolchain())


def unfit(tensor: Tensor) -> str | None:
    """Why the kernels of this process cannot take a tensor of this device and dtype, or None."""
    device = "cpu" if interpreted() else "cuda"
    if tensor.device.type != device:
        return f"the tensors are on {tensor.device.type}, kernels run on {device}"
    if tensor.dtype not in DTYPES:
        return f"there are no kernels for {tensor.dtype}"
    if interpreted() and tensor.dtype == torch.bfloat16:
        return "Triton's interpreter computes nonsense in bfloat16"
    return None


def autocast(tensor: Tensor) -> Tensor:
    """In the dtype that autocast wants of matrix products, if it is on."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def no_gradients(columns: Sequence[Sequence[Tensor | None]]) -> list[list[None] | None]:
    """What an operator's backward pass gives for lists without gradients: a None per tensor or, if not all are tensors, one."""
    return [None if any(tensor is None for tensor in column) else [None] * len(column) for column in columns]


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get(INTERPRETER_VARIABLE, "") == "1"


def refusal(capability: tuple[int, int], tools: Toolchain) -> str | None:
    """Why kernels that `tools` make must not run on a GPU of this compute capability, or None."""
    first, beyond = TRITON_RANGE
    if not first <= numbers(tools.triton)[:2] < beyond:
        return f"triton {tools.triton} is not a validated version ({_text(first)} up to, and without, {_text(beyond)})"
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {_text(capability)} is below {_text(OLDEST_CAPABILITY)}"
    if capability[0] == HOPPER and numbers(tools.ptxas)[:2] < HOPPER_PTXAS:
        return (
            f"ptxas {tools.ptxas or 'of unknown version'} makes wrong code for Hopper; it takes {_text(HOPPER_PTXAS)} or newer "
            f"({PTXAS_VARIABLE}), and a driver of CUDA 13 (r580) to run its code"
        )
    return None


def choose_assembler() -> None:
    """Name the newer ptxas to Triton if the driver runs its code and the user named none."""
    newer = newer_assembler()
    if newer is not None and PTXAS_VARIABLE not in os.environ and driver_version() >= NEWER_PTXAS_DRIVER:
        os.environ[PTXAS_VARIABLE] = str(newer)


def newer_assembler() -> Path | None:
    """The newest ptxas in Triton's wheel."""
    path = binaries() / "ptxas-blackwell"
    return path if path.exists() else None


def binaries() -> Path:
    """The folder of NVIDIA's tools in Triton's wheel; Triton is not imported."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("triton is not installed")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"


@lru_cache(maxsize=1)
def driver_version() -> int:
    """The newest CUDA that the driver runs, as 1000 x major + 10 x minor; 0 without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def toolchain() -> Toolchain:
    """What compiles for this process."""
    named = os.environ.get(PTXAS_VARIABLE)
    return Toolchain(_triton_version(), _ptxas_version(named or str(binaries() / "ptxas")))


@lru_cache(maxsize=1)
def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


@lru_cache(maxsize=8)
def _ptxas_version(path: str) -> str:
    """Such as "13.1.80"; empty if it does not run."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    match = re.search(r"\bV(\d+(?:\.\d+)+)", answer)
    return match[1] if match else ""


def numbers(version: str) -> Version:
    """ "3.7.1+git" -> (3, 7, 1); empty -> ()."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _text(version: Version) -> str:
    return ".".join(map(str, version))
