"""Kernels are tested on a GPU if there is one, else in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
