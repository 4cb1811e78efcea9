"""How the error of every solver and every order of unmasking falls with the number of steps, where the truth is known.

    python -m benchmarks.sampler_error [--json FILE]

Solvers: one number drawn from a mixture of two normals, whose denoiser is closed form. The mean absolute error is against the
same probability-flow ODE integrated with 4,096 Heun steps (ODE solvers), or between quantiles (SDE solvers: down to the noise
of that many samples; vp starts from pure noise, which its own marginal at t = 1 is not quite).
Orders: pairs of three tokens and a small grid out of five weighted data points, whose posterior is exact
(tests/diffusion/ideal). The error is the total variation between the drawn pairs and the data set; what sampling noise alone
would give is shown.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import GaussianProcess, GridSpace, Model, Sampling
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.types import Noised, Prediction, Readout
from tests.diffusion.ideal import GRIDS, SHARES, IdealDenoiser, cells
from tests.diffusion.small import model_of

MEANS, SHARE, DEVIATION = (-1.0, 0.6), (0.35, 0.65), 0.15
STEPS = (8, 16, 32, 64, 128, 256)
COUNT = 4000


def mixture_model(schedule: str) -> Model:
    space = {"kind": "grid", "channels": 1, "height": 1, "width": 1}
    modality = {"space": space, "process": {"kind": "gaussian", "schedule": schedule, "target": "v"}}
    return Model.model_validate({"width": 8, "heads": 1, "head_dim": 8, "joint_depth": 1, "modalities": {"number": modality}})


class Mixture:
    """The exact denoiser of a number that is one of two normals."""

    def __init__(self, schedule: str) -> None:
        self.process = Gaussian(
            "number", GaussianProcess(schedule=schedule, target="v"), GridSpace(channels=1, height=1, width=1)
        )

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        state, times = noised.states["number"].double(), noised.clocks["number"].double()
        alpha, sigma = (share(times)[:, None, None, None] for share in (self.process.alpha, self.process.sigma))
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        logs = torch.stack([math.log(s) - (state - alpha * m) ** 2 / (2 * variance) for m, s in zip(MEANS, SHARE, strict=True)])
        cleans = torch.stack([m + alpha * DEVIATION**2 / variance * (state - alpha * m) for m in MEANS])
        clean = (logs.softmax(0) * cleans).sum(0)
        noise = (state - alpha * clean) / sigma.clamp_min(1e-12)
        return {"number": self.process.target(clean, noise, times)}


def continuous() -> list[dict[str, object]]:
    keys = rng.sample_keys(0, torch.arange(COUNT))
    rows = []
    for schedule in ("rectified_flow", "vp", "cosine"):
        model, denoiser = mixture_model(schedule), Mixture(schedule)
        start = denoiser.process.prior(keys).double()
        reference = _run(model, denoiser, keys, start, Sampling(steps=4096))
        for solver in ("euler", "heun", "dpmpp_2m", "sde_euler", "sde_dpmpp_2m"):
            errors = []
            for steps in STEPS:
                made = _run(model, denoiser, keys, start, Sampling(steps=steps, solver=solver))
                pairs = (made, reference) if not solver.startswith("sde") else (made.sort().values, reference.sort().values)
                errors.append((pairs[0] - pairs[1]).abs().mean().item())
            # A stochastic solver's error ends in sampling noise and has no order to be seen here.
            order = (
                None if solver.startswith("sde") else math.log2(errors[-3] / errors[-1]) / 2
            )  # from the last three: before, signs of errors cancel
            rows.append({"schedule": schedule, "solver": solver, "errors": errors, "order": order})
    return rows


def _run(model: Model, denoiser: Mixture, keys: Tensor, start: Tensor, sampling: Sampling) -> Tensor:
    made = Sampler(model, sampling).sample(
        denoiser, keys, generate=["number"], conditions=Conditions(initial={"number": start})
    )
    return made["number"].flatten()


def discrete() -> list[dict[str, object]]:
    keys = rng.sample_keys(1, torch.arange(COUNT))
    floor = 0.5 * (2 * SHARES * (1 - SHARES) / (math.pi * COUNT)).sqrt().sum().item()
    rows = []
    options = [
        {"order": order} for order in ("ancestral", "tau_leaping", "first_hitting", "confidence", "entropy", "threshold")
    ]
    options += [{"remask": remask} for remask in ("cap", "conf", "loop")]
    cases = [("masked", option) for option in options] + [("uniform", option) for option in options[:2]]
    given = {"grid": GRIDS[0].expand(COUNT, -1, -1, -1).contiguous()}
    fits = torch.where((GRIDS[0] == GRIDS).flatten(1).all(1), SHARES, 0.0)
    for kind, option in cases:
        model = model_of(kind=kind)
        for task, generate, conditions, expected in (
            ("tokens given grid", ["tokens"], Conditions(given=given), fits / fits.sum()),
            ("joint", ["tokens", "grid"], Conditions(), SHARES),
        ):
            errors = []
            for steps in STEPS[:4]:
                sampler = Sampler(model, Sampling(steps=steps, **option))
                made = sampler.sample(IdealDenoiser(model), keys, generate=generate, conditions=conditions)
                found = torch.bincount(cells(made["grid"], made["tokens"]), minlength=6).double() / COUNT
                errors.append(0.5 * ((found[:5] - expected).abs().sum() + found[5]).item())
            rows.append({"process": kind, **option, "task": task, "errors": errors, "noise_floor": floor})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/sampler_error.json"))
    arguments = parser.parse_args()
    found = {"steps": STEPS, "continuous": continuous(), "discrete": discrete()}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print("| schedule | solver | " + " | ".join(f"{steps} steps" for steps in STEPS) + " | order |")
    print("|---|---|" + "---|" * (len(STEPS) + 1))
    for row in found["continuous"]:
        errors = " | ".join(f"{error:.1e}" for error in row["errors"])
        order = "-" if row["order"] is None else f"{row['order']:.1f}"
        print(f"| {row['schedule']} | {row['solver']} | {errors} | {order} |")
    print("\n| process | order | task | " + " | ".join(f"{steps} steps" for steps in STEPS[:4]) + " |")
    print("|---|---|---|" + "---|" * 4)
    for row in found["discrete"]:
        name = row.get("order") or f"remask {row['remask']}"
        print(f"| {row['process']} | {name} | {row['task']} | " + " | ".join(f"{error:.3f}" for error in row["errors"]) + " |")
    print(f"\nsampling noise alone: {found['discrete'][0]['noise_floor']:.3f}")


if __name__ == "__main__":
    main()
