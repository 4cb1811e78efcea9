"""The released network's configuration: from its config.json, or from the shapes of its weights, to our model, and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.load import leaves
from megadiff.config.schema import GridSpace, Model, TokenSpace

TEXT, IMAGE = "text", "image"
HEADS, HEAD_DIM = 8, 64
"""The released network's, which its config does not name."""
POSITIONS = "pos_embed"
_KEYS = ("img_resolution", "patch_size", "img_channels", "vocab_size", "context_len", "depth", "text_depth", "image_depth")
_WIDTH_KEYS = ("dim_modalities", "dim_conds")
_OPTIONAL_KEYS = ("heads", "dim_head", "qk_rmsnorm", "project_hidden")
_HIDDEN_OUTPUTS = {TEXT: 768, IMAGE: 1024}
"""Outputs of the released network's hidden projections."""


def model_from_config(config: Mapping[str, Any]) -> Model:
    """Our model for a released config.json; its values may stand under a sub-key, other keys are ignored.

    `heads` and `dim_head` are 8 and 64 by default; `dim_joint_attn` has no effect on the released network.

    Raises:
        UserError: keys are missing or no sizes of a network, or the time vectors have other widths than the tokens.
    """
    values = known_values(config)
    missing = [key for key in (*_KEYS, *_WIDTH_KEYS) if key not in values]
    if missing:
        raise UserError(f"the released configuration lacks {', '.join(missing)}")
    try:
        return _model(values)
    except (ValueError, TypeError) as error:
        reason = "; ".join(str(error).splitlines()[1:3]) if isinstance(error, ValidationError) else error
        raise UserError(f"the released configuration makes no network: {reason}") from None


def _model(values: Mapping[str, Any]) -> Model:
    widths, conditions = (tuple(int(width) for width in values[key]) for key in _WIDTH_KEYS)
    if widths != conditions or len(widths) != 2:
        raise UserError(
            f"dim_modalities is {values['dim_modalities']} and dim_conds {values['dim_conds']}; the released network has two "
            "widths, and its time vectors those of the tokens that they condition"
        )
    width, own_width = widths[0], None if widths[0] == widths[1] else widths[1]
    vocabulary, side = int(values["vocab_size"]) - 1, int(values["img_resolution"])
    # CLIP's last two ids; the released code hides every visible id 49407 from attention, which ends and pads its captions.
    space = {"kind": "tokens", "vocabulary": vocabulary, "length": int(values["context_len"])}
    marks = {"start_id": vocabulary - 2, "end_id": vocabulary - 1, "pad_id": vocabulary - 1}
    grid = {"channels": values["img_channels"], "height": side, "width": side, "patch": int(values["patch_size"])}
    return Model.model_validate(
        {
            "width": width,
            "heads": int(values.get("heads", HEADS)),
            "head_dim": int(values.get("dim_head", HEAD_DIM)),
            "joint_depth": int(values["depth"]),
            "mlp": "gelu",
            "mlp_ratio": 4.0,
            "qk_norm": bool(values.get("qk_rmsnorm", True)),
            "attention_bias": False,
            "gates": "one",
            "block_modulation": "scale",
            "trunk_norm": True,
            "head_modulation": "scale",
            "time_scale": 1.0,
            "hidden_projections": _HIDDEN_OUTPUTS if values.get("project_hidden") else {},
            "modalities": {
                TEXT: {
                    "space": {**space, **marks},
                    "process": {
                        "kind": "masked",
                        "schedule": "linear",
                        "loss": "plain",
                        "mask_class": True,
                        "padding": "pad_id",
                    },
                    "tower_depth": int(values["text_depth"]),
                    "positions": "learned",
                },
                IMAGE: {
                    "space": {"kind": "grid", **grid},
                    "process": {"kind": "gaussian", "schedule": "vp", "target": "epsilon", "clock": "std"},
                    "tower_depth": int(values["image_depth"]),
                    "width": own_width,
                    "positions": "sincos",
                },
            },
        }
    )


def config_from_model(model: Model, predicted: Collection[str] = (TEXT, IMAGE)) -> dict[str, Any]:
    """A released config.json; modalities that are not predicted have depth 0.

    Raises:
        UserError: the network is not of the released kind.
    """
    require_released_kind(model)
    require_towers(model, predicted)
    return _config(model, predicted)


def require_towers(model: Model, predicted: Collection[str]) -> None:
    """Raises UserError if a modality is predicted without a tower, which the released network cannot do."""
    for name in predicted:
        if model.modalities[name].tower_depth == 0:
            raise UserError(f"model.modalities.{name}.tower_depth is 0; the released network has no head without a tower")


