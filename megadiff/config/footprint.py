"""What a rank holds and sends in a layout, by pure arithmetic and without torch; benchmarks/layouts.py counts it.

DeepSpeed's part is that of 0.19.8. Legend: P pipeline stages, R data-parallel ranks, T tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megadiff.config.activations import Precision, activations, leads_on, number_bytes, recomputed
from megadiff.config.deepspeed import DEFAULT_BUCKET
from megadiff.config.derived import accumulation, layer_flops
from megadiff.config.layout import Layout
from megadiff.config.parameters import (
    BLOCK_SLOTS,
    HEAD_SLOTS,
    Layer,
    flows,
    is_trained,
    layers,
    stage_parameters,
    token_count,
)
from megadiff.config.partition import partition
from megadiff.config.schema import Model, Stage, TokenSpace

WIDE = 4
"""Bytes of a float32 number: masters, moments, averages."""
DEFAULT_DISTANCE, DEFAULT_AHEAD = 1_000_000_000, 50_000_000
"""DeepSpeed's defaults of stage3_max_reuse_distance and stage3_prefetch_bucket_size, in numbers."""

Bytes = dict[str, int]
"""By kind; `total` is their sum."""


@dataclass(frozen=True)
class Plan:
    """A run's stage in a layout.

    Attributes:
        zero: the ZeRO stage.
        options: the block `zero_optimization` of the DeepSpeed JSON.
    """

    model: Model
    stage: Stage
    layout: Layout
    zero: int
    precision: Precision
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[Layer]:
        return layers(self.model, self.stage, self.layout.tensor)

    @cached_property
    def bounds(self) -> list[int]:
        """Where pipeline stages begin and the last one ends, in `layers`."""
        return partition(self.model, self.stage, self.layout.pipeline)

    @cached_property
    def micro_batches(self) -> int:
        """Of a step, on each replica."""
        return accumulation(self.stage, self.layout.data_ranks)

    @property
    def effective_zero(self) -> int:
        """bf16 with ZeRO-0 runs as ZeRO-1, which keeps float32 masters."""
        return 1 if self.zero == 0 and self.precision == "bf16" else self.zero

    @property
    def offloaded(self) -> frozenset[str]:
        """Kinds of bytes that lie in the host's memory instead of the GPU's."""
        kinds = {"offload_param": {"weights"}, "offload_optimizer": {"master", "adam", "ema"}}
        blocks = [block for block in kinds if self.options.get(block, {}).get("device", "none") != "none"]
        return frozenset(kind for block in blocks for kind in kinds[block])

    @property
    def size(self) -> int:
        """Bytes of a weight, a gradient and an activation."""
        return number_bytes(self.precision)

    def own(self, pipeline_rank: int) -> range:
        """The layers of a pipeline stage."""
        return range(self.bounds[pipeline_rank], self.bounds[pipeline_rank + 1])


# ---------------------------------------------------------------------------------------------------------------- held


def bytes_per_rank(plan: Plan) -> list[Bytes]:
    """What a rank of each pipeline stage holds at the peak of each kind.

    weights: between steps; ZeRO-3 divides them over the data ranks. gathered: the whole weights that ZeRO-3 has at once: by
    stage3_max_reuse_distance, those of the last layers stay from their forward to their backward, and others are fetched
    ahead. gradients: ZeRO-0 and 1 have them whole after the backward pass, 2 and 3 this rank's part; from ZeRO-1 on the
    optimizer steps with a float32 copy of the part, and of several ranks ZeRO-2 keeps nothing else. master: float32 copies of
    all parameters, or of the frozen ones only with ZeRO-0 and ZeRO-3 in fp32, which step the weights themselves. adam: two
    float32 moments of trained ones. ema: float32 per profile. These three are divided from ZeRO-1 on, and copies of frozen
    parameters always, over tensor ranks too where these have them alike. activations: of the micro-batches that are in flight
    at once, at most min(P - stage, micro-batches). buffers: of reduce_bucket_size, in which ZeRO joins gradients; of one data
    rank in ZeRO-3 and offloading only.

    Idle parameters count as trained in tensors that are otherwise trained, else as frozen. What allocators and collectives
    take on top is not in it; neither are the small weights of stage3_param_persistence_threshold, which stay gathered.
    Offloaded kinds are counted as well; they are in the host's memory.
    """
    return [_stage_bytes(plan, index) for index in range(plan.layout.pipeline)]


