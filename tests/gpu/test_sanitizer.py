"""All kernels once under NVIDIA's compute-sanitizer, which sees reads and writes outside of tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from megadiff.kernels import dispatch
from tests.ranks import ROOT

FAULT = 9
SCRIPT = "import megadiff.models.mmdit; from megadiff.kernels.dispatch import settle; settle()"
"""The check at start-up: every op's example, forward and backward; with Triton required, a wrong result raises."""


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["logits", "fused"])
def test_no_kernel_reads_or_writes_outside_of_its_tensors(form):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    # One allocation per tensor, so that its neighbour is not memory of ours.
    environment = {
        **os.environ,
        dispatch.VARIABLE: "triton",
        "MEGADIFF_HEAD_DRAW": form,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sanitizer, "--error-exitcode", str(FAULT), sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
