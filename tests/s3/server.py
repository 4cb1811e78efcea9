"""The S3 server that ceph.sh starts, as an object."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ceph.sh")
CANNOT_BE_HAD = 3
"""The script's exit status where there are no packages for this machine."""


class Ceph:
    """A server of this process; its data goes when it stops.

    Attributes:
        variables: AWS_* variables that lead to it.
    """

    def __init__(self) -> None:
        self._run_folder = Path(tempfile.mkdtemp(prefix="megadiff-ceph-"))
        self.variables: dict[str, str] = {}

    @property
    def url(self) -> str:
        return self.variables["AWS_ENDPOINT_URL"]

    def start(self) -> None:
        """Skip the test where the server cannot be had (which fails CI), fail it where it does not start."""
        done = self._call("start")
        if done.returncode == CANNOT_BE_HAD:
            self.stop()
            pytest.skip(done.stderr.strip())
        self._check(done)
        self.variables = dict(pair.split("=", 1) for pair in done.stdout.removeprefix("export ").split())

    def stop(self) -> None:
        self._check(self._call("stop"))
        if self._run_folder.exists():
            self._run_folder.rmdir()

    def busy(self, requests: int) -> None:
        """Answer 503 SlowDown beyond so many requests at once; 0 for never."""
        self._check(self._call("busy", str(requests)))

    def kill(self) -> None:
        self._check(self._call("kill"))

    def restart(self) -> None:
        self._check(self._call("restart"))

    def use(self, monkeypatch: pytest.MonkeyPatch, url: str | None = None) -> None:
        """Let S3 addresses lead here, or to what stands in front of it."""
        for name, value in self.variables.items():
            monkeypatch.setenv(name, value)
        if url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        own = {"MEGADIFF_CEPH_RUN": str(self._run_folder), "MEGADIFF_CEPH_OWNER": str(os.getpid())}
        return subprocess.run(
            [str(SCRIPT), *arguments], env={**os.environ, **own}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    @staticmethod
    def _check(done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode:
            pytest.fail(f"{' '.join(done.args)}: {done.stderr.strip()}", pytrace=False)
