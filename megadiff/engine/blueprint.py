"""What every backend is built from: the whole model on the meta device, of which a rank makes its own part alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megadiff.config.deepspeed import fit_buckets, resolve, zero_stage
from megadiff.config.layout import Layout
from megadiff.config.parameters import is_trained
from megadiff.config.schema import Model, Stage
from megadiff.engine.start import without_compiler
from megadiff.models.idle import Idle, idle_parameters
from megadiff.models.mmdit import MMDiT, build_model
from megadiff.models.names import named_parameters, part_of
from megadiff.models.tensor_plan import Split

if TYPE_CHECKING:
    from megadiff.engine.tensor import ModelParallelUnit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blueprint:
    """One stage of training on one rank, before anything is allocated.

    Attributes:
        config: what DeepSpeed gets, resolved.
        module: on the meta device, in the dtype of training; parameters that are not trained need no gradient.
        idle: parameters that no loss of the stage reaches.
    """

    model: Model
    stage: Stage
    config: dict[str, Any]
    layout: Layout
    device: torch.device
    module: MMDiT
    idle: Idle

    @property
    def zero(self) -> int:
        """The ZeRO stage."""
        return zero_stage(self.config)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each replica."""
        return int(self.config["gradient_accumulation_steps"])


def draw_up(model: Model, stage: Stage, tree: Mapping[str, Any], layout: Layout, device: torch.device) -> Blueprint:
    """A blueprint from a DeepSpeed JSON as read, with its "auto" values.

    Raises:
        ConfigError: the JSON contradicts the stage, or the batch does not divide.
    """
    config = resolve(tree, stage, data_ranks=layout.data_ranks, accelerator=device.type != "cpu")
    config = fit_buckets(config, model, stage)
    bf16 = config["bf16"]["enabled"]
    if bf16 and zero_stage(config) == 0:
        # bf16 needs fp32 masters, and DeepSpeed keeps them only where it partitions the optimizer.
        log.info("bf16 with ZeRO-0 runs as ZeRO-1, which keeps fp32 master weights")
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": 1}
    predicted = [name for name, modality in stage.modalities.items() if modality.predicted]
    with torch.device("meta"):
        module = build_model(model, predicted, stage.alignment).to(torch.bfloat16 if bf16 else torch.float32)
    module.activation_checkpointing = stage.activation_checkpointing
    if stage.compile:
        from megadiff.models.compiling import compile_for_training

        compile_for_training(module)
    idle = idle_parameters(model, stage, [name for name, _ in named_parameters(module)])
    for name, parameter in named_parameters(module):
        parameter.requires_grad_(is_trained(part_of(name), stage) and name not in idle.whole)
    return Blueprint(model, stage, config, layout, device, module, idle)


def split_if_tensor_parallel(blueprint: Blueprint) -> tuple[ModelParallelUnit | None, dict[str, Split]]:
    """Leave this tensor rank's part of each layer in the model; megatron's groups, and the parts by parameter name."""
    if blueprint.layout.tensor == 1:
        return None, {}
    with without_compiler(), warnings.catch_warnings():  # megatron takes a second to import, or three with the compiler
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed")
        from megadiff.engine.tensor import split_model, start_tensor_parallel
    unit = start_tensor_parallel(blueprint.layout)
    return unit, split_model(blueprint.module, blueprint.layout.tensor, blueprint.layout.tensor_rank)


def materialise(module: nn.Module, device: torch.device) -> None:
    """Allocate the parameters of a module on the meta device, with open values; what is marked on them stays."""
    for child in module.modules():
        for own, parameter in list(child.named_parameters(recurse=False)):
            real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            vars(real).update(vars(parameter))
            setattr(child, own, real)
