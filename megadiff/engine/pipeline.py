"""DeepSpeed's pipeline parallelism as a backend, with ZeRO-0 or ZeRO-1 over the replicas of each stage."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megadiff.config.partition import partition
from megadiff.engine.api import Outcome, PreparedBatch, Score
from megadiff.engine.blueprint import Blueprint, materialise, split_if_tensor_parallel
from megadiff.engine.optimizer import build_optimizer, clip_and_skip, gradient_norm
from megadiff.engine.pieces import Pieces
from megadiff.engine.section import Section
from megadiff.engine.wire import Wire, pack, unpack
from megadiff.engine.zero_gradients import pass_less_often
from megadiff.engine.zero_pieces import zero_pieces
from megadiff.models.names import decayed_names
from megadiff.types import ALIGNMENT, Denoiser, Noised, Prediction, Readout

PLACEHOLDERS = "placeholders"
DECAYED = f"{PLACEHOLDERS}.0"


class SectionModule(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's pipeline module around the Section of this rank's pipeline stage.

    Attributes:
        placeholders: a parameter for each group of the optimizer, never used. DeepSpeed fails without parameters, and sums the
            gradient norm over the pipeline stages group by group, so each stage has to have as many groups.
    """

    def __init__(self, blueprint: Blueprint, bounds: Sequence[int]) -> None:
        """Take this rank's layers out of the whole model.

        Args:
            bounds: where the pipeline stages begin in the model's `layers()`, and their end.
        """
        model, stage, whole, layout = blueprint.model, blueprint.stage, blueprint.module, blueprint.layout
        ranks = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data_ranks)
        # DeepSpeed builds no layer itself, and hands the "method" of the partition to `_partition_layers` as it is.
        super().__init__(whole.layers(), topology=ranks, partition_method=bounds)
        read = [name for name, modality in stage.modalities.items() if modality.has_loss]
        read += [] if stage.alignment is None else [ALIGNMENT]
        widths = {name: model.width_of(name) for name in model.modalities}
        self.section = Section(whole, self._local_start, self._local_stop, widths=widths, read=read)
        if self.section.last:
            self.hidden_projections = whole.hidden_projections  # in no layer, for they are never run
        self.placeholders = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(2))

    def _partition_layers(self, method: Sequence[int]) -> None:
        self.parts = list(method)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def forward(self, taken: Tensor | tuple[Tensor, ...]) -> Tensor | Wire:
        return self.section.train(taken)


