"""This rank's part of every parameter, whatever ZeRO stage holds it.

DeepSpeed keeps the fp32 master weights in three different ways (a flat partition per sub-group in ZeRO-3, a flat partition
per parameter group in ZeRO-1/2 and its bf16 optimizer, the parameters themselves in ZeRO-0). Checkpoints and EMA want one:
a list of flat ranges by parameter name. This is the only file that knows where DeepSpeed keeps what (0.19.8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadiff.engine.checkpoint import MOMENTS


@dataclass(frozen=True)
class Shard:
    """A flat range [start, stop) of a trainable parameter, of which this rank holds the fp32 master and Adam's moments.

    Attributes:
        shape: of the whole parameter.
        flat: the tensor that the optimizer steps.
        offset: where the range begins within it.
        owned: False on ranks whose copy repeats another rank's (ZeRO-0): they hold it but do not save it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: Tensor
    offset: int
    owned: bool

    @property
    def master(self) -> Tensor:
        """Float32 view [stop - start]."""
        return self._view(self.flat.detach())

    def moment(self, optimizer: torch.optim.Optimizer, kind: str) -> Tensor:
        """Float32 view [stop - start] of one of MOMENTS; created as zeros if the optimizer has not stepped yet."""
        return self._view(optimizer_state(optimizer, self.flat)[kind])

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[self.offset : self.offset + self.stop - self.start]


@dataclass
class FrozenShard:
    """A frozen parameter: what this rank's forward reads, and the fp32 range that it saves.

    Attributes:
        local: flat view of this rank's copy (the whole parameter, or its ZeRO-3 partition), in the model's dtype.
        local_start: where `local` begins within the whole parameter.
        start, stop: the range that this rank saves, within `local`'s.
        master: float32 [stop - start]; kept because the model's copy may have been rounded to bf16.
    """

    name: str
    shape: tuple[int, ...]
    local: Tensor
    local_start: int
    start: int
    stop: int
    master: Tensor

    @property
    def local_stop(self) -> int:
        return self.local_start + self.local.numel()

    def write(self, values: Tensor) -> None:
        """Take new float32 values for the whole of `local`."""
        self.local.copy_(values.to(self.local.device))
        begin = self.start - self.local_start
        self.master = values[begin : begin + self.stop - self.start].to(self.master.device, torch.float32).clone()


def optimizer_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one tensor, created as it would be before the first step."""
    state: dict[str, Tensor] = optimizer.state[flat]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(flat.detach())
    return state


class ShardedWeights:
    """All shards of this rank, and the way from changed masters to the weights that forward reads."""

    def __init__(self, engine: Any, world: int, rank: int) -> None:
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer
        wrapper = engine.optimizer
        named = list(engine.module.named_parameters())
        trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        self._publish: Callable[[], None]
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            self.trained = [shard for item in trainable for shard in _zero3_shard(*item, wrapper, rank)]
            self.frozen = [_zero3_frozen(*item, rank) for item in frozen]
            parameters = dict(trainable)
            self._publish = lambda: _publish_zero3(wrapper, self.trained, parameters)
        else:
            self.frozen = [_whole_frozen(*item, world, rank) for item in frozen]
            if wrapper is self.optimizer:
                self.trained = [_whole_shard(*item, owned=rank == 0) for item in trainable]
                self._publish = _nothing_to_publish
            else:
                flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
                self.trained = [shard for item in trainable for shard in _linked_shard(*item, flats)]
                self._publish = wrapper.update_lp_params

    def publish(self) -> None:
        """Make the weights that forward reads equal to the masters. Collective."""
        with torch.no_grad():
            self._publish()

    @property
    def adam_steps(self) -> int:
        """How many steps the moments have seen."""
        counts = [
            int(self.optimizer.state[shard.flat]["step"]) for shard in self.trained if self.optimizer.state.get(shard.flat)
        ]
        return max(counts, default=0)

    def set_adam_steps(self, count: int) -> None:
        for flat in {id(shard.flat): shard.flat for shard in self.trained}.values():
            optimizer_state(self.optimizer, flat)["step"].fill_(float(count))


def _nothing_to_publish() -> None:
    """In ZeRO-0 the masters are the weights."""


def _partition_range(parameter: Any, rank: int) -> tuple[int, int]:
    """The range of the whole parameter in this rank's ZeRO-3 partition, without the padding at the end."""
    size = parameter.ds_tensor.numel()
    return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)


def _zero3_shard(name: str, parameter: Any, wrapper: Any, rank: int) -> Iterable[Shard]:
    start, stop = _partition_range(parameter, rank)
    group, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
    flat = wrapper.fp32_partitioned_groups_flat[group]
    if stop > start:
        yield Shard(name, tuple(parameter.ds_shape), start, stop, flat, offset, owned=True)


def _zero3_frozen(name: str, parameter: Any, rank: int) -> FrozenShard:
    start, stop = _partition_range(parameter, rank)
    local = parameter.ds_tensor.detach()[: stop - start]
    return FrozenShard(name, tuple(parameter.ds_shape), local, start, start, stop, local.float().cpu().clone())


def _publish_zero3(wrapper: Any, shards: Sequence[Shard], parameters: dict[str, nn.Parameter]) -> None:
    # Small parameters stay gathered between steps and would hide a changed partition: partition all, write, gather again.
    wrapper.checkpoint_event_prologue()
    for shard in shards:
        parameters[shard.name].ds_tensor[: shard.stop - shard.start].copy_(shard.master)  # type: ignore[attr-defined]
    wrapper.checkpoint_event_epilogue()


def _linked_shard(name: str, parameter: Any, flats: Sequence[Tensor]) -> Iterable[Shard]:
    link = parameter._hp_mapping
    if link is not None:
        low, high = link.lp_fragment_address, link.hp_fragment_address
        flat = flats[link.param_group_index]
        yield Shard(name, tuple(parameter.shape), low.start, low.start + low.numel, flat, high.start, owned=True)


def _whole_shard(name: str, parameter: nn.Parameter, *, owned: bool) -> Shard:
    return Shard(name, tuple(parameter.shape), 0, parameter.numel(), parameter, 0, owned)


def _whole_frozen(name: str, parameter: nn.Parameter, world: int, rank: int) -> FrozenShard:
    size = parameter.numel()
    start, stop = size * rank // world, size * (rank + 1) // world
    local = parameter.detach().view(-1)
    return FrozenShard(name, tuple(parameter.shape), local, 0, start, stop, local[start:stop].float().cpu().clone())
