"""DeepSpeed 0.19.8's way of a gradient in ZeRO-1 and 2, with fewer passes over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.engine.optimizer import SPLIT, clip


def pass_less_often(wrapper: Any, layout: Layout) -> None:
    """Let DeepSpeed's optimizer of ZeRO-1 and 2 reach the same step with fewer passes over the gradients.

    Args:
        wrapper: DeepSpeed's optimizer; one of another stage stays as it is.
    """
    if not isinstance(wrapper, DeepSpeedZeroOptimizer):
        return
    wrapper.report_ipg_memory_usage = lambda *_, **__: None  # to a log that nobody reads, for each gradient
    if wrapper.cpu_offload:
        return
    wrapper.unscale_and_clip_grads = lambda _, norm: clip(wrapper.optimizer, norm, wrapper.clip_grad)
    norm_at_once(wrapper, layout)
    # The norm, which is taken anyway, is not finite either if a gradient is not, and then the step is left out.
    wrapper.check_overflow = lambda *_, **__: None
    if layout.data_ranks == 1 and wrapper.gradient_accumulation_dtype == wrapper.dtype:
        # They would be copied into a bucket and back, to add up those of one rank.
        wrapper.reduce_independent_p_g_buckets_and_remove_grads = lambda *_: None
        wrapper.reduce_bucket_size = 0
        flatten_once(wrapper)
    elif not wrapper.use_grad_accum_attribute:
        # From the bucket each gradient is added to the one tensor that the optimizer steps with. DeepSpeed's default is another
        # copy in the dtype of the weights, in which micro-batches are added up, to be flattened and converted at the end.
        wrapper.gradient_accumulation_dtype = torch.float32
        wrapper._use_compact_grad_partition_buffer = lambda _: True


def flatten_once(wrapper: Any) -> None:
    """Make a rank's part of the gradients one float32 tensor at the end of the backward pass.

    DeepSpeed's own converts each gradient for the norm, and flattens and converts them for the optimizer after it.
    """
    parts_of: Callable[..., list[Tensor]] = wrapper.get_flat_partition

    def flat(*arguments: Any, **options: Any) -> Any:
        parts = parts_of(*arguments, **options)
        sizes = [part.numel() for part in parts]
        whole = torch.empty(sum(sizes), dtype=torch.float32, device=parts[0].device)
        views = [view.view_as(part) for view, part in zip(torch.split(whole, sizes), parts, strict=True)]
        torch._foreach_copy_(views, parts)
        for view, part in zip(views, parts, strict=True):
            view._zero_padding = getattr(part, "_zero_padding", False)  # type: ignore[attr-defined]
        return GradPartitionBufferGroup(views, whole)

    wrapper.get_flat_partition = flat


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
