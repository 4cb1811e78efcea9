"""Steps of a small network on a CPU, of this tree against another one: training and sampling, in pairs.

    git worktree add --detach /tmp/before COMMIT
    python -m benchmarks.step_cpu --against /tmp/before [--pairs N] [--threads T]
    python -m benchmarks.step_cpu --compiled        with compiled blocks, against this tree without

A process of each tree does the same work in turn, one after the other, and which comes first alternates. The figures are ratios
of processor time, medians over pairs: other work on the machine slows both sides alike.

Both sides take the network and data of this tree's configs/model/emoji32.yaml and configs/data/emoji32.yaml.
Training: a step of both modalities, 32 samples, on one rank. "quickstart": 16 samples in micro-batches of 8, and
patches of 8, as in the quickstart. "wide": 2 samples through 61 M parameters, so that the optimizer's share is large; bf16 is
ten times as slow on a CPU without units for it, and the results say whether this one has them.
Sampling: 8 samples in 5 steps, guidance 2; one modality given the other, or both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megadiff.config.schema import Run

COMPILED = ("train zero0", "quickstart zero0", "quickstart zero2")
TRAINING = (*COMPILED, "train zero1", "train zero3", "wide zero1", "wide zero1 bf16")
SAMPLING = ("text to image", "image to text", "joint")
WORK = (*TRAINING, *SAMPLING)
RESULTS = Path(__file__).parent / "results/step_cpu.json"
COMPILED_RESULTS = RESULTS.with_name("step_cpu_compiled.json")
WARM_UP = 2
SAMPLES = 8
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUN = """
base: [CONFIGS/model/emoji32.yaml, CONFIGS/data/emoji32.yaml]
name: step
folder: unused
stages:
  - name: joint
    steps: 1
    batch: {global_samples: 32, micro_batch: 32}
    optimizer: {learning_rate: 1.0e-3}
    ema: {main: {kind: constant, decay: 0.99}}
    modalities:
      text: {conditioning: {clean: 0.3, absent: 0.1}}
      image: {times: {kind: logit_normal}, conditioning: {clean: 0.15, absent: 0.05}}
""".replace("CONFIGS", str(CONFIGS))
QUICKSTART = (
    RUN.replace("{global_samples: 32, micro_batch: 32}", "{global_samples: 16, micro_batch: 8}")
    + """
model: {modalities: {image: {space: {patch: 8}, process: {target: clean}}}}
"""
)
WIDE = (
    RUN.replace("{global_samples: 32, micro_batch: 32}", "{global_samples: 2, micro_batch: 2}")
    + """
data: {lanes: 1}
model:
  width: 512
  heads: 8
  head_dim: 64
  modalities: {text: {tower_depth: 2}, image: {tower_depth: 2}}
