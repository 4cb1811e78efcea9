"""A whole training step of the paper's model (arXiv 2506.07903), with kernels and by torch.compile alone.

Forward, loss, backward and a fused AdamW step in bfloat16 on one GPU, a process for each choice, since kernels are chosen once
in a process. Blocks are compiled one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.kernels.attention import lengths_of
from benchmarks.kernels.measure import Machine, Row, peak_of, time_of
from megadiff import rng
from megadiff.config.schema import Batching, ConstantEma, Model, Stage
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.kernels import dispatch
from megadiff.models.mmdit import build_model
from megadiff.types import Batch

SAMPLES, MEAN = 64, 40


@dataclass(frozen=True)
class Choice:
    """Which ops run, and whether blocks are compiled."""

    kernels: str
    compiled: bool

    def __str__(self) -> str:
        return f"{'kernels' if self.kernels == 'triton' else 'references'}{', torch.compile' if self.compiled else ''}"


CHOICES = [Choice(kernels, compiled) for kernels in ("reference", "triton") for compiled in (False, True)]


def rows(machine: Machine) -> Iterator[Row]:
    """One of each choice."""
    for choice in CHOICES:
        command = [sys.executable, "-m", "benchmarks.kernels.step", json.dumps(asdict(choice)), *["--toy"] * machine.toy]
        environment = {**os.environ, dispatch.VARIABLE: choice.kernels}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        head = "training step", f"the paper's model, B={2 if machine.toy else SAMPLES}, text mean {MEAN}", "a step", str(choice)
        if done.returncode:
            yield Row(*head, f"failed: {done.stderr.strip().rpartition(chr(10))[2]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        if machine.toy:
            yield Row(*head, "ran", error=found["loss"])
        else:
            yield Row(
                *head, "measured", microseconds=1e6 * found["seconds"], peak_mib=found["peak"] / 2**20, error=found["loss"]
            )


def model_of(machine: Machine) -> Model:
    """The paper's; a toy has its parts, one block of each."""
    tree = yaml.safe_load(Path("configs/model/paper.yaml").read_text(encoding="utf-8"))["model"]
    if machine.toy:
        tree.update(width=32, heads=2, head_dim=16, joint_depth=1)
        text, image = tree["modalities"]["text"], tree["modalities"]["image"]
        text["space"].update(vocabulary=300, length=8, start_id=297, end_id=298, pad_id=298)
        image["space"].update(height=4, width=4)
        text["tower_depth"] = image["tower_depth"] = 1
    return Model.model_validate(tree)


def batch_of(model: Model, samples: int, device: torch.device) -> Batch:
    """Noise as latents, and captions of random tokens that end as captions do."""
    text, image = model.modalities["text"].space, model.modalities["image"].space
    lengths = lengths_of(samples, text.length, min(MEAN, text.length // 2))
    ids = torch.randint(text.end_id, (samples, text.length))
    ids[torch.arange(text.length) >= lengths[:, None]] = text.end_id
    index = torch.arange(samples)
    batch = Batch(
        states={"text": ids, "image": torch.randn(samples, image.channels, image.height, image.width)},
        keys=rng.sample_keys(0, 0, index),
        slots=index,
        weight=torch.ones(samples),
        ids=tuple(map(str, range(samples))),
        data_step=0,
        global_samples=samples,
    )
    return batch.to(device)


def measure(choice: Choice, machine: Machine) -> dict[str, Any]:
    torch.manual_seed(0)
    config, samples = model_of(machine), 2 if machine.toy else SAMPLES
    stage = Stage(
        name="benchmark", steps=1, modalities={name: {} for name in config.modalities}, ema={"main": ConstantEma()},
        batch=Batching(global_samples=samples, micro_batch=samples),
    )  # fmt: skip
    with machine.device:
        model = build_model(config, list(config.modalities)).to(machine.device, machine.dtype)
    if choice.compiled:
        for block in model.layers()[1:-1]:
            block.compile(dynamic=False, backend="eager" if machine.toy else "inductor")
    objective = DiffusionObjective(config, stage, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    batch = batch_of(config, samples, machine.device)
    losses = []

    def step() -> None:
        prepared = objective.prepare(batch)
        normaliser = {name: 1 / count for name, count in prepared.counts.items()}
        terms = objective.score(model(prepared.noised, prepared.readout), prepared, normaliser)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms.total.detach())

    step()
    result = {"loss": losses[0].item()}
    return result if machine.toy else result | {"seconds": time_of(step), "peak": peak_of(step)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("choice", type=json.loads)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    machine = Machine(torch.device("cpu" if arguments.toy else "cuda"), arguments.toy)
    print(json.dumps(measure(Choice(**arguments.choice), machine)))


if __name__ == "__main__":
    main()
