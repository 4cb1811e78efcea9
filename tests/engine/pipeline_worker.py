"""One rank that trains a stage of tests/tiny.yaml on drawn samples of given sizes, without a loader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.layout import Layout
from megadiff.config.layouts import with_sizes
from megadiff.config.load import load_run
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine
from megadiff.types import Batch, Dense, DrawRule, Prediction, Readout, RowKeys, RowLogits, SampledRows, TokenLosses
from tests.engine.worker import probe_input

SEED = 3


def batches_of(step: int, height: int, layout: Layout, samples: int, micro_batch: int) -> list[Batch]:
    """This replica's micro-batches of a step: pictures of `height` rows."""
    generator = torch.Generator().manual_seed(step)
    states = {
        "text": torch.randint(2000, (samples, 16), generator=generator),
        "image": torch.randn(samples, 3, height, 32, generator=generator),
    }
    features = torch.randn(samples, height // 8 * 4, 6, generator=generator)
    slots = torch.arange(samples)
    keys = rng.sample_keys(SEED, step, slots)
    own = slots.chunk(layout.data_ranks)[layout.data_rank]
    return [
        Batch(
            states={name: state[rows] for name, state in states.items()},
            keys=keys[rows],
            slots=rows,
            weight=torch.ones(len(rows)),
            ids=tuple(map(str, rows.tolist())),
            data_step=step,
            global_samples=samples,
            features={"image": features[rows]},
        )
        for rows in own.split(micro_batch)
    ]


def readouts() -> list[dict[str, Readout]]:
    """Every kind of prediction, and each modality without the other."""
    rows = torch.arange(5)[None]
    draws = SampledRows(
        rows, torch.ones(1, 5), RowKeys(torch.arange(5), "probe", torch.zeros(5, dtype=torch.int64)), DrawRule()
    )
    scored = torch.arange(16).expand(2, 16) < 9
    losses = TokenLosses(torch.arange(32).view(2, 16), scored, torch.ones(2, 16))
    return [{"image": Dense()}, {"text": draws}, {"text": losses, "image": Dense()}, {"text": RowLogits(rows[0])}]


def numbers_of(prediction: Prediction) -> list[float]:
    """Some numbers of every tensor of a prediction, in order."""
    tensors = [each for part in prediction.values() for each in ([part] if isinstance(part, Tensor) else part)]
    return [number for tensor in tensors for number in tensor.double().flatten()[:64].tolist()]


def main(request: dict[str, Any]) -> None:
    run = load_run("tests/tiny.yaml", request.get("overrides", []))
    stage, ranks, tree = run.stage("third"), Ranks.from_environment(), load_deepspeed(request["deepspeed"])
    tree |= request.get("options", {})
    engine = build_engine(run.model, stage, with_sizes(tree, request["pipeline"]), seed=SEED, ranks=ranks)
    layout = engine.layout
    objective = DiffusionObjective(run.model, stage, SEED)
    samples, micro_batch = stage.batch.global_samples, stage.batch.micro_batch
    results = [
        engine.step(batches_of(step, height, layout, samples, micro_batch) if layout.reads else [], objective)
        for step, height in enumerate(request["heights"])
    ]
    wrapper = engine.backend.engine.optimizer  # type: ignore[attr-defined]
    with engine.denoiser() as denoiser:
        predictions = [numbers_of(denoiser(probe_input()[0], readout)) for readout in readouts()]
    if "checkpoints" in request:
        engine.save(CheckpointsFolder(Path(request["checkpoints"])), {}, "config")
    report = {
        "optimizer": type(wrapper).__name__,
        "dtype": str(next(engine.backend.module.parameters()).dtype),  # type: ignore[attr-defined]
        "masters": sorted({str(piece.master.dtype) for piece in engine.pieces.trained}),
        "names": list(engine.pieces.shapes),
        "loss": [result.total for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "applied": [result.applied for result in results],
        "predictions": predictions,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
