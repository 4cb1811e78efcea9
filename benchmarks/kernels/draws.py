"""Draws of masked tokens out of hidden states: the product with the head, and what comes after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels.measure import FORWARD, Absent, Case, Machine, Ready
from megadiff import rng
from megadiff.kernels.head_draw import reference
from megadiff.types import DrawRule, RowKeys, TokenDraws


class Shape(NamedTuple):
    """R rows of K branches of guidance."""

    rows: int
    branches: int
    width: int
    vocabulary: int
    rule: DrawRule = DrawRule()

    def __str__(self) -> str:
        rule = "".join(f" {name}={value}" for name, value in self.rule._asdict().items() if value != getattr(DrawRule(), name))
        return f"R={self.rows} K={self.branches} D={self.width} V={self.vocabulary}{rule}"


CUT = DrawRule(temperature=0.9, top_p=0.95)
SHAPES = [Shape(count, 1, 1024, 49_408) for count in (256, 7_680)]
SHAPES += [Shape(7_680, 2, 1024, 49_408), Shape(7_680, 1, 1024, 49_408, CUT)]
TOYS = [Shape(17, 1, 24, 300), Shape(17, 2, 24, 300, CUT)]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, RowKeys, DrawRule]


def numbers(shape: Shape, machine: Machine) -> Arguments:
    device, dtype = machine.device, machine.dtype
    hidden = torch.randn(shape.branches, shape.rows, shape.width, device=device, dtype=dtype)
    weight = torch.randn(shape.vocabulary, shape.width, device=device, dtype=dtype) / shape.width**0.5
    places = torch.arange(shape.rows, device=device)
    rows = places + shape.rows * torch.arange(shape.branches, device=device)[:, None]
    weights = torch.tensor([3.0, -2.0] if shape.branches == 2 else [1.0], device=device)[:, None].expand(-1, shape.rows)
    keys = RowKeys(rng.sample_keys(0, places // 120, device=device), "token", places % 120)
    return hidden, weight, torch.zeros(shape.vocabulary, device=device), rows, weights.contiguous(), keys, shape.rule


def cases(machine: Machine) -> Iterator[Case]:
    for shape in TOYS if machine.toy else SHAPES:
        flops = 2.0 * shape.rows * shape.width * shape.vocabulary
        moved = machine.dtype.itemsize * shape.width * (shape.vocabulary + shape.branches * shape.rows)
        yield Case("head_draw", str(shape), FORWARD, flops, moved, peers(shape, machine))


def peers(shape: Shape, machine: Machine) -> dict[str, Callable[[], Ready]]:
    return {
        "reference, float32": lambda: Ready(reference.head_draw, numbers(shape, machine)),
        **{f"megadiff: {form}": partial(_ours, shape, machine, form) for form in ("logits", "fused")},
        "the product alone": lambda: Ready(_product, numbers(shape, machine), comparable=False),
        "eager Gumbel": lambda: Ready(_gumbel, numbers(shape, machine), comparable=False),
        "compiled eager Gumbel": lambda: Ready(machine.compiled(_gumbel), numbers(shape, machine), comparable=False),
        "the paper's tau-leaping": lambda: Ready(_tau_leaping, numbers(shape, machine), comparable=False),
    }


def _ours(shape: Shape, machine: Machine, form: str) -> Ready:
    from megadiff.kernels.head_draw import op

    arguments = numbers(shape, machine)
    if (refusal := op.refusal("head_draw", *arguments)) is not None:
        raise Absent(refusal)
    if form == "fused" and shape.rule == CUT:
        raise Absent("the fused form takes no truncation")

    def run(*own: Any) -> TokenDraws:
        with mock.patch.dict(os.environ, {op.VARIABLE: form}):
            return op.head_draw(*own)

    return Ready(run, arguments)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, *_: object) -> Tensor:
    return hidden[0] @ weight.T


def _guided(hidden: Tensor, weight: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
    """float32 [R, V]: logits of every branch, then mixed."""
    return ((hidden @ weight.T).float() + bias).mul(weights[..., None]).sum(0)


def _gumbel(
    hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, weights: Tensor, keys: RowKeys, rule: DrawRule
) -> tuple[Tensor, ...]:
    """Logits of all rows, noise for every token: ids, log-probabilities, entropies, margins."""
    logits = _guided(hidden, weight, bias, weights)
    logs = logits.log_softmax(-1)
    shares = logs.exp()
    pointed = logits / rule.temperature
    if rule.top_p < 1:
        ordered, order = pointed.sort(-1, descending=True)
        mass = ordered.softmax(-1)
        beyond = mass.cumsum(-1) - mass >= rule.top_p
        pointed = pointed.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    uniform = torch.rand_like(logits)
    ids = (pointed - (-(uniform + 1e-10).log() + 1e-10).log()).argmax(-1)
    best = shares.topk(2).values
    return ids, logs.gather(-1, ids[:, None])[:, 0], -(shares * logs).sum(-1), best[:, 0] - best[:, 1]


def _tau_leaping(
    hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, weights: Tensor, keys: RowKeys, rule: DrawRule
) -> Tensor:
    """A step of the released sampler (arXiv 2506.07903, utils/graph_lib.py): scores in float32, a Poisson number of jumps to
    every token, and no move where there is more than one. It knows neither temperature nor truncation."""
    logits = torch.einsum("krd,vd->krv", hidden.float(), weight.float()) + bias
    scores = (logits.log_softmax(-1) * weights[..., None]).sum(0).exp()
    jumps = torch.poisson(scores * 0.02)
    states = torch.full(jumps.shape[:1], jumps.shape[1], device=jumps.device)
    leaps = torch.arange(jumps.shape[1], device=jumps.device) - states[:, None]
    moved = (jumps * (jumps.sum(-1, keepdim=True) <= 1) * leaps).sum(-1)
    return states + moved.long()
