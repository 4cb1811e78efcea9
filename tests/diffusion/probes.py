"""What the tests of the released code's faults share: a small model, its samples, and two networks that record their calls."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model
from megadiff.diffusion.solvers import SolverStep
from megadiff.types import Noised, Prediction, Readout, SampledRows
from tests.diffusion.ideal import IdealDenoiser, draw_pairs, drawn_from
from tests.diffusion.small import model_of

COUNT = 1200
KEYS = rng.sample_keys(2, torch.arange(COUNT))
PAIRS = draw_pairs(COUNT, seed=4)
MODEL = model_of()
MASK = 5
ORDERS: list[dict[str, Any]] = [
    *({"order": order} for order in ("ancestral", "tau_leaping", "first_hitting", "confidence", "entropy")),
    *({"remask": remask, "remask_strength": 0.2} for remask in ("cap", "conf", "loop")),
]
SPREAD = torch.tensor([0.46, 0.3, 0.15, 0.07, 0.02], dtype=torch.float64)
KINDS = [("vp", "epsilon"), ("vp", "v"), ("cosine", "v"), ("cosine", "clean"), ("rectified_flow", "velocity")]


class Watched:
    """The ideal denoiser, which keeps what it is asked and what it answers."""

    def __init__(self, model: Model = MODEL) -> None:
        self.ideal = IdealDenoiser(model)
        self.seen: list[tuple[Noised, dict[str, Readout]]] = []
        self.said: list[Prediction] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        self.seen.append((noised, dict(readout)))
        self.said.append(self.ideal(noised, readout))
        return self.said[-1]


class Constant:
    """A network to which every position's token has the same distribution whatever it sees, [V] or [S, V]."""

    def __init__(self, shares: Tensor) -> None:
        self.logs = shares.log()
        self.states: list[Tensor] = []
        self.rows: list[int] = []

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        request = readout["tokens"]
        assert isinstance(request, SampledRows)
        self.states.append(noised.states["tokens"])
        self.rows.append(request.rows.shape[1])
        return {"tokens": drawn_from(self.logs.expand(*noised.states["tokens"].shape, -1), request)}


def at(time: float, count: int) -> Tensor:
    return torch.full((count,), time)


def step_of(now: float, then: float, keys: Tensor) -> SolverStep:
    return SolverStep(at(now, len(keys)), at(then, len(keys)), keys, then == 0)
