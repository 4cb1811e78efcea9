"""Between two steps of a sampling run, and within one, the host does not wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from megadiff import rng
from megadiff.config.schema import Sampling
from megadiff.diffusion import sampler as sampling
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.models.mmdit import build_model
from tests.diffusion.small import model_of
from tests.waits import watched

MODEL = model_of(end_id=1, pad_id=0, padding="after_end", length=6)
CLOCKS = "clocks are on the CPU"
ALLOWED = {
    "guidance.Guided._weights": CLOCKS,
    "guidance.Guided._ragged": CLOCKS,
    "guidance.Guided._without_conditions.<locals>.<dictcomp>": CLOCKS,
    "sampler._Run._steps.<locals>.<dictcomp>": CLOCKS,
    "objective.ragged_of": "once for a condition that stays as it is, in the first step",
    "rng._as_words": "NumPy, for keys on a CPU alone",
    "categorical_solvers.draws": "where earlier draws decide how many positions become visible (threshold, remask conf)",
    "categorical_solvers.FastDLLM.finished": "the order that ends when its samples do",
}
UNPLANNED = ({"order": "threshold"}, {"remask": "conf"})
CASES: tuple[tuple[dict[str, Any], str | None], ...] = (
    ({}, None),
    ({}, "grid"),
    ({"guidance": 2.0, "solver": "heun"}, "tokens"),
    ({"guidance": 2.0, "guidance_final_time": 0.8, "solver": "sde_dpmpp_2m"}, None),
    ({"order": "tau_leaping", "temperature": 0.5, "top_k": 2, "top_p": 0.9, "min_p": 0.1}, "grid"),
    ({"order": "first_hitting"}, "grid"),
    ({"order": "confidence", "order_noise": 0.5}, "grid"),
    ({"order": "entropy"}, "grid"),
    ({"order": "margin"}, None),
    ({"remask": "cap"}, "grid"),
    ({"remask": "loop"}, "grid"),
    *((options, "grid") for options in UNPLANNED),
)
"""Options, and the modality that is given."""


def seen_in(options: dict[str, Any], given: str | None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What waits in the steps of a small run that draws all modalities but one."""
    counts = Counter[str]()
    plain = sampling._Run.advance, sampling._Run.finished

    def advance(*of: Any, **how: Any) -> None:
        with watched(counts):
            plain[0](*of, **how)

    def finished(run: Any) -> bool:
        with watched(counts):
            return plain[1](run)

    monkeypatch.setattr(sampling._Run, "advance", advance)
    monkeypatch.setattr(sampling._Run, "finished", finished)
    states = {"tokens": torch.tensor([[2, 1, 0, 0, 0, 0]] * 3), "grid": torch.zeros(3, 1, 1, 2)}
    conditions = Conditions(given={given: states[given]} if given else {})
    denoiser = build_model(MODEL, ["tokens", "grid"]).eval()
    how = Sampling.model_validate({"steps": 2, "solver": "euler", **options})
    with torch.no_grad():
        keys = rng.sample_keys(0, torch.arange(3))
        generate = [name for name in states if name != given]
        Sampler(MODEL, how).sample(denoiser, keys, generate=generate, conditions=conditions)
    return counts


@pytest.fixture(scope="module")
def seen() -> list[Counter[str]]:
    """What waits in the runs of CASES."""
    counts = []
    for options, given in CASES:
        with pytest.MonkeyPatch.context() as patch:
            counts.append(seen_in(options, given, patch))
    return counts


def test_no_function_waits_but_those_allowed_and_each_of_those_does(seen: list[Counter[str]]) -> None:
    assert {name for counts in seen for name in counts} == ALLOWED.keys()


def test_positions_are_counted_before_a_run_unless_earlier_draws_decide(seen: list[Counter[str]]) -> None:
    counting = [options for (options, _), counts in zip(CASES, seen, strict=True) if counts["categorical_solvers.draws"]]
    assert counting == list(UNPLANNED)
