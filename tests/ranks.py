"""Real processes for tests of multi-rank behaviour: a script run once per rank over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(script: Path, world: int, request: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """One process per rank; the script gets the request as JSON in its first argument."""
    port = free_port()
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(script), json.dumps(request)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
    return processes


def run_ranks(script: Path, world: int, request: dict[str, Any], *, timeout_s: float = 240) -> list[Any]:
    """Run to the end; returns what each rank printed as JSON on its last line. A rank that fails fails the test."""
    processes = start_ranks(script, world, request)
    try:
        ended = [(process, *process.communicate(timeout=timeout_s)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, out, err in ended:
        assert process.returncode == 0, f"a rank ended with {process.returncode}:\n{out[-1000:]}\n{err[-4000:]}"
    return [json.loads(out.strip().splitlines()[-1]) for _, out, _ in ended]
