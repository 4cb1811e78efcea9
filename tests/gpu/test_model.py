"""A model with its kernels on a GPU: its loss curve, and every entry of this GPU's tuning table."""

from __future__ import annotations

import importlib

import pytest
import torch

from megadiff.kernels import toolchain, tuning
from megadiff.kernels.joint_attention import path
from megadiff.kernels.tuning import Entry, Question
from tests.kernels.test_model import STEPS, curve

pytestmark = pytest.mark.gpu


def entries() -> list[Entry]:
    """Those that launches on this machine take."""
    if not torch.cuda.is_available():
        return []
    target, tools = tuning.target_of(torch.device("cuda", 0)), toolchain.toolchain()
    own = target.gpu, target.architecture, *tools
    return [entry for entry in tuning.entries() if (entry.gpu, entry.architecture, entry.triton, entry.ptxas) == own]


def test_the_loss_curve_with_kernels_is_that_of_the_references(monkeypatch):
    """In float32, whose attention is packed for SDPA."""
    expected = curve("reference", monkeypatch)
    assert curve("triton", monkeypatch) == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == STEPS


def test_every_entry_of_the_tuning_table_gives_what_the_default_gives(monkeypatch):
    """Runs each at the case that it was measured at."""
    tuner = importlib.import_module("megadiff.kernels.tuning.triton")
    device, table = torch.device("cuda", 0), entries()
    monkeypatch.setattr(tuning, "_measured", lambda question, target: None)
    for entry in [each for each in table if each.kernel != path.QUESTION]:
        op = entry.kernel.partition(".")[0]
        question = Question(*entry[:3])
        for case in importlib.import_module(f"megadiff.kernels.{op}.triton").cases():
            with tuning.listening() as answers:
                case.launch(device)
            if question in dict(answers):
                break
        else:
            raise AssertionError(f"no case of {op} asks for {question}")
        found, expected = (
            tuner.results(case, question, config, device)[1] for config in (entry.config, dict(answers)[question])
        )
        assert tuner.disagreement(found, expected) <= tuner.LIMIT, entry
