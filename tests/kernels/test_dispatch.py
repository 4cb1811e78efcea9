"""Which implementation of an op runs."""

from __future__ import annotations

import logging
import sys

import pytest

from megadiff.config.errors import UserError
from megadiff.kernels import dispatch
from megadiff.models.mmdit import build_model
from tests.models.small import small_config

TWIN = """
def doubled(number):
    return "triton", number
def refusal(op, number):
    return "the number is odd" if number % 2 else None
"""


@pytest.fixture(autouse=True)
def _undecided(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_TWINS", {})
    monkeypatch.setattr(dispatch, "_LOGGED", set())


@pytest.fixture
def op(tmp_path, monkeypatch):
    """An op with a twin for even numbers."""
    folder = tmp_path / "double_op"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "reference.py").write_text('def doubled(number):\n    return "reference", number\n')
    (folder / "triton.py").write_text(TWIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dispatch, "_OPS", {})
    from double_op.reference import doubled

    yield dispatch.dispatched(doubled)
    for name in [name for name in sys.modules if name.split(".")[0] == "double_op"]:
        del sys.modules[name]


def test_a_twin_runs_where_it_can_and_the_reference_elsewhere_and_each_is_said_once(op, caplog):
    caplog.set_level(logging.INFO, dispatch.__name__)
    assert [op(number)[0] for number in (2, 3, 4, 5)] == ["triton", "reference", "triton", "reference"]
    assert caplog.messages == [
        "doubled: triton runs (it takes these arguments)",
        "doubled: reference runs (the number is odd)",
    ]


def test_the_environment_may_ask_for_the_reference(op, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert op(2) == ("reference", 2)


def test_where_triton_is_asked_for_it_runs_or_says_why_it_cannot(op, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert op(2) == ("triton", 2)
    with pytest.raises(ValueError, match="doubled cannot run so: the number is odd"):
        op(3)


def test_every_op_says_once_which_implementation_runs_and_why(caplog):
    caplog.set_level(logging.INFO, dispatch.__name__)
    for _ in range(2):
        build_model(small_config(), ["words"])
    assert len(caplog.messages) == len(dispatch._OPS) >= 6
    assert "head_loss: reference runs (it has no Triton kernel yet)" in caplog.messages


@pytest.mark.parametrize(
    ("asked", "message"),
    [("triton", "has no Triton kernel yet; unset it, or set it to reference"), ("cuda", "must be reference or triton")],
)
def test_a_wish_that_cannot_be_met_stops_the_model_from_being_built(monkeypatch, asked, message):
    monkeypatch.setenv(dispatch.VARIABLE, asked)
    with pytest.raises(UserError, match=message):
        build_model(small_config(), ["words"])
