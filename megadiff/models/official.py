"""The released weights of "Diffuse Everything" (arXiv 2506.07903) under our names, and ours under theirs.

Numbers are moved, never computed, so that both ways together change no bit. M is 0 for text and 1 for image in joint blocks, 0 in
a tower; D width of the modality, V vocabulary without the mask state, p patch, H heads, d channels of a head.

| released | ours |
|---|---|
| `text_embedder.weight` [V + 1, D], `text_pos_embed.weight` [L, D] | `embed.states.text.weight`, `.positions` |
| `image_embedder.proj.weight` [D, C, p, p], `.bias` | `embed.states.image.projection.weight` [D, p p C] (row, column, channel), `.bias` |
| `pos_embed` [1, S, D], a fixed buffer | not a parameter: checked on the way in, written on the way out |
| `{text,image}_time_encoder.mlp.{0,2}` | `embed.clocks.{text,image}.{up,down}` |
| `joint_embedding.blocks.I`, `joint_embedding.norms.M.g` | `joint.I`, `trunk_norm.norms.{text,image}.gain` |
| `{text,image}_dit.blocks.I`, `{text,image}_dit.norms.0.g` | `towers.{text,image}.I`, `towers.{text,image}.<depth>.norms.{text,image}.gain` |
| `{text,image}_final_layer.adaLN_modulation.2` | `heads.{text,image}.modulation` |
| `image_final_layer.linear` | `heads.image.weight`, `.bias` |
| `{text,image}_hidden_projection.{0,2}` (where `project_hidden`) | `hidden_projections.{text,image}.{up,down}` |
| `text_final_layer.linear` [V + 1, D]: the first V rows; the last row | `heads.text.weight`, `.bias`; `.mask_weight`, `.mask_bias` |

| in a block, released | in a block, ours: `parts.{text,image}.` |
|---|---|
| `attn_layernorms.M.to_cond.2` (rows: gamma, beta) | `modulation`, slots 1 and 0 (attention scale, shift) |
| `ff_layernorms.M.to_cond.2` (rows: gamma, beta) | `modulation`, slots 4 and 3 (MLP scale, shift) |
| `cond_dict.cond_linear_M` (rows: attention gate, MLP gate), again as `cond_dict.to_post_branch_gammas_M.2` | `modulation`, slots 2 and 5 |
| `joint_attn.to_qkv.M`, `joint_attn.to_out.M` | `projection.linear`, `output` |
| `joint_attn.{q,k}_rmsnorms.M.gamma` [H, 1, d] | `projection.{query,key}_gain` [H, d] |
| `feedforwards.M.ff.0.0`, `feedforwards.M.ff.2` | `mlp.up`, `mlp.down` |

A modality without tower (`text_depth: 0`, the paper's first stage) has no head either: it is read, not predicted.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.schema import GridSpace, Model, TokenSpace
from megadiff.models.embeddings import sincos_positions
from megadiff.models.mmdit import build_model

TEXT, IMAGE = "text", "image"
HEADS, HEAD_DIM = 8, 64
"""Of the released network, whose config does not name them."""
POSITIONS = "pos_embed"
POSITIONS_TOLERANCE = 1e-5
_REPEATED = re.compile(r"(.*cond_dict\.)to_post_branch_gammas_(\d+)\.2\.(weight|bias)")
"""The second name of a tensor, and below it the first."""
_KEYS = ("img_resolution", "patch_size", "img_channels", "vocab_size", "context_len", "depth", "text_depth", "image_depth")
_WIDTH_KEYS = ("dim_modalities", "dim_conds")
_OPTIONAL_KEYS = ("heads", "dim_head", "qk_rmsnorm", "project_hidden")
_HIDDEN_OUTPUTS = {TEXT: 768, IMAGE: 1024}
"""Of the released network's hidden projections."""
_LISTED = 4
"""Names that an error tells of each kind."""


# ------------------------------------------------------------------------------------------------------------- tensors