def require_released_kind(model: Model) -> None:
    """Raises UserError naming the first setting in which a model's network differs from the released kind."""
    spaces = {name: modality.space.kind for name, modality in model.modalities.items()}
    if list(spaces.items()) != [(TEXT, "tokens"), (IMAGE, "grid")]:
        modalities = ", ".join(f"{name} ({kind})" for name, kind in spaces.items())
        raise UserError(
            f"model.modalities is {modalities}; the released network has text (tokens), image (grid), in this order"
        )
    if len(set(grid_of(model).patch_sides)) > 1:
        raise UserError(f"model.modalities.{IMAGE}.space.patch is not square; the released network's patches are")
    released = leaves(model_from_config(_config(model, (TEXT, IMAGE))).model_dump(mode="json"))
    ours = leaves(model.model_dump(mode="json"))
    for address in {**ours, **released}:
        if address not in _NOT_OF_THE_NETWORK and released.get(address) != ours.get(address):
            raise UserError(f"model.{address} is {ours.get(address)}; the released network has {released.get(address)}")


_NOT_OF_THE_NETWORK = frozenset(
    {
        "gates",
        "width",
        *(f"modalities.{name}.width" for name in (TEXT, IMAGE)),
        *(f"modalities.{TEXT}.space.{name}" for name in ("start_id", "end_id")),
        *(f"modalities.{TEXT}.process.{name}" for name in ("loss", "weight_cap", "after_end_weight")),
        *(f"modalities.{IMAGE}.process.{name}" for name in ("loss_weight", "min_snr_gamma")),
    }
)
"""Settings of initialisation, training and data, which do not change what the network computes; and widths, which are free and
may stand in two places."""


def config_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of released weights, from their shapes.

    Raises:
        UserError: they are no released weights.
    """
    names = ("text_embedder.weight", "text_pos_embed.weight", "image_embedder.proj.weight", POSITIONS)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"these are no weights of the released network, which has {', '.join(missing)}")
    (rows, text_width), (length, _) = tensors[names[0]].shape, tensors[names[1]].shape
    image_width, channels, patch, _ = tensors[names[2]].shape
    side = round(tensors[POSITIONS].shape[-2] ** 0.5) * patch
    config: dict[str, Any] = {
        "img_resolution": side,
        "patch_size": patch,
        "img_channels": channels,
        "vocab_size": rows,
        "context_len": length,
        "depth": depth_of(tensors, "joint_embedding"),
        "text_depth": depth_of(tensors, "text_dit"),
        "image_depth": depth_of(tensors, "image_dit"),
        "dim_modalities": [text_width, image_width],
        "dim_conds": [text_width, image_width],
    }
    gain = tensors.get("joint_embedding.blocks.0.joint_attn.q_rmsnorms.0.gamma")
    config["qk_rmsnorm"] = gain is not None
    if gain is not None:
        config["heads"], _, config["dim_head"] = gain.shape
    if any(f"{name}_hidden_projection.0.weight" in tensors for name in (TEXT, IMAGE)):
        config["project_hidden"] = True
    return config


def known_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a released configuration that we use, by their own key, at any depth."""
    values = _flat(config)
    return {key: values[key] for key in (*_KEYS, *_WIDTH_KEYS, *_OPTIONAL_KEYS) if values.get(key) is not None}


def vocabulary(model: Model) -> int:
    """Token ids without the mask state."""
    space = model.modalities[TEXT].space
    assert isinstance(space, TokenSpace)
    return space.vocabulary


def _config(model: Model, predicted: Collection[str]) -> dict[str, Any]:
    grid, text = grid_of(model), model.modalities[TEXT].space
    assert isinstance(text, TokenSpace)
    depths = {name: model.modalities[name].tower_depth if name in predicted else 0 for name in (TEXT, IMAGE)}
    widths = [model.width_of(name) for name in (TEXT, IMAGE)]
    others = {} if (model.heads, model.head_dim) == (HEADS, HEAD_DIM) else {"heads": model.heads, "dim_head": model.head_dim}
    return {
        "img_resolution": grid.height,
        "patch_size": grid.patch_sides[0],
        "img_channels": grid.channels,
        "vocab_size": text.vocabulary + 1,
        "context_len": text.length,
        "depth": model.joint_depth,
        "text_depth": depths[TEXT],
        "image_depth": depths[IMAGE],
        "dim_modalities": widths,
        "dim_conds": widths,
        "dim_joint_attn": model.width,
        "qk_rmsnorm": model.qk_norm,
        "flash_attn": True,
        **({"project_hidden": True} if model.hidden_projections else {}),
        **others,
    }


def depth_of(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """The number of released blocks under a prefix."""
    indices = [int(match[1]) for name in tensors if (match := re.match(rf"{prefix}\.blocks\.(\d+)\.", name))]
    return max(indices, default=-1) + 1


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """All values by their own key, at any depth; of equal keys the highest, then the first counts."""
    values = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    for section in config.values():
        if isinstance(section, Mapping):
            values = {**_flat(section), **values}
    return values


def grid_of(model: Model) -> GridSpace:
    """The image's space."""
    space = model.modalities[IMAGE].space
    assert isinstance(space, GridSpace)
    return space
