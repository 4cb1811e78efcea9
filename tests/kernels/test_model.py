"""A whole model with its kernels on, beside the same model with the references."""

from __future__ import annotations

import pytest
import torch

from megadiff.diffusion.objective import DiffusionObjective
from megadiff.kernels import dispatch
from megadiff.models.mmdit import build_model
from tests.diffusion.small import batch_of, model_of, stage_of
from tests.kernels.harness import DEVICE

STEPS, SAMPLES, END = 3, 4, 4


def curve(kind: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses of a few steps of SGD, which magnifies no rounding, as Adam would; captions of several lengths."""
    monkeypatch.setenv(dispatch.VARIABLE, kind)
    monkeypatch.setattr(dispatch, "_TWINS", {})
    torch.manual_seed(0)
    config = model_of(end_id=END).model_copy(update={"width": 32, "heads": 2, "head_dim": 16})
    model = build_model(config, list(config.modalities)).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(DEVICE) * 0.1)
    objective = DiffusionObjective(config, stage_of(SAMPLES, tokens={"conditioning": {"clean": 0.5}}), seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        states = {"tokens": torch.randint(0, END + 1, (SAMPLES, 3)), "grid": torch.randn(SAMPLES, 1, 1, 2)}
        prepared = objective.prepare(batch_of(states))
        normaliser = {name: 1 / count for name, count in prepared.counts.items()}
        terms = objective.score(model(prepared.noised, prepared.readout), prepared, normaliser)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(terms.total.item())
    return losses


@pytest.mark.slow
def test_the_loss_curve_with_kernels_is_that_of_the_references(monkeypatch):
    expected = curve("reference", monkeypatch)
    assert curve("triton", monkeypatch) == pytest.approx(expected, rel=2e-5)
    assert len(set(expected)) == STEPS
