"""The trace that a stage keeps of its first settled steps, and what share of them is communication."""

from __future__ import annotations

import gzip
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler import profile, record_function

from megadiff.config.schema.monitoring import Trace
from megadiff.training.monitor import Monitor

if TYPE_CHECKING:
    from torch._C._autograd import _ProfilerResult

DATA, STEP = "data", "step"
"""Names in traces, beside the phases of engines."""


class FirstTrace:
    """Traces the first settled steps since the ranks were started, unless the stage has the trace of a start before.

    Only the rank of the monitor traces.
    """

    def __init__(self, rule: Trace | None, monitor: Monitor, file: Path, device: torch.device) -> None:
        self._monitor, self._file, self._device = monitor, file, device
        wanted = rule is not None and monitor.active and not file.exists()
        self._steps = range(rule.after_steps + 1, rule.after_steps + rule.steps + 1) if rule and wanted else range(0)
        self._done = self._step = 0
        self._profiler: Any = None  # torch's has no types

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace what is done within, if it is one of the steps."""
        self._done, self._step = self._done + 1, step
        if self._done not in self._steps:
            yield
            return
        if self._profiler is None:
            with self._monitor.paused():
                # Not torch.profiler's, whose start imports the compiler, which takes seconds.
                device = "cuda" if self._device.type == "cuda" else None
                self._profiler = profile(use_cpu=True, use_device=device, use_kineto=True)
                self._profiler.__enter__()
        with record_function(STEP):
            yield
        if self._done == self._steps[-1]:
            with self._monitor.paused():
                self.end()

    def end(self) -> None:
        """End the trace that has begun, with the step before: what follows is no step."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._steps = self._profiler, None, range(0)
        profiler.__exit__(None, None, None)
        self._write(profiler)
        share = communication_share(events_of(profiler.kineto_results), on_gpu=self._device.type == "cuda")
        self._monitor.traced(self._step, share)

    def _write(self, profiler: Any) -> None:
        """A trace is whole, or there is none."""
        plain, packed = (self._file.with_name(f".trace{end}") for end in (".json", ".json.gz"))
        try:
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target)
            plain.unlink()
            packed.replace(self._file)
        except OSError as error:
            self._monitor.say(f"training goes on, but {self._file} cannot be written: {error}")


@dataclass(frozen=True)
class Event:
    """What happened from `start` to `end` (ns): a kernel of the device, or an operation or named range of the host."""

    name: str
    start: int
    end: int
    kernel: bool


def events_of(results: _ProfilerResult | None) -> list[Event]:
    """The events of a trace that count for its communication.

    Args:
        results: a profiler's `kineto_results`; its `events()` makes a tree of them, which takes a minute for a million.
    """
    assert results is not None
    events = []
    for event in results.events():
        name, on_device = event.name(), event.device_type() != DeviceType.CPU
        # Named ranges are repeated on the device, and copies are neither computation nor NCCL's.
        kernel = on_device and not event.is_user_annotation() and not name.startswith(("Memcpy", "Memset"))
        if kernel or (not on_device and (name == STEP or name.startswith("gloo:"))):
            events.append(Event(name, event.start_ns(), event.end_ns(), kernel))
    return events


def communication_share(events: Sequence[Event], *, on_gpu: bool) -> float:
    """The share of the steps' time in which NCCL's kernels run and no others; without a GPU, in which gloo's collectives run.

    It contains waiting for slower ranks. NaN where the profiler could not collect what it takes.
    """
    steps = [event for event in events if event.name == STEP]
    kernels = [event for event in events if event.kernel]
    if not steps or (on_gpu and not kernels):
        return math.nan
    if on_gpu:
        communicating_ns = _covered(kernels) - _covered(event for event in kernels if not event.name.startswith("nccl"))
    else:
        communicating_ns = _covered(event for event in events if event.name.startswith("gloo:"))
    return min(1.0, communicating_ns / (max(step.end for step in steps) - min(step.start for step in steps)))


def _covered(events: Iterable[Event]) -> int:
    """How long (ns) at least one of them lasts."""
    covered = end = 0
    for event in sorted(events, key=lambda event: event.start):
        covered += max(0, event.end - max(event.start, end))
        end = max(end, event.end)
    return covered
