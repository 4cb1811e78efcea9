"""What the model holds, counted without torch: sizes of its layers, parameters by part, which of them a stage trains. The one
owner of these formulas; a test holds them equal to the built model's.

Legend: D width of a modality's tokens, I = heads x head_dim (the attention's inner width).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from megadiff.config.schema import Alignment, GridSpace, Model, Stage, TokenSpace

TIME_FEATURES = 256
"""Sinusoids that encode a clock."""
BLOCK_SLOTS = 6
"""Modulation vectors of a block: shift, scale and gate, for its attention and for its MLP."""
PROJECTION_SLOTS = 2
"""The first of a block's modulation slots, which act before its attention."""
HEAD_SLOTS = 2
"""Modulation vectors of a head: shift and scale."""
ALIGNMENT_HIDDEN = 2
"""Hidden width of the alignment's projection / D."""
_SWIGLU_MULTIPLE = 8
HIDDEN = "hidden_projections"
"""The part that no stage trains."""


# --------------------------------------------------------------------------------------------------------------- sizes


def token_count(space: GridSpace | TokenSpace) -> int:
    """Tokens of one sample of a modality."""
    if isinstance(space, GridSpace):
        return math.prod(space.patches)
    return space.length


def mlp_hidden(model: Model, name: str) -> int:
    """Hidden width of a modality's MLPs: ratio x D for gelu; for swiglu 2/3 of it, rounded up to a multiple of 8."""
    hidden = model.mlp_ratio * model.width_of(name)
    if model.mlp == "gelu":
        return math.ceil(hidden - 1e-9)
    return math.ceil(hidden * 2 / 3 / _SWIGLU_MULTIPLE - 1e-9) * _SWIGLU_MULTIPLE


def head_outputs(space: GridSpace | TokenSpace) -> int:
    """Rows of a head: the numbers of a patch, or the vocabulary (the mask state is no class)."""
    return patch_numbers(space) if isinstance(space, GridSpace) else space.vocabulary


def patch_numbers(space: GridSpace) -> int:
    """Numbers of a patch, all channels."""
    return space.channels * math.prod(space.patch_sides)


# ---------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameters:
    """Parameter counts.

    Attributes:
        embeddings: per modality: states, learned positions, time.
        joint: the joint blocks and the norm after them.
        towers: per predicted modality.
        heads: per predicted modality.
        alignment: its projection, 0 without one.
        hidden: the hidden projections of predicted modalities, which are never trained.
    """

    embeddings: dict[str, int]
    joint: int
    towers: dict[str, int]
    heads: dict[str, int]
    alignment: int = 0
    hidden: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """By the names that `freeze` uses: `joint` is the embeddings and the joint blocks, a modality its tower and head."""
        joint = sum(self.embeddings.values()) + self.joint
        others = {name: count for name, count in (("alignment", self.alignment), (HIDDEN, self.hidden)) if count}
        return {"joint": joint} | {name: self.towers[name] + self.heads[name] for name in self.heads} | others

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def model_parameters(model: Model, predicted: Collection[str], alignment: Alignment | None = None) -> Parameters:
    """What a model that predicts these modalities holds."""
    names = [name for name in model.modalities if name in predicted]
    return Parameters(
        embeddings={name: _embedding_parameters(model, name) for name in model.modalities},
        joint=sum(
            model.joint_depth * _block_parameters(model, name) + _norm_parameters(model, name) for name in model.modalities
        ),
        towers={name: _tower_parameters(model, name) for name in names},
        heads={name: _head_parameters(model, name) for name in names},
        alignment=0 if alignment is None else sum(_linear(*shape) for shape in alignment_layers(model, alignment)),
        hidden=sum(_hidden_parameters(model, name) for name in model.hidden_projections if name in names),
    )


def predicted(stage: Stage) -> tuple[str, ...]:
    """The modalities that have a tower and a head in a stage."""
    return tuple(name for name, modality in stage.modalities.items() if modality.predicted)


