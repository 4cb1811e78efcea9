"""DeepSpeed's ZeRO-0/1/2/3 as a backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import deepspeed
import torch

from megadiff.config.checks import require
from megadiff.config.deepspeed import resolve, zero_stage
from megadiff.config.layout import Layout
from megadiff.config.parameters import is_trained
from megadiff.config.schema import Model, Stage
from megadiff.config.tensor import refusals
from megadiff.distributed.ranks import Ranks
from megadiff.engine.api import Outcome, PreparedBatch, Score
from megadiff.engine.engine import Engine
from megadiff.engine.optimizer import build_optimizer
from megadiff.engine.start import start_process_group, without_compiler
from megadiff.engine.zero_pieces import zero_pieces
from megadiff.models.idle import Idle, idle_parameters
from megadiff.models.mmdit import MMDiT, build_model
from megadiff.models.names import decayed_names, named_parameters, part_of
from megadiff.models.tensor_plan import Split
from megadiff.types import Denoiser

if TYPE_CHECKING:
    from megadiff.engine.tensor import ModelParallelUnit

log = logging.getLogger(__name__)


class ZeroBackend:
    """The whole model on every rank, or with tensor parallelism a part of each layer; its weights, gradients or optimizer
    sharded over the data-parallel ranks by DeepSpeed.
    """

    def __init__(
        self,
        model: Model,
        stage: Stage,
        tree: Mapping[str, Any],
        *,
        seed: int,
        ranks: Ranks,
        layout: Layout | None = None,
    ) -> None:
        """Build the model (freshly initialised from `seed`) and wrap it. Collective.

        Args:
            tree: the DeepSpeed JSON as read, with its "auto" values.
            layout: by default, data-parallel ranks only.

        Raises:
            ConfigError: the JSON contradicts the stage, or the batch or the model's sizes do not divide.
        """
        self.layout = layout or Layout(ranks.rank, ranks.world)
        require(refusals(model, self.layout.tensor))
        self.device = start_process_group(ranks)
        config = resolve(dict(tree), stage, data_ranks=self.layout.data_ranks, accelerator=self.device.type != "cpu")
        if zero_stage(config) == 0 and config["bf16"]["enabled"]:
            # bf16 needs fp32 masters, and DeepSpeed keeps them only where it partitions the optimizer.
            log.info("bf16 with ZeRO-0 runs as ZeRO-1, which keeps fp32 master weights")
            config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": 1}
        self.accumulation: int = config["gradient_accumulation_steps"]
        predicted = [name for name, modality in stage.modalities.items() if modality.predicted]
        # With tensor parallelism DeepSpeed partitions the parts, over the data-parallel ranks, when it has the mpu.
        partitioned = zero_stage(config) == 3 and self.layout.tensor == 1
        with deepspeed.zero.Init(config_dict_or_path=config) if partitioned else nullcontext():
            torch.manual_seed(seed)
            module = build_model(model, predicted, stage.alignment)
        module.activation_checkpointing = stage.activation_checkpointing
        self.idle: Idle = idle_parameters(model, stage, [name for name, _ in named_parameters(module)])
        for name, parameter in named_parameters(module):
            parameter.requires_grad_(is_trained(part_of(name), stage) and name not in self.idle.whole)
        self.mpu, splits = self._split(module)
        optimizer = build_optimizer(module, stage.optimizer, decayed_names(module))
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=self.mpu)
        self.module = self.engine.module
        self.pieces = zero_pieces(self.engine, self.layout, splits)

    def _split(self, module: MMDiT) -> tuple[ModelParallelUnit | None, dict[str, Split]]:
        """Leave this tensor rank's part of each layer in the model; the groups for DeepSpeed, and the parts."""
        if self.layout.tensor == 1:
            return None, {}
        with without_compiler():  # megatron takes a second to import, or three with the compiler
            from megadiff.engine.tensor import split_model, start_tensor_parallel
        return start_tensor_parallel(self.layout), split_model(module, self.layout.tensor, self.layout.tensor_rank)

    def run(self, prepared: Sequence[PreparedBatch], score: Score, learning_rate: float) -> Outcome:
        for group in self.pieces.optimizer.param_groups:
            group["lr"] = learning_rate
        all_terms, own_norm = [], 0.0
        for micro_batch in prepared:
            terms = score(self.engine(micro_batch.noised, micro_batch.readout), micro_batch)
            self.engine.backward(terms.total)
            own_norm = self._gradient_norm()
            self.engine.step()
            all_terms.append(terms)
        return Outcome(
            all_terms if self.layout.speaks else [],
            grad_norm=float(self.engine.get_global_grad_norm() or own_norm),
            applied=bool(self.engine.was_step_applied()),
        )

    def _gradient_norm(self) -> float:
        """The norm in ZeRO-0, where DeepSpeed clips by it but does not report it; 0 in the other stages."""
        if self.engine.optimizer is not self.pieces.optimizer or not self.engine.is_gradient_accumulation_boundary():
            return 0.0
        if self.mpu is not None:
            return self.mpu.gradient_norm(self.module.parameters())
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @contextmanager
    def denoiser(self) -> Iterator[Denoiser]:
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train()


def zero_engine(
    model: Model, stage: Stage, tree: Mapping[str, Any], *, seed: int, ranks: Ranks, layout: Layout | None = None
) -> Engine:
    """An engine over a ZeroBackend; arguments and errors as there."""
    backend = ZeroBackend(model, stage, tree, seed=seed, ranks=ranks, layout=layout)
    return Engine(backend, stage, backend.idle)
