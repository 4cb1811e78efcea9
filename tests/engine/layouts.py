"""The layouts of ranks that ship, and their runs of tests/tiny.yaml, which should all be the same run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.layouts import layout_of, with_sizes
from megadiff.config.load import load_run
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.models.idle import idle_parameters
from megadiff.models.mmdit import build_model
from megadiff.training.stages import stage_seed
from megadiff.weights.checkpoint import CheckpointReader
from tests.ranks import ROOT, run_ranks

WORKER = ROOT / "tests" / "engine" / "worker.py"
TIMEOUT_S = 1800.0
"""Of one run; four ranks on two cores take minutes."""
STAGES = ("first", "second", "third")
GLOBAL_SAMPLES, ACCUMULATION = 16, 4
CURVES = ("loss", "grad_norm")
TOLERANCE = 1e-4
"""The largest relative deviation from one rank's curve, at every step."""
CLIP = 0.1
"""Below every gradient norm."""
CLIPPED = f"stages.*.optimizer.gradient_clip={CLIP}"
RECOMPUTED = "stages.*.activation_checkpointing=true"
PARTITION_ALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 with no parameter kept whole, however small; tiny's are all small."""


class Ranks(NamedTuple):
    """A file of ds_configs, how many ranks it is for, and the pipeline stages if not those that the file says."""

    deepspeed: str
    ranks: int
    pipeline: int | None = None

    @property
    def replicas(self) -> int:
        tree = with_sizes(load_deepspeed(ROOT / f"ds_configs/{self.deepspeed}.json"), self.pipeline)
        return layout_of(tree, self.ranks).data_ranks


ONE_RANK = "1 rank"
LAYOUTS = {
    ONE_RANK: Ranks("zero0", 1),
    "ZeRO-1 x 2": Ranks("zero1", 2),
    "ZeRO-2 x 2": Ranks("zero2", 2),
    "ZeRO-3 x 2": Ranks("zero3", 2),
    "ZeRO-1 x 4": Ranks("zero1", 4),
    "ZeRO-2 x 4": Ranks("zero2", 4),
    "ZeRO-3 x 4": Ranks("zero3", 4),
    "pipeline x 2": Ranks("pipeline", 2),
    "pipeline x 4": Ranks("pipeline", 4, pipeline=4),
    "tensor x 2": Ranks("tensor_zero1", 2),
    "tensor 2 x ZeRO-3 2": Ranks("tensor_zero3", 4),
    "pipeline 2 x data 2": Ranks("pipeline", 4),
    "pipeline 2 x tensor 2": Ranks("pipeline_tensor", 4),
}

# -------------------------------------------------------------------------------------------------------------- curves

STEPS = 3
SHORT = f"stages.*.steps={STEPS}"
"""The length of the stages of `train_plainly`."""


HELD_OUT = "stages.*.held_out_loss={every_steps: 100, pairs: 3, times: [0.3, 0.9], nelbo_times: 2}"
"""Measured after the last step; the pairs do not divide by two replicas."""


def train_plainly(folder: Path) -> dict[str, dict[str, Any]]:
    """By stage, the report of one rank without ZeRO, micro-batches, or activations that are computed again."""
    overrides = (SHORT, HELD_OUT, "stages.*.activation_checkpointing=false")
    return train(ONE_RANK, folder, *overrides, f"stages.*.batch.micro_batch={GLOBAL_SAMPLES}")[0]


def train(layout: str, folder: Path, *overrides: str, stages: Sequence[str] = STAGES, **request: Any) -> list[dict[str, Any]]:
    """By rank, the reports of its stages: every step is clipped, over `ACCUMULATION` micro-batches that are computed twice.

    Raises:
        AssertionError: a rank fails, or a stage ends in an error.
    """
    file, ranks, pipeline = LAYOUTS[layout]
    micro_batch = GLOBAL_SAMPLES // ACCUMULATION // LAYOUTS[layout].replicas
    request = {
        "folder": str(folder),
        "deepspeed": f"ds_configs/{file}.json",
        "pipeline": pipeline,
        "stages": list(stages),
        "overrides": [f"stages.*.batch.micro_batch={micro_batch}", CLIPPED, RECOMPUTED, *overrides],
        **request,
    }
    reports = run_ranks(WORKER, ranks, request, timeout_s=TIMEOUT_S)
    assert all("error" not in report for report in reports), reports
    return [report["by_stage"] for report in reports]


