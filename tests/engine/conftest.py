"""What all tests of engines are compared with."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.layouts import train_plainly


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By stage, the report of `train_plainly`; and the `folder` of the run."""
    folder = tmp_path_factory.mktemp("one_rank")
    return {"folder": folder, **train_plainly(folder)}