def from_official(tensors: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Released tensors under our names, in their dtype; `model` as model_from_config makes it.

    Raises:
        UserError: names are missing or unknown, shapes or the fixed positions differ, or a tensor that stands under two names
            has two values.
    """
    require_released_kind(model)
    predicted = predicted_of(tensors)
    _require_towers(model, predicted)
    rules = list(_rules(model, predicted))
    held = _without_repeats(tensors)
    wanted = _shapes(_exported(rules, _meta_parameters(model, predicted)))
    wanted[POSITIONS] = tuple(_positions(model, torch.device("meta")).shape)
    _check(wanted, held, "the released weights do not fit their configuration")
    _check_positions(held[POSITIONS], model)
    return {
        name: tensor
        for rule in rules
        for name, tensor in zip(rule.ours, rule.take([held[n] for n in rule.theirs]), strict=True)
    }


def to_official(ours: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Our tensors under the released names, with the fixed positions; what has two names there stands under the first alone.

    So a safetensors file wants it: loading refuses one that holds a shared tensor twice.

    Raises:
        UserError: names or shapes are not those of `model`, or its network is not of the released kind.
    """
    require_released_kind(model)
    predicted = [name for name in (TEXT, IMAGE) if f"heads.{name}.weight" in ours]
    _require_towers(model, predicted)
    _check(_shapes(_meta_parameters(model, predicted)), ours, "the weights do not fit their configuration")
    theirs = _exported(list(_rules(model, predicted)), ours)
    theirs[POSITIONS] = _positions(model, torch.device("cpu"))
    return theirs


def predicted_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The modalities that released weights have a head for."""
    return tuple(name for name in (TEXT, IMAGE) if f"{name}_final_layer.linear.weight" in tensors)


def parameter_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the released network's parameters, each once, in the order in which its weights are given."""
    return [name for name in _without_repeats(tensors) if name != POSITIONS]


def unread_prefixes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """How the names of those parameters begin that the released code never trains, since nothing reads what they make: of a
    modality without a head, all that follows the last joint attention."""
    block = f"joint_embedding.blocks.{_depth(tensors, 'joint_embedding') - 1}"
    unread = [number for number, name in enumerate((TEXT, IMAGE)) if name not in predicted_of(tensors)]
    return tuple(
        prefix
        for number in unread
        for prefix in (
            *(f"{block}.{module}.{number}." for module in ("joint_attn.to_out", "feedforwards", "ff_layernorms")),
            f"{block}.cond_dict.cond_linear_{number}.",
            f"joint_embedding.norms.{number}.",
        )
    )


Move = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class _Rule:
    """Some of our tensors and the released ones that hold the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    take: Move
    """Theirs to ours."""
    give: Move
    """Ours to theirs."""


def _rules(model: Model, predicted: Collection[str]) -> Iterator[_Rule]:
    """Every parameter of ours exactly once, in the order of the network."""
    patch, channels = _grid(model).patch, _grid(model).channels
    yield _same(f"embed.states.{TEXT}.weight", "text_embedder.weight")
    yield _same(f"embed.states.{TEXT}.positions", "text_pos_embed.weight")
    yield _Rule(
        (f"embed.states.{IMAGE}.projection.weight",),
        ("image_embedder.proj.weight",),
        take=lambda held: [held[0].permute(0, 2, 3, 1).flatten(1)],
        give=lambda held: [held[0].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2).contiguous()],
    )
    yield _same(f"embed.states.{IMAGE}.projection.bias", "image_embedder.proj.bias")
    for name in (TEXT, IMAGE):
        yield from _linear(f"embed.clocks.{name}.up", f"{name}_time_encoder.mlp.0")
        yield from _linear(f"embed.clocks.{name}.down", f"{name}_time_encoder.mlp.2")
    for index in range(model.joint_depth):
        yield from _block(f"joint.{index}", f"joint_embedding.blocks.{index}", (TEXT, IMAGE), model)
    for number, name in enumerate((TEXT, IMAGE)):
        yield _same(f"trunk_norm.norms.{name}.gain", f"joint_embedding.norms.{number}.g")
    for name in predicted:
        depth = model.modalities[name].tower_depth
        for index in range(depth):
            yield from _block(f"towers.{name}.{index}", f"{name}_dit.blocks.{index}", (name,), model)
        yield _same(f"towers.{name}.{depth}.norms.{name}.gain", f"{name}_dit.norms.0.g")
        yield from _linear(f"heads.{name}.modulation", f"{name}_final_layer.adaLN_modulation.2")
        for kind in ("weight", "bias"):
            if name == TEXT:
                yield _last_row(f"heads.{name}.{kind}", f"heads.{name}.mask_{kind}", f"{name}_final_layer.linear.{kind}")
            else:
                yield _same(f"heads.{name}.{kind}", f"{name}_final_layer.linear.{kind}")
        if name in model.hidden_projections:
            yield from _linear(f"hidden_projections.{name}.up", f"{name}_hidden_projection.0")
            yield from _linear(f"hidden_projections.{name}.down", f"{name}_hidden_projection.2")


def _block(ours: str, theirs: str, names: Sequence[str], model: Model) -> Iterator[_Rule]:
    for number, name in enumerate(names):
        part = f"{ours}.parts.{name}"
        for kind in ("weight", "bias"):
            yield _modulation(f"{part}.modulation.{kind}", theirs, number, kind)
        yield _same(f"{part}.projection.linear.weight", f"{theirs}.joint_attn.to_qkv.{number}.weight")
        if model.qk_norm:
            yield _gain(f"{part}.projection.query_gain", f"{theirs}.joint_attn.q_rmsnorms.{number}.gamma")
            yield _gain(f"{part}.projection.key_gain", f"{theirs}.joint_attn.k_rmsnorms.{number}.gamma")
        yield _same(f"{part}.output.weight", f"{theirs}.joint_attn.to_out.{number}.weight")
        yield from _linear(f"{part}.mlp.up", f"{theirs}.feedforwards.{number}.ff.0.0")
        yield from _linear(f"{part}.mlp.down", f"{theirs}.feedforwards.{number}.ff.2")


def _same(ours: str, theirs: str) -> _Rule:
    return _Rule((ours,), (theirs,), take=list, give=list)


def _linear(ours: str, theirs: str) -> list[_Rule]:
    return [_same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def _gain(ours: str, theirs: str) -> _Rule:
    return _Rule(
        (ours,), (theirs,), take=lambda held: [held[0].squeeze(1)], give=lambda held: [held[0].unsqueeze(1).contiguous()]
    )


def _modulation(ours: str, block: str, number: int, kind: str) -> _Rule:
    """Our slots (models.blocks.Modulated) are shift, scale, gate of the attention, then of the MLP."""

    def take(held: list[Tensor]) -> list[Tensor]:
        (gamma, beta), (mlp_gamma, mlp_beta), (gate, mlp_gate) = (tensor.chunk(2) for tensor in held)
        return [torch.cat([beta, gamma, gate, mlp_beta, mlp_gamma, mlp_gate])]

    def give(held: list[Tensor]) -> list[Tensor]:
        beta, gamma, gate, mlp_beta, mlp_gamma, mlp_gate = held[0].chunk(6)
        return [torch.cat(pair) for pair in ((gamma, beta), (mlp_gamma, mlp_beta), (gate, mlp_gate))]

    modules = (f"attn_layernorms.{number}.to_cond.2", f"ff_layernorms.{number}.to_cond.2", f"cond_dict.cond_linear_{number}")
    return _Rule((ours,), tuple(f"{block}.{module}.{kind}" for module in modules), take, give)


def _last_row(tokens: str, mask: str, theirs: str) -> _Rule:
    return _Rule(
        (tokens, mask),
        (theirs,),
        take=lambda held: [held[0][:-1], held[0][-1:].clone()],
        give=lambda held: [torch.cat(held)],
    )


def _exported(rules: Sequence[_Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.give([ours[n] for n in rule.ours]), strict=True)
    }


def _without_repeats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the first of a tensor's two names. Raises UserError if they hold different numbers."""
    held = {name: tensor for name, tensor in tensors.items() if not _REPEATED.fullmatch(name)}
    for name, tensor in tensors.items():
        if match := _REPEATED.fullmatch(name):
            first = f"{match[1]}cond_linear_{match[2]}.{match[3]}"
            if not torch.equal(held.setdefault(first, tensor), tensor):
                raise UserError(f"{name} and {first} are one tensor in the released network, but hold different numbers here")
    return held


def _meta_parameters(model: Model, predicted: Collection[str]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {name: parameter.detach() for name, parameter in build_model(model, predicted).named_parameters()}


def _check_positions(given: Tensor, model: Model) -> None:
    ours = _positions(model, torch.device("cpu")).to(given.dtype)
    rounding = torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0
    difference = float((given.float() - ours.float()).abs().max())
    if not difference <= POSITIONS_TOLERANCE + rounding:
        raise UserError(
            f"{POSITIONS} differs by {difference:.2g} from the released network's sines and cosines, which are fixed here; "
            "these weights belong to another network"
        )


def _positions(model: Model, device: torch.device) -> Tensor:
    """[1, S, D]."""
    grid = _grid(model)
    return sincos_positions(model.width_of(IMAGE), device, grid.height // grid.patch, grid.width // grid.patch)[None]


def _grid(model: Model) -> GridSpace:
    space = model.modalities[IMAGE].space
    assert isinstance(space, GridSpace)
    return space


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check(wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError with the first names that are missing, unknown or of another shape."""
    missing = [name for name in wanted if name not in held]
    unknown = [name for name in held if name not in wanted]
    shapes = [
        f"{name} is {list(held[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in held and tuple(held[name].shape) != shape
    ]
    faults = [
        f"{title} {', '.join(names[:_LISTED])}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for title, names in (("missing:", missing), ("unknown:", unknown), ("other shapes:", shapes))
        if names
    ]
    if faults:
        raise UserError(f"{what}; {'; '.join(faults)}")


# -------------------------------------------------------------------------------------------------------------- config


def model_from_config(config: Mapping[str, Any]) -> Model:
    """Our model for a released config.json; its values may stand under a sub-key, further keys do not matter.

    `heads` and `dim_head` are 8 and 64 where they are not given; `dim_joint_attn` has no effect on the released network.

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
    grid = {"channels": values["img_channels"], "height": side, "width": side, "patch": values["patch_size"]}
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
    """A released config.json; a modality that is not predicted gets the depth 0.

    Raises:
        UserError: the network is not of the released kind.
    """
    require_released_kind(model)
    _require_towers(model, predicted)
    return _config(model, predicted)


def _require_towers(model: Model, predicted: Collection[str]) -> None:
    for name in predicted:
        if model.modalities[name].tower_depth == 0:
            raise UserError(f"model.modalities.{name}.tower_depth is 0; the released network has no head without a tower")


def require_released_kind(model: Model) -> None:
    """Raises UserError that names the first setting in which a model's network differs from the released kind."""
    spaces = {name: modality.space.kind for name, modality in model.modalities.items()}
    if list(spaces.items()) != [(TEXT, "tokens"), (IMAGE, "grid")]:
        found = ", ".join(f"{name} ({kind})" for name, kind in spaces.items())
        raise UserError(f"model.modalities is {found}; the released network has text (tokens), image (grid), in this order")
    released = _leaves(model_from_config(_config(model, (TEXT, IMAGE))).model_dump(mode="json"))
    ours = _leaves(model.model_dump(mode="json"))
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
"""Settings that decide how weights start, are trained or what data they see, not what they compute; and widths, which are free
and may stand in two places."""


def config_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of released weights say of their configuration.

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
        "depth": _depth(tensors, "joint_embedding"),
        "text_depth": _depth(tensors, "text_dit"),
        "image_depth": _depth(tensors, "image_dit"),
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
    """Of a released configuration what matters here, by its own key however deep it stands."""
    values = _flat(config)
    return {key: values[key] for key in (*_KEYS, *_WIDTH_KEYS, *_OPTIONAL_KEYS) if values.get(key) is not None}


def vocabulary(model: Model) -> int:
    """Token ids without the mask state."""
    space = model.modalities[TEXT].space
    assert isinstance(space, TokenSpace)
    return space.vocabulary


def _config(model: Model, predicted: Collection[str]) -> dict[str, Any]:
    grid, text = _grid(model), model.modalities[TEXT].space
    assert isinstance(text, TokenSpace)
    depths = {name: model.modalities[name].tower_depth if name in predicted else 0 for name in (TEXT, IMAGE)}
    widths = [model.width_of(name) for name in (TEXT, IMAGE)]
    others = {} if (model.heads, model.head_dim) == (HEADS, HEAD_DIM) else {"heads": model.heads, "dim_head": model.head_dim}
    return {
        "img_resolution": grid.height,
        "patch_size": grid.patch,
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


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    found = [int(match[1]) for name in tensors if (match := re.match(rf"{prefix}\.blocks\.(\d+)\.", name))]
    return max(found, default=-1) + 1


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """All values by their own key, however deep; what stands higher wins, then what stands first."""
    values = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    for section in config.values():
        if isinstance(section, Mapping):
            values = {**_flat(section), **values}
    return values


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted address."""
    return {
        address: leaf
        for key, value in tree.items()
        for address, leaf in (
            _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        ).items()
    }
