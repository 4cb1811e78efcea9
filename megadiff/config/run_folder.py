"""A run's folder: the one owner of every path in it. Torch-free.

RUN/  run.yaml  deepspeed.json  .lock  .ranks  .fence  STOP  incidents.jsonl  samples.png  results.json
      tensorboard/STAGE/  wandb/
      hostfile  jobs.jsonl  submitted/NNN/  code/megadiff/  config.yaml  deepspeed.json  cluster.yaml  NAME.sh  NAME.log
      STAGE/  DONE  error.txt[.JOB.TURN]  metrics.jsonl  results.jsonl  attempts.jsonl  wandb_id  pictures/*.png
              trace.json.gz  heartbeats/rank_N.json
              logs/  rank_N.log  job_J.log  collectives_N
              checkpoints/  step_XXXXXXXX/manifest.json  latest  best
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

RUN = "run.yaml"
"""The resolved run."""
MANIFEST = "manifest.json"
"""The file in a checkpoint's folder that says what it holds; written last."""
EXPORT = "megadiff.yaml"
"""The file in an export's folder that says what it holds."""
_STEP = "step_"


class Phase(StrEnum):
    """What a rank is doing."""

    START = "start"
    """Building the engine, or loading weights."""
    DATA = "data"
    STEP = "step"
    EVALUATE = "evaluate"
    SAVE = "save"


@dataclass(frozen=True)
class Heartbeat:
    """The content of a rank's heartbeat file, as a JSON object.

    Attributes:
        step: the optimizer step in work, or the last one.
        time: when step or phase last changed, in seconds since 1970.
    """

    step: int
    phase: Phase
    time: float


class IncidentKind(StrEnum):
    """What may happen to a run."""

    START = "start"
    RESUME = "resume"
    CHANGED = "changed"
    """The configuration or the software is not that of the checkpoint from which training goes on."""
    PREFLIGHT = "preflight"
    """Nodes are not fit for the run, or slow."""
    STOP = "stop"
    """As asked, with a checkpoint."""
    SKIPPED = "skipped"
    """A step was left out: its loss or gradient was not finite."""
    SUSPECT = "suspect"
    """The step at which the start before ended badly is done again; its samples are named."""
    SPIKE = "spike"
    """The loss rose and stayed; training went back to a checkpoint from before."""
    DAMAGED = "damaged"
    """A checkpoint is damaged; the one before it is resumed from."""
    COPY = "copy"
    """A checkpoint could not be copied to the object store; training goes on."""
    EVALUATION = "evaluation"
    """A metric could not be measured; training goes on."""
    EXPORT = "export"
    """Records could not be sent to where `monitoring` says; training goes on."""
    ERROR = "error"


