"""A trace of some steps: where the time of a step goes, by phase and by operation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megadiff.config.errors import UserError
from megadiff.config.schema import Run, Stage
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.distributed.ranks import Ranks
from megadiff.engine.api import BACKWARD, EMA, FORWARD, NOISE, OPTIMIZER, REDUCE
from megadiff.engine.build import build_engine
from megadiff.training.loop import loader_of
from megadiff.training.progress import Progress
from megadiff.training.stages import stage_seed
from megadiff.training.trace import DATA, STEP, communication_share, events_of

PHASES = (DATA, NOISE, FORWARD, BACKWARD, REDUCE, OPTIMIZER, EMA)
"""`reduce` lies within `backward`. Pipeline stages have `data`, `noise` and `EMA` alone: their passes interleave."""
SETTLED = 3
"""Steps before the trace: the first ones allocate and compile."""
DEAREST = 10


@dataclass(frozen=True)
class Profile:
    """What a trace says of one rank.

    Attributes:
        step_s: mean seconds of a step.
        communication_share: as `communication_share` has it.
        phases: by name, the share of the time that the host is in that phase.
        operations: (name, calls, seconds on the device, or on a CPU) of the dearest ones, over all traced steps.
    """

    steps: int
    step_s: float
    communication_share: float
    phases: Mapping[str, float]
    operations: list[tuple[str, int, float]]

    def __str__(self) -> str:
        lines = [f"{self.steps} steps of {1000 * self.step_s:.1f} ms"]
        lines += [f"  {name:<10} {100 * share:5.1f} %" for name, share in self.phases.items()]
        lines.append(f"communication: {100 * self.communication_share:.1f} %, as TensorBoard has it")
        lines.append(f"{'the dearest operations':<60} {'calls':>7} {'ms a step':>10}")
        lines += [f"  {name[:58]:<58} {calls:7d} {1000 * s / self.steps:10.2f}" for name, calls, s in self.operations]
        return "\n".join(lines)


def profile_stage(run: Run, stage: Stage, deepspeed: Mapping[str, Any], steps: int, out: Path) -> Profile:
    """Train a fresh network for some steps; nothing is saved. Runs on every rank.

    Rank 0 writes `out`/trace.json.gz, for Perfetto or chrome://tracing, and on a GPU `out`/memory.pickle, for
    https://pytorch.org/memory_viz.

    Raises:
        UserError: the configuration or the data is at fault, or `out` cannot be written.
    """
    ranks, seed = Ranks.from_environment(), stage_seed(run, stage)
    engine = build_engine(run.model, stage, deepspeed, seed=seed, ranks=ranks)
    objective = DiffusionObjective(run.model, stage, seed)
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with closing(loader_of(run, stage, engine.layout, seed, Progress())) as loader:

        def step() -> None:
            with record_function(DATA):
                batches = loader.take(engine.device)
            engine.step(batches, objective, loader.sources)

        for _ in range(SETTLED):
            step()
        if on_gpu:
            torch.cuda.memory._record_memory_history()
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                with record_function(STEP):
                    step()
    if ranks.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(out / "trace.json.gz"))
            if on_gpu:
                torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    return _profile_of(profiler, steps, on_gpu)


def _profile_of(profiler: profile, steps: int, on_gpu: bool) -> Profile:
    averages = profiler.key_averages()
    host_s = {one.key: one.cpu_time_total / 1e6 for one in averages if one.key in (STEP, *PHASES)}
    named = [one for one in averages if one.key not in (STEP, *PHASES) and not one.key.startswith("ProfilerStep")]

    def seconds(one: Any) -> float:
        return float(one.self_device_time_total if on_gpu else one.self_cpu_time_total) / 1e6

    dearest = sorted(named, key=seconds, reverse=True)[:DEAREST]
    phases = {name: host_s[name] / host_s[STEP] for name in PHASES if name in host_s}
    assert profiler.profiler is not None
    communication = communication_share(events_of(profiler.profiler.kineto_results), on_gpu=on_gpu)
    return Profile(steps, host_s[STEP] / steps, communication, phases, [(one.key, one.count, seconds(one)) for one in dearest])
