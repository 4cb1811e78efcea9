"""Draws at real sizes on a GPU: ids and figures beside those of float64 logits, in both forms, over poisoned memory."""

from __future__ import annotations

import pytest
import torch

from megadiff import rng
from megadiff.kernels.head_draw import op
from megadiff.kernels.head_draw.reference import draw_with, head_draw, row_uniforms
from megadiff.types import DrawRule, RowKeys, TokenDraws
from tests.kernels.harness import poisoned_memory

pytestmark = pytest.mark.gpu
ROWS, WIDTH, VOCABULARY = 1_000, 1_024, 49_408
RULES = [DrawRule(), DrawRule(temperature=0.0), DrawRule(temperature=0.9, top_k=200, top_p=0.95, min_p=1e-3)]


def arguments(rule: DrawRule):
    torch.manual_seed(0)
    hidden = torch.randn(1, ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(VOCABULARY, WIDTH, device="cuda") / WIDTH**0.5).bfloat16()
    places = torch.arange(ROWS, device="cuda")
    keys = RowKeys(rng.sample_keys(0, places // 120, device="cuda"), "token", places % 120)
    bias = torch.randn(VOCABULARY, device="cuda").bfloat16()
    return hidden, weight, bias, places[None], torch.ones(1, ROWS, device="cuda"), keys, rule


@pytest.mark.parametrize("form", op.FORMS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ids_are_those_of_exact_logits_but_for_rounding(rule, form, monkeypatch):
    """Products of bfloat16 are exact in float32, so that only the order of summation differs."""
    monkeypatch.setenv(op.VARIABLE, form)
    own = arguments(rule)
    with poisoned_memory():
        found = op.head_draw(*own)
    hidden, weight, bias, _, _, keys, _ = own
    exact = (hidden[0].double() @ weight.double().T + bias.double()).float()
    wanted = draw_with(exact, row_uniforms(keys, VOCABULARY), rule)
    same = found.ids == wanted.ids
    assert same.double().mean() > 0.998
    for name in TokenDraws._fields[1:]:
        torch.testing.assert_close(getattr(found, name)[same], getattr(wanted, name)[same], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("form", op.FORMS)
def test_a_row_s_draw_is_the_same_to_the_bit_alone_and_among_others(form, monkeypatch):
    monkeypatch.setenv(op.VARIABLE, form)
    hidden, weight, bias, rows, weights, keys, rule = arguments(DrawRule())
    every = op.head_draw(hidden, weight, bias, rows, weights, keys, rule)
    some = torch.randperm(ROWS, device="cuda")[:77]
    own = RowKeys(keys.keys[some], keys.purpose, keys.places[some])
    alone = op.head_draw(hidden, weight, bias, rows[:, some], weights[:, some], own, rule)
    assert all(torch.equal(one, column[some]) for one, column in zip(alone, every, strict=True))


def test_a_cpu_draws_the_same_ids():
    own = arguments(DrawRule(temperature=0.9, top_p=0.95))
    found = op.head_draw(*own).ids.cpu()
    hidden, weight, bias, rows, weights, keys, rule = own
    on_cpu = RowKeys(keys.keys.cpu(), keys.purpose, keys.places.cpu())
    elsewhere = head_draw(hidden.cpu(), weight.cpu(), bias.cpu(), rows.cpu(), weights.cpu(), on_cpu, rule)
    assert (found == elsewhere.ids).double().mean() > 0.998