@dataclass(frozen=True)
class Incident:
    """A line of a run's incidents, as a JSON object.

    Attributes:
        step: the last whole optimizer step; of a skipped one its own number.
        time: in seconds since 1970.
        detail: for people; may be empty.
    """

    kind: IncidentKind
    stage: str
    step: int
    time: float
    detail: str

    @property
    def markdown(self) -> str:
        return f"**{self.kind.value}** at step {self.step}: {self.detail}"

    @classmethod
    def all_in(cls, path: Path) -> list[Incident]:
        """The whole lines of a run's incidents."""
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [cls(**{**row, "kind": IncidentKind(row["kind"])}) for row in map(json.loads, lines)]

    @classmethod
    def newest(cls, path: Path) -> Incident | None:
        """The last one; None without any."""
        return next(reversed(cls.all_in(path)), None)


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies."""

    root: Path

    @property
    def run(self) -> Path:
        """The resolved run, as YAML."""
        return self.root / RUN

    @property
    def deepspeed(self) -> Path:
        """The DeepSpeed JSON that the run was last launched with."""
        return self.root / "deepspeed.json"

    @property
    def lock(self) -> Path:
        """Held by a launch."""
        return self.root / ".lock"

    @property
    def ranks_lock(self) -> Path:
        """Held, shared, by every rank."""
        return self.root / ".ranks"

    @property
    def fence(self) -> Path:
        """The token of the newest start of the ranks: it alone may publish checkpoints."""
        return self.root / ".fence"

    @property
    def fence_lock(self) -> Path:
        """Held while a token is taken."""
        return self.root / ".fence.lock"

    @property
    def stop(self) -> Path:
        """A file by which anyone asks the ranks to save and end; they delete it when they have."""
        return self.root / "STOP"

    @property
    def incidents(self) -> Path:
        """An Incident per line; grows over restarts, and rank 0 alone writes it."""
        return self.root / "incidents.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's logs, a folder per stage."""
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """W&B's own files."""
        return self.root / "wandb"

    @property
    def samples(self) -> Path:
        """The sheet of samples that is drawn at the end."""
        return self.root / "samples.png"

    @property
    def report(self) -> Path:
        """The page that tells of the run."""
        return self.root / "report.html"

    @property
    def results(self) -> Path:
        """The figures that are measured at the end, and what they depend on."""
        return self.root / "results.json"

    @property
    def jobs(self) -> Path:
        """A line (SubmittedJob) per job of the run."""
        return self.root / "jobs.jsonl"

    @property
    def hostfile(self) -> Path:
        """The machines that DeepSpeed's launcher reaches by ssh."""
        return self.root / "hostfile"

    @property
    def submissions(self) -> Path:
        return self.root / "submitted"

    def submission(self, number: int) -> SubmissionFolder:
        return SubmissionFolder(self.submissions / f"{number:03d}")

    def next_submission(self) -> int:
        """The number that the next submission takes, from 1."""
        taken = [int(path.name) for path in self.submissions.glob("*") if path.name.isdigit()]
        return max(taken, default=0) + 1

    @property
    def names(self) -> frozenset[str]:
        """The names in this folder that are no stage's."""
        locks = (self.lock, self.ranks_lock, self.fence, self.fence_lock)
        launched = (self.run, self.deepspeed, self.hostfile, *locks, self.stop, self.jobs, self.submissions)
        paths = (*launched, self.incidents, self.tensorboard, self.wandb, self.samples, self.results)
        return frozenset(path.name for path in paths)

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self, name)

    @property
    def launched(self) -> bool:
        """Whether something was launched here, or a rank has run here."""
        return any(path.exists() for path in (self.deepspeed, self.lock, self.ranks_lock))


@dataclass(frozen=True)
class SubmissionFolder:
    """What was submitted at once: jobs run what lies here, however much later they start."""

    root: Path

    @property
    def code(self) -> Path:
        """A folder that holds the package."""
        return self.root / "code"

    @property
    def config(self) -> Path:
        """The resolved run. It is not called as in the run's folder, for here is not the run's folder."""
        return self.root / "config.yaml"

    @property
    def deepspeed(self) -> Path:
        return self.root / "deepspeed.json"

    @property
    def cluster(self) -> Path:
        return self.root / "cluster.yaml"

    def script(self, name: str) -> Path:
        """What Slurm runs for a job."""
        return self.root / f"{name}.sh"

    def hostfile(self, name: str) -> Path:
        """The nodes of a job, for DeepSpeed's launcher; the job writes it."""
        return self.root / f"{name}.hosts"

    def error(self, name: str) -> Path:
        """The sentence of a rank that stopped for a user's mistake, of a job that is no stage."""
        return self.root / f"{name}.error"

    def log(self, name: str) -> Path:
        """The output of a job that is no stage."""
        return self.root / f"{name}.log"


