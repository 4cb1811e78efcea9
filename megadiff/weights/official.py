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

import torch
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.schema import Model
from megadiff.models.embeddings import sincos_positions
from megadiff.models.mmdit import build_model
from megadiff.weights.official_config import IMAGE, POSITIONS, TEXT, depth_of, grid_of, require_released_kind, require_towers

POSITIONS_TOLERANCE = 1e-5
_REPEATED = re.compile(r"(.*cond_dict\.)to_post_branch_gammas_(\d+)\.2\.(weight|bias)")
"""The second name of a tensor; its first is cond_linear_*."""
_LISTED = 4
"""Names of each kind in an error message."""


def from_official(tensors: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Released tensors under our names, in their dtype; `model` as model_from_config makes it.

    Raises:
        UserError: names are missing or unknown, shapes or the fixed positions differ, or a tensor with two names has two
            values.
    """
    require_released_kind(model)
    predicted = predicted_of(tensors)
    require_towers(model, predicted)
    rules = list(_rules(model, predicted))
    released = _without_repeats(tensors)
    shapes = _shapes(_exported(rules, _meta_parameters(model, predicted)))
    shapes[POSITIONS] = tuple(_positions(model, torch.device("meta")).shape)
    _check(shapes, released, "the released weights do not fit their configuration")
    _check_positions(released[POSITIONS], model)
    return {
        name: tensor
        for rule in rules
        for name, tensor in zip(rule.ours, rule.take([released[n] for n in rule.theirs]), strict=True)
    }


def to_official(ours: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Our tensors under the released names, with the fixed positions; a tensor with two names has the first alone.

    Loading refuses a safetensors file with a shared tensor twice.

    Raises:
        UserError: names or shapes are not those of `model`, or its network is not of the released kind.
    """
    require_released_kind(model)
    predicted = [name for name in (TEXT, IMAGE) if f"heads.{name}.weight" in ours]
    require_towers(model, predicted)
    _check(_shapes(_meta_parameters(model, predicted)), ours, "the weights do not fit their configuration")
    theirs = _exported(list(_rules(model, predicted)), ours)
    theirs[POSITIONS] = _positions(model, torch.device("cpu"))
    return theirs


def predicted_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The modalities that released weights have a head for."""
    return tuple(name for name in (TEXT, IMAGE) if f"{name}_final_layer.linear.weight" in tensors)


def parameter_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the released network's parameters, each once, in the order of its weights."""
    return [name for name in _without_repeats(tensors) if name != POSITIONS]


def unread_prefixes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Prefixes of the parameters that the released code never trains, since nothing reads their results: those after the last
    joint attention, of a modality without a head."""
    block = f"joint_embedding.blocks.{depth_of(tensors, 'joint_embedding') - 1}"
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
    (patch, _), channels = grid_of(model).patch_sides, grid_of(model).channels
    yield _same(f"embed.states.{TEXT}.weight", "text_embedder.weight")
    yield _same(f"embed.states.{TEXT}.positions", "text_pos_embed.weight")
    yield _Rule(
        (f"embed.states.{IMAGE}.projection.weight",),
        ("image_embedder.proj.weight",),
        take=lambda theirs: [theirs[0].permute(0, 2, 3, 1).flatten(1)],
        give=lambda ours: [ours[0].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2).contiguous()],
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
        (ours,), (theirs,), take=lambda theirs: [theirs[0].squeeze(1)], give=lambda ours: [ours[0].unsqueeze(1).contiguous()]
    )


def _modulation(ours: str, block: str, number: int, kind: str) -> _Rule:
    """Our slots (models.blocks.Modulated) are shift, scale, gate of the attention, then of the MLP."""

    def take(theirs: list[Tensor]) -> list[Tensor]:
        (gamma, beta), (mlp_gamma, mlp_beta), (gate, mlp_gate) = (tensor.chunk(2) for tensor in theirs)
        return [torch.cat([beta, gamma, gate, mlp_beta, mlp_gamma, mlp_gate])]

    def give(ours: list[Tensor]) -> list[Tensor]:
        beta, gamma, gate, mlp_beta, mlp_gamma, mlp_gate = ours[0].chunk(6)
        return [torch.cat(pair) for pair in ((gamma, beta), (mlp_gamma, mlp_beta), (gate, mlp_gate))]

    modules = (f"attn_layernorms.{number}.to_cond.2", f"ff_layernorms.{number}.to_cond.2", f"cond_dict.cond_linear_{number}")
    return _Rule((ours,), tuple(f"{block}.{module}.{kind}" for module in modules), take, give)


def _last_row(tokens: str, mask: str, theirs: str) -> _Rule:
    return _Rule(
        (tokens, mask),
        (theirs,),
        take=lambda theirs: [theirs[0][:-1], theirs[0][-1:].clone()],
        give=lambda ours: [torch.cat(ours)],
    )


def _exported(rules: Sequence[_Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.give([ours[n] for n in rule.ours]), strict=True)
    }


def _without_repeats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each under its first name. Raises UserError if two names hold different numbers."""
    firsts = {name: tensor for name, tensor in tensors.items() if not _REPEATED.fullmatch(name)}
    for name, tensor in tensors.items():
        if match := _REPEATED.fullmatch(name):
            first = f"{match[1]}cond_linear_{match[2]}.{match[3]}"
            if not torch.equal(firsts.setdefault(first, tensor), tensor):
                raise UserError(f"{name} and {first} are one tensor in the released network, but hold different numbers here")
    return firsts


def _meta_parameters(model: Model, predicted: Collection[str]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {name: parameter.detach() for name, parameter in build_model(model, predicted).named_parameters()}


def _check_positions(positions: Tensor, model: Model) -> None:
    ours = _positions(model, torch.device("cpu")).to(positions.dtype)
    rounding = torch.finfo(positions.dtype).eps if positions.is_floating_point() else 0.0
    difference = float((positions.float() - ours.float()).abs().max())
    if not difference <= POSITIONS_TOLERANCE + rounding:
        raise UserError(
            f"{POSITIONS} differs by {difference:.2g} from the released network's sines and cosines, which are fixed here; "
            "these weights belong to another network"
        )


def _positions(model: Model, device: torch.device) -> Tensor:
    """[1, S, D]."""
    grid = grid_of(model)
    return sincos_positions(model.width_of(IMAGE), device, *grid.patches)[None]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError with the first names that are missing, unknown or of another shape."""
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    differing = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = [
        f"{title} {', '.join(names[:_LISTED])}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for title, names in (("missing:", missing), ("unknown:", unknown), ("other shapes:", differing))
        if names
    ]
    if faults:
        raise UserError(f"{what}; {'; '.join(faults)}")
