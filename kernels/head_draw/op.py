"""`head_draw` by Triton's kernels, as an operator of torch. Forward only."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megadiff import rng
from megadiff.kernels import dispatch, toolchain
from megadiff.kernels.fused_head_draw.triton import draw as fused_draw
from megadiff.kernels.head_draw.reference import mixed_rows
from megadiff.kernels.head_draw.triton import draw
from megadiff.kernels.products import multiply
from megadiff.types import DrawRule, RowKeys, TokenDraws

VARIABLE, FORMS = "MEGADIFF_HEAD_DRAW", ("logits", "fused")
"""Fused: by one kernel with the product, with no logits in memory; see kernels/fused_head_draw. Default: logits."""
PRODUCT_ROWS = 256
"""Rows of one product, padded with zeros: about where reading the head's weight takes as long as multiplying by it."""


def head_draw(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, weights: Tensor, keys: RowKeys, rule: DrawRule
) -> TokenDraws:
    """See the reference. Hidden states that were mixed are rounded to the weight's dtype; logits are float32.

    Raises:
        ValueError: the environment variable is neither of its two values.
    """
    form = os.environ.get(VARIABLE) or FORMS[0]
    if form not in FORMS:
        raise ValueError(f"{VARIABLE} ({form}) must be {' or '.join(FORMS)}, or unset")
    fused = form == "fused" and _says_fused(hidden, rule)
    return TokenDraws(*_head_draw(hidden, weight, bias, rows, weights, keys.keys, keys.purpose, keys.places, *rule, fused))


def _says_fused(hidden: Tensor, rule: DrawRule) -> bool:
    """Whether the fused form takes these arguments; the log says why it does not."""
    why = None
    if rule.temperature and (rule.top_k or rule.top_p < 1 or rule.min_p):
        why = "top_k, top_p and min_p need all logits before the draw"
    elif hidden.dtype == torch.float32 and not toolchain.interpreted():
        why = "float32 has no tensor cores"
    dispatch.say("head_draw", "product, then draw" if why else "one kernel with the product", why or f"{VARIABLE} says so")
    return why is None


def refusal(op: str, hidden: Tensor, weight: Tensor, *_: object) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if hidden.dtype != weight.dtype:
        return f"the hidden states are {hidden.dtype}, the head is {weight.dtype}"
    return toolchain.unfit(hidden)


def example(op: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, RowKeys, DrawRule]:
    """Small arguments, which the form that was chosen takes."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 8, 64, generator=generator), torch.randn(300, 64, generator=generator) / 8
    rows = torch.arange(8, device=device)
    keys = RowKeys(rng.sample_keys(0, torch.zeros_like(rows), device=device), "example", rows)
    rule = DrawRule(temperature=0.8)
    if os.environ.get(VARIABLE) != "fused":
        rule = rule._replace(top_k=200, top_p=0.95, min_p=0.001)
    half = hidden.to(device, torch.bfloat16), weight.to(device, torch.bfloat16)
    return *half, torch.zeros(300, device=device), rows[None], torch.ones(1, 8, device=device), keys, rule


@torch.library.custom_op("megadiff::head_draw", mutates_args=())
def _head_draw(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    weights: Tensor,
    keys: Tensor,
    purpose: str,
    places: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat, rule = hidden.flatten(0, 1), DrawRule(temperature, top_k, top_p, min_p)
    outputs = _empty(rows)
    logits = torch.empty(0 if fused else PRODUCT_ROWS, len(weight), dtype=torch.float32, device=hidden.device)
    offset = None if bias is None else bias.float()
    for start in range(0, rows.shape[1], PRODUCT_ROWS):
        part = slice(start, start + PRODUCT_ROWS)
        padded = flat.new_zeros(PRODUCT_ROWS, flat.shape[1])
        padded[: rows[0, part].numel()] = mixed_rows(flat, rows[:, part], weights[:, part])
        own = RowKeys(keys[part], purpose, places[part])
        filled = [output[part] for output in outputs]
        if not fused:
            multiply(padded, weight.T, logits)
        with toolchain.device_of(hidden):
            if fused:
                fused_draw(padded[: len(own.keys)], weight.contiguous(), offset, own, rule, filled)
            else:
                draw(logits, offset, own, rule, filled)
    return outputs


@_head_draw.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(rows)


def _empty(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = rows.shape[1]
    first, second, third = (torch.empty(count, dtype=torch.float32, device=rows.device) for _ in range(3))
    return torch.empty(count, dtype=torch.int64, device=rows.device), first, second, third