@dataclass(frozen=True)
class StageFolder:
    """Where everything of a stage lies."""

    of: RunFolder
    name: str

    @property
    def root(self) -> Path:
        return self.of.root / self.name

    @property
    def done(self) -> Path:
        """A file that exists once the stage has been trained to its end."""
        return self.root / "DONE"

    @property
    def error(self) -> Path:
        """The sentence of a rank that stopped for a user's mistake; Slurm's jobs add their number and turn to the name."""
        return self.root / "error.txt"

    @property
    def metrics(self) -> Path:
        """A JSON line per step, with the time of its end in seconds since 1970."""
        return self.root / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """A JSON line per figure that was measured while training."""
        return self.root / "results.jsonl"

    @property
    def trace(self) -> Path:
        """The trace of the first settled steps, for Perfetto."""
        return self.root / "trace.json.gz"

    @property
    def wandb_id(self) -> Path:
        """The name of the stage at W&B, so that a stage that goes on does so there as well."""
        return self.root / "wandb_id"

    @property
    def pictures(self) -> Path:
        """Pictures drawn while training, by tag and step."""
        return self.root / "pictures"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def log(self, rank: int) -> Path:
        """A rank's own log, which grows over restarts."""
        return self.logs / f"rank_{rank}.log"

    @property
    def collectives(self) -> str:
        """What the name of a rank's record of collectives begins with; its number follows, as NCCL has it."""
        return str(self.logs / "collectives_")

    @property
    def heartbeats(self) -> Path:
        return self.root / "heartbeats"

    def heartbeat(self, rank: int) -> Path:
        """A rank's Heartbeat."""
        return self.heartbeats / f"rank_{rank}.json"

    def job_log(self, job: str) -> Path:
        """A job's output, which grows over restarts."""
        return self.logs / f"job_{job}.log"

    @property
    def attempts(self) -> Path:
        """A line (Attempt) whenever a job starts or ends its work on the stage."""
        return self.root / "attempts.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.of.tensorboard / self.name

    @property
    def checkpoints(self) -> CheckpointsFolder:
        return CheckpointsFolder(self.root / "checkpoints")


@dataclass(frozen=True)
class CheckpointsFolder:
    """Where the checkpoints of a stage lie."""

    root: Path

    @property
    def latest(self) -> Path:
        """A file with the name of the newest checkpoint."""
        return self.root / "latest"

    @property
    def best(self) -> Path:
        """A file with the name of the best checkpoint (`checkpoint.best`)."""
        return self.root / "best"

    def named(self, pointer: str) -> Path | None:
        """The whole checkpoint that `latest` or `best` names; None if there is none."""
        if pointer == self.latest.name:
            return self.newest()
        if not self.best.is_file():
            return None
        folder = self.root / self.best.read_text(encoding="utf-8").strip()
        return folder if (folder / MANIFEST).exists() else None

    def step(self, step: int) -> Path:
        """The checkpoint of an optimizer step, once it is whole."""
        return self.root / f"{_STEP}{step:08d}"

    def partial(self, step: int, token: str = "") -> Path:
        """The folder that the checkpoint is written to until it is whole; of its own for each start of the run."""
        return self.root / f".partial-{_STEP}{step:08d}{token and '-'}{token}"

    def partials(self) -> list[Path]:
        """Leftovers of interrupted saves."""
        return list(self.root.glob(f".partial-{_STEP}*"))

    def published(self) -> dict[int, Path]:
        """Whole checkpoints by step, oldest first; a user's copies under other names are ignored."""
        steps = {step_of(path.name): path for path in self.root.glob(f"{_STEP}*")}
        return dict(sorted((step, path) for step, path in steps.items() if step is not None and (path / MANIFEST).exists()))

    def newest(self) -> Path | None:
        """The newest whole checkpoint. A pointer to nothing falls back to the newest folder."""
        if self.latest.exists():
            newest = self.root / self.latest.read_text(encoding="utf-8").strip()
            if (newest / MANIFEST).exists():
                return newest
        return next(reversed(self.published().values()), None)

    def newest_first(self) -> list[Path]:
        """The newest whole checkpoint, and those before it."""
        newest, whole = self.newest(), list(self.published().values())
        if newest is None:
            return []
        older = whole[: whole.index(newest)] if newest in whole else []
        return [newest, *reversed(older)]


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder by its name; None of other names."""
    match = re.fullmatch(rf"{_STEP}([0-9]{{8,}})", name)
    return int(match[1]) if match else None