def _stage_bytes(plan: Plan, index: int) -> Bytes:
    zero, size, ranks = plan.effective_zero, plan.size, plan.layout.data_ranks
    own = [plan.layers[at] for at in plan.own(index)]
    hidden = stage_parameters(plan.model, plan.stage).hidden if index == plan.layout.pipeline - 1 else 0
    held, trained = sum(layer.held.total for layer in own) + hidden, sum(layer.trained.total for layer in own)
    part = _ceil(trained, ranks if zero >= 1 else 1)
    alike = sum(layer.held.replicated - layer.trained.replicated for layer in own) + hidden
    frozen = _ceil(held - trained - alike, ranks) + _ceil(alike, ranks * plan.layout.tensor)
    steps_weights = plan.precision == "fp32" and zero in (0, 3)
    return with_total(
        {
            "weights": size * _ceil(held, ranks if zero == 3 else 1),
            "gathered": size * _gathered(plan) if zero == 3 and ranks > 1 else 0,
            "gradients": _gradients(plan, trained, part),
            "master": WIDE * (frozen if steps_weights else part + frozen),
            "adam": 2 * WIDE * part,
            "ema": WIDE * len(plan.stage.ema) * part,
            "activations": _activations(plan, index),
            "buffers": _buffers(plan),
        }
    )


def _gradients(plan: Plan, trained: int, part: int) -> int:
    zero, size = plan.effective_zero, plan.size
    if zero == 0:
        return size * trained
    if zero == 3 or plan.layout.data_ranks == 1 or "master" in plan.offloaded:
        return (size + WIDE) * part
    if zero == 2:
        return WIDE * part
    bucket = int(plan.options.get("reduce_bucket_size", DEFAULT_BUCKET))
    return max(size * trained, size * max(0, trained - bucket) + WIDE * part)


def _activations(plan: Plan, index: int) -> int:
    arguments = plan.model, plan.stage, plan.layers, plan.layout.tensor, plan.precision
    kept, again = activations(*arguments), recomputed(*arguments)
    in_flight = min(plan.layout.pipeline - index, plan.micro_batches)
    own = plan.own(index)
    return in_flight * sum(kept[at] for at in own) + max((again[at] for at in own), default=0)


def _buffers(plan: Plan) -> int:
    zero, pipelined = plan.effective_zero, plan.layout.pipeline > 1
    alone = zero < 3 and plan.layout.data_ranks == 1 and "master" not in plan.offloaded
    if zero == 0 or alone or not plan.options.get("contiguous_gradients", True):
        return 0
    double = zero < 3 and not pipelined and plan.options.get("overlap_comm", False)
    return plan.size * int(plan.options.get("reduce_bucket_size", DEFAULT_BUCKET)) * (2 if double else 1)


def _gathered(plan: Plan) -> int:
    """The most parameters that ZeRO-3 has whole: those that it keeps, and those that it fetches ahead."""
    ahead = int(plan.options.get("stage3_prefetch_bucket_size", DEFAULT_AHEAD))
    return min(sum(_kept(plan)) + ahead, sum(layer.held.total for layer in plan.layers if layer.runs))


