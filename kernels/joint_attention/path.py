"""Up to how many tokens of a sample attention's own kernels run; beyond, operands are packed for SDPA.

It is an entry of a tuning table (kernel `QUESTION`), and an estimate (README.md of qk_norm_pack) where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megadiff.kernels import tuning
from megadiff.kernels.joint_attention import reference
from megadiff.kernels.qk_norm_pack.op import qk_norm_pack
from megadiff.kernels.streams import Projected, Span
from megadiff.kernels.tuning import Config, Defaults, Question

QUESTION = "joint_attention.path"
DEFAULTS: Defaults = {0: {"most_places": 1100}, 80: {"most_places": 1100}}
TRIED, TEXT, SAMPLES, WIDTH = (256, 512, 1024, 1536, 2048, 4096), 120, 16, 1024
"""Of pictures with a text, when it is measured."""
Attention = Callable[[list[Projected]], list[Tensor]]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def most_places(channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """The number of tokens, of heads with so many channels."""
    return tuning.configuration(QUESTION, _bucket(channels), dtype, device, DEFAULTS)["most_places"]


def measured(
    own: Attention, device: torch.device, seconds: Callable[[Callable[[], object]], float]
) -> Iterator[tuple[Question, Config]]:
    """By heads' channels up to how many tokens `own` takes no more time, forward and backward; 0 for none."""
    for channels in (64, 128):
        most = 0
        for length in TRIED:
            streams = _streams(length, channels, device)
            times = [seconds(_step(attention, streams)) for attention in (own, _packed)]
            print(f"{QUESTION} d{channels}, {length + TEXT} tokens: own {times[0]:.4f}, packed {times[1]:.4f}", flush=True)
            if times[0] > times[1]:
                break
            most = length + TEXT
        yield Question(QUESTION, _bucket(channels), "bfloat16"), {"most_places": most}


def _bucket(channels: int) -> str:
    return "d64" if channels <= 64 else "d128"


def _packed(streams: list[Projected]) -> list[Tensor]:
    return reference.attend(qk_norm_pack(streams), streams)


def _step(attention: Attention, streams: list[Projected]) -> Callable[[], object]:
    leaves = [stream.qkv for stream in streams]
    return lambda: torch.autograd.grad([out.sum() for out in attention(streams)], leaves)


def _streams(length: int, channels: int, device: torch.device) -> list[Projected]:
    def stream(places: int) -> Projected:
        qkv = torch.randn(SAMPLES, places, 3, WIDTH // channels, channels, dtype=torch.bfloat16, device=device).requires_grad_()
        return Projected(qkv, torch.ones(2, *qkv.shape[3:], device=device), None, Span(SAMPLES, places))

    return [stream(length), stream(TEXT)]
