"""The three stages in bf16 with ZeRO-3 on one GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_quickstart_trains_in_bf16_with_zero3_and_its_loss_falls(tmp_path: Path) -> None:
    overrides = [
        f"folder={tmp_path / 'run'}",
        "launch.processes=1",
        "showcase=null",
        "stages.*.precision=bf16",
        "stages.*.steps=30",
        "stages.*.log_every_steps=10",
        "stages.*.samples.every_steps=30",
        "stages.*.batch.micro_batch=64",
    ]
    command = [
        sys.executable,
        "-m",
        "megadiff",
        "launch",
        "configs/run/quickstart.yaml",
        "--deepspeed",
        "ds_configs/zero3.json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for stage in ("noisy_text_to_image", "text_tower", "joint"):
        rows = [json.loads(line) for line in (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(row["loss"]) and row["applied"] for row in rows)
        assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5])
