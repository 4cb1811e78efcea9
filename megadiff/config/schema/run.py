"""A whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megadiff.config.errors import ConfigError
from megadiff.config.run_folder import RunFolder
from megadiff.config.schema.base import LocalPath, Positive, Section
from megadiff.config.schema.data import CaptionField, ClassField, Data, LatentField, NumberField, PixelField
from megadiff.config.schema.model import GridSpace, Model, TokenSpace, UniformProcess
from megadiff.config.schema.sampling import Sampling, Showcase
from megadiff.config.schema.stage import Alignment, Stage


class Launch(Section):
    """How `megadiff launch` starts ranks on this machine."""

    processes: Positive | Literal["accelerators"] = "accelerators"
    """Ranks on this machine; `accelerators`: one per GPU, or one on a machine without."""
    threads_per_process: Positive | None = None
    """OMP_NUM_THREADS of each rank; None divides the cores."""


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
        faults: list[str] = []
        known = list(self.model.modalities)
        if sorted(self.data.fields) != sorted(known):
            faults.append(f"data.fields ({', '.join(self.data.fields)}) must name the model's modalities ({', '.join(known)})")
        faults += [fault for name in known if name in self.data.fields for fault in _field_faults(name, self)]
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            faults.append(f"stage names must differ: {', '.join(names)}")
        for index, stage in enumerate(self.stages):
            faults += _stage_faults(stage, self, first=index == 0)
        if self.showcase is not None:
            faults += _invisible(self, "showcase") + _order_faults(self.model, self.showcase.sampling, "showcase")
        if unknown := [name for name in self.data.features if name not in known]:
            faults.append(f"data.features names {', '.join(unknown)}; the model's modalities are {', '.join(known)}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _field_faults(name: str, run: Run) -> list[str]:
    field, space = run.data.fields[name], run.model.modalities[name].space
    where = f"data.fields.{name}"
    match field, space:
        case PixelField(), GridSpace():
            fits = space.channels in (1, 3)
            return [] if fits else [f"{where} is pixels, which fill 1 or 3 channels, and its grid has {space.channels}"]
        case NumberField(), GridSpace():
            fits = (space.channels, space.height, space.width) == (1, 1, 1)
            return [] if fits else [f"{where} is a number, which fills a grid of 1 x 1 x 1"]
        case ClassField(), TokenSpace():
            fits = space.length == 1 and space.end_id is None
            return [] if fits else [f"{where} is a class, which fills a token space of length 1 without an end_id"]
        case (LatentField(), GridSpace()) | (CaptionField(), TokenSpace()):
            return []
    return [f"{where} is {field.kind}, which cannot fill a {space.kind} space"]


def _stage_faults(stage: Stage, run: Run, *, first: bool) -> list[str]:
    where = f"stage {stage.name}: "
    known = list(run.model.modalities)
    faults = []
    if sorted(stage.modalities) != sorted(known):
        faults.append(f"modalities ({', '.join(stage.modalities)}) must be the model's ({', '.join(known)})")
    if stage.batch.global_samples % run.data.lanes:
        count = stage.batch.global_samples
        below = count // run.data.lanes * run.data.lanes
        faults.append(
            f"batch.global_samples ({count}) must be a multiple of data.lanes ({run.data.lanes}); "
            f"nearest: {below or run.data.lanes} or {below + run.data.lanes}"
        )
    if strangers := [name for name in stage.mixture if name not in run.data.sources]:
        faults.append(f"mixture names {', '.join(strangers)}; data.train has {', '.join(run.data.sources)}")
    elif stage.mixture and not any(stage.mixture.values()):
        faults.append("every weight of the mixture is 0; give one source at least a share")
    parts = ["joint", *known, *(["alignment"] if stage.alignment else [])]
    unknown = [part for part in stage.freeze if part not in parts]
    if unknown:
        faults.append(f"freeze names {', '.join(unknown)}; known parts: {', '.join(parts)}")
    if not any(modality.predicted and modality.loss_weight > 0 for modality in stage.modalities.values()):
        faults.append("no modality is predicted with a loss weight above 0")
    elif not any(modality.scored for modality in stage.modalities.values()):
        faults.append(
            "every modality with a loss is a condition in all samples; let its conditioning shares add up to less than 1"
        )
    if stage.samples is not None:
        faults += _invisible(run, "samples") + _order_faults(run.model, stage.samples.sampling, "samples")
    if stage.alignment is not None:
        faults += _alignment_faults(stage.alignment, run)
    shares = sum(m.conditioning.clean + m.conditioning.absent for m in stage.modalities.values())
    if shares > 1 + 1e-9:
        faults.append(f"the conditioning shares of all modalities add up to {shares:g}; at most 1")
    if first and stage.initialise.source == "previous":
        faults.append("initialise.source is `previous`, but this is the first stage")
    for name, modality in stage.modalities.items():
        space = run.model.modalities[name].space.kind if name in known else "grid"
        if modality.times.kind == "logit_normal" and space == "tokens":
            faults.append(
                f"{name}: logit-normal times are for grids; tokens take uniform times (the NELBO weight assumes them)"
            )
        if modality.predicted and modality.loss_weight > 0 and "joint" in stage.freeze and name in stage.freeze:
            faults.append(f"{name}: joint and {name} are frozen, so its loss trains nothing; set its loss_weight to 0")
    return [where + fault for fault in faults]


def _order_faults(model: Model, sampling: Sampling, section: str) -> list[str]:
    """Orders of unmasking need a mask."""
    maskless = [name for name, modality in model.modalities.items() if isinstance(modality.process, UniformProcess)]
    if not maskless or (sampling.order in ("ancestral", "tau_leaping") and sampling.remask == "none"):
        return []
    wanted = sampling.order if sampling.remask == "none" else f"remask: {sampling.remask}"
    return [f"{section}: {', '.join(maskless)} has no mask state, which {wanted} needs; take ancestral or tau_leaping"]


def _invisible(run: Run, section: str) -> list[str]:
    """Latents cannot be shown without their autoencoder."""
    blind = [name for name, f in run.data.fields.items() if isinstance(f, LatentField) and f.autoencoder is None]
    return [f"{section} shows {name}, which needs data.fields.{name}.autoencoder" for name in blind]


def _alignment_faults(alignment: Alignment, run: Run) -> list[str]:
    faults = []
    if alignment.modality not in run.model.modalities:
        faults.append(f"alignment.modality is {alignment.modality}; the model has {', '.join(run.model.modalities)}")
    elif alignment.modality not in run.data.features:
        faults.append(f"alignment needs the shards' features: name their member under data.features.{alignment.modality}")
    if alignment.block >= run.model.joint_depth:
        faults.append(f"alignment.block is {alignment.block}; the joint blocks are 0 to {run.model.joint_depth - 1}")
    return faults
