"""Small models, stages and batches for tests of the diffusion room; no network anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Batching, ConstantEma, Model, Stage
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.process import NoisedState
from megadiff.types import Batch, CrossEntropy


def model_of(
    schedule: str = "rectified_flow", target: str = "velocity", grid: dict[str, Any] | None = None, **tokens: Any
) -> Model:
    """Modalities `tokens` (length 3, vocabulary 5) and `grid` (1 x 1 x 2); keywords change the tokens' space or process."""
    space = {"kind": "tokens", "vocabulary": 5, "length": 3}
    space |= {key: tokens.pop(key) for key in list(tokens) if key in ("vocabulary", "length", "end_id", "pad_id")}
    return Model.model_validate(
        {
            "width": 8,
            "heads": 1,
            "head_dim": 8,
            "joint_depth": 1,
            "modalities": {
                "tokens": {"space": space, "process": {"kind": tokens.pop("kind", "masked"), **tokens}},
                "grid": {
                    "space": {"kind": "grid", "channels": 1, "height": 1, "width": 2, **(grid or {})},
                    "process": {"kind": "gaussian", "schedule": schedule, "target": target},
                },
            },
        }
    )


def stage_of(global_samples: int = 16, *, antithetic: bool = True, **modalities: dict[str, Any]) -> Stage:
    """A stage; keywords are the sections of the modalities."""
    return Stage(
        name="test",
        steps=1,
        modalities={name: modalities.get(name, {}) for name in ("tokens", "grid")},
        batch=Batching(global_samples=global_samples, micro_batch=1),
        ema={"main": ConstantEma()},
        antithetic_times=antithetic,
    )


def batch_of(states: dict[str, Tensor], *, seed: int = 3, data_step: int = 0) -> Batch:
    """A global batch of clean states."""
    count = len(next(iter(states.values())))
    index = torch.arange(count)
    return Batch(
        states=states,
        keys=rng.sample_keys(seed, data_step, index),
        slots=index,
        weight=torch.ones(count),
        ids=tuple(str(number) for number in range(count)),
        data_step=data_step,
        global_samples=count,
    )


def part_of(batch: Batch, rows: Tensor) -> Batch:
    """Some samples of a global batch, in any order."""
    return Batch(
        states={name: state[rows] for name, state in batch.states.items()},
        keys=batch.keys[rows],
        slots=batch.slots[rows],
        weight=batch.weight[rows],
        ids=tuple(batch.ids[row] for row in rows.tolist()),
        data_step=batch.data_step,
        global_samples=batch.global_samples,
    )


def told(process: Masked, noised: NoisedState, times: Tensor, entropies: Tensor) -> CrossEntropy:
    """What a head tells for the process's readout that has these cross entropies, float32 [B, S]."""
    readout = process.readout(noised, times, torch.ones(len(times), dtype=torch.bool))
    entropies = torch.where(readout.scored, entropies, 0.0)
    return CrossEntropy(entropies * readout.weights, entropies)
