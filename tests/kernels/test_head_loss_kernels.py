"""The head's loss by Triton's kernel: the reference's losses and gradients, in chunks, without waiting for the device."""

from __future__ import annotations

import collections
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadiff.kernels.agreement import converted, outcome, relative_errors
from megadiff.kernels.head_loss import reference
from tests.kernels.harness import DEVICE, KERNEL_DTYPES, RELATIVE_ERRORS, assert_equals_reference, numbers, poison
from tests.ranks import ROOT, run_ranks

op = pytest.importorskip("megadiff.kernels.head_loss.op")
NORMALISER = 0.37


def case(sizes, vocabulary, bias, dtype, share=0.5):
    """Hidden states are NaN, and targets no token, where nothing is scored; some scored positions weigh nothing."""
    width = 24
    scored = torch.rand(sizes) < share
    targets = torch.randint(vocabulary, sizes).masked_fill(~scored, vocabulary)
    weights = torch.rand(sizes) * 3 * (torch.rand(sizes) < 0.8)
    hidden = poison(numbers(*sizes, width, dtype=dtype), ~scored)
    floats = hidden, numbers(vocabulary, width, dtype=dtype), numbers(vocabulary, dtype=dtype) if bias else None
    moved = [tensor if tensor is None else tensor.detach().to(DEVICE).requires_grad_() for tensor in floats]
    return *moved, targets.to(DEVICE), scored.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("sizes", "vocabulary", "bias"), [((2, 9), 7, True), ((11,), 1, False), ((3, 17), 1100, True)])
def test_losses_and_gradients_are_the_reference_s(monkeypatch, sizes, vocabulary, bias, known, dtype):
    monkeypatch.setattr(op, "ROWS_AT_ONCE", 8)
    arguments = case(sizes, vocabulary, bias, dtype)
    count = int(arguments[4].sum()) if known else None
    assert_equals_reference(
        op.head_loss, reference.head_loss, *arguments, count, limit=RELATIVE_ERRORS[dtype], arriving=NORMALISER
    )


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_only_the_gradients_that_somebody_wants_are_made(trained):
    hidden, weight, bias, *rest = case((2, 9), 7, True, torch.float32)
    hidden.requires_grad_(trained[0])
    for parameter in (weight, bias):
        parameter.requires_grad_(trained[1])
    limit = RELATIVE_ERRORS[torch.float32]
    assert_equals_reference(op.head_loss, reference.head_loss, hidden, weight, bias, *rest, limit=limit, arriving=NORMALISER)
    with torch.no_grad():
        assert not op.head_loss(hidden, weight, bias, *rest).weighted.requires_grad


@pytest.mark.parametrize("count", [0, None])
def test_no_scored_position_gives_zero_losses_and_zero_gradients(count):
    arguments = case((2, 5), 7, True, torch.float32, share=0.0)
    losses = op.head_loss(*arguments, count)
    losses.weighted.sum().backward()
    assert not losses.weighted.any()
    assert not losses.unweighted.any()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in arguments[:3])


def test_gradients_that_differ_between_positions_are_refused():
    arguments = case((2, 9), 7, True, torch.float32, share=1.0)
    arriving = torch.ones(2, 9, device=DEVICE)
    arriving[1, 3] = 2
    with pytest.raises(RuntimeError, match="not all one number"):
        op.head_loss(*arguments).weighted.backward(arriving)


class Watched(TorchDispatchMode):
    """The operators that ran, and the most bytes that tensors made by them took at one time."""

    def __init__(self):
        super().__init__()
        self.operators: set[str] = set()
        self.users: collections.Counter[int] = collections.Counter()
        self.present = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operators.add(function.overloadpacket.__name__)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for made in tree_leaves(result):
            storage = made.untyped_storage()
            if storage._cdata not in given or self.users[storage._cdata]:
                self.present += 0 if self.users[storage._cdata] else storage.nbytes()
                self.users[storage._cdata] += 1
                weakref.finalize(made, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.present)
        return result

    def release(self, storage, size):
        self.users[storage] -= 1
        self.present -= 0 if self.users[storage] else size


def test_the_extra_memory_is_below_0_4_gb_at_the_paper_s_size_and_nothing_waits_for_the_device(monkeypatch):
    """Of all positions scored, forward and backward; on the device "meta", where tensors have no memory and nothing is run."""
    monkeypatch.setattr(op, "run", lambda *arguments, forward: None)
    hidden, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((64, 120, 1024), (49_408, 1024)))
    bias, targets = torch.empty(49_408, device="meta"), torch.empty(64, 120, dtype=torch.int64, device="meta")
    scored, weights = torch.empty(64, 120, dtype=torch.bool, device="meta"), torch.empty(64, 120, device="meta")
    with torch.no_grad(), Watched() as watched:
        _, _, *own = op._head_loss._init_fn(hidden, weight, bias, targets, scored, weights, None, True, True, 0, "")
        forward = watched.peak
        assert 0.35e9 < forward < 0.4e9
        gradients = [op._scaled(each, weights[0, 0], dtype) for each, dtype in zip(own, [torch.bfloat16] * 2 + [torch.float32])]
    assert watched.peak == forward
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert not {"_local_scalar_dense", "nonzero", "masked_select"} & watched.operators
    assert "nonzero_static" in watched.operators


def test_the_operator_is_registered_rightly():
    hidden, *rest = case((2, 5), 7, True, torch.float32, share=1.0)
    torch.library.opcheck(op._head_loss, (hidden, *rest, None, True, True, 0, ""))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_head_that_is_split_by_the_vocabulary_has_the_whole_one_s_losses_and_gradients(monkeypatch):
    """In processes of their own, on CPUs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for report in run_ranks(ROOT / "tests" / "kernels" / "sharded_worker.py", 2, {}):
        assert not {name: error for name, error in report.items() if not error <= RELATIVE_ERRORS[torch.float32]}


def test_the_example_of_the_check_at_start_up_agrees():
    example = converted(op.example("head_loss", DEVICE), torch.float32)
    errors = relative_errors(outcome(op.head_loss, example), outcome(reference.head_loss, example))
    assert errors
    assert max(errors.values()) < 1e-5