"""
)
SHAPES = {"train": RUN, "quickstart": QUICKSTART, "wide": WIDE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--compiled", action="store_true", help="compare compiled blocks with the same tree's without")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=WORK)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        answer(arguments.work, compiled=arguments.compiled)
        return
    if (arguments.against is None) != arguments.compiled:
        parser.error("give either --against or --compiled")
    this = Path(__file__).resolve().parents[1]
    other, results = (this, COMPILED_RESULTS) if arguments.compiled else (arguments.against.resolve(), RESULTS)
    rows = []
    for work in arguments.only or ((*COMPILED, *SAMPLING) if arguments.compiled else WORK):
        sides = {
            "this": Side(work, this, arguments.threads, compiled=arguments.compiled),
            "other": Side(work, other, arguments.threads),
        }
        rows.append(compared(work, sides, arguments.pairs))
        print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else str(value) for name, value in rows[-1].items()))
    (arguments.json or results).write_text(
        json.dumps({"threads": arguments.threads, "bf16_units": bf16_units(), "work": rows}, indent=1) + "\n", encoding="utf-8"
    )


def bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return any(flag in Path("/proc/cpuinfo").read_text(encoding="utf-8") for flag in ("avx512_bf16", "amx_bf16"))


def compared(work: str, sides: dict[str, Side], pairs: int) -> dict[str, float | str]:
    """Medians over pairs; the ratio is other / this: above 1, this is faster. `first_s` is by the clock."""
    sides["this"].once()
    first = sides["this"].wall
    ratios, seconds = [], []
    for number in range(WARM_UP + pairs):
        taken = {name: sides[name].once() for name in (sides if number % 2 else reversed(sides))}
        if number >= WARM_UP:
            ratios.append(taken["other"] / taken["this"])
            seconds.append(taken["this"])
    for side in sides.values():
        side.close()
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = {"ratio": middle, "quartile_1": low, "quartile_3": high}
    return {"what": work, **spread, "cpu_ms": 1000 * statistics.median(seconds), "first_s": first}


class Side:
    """A process that does one piece of work with the code of one tree, as often as it is asked.

    Attributes:
        wall: seconds that the last time took by the clock.
    """

    def __init__(self, work: str, tree: Path, threads: int, *, compiled: bool = False) -> None:
        self.wall = math.nan
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", work, *(["--compiled"] if compiled else [])],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def once(self) -> float:
        """Seconds of processor time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                taken, self.wall = map(float, line.split()[1:])
                return taken
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def answer(work: str, *, compiled: bool) -> None:
    """Do the work once for every line of the standard input, and say how long it took."""
    if work in SAMPLING:
        once = sampling(read(RUN), work, compiled=compiled)
    else:
        shape, layout, *precision = work.split()
        overrides = [*(f"stages.*.precision={each}" for each in precision), *(["stages.*.compile=true"] if compiled else [])]
        once = training(read(SHAPES[shape], overrides), layout)
    for _ in sys.stdin:
        began, clock = time.process_time(), time.monotonic()
        once()
        print(f"seconds {time.process_time() - began} {time.monotonic() - clock}", flush=True)


def read(text: str, overrides: Sequence[str] = ()) -> Run:
    from megadiff.config.load import load_run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run(path, overrides)


def training(run: Run, layout: str) -> Callable[[], object]:
    from megadiff.config.deepspeed import load_deepspeed
    from megadiff.data.reading.loader import Loader
    from megadiff.diffusion.objective import DiffusionObjective
    from megadiff.distributed.ranks import Ranks
    from megadiff.engine.build import build_engine

    stage, batch = run.stages[-1], run.stages[-1].batch
    deepspeed = load_deepspeed(f"ds_configs/{layout}.json")
    engine = build_engine(run.model, stage, deepspeed, seed=0, ranks=Ranks.from_environment())
    objective = DiffusionObjective(run.model, stage, 0)
    loader = Loader(run.data, run.model, seed=0, global_samples=batch.global_samples, micro_batch=batch.micro_batch)
    batches = loader.take()
    return lambda: engine.step(batches, objective)


def sampling(run: Run, task: str, *, compiled: bool) -> Callable[[], object]:
    import torch

    from megadiff import rng
    from megadiff.config.schema import Sampling
    from megadiff.data.reading.loader import Loader
    from megadiff.diffusion.sampler import Conditions, Sampler
    from megadiff.models.mmdit import build_model

    states = Loader(run.data, run.model, seed=0, global_samples=SAMPLES, micro_batch=SAMPLES).take()[0].states
    generate = {"text to image": ["image"], "image to text": ["text"], "joint": ["text", "image"]}[task]
    conditions = Conditions(given={name: state for name, state in states.items() if name not in generate})
    sampler, model = Sampler(run.model, Sampling(steps=5, guidance=2.0)), build_model(run.model, ["text", "image"]).eval()
    if compiled:
        from megadiff.models.compiling import compile_for_sampling

        compile_for_sampling(model)
    keys = rng.sample_keys(0, torch.arange(SAMPLES))

    def once() -> object:
        with torch.no_grad():
            return sampler.sample(model, keys, generate=generate, conditions=conditions)

    return once


if __name__ == "__main__":
    main()
