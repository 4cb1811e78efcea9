"""What a launch finds on a machine: GPUs, processes, threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megadiff.config.errors import UserError
from megadiff.launcher import devices
from megadiff.launcher.devices import Devices
from tests.minimal import minimal_run


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(devices, "_gpus", lambda: count)


@pytest.mark.parametrize(
    ("count", "environment", "found"),
    [
        (0, {}, Devices("cpu", 0)),
        (4, {}, Devices("cuda", 4)),
        (4, {"CUDA_VISIBLE_DEVICES": "2, 3"}, Devices("cuda", 2, (2, 3))),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, Devices("cpu", 0)),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, Devices("cpu", 0)),
        (4, {"DS_ACCELERATOR": "cpu"}, Devices("cpu", 0)),
        (0, {"CUDA_VISIBLE_DEVICES": "0"}, Devices("cpu", 0)),
        (0, {"DS_ACCELERATOR": "xpu"}, Devices("xpu", 0)),
    ],
)
def test_devices_follow_the_environment(
    gpus: Callable[[int], None], count: int, environment: dict[str, str], found: Devices
) -> None:
    gpus(count)
    assert devices.find_devices(environment) == found


def test_devices_named_by_uuid_are_refused(gpus: Callable[[int], None]) -> None:
    gpus(1)
    with pytest.raises(UserError, match="takes indices only"):
        devices.find_devices({"CUDA_VISIBLE_DEVICES": "GPU-8f2c"})


@pytest.mark.parametrize(
    ("wanted", "found", "started"),
    [
        ("accelerators", Devices("cpu", 0), 1),
        ("accelerators", Devices("cuda", 4), 4),
        (2, Devices("cpu", 0), 2),
        (2, Devices("cuda", 1), 1),
        (2, Devices("cuda", 8), 2),
        (2, Devices("xpu", 0), 2),
    ],
)
def test_processes_are_at_most_one_per_gpu(tmp_path: Path, wanted: int | str, found: Devices, started: int) -> None:
    launch = minimal_run(tmp_path, launch__processes=wanted).launch
    assert devices.processes_for(launch, found) == started


def test_threads_come_from_the_run_the_environment_or_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cores", lambda: 9)
    plain = minimal_run(tmp_path).launch
    fixed = minimal_run(tmp_path, launch__threads_per_process=3).launch
    assert devices.threads_for(plain, 2, {}) == 4
    assert devices.threads_for(plain, 20, {}) == 1
    assert devices.threads_for(plain, 2, {"OMP_NUM_THREADS": "7"}) == 7
    assert devices.threads_for(fixed, 2, {"OMP_NUM_THREADS": "7"}) == 3
