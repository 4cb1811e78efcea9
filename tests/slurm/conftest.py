"""A Slurm for the tests of a file, mended after each of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import MiniSlurm, SlurmRun


@pytest.fixture(scope="module")
def mini_slurm(request: pytest.FixtureRequest) -> Iterator[MiniSlurm]:
    """The cluster, started once for a file; of as many nodes as its NODES says, or two."""
    cluster = MiniSlurm(getattr(request.module, "NODES", 2))
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
