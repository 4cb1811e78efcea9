"""The model card of an export: its contents, training and use."""

from __future__ import annotations

from megadiff.config import parameters
from megadiff.config.schema import GridSpace, Model, Run, Stage

TEMPLATE = """\
---
library_name: megadiff
tags: [megadiff, multimodal-diffusion]
---

# {name}

One network that diffuses {modalities} at once, each on its own clock (arXiv 2506.07903). {parameters:,} parameters, {weights}.

| modality | space | process | generated |
|---|---|---|---|
{rows}

## Use

    megadiff sample --checkpoint FOLDER --task {task} --out samples

    from megadiff.interfaces.pipeline import MegadiffPipeline
    pipe = MegadiffPipeline.from_pretrained("FOLDER")

## Recipe

Checkpoint of stage `{stage}` after {step:,} of {steps:,} steps. Training data: `{data}`.

| stage | steps | global batch | learning rate | frozen | starts from |
|---|---|---|---|---|---|
{stages}
"""


def model_card(run: Run, stage: Stage, *, step: int, weights: str) -> str:
    """Markdown.

    Args:
        step: optimizer steps of the stage.
        weights: a description of the weights, for people.
    """
    predicted = parameters.predicted(stage)
    names = list(run.model.modalities)
    return TEMPLATE.format(
        name=run.name,
        modalities=" and ".join(names) if len(names) < 3 else f"{len(names)} modalities",
        parameters=parameters.model_parameters(run.model, predicted).total,
        weights=weights,
        rows="\n".join(_row(run.model, name, name in predicted) for name in names),
        task="joint"
        if set(predicted) == set(names)
        else f"{'+'.join(n for n in names if n != predicted[0])}-to-{predicted[0]}",
        stage=stage.name,
        step=step,
        steps=stage.steps,
        data=", ".join(run.data.sources.values()),
        stages="\n".join(_stage_row(each) for each in run.stages),
    )


def _row(model: Model, name: str, generated: bool) -> str:
    modality = model.modalities[name]
    space, process = modality.space, modality.process
    if isinstance(space, GridSpace):
        shape = f"{space.channels} x {space.height} x {space.width}"
    else:
        shape = f"{space.length} of {space.vocabulary:,} tokens"
    return f"| {name} | {shape} | {process.kind}, {process.schedule} | {'yes' if generated else 'no'} |"


def _stage_row(stage: Stage) -> str:
    frozen, source = ", ".join(stage.freeze) or "-", stage.initialise.source or "-"
    rate = f"{stage.optimizer.learning_rate:g}"
    return f"| {stage.name} | {stage.steps:,} | {stage.batch.global_samples} | {rate} | {frozen} | {source} |"