def _kept(plan: Plan) -> list[int]:
    """By layer, the parameters that ZeRO-3 keeps gathered from the forward to the backward pass: the next use is at most
    stage3_max_reuse_distance parameters away.
    """
    distance = int(plan.options.get("stage3_max_reuse_distance", DEFAULT_DISTANCE))
    kept, after = [], 0
    for layer, backward in zip(reversed(plan.layers), reversed(crosses_back(plan)), strict=True):
        count = layer.held.total if layer.runs else 0
        near = min(count, max(0, distance // 2 - after)) if backward else 0
        kept.append(near)
        after += count
    return kept[::-1]


def crosses_back(plan: Plan) -> list[bool]:
    """By layer, whether training's backward pass goes through it."""
    needs = flows(plan.model, plan.layers)
    return [
        layer.runs and (layer.trained.total > 0 or any(needed[name] for name in layer.modalities or plan.model.modalities))
        for layer, needed in zip(plan.layers, needs, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------- sent


def bytes_sent_per_step(plan: Plan) -> list[Bytes]:
    """What a rank of each pipeline stage hands to collectives in a step, by collective, a few numbers of statistics aside.

    A collective's bytes are those of the tensor that all its ranks have or get: of an all_gather the gathered one, of a
    reduce_scatter the scattered one. Gradients: once a step, in ZeRO-2 and 3 for every micro-batch; all-reduced, although
    each rank needs its part only, and in ZeRO-3 scattered. Weights: ZeRO-1 and 2 gather them after the step, ZeRO-3 for the
    forward pass of every micro-batch, and for the backward pass those that it has not kept.
    """
    return [_stage_sent(plan, index) for index in range(plan.layout.pipeline)]


def _stage_sent(plan: Plan, index: int) -> Bytes:
    zero, size, count = plan.effective_zero, plan.size, plan.micro_batches
    trained = sum(plan.layers[at].trained.total for at in plan.own(index))
    sums, several = tensor_sums(plan), plan.layout.data_ranks > 1
    reduced = 0 if not several or zero == 3 else size * trained * (count if zero == 2 else 1)
    gathered = 0 if not several or zero == 0 else size * (trained if zero < 3 else count * _gathers(plan))
    return with_total(
        {
            "all_reduce": reduced + count * sum(sums[at] for at in plan.own(index)),
            "all_gather": gathered,
            "reduce_scatter": size * count * trained if several and zero == 3 else 0,
            "send": count * _sends(plan, index),
        }
    )


def _gathers(plan: Plan) -> int:
    """Parameters that ZeRO-3 gathers for a micro-batch."""
    run = [layer.held.total if layer.runs else 0 for layer in plan.layers]
    again = [count for count, backward in zip(run, crosses_back(plan), strict=True) if backward]
    return sum(run) + sum(again) - sum(_kept(plan))


def _sends(plan: Plan, index: int) -> int:
    """Bytes of a micro-batch to the next pipeline stage, and of the gradient to the one before."""
    forward = _wire(plan, plan.bounds[index + 1]) if index < plan.layout.pipeline - 1 else (0, 0)
    floats, _ = _wire(plan, plan.bounds[index]) if index else (0, 0)
    return sum(forward) + floats


def _wire(plan: Plan, bound: int) -> tuple[int, int]:
    """Bytes of the floats and of the integers that travel to the layer at `bound`; see engine/wire.py."""
    batch, modalities, rule = plan.stage.batch.micro_batch, plan.model.modalities, plan.stage.alignment
    counts = {name: token_count(modality.space) for name, modality in modalities.items()}
    numbers = sum((count + 1) * plan.model.width_of(name) for name, count in counts.items())
    if rule is not None and any(layer.name == "alignment" for layer in plan.layers[:bound]):
        numbers += counts[rule.modality] * rule.features
    return plan.size * batch * numbers, batch * sum(counts.values()) + 8 * (3 + 4 * len(counts))


def tensor_sums(plan: Plan) -> list[int]:
    """By layer, the bytes that tensor parallelism adds up for a micro-batch: behind maps split by inputs forward, before maps
    split by outputs backward, where a gradient is needed.
    """
    if plan.layout.tensor == 1:
        return [0] * len(plan.layers)
    needs = flows(plan.model, plan.layers)
    return [
        plan.stage.batch.micro_batch * plan.size * _layer_sums(plan, layer, needed) if layer.runs else 0
        for layer, needed in zip(plan.layers, needs, strict=True)
    ]


def _layer_sums(plan: Plan, layer: Layer, needs: Mapping[str, bool]) -> int:
    """Numbers of one sample. Args: needs: by modality, whether the tokens that the layer takes need a gradient."""
    model, stage, conditioning = plan.model, plan.stage, plan.layers[0].trained.total > 0
    counts = {name: token_count(modality.space) for name, modality in model.modalities.items()}
    if layer.name == "embed":
        lookups = [name for name, modality in model.modalities.items() if isinstance(modality.space, TokenSpace)]
        return sum(counts[name] * model.width_of(name) for name in lookups)
    if layer.name == "heads":
        read = [name for name, modality in stage.modalities.items() if modality.has_loss]
        return sum(_head_sums(plan, name, conditioning, needs[name] or is_trained(name, stage)) for name in read)
    if not layer.block:
        return 0
    total = 0
    for name in layer.modalities:
        width, tokens = model.width_of(name), counts[name] * model.width_of(name)
        leads = leads_on(layer, name, model, stage)
        forward = BLOCK_SLOTS * width + 2 * leads * tokens  # modulation; output and MLP
        flowing = needs[name] or layer.trained.total > 0
        backward = conditioning * width + (1 + leads) * tokens if flowing else 0  # modulation; projection and MLP
        total += forward * (2 if flowing and stage.activation_checkpointing else 1) + backward
    return total


def _head_sums(plan: Plan, name: str, conditioning: bool, flowing: bool) -> int:
    space, width = plan.model.modalities[name].space, plan.model.width_of(name)
    numbers = (HEAD_SLOTS + conditioning) * width
    if isinstance(space, TokenSpace):
        # The hidden tokens backward; of the loss, in float32, a maximum and two sums per token.
        numbers += token_count(space) * (flowing * width + 3 * WIDE // plan.size)
    return numbers


# --------------------------------------------------------------------------------------------------------------- waits


def bubble(stages: int, micro_batches: int) -> float:
    """The share of a step that a pipeline stage waits, if all cost the same: (P - 1) / (M + P - 1) for M micro-batches."""
    return (stages - 1) / (micro_batches + stages - 1)


def imbalance(plan: Plan) -> float:
    """The costliest pipeline stage's FLOPs over their mean, 1 or more."""
    flops = layer_flops(plan.model, plan.stage)
    costs = [sum(flops[at] for at in plan.own(index)) for index in range(plan.layout.pipeline)]
    return max(costs) * len(costs) / sum(costs)


def fullest(stages: Sequence[Bytes]) -> Bytes:
    """The pipeline stage's with the largest total."""
    return max(stages, key=lambda kinds: kinds["total"])


def with_total(kinds: Bytes) -> Bytes:
    return {**kinds, "total": sum(kinds.values())}


def _ceil(value: int, ranks: int) -> int:
    return -(-value // ranks)