def deviations(report: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The largest relative deviation of each of a stage's curves from the reference's, over all steps."""
    assert report["steps"] == reference["steps"]
    return {
        curve: max(abs(value / expected - 1) for value, expected in zip(report[curve], reference[curve], strict=True))
        for curve in CURVES
    }


def assert_same_losses(report: dict[str, Any], reference: dict[str, Any]) -> None:
    found = deviations(report, reference)
    assert max(found.values()) < TOLERANCE, found


def assert_same_curve(report: dict[str, Any], reference: dict[str, Any]) -> None:
    assert_same_losses(report, reference)
    assert report["inspected"] == pytest.approx(reference["inspected"], rel=10 * TOLERANCE)


def assert_same_held_out(report: dict[str, Any], reference: dict[str, Any], stage: str) -> None:
    """Of both kinds of weights, two times given and absent of each modality that is predicted, and the bound of the text."""
    found, expected = report[stage]["held_out"], reference[stage]["held_out"]
    assert len(found) == (8 if stage == "first" else 20)
    assert found == pytest.approx(expected, rel=TOLERANCE)


# --------------------------------------------------------------------------------------------------------- checkpoints

KEPT_AT, ENDS_AT = 3, 6
BOTH = ("stages.first.modalities.text.predicted=true", "stages.first.freeze=[text]")
"""Both modalities are predicted; a part is frozen."""
PORTABLE = (ONE_RANK, "ZeRO-1 x 2", "ZeRO-3 x 2", "pipeline x 2", "tensor x 2", "tensor 2 x ZeRO-3 2")
"""Layouts of which each goes on from a checkpoint of each other."""
PAIRS = [(source, target) for source in PORTABLE for target in PORTABLE if source != target]


def train_to(layout: str, folder: Path, steps: int) -> list[dict[str, Any]]:
    """By rank, the report of the first stage with `BOTH`, trained to `steps`, from its newest checkpoint if it has one."""
    return [report["first"] for report in train(layout, folder, *BOTH, f"stages.*.steps={steps}", stages=["first"])]


def go_on(source: Path, layout: str, folder: Path) -> list[dict[str, Any]]:
    """`train_to` the end from a copy of a run that was trained to `KEPT_AT`."""
    shutil.copytree(source / "first", folder / "first")
    return train_to(layout, folder, ENDS_AT)


def samples_of(reports: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """By step of the reports' process, the random key of each sample that any rank took, by its slot.

    Raises:
        AssertionError: two ranks took the same slot with other keys.
    """
    steps = []
    for parts in zip(*(report["samples"] for report in reports), strict=True):
        pairs = {pair for part in parts for pair in part.items()}
        steps.append(dict(pairs))
        assert len(steps[-1]) == len(pairs) == GLOBAL_SAMPLES
    return steps


def newest(stage: Path) -> Path:
    """The newest checkpoint of a stage's folder."""
    folder = CheckpointsFolder(stage / "checkpoints").newest()
    assert folder is not None
    return folder


def assert_idle_weights_stay(folder: Path) -> None:
    """Text is only read in the first stage: what it computes after the last joint attention leads to no loss."""
    reader = CheckpointReader(newest(folder / "first"))
    run = load_run(ROOT / "tests/tiny.yaml")
    stage = run.stage("first")
    initial = dict(build_model(run.model, ["image"], seed=stage_seed(run, stage)).named_parameters())
    whole, partial = idle_parameters(run.model, stage, initial)
    assert any("parts.text.mlp." in name for name in whole)
    assert any("parts.text.modulation." in name for name in partial)
    for name, parameter in initial.items():
        region = partial.get(name, (slice(None) if name in whole else slice(0),))
        trained = reader.read_whole("weight", name)
        for kind in ("weight", "ema.main", "ema.long"):
            assert torch.equal(reader.read_whole(kind, name)[region], parameter.detach()[region]), (kind, name)
        assert torch.equal(trained, parameter) == (name in whole), name
