"""Draws by one kernel with the head's product: the reference's ids and figures, with no logits in memory."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from megadiff import rng
from megadiff.kernels import dispatch
from megadiff.kernels.head_draw import reference
from megadiff.types import DrawRule, RowKeys, TokenDraws
from tests.kernels.harness import DEVICE, KERNEL_DTYPES, poisoned_memory
from tests.kernels.test_head_draw_kernels import case

op = pytest.importorskip("megadiff.kernels.head_draw.op")
RULES = [DrawRule(), DrawRule(temperature=0.7), DrawRule(temperature=0.0, top_k=3)]
LOW = KERNEL_DTYPES[1]
"""On a GPU float32 takes the other form."""


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setenv(op.VARIABLE, "fused")
    monkeypatch.setattr(op, "draw", None)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("branches", "vocabulary", "bias"), [(1, 1, True), (1, 131, False), (1, 600, True)])
def test_ids_and_figures_are_the_reference_s(branches, vocabulary, bias, rule):
    arguments = case(branches, vocabulary, 17, LOW, rule, bias)
    with poisoned_memory():
        found = op.head_draw(*arguments)
    wanted = reference.head_draw(*arguments)
    assert torch.equal(found.ids, wanted.ids)
    for name in TokenDraws._fields[1:]:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=5e-6, rtol=5e-5)


def test_a_thousand_draws_have_their_distribution_and_nothing_without_probability_is_drawn():
    count, vocabulary = 1000, 150
    logits = torch.randn(vocabulary, device=DEVICE).to(LOW)
    bias = torch.where(torch.arange(vocabulary, device=DEVICE) < 140, 0.0, -math.inf)
    places = torch.arange(count, device=DEVICE)
    keys = RowKeys(rng.sample_keys(9, places // 10, device=DEVICE), "draw", places % 10)
    rows, weights = torch.zeros(1, count, dtype=torch.int64, device=DEVICE), torch.ones(1, count, device=DEVICE)
    hidden = torch.ones(1, 1, 1, device=DEVICE, dtype=LOW)
    arguments = hidden, logits[:, None], bias, rows, weights, keys, DrawRule(temperature=0.8)
    ids = op.head_draw(*arguments).ids
    expected = count * ((logits.double() + bias) / 0.8).softmax(0)
    counts = torch.bincount(ids, minlength=vocabulary)
    assert not counts[140:].any()
    chi_square = ((counts - expected).square()[:140] / expected[:140]).sum().item()
    assert abs(chi_square - 139) < 4 * math.sqrt(2 * 139)
    assert (ids == reference.head_draw(*arguments).ids).double().mean() > 0.99


def test_what_it_cannot_take_runs_in_the_other_form_and_the_log_says_why(monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setenv(op.VARIABLE, "fused")
    monkeypatch.setattr(dispatch, "_LOGGED", set())
    arguments = case(1, 131, 5, LOW, DrawRule(top_k=7))
    with caplog.at_level(logging.INFO):
        assert torch.equal(op.head_draw(*arguments).ids, reference.head_draw(*arguments).ids)
    assert "product, then draw runs (top_k, top_p and min_p need all logits before the draw)" in caplog.text
    monkeypatch.setenv(op.VARIABLE, "both")
    with pytest.raises(ValueError, match=r"MEGADIFF_HEAD_DRAW \(both\) must be logits or fused"):
        op.head_draw(*arguments)


def test_the_operator_is_registered_rightly():
    *arguments, keys, rule = case(1, 20, 3, LOW, DrawRule())
    torch.library.opcheck(op._head_draw, (*(argument.nan_to_num() for argument in arguments), *keys, *rule, True))
