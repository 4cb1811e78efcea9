"""The Slurm that mini_slurm.sh starts, as an object, and a run that is launched on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadiff.config.jobs import Attempt, SubmittedJob
from megadiff.config.run_folder import Incident, IncidentKind, RunFolder, StageFolder
from tests.minimal import write_yaml
from tests.ranks import ROOT, run_megadiff

SCRIPT = Path(__file__).with_name("mini_slurm.sh")
CANNOT_RUN = 3
"""The script's exit status where a machine allows no such cluster."""
START_S = 180.0
"""Ranks have begun to train by then: most of it is the import of torch, on a busy machine."""
NODE_LOSS_S = 90.0
"""A lost node has been noticed, and its job queued again, by then."""


class MiniSlurm:
    """A cluster of this process."""

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="megadiff-slurm-"))
        self.folder.chmod(0o755)

    def start(self) -> None:
        """Skip the test where the cluster cannot be had (which fails CI), fail it where it does not start."""
        done = self._call("start", str(len(self.nodes)))
        if done.returncode == CANNOT_RUN:
            pytest.skip(done.stderr.strip())
        self._check(done)

    def stop(self) -> None:
        """End it; of its folder nothing stays."""
        self._check(self._call("stop"))
        shutil.rmtree(self.folder)

    @property
    def variables(self) -> dict[str, str]:
        """What leads Slurm's commands to it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def do(self, *arguments: str) -> str:
        """What a verb of the script prints, as `kill node2`; its failure fails the test."""
        done = self._call(*arguments)
        self._check(done)
        return done.stdout

    def command(self, *arguments: str) -> str:
        """What a command of Slurm prints; its failure fails the test."""
        environment = {**os.environ, **self.variables}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
        self._check(done)
        return done.stdout

    def state(self, job: str) -> str:
        """`RUNNING`, `PENDING`, `COMPLETED`, ...; also of a job that has ended."""
        return self.fields(job)["JobState"]

    def fields(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, by the names of `scontrol show job`."""
        text = self.command("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def kill_rank(self, node: str, paths: StageFolder, rank: int) -> None:
        """A rank that runs on a node dies as of lack of memory; its log says which process it is."""
        *_, pid = re.findall(rf"process (\d+) is rank {rank} of", paths.log(rank).read_text())
        self.do("exec", node, "kill", "-KILL", pid)

    def mend(self) -> None:
        """End all jobs and bring all back that a test has broken."""
        self.do("ctl", "start")
        for node in self.nodes:
            self.do("boot", node)  # a node without power has no socket for a cable
            self.do("plug", node)
        wait_until(lambda: self._call("status").returncode == 0, 60, "usable nodes")
        self.command("scancel", "--user=root")
        wait_until(lambda: not self.command("squeue", "--noheader"), 60, "an empty queue")

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        own = {"MINI_SLURM_DIR": str(self.folder), "MINI_SLURM_OWNER": str(os.getpid())}
        return subprocess.run(
            [str(SCRIPT), *arguments],
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    @staticmethod
    def _check(done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode:
            pytest.fail(f"{' '.join(done.args)}: {done.stderr.strip()}", pytrace=False)


class SlurmRun:
    """tests/tiny.yaml, as a user launches it on the cluster and looks at it."""

    def __init__(self, slurm: MiniSlurm, place: Path) -> None:
        self.slurm, self.place, self.folder = slurm, place, RunFolder(place / "run")
        self.first = self.folder.stage("first")
        self.cluster: dict[str, Any] = {"kind": "slurm", "nodes": 2, "restarts": 3}

    def megadiff(self, *arguments: str, code: int = 0, cwd: Path = ROOT) -> str:
        """A command line to its end: what it printed, on standard error where `code` is not 0."""
        done = run_megadiff(*arguments, cwd=cwd, **self.slurm.variables)
        assert done.returncode == code, f"megadiff {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}"
        return done.stderr if code else done.stdout

    def launch_verb(self, *arguments: str) -> str:
        """Submit another verb; returns the number of its job. Its files go where the tests' own do."""
        cluster = write_yaml(self.place / "cluster.yaml", self.cluster)
        line = self.megadiff("launch", "--cluster", str(cluster), "--", *arguments, cwd=self.place)
        return line.split()[1].rstrip(":")

    def command(self, *overrides: str, deepspeed: str = "zero1") -> list[str]:
        """`megadiff launch` of the run on the cluster."""
        cluster = write_yaml(self.place / "cluster.yaml", self.cluster)
        where = ["--deepspeed", f"ds_configs/{deepspeed}.json", "--cluster", str(cluster)]
        return ["launch", "tests/tiny.yaml", *where, f"folder={self.folder.root}", *overrides]

    def launch(self, *overrides: str, deepspeed: str = "zero1", before_step: str = "", stages: int = 1) -> list[str]:
        """Submit the run; returns the numbers of its jobs.

        Args:
            stages: how many of the jobs may start; the others are held.
            before_step: Python that the ranks run before each step, with its `number` and the `rank`. It goes into the frozen
                copy of the code, while the jobs are held.
        """
        self.megadiff(*self.command("cluster.options=[--hold]", *overrides, deepspeed=deepspeed))
        submission = SubmittedJob.read(self.folder.jobs)[-1].submission
        if before_step:
            lines = "\n        ".join(before_step.splitlines())
            with (self.folder.submission(submission).code / "megadiff/training/loop.py").open("a") as file:
                file.write(FAULT.replace("FAULT", lines))
        jobs = [job.job for job in SubmittedJob.read(self.folder.jobs) if job.submission == submission]
        self.slurm.command("scontrol", "release", *jobs[:stages])
        return jobs

    def outcomes(self, stage: str = "first") -> list[str]:
        """How the attempts at a stage began and ended."""
        return [attempt.outcome.value for attempt in Attempt.read(self.folder.stage(stage).attempts)]

    def seconds_between(self, first: int, second: int) -> int:
        """Between two lines of the first stage's attempts."""
        attempts = Attempt.read(self.first.attempts)
        return attempts[second].time - attempts[first].time

    def incidents(self) -> list[Incident]:
        path = self.folder.incidents
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
        return [Incident(**{**row, "kind": IncidentKind(row["kind"])}) for row in rows]

    def kinds(self) -> list[str]:
        return [incident.kind.value for incident in self.incidents()]

    def wait_for_step(self, step: int, stage: str = "first", timeout_s: float = START_S) -> None:
        wait_until(lambda: step in [row[0] for row in curve(self.folder.stage(stage))], timeout_s, f"step {step}")

    def wait_for(self, outcome: str, timeout_s: float = START_S, times: int = 1) -> None:
        wait_until(lambda: self.outcomes().count(outcome) >= times, timeout_s, f"{times} x {outcome!r}")

    def wait_for_incident(self, kind: str) -> None:
        wait_until(lambda: kind in self.kinds(), START_S, f"an incident {kind!r}")

    def wait_for_end(self, job: str, state: str = "COMPLETED", timeout_s: float = START_S) -> None:
        """Wait until a job is over; raises AssertionError if it ended in another state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")
        wait_until(lambda: self.slurm.state(job) in over, timeout_s, f"the end of job {job}")
        assert self.slurm.state(job) == state

    def log(self) -> str:
        """What the run and its ranks have written."""
        files = [self.folder.incidents, *sorted(self.folder.root.glob("*/attempts.jsonl"))]
        files += [*sorted(self.folder.root.glob("*/logs/*.log")), *sorted(self.place.glob("jobs/*/*.log"))]
        return "\n".join(f"---- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files if path.exists())


FAULT = """

_build_engine = build_engine


def build_engine(*arguments, **named):
    import os, signal, time

    engine, rank = _build_engine(*arguments, **named), int(os.environ["RANK"])
    whole_step = engine.step

    def step(*arguments, **named):
        number = engine.optimizer_step + 1
        FAULT
        return whole_step(*arguments, **named)

    engine.step = step
    return engine
"""


def curve(stage: StageFolder) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step on record."""
    lines = stage.metrics.read_text().split("\n")[:-1] if stage.metrics.exists() else []
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]


def wait_until(ready: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Raises AssertionError if something is not so in time."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"{what} never came, in {timeout_s:g} s"
        time.sleep(0.2)
