"""AdamW over two parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.config.schema import Optimizer
from megadiff.engine.pieces import Piece
from megadiff.models.idle import Region
from megadiff.models.names import named_parameters

SPLIT = "tensor_model_parallel"
"""The mark of parameters that tensor ranks have parts of, as DeepSpeed and megatron know it."""


def build_optimizer(module: nn.Module, config: Optimizer, decayed: Iterable[str]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    Args:
        decayed: names of the weight-decayed parameters (linear weights); `config.decay_all` decays all.
    """
    names = set(decayed)
    trainable = [(name, parameter) for name, parameter in named_parameters(module) if parameter.requires_grad]
    decay = [parameter for name, parameter in trainable if config.decay_all or name in names]
    rest = [parameter for name, parameter in trainable if not (config.decay_all or name in names)]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )


def gradient_norm(parameters: Iterable[nn.Parameter], layout: Layout, group: dist.ProcessGroup | None) -> Tensor:
    """The norm of all gradients on the ranks of a replica. Collective in their group, if there are several.

    A parameter that its tensor ranks have alike counts once.
    """
    own = [each for each in parameters if layout.tensor_rank == 0 or getattr(each, SPLIT, False)]
    norm = torch.nn.utils.get_total_norm([each.grad for each in own if each.grad is not None])
    if group is None:
        return norm
    square = norm.square()
    dist.all_reduce(square, group=group)
    return square.sqrt()


def clip_and_skip(optimizer: torch.optim.Optimizer, norm: Tensor, largest: float) -> None:
    """Let the next step scale gradients of this norm down to `largest` (0: as they are), and change nothing, its own counters
    included, if the norm is not finite.

    AdamW's fused kernels look at these two attributes, which exist for AMP: nothing waits for the device, and clipping is no
    pass over the gradients of its own. DeepSpeed skips by itself wherever it wraps the optimizer: in ZeRO-1 to 3, and in bf16.
    """
    optimizer.found_inf = (~norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
    clip(optimizer, norm, largest)


def clip(optimizer: torch.optim.Optimizer, norm: Tensor, largest: float) -> None:
    """The part of `clip_and_skip` that scales gradients down."""
    if largest:
        optimizer.grad_scale = ((norm + 1e-6) / largest).clamp_min(1).to(torch.float32)  # type: ignore[attr-defined]


def hold_still(optimizer: torch.optim.Optimizer, pieces: Sequence[Piece], regions: Mapping[str, Region]) -> None:
    """Keep the optimizer's steps from changing parts of its tensors: AdamW decays parts without a gradient as well.

    Args:
        regions: by parameter name, the part that stays unchanged.
    """
    masks = [(piece.master, _within(piece, regions[piece.name])) for piece in pieces if piece.name in regions]
    originals: list[Tensor] = []

    def remember(*_: object) -> None:
        originals[:] = [master.clone() for master, _ in masks]

    def put_back(*_: object) -> None:
        for (master, mask), value in zip(masks, originals, strict=True):
            master.copy_(torch.where(mask, value, master))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(put_back)


def _within(piece: Piece, region: Region) -> Tensor:
    """bool [extent.size]: the numbers of a piece that lie in a region of its parameter."""
    mask = torch.zeros(piece.shape, dtype=torch.bool)
    mask[region] = True
    parts = [mask.flatten()[start : start + length] for start, _, length in piece.extent.runs(piece.shape).tolist()]
    return torch.cat(parts).to(piece.flat.device)
