"""The MMDiT: single-device code that does not know it is parallel.

Parameters are called `embed.*`, `joint.<i>.*`, `trunk_norm.*`, `towers.<modality>.<i>.*`, `heads.<modality>.*`,
`hidden_projections.<modality>.*`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megadiff.config.derived import HIDDEN
from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import Alignment, Model
from megadiff.kernels.dispatch import settle
from megadiff.models.alignment import Aligner
from megadiff.models.blocks import Block, StreamNorm
from megadiff.models.embeddings import Embed
from megadiff.models.heads import Head, Heads
from megadiff.models.layers import HiddenProjection, Linear
from megadiff.types import ALIGNMENT, Noised, Prediction, Readout, Stream

JOINT = "joint"


class MMDiT(nn.Module):
    """A denoiser of several modalities: embeddings, joint blocks, then a tower and a head per predicted modality.

    With an `alignment`, a projection of one modality's tokens after one joint block beside them.

    Attributes:
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
    """

    def __init__(self, config: Model, predicted: Collection[str], alignment: Alignment | None = None) -> None:
        super().__init__()
        self.activation_checkpointing = False
        names = list(config.modalities)
        self.predicted = tuple(name for name in names if name in predicted)
        self.embed = Embed(config)
        self.joint = nn.ModuleList(Block(config, names) for _ in range(config.joint_depth))
        self.trunk_norm = StreamNorm(config, names) if config.trunk_norm else None
        self.towers = nn.ModuleDict({name: _tower(config, name) for name in self.predicted})
        self.heads = Heads(config, self.predicted)
        outputs = {name: config.hidden_projections[name] for name in self.predicted if name in config.hidden_projections}
        self.hidden_projections = nn.ModuleDict(
            {name: HiddenProjection(config.width_of(name), count) for name, count in outputs.items()}
        )
        self.alignment = None if alignment is None else Aligner(alignment, config.width_of(alignment.modality))

    def forward(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        """Predict the modalities named in `readout`; the towers and heads of others are not run.

        The same modalities in `readout` run the same modules in the same order, whatever the data: ZeRO-3 gathers weights
        module by module on all ranks at once.

        Raises:
            UserError: a modality has no head.
        """
        missing = [name for name in readout if name not in (*self.predicted, ALIGNMENT)]
        if missing:
            raise UserError(f"the model has no head for {', '.join(missing)}; it predicts {', '.join(self.predicted)}")
        embed, *blocks, heads = self.layers(readout)
        stream: Stream = embed(noised)
        aligned: Prediction = {}
        for index, block in enumerate(blocks):
            stream = self._run(block, stream)
            if self.alignment is not None and index == self.alignment.block and ALIGNMENT in readout:
                aligned[ALIGNMENT] = self.alignment(stream, readout[ALIGNMENT])
        return {**heads(stream, readout), **aligned}

    @property
    def device(self) -> torch.device:
        """Where the weights are; diffusers' pipelines ask their components for it."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def layers(self, read: Collection[str] | None = None) -> list[nn.Module]:
        """The layers that forward runs in order when the modalities `read` (None: all predicted) are read out.

        The first takes a Noised to a Stream, the last a Stream and the readout to a Prediction, those between a Stream to a
        Stream.
        """
        wanted = self.predicted if read is None else [name for name in self.predicted if name in read]
        trunk_norm = [] if self.trunk_norm is None else [self.trunk_norm]
        towers = [layer for name in wanted for layer in self.towers[name]]  # type: ignore[attr-defined]
        return [self.embed, *self.joint, *trunk_norm, *towers, self.heads]

    def _run(self, layer: nn.Module, stream: Stream) -> Stream:
        recompute = self.activation_checkpointing and isinstance(layer, Block) and torch.is_grad_enabled()
        if recompute:  # nothing in a block is random
            result: Stream = checkpoint(layer, stream, use_reentrant=False, preserve_rng_state=False)
        else:
            result = layer(stream)
        return result


def build_model(config: Model, predicted: Collection[str], alignment: Alignment | None = None) -> MMDiT:
    """A freshly initialised model, deterministic under torch.manual_seed; also inside deepspeed.zero.Init or on meta.

    Args:
        predicted: modalities that get a tower and a head; the others are only read.
        alignment: adds its projection.

    Raises:
        ConfigError: a modality is unknown or has a name that cannot be used for a module.
        UserError: MEGADIFF_KERNELS asks for kernels that there are not.
    """
    unknown = [name for name in predicted if name not in config.modalities]
    if unknown:
        raise ConfigError(f"predicted names {', '.join(unknown)}; the model's modalities are {', '.join(config.modalities)}")
    reserved = [name for name in config.modalities if name == JOINT or hasattr(nn.ModuleDict, name) or name == "training"]
    if reserved:
        raise ConfigError(f"model.modalities: {', '.join(reserved)} cannot be the name of a modality; choose another")
    try:
        settle()
    except ValueError as error:
        raise UserError(str(error)) from None
    return MMDiT(config, predicted, alignment)


def part_of(parameter_name: str) -> str:
    """What a parameter belongs to, as `freeze` names it: a modality (tower and head), `alignment`, or `joint` (all else).

    `hidden_projections` are a part that no stage trains.
    """
    kind, _, rest = parameter_name.partition(".")
    if kind in (ALIGNMENT, HIDDEN):
        return kind
    return rest.partition(".")[0] if kind in ("towers", "heads") else JOINT


def decayed_names(module: nn.Module) -> list[str]:
    """Names of the parameters that weight decay is for: weights of linear maps, not embeddings, gains or biases."""
    return [f"{name}.weight" for name, child in module.named_modules() if isinstance(child, Linear | Head)]


def _tower(config: Model, name: str) -> nn.ModuleList:
    depth = config.modalities[name].tower_depth
    blocks: list[nn.Module] = [Block(config, [name]) for _ in range(depth)]
    if config.trunk_norm and depth:
        blocks.append(StreamNorm(config, [name]))
    return nn.ModuleList(blocks)
