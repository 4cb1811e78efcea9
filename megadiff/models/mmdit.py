"""The MMDiT: single-device code that does not know it is parallel.

Its four parts are `embed`, `trunk`, `towers` and `heads`. Parameters are called `embed.*`, of the trunk `joint.<i>.*`,
`alignment.*` and `trunk_norm.*`, then `towers.<modality>.<i>.*`, `heads.<modality>.*`, and `hidden_projections.<modality>.*`
(names.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import Alignment, Model
from megadiff.kernels.dispatch import settle
from megadiff.models.alignment import Aligner
from megadiff.models.blocks import Block, StreamNorm
from megadiff.models.embeddings import Embed
from megadiff.models.heads import Heads
from megadiff.models.initial import Initial, initial_range
from megadiff.models.layers import HiddenProjection
from megadiff.models.memory import keep_freed_memory
from megadiff.models.names import name_layers, named_owners, named_parameters
from megadiff.types import ALIGNMENT, Dense, Noised, Prediction, Readout, SampledRows, Stream

M = TypeVar("M", bound=nn.Module)


class MMDiT(nn.Module):
    """A denoiser of several modalities: embeddings, joint blocks, then a tower and a head per predicted modality.

    An `alignment` adds a layer that taps one modality's tokens after one joint block.

    Attributes:
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
    """

    def __init__(self, config: Model, predicted: Collection[str], alignment: Alignment | None = None) -> None:
        super().__init__()
        self.activation_checkpointing = False
        names = list(config.modalities)
        self.predicted = tuple(name for name in names if name in predicted)
        self.embed = Embed(config)
        self.joint = nn.ModuleList(Block(config, names, last=i == config.joint_depth - 1) for i in range(config.joint_depth))
        self.trunk_norm = StreamNorm(config, names) if config.trunk_norm else None
        self.towers = nn.ModuleDict({name: _tower(config, name) for name in self.predicted})
        self.heads = Heads(config, self.predicted)
        outputs = {name: config.hidden_projections[name] for name in self.predicted if name in config.hidden_projections}
        self.hidden_projections = nn.ModuleDict(
            {name: HiddenProjection(config.width_of(name), count) for name, count in outputs.items()}
        )
        self.alignment = None if alignment is None else Aligner(alignment, config.width_of(alignment.modality))
        name_layers(self, self.layers())

    def forward(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        """Predict the modalities named in `readout`; the towers and heads of others are not run.

        The modalities in `readout` alone decide which modules run, in which order: ZeRO-3 gathers weights module by module on
        all ranks at once.

        Raises:
            UserError: a modality has no head.
        """
        embed, *layers, heads = self.layers(readout)
        stream = run_layers(layers, self.reading(embed(noised), readout), recompute=self.activation_checkpointing)
        prediction: Prediction = heads(stream, readout)
        return prediction

    def reading(self, stream: Stream, readout: Mapping[str, Readout | None]) -> Stream:
        """The stream, with what is read of it after the joint blocks, if there are any; None: all samples are."""
        if not self.joint:
            return stream
        samples = {
            name: wanted.samples if isinstance(wanted, Dense | SampledRows) and name not in stream.ragged else None
            for name, wanted in readout.items()
            if name != ALIGNMENT
        }
        if self.alignment is not None and ALIGNMENT in readout and self.alignment.block == len(self.joint) - 1:
            samples[self.alignment.modality] = None
        return stream._replace(read=samples)

    @property
    def device(self) -> torch.device:
        """The weights' device; diffusers' pipelines read it of their components."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def trunk(self) -> list[nn.Module]:
        """The joint blocks, after one of them the alignment, and their norm."""
        layers: list[nn.Module] = list(self.joint)
        if self.alignment is not None:
            layers.insert(self.alignment.block + 1, self.alignment)
        return layers if self.trunk_norm is None else [*layers, self.trunk_norm]

    def layers(self, read: Collection[str] | None = None) -> list[nn.Module]:
        """The layers that forward runs, in order, to read out the modalities and `ALIGNMENT` in `read`; None: all layers.

        The first takes a Noised to a Stream, the last a Stream and a readout to a Prediction, the others a Stream to a Stream.

        Raises:
            UserError: a modality has no head.
        """
        outputs = [*self.predicted, *([] if self.alignment is None else [ALIGNMENT])]
        wanted = outputs if read is None else read
        missing = [name for name in wanted if name not in outputs]
        if missing:
            raise UserError(f"the model has no head for {', '.join(missing)}; it predicts {', '.join(outputs)}")
        trunk = [layer for layer in self.trunk if layer is not self.alignment or ALIGNMENT in wanted]
        towers = [layer for name in self.predicted if name in wanted for layer in self.towers[name]]  # type: ignore[attr-defined]
        return [self.embed, *trunk, *towers, self.heads]


def run_layers(layers: Iterable[nn.Module], stream: Stream, *, recompute: bool) -> Stream:
    """The stream after layers between the first and the last; `recompute`: blocks, in the backward pass."""
    for layer in layers:
        if recompute and torch.is_grad_enabled() and isinstance(layer, Block):  # nothing in a block is random
            stream = checkpoint(layer, stream, use_reentrant=False, preserve_rng_state=False)
        else:
            stream = layer(stream)
    return stream


def build_model(config: Model, predicted: Collection[str], alignment: Alignment | None = None, seed: int | None = 0) -> MMDiT:
    """A freshly initialised model; on the meta device or, without a seed, one whose values are open.

    Args:
        predicted: modalities that get a tower and a head; the others are read only.
        alignment: adds its projection.
        seed: of the initial values; None for who sets them later.

    Raises:
        ConfigError: a modality is unknown.
        UserError: MEGADIFF_KERNELS requires kernels that cannot run here.
    """
    unknown = [name for name in predicted if name not in config.modalities]
    if unknown:
        raise ConfigError(f"predicted names {', '.join(unknown)}; the model's modalities are {', '.join(config.modalities)}")
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        settle()
    except ValueError as error:
        raise UserError(str(error)) from None
    model = MMDiT(config, predicted, alignment)
    return model if seed is None else initialise(model, seed)


def initial_distributions(module: nn.Module) -> dict[str, Initial]:
    """By the model's names, the distribution of every parameter's initial values; also of a model on the meta device."""
    return {name: owner.initial()[own] for name, owner, own, _ in named_owners(module)}  # type: ignore[operator]


def initialise(module: M, seed: int) -> M:
    """Fill all parameters in place, and return the module; on the meta device there is nothing to fill."""
    distributions = initial_distributions(module)
    with torch.no_grad():
        for name, parameter in named_parameters(module):
            if not parameter.is_meta:
                values = initial_range(distributions[name], seed, name, 0, parameter.numel())
                parameter.copy_(values.view(parameter.shape))
    return module


def _tower(config: Model, name: str) -> nn.ModuleList:
    depth = config.modalities[name].tower_depth
    blocks: list[nn.Module] = [Block(config, [name]) for _ in range(depth)]
    if config.trunk_norm and depth:
        blocks.append(StreamNorm(config, [name]))
    return nn.ModuleList(blocks)
