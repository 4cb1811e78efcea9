"""The gated residual and adaLN by Triton's kernels: the reference's outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from megadiff.kernels.agreement import converted, outcome, relative_errors
from megadiff.kernels.gated_adaln import reference
from tests.kernels.harness import DEVICE, KERNEL_DTYPES, RELATIVE_ERRORS, assert_equals_reference, numbers

op = pytest.importorskip("megadiff.kernels.gated_adaln.op")
EPS = 1e-5


def case(width, packed, dtype, batch=4, length=11):
    """Tokens twice and three vectors; strided as chunks of one map's output are. One of the packed samples has no row."""
    samples = torch.tensor([0, 2, 2, 2, 2, 2, 3]) if packed else None
    shape = (len(samples), width) if samples is not None else (batch, length, width)
    vectors = numbers(batch, 3 * width, dtype=dtype, grad=False).to(DEVICE).chunk(3, dim=-1)
    tokens = [numbers(*shape, dtype=dtype, grad=False).to(DEVICE).requires_grad_() for _ in range(2)]
    return *tokens, [vector.requires_grad_() for vector in vectors], samples if samples is None else samples.to(DEVICE)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("width", "packed", "one_plus"), [(5, False, True), (13, True, False), (64, False, False), (96, True, True)]
)
@pytest.mark.parametrize("name", ["adaln", "gated_adaln"])
def test_outputs_and_gradients_are_the_reference_s(name, width, packed, one_plus, dtype):
    tokens, change, (gate, shift, scale), samples = case(width, packed, dtype)
    own = (tokens, change, gate) if name == "gated_adaln" else (tokens,)
    arguments = *own, shift, scale, samples, EPS, one_plus
    limit = RELATIVE_ERRORS[dtype]
    assert_equals_reference(getattr(op, name), getattr(reference, name), *arguments, limit=limit)


def test_one_sample_and_a_sum_that_nobody_reads():
    tokens, change, vectors, _ = case(24, False, torch.float32, batch=1, length=50)
    limit = RELATIVE_ERRORS[torch.float32]
    runs = (lambda *arguments, own=each: own.gated_adaln(*arguments).normal for each in (op, reference))
    assert_equals_reference(*runs, tokens, change, *vectors, None, EPS, True, limit=limit)


def test_what_the_kernels_cannot_take_is_refused():
    tokens, _, (_, shift, scale), _ = case(8, False, torch.float32)
    assert op.refusal("adaln", tokens, shift, scale, None, EPS, True) is None
    assert "torch.float16" in op.refusal("adaln", tokens, shift.half(), scale, None, EPS, True)
    wide = torch.empty(1, 1, 8192, device=DEVICE)
    assert "above 4096" in op.refusal("adaln", wide, wide[0], wide[0], None, EPS, True)


@pytest.mark.parametrize("gated", [True, False])
def test_the_operators_are_registered_rightly(gated):
    tokens, change, (gate, shift, scale), samples = case(8, gated, torch.float32)
    own = (change, gate) if gated else (None, None)
    torch.library.opcheck(op._gated_adaln, (tokens, *own, shift, scale, samples, EPS, True))


@pytest.mark.parametrize("name", ["adaln", "gated_adaln"])
def test_the_examples_of_the_check_at_start_up_agree(name):
    example = converted(op.example(name, DEVICE), torch.float32)
    errors = relative_errors(outcome(getattr(op, name), example), outcome(getattr(reference, name), example))
    assert errors
    assert max(errors.values()) < 1e-5
