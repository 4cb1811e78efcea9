"""One Slurm for all tests here, mended after each of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import MiniSlurm, SlurmRun


@pytest.fixture(scope="session")
def mini_slurm() -> Iterator[MiniSlurm]:
    """The cluster, started once."""
    cluster = MiniSlurm()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def slurm(mini_slurm: MiniSlurm) -> Iterator[MiniSlurm]:
    """The cluster with idle nodes and an empty queue."""
    yield mini_slurm
    mini_slurm.mend()


@pytest.fixture
def run(slurm: MiniSlurm, tmp_path: Path) -> SlurmRun:
    """A run that is not launched yet."""
    return SlurmRun(slurm, tmp_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows the logs of its run."""
    report = yield
    launched = getattr(item, "funcargs", {}).get("run")
    if report.failed and isinstance(launched, SlurmRun):
        report.sections.append(("logs of the run", launched.log()))
    return report
