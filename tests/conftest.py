"""What holds for every test: a clean environment, reproducible property tests, and no silent skips in CI."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

TIMEOUT_S = 600
"""The last resort: whatever a test starts has a limit of its own (tests.ranks.LAUNCH_S)."""

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS = ("MEGADIFF_ERROR_FILE", "MEGADIFF_LAUNCHER")
_CREDENTIALS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "GOOGLE_APPLICATION_CREDENTIALS")

_DEAREST = ("test_quickstart.py", "test_raw_to_training.py", "test_zero.py", "test_pack.py", "test_encoder.py")
"""Files that take minutes: they come first, so that no worker is left alone with one at the end."""

# Before torch is imported anywhere: threads are read then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", AWS_EC2_METADATA_DISABLED="true", PYTHONFAULTHANDLER="1")
if not Path("/dev/nvidiactl").exists():
    # Before Triton is imported anywhere, as by DeepSpeed: it looks then whether kernels are to run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
for _name in (*_RANKS, *_LAUNCHERS, *_CREDENTIALS):
    os.environ.pop(_name, None)

# A shell without job control ignores it in what it starts in the background, and so would whatever a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("megadiff", deadline=None, derandomize=True, max_examples=50, print_blob=True)
settings.load_profile("megadiff")

_unexplained: list[str] = []


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The dearest files first, and a time limit for every test."""
    items.sort(key=lambda item: _DEAREST.index(item.path.name) if item.path.name in _DEAREST else len(_DEAREST))
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        _unexplained.append(report.nodeid)
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _unexplained.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _in_ci() and _unexplained and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _in_ci() and _unexplained:
        terminalreporter.section("skipped without the gpu marker, which fails CI", red=True)
        for nodeid in _unexplained:
            terminalreporter.line(nodeid)