def trainable(model: Model, stage: Stage) -> int:
    """Parameters that a stage trains; the others of `stage_parameters(model, stage)` are frozen or idle."""
    free = sum(count for part, count in stage_parameters(model, stage).parts.items() if is_trained(part, stage))
    return free - sum(count.total for count in idle(model, stage).values())


def is_trained(part: str, stage: Stage) -> bool:
    """Whether a stage trains a part of the model, apart from its idle parameters."""
    return part not in (*stage.freeze, HIDDEN)


def scored(stage: Stage) -> tuple[str, ...]:
    """The modalities whose predictions a stage learns from: with a loss weight, and not a mere condition in every sample."""
    return tuple(name for name, modality in stage.modalities.items() if modality.scored)


def reached(model: Model, stage: Stage) -> tuple[str, ...]:
    """The modalities whose tokens after the last joint block lead to a loss: the scored ones, and one that is aligned there."""
    rule = stage.alignment
    aligned = rule.modality if rule is not None and rule.block == model.joint_depth - 1 else None
    return tuple(name for name in model.modalities if name in scored(stage) or name == aligned)


def always_clean(stage: Stage, name: str) -> bool:
    """Whether a modality is given in every sample: its clock is always 0, and none of its tokens is masked."""
    return stage.modalities[name].conditioning.clean >= 1


def always_absent(stage: Stage, name: str) -> bool:
    """Whether a modality is unknown in every sample: its tokens are all masked."""
    return stage.modalities[name].conditioning.absent >= 1


@dataclass(frozen=True)
class IdleCount:
    """Parameters of a part that no loss of a stage reaches: they stay as they are, neither stepped nor decayed.

    Attributes:
        whole: in tensors that are idle as a whole, and have neither gradients nor moments nor averages, as if frozen.
        partial: the idle numbers of tensors that are trained otherwise.
    """

    whole: int = 0
    partial: int = 0

    @property
    def total(self) -> int:
        return self.whole + self.partial


def idle(model: Model, stage: Stage) -> dict[str, IdleCount]:
    """Idle parameters by part that is not frozen; models/idle.py knows their names.

    Idle are the towers and heads of modalities that are not scored; everything after the last joint attention, and its queries,
    for modalities that are not reached (without joint blocks: their embedding); and inputs of the embeddings that a fixed clock
    or constant states never use.
    """
    counts = stage_parameters(model, stage)
    joint = [_idle_joint(model, stage, name) for name in model.modalities]
    parts = {"joint": IdleCount(sum(count.whole for count in joint), sum(count.partial for count in joint))}
    parts |= {name: IdleCount(counts.parts[name]) for name in counts.heads if name not in scored(stage)}
    return {part: count for part, count in parts.items() if part not in stage.freeze and count.total}


def _idle_joint(model: Model, stage: Stage, name: str) -> IdleCount:
    """Idle parameters of one modality in the embeddings, the joint blocks and the norm after them."""
    width, inner = model.width_of(name), model.heads * model.head_dim
    norm = 0 if name in scored(stage) else _norm_parameters(model, name)
    if name in reached(model, stage):
        return IdleCount(norm, _idle_inputs(model, stage, name))
    if model.joint_depth == 0:
        return IdleCount(norm + _embedding_parameters(model, name))
    queries = _linear(width, inner, bias=model.attention_bias)
    modulation = _linear(width, (BLOCK_SLOTS - PROJECTION_SLOTS) * width)
    whole = norm + _block_end(model, name, 1).total + _query_gain(model)
    return IdleCount(whole, queries + modulation + _idle_inputs(model, stage, name))


