"""How long a step takes at least, by a GPU's data sheet: pure arithmetic, without torch (docs/planning.md has the formulas)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megadiff.config.activations import activations
from megadiff.config.derived import flops_per_sample, layer_flops
from megadiff.config.footprint import WIDE, Plan, bytes_sent_per_step, crosses_back, tensor_sums
from megadiff.config.gpus import Gpu


@dataclass(frozen=True)
class Hardware:
    """GPUs on nodes, rank 0's node first.

    Attributes:
        network_bandwidth: bytes per second and direction between nodes, of each GPU.
    """

    gpu: Gpu
    gpus_per_node: int
    network_bandwidth: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step at the data sheet's rates, by what takes them; a real step takes longer.

    Attributes:
        compute_s: products on the tensor cores, what pipeline stages wait for each other included.
        memory_s: numbers through the GPU's memory.
        network_s: collectives.
        perfect_s: model FLOPs of a rank at its GPU's peak rate, and nothing else.
    """

    compute_s: float
    memory_s: float
    network_s: float
    perfect_s: float

    @property
    def least_s(self) -> float:
        """All three overlap: a lower bound."""
        return max(self.compute_s, self.memory_s, self.network_s)

    @property
    def apart_s(self) -> float:
        """Nothing overlaps."""
        return self.compute_s + self.memory_s + self.network_s

    @property
    def limit(self) -> str:
        """What takes the most: compute, memory or network."""
        return max(("compute", "memory", "network"), key=lambda name: float(getattr(self, f"{name}_s")))

    def utilisation(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes so long."""
        return self.perfect_s / seconds


def step_time(plan: Plan, hardware: Hardware) -> StepTime:
    """A lower bound of a step's seconds on this hardware, by kind."""
    stages, peak = range(plan.layout.pipeline), _peak(plan, hardware.gpu)
    # The slowest pipeline stage works through all micro-batches, and at both ends waits for one on each of the others.
    flops = [_stage_flops(plan, index) for index in stages]
    compute = ((plan.micro_batches - 1) * max(flops) + sum(flops)) / peak
    moved = max(_bytes_moved(plan, index) for index in stages)
    network = max(_network_s(plan, index, hardware) for index in stages)
    perfect = flops_per_sample(plan.model, plan.stage) * plan.stage.batch.global_samples / (plan.layout.world * peak)
    return StepTime(compute, moved / hardware.gpu.memory_bandwidth, network, perfect)


def _peak(plan: Plan, gpu: Gpu) -> float:
    return gpu.bf16_flops if plan.precision == "bf16" else gpu.fp32_flops


def _stage_flops(plan: Plan, index: int) -> float:
    """FLOPs of a rank of a pipeline stage for a micro-batch, with what activation checkpointing computes again."""
    whole = layer_flops(plan.model, plan.stage)
    total = sum(whole[at] for at in plan.own(index))
    if plan.stage.activation_checkpointing:
        everything = (*plan.model.modalities, "joint", "alignment")
        # Where nothing is trained, only the forward pass is left.
        forward = layer_flops(plan.model, plan.stage.model_copy(update={"freeze": everything}))
        back = crosses_back(plan)
        total += sum(forward[at] for at in plan.own(index) if plan.layers[at].block and back[at])
    return total * plan.stage.batch.micro_batch / plan.layout.tensor


def _bytes_moved(plan: Plan, index: int) -> float:
    """Bytes that a rank's step takes through the GPU's memory at least: weights forward and backward and gradients of every
    micro-batch, activations in and out, and in and out the optimizer's float32 numbers.
    """
    kept, back = activations(plan.model, plan.stage, plan.layers, plan.layout.tensor, plan.precision), crosses_back(plan)
    own = [(plan.layers[at], kept[at], back[at]) for at in plan.own(index)]
    weights = sum(layer.held.total * (1 + backward) for layer, _, backward in own if layer.runs)
    trained = sum(layer.trained.total for layer, _, _ in own)
    a_micro_batch = plan.size * (weights + trained) + 2 * sum(stored for _, stored, _ in own)
    share = 1 if plan.effective_zero == 0 else plan.layout.data_ranks
    optimizer = 0 if "master" in plan.offloaded else 2 * WIDE * (3 + len(plan.stage.ema)) * trained / share
    return plan.micro_batches * a_micro_batch + optimizer


def _network_s(plan: Plan, index: int, hardware: Hardware) -> float:
    """Seconds of a rank's collectives, as rings: an all_reduce sends its tensor twice, the others once, but for own parts."""
    layout, sent = plan.layout, bytes_sent_per_step(plan)[index]
    sums = tensor_sums(plan)
    in_tensor = plan.micro_batches * sum(sums[at] for at in plan.own(index))
    replicas = [layout.ranks_of(index, replica)[0] for replica in range(layout.data_ranks)]
    over_data = 2 * (sent["all_reduce"] - in_tensor) + sent["all_gather"] + sent["reduce_scatter"]
    seconds = _ring_s(over_data, replicas, hardware) + _ring_s(2 * in_tensor, layout.ranks_of(index, 0), hardware)
    if sent["send"]:
        neighbour = index + 1 if index + 1 < layout.pipeline else index - 1
        ends = [layout.ranks_of(at, 0)[0] for at in (index, neighbour)]
        seconds += sent["send"] / _bandwidth(ends, hardware)
    return seconds


def _ring_s(count: float, ranks: Sequence[int], hardware: Hardware) -> float:
    return count * (len(ranks) - 1) / len(ranks) / _bandwidth(ranks, hardware)


def _bandwidth(ranks: Sequence[int], hardware: Hardware) -> float:
    """Bytes per second of each rank in a ring; between nodes all ports of a group's ranks on a node work side by side."""
    on_node = Counter(rank // hardware.gpus_per_node for rank in ranks)
    if len(on_node) == 1:
        return hardware.gpu.link_bandwidth
    return min(hardware.gpu.link_bandwidth, hardware.network_bandwidth * min(on_node.values()))
