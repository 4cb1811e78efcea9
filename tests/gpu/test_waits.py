"""A step of training on a GPU waits for it once: to read the step's result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = """
import sys, warnings
import torch
from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.load import load_run
from megadiff.data.reading.loader import Loader
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine

overrides = [f"folder={sys.argv[1]}", "stages.*.batch={global_samples: 8, micro_batch: 4}", "stages.*.precision=fp32"]
run = load_run("tests/tiny.yaml", overrides)
stage = run.stages[-1]
engine = build_engine(run.model, stage, load_deepspeed("ds_configs/zero0.json"), seed=0, ranks=Ranks.from_environment())
loader = Loader(run.data, run.model, seed=0, global_samples=8, micro_batch=4)
objective = DiffusionObjective(run.model, stage, 0)
engine.step(loader.take(engine.device), objective)
batches = loader.take(engine.device)
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as waits:
    torch.cuda.set_sync_debug_mode("warn")
    engine.step(batches, objective)
    torch.cuda.set_sync_debug_mode("default")
loader.close()
for wait in waits:
    if "synchroniz" in str(wait.message):
        print("waits", wait.filename, wait.lineno)
"""


def test_a_step_waits_for_its_result_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    waits = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("waits ")]
    assert [Path(file).name for file in waits if "/megadiff/" in file] == ["statistics.py"]
