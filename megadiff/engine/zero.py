"""DeepSpeed's ZeRO-0/1/2/3 as a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import deepspeed
import torch
from torch import Tensor
from torch.profiler import record_function

from megadiff.engine.api import BACKWARD, FORWARD, OPTIMIZER, REDUCE, Outcome, PreparedBatch, Score
from megadiff.engine.blueprint import Blueprint, materialise, split_if_tensor_parallel
from megadiff.engine.gathered import drop_idle_hooks, gathered_whole, release_linear_weights
from megadiff.engine.optimizer import build_optimizer, clip_and_skip, gradient_norm
from megadiff.engine.zero_gradients import pass_less_often
from megadiff.engine.zero_pieces import zero_pieces
from megadiff.models.blocks import Block
from megadiff.models.names import decayed_names
from megadiff.types import Denoiser


class ZeroBackend:
    """The whole model on every rank, or with tensor parallelism a part of each layer; its weights, gradients or optimizer
    sharded over the data-parallel ranks by DeepSpeed.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        """Allocate this rank's part of the model, with open values, and wrap it. Collective."""
        self.layout, self.device, self.accumulation = blueprint.layout, blueprint.device, blueprint.accumulation
        module, config = blueprint.module, blueprint.config
        self.mpu, splits = split_if_tensor_parallel(blueprint)
        replicas = None if self.mpu is None else self.mpu.get_data_parallel_group()
        for part in (*module.layers(), module.hidden_projections):
            materialise(part, self.device)
            if blueprint.zero == 3:
                # Layer by layer, so that no rank ever holds the model.
                deepspeed.zero.Init(part, replicas, config_dict_or_path=config, mpu=self.mpu)
        optimizer = build_optimizer(module, blueprint.stage.optimizer, decayed_names(module))
        self._clip: float = config["gradient_clipping"]
        self._own_norm: Tensor | None = None
        if blueprint.zero == 0:
            # DeepSpeed neither reports nor checks its norm there, and would take it beside ours.
            config["gradient_clipping"] = 0.0
            optimizer.register_step_pre_hook(lambda *_: self._clip_gradients())
        # A compiled block's weights are gathered outside its graph, all at once.
        whole = gathered_whole(module, Block) if blueprint.zero == 3 and blueprint.stage.compile else nullcontext()
        with whole:
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=self.mpu)
        if blueprint.zero == 0 and self.layout.data_ranks == 1:
            # It would copy all gradients into one tensor and back, to add up those of one rank.
            self.engine.allreduce_gradients = lambda *_, **__: None
        pass_less_often(self.engine.optimizer, self.layout)
        if blueprint.zero == 3:
            drop_idle_hooks(self.engine)
            if config["zero_optimization"].get("memory_efficient_linear", True):
                release_linear_weights()
        # DeepSpeed calls it at the end of the last backward pass; what it sends before that overlaps with the pass.
        self.engine.allreduce_gradients = record_function(REDUCE)(self.engine.allreduce_gradients)
        self.module = self.engine.module
        self.pieces = zero_pieces(self.engine, self.layout, splits)

    def run(self, prepared: Sequence[PreparedBatch], score: Score, learning_rate: float) -> Outcome:
        for group in self.pieces.optimizer.param_groups:
            group["lr"] = learning_rate
        all_terms = []
        self._own_norm = None
        for micro_batch in prepared:
            with record_function(FORWARD):
                terms = score(self.engine(micro_batch.noised, micro_batch.readout), micro_batch)
            with record_function(BACKWARD):
                self.engine.backward(terms.total)
            with record_function(OPTIMIZER):
                self.engine.step()
            all_terms.append(terms)
        own_norm = self._own_norm
        return Outcome(
            all_terms if self.layout.speaks else [],
            grad_norm=self.engine.get_global_grad_norm() if own_norm is None else own_norm,
            applied=self.engine.was_step_applied() if own_norm is None else own_norm.isfinite(),
        )

    def _clip_gradients(self) -> None:
        """Clip by the norm, or skip the step for it, as DeepSpeed does in ZeRO-1 to 3."""
        group = None if self.mpu is None else self.mpu.get_model_parallel_group()
        self._own_norm = gradient_norm(self.module.parameters(), self.layout, group)
        clip_and_skip(self.pieces.optimizer, self._own_norm, self._clip)

    @contextmanager
    def denoiser(self) -> Iterator[Denoiser]:
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train()
