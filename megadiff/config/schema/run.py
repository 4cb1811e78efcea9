"""A whole run, and how it is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megadiff.config import checks
from megadiff.config.errors import ConfigError
from megadiff.config.run_folder import RunFolder
from megadiff.config.schema.base import LocalPath, NotNegative, Positive, Seconds, Section, Share
from megadiff.config.schema.data import Data
from megadiff.config.schema.model import Model
from megadiff.config.schema.monitoring import Monitoring
from megadiff.config.schema.sampling import Showcase
from megadiff.config.schema.stage import Stage


class Launch(Section):
    """How `megadiff launch` starts ranks on this machine."""

    processes: Positive | Literal["accelerators"] = "accelerators"
    """Ranks on this machine; `accelerators`: one per GPU, or one on a machine without."""
    threads_per_process: Positive | None = None
    """OMP_NUM_THREADS of each rank; None divides the cores."""


class Preflight(Section):
    """What ranks look at before a stage is built (docs/preflight.md). May change between two starts of a run."""

    enabled: bool | Literal["auto"] = "auto"
    """auto: in a Slurm job, or on more than one node."""
    at_most_s: Annotated[float, Field(ge=5, le=600)] = 60.0
    """What has not answered by then is a fault."""
    clock_s: Seconds = 5.0
    """The most that a node's clock may differ from the others'."""
    free_bytes: NotNegative = 2**30
    """The least room on the disk of each cache folder; in the run's folder a checkpoint's besides."""
    slow_below: Share = 0.5
    """A node is slow whose all-reduce has less than this share of the median bandwidth; seen from three nodes on."""
    slow_nodes: Literal["report", "refuse"] = "report"
    """Whether a run with a slow node starts, and reports it as an incident."""


class Spikes(Section):
    """When a loss counts as risen for good: the run goes back to a checkpoint from before, and leaves out those batches."""

    deviations: Annotated[float, Field(gt=0)] = 8.0
    """How far above the median of the last steps, in standard deviations that outliers do not widen."""
    steps: Positive = 10
    """For so many steps in a row."""
    window: Annotated[int, Field(ge=10)] = 100
    """How many steps are the measure."""
    most: NotNegative = 3
    """How often a stage goes back; then the run stops."""


class Safeguards(Section):
    """What becomes of a run in trouble (docs/surviving.md). May change between two starts of a run."""

    skipped_in_a_row: Positive = 10
    """A step with a non-finite loss or gradient is never applied; after so many in a row the run stops. 1: at the first."""
    spikes: Spikes | None = Spikes()
    """Null: losses are not watched."""
    stalled_after_s: Seconds = 1800.0
    """A rank whose step and phase have not changed for so long writes the stacks of its threads to its log."""
    ended_after_s: Seconds = 7200.0
    """... and after so long it ends, so that the launcher starts the ranks again. More than any evaluation takes."""
    collective_timeout_s: Seconds = 1800.0
    """Ranks that wait for others for longer in a collective fail."""

    @model_validator(mode="after")
    def _stacks_come_first(self) -> Safeguards:
        if self.ended_after_s <= self.stalled_after_s:
            raise ValueError(
                f"ended_after_s ({self.ended_after_s:g}) must be more than stalled_after_s ({self.stalled_after_s:g})"
            )
        return self


class Run(Section):
    """A whole run: one model, one source of data, a chain of stages."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    folder: LocalPath
    """A folder that all ranks share. Where checkpoints, logs and samples go."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    model: Model
    data: Data
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    launch: Launch = Launch()
    preflight: Preflight = Preflight()
    safeguards: Safeguards = Safeguards()
    monitoring: Monitoring = Monitoring()
    showcase: Showcase | None = None

    @property
    def paths(self) -> RunFolder:
        """Where everything of the run lies."""
        return RunFolder(Path(self.folder))

    def stage(self, name: str) -> Stage:
        """Raises ConfigError if the run has no such stage."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"the run has no stage {name}; its stages: {', '.join(stage.name for stage in self.stages)}")

    @model_validator(mode="after")
    def _parts_agree(self) -> Run:
        if faults := checks.run_faults(self.model, self.data, self.stages, self.showcase):
            raise ValueError("; ".join(faults))
        return self
