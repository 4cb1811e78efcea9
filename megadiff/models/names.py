"""The names of parameters: those of the model, for any wrapper of it or list of its layers.

Checkpoints, averages, `freeze` and weight decay identify a parameter by its name in the MMDiT (listed there). Engines wrap the
model (`module.`), recompute layers in wrappers, or hold some layers in a list of their own; names contain none of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from megadiff.config.parameters import HIDDEN
from megadiff.models.heads import Head
from megadiff.models.layers import Linear
from megadiff.types import ALIGNMENT

JOINT = "joint"
_LAYER = "_layer_name"
"""The attribute that holds a layer's name; it goes with the layer into any wrapper, list or copy."""
_WRAPPED = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Names that wrappers give the one module in them."""


def name_layers(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Store in each layer the name that it has in the model."""
    named = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        setattr(layer, _LAYER, named[id(layer)])


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the model's names, in the module's order: of a model, a wrapper around it, or some of its layers."""
    for name, _, _, parameter in named_owners(module):
        yield name, parameter


def named_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """As `named_parameters`: (the model's name, the module that owns the parameter, its name there, the parameter)."""
    outer: dict[str, tuple[str, nn.Module]] = {}
    seen: set[int] = set()
    for path, child in module.named_modules():
        name = _name_of(path, child, outer)
        outer[path] = name, child
        for own, parameter in child.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{name}.{own}" if name else own), child, own, parameter


def _name_of(path: str, module: nn.Module, outer: dict[str, tuple[str, nn.Module]]) -> str:
    """The model's name of a module at a path, from those of the modules around it."""
    if _LAYER in vars(module):
        name: str = vars(module)[_LAYER]
        return name
    if not path:
        return ""
    before, _, part = path.rpartition(".")
    outside, owner = outer[before]
    if part in _WRAPPED and not isinstance(owner, nn.ModuleDict):  # a modality may be called like that
        return outside
    return f"{outside}.{part}" if outside else part


def part_of(parameter_name: str) -> str:
    """The part of a parameter, as `freeze` names it: a modality (tower and head), `alignment`, or `joint` (all else).

    `hidden_projections` are a part that no stage trains.
    """
    kind, _, rest = parameter_name.partition(".")
    if kind in (ALIGNMENT, HIDDEN):
        return kind
    return rest.partition(".")[0] if kind in ("towers", "heads") else JOINT


def place_of(parameter_name: str) -> str:
    """Where a parameter lies in the model: `embed`, `trunk`, `tower MODALITY`, `head MODALITY`; `alignment` and
    `hidden_projections` as `part_of` names them.
    """
    kind, _, rest = parameter_name.partition(".")
    if kind in ("towers", "heads"):
        return f"{kind[:-1]} {rest.partition('.')[0]}"
    return kind if kind in ("embed", ALIGNMENT, HIDDEN) else "trunk"


def decayed_names(module: nn.Module) -> list[str]:
    """Names of the weight-decayed parameters: weights of linear maps, not embeddings, gains or biases."""
    decayed = {id(child.weight) for child in module.modules() if isinstance(child, Linear | Head)}
    return [name for name, parameter in named_parameters(module) if id(parameter) in decayed]
