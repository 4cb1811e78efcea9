"""Tensor parallelism from outside: megatron-core's layers in the places of a built model's, and its groups for DeepSpeed.

The layers are both the model's classes and megatron-core 0.16.1's, with the same parameter names. On a CPU megatron's gathering
and scattering functions fail (they ask CUDA for the device); copying, whose backward adds up, and adding up are all it takes.

Legend: T tensor ranks, R rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.engine.optimizer import SPLIT
from megadiff.kernels.head_draw import head_draw_sharded
from megadiff.kernels.head_logits import head_logits
from megadiff.kernels.head_loss import Shard, head_loss
from megadiff.models.attention import Projection
from megadiff.models.embeddings import TokenEmbedding
from megadiff.models.heads import TokenHead
from megadiff.models.layers import Linear, Modulation
from megadiff.models.names import named_parameters
from megadiff.models.tensor_plan import DIMENSIONS, Kind, Split, splits, tensor_plan
from megadiff.types import CrossEntropy, DrawRule, RowKeys, TokenDraws

# --------------------------------------------------------------------------------------------------------------- groups


class ModelParallelUnit:
    """Megatron's groups by the names that DeepSpeed calls them by; its argument `mpu`.

    It must have no `initialize_sequence_parallel`: DeepSpeed would take it for Ulysses.
    """

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())


def start_tensor_parallel(layout: Layout) -> ModelParallelUnit:
    """Make megatron's groups, if a stage before has not. Collective, after the process group has started."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            use_sharp=False,
            create_gloo_process_groups=False,
        )
    return ModelParallelUnit()


# --------------------------------------------------------------------------------------------------------------- layers


def split_model(module: nn.Module, tensor: int, rank: int) -> dict[str, Split]:
    """Replace modules of a model on the meta device (or of a list of its layers) in place by this rank's parts.

    Returns:
        By the model's names, the parameters that are split now, and this rank's part of each.
    """
    parts = splits(module, tensor, rank)
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    with torch.device("meta"):
        for path, planned in tensor_plan(module).items():
            whole = module.get_submodule(path)
            parameters = {own: getattr(whole, own) for own in DIMENSIONS[planned.kind]}
            part = _REPLACEMENTS[planned.kind](whole)
            for own, parameter in parameters.items():
                if parameter is not None:
                    setattr(part, own, _local(parameter, parts[names[id(parameter)]]))
            module.set_submodule(path, part)
    return parts