class PipelineBackend:
    """The model's layers cut into stages, which a replica's ranks work on one after the other, micro-batch by micro-batch."""

    def __init__(self, blueprint: Blueprint) -> None:
        """Allocate this rank's layers, with open values, and wrap them. Collective.

        Args:
            blueprint: with two pipeline stages or more, in ZeRO-0 or ZeRO-1.

        Raises:
            ConfigError: there are more pipeline stages than layers.
        """
        self.layout, self.device, self.accumulation = blueprint.layout, blueprint.device, blueprint.accumulation
        whole, config, layout = blueprint.module, blueprint.config, blueprint.layout
        # Gradients are reduced once, after the last micro-batch.
        config.setdefault("zero_optimization", {})["overlap_comm"] = False
        # Both would send a tensor rank's part alone, and gather it with CUDA's functions.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        bounds = partition(blueprint.model, blueprint.stage, layout.pipeline)
        _, splits = split_if_tensor_parallel(blueprint)
        first, end = bounds[layout.pipeline_rank], bounds[layout.pipeline_rank + 1]
        for part in (*whole.layers()[first:end], whole.hidden_projections):
            materialise(part, self.device)
        self._clip: float = config["gradient_clipping"]
        self._own_norm: Tensor | None = None
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints the topology, and memory
            module = SectionModule(blueprint, bounds).to(self.device)
            optimizer = build_optimizer(module, blueprint.stage.optimizer, [*decayed_names(module), DECAYED])
            if blueprint.zero == 0:
                # DeepSpeed would clip by the norm over all stages, but not report it.
                config["gradient_clipping"] = 0.0
                optimizer.register_step_pre_hook(lambda *_: self._clip_gradients())
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        pass_less_often(self.engine.optimizer, layout)
        self.module: SectionModule = self.engine.module
        self.section = self.module.section
        self.pieces = _without_placeholders(zero_pieces(self.engine, layout, splits))
        self._shapes: list[torch.Size] | None = None

    # ------------------------------------------------------------------------------------------------------- training

    def run(self, prepared: Sequence[PreparedBatch], score: Score, learning_rate: float) -> Outcome:
        for group in self.pieces.optimizer.param_groups:
            group["lr"] = learning_rate
        self._renew_buffers(prepared)
        self.section.feed(prepared, score)
        self._own_norm = None
        numbers = [torch.tensor(number) for number in range(self.accumulation)]
        self.engine.train_batch(iter([(number, number) for number in numbers]))
        own_norm = self._own_norm
        return Outcome(
            self.section.terms if self.layout.speaks else [],
            grad_norm=self.engine.get_global_grad_norm() if own_norm is None else own_norm,
            applied=self.engine.was_step_applied() if own_norm is None else own_norm.isfinite(),
        )

    def _renew_buffers(self, prepared: Sequence[PreparedBatch]) -> None:
        """Make DeepSpeed tell the next stage the shapes again, on all ranks alike, if they are not those of the step before."""
        changed = torch.zeros((), device=self.device)
        if self.layout.reads:
            shapes = [state.shape for state in prepared[0].noised.states.values()]
            changed += shapes != self._shapes
            self._shapes = shapes
        dist.all_reduce(changed, dist.ReduceOp.MAX, self._replica)
        if changed:
            self.engine.reset_activation_shape()

    def _clip_gradients(self) -> None:
        """Clip by the norm over all stages, or skip the step for it, as DeepSpeed does in ZeRO-1."""
        self._own_norm = gradient_norm(self.module.parameters(), self.layout, self.module.mpu().get_model_parallel_group())
        clip_and_skip(self.pieces.optimizer, self._own_norm, self._clip)

    @property
    def _replica(self) -> Any:
        """The process group of the stages of this rank's replica."""
        return self.module.mpu().get_pipe_parallel_group()

    # ------------------------------------------------------------------------------------------------------- sampling

    @contextmanager
    def denoiser(self) -> Iterator[Denoiser]:
        """Every rank of a replica calls it with the same input, and gets the whole prediction."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield self._predict
        finally:
            self.module.train()

    def _predict(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        section = self.section
        stream = section.embed(noised) if section.first else unpack(self._receive(), section.widths)[0]
        stream = section.run(stream, readout)
        if section.last:
            return self._share(section.heads(stream, readout))
        self._send(pack(stream, 0))
        return self._share({})

    def _send(self, wire: Wire) -> None:
        sizes = torch.tensor([len(wire.floats), *wire.visible.shape, len(wire.header)], device=self.device)
        for tensor in (sizes, *wire):
            dist.send(tensor, self._neighbour(1))

    def _receive(self) -> Wire:
        sizes = torch.empty(4, dtype=torch.int64, device=self.device)
        dist.recv(sizes, self._neighbour(-1))
        count, batch, positions, entries = sizes.tolist()
        wire = Wire(
            torch.empty(count, dtype=next(self.module.parameters()).dtype, device=self.device),
            torch.empty(batch, positions, dtype=torch.uint8, device=self.device),
            torch.empty(entries, dtype=torch.int64, device=self.device),
        )
        for tensor in wire:
            dist.recv(tensor, self._neighbour(-1))
        return wire

    def _neighbour(self, distance: int) -> int:
        """The rank that works on the stage `distance` after this one."""
        return self.layout.rank + distance * self.layout.data_ranks * self.layout.tensor

    def _share(self, prediction: Prediction) -> Prediction:
        """The last stage's prediction, on all ranks of the replica."""
        last = self._neighbour(self.layout.pipeline - 1 - self.layout.pipeline_rank)
        forms = [{name: _form(output) for name, output in prediction.items()}]
        dist.broadcast_object_list(forms, last, self._replica)
        shared: Prediction = {}
        for name, (kind, tensors) in forms[0].items():
            given = _tensors(prediction[name]) if self.section.last else None
            received = []
            for index, (shape, dtype) in enumerate(tensors):
                tensor = torch.empty(shape, dtype=dtype, device=self.device) if given is None else given[index].contiguous()
                dist.broadcast(tensor, last, self._replica)
                received.append(tensor)
            shared[name] = received[0] if kind is None else kind(*received)
        return shared


def _without_placeholders(pieces: Pieces) -> Pieces:
    return replace(
        pieces,
        trained=[piece for piece in pieces.trained if not piece.name.startswith(PLACEHOLDERS)],
        shapes={name: shape for name, shape in pieces.shapes.items() if not name.startswith(PLACEHOLDERS)},
    )


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _form(output: Any) -> tuple[type | None, list[tuple[torch.Size, torch.dtype]]]:
    """The NamedTuple that a part of a prediction is (None for a tensor), and shapes and dtypes of its tensors."""
    kind = None if isinstance(output, Tensor) else type(output)
    return kind, [(tensor.shape, tensor.dtype) for tensor in _tensors(output)]
