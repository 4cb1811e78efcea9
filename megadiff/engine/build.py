"""The engine of the layout that a DeepSpeed JSON asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from megadiff.config.checks import require
from megadiff.config.layouts import layout_of, misfits
from megadiff.config.schema import Model, Stage
from megadiff.distributed.joining import Facts
from megadiff.distributed.ranks import Ranks
from megadiff.engine.api import Backend
from megadiff.engine.blueprint import draw_up
from megadiff.engine.engine import Engine
from megadiff.engine.initial import InitialValues
from megadiff.engine.inspector import blocks_of
from megadiff.engine.saving import load_weights
from megadiff.engine.start import TIMEOUT, Examine, start_process_group
from megadiff.models.mmdit import initial_distributions


def build_engine(
    model: Model,
    stage: Stage,
    tree: Mapping[str, Any],
    *,
    seed: int,
    ranks: Ranks,
    facts: Facts | None = None,
    timeout: timedelta = TIMEOUT,
    examine: Examine | None = None,
) -> Engine:
    """Join the other ranks, and build this one's part of a freshly initialised model. Collective.

    Args:
        tree: the DeepSpeed JSON as read, with its "auto" values.
        seed: of the initial values.
        facts: what must be equal on all ranks.
        timeout: of every collective.
        examine: called when the ranks have joined, before anything is built.

    Raises:
        UserError: on all ranks, if one is missing or differs; or what `examine` raises.
        ConfigError: the JSON contradicts the stage, or sizes do not divide.
    """
    layout = layout_of(tree, ranks.world, ranks.rank)
    require(misfits(model, stage, layout))
    if layout.tensor > 1:
        # Before CUDA starts: one hardware queue, so that a gradient's sum over ranks begins before the next product.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    blueprint = draw_up(model, stage, tree, layout, start_process_group(ranks, facts, timeout, examine))
    distributions = initial_distributions(blueprint.module)
    backend: Backend
    if layout.pipeline > 1:
        from megadiff.engine.pipeline import PipelineBackend

        backend = PipelineBackend(blueprint)
    else:
        from megadiff.engine.zero import ZeroBackend

        backend = ZeroBackend(blueprint)
    own = backend.pieces.shapes
    load_weights(InitialValues(seed, distributions, own), "weight", set(own), backend.pieces)
    return Engine(backend, stage, blueprint.idle, blocks_of(blueprint.module))
