"""Idle parameters: those that no loss of a stage reaches. They are neither stepped nor decayed, for a later stage.

config/parameters.py counts them too; a test compares both with the parameters without a gradient in the built model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megadiff.config.parameters import PROJECTION_SLOTS, TIME_FEATURES, always_absent, always_clean, reached, scored
from megadiff.config.schema import MaskedProcess, Model, Stage, TokenSpace

Region = tuple[slice, ...]
"""A part of a tensor, as an index."""


class Idle(NamedTuple):
    """Names of the parameters that are idle as a whole, and by name the idle part of others."""

    whole: frozenset[str]
    partial: dict[str, Region]


def idle_parameters(config: Model, stage: Stage, names: Iterable[str]) -> Idle:
    """The idle ones among the parameters `names` of a stage's model, frozen ones included."""
    prefixes = tuple(_prefixes(config, stage))
    present = set(names)
    whole = frozenset(name for name in present if name.startswith(prefixes))
    regions = {name: region for name, region in _regions(config, stage) if name in present - whole}
    return Idle(whole, regions)


def _prefixes(config: Model, stage: Stage) -> Iterator[str]:
    for name in config.modalities:
        if name not in scored(stage):
            yield from (f"towers.{name}.", f"heads.{name}.", f"trunk_norm.norms.{name}.")
        if name not in reached(config, stage):
            last = _last_block(config, name)
            yield from (f"{last}.output.", f"{last}.mlp.", f"{last}.projection.query_gain")
            if config.joint_depth == 0:
                yield from (f"embed.states.{name}.", f"embed.clocks.{name}.")


def _regions(config: Model, stage: Stage) -> Iterator[tuple[str, Region]]:
    """Rows of the last joint block that act after its attention only, and weights of inputs that never occur."""
    queries = slice(config.heads * config.head_dim)
    for name, modality in config.modalities.items():
        after_attention = slice(PROJECTION_SLOTS * config.width_of(name), None)
        if name not in reached(config, stage):
            for kind in ("weight", "bias"):
                yield f"{_last_block(config, name)}.projection.linear.{kind}", (queries,)
                yield f"{_last_block(config, name)}.modulation.{kind}", (after_attention,)
        if always_clean(stage, name):
            yield f"embed.clocks.{name}.up.weight", (slice(None), slice(TIME_FEATURES // 2, None))  # the sine of 0
        if isinstance(modality.process, MaskedProcess) and isinstance(modality.space, TokenSpace):
            tokens = modality.space.vocabulary
            if always_clean(stage, name):
                yield f"embed.states.{name}.weight", (slice(tokens, None),)
            elif always_absent(stage, name):
                yield f"embed.states.{name}.weight", (slice(tokens),)


def _last_block(config: Model, name: str) -> str:
    """The name of a modality's part of the last joint block; no parameter has it in a model without joint blocks."""
    return f"joint.{config.joint_depth - 1}.parts.{name}"
