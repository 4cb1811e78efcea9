"""What monitoring adds to a step: the quickstart's last stage on one rank, steps in pairs.

    python -m benchmarks.monitoring [--pairs N] [--samples B ...]

One step of each pair is inspected (norms by place, activations, mask rates) and written to TensorBoard and metrics.jsonl with
all curves, the other is trained alone; which comes first alternates. A run does so every `log_every_steps` (10) steps, and
writes one line in the others. What is added does not grow with the samples: the fewer, the larger its share.

Then a trace of two steps, as every stage keeps one: the processor's seconds that it adds to two steps, writing it included, and
the size of its file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.load import load_run
from megadiff.config.schema.monitoring import Trace
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine
from megadiff.training.loop import loader_of, monitor_of
from megadiff.training.progress import Progress
from megadiff.training.trace import FirstTrace

RESULTS = Path(__file__).parent / "results/monitoring.json"
WARM_UP = 3
TRACED = Trace(after_steps=0, steps=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64])
    arguments = parser.parse_args()
    rows = [measured(samples, arguments.pairs) for samples in arguments.samples]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


def measured(samples: int, pairs: int) -> dict[str, float]:
    """Medians over pairs of steps of that many samples."""
    batch = f"{{global_samples: {samples}, micro_batch: {samples}}}"
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"folder={folder}", f"stages.*.batch={batch}", "stages.*.log_every_steps=1"]
        run = load_run("configs/run/quickstart.yaml", changes)
        stage = run.stages[-1]
        engine = build_engine(run.model, stage, load_deepspeed("ds_configs/zero1.json"), seed=0, ranks=Ranks.from_environment())
        objective = DiffusionObjective(run.model, stage, 0)
        monitor = monitor_of(run, stage, engine, (), print)
        ratios, lines = [], []
        with closing(loader_of(run, stage, engine.layout, 0, Progress())) as loader, closing(monitor):
            taken = 0

            def step(*, watched: bool) -> float:
                nonlocal taken
                batches = loader.take(engine.device)
                began = time.perf_counter()
                result = engine.step(batches, objective, inspect=watched)
                if watched:
                    taken += 1
                    monitor.record(taken, result, data_wait_s=0.0, unreadable=0)
                return time.perf_counter() - began

            for number in range(WARM_UP + pairs):
                order = (True, False) if number % 2 else (False, True)
                seconds = {watched: step(watched=watched) for watched in order}
                if number >= WARM_UP:
                    ratios.append(seconds[True] / seconds[False])
                    lines.append(seconds[False])

            def cpu_s(trace: FirstTrace) -> float:
                began = time.process_time()
                for _ in range(TRACED.steps):
                    with trace.step(taken):
                        step(watched=False)
                return time.process_time() - began

            file = Path(folder) / "trace.json.gz"
            plain_s = cpu_s(FirstTrace(None, monitor, file, engine.device))
            trace_s = cpu_s(FirstTrace(TRACED, monitor, file, engine.device)) - plain_s
            trace_bytes = file.stat().st_size
    share = statistics.median(ratios) - 1
    return {
        "samples": samples,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "step_ms": 1000 * statistics.median(lines),
        "a_watched_step_adds_percent": 100 * share,
        "every_10_steps_percent": 10 * share,
        "trace_s": trace_s,
        "trace_bytes": trace_bytes,
    }


if __name__ == "__main__":
    main()
