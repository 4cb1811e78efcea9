"""results.json: figures about a network, with everything that each depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.data.shards.shard import manifest_of
from megadiff.storage import store
from megadiff.types import Metric

FORMAT, VERSION = "megadiff-results", 1
RESULTS = "results.json"


def of_data(source: str) -> dict[str, str]:
    """A source of data as a figure depends on it: its address, and the hash of its manifest."""
    return {"data": source, "data_hash": hashlib.sha256(store.read_bytes(manifest_of(source))).hexdigest()}


def write_results(path: Path, metrics: Sequence[Metric]) -> None:
    """Write figures into a file. Figures in it under other names stay.

    Raises:
        UserError: the file exists and is damaged.
    """
    before = read_results(path) if path.exists() else {}
    merged = {**before, **{metric.name: metric for metric in metrics}}
    tree = {"format": FORMAT, "version": VERSION, "metrics": [asdict(metric) for metric in merged.values()]}
    store.write_bytes(str(path), (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())


def read_results(path: Path) -> dict[str, Metric]:
    """The figures in a file, by name. Raises UserError if it is missing or damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if (tree["format"], tree["version"]) != (FORMAT, VERSION):
            raise UserError(f"{path} is a {tree['format']} of version {tree['version']}; this program reads {FORMAT} {VERSION}")
        metrics = [Metric(**fields) for fields in tree["metrics"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); delete it") from None
    return {metric.name: metric for metric in metrics}


PATHS = ("data", *(f"drawn.{name}" for name in ("data", "prompts", "image", "mask_image", "table", "guide", "autoencoder")))
"""Dependencies that say where something lies; the hash of what lies there is one of its own."""


def differing(one: Metric, other: Metric) -> list[str]:
    """The dependencies in which two figures of one name differ, but for paths; if there are any, the figures do not compare."""
    keys = [key for key in {**one.depends, **other.depends} if key not in PATHS]
    return [key for key in keys if one.depends.get(key) != other.depends.get(key)]


SUBJECT = ("pictures_hash", "drawn.checkpoint", "drawn.weights_hash", "drawn.guide", "drawn.guide_hash", "weights")
"""Dependencies that say what was measured. Two figures compare where they differ in these alone."""


def comparison(one: Metric, other: Metric) -> str:
    """A sentence about an earlier figure of the same name, which names all that keeps the two from comparing."""
    text = f"{one.name} {other.value:.6g} (now {one.value - other.value:+.6g})"
    if keys := [key for key in differing(one, other) if key not in SUBJECT]:
        values = "; ".join(f"{key}: {_shown(other, key)}, now {_shown(one, key)}" for key in keys)
        return f"{text}, DOES NOT COMPARE: {values}"
    return text


def _shown(metric: Metric, key: str) -> str:
    return json.dumps(metric.depends.get(key), ensure_ascii=False)[:80]
