"""One rank that draws samples from a checkpoint through its engine, and saves: what it drew, and how much it held at once.

`draw_all` is for one process without an engine as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from megadiff.config import parameters
from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.layout import Layout
from megadiff.config.layouts import with_sizes
from megadiff.config.load import load_run
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Run, SampleSheets, Sampling, Stage
from megadiff.data.codecs.build import build_codecs
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine
from megadiff.evaluation import periodic
from megadiff.generation.planner import Planner, keys_of
from megadiff.generation.request import GenerateRequest
from megadiff.generation.tasks import draw
from megadiff.types import Denoiser
from megadiff.weights import checkpoint
from megadiff.weights.loading import Loaded
from tests.engine.worker import Gathered

GUIDED = Sampling(steps=4, guidance=2.0)
Drawn = dict[str, dict[str, Tensor]]
"""By task and random key, the states of a sample."""


def draw_all(denoiser: Denoiser, run: Run, stage: Stage, layout: Layout) -> tuple[Drawn, list[str]]:
    """This rank's share of the samples during training, and all of a request's; and the captions of the former's cells."""
    drawn: Drawn = {}

    def watched(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        states = draw(*arguments, **options)
        task, keys = arguments[3:5]
        for index, key in enumerate(keys.tolist()):
            drawn[f"{task.name} {key}"] = {name: state[index] for name, state in states.items()}
        return states

    sheets = periodic.PeriodicSamples(run, stage, SampleSheets(every_steps=1, count=4, sampling=Sampling(steps=4)))
    with patch.object(periodic, "draw", watched):
        cells = [cell for task in sheets.tasks for cell in sheets.cells(denoiser, task, layout, torch.device("cpu"))]
    loaded = Loaded(run.model, run.data, parameters.predicted(stage), nn.Module(), "", "", "")  # type: ignore[arg-type]
    request = GenerateRequest("", "text-to-image", "", prompt=("a cat", "a red heart"), n=2, batch=3, sampling=GUIDED, seed=5)
    for chunk in Planner(request, loaded, build_codecs(run.data, run.model)).chunks():
        items, conditions = chunk.load()
        watched(denoiser, run.model, GUIDED, chunk.task, keys_of(items, request.seed), conditions, batch=len(items))
    return drawn, [cell.caption for cell in cells]


def main(request: dict[str, Any]) -> None:
    run = load_run("tests/tiny.yaml")
    stage, ranks, tree = run.stage("third"), Ranks.from_environment(), load_deepspeed(request["deepspeed"])
    tree.setdefault("zero_optimization", {}).update(request["zero_options"])
    gathered, peaks, write = Gathered(), dict[str, int](), checkpoint.write_rank_file
    engine = build_engine(run.model, stage, with_sizes(tree), seed=1, ranks=ranks)
    peaks["building"] = gathered.take()
    engine.load(Path(request["checkpoint"]))
    peaks["loading"] = gathered.take()
    with engine.denoiser() as denoiser:
        drawn, captions = draw_all(denoiser, run, stage, engine.layout)
    peaks["sampling"] = gathered.take()

    def watched_write(folder: Path, rank: int, tensors: dict[str, Tensor], *rest: Any) -> Any:
        gathered.look()
        peaks["written"] = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("weight:"))
        return write(folder, rank, tensors, *rest)

    out = Path(request["out"])
    with patch.object(checkpoint, "write_rank_file", watched_write):
        engine.save(CheckpointsFolder(out / "checkpoints"), {}, "config")
    peaks["saving"] = gathered.take()
    torch.save(drawn, out / f"{ranks.rank}.pt")
    whole = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    print(json.dumps({"captions": captions, "shares": {name: peak / whole for name, peak in peaks.items()}}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
