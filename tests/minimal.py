"""A small complete run for tests of configuration, launcher and command line; nothing is trained with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadiff.config.errors import ConfigError
from megadiff.config.load import load_run
from megadiff.config.schema import Run

TREE: dict[str, Any] = {
    "name": "minimal",
    "folder": "runs/minimal",
    "model": {
        "width": 32,
        "heads": 2,
        "head_dim": 16,
        "joint_depth": 2,
        "modalities": {
            "text": {
                "space": {"kind": "tokens", "vocabulary": 50, "length": 8},
                "process": {"kind": "masked"},
                "tower_depth": 1,
            },
            "image": {
                "space": {"kind": "grid", "channels": 3, "height": 8, "width": 8, "patch": 4},
                "process": {"kind": "gaussian"},
                "tower_depth": 1,
            },
        },
    },
    "data": {
        "train": "train.json",
        "fields": {"text": {"kind": "caption", "tokenizer": "tokenizer.json"}, "image": {"kind": "pixels"}},
    },
    "stage_defaults": {
        "steps": 4,
        "batch": {"global_samples": 16, "micro_batch": 4},
        "ema": {"main": {"kind": "constant", "decay": 0.9}},
        "modalities": {"text": {}, "image": {}},
    },
    "stages": [
        {"name": "first", "modalities": {"text": {"predicted": False}}},
        {"name": "second", "initialise": {"source": "previous", "new": ["text"]}, "freeze": ["joint"]},
    ],
    "launch": {"processes": 2},
}

ZERO3: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3},
}


def tree(**changes: Any) -> dict[str, Any]:
    """A copy of TREE; `a__b=value` sets the key b of section a."""
    changed = copy.deepcopy(TREE)
    for address, value in changes.items():
        *sections, key = address.split("__")
        node = changed
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return changed


def write_yaml(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def minimal_run(folder: Path, **changes: Any) -> Run:
    """TREE as a Run whose folder is `folder`/run and whose data files exist (empty)."""
    for name in ("train.json", "tokenizer.json"):
        (folder / name).touch()
    content = tree(folder=str(folder / "run"), data__train=str(folder / "train.json"), **changes)
    content["data"]["fields"]["text"]["tokenizer"] = str(folder / "tokenizer.json")
    return load_run(write_yaml(folder / "minimal.yaml", content))


def load(folder: Path, *overrides: str, **changes: Any) -> Run:
    """TREE, changed, as a run file is loaded."""
    return load_run(write_yaml(folder / "run.yaml", tree(**changes)), overrides)


def fault(folder: Path, *overrides: str, **changes: Any) -> str:
    """The one line that says what is wrong with TREE, changed."""
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message