def _idle_inputs(model: Model, stage: Stage, name: str) -> int:
    """Idle numbers of the embedding of a modality that is always given (clock 0: sines of 0, no mask) or never (only masks)."""
    masked = model.modalities[name].process.kind == "masked"
    if always_clean(stage, name):
        return (TIME_FEATURES // 2 + masked) * model.width_of(name)
    return head_outputs(model.modalities[name].space) * model.width_of(name) if masked and always_absent(stage, name) else 0


def stage_parameters(model: Model, stage: Stage) -> Parameters:
    """What the model holds in a stage."""
    return model_parameters(model, predicted(stage), stage.alignment)


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _embedding_parameters(model: Model, name: str) -> int:
    return _embedding(model, name, 1).total


def _embedding(model: Model, name: str, tensor: int) -> Count:
    modality, width = model.modalities[name], model.width_of(name)
    time = _linear(TIME_FEATURES, width) + _linear(width, width)
    positions = token_count(modality.space) * width if modality.positions == "learned" else 0
    if isinstance(modality.space, GridSpace):
        return Count(time + positions + _linear(patch_numbers(modality.space), width), 0)
    return Count(time + positions, -(-(modality.space.vocabulary + 1) // tensor) * width)


def _block_parameters(model: Model, name: str) -> int:
    """One modality's share of a block."""
    return _block(model, name, 1).total


def _block(model: Model, name: str, tensor: int) -> Count:
    width, inner = model.width_of(name), model.heads * model.head_dim
    modulation = Count(BLOCK_SLOTS * width, width * BLOCK_SLOTS * width // tensor)
    projection = Count(0, (_linear(width, 3 * inner, bias=model.attention_bias) + 2 * _query_gain(model)) // tensor)
    return modulation + projection + _block_end(model, name, tensor)


def _block_end(model: Model, name: str, tensor: int) -> Count:
    """Of a block what acts after its attention alone: its output and its MLP."""
    width, inner = model.width_of(name), model.heads * model.head_dim
    output = Count(width if model.attention_bias else 0, inner * width // tensor)
    into = _linear(width, up_outputs(model, name))
    return output + Count(width, (into + mlp_hidden(model, name) * width) // tensor)


def _query_gain(model: Model) -> int:
    return model.heads * model.head_dim if model.qk_norm else 0


def up_outputs(model: Model, name: str) -> int:
    """Outputs of the MLP's first map: swiglu has two halves."""
    return mlp_hidden(model, name) * (2 if model.mlp == "swiglu" else 1)


def _norm_parameters(model: Model, name: str) -> int:
    return model.width_of(name) if model.trunk_norm else 0


def _tower_parameters(model: Model, name: str) -> int:
    depth = model.modalities[name].tower_depth
    return depth * _block_parameters(model, name) + (_norm_parameters(model, name) if depth else 0)


def _head_parameters(model: Model, name: str) -> int:
    return _head(model, name, 1).total


def _head(model: Model, name: str, tensor: int) -> Count:
    modality, width = model.modalities[name], model.width_of(name)
    modulation = Count(HEAD_SLOTS * width, width * HEAD_SLOTS * width // tensor)
    outputs = _linear(width, head_outputs(modality.space))
    if isinstance(modality.space, GridSpace):
        return modulation + Count(outputs, 0)
    mask_class = modality.process.kind == "masked" and modality.process.mask_class
    return modulation + Count(_linear(width, 1) if mask_class else 0, outputs // tensor)


def _hidden_parameters(model: Model, name: str) -> int:
    width = model.width_of(name)
    return _linear(width, width) + _linear(width, model.hidden_projections[name])


def alignment_layers(model: Model, alignment: Alignment) -> list[tuple[int, int]]:
    """(inputs, outputs) of the projection's linear maps."""
    width = model.width_of(alignment.modality)
    hidden = ALIGNMENT_HIDDEN * width
    return [(width, hidden), (hidden, hidden), (hidden, alignment.features)]


# -------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Count:
    """Parameters on one tensor-parallel rank.

    Attributes:
        replicated: those that every tensor rank has.
        split: this rank's part of the others; models/tensor_plan.py knows their names.
    """

    replicated: int
    split: int

    @property
    def total(self) -> int:
        return self.replicated + self.split

    def __add__(self, other: Count) -> Count:
        return Count(self.replicated + other.replicated, self.split + other.split)

    def __sub__(self, other: Count) -> Count:
        return Count(self.replicated - other.replicated, self.split - other.split)


NOTHING = Count(0, 0)


class Layer(NamedTuple):
    """What a layer holds on one tensor-parallel rank.

    Attributes:
        name: "embed", "joint 0", "alignment", "trunk norm", "text 0", "text norm" or "heads".
        held: all parameters.
        trained: those in tensors that take gradients; the idle numbers of such a tensor are among them.
        modalities: those whose tokens it makes or changes.
        block: whether it is a joint block or a tower's.
        runs: whether training runs it.
    """

    name: str
    held: Count
    trained: Count
    modalities: tuple[str, ...] = ()
    block: bool = False
    runs: bool = True


def layers(model: Model, stage: Stage, tensor: int = 1) -> list[Layer]:
    """The layers of a stage's model in the order of `MMDiT.layers()`; the hidden projections are in none.

    Args:
        tensor: tensor-parallel ranks, which `config/tensor.refusals` accepts.
    """
    names, joint, last = tuple(model.modalities), is_trained("joint", stage), model.joint_depth - 1
    unread = [name for name in names if name not in reached(model, stage)]
    own = [name for name in names if name in predicted(stage)]
    embed = _total(_embedding(model, name, tensor) for name in names)
    idle_embed = _total(_embedding(model, name, tensor) for name in unread if not model.joint_depth)
    found = [Layer("embed", embed, embed - idle_embed if joint else NOTHING, names)]
    for index in range(model.joint_depth):
        block = _total(_block(model, name, tensor) for name in names)
        ends = (_block_end(model, name, tensor) + Count(0, _query_gain(model) // tensor) for name in unread)
        idle_end = _total(ends) if index == last else NOTHING
        found.append(Layer(f"joint {index}", block, block - idle_end if joint else NOTHING, names, block=True))
    if stage.alignment is not None:
        aligner = Count(sum(_linear(*shape) for shape in alignment_layers(model, stage.alignment)), 0)
        trained = aligner if is_trained("alignment", stage) else NOTHING
        found.insert(stage.alignment.block + 2, Layer("alignment", aligner, trained))
    if model.trunk_norm:
        norms = {name: Count(_norm_parameters(model, name), 0) for name in names}
        learnt = (norms[name] for name in scored(stage) if joint)
        found.append(Layer("trunk norm", _total(norms.values()), _total(learnt), names))
    of_part = {name: name in scored(stage) and is_trained(name, stage) for name in own}
    for name in own:
        runs, depth = stage.modalities[name].has_loss, model.modalities[name].tower_depth
        block, norm = _block(model, name, tensor), Count(_norm_parameters(model, name), 0)
        tower = [(f"{name} {index}", block, True) for index in range(depth)]
        tower += [(f"{name} norm", norm, False)] if depth and model.trunk_norm else []
        for label, count, is_block in tower:
            found.append(Layer(label, count, count if of_part[name] else NOTHING, (name,), is_block, runs))
    heads = {name: _head(model, name, tensor) for name in own}
    learnt = (head for name, head in heads.items() if of_part[name])
    return [*found, Layer("heads", _total(heads.values()), _total(learnt))]


def flows(model: Model, layers: Iterable[Layer]) -> list[dict[str, bool]]:
    """By layer, whether the tokens of each modality that it takes need a gradient: something before them is trained."""
    needs, found = dict.fromkeys(model.modalities, False), []
    for layer in layers:
        found.append(dict(needs))
        if layer.trained.total:
            needs.update(dict.fromkeys(layer.modalities, True))
    return found


def _total(counts: Iterable[Count]) -> Count:
    return reduce(Count.__add__, counts, NOTHING)