def _local(parameter: nn.Parameter, part: Split) -> nn.Parameter:
    """A rank's part of a whole parameter; DeepSpeed and megatron know it by its mark."""
    local = nn.Parameter(torch.empty(part.local, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
    setattr(local, SPLIT, True)
    return local


def _config(parameter: Tensor) -> ModelParallelConfig:
    """Layers on torch's default device, with open values: `split_model` sets their parameters."""
    return ModelParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        params_dtype=parameter.dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def _arguments(whole: Linear) -> dict[str, Any]:
    """What megatron's linear maps are built from, of a whole map."""
    return {
        "input_size": whole.in_features,
        "output_size": whole.out_features,
        "config": _config(whole.weight),
        "init_method": None,
        "bias": whole.bias is not None,
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
    }


class ColumnLinear(Linear, ColumnParallelLinear):  # type: ignore[misc]
    """Replicated input, this rank's outputs."""

    def __init__(self, whole: Linear) -> None:
        ColumnParallelLinear.__init__(self, **_arguments(whole), gather_output=False)

    def forward(self, input: Tensor) -> Tensor:
        output, _ = ColumnParallelLinear.forward(self, input.to(self.weight.dtype))
        return output  # type: ignore[no-any-return]


class RowLinear(Linear, RowParallelLinear):  # type: ignore[misc]
    """This rank's inputs, replicated output; the bias is added once, after the ranks' sum."""

    def __init__(self, whole: Linear) -> None:
        RowParallelLinear.__init__(self, **_arguments(whole), input_is_parallel=True, skip_bias_add=False)
        self.bias = whole.bias

    def forward(self, input: Tensor) -> Tensor:
        output, _ = RowParallelLinear.forward(self, input.to(self.weight.dtype))
        return output  # type: ignore[no-any-return]


class RowModulation(Modulation, RowLinear):
    """Replicated input and output; each rank multiplies its slice of the input."""

    def __init__(self, whole: Modulation) -> None:
        RowLinear.__init__(self, whole)
        self.slots = whole.slots

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        own = self.input_size_per_partition
        start = own * parallel_state.get_tensor_model_parallel_rank()
        copied = copy_to_tensor_model_parallel_region(F.silu(input))
        return RowLinear.forward(self, copied[..., start : start + own]).chunk(self.slots, dim=-1)


class VocabParallelTokenEmbedding(TokenEmbedding, VocabParallelEmbedding):  # type: ignore[misc]
    """This rank's rows; the others add zeros. Positions are replicated."""

    def __init__(self, whole: TokenEmbedding) -> None:
        rows, width = whole.weight.shape
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        VocabParallelEmbedding.__init__(
            self,
            -(-rows // ranks) * ranks,
            width,
            config=_config(whole.weight),
            init_method=None,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.positions = whole.positions

    def look_up(self, ids: Tensor) -> Tensor:
        return VocabParallelEmbedding.forward(self, ids)  # type: ignore[no-any-return]


class VocabParallelTokenHead(TokenHead):
    """This rank's rows of the vocabulary; the mask state's row is replicated. Results are equal on all ranks."""

    def __init__(self, whole: TokenHead) -> None:
        nn.Module.__init__(self)
        self.name, self.rule, self.one_plus_scale = whole.name, whole.rule, whole.one_plus_scale
        self.has_mask_class, self.mask_weight, self.mask_bias = whole.has_mask_class, whole.mask_weight, whole.mask_bias
        self.modulation = whole.modulation

    def losses(
        self, hidden: Tensor, targets: Tensor, scored: Tensor, weights: Tensor, number: int | None = None
    ) -> CrossEntropy:
        copied = copy_to_tensor_model_parallel_region(hidden)
        return head_loss(copied, self.weight, self.bias, targets, scored, weights, number, self._shard())

    def draws(self, hidden: Tensor, rows: Tensor, weights: Tensor, keys: RowKeys, rule: DrawRule) -> TokenDraws:
        return head_draw_sharded(hidden, self.weight, self.bias, rows, weights, keys, rule, self._shard())

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return _all_columns(head_logits(copy_to_tensor_model_parallel_region(hidden), self.weight, self.bias, rows))

    def _shard(self) -> Shard:
        first = len(self.weight) * parallel_state.get_tensor_model_parallel_rank()
        return Shard(first, parallel_state.get_tensor_model_parallel_group())


def _all_columns(own: Tensor) -> Tensor:
    """[R, V/T] of each rank to [R, V] on all: as a sum, since that has a backward on every device."""
    before = own.shape[1] * parallel_state.get_tensor_model_parallel_rank()
    after = own.shape[1] * parallel_state.get_tensor_model_parallel_world_size() - before - own.shape[1]
    whole: Tensor = reduce_from_tensor_model_parallel_region(F.pad(own, (before, after)))
    return whole


def _with_own_heads(projection: Projection) -> Projection:
    projection.heads //= parallel_state.get_tensor_model_parallel_world_size()
    return projection


_REPLACEMENTS: dict[Kind, Callable[..., nn.Module]] = {
    Kind.COLUMN: ColumnLinear,
    Kind.ROW: RowLinear,
    Kind.SCATTERED_ROW: RowModulation,
    Kind.HEADS: _with_own_heads,
    Kind.VOCABULARY: VocabParallelTokenEmbedding,
    Kind.VOCABULARY_HEAD: VocabParallelTokenHead,
}
