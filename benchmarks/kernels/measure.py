"""What every comparison of an op shares: cases, implementations, and how one is measured."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megadiff.config.gpus import GPUS, Gpu
from megadiff.kernels.agreement import relative_error

F = TypeVar("F", bound=Callable[..., Any])
FORWARD, TRAINING = "forward", "forward + backward"
CACHE_BYTES = 256 * 2**20
"""More than any GPU's L2 cache."""
REPEATS = 30


class Absent(Exception):
    """What this machine lacks for an implementation."""


class Machine(NamedTuple):
    """Where it runs; `toy`: tiny shapes, run once, with no times."""

    device: torch.device
    toy: bool

    @property
    def gpu(self) -> Gpu | None:
        """The data sheet of this GPU, or of none."""
        if self.toy:
            return None
        name = torch.cuda.get_device_name().lower()
        return next((gpu for key, gpu in GPUS.items() if key in name), None)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; float32 in Triton's interpreter, which computes nonsense in bfloat16."""
        return torch.float32 if self.toy else torch.bfloat16

    def needs_gpu(self) -> None:
        """Raises Absent if there is none."""
        if self.device.type != "cuda":
            raise Absent("it runs on GPUs only")

    def compiled(self, function: F) -> F:
        """By torch.compile as users run it; toys go through the same graphs without Inductor."""
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager" if self.toy else "inductor")


class Ready(NamedTuple):
    """An implementation, its arguments, and how to take the error of its first output (None: it has none to take)."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    comparable: bool = True


class Case(NamedTuple):
    """An op on a shape.

    Attributes:
        op, shape: names.
        passes: FORWARD or TRAINING.
        flops: of the op's definition; a backward pass is counted without what an implementation computes anew.
        moved: bytes that have to be read and written at least.
        peers: by name, what gets an implementation ready; raises Absent or ImportError if it cannot run here. The first is the
            reference in float32, whose time is not taken.
    """

    op: str
    shape: str
    passes: str
    flops: float
    moved: float
    peers: Mapping[str, Callable[[], Ready]]


class Row(NamedTuple):
    """One implementation on one case; None where nothing was measured.

    Attributes:
        status: "measured", "ran" (a toy), "absent: why" or "failed: why".
        floor_us: the longer of FLOPs / the sheet's peak and bytes / its bandwidth.
        peak_mib: allocated during a call, over what was there before.
        error: of the first output, relative to the reference's in float32 (root mean square); of ids the share that differs.
    """

    op: str
    shape: str
    passes: str
    implementation: str
    status: str
    microseconds: float | None = None
    tflops_per_s: float | None = None
    tb_per_s: float | None = None
    floor_us: float | None = None
    over_floor: float | None = None
    peak_mib: float | None = None
    error: float | None = None


def rows(case: Case, machine: Machine) -> Iterator[Row]:
    """All implementations of a case, one after another on the same numbers."""
    expected: Tensor | None = None
    for index, (name, get_ready) in enumerate(case.peers.items()):
        torch.manual_seed(0)
        head = case.op, case.shape, case.passes, name
        try:
            ready = get_ready()
            call = _call(ready, case.passes)
            first = tree_leaves(call())[0].detach()
            first = first.float() if first.is_floating_point() else first
            if index == 0:
                expected = first
                continue
            error = relative_error(first, expected) if expected is not None and ready.comparable else None
            del first
            yield Row(*head, "ran", error=error) if machine.toy else _measured(head, case, machine, call, error)
        except (Absent, ImportError, NotImplementedError) as missing:
            yield Row(*head, f"absent: {_line(missing)}")
        except Exception as fault:  # one implementation's failure does not end an hour's run
            yield Row(*head, f"failed: {type(fault).__name__}: {_line(fault)}")
        finally:
            ready = call = None
            gc.collect()


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _call(ready: Ready, passes: str) -> Callable[[], Any]:
    leaves = [leaf for leaf in tree_leaves(ready.arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]

    arriving: list[Tensor] = []

    def call() -> Any:
        with nullcontext() if passes == TRAINING else torch.no_grad():
            outputs = ready.run(*ready.arguments)
        if passes == TRAINING:
            own = [output for output in tree_leaves(outputs) if isinstance(output, Tensor) and output.requires_grad]
            if not arriving:  # made once, so that no call is charged for it
                arriving.extend(map(torch.ones_like, own))
            torch.autograd.grad(own, leaves, arriving)
        return outputs

    return call


def _measured(head: tuple[str, ...], case: Case, machine: Machine, call: Callable[[], Any], error: float | None) -> Row:
    seconds, peak = time_of(call), peak_of(call)
    gpu = machine.gpu
    floor = None if gpu is None else max(case.flops / gpu.bf16_flops, case.moved / gpu.memory_bandwidth)
    return Row(
        *head, "measured", 1e6 * seconds, case.flops / seconds / 1e12, case.moved / seconds / 1e12,
        None if floor is None else 1e6 * floor, None if floor is None else seconds / floor, peak / 2**20, error,
    )  # fmt: skip


def time_of(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of the GPU's own clock, with an empty L2 cache."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for began, ended in pairs:
        cache.zero_()
        began.record()
        call()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in pairs) / 1e3


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes allocated at most during a call, beyond those before it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
