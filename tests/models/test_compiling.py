"""Blocks through torch.compile give what they give without, in few graphs. Graphs run here as torch traced them; what Inductor
makes of them is compared in tests/engine/test_compiled.py.
"""

from __future__ import annotations

import logging

import pytest
import torch

from megadiff.config.errors import UserError
from megadiff.models import compiling
from megadiff.types import Dense, Ragged, RowLogits
from tests.models.small import small_config, small_model, small_noised

BACKEND = "aot_eager"
READOUT = {"words": RowLogits(torch.arange(4)), "picture": Dense()}
GRAPHS = {"joint blocks": 1, "towers": 2}


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """All that are made, as a list of Graphs."""
    made = []

    class Counted(compiling.Graphs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(compiling, "Graphs", Counted)
    return made


def ragged_noised(lengths):
    noised = small_noised(len(lengths))
    ragged = Ragged(torch.tensor(lengths, dtype=torch.int32), sum(lengths), max(lengths))
    return noised._replace(visible={"words": None, "picture": None}, ragged={"words": ragged})


def outcome(model, noised, readout=READOUT):
    """Outputs and gradients, zero where there is none: a graph gives zeros."""
    outputs = model(noised, readout)
    loss = sum(output.square().sum() for output in outputs.values())
    return [*outputs.values(), *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]


def assert_equal(found, expected):
    """Within float32's rounding of the whole: small numbers may be differences of large ones."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 5e-6 * other.norm() + 1e-6


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_values_and_gradients_are_the_same_and_blocks_share_their_graphs(graphs, recompute):
    model, noised = small_model(small_config(positions=("rope", "rope"))), small_noised()
    model.activation_checkpointing = recompute
    expected = outcome(model, noised)
    compiling.compile_for_training(model, BACKEND)
    for _ in range(2):
        assert_equal(outcome(model, noised), expected)
    assert graphs[0].made == sum(GRAPHS.values())


def test_packed_texts_of_any_lengths_share_a_graph(graphs):
    model = small_model()
    inputs = [ragged_noised(lengths) for lengths in ([2, 5, 1], [1, 2, 3], [4, 1, 2])]
    only = {"picture": Dense()}
    expected = [outcome(model, noised, only) for noised in inputs]
    compiling.compile_for_training(model, BACKEND)
    for noised, values in zip(inputs, expected, strict=True):
        assert model.embed(noised).rows
        assert_equal(outcome(model, noised, only), values)
    assert graphs[0].made == 3  # of joint blocks, of the last one, and of the picture's tower


def test_between_steps_of_training_nothing_is_compiled(graphs):
    model, noised = small_model(), small_noised()
    compiling.compile_for_training(model, BACKEND)
    with torch.no_grad():
        model.eval()(noised, READOUT)
        assert graphs[0].made == 0
        model.train()(noised, READOUT)
    assert graphs[0].made > 0


@pytest.mark.slow
def test_beyond_their_number_other_shapes_run_uncompiled(graphs, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 3)
    model, few, many = small_model(), small_noised(2), small_noised(3)
    expected = [outcome(model, noised) for noised in (few, many)]
    compiling.compile_for_training(model, BACKEND)
    with caplog.at_level(logging.INFO, logger=compiling.log.name):
        for noised, values in ((few, expected[0]), (many, expected[1]), (few, expected[0])):
            assert_equal(outcome(model, noised), values)
    assert graphs[0].made == 3
    assert "compile: graph 1, of a block that takes" in caplog.text
    assert caplog.text.count("no more than 3 graphs") == 1


def test_sampling_computes_every_place_so_that_shapes_are_constant(graphs):
    model = small_model().eval()
    with torch.no_grad():
        inputs = [ragged_noised(lengths) for lengths in ([2, 5, 1], [1, 2, 3])]
        expected = [model(noised, {"picture": Dense()})["picture"] for noised in inputs]
        compiling.compile_for_sampling(model, BACKEND)
        for noised, values in zip(inputs, expected, strict=True):
            torch.testing.assert_close(model(noised, {"picture": Dense()})["picture"], values)
    assert graphs[0].made == 3


def test_a_compiler_that_is_missing_is_one_sentence(monkeypatch):
    def without_compiler(*_):
        raise RuntimeError("no C++ compiler\nand much more")

    model = small_model()
    compiling.compile_for_training(model, BACKEND)
    for block in model.joint:
        block.compute.graphs.make = without_compiler
    with pytest.raises(UserError, match=r"cannot be compiled here \(no C\+\+ compiler\); leave compile out"):
        model(small_noised(), READOUT)
