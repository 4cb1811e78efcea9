"""Rules between sections, each stated once: a run's validator applies all of them; the loader and the sampler apply the one for
the batch or the order that they get.

A rule returns a sentence per fault. It tells sections apart by their `kind`: the schema's Run imports this file, so nothing of
the schema is imported here at run time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.config.errors import ConfigError
from megadiff.config.run_folder import RunFolder

if TYPE_CHECKING:
    from megadiff.config.schema.data import Data, FieldSource
    from megadiff.config.schema.model import Model, Space
    from megadiff.config.schema.sampling import Sampling, Showcase
    from megadiff.config.schema.stage import Alignment, Stage, StageModality


def require(faults: Iterable[str]) -> None:
    """Raises ConfigError with all faults at once, if there are any."""
    if message := "; ".join(faults):
        raise ConfigError(message)


def run_faults(model: Model, data: Data, stages: Sequence[Stage], showcase: Showcase | None) -> list[str]:
    """Every rule that needs no ranks and no shards."""
    faults = data_faults(data, model)
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        faults.append(f"stage names must differ: {', '.join(names)}")
    faults += [f"a stage cannot be named {name}: the run's folder keeps a {name} of its own" for name in _taken(names)]
    for index, stage in enumerate(stages):
        faults += [f"stage {stage.name}: {fault}" for fault in stage_faults(stage, model, data, first=index == 0)]
    if showcase is not None:
        faults += [f"showcase: {fault}" for fault in _shown_faults(showcase.sampling, model, data)]
    return faults


def _taken(names: Iterable[str]) -> list[str]:
    """Names of stages whose folders would be other things in the run's folder."""
    return [name for name in names if name in RunFolder(Path()).names]


# ---------------------------------------------------------------------------------------------------------------- data


def data_faults(data: Data, model: Model) -> list[str]:
    """Every modality is read from one field that fits its space, and features belong to modalities."""
    known, faults = list(model.modalities), []
    if sorted(data.fields) != sorted(known):
        faults.append(f"data.fields ({', '.join(data.fields)}) must name the model's modalities ({', '.join(known)})")
    for name, modality in model.modalities.items():
        if name in data.fields:
            faults += field_faults(name, data.fields[name], modality.space)
    if unknown := [name for name in data.features if name not in known]:
        faults.append(f"data.features names {', '.join(unknown)}; the model's modalities are {', '.join(known)}")
    return faults


def field_faults(name: str, field: FieldSource, space: Space) -> list[str]:
    """A field fills spaces of some kinds and shapes."""
    reason = field.misfit(space)
    return [f"data.fields.{name} is {reason}"] if reason else []


def showing_faults(fields: Mapping[str, FieldSource]) -> list[str]:
    """What is drawn can be shown: latents not without their autoencoder."""
    reasons = [field.unshown(f"data.fields.{name}") for name, field in fields.items()]
    return [reason for reason in reasons if reason]


def mixture_faults(mixture: Mapping[str, float], sources: Collection[str]) -> list[str]:
    """A mixture weighs sources of `data.train`, at least one of them above 0."""
    if unknown := [name for name in mixture if name not in sources]:
        return [f"mixture names {', '.join(unknown)}; data.train has {', '.join(sources)}"]
    if mixture and not any(mixture.values()):
        return ["every weight of the mixture is 0; give one source at least a share"]
    return []


# ------------------------------------------------------------------------------------------------- batch, lanes and ranks


def batch_over_lanes(global_samples: int, lanes: int) -> list[str]:
    """Every lane gives equally many samples to a global batch."""
    if global_samples % lanes == 0:
        return []
    nearest = _nearest(global_samples, lanes)
    return [f"batch.global_samples ({global_samples}) must be a multiple of data.lanes ({lanes}); nearest: {nearest}"]


def lanes_over_ranks(lanes: int, data_ranks: int) -> list[str]:
    """Every data rank owns equally many lanes."""
    if lanes % data_ranks == 0:
        return []
    return [f"data.lanes ({lanes}) must be a multiple of the data ranks ({data_ranks}); nearest: {_nearest(lanes, data_ranks)}"]


def batch_over_ranks(global_samples: int, micro_batch: int, data_ranks: int) -> list[str]:
    """A global batch is a whole number of micro-batches on every data rank."""
    at_once = micro_batch * data_ranks
    if global_samples % at_once == 0:
        return []
    return [
        f"batch.global_samples ({global_samples}) must be a multiple of micro_batch ({micro_batch}) x data ranks "
        f"({data_ranks}) = {at_once}; nearest: {_nearest(global_samples, at_once)}"
    ]


