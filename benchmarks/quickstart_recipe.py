"""What decided the quickstart's recipe: how soon the loss of a picture depends on its caption.

    python -m benchmarks.quickstart_recipe [--steps N] [--only RECIPE ...]

Stage 1 of the quickstart on one rank, as it is and with one thing changed. In the end, by the averaged weights: the mean
squared error of pictures that were trained on (seen) and of held-out ones, noised to t, given their own captions and the next
pair's. They part where captions are read. All recipes predict the clean picture, so that their losses compare.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.load import load_run
from megadiff.data.reading.loader import read_held_out
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.conditional import losses_at
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.diffusion.process import Process
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine
from megadiff.training.loop import loader_of
from megadiff.training.progress import Progress
from megadiff.types import Denoiser

RESULTS = Path(__file__).parent / "results/quickstart_recipe.json"
STAGE = "stages.noisy_text_to_image"
RECIPES = {
    "as it is": (),
    "times around 0.5": (f"{STAGE}.modalities.image.times.location=0.0",),
    "30 % of captions given": (f"{STAGE}.modalities.text.conditioning={{clean: 0.3, absent: 0.1}}",),
    "a third of the learning rate": (f"{STAGE}.optimizer.learning_rate=1.0e-3",),
    "patches of 4": ("model.modalities.image.space.patch=4",),
    "all 1,418 pairs": ("data.train=examples/emoji32/train/manifest.json",),
}
TIMES = (0.5, 0.9)
PAIRS, SEED = 64, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        rows.append({"recipe": name, "steps": arguments.steps, **measured(RECIPES[name], arguments.steps)})
        print(
            "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in rows[-1].items()),
            flush=True,
        )
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measured(changes: tuple[str, ...], steps: int) -> dict[str, float]:
    """Losses by pairs, time and whose caption is given, and milliseconds of the processor per step."""
    run = load_run("configs/run/quickstart.yaml", [*changes, f"{STAGE}.steps={steps}", f"{STAGE}.batch.micro_batch=16"])
    stage = run.stages[0]
    engine = build_engine(run.model, stage, load_deepspeed("ds_configs/zero0.json"), seed=0, ranks=Ranks.from_environment())
    objective = DiffusionObjective(run.model, stage, 0)
    began = time.process_time()
    with closing(loader_of(run, stage, engine.layout, 0, Progress())) as loader:
        for _ in range(steps):
            engine.step(loader.take(engine.device), objective)
    found = {"cpu_ms_per_step": 1000 * (time.process_time() - began) / steps}
    sources = {"seen": next(iter(run.data.sources.values())), "held-out": run.data.reference}
    with engine.denoiser() as denoiser, torch.no_grad():
        for pairs, source in sources.items():
            own = read_held_out(source, run.data, run.model, PAIRS).states
            for whose, states in (("own", own), ("another's", {**own, "text": own["text"].roll(-1, 0)})):
                for at in TIMES:
                    found[f"{pairs} t {at} {whose}"] = error(denoiser, build_processes(run.model), states, at)
    return found


def error(denoiser: Denoiser, processes: Mapping[str, Process], states: Mapping[str, Tensor], at: float) -> float:
    """The mean squared error of pictures at one time, given captions."""
    keys = rng.sample_keys(SEED, torch.arange(PAIRS))[None]
    times = torch.full((1, PAIRS), at)
    losses = losses_at(denoiser, processes, states, times, keys, target="image", given=["text"], rows=PAIRS)
    return float((losses.sums / losses.counts).mean())


if __name__ == "__main__":
    main()
