"""Models of every kind, and a stage and a run of them, to count what they hold and cost."""

from __future__ import annotations

from pathlib import Path

import yaml

from megadiff.config.schema import Model, Run, Stage

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def model_file(name: str) -> Model:
    return Model.model_validate(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"])


def small(*, depths=(1, 2), positions=("rope", "rope"), widths=(None, None), vocabulary=37, **changes) -> Model:
    modalities = {
        "text": {
            "space": {"kind": "tokens", "vocabulary": vocabulary, "length": 7},
            "process": {"kind": "masked", "loss": "plain"},
            "tower_depth": depths[0],
            "positions": positions[0],
            "width": widths[0],
        },
        "image": {
            "space": {"kind": "grid", "channels": 3, "height": 8, "width": 4, "patch": 2},
            "process": {"kind": "gaussian"},
            "tower_depth": depths[1],
            "positions": positions[1],
            "width": widths[1],
        },
    }
    sizes = {"width": 20, "heads": 2, "head_dim": 12, "joint_depth": 3}
    return Model.model_validate({"modalities": modalities, **sizes, **changes})


MODELS = {
    "paper": model_file("paper"),
    "emoji32": model_file("emoji32"),
    "rope and swiglu": small(),
    "learned, sincos and gelu": small(positions=("learned", "sincos"), mlp="gelu", mlp_ratio=3.3),
    "learned grid, biases, no norm of q and k": small(positions=("learned", "learned"), attention_bias=True, qk_norm=False),
    "trunk norm without towers": small(depths=(0, 0), trunk_norm=True),
    "trunk norm with towers": small(trunk_norm=True),
    "no joint blocks": small(joint_depth=0),
    "unequal widths": small(positions=("learned", "sincos"), widths=(None, 28), mlp="gelu", trunk_norm=True),
    "unequal widths and swiglu": small(widths=(16, 24)),
}


def stage(**changes) -> Stage:
    tree = {
        "name": "all",
        "steps": 10,
        "modalities": {"text": {}, "image": {}},
        "batch": {"global_samples": 64, "micro_batch": 4},
        "ema": {"main": {"kind": "constant"}},
    }
    return Stage.model_validate({**tree, **changes})


def run(model: Model, **changes) -> Run:
    fields = {"text": {"kind": "caption", "tokenizer": "t.json"}, "image": {"kind": "pixels"}}
    data = {"train": "here", "fields": fields, "lanes": 8, **changes}
    return Run.model_validate({"name": "r", "folder": "runs/r", "model": model, "data": data, "stages": [stage()]})
