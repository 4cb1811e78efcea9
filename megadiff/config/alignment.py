"""Alignment and buckets: all features have one shape, which restricts the buckets of a run's shards."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megadiff.config.errors import ConfigError
from megadiff.config.parameters import token_count
from megadiff.config.schema import Data, GridSpace, LatentField, Model, Run

_MANIFEST = "manifest.json"


def check_features(
    address: str, buckets: Collection[str], encoded: Mapping[str, Any], data: Data, model: Model, modality: str
) -> None:
    """Whether all shards of a manifest have as many features of a modality as the model has tokens.

    Args:
        buckets: HEIGHTxWIDTH in pixels, of all shards.
        encoded: the manifest's facts of encoded members, by ending.

    Raises:
        ConfigError: buckets of other sizes have other numbers of them.
    """
    space, field = model.modalities[modality].space, data.fields[modality]
    if not isinstance(space, GridSpace):
        return
    rows, columns = space.patch_sides
    if isinstance(field, LatentField):
        factor = encoded.get(field.member, {}).get("factor")
        if not isinstance(factor, int):
            return
        rows, columns = rows * factor, columns * factor
    wanted = token_count(space)
    for bucket in sorted(buckets):
        height, width = (int(edge) for edge in bucket.split("x"))
        count = height // rows * (width // columns)
        if count != wanted:
            raise ConfigError(
                f"{address} has buckets ({bucket}: {count} features a sample), and alignment takes {wanted} of {modality}, as "
                "for the model's own size; pack without buckets, or leave `alignment` out of the stages"
            )


def check_local_manifests(run: Run) -> None:
    """`check_features` of the manifests on this machine, for every stage that aligns; others are checked when they are read.

    Raises:
        ConfigError: as `check_features`.
    """
    aligned = {stage.alignment.modality for stage in run.stages if stage.alignment}
    if not aligned:
        return
    for address in run.data.sources.values():
        manifest = _local_manifest(address)
        for modality in sorted(aligned):
            check_features(address, *_facts(manifest), run.data, run.model, modality)


def _facts(manifest: Mapping[str, Any]) -> tuple[set[str], Mapping[str, Any]]:
    """(buckets, facts of encoded members by ending); entries that no manifest has are ignored."""
    shards, encoded = manifest.get("shards"), manifest.get("encoded")
    buckets = {str(shard.get("bucket")) for shard in shards if isinstance(shard, dict)} if isinstance(shards, list) else set()
    members = encoded.items() if isinstance(encoded, dict) else ()
    return (
        {bucket for bucket in buckets if re.fullmatch(r"[1-9]\d*x[1-9]\d*", bucket)},
        {member: facts for member, facts in members if isinstance(facts, dict)},
    )


def _local_manifest(address: str) -> dict[str, Any]:
    """A manifest on this machine; empty if it cannot be read, which is an error once the shards are opened."""
    address = address.removeprefix("file://")
    if "://" in address:
        return {}
    path = Path(address)
    try:
        tree = json.loads((path if path.suffix == ".json" else path / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
