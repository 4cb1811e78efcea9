"""What the compiler makes of every kernel that ships: compiled without a GPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadiff.kernels.toolchain import ROOM

ROOT = Path(__file__).parents[2]
OPS = {path.parent.name for path in ROOM.glob("*/triton.py")} - {"toolchain", "tuning"}


def reports(*flags: str) -> list[dict[str, object]]:
    """Of the kernels that ship. Triton's interpreter, which the tests turn on, is off here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megadiff.kernels.toolchain.triton", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {line["name"].split()[0] for line in lines} == OPS
    return lines


def faults(report: dict[str, object]) -> list[str]:
    """Spills; no tensor cores (WGMMA on Hopper) where there is a product; no TMA where a variant claims it."""
    expected = [
        ("spills", not (report["stack"] or report["spill_stores"] or report["spill_loads"])),
        ("no tensor cores", not report["product"] or report["wgmma" if report["architecture"] == 90 else "mma"]),
        ("no TMA", not report["descriptors"] or report["architecture"] != 90 or report["tma_loads"]),
    ]
    return [fault for fault, kept in expected if not kept]


def test_the_usual_defaults_have_no_spills_and_use_tensor_cores_and_tma_on_hopper():
    assert {report["name"]: faults(report) for report in reports("--arch", "90", "--usual") if faults(report)} == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_configuration_has_no_spills_and_uses_tensor_cores_and_tma():
    lines = reports()
    assert {report["architecture"] for report in lines} == {80, 90}
    assert {(report["name"], report["architecture"]): faults(report) for report in lines if faults(report)} == {}
