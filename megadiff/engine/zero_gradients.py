"""DeepSpeed 0.19.8's way of a gradient in ZeRO-1 and 2, with fewer passes over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.engine.optimizer import SPLIT


def pass_less_often(wrapper: Any, layout: Layout) -> None:
    """Let DeepSpeed's optimizer of ZeRO-1 and 2 reach the same step with fewer passes over the gradients.

    Args:
        wrapper: DeepSpeed's optimizer; one of another stage stays as it is.
    """
    if not isinstance(wrapper, DeepSpeedZeroOptimizer):
        return
    clip_on_the_way(wrapper)
    if wrapper.cpu_offload:
        return
    norm_at_once(wrapper, layout)
    # The norm, which is taken anyway, is not finite either if a gradient is not, and then the step is left out.
    wrapper.check_overflow = lambda *_, **__: None
    if wrapper.gradient_accumulation_dtype != wrapper.dtype:
        return  # gradients are added up in the one tensor from the first on
    flatten_once(wrapper)
    if layout.data_ranks == 1:
        # They would be copied into a bucket and back, to add up those of one rank.
        wrapper.reduce_independent_p_g_buckets_and_remove_grads = lambda *_: None
        wrapper.reduce_bucket_size = 1


def flatten_once(wrapper: Any) -> None:
    """Make a rank's part of the gradients one float32 tensor at the end of the backward pass.

    DeepSpeed's own converts each gradient for the norm, and flattens and converts them for the optimizer after it.
    """
    parts_of: Callable[..., list[Tensor]] = wrapper.get_flat_partition

    def flat(*arguments: Any, **options: Any) -> Any:
        parts = parts_of(*arguments, **options)
        whole = wrapper.flatten(parts).float()
        views = list(whole.split([part.numel() for part in parts]))
        for view, part in zip(views, parts, strict=True):
            view._zero_padding = getattr(part, "_zero_padding", False)
        return GradPartitionBufferGroup(views, whole)

    wrapper.get_flat_partition = flat


def clip_on_the_way(wrapper: Any) -> None:
    """Scale gradients down to the clipping norm in AdamW's fused kernel."""

    def clip(_: object, norm: Tensor) -> None:
        if wrapper.clip_grad:
            wrapper.optimizer.grad_scale = ((norm + 1e-6) / wrapper.clip_grad).clamp_min(1).to(torch.float32)

    wrapper.unscale_and_clip_grads = clip


def norm_at_once(wrapper: Any, layout: Layout) -> None:
    """Take the norm of the gradients' norms: DeepSpeed's own takes some operations for each."""
    norm_of: Callable[..., Tensor] = wrapper.get_grad_norm_direct

    def norm(gradients: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> Tensor:
        whole = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        pairs = zip(whole, parameters, strict=False)
        own = [pair for pair in pairs if layout.tensor_rank == 0 or getattr(pair[1], SPLIT, False)]
        if not own:
            return norm_of([], [])
        norms = torch._foreach_norm([gradient for gradient, _ in own], dtype=torch.float32)
        return norm_of([torch.stack(list(norms))], [own[0][1]])

    wrapper.get_grad_norm_direct = norm
