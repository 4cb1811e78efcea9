"""Fixtures for every room: an export of a small untrained network, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megadiff.config.load import load_run
from megadiff.config.schema import Run
from megadiff.models.mmdit import build_model
from megadiff.weights import export

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny() -> Run:
    return load_run(ROOT / "tests/tiny.yaml")


def write_export(run: Run, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    module = build_model(run.model, list(run.model.modalities))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    export.write(folder, export.Exported(run.model, run.data, tuple(run.model.modalities), tensors, "a card"))
    return folder


@pytest.fixture(scope="session")
def exported(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # tokenizers are named relative to it
        yield write_export(tiny, tmp_path_factory.mktemp("exports") / "tiny")
