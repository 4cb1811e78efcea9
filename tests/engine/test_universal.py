"""Universal checkpoints to plain DeepSpeed and back, over real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.cli import main as cli
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.weights.checkpoint import CheckpointReader
from megadiff.weights.universal import open_source
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.distributed

WORKER, PLAIN = ROOT / "tests/engine/worker.py", ROOT / "tests/engine/plain_worker.py"
BOTH = ["stages.first.modalities.text.predicted=true"]
FROZEN = [*BOTH, "stages.first.freeze=[text]"]
REQUEST = {"zero": 1, "overrides": FROZEN, "steps": 2}


def train_ours(folder: Path, world: int, *overrides: str) -> dict[str, Any]:
    request = {"folder": str(folder), "deepspeed": "ds_configs/zero1.json", "stages": ["first"], "overrides": list(overrides)}
    return run_ranks(WORKER, world, request)[0]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps of ours on two ranks, with a frozen part; the checkpoint of the fourth in the universal format."""
    folder = tmp_path_factory.mktemp("ours")
    report = train_ours(folder / "run", 2, *FROZEN, "stages.*.steps=6", "stages.*.checkpoint.every_steps=4")
    checkpoints = CheckpointsFolder(folder / "run/first/checkpoints")
    fourth = str(checkpoints.step(4))
    assert cli.main(["checkpoint", "consolidate", fourth, str(folder / "universal/step_4"), "--format", "universal"]) == 0
    return {"universal": str(folder / "universal"), "ours": fourth, "after": str(checkpoints.step(6)), "losses": report["loss"]}


@pytest.mark.parametrize(("world", "zero"), [(1, 1), (2, 1), (2, 3)])
def test_plain_deepspeed_goes_on_from_our_universal_folder(world: int, zero: int, ours: dict[str, Any], tmp_path: Path) -> None:
    request = {key: ours[key] for key in ("ours", "after")} | {"load": ours["universal"], "folder": str(tmp_path)}
    for report in run_ranks(PLAIN, world, {**REQUEST, **request, "zero": zero}):
        assert report["differing"] == []
        assert report["adam_steps"] == [4.0]
        assert report["decays"] == [0.0, 0.03]
        assert report["losses"] == pytest.approx(ours["losses"][4:], rel=1e-4)
        assert report["differing_after"] == []
        assert report["scheduled"] == 6


@pytest.mark.parametrize(("zero", "overrides"), [(1, FROZEN), (3, BOTH)])
def test_a_stage_of_ours_starts_from_a_universal_folder_that_deepspeed_wrote(
    zero: int, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"folder": str(tmp_path / "none"), "save": str(tmp_path / "plain")}
    report, _ = run_ranks(PLAIN, 2, {**REQUEST, **plain, "zero": zero, "overrides": overrides})
    assert report["scheduled"] == REQUEST["steps"]
    source, weights = tmp_path / "plain/universal", torch.load(tmp_path / "plain/weights.pt", weights_only=True)
    assert open_source(source).manifest.parameters.keys() == weights.keys()
    assert cli.main(["checkpoint", "verify", str(source)]) == 0
    start = [f"stages.first.initialise={json.dumps({'source': str(source), 'weights': 'raw'})}"]
    still = ["stages.*.optimizer.learning_rate=1e-30", "stages.*.steps=1"]
    assert "error" not in train_ours(tmp_path / "run", 2, *overrides, *start, *still)
    newest = CheckpointsFolder(tmp_path / "run/first/checkpoints").newest()
    assert newest is not None
    reader = CheckpointReader(newest)
    for name, values in weights.items():
        assert torch.equal(reader.read_whole("weight", name), values), name
