"""Small models of every kind, and what to feed them."""

from __future__ import annotations

import torch

from megadiff.config.schema import Model
from megadiff.models.mmdit import MMDiT, build_model
from megadiff.types import Noised

MASKED = {"kind": "masked"}
GAUSSIAN = {"kind": "gaussian"}


def small_config(positions: tuple[str, str] = ("learned", "sincos"), depths: tuple[int, int] = (1, 2), **changes) -> Model:
    words = {"kind": "tokens", "vocabulary": 11, "length": 5}
    picture = {"kind": "grid", "channels": 3, "height": 4, "width": 6, "patch": 2}
    modalities = {
        "words": {"space": words, "process": MASKED, "tower_depth": depths[0], "positions": positions[0]},
        "picture": {"space": picture, "process": GAUSSIAN, "tower_depth": depths[1], "positions": positions[1]},
    }
    sizes = {"width": 16, "heads": 2, "head_dim": 12, "joint_depth": 2}
    return Model.model_validate({"modalities": modalities, **sizes, **changes})


def small_model(config: Model | None = None, predicted=("words", "picture"), *, random: bool = True) -> MMDiT:
    """`random`: no parameter keeps a value (zero or one) under which mistakes hide."""
    model = build_model(config or small_config(), predicted)
    if random:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def small_noised(batch: int = 3) -> Noised:
    visible = torch.ones(batch, 5, dtype=torch.bool)
    visible[0, 3:] = False
    return Noised(
        states={"words": torch.randint(12, (batch, 5)), "picture": torch.randn(batch, 3, 4, 6)},
        clocks={"words": torch.rand(batch), "picture": torch.rand(batch)},
        visible={"words": visible, "picture": None},
    )
