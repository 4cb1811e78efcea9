"""The layout of ranks that a DeepSpeed JSON asks for. Torch-free.

Two keys of the JSON are megadiff's own and are taken out before DeepSpeed reads the rest: `pipeline: {stages: P}` and
`tensor_model_parallel_size: T`. All ranks that these leave, world / (P x T), are data-parallel.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from megadiff.config.errors import ConfigError
from megadiff.config.layout import Layout
from megadiff.config.partition import partition
from megadiff.config.schema import Model, Stage
from megadiff.config.tensor import refusals

PIPELINE, STAGES, TENSOR = "pipeline", "stages", "tensor_model_parallel_size"


def sizes(tree: Mapping[str, Any]) -> tuple[int, int]:
    """(pipeline stages, tensor ranks) of a checked tree; 1 is none."""
    return tree.get(PIPELINE, {}).get(STAGES, 1), tree.get(TENSOR, 1)


def with_sizes(tree: Mapping[str, Any], pipeline: int | None = None, tensor: int | None = None) -> dict[str, Any]:
    """The tree with other sizes, where given."""
    changed = copy.deepcopy(dict(tree))
    if pipeline is not None:
        changed[PIPELINE] = {STAGES: pipeline}
    if tensor is not None:
        changed[TENSOR] = tensor
    return changed


def without_sizes(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed reads."""
    return {key: copy.deepcopy(value) for key, value in tree.items() if key not in (PIPELINE, TENSOR)}


def layout_of(tree: Mapping[str, Any], world: int, rank: int = 0) -> Layout:
    """A checked tree's layout of `world` ranks, seen from one of them.

    Raises:
        ConfigError: the ranks do not divide.
    """
    pipeline, tensor = sizes(tree)
    if world % (pipeline * tensor):
        parts = Layout(0, pipeline * tensor, pipeline, tensor)
        least = -(-world // (pipeline * tensor)) * pipeline * tensor
        raise ConfigError(
            f"{world} rank{'s' * (world > 1)} cannot be {parts}: start a multiple of {pipeline * tensor}, such as {least}"
        )
    return Layout(rank, world, pipeline, tensor)


def misfits(model: Model, stage: Stage, layout: Layout) -> list[str]:
    """Why a model cannot be trained in a layout: sizes that do not divide, more pipeline stages than layers, or what the layout
    does not support.
    """
    found = refusals(model, layout.tensor)
    if stage.compile and layout.tensor > 1:
        found.append("compile is not supported with tensor parallelism, whose layers wait for each other; leave one out")
    try:
        partition(model, stage, layout.pipeline)
    except ConfigError as error:
        return [str(error), *found]
    return found


def faults(tree: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the two keys, and with ZeRO under them."""
    block = tree.get(PIPELINE, {})
    if not isinstance(block, dict):
        yield f"{PIPELINE} must be a block {{...}}, not {json.dumps(block)}"
        return
    for key in block:
        if key != STAGES:
            yield f"{PIPELINE}.{key}: only {STAGES} may stand there; the rest of the pipeline is megadiff's own"
    counts = {f"{PIPELINE}.{STAGES}": block.get(STAGES, 1), TENSOR: tree.get(TENSOR, 1)}
    wrong = [name for name, count in counts.items() if not isinstance(count, int) or isinstance(count, bool) or count < 1]
    for name in wrong:
        yield f"{name} is {json.dumps(counts[name])}; it must be a whole number, 1 or more"
    zero = tree.get("zero_optimization", {})
    if not wrong and counts[f"{PIPELINE}.{STAGES}"] > 1 and isinstance(zero, dict):
        if zero.get("stage", 0) in (2, 3):
            yield (
                f"zero_optimization.stage {zero['stage']} under a pipeline: DeepSpeed accumulates whole gradients "
                "there; use stage 1 (ds_configs/pipeline.json), or no pipeline"
            )
        for key in ("offload_optimizer", "offload_param"):
            if zero.get(key, {}).get("device", "none") != "none":
                yield f"zero_optimization.{key} under a pipeline is not supported; offload with ZeRO-3, without a pipeline"