def _nearest(value: int, step: int) -> str:
    """The multiples of `step` below and above."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


# --------------------------------------------------------------------------------------------------------------- stages


def stage_faults(stage: Stage, model: Model, data: Data, *, first: bool) -> list[str]:
    """A stage fits the model, the data, and its place in the run."""
    known, faults = list(model.modalities), []
    if sorted(stage.modalities) != sorted(known):
        faults.append(f"modalities ({', '.join(stage.modalities)}) must be the model's ({', '.join(known)})")
    faults += batch_over_lanes(stage.batch.global_samples, data.lanes)
    faults += mixture_faults(stage.mixture, data.sources)
    parts = ["joint", *known, *(["alignment"] if stage.alignment else [])]
    if unknown := [part for part in stage.freeze if part not in parts]:
        faults.append(f"freeze names {', '.join(unknown)}; known parts: {', '.join(parts)}")
    faults += _loss_faults(stage)
    if stage.samples is not None:
        faults += [f"samples: {fault}" for fault in _shown_faults(stage.samples.sampling, model, data)]
    if stage.held_out_loss is not None and data.held_out is None:
        faults.append("held_out_loss needs data.held_out, the manifest of shards that are never trained on")
    if stage.alignment is not None:
        faults += _alignment_faults(stage.alignment, model, data)
    if first and stage.initialise.from_previous:
        faults.append(f"initialise.source is `{stage.initialise.source}`, but this is the first stage")
    for name, modality in stage.modalities.items():
        if name in known:
            faults += _times_faults(name, modality, model.modalities[name].space)
    return faults


def _loss_faults(stage: Stage) -> list[str]:
    """Something is learnt, from predictions that are made, by parts that are trained."""
    faults = []
    if not any(modality.has_loss for modality in stage.modalities.values()):
        faults.append("no modality is predicted with a loss weight above 0")
    elif not any(modality.scored for modality in stage.modalities.values()):
        faults.append(
            "every modality with a loss is a condition in all samples; let its conditioning shares add up to less than 1"
        )
    shares = sum(m.conditioning.clean + m.conditioning.absent for m in stage.modalities.values())
    if shares > 1 + 1e-9:
        faults.append(f"the conditioning shares of all modalities add up to {shares:g}; at most 1")
    for name, modality in stage.modalities.items():
        if modality.has_loss and "joint" in stage.freeze and name in stage.freeze:
            faults.append(f"{name}: joint and {name} are frozen, so its loss trains nothing; set its loss_weight to 0")
    return faults


def _times_faults(name: str, modality: StageModality, space: Space) -> list[str]:
    if modality.times.kind != "logit_normal" or space.kind != "tokens":
        return []
    return [f"{name}: logit-normal times are for grids; tokens take uniform times (the NELBO weight assumes them)"]


def _alignment_faults(alignment: Alignment, model: Model, data: Data) -> list[str]:
    """A modality that the model has, with features, is aligned after a block that the model has."""
    faults = []
    if alignment.modality not in model.modalities:
        faults.append(f"alignment.modality is {alignment.modality}; the model has {', '.join(model.modalities)}")
    elif alignment.modality not in data.features:
        faults.append(f"alignment needs the shards' features: name their member under data.features.{alignment.modality}")
    if alignment.block >= model.joint_depth:
        faults.append(f"alignment.block is {alignment.block}; the joint blocks are 0 to {model.joint_depth - 1}")
    return faults


# ------------------------------------------------------------------------------------------------------------- sampling


def order_faults(model: Model, sampling: Sampling) -> list[str]:
    """Orders of unmasking, and masking again, need a mask state."""
    maskless = [name for name, modality in model.modalities.items() if modality.process.kind == "uniform"]
    if not maskless or (sampling.order in ("ancestral", "tau_leaping") and sampling.remask == "none"):
        return []
    wanted = sampling.order if sampling.remask == "none" else f"remask: {sampling.remask}"
    return [f"{', '.join(maskless)} has no mask state, which {wanted} needs; take ancestral or tau_leaping"]


def _shown_faults(sampling: Sampling, model: Model, data: Data) -> list[str]:
    """Samples can be drawn, and then be shown."""
    return showing_faults(data.fields) + order_faults(model, sampling)
