"""Which implementation of an op runs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megadiff.config.errors import UserError
from megadiff.kernels import dispatch, toolchain, tuning
from megadiff.kernels.toolchain import Toolchain, refusal
from megadiff.models.mmdit import build_model
from tests.models.small import small_config

TWIN = """
def doubled(number):
    return "triton", number
def refusal(op, number):
    return "the number is odd" if number % 2 else None
"""
GOOD = Toolchain("3.7.1", "13.1.80")


@pytest.fixture(autouse=True)
def _undecided(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_TWINS", {})
    monkeypatch.setattr(dispatch, "_LOGGED", set())


@pytest.fixture
def op(tmp_path, monkeypatch):
    """An op with a twin for even numbers, as in a process in which kernels can run."""
    monkeypatch.setattr(toolchain, "fault", lambda: None)
    monkeypatch.setattr(toolchain, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_check", lambda op, module: None)
    folder = tmp_path / "double_op"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "reference.py").write_text('def doubled(number):\n    return "reference", number\n')
    (folder / "op.py").write_text(TWIN)
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
    reason = f"kernels run in Triton's interpreter only if {dispatch.VARIABLE} is triton"
    assert {message.partition(" ")[2] for message in caplog.messages} <= {
        "reference runs (it has no Triton kernel yet)",
        f"reference runs ({reason})",
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [("triton", "cannot run so: there is no GPU; unset it, or set it to reference"), ("cuda", "must be reference or triton")],
)
def test_a_wish_that_cannot_be_met_stops_the_model_from_being_built(monkeypatch, asked, message):
    monkeypatch.setattr(toolchain, "fault", lambda: "there is no GPU")
    monkeypatch.setenv(dispatch.VARIABLE, asked)
    with pytest.raises(UserError, match=message):
        build_model(small_config(), ["words"])


def test_without_a_gpu_references_run_and_kernels_are_not_imported():
    """In a process of its own, without the interpreter that these tests turn on."""
    code = """
import sys, torch
from megadiff.kernels import dispatch
from megadiff.kernels.joint_attention import joint_attention
torch.cuda.is_available = lambda: False
dispatch.settle()
assert not [name for name in sys.modules if name.startswith("megadiff.kernels") and name.endswith((".op", ".triton"))]
"""
    environment = {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("capability", "tools", "reason"),
    [
        ((9, 0), GOOD, None),
        ((8, 0), Toolchain("3.7.1", "12.8.93"), None),
        ((9, 0), Toolchain("3.7.1", "12.8.93"), "makes wrong code for Hopper"),
        ((9, 0), Toolchain("3.6.0", "13.0.88"), "makes wrong code for Hopper"),
        ((9, 0), Toolchain("3.7.1", ""), "ptxas of unknown version"),
        ((9, 0), Toolchain("3.8.0", "13.1.80"), "not a validated version"),
        ((8, 0), Toolchain("3.5.1", "12.8.93"), "not a validated version"),
        ((7, 5), GOOD, "compute capability 7.5 is below 8.0"),
    ],
)
def test_versions_and_architectures_that_are_known_to_be_wrong_are_refused(capability, tools, reason):
    why = refusal(capability, tools)
    assert why is None if reason is None else reason in why


def test_the_newer_assembler_is_named_to_triton_if_the_driver_runs_its_code(monkeypatch):
    monkeypatch.delenv(toolchain.PTXAS_VARIABLE, raising=False)
    monkeypatch.setattr(toolchain, "driver_version", lambda: 12080)
    toolchain.choose_assembler()
    assert toolchain.PTXAS_VARIABLE not in os.environ
    monkeypatch.setattr(toolchain, "driver_version", lambda: 13000)
    monkeypatch.setenv(toolchain.PTXAS_VARIABLE, "")  # so that it is gone after the test
    monkeypatch.delenv(toolchain.PTXAS_VARIABLE)
    toolchain.choose_assembler()
    assert toolchain.numbers(toolchain.toolchain().ptxas)[:2] >= toolchain.HOPPER_PTXAS


def test_an_assembler_that_the_user_names_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(toolchain.PTXAS_VARIABLE, str(tmp_path / "mine"))
    monkeypatch.setattr(toolchain, "driver_version", lambda: 13000)
    toolchain.choose_assembler()
    assert os.environ[toolchain.PTXAS_VARIABLE] == str(tmp_path / "mine")
    assert toolchain.toolchain().ptxas == ""


@pytest.mark.parametrize(("wrong", "runs"), [(False, "triton"), (True, "reference")])
def test_kernels_whose_numbers_or_gradients_are_wrong_at_start_up_do_not_run(monkeypatch, wrong, runs):
    """The twin's gradient is wrong, as of code that an assembler spoilt; its outputs are right."""

    class Halved:
        refusal = staticmethod(lambda op, values: None)
        example = staticmethod(lambda op, device: (torch.arange(1.0, 5.0, requires_grad=True),))

        @staticmethod
        def halved(values):
            return values.detach() * 0.5 + (values - values.detach()) * (-0.5 if wrong else 0.5)

    fault = dispatch_check(monkeypatch, Halved)
    assert (fault is None) == (runs == "triton")
    assert fault is None or "gradients 0" in fault


def dispatch_check(monkeypatch, twin):
    monkeypatch.setitem(dispatch._OPS, "halved", lambda values: values * 0.5)
    monkeypatch.setattr(torch, "device", lambda name: name)
    return dispatch._check("halved", twin)


def test_a_table_s_entry_holds_for_its_gpu_and_versions_only_and_defaults_elsewhere(monkeypatch, tmp_path):
    entry = tuning.Entry("op.forward", "d64", "bfloat16", "GPU", 89, *GOOD, {"queries": 128})
    (tmp_path / "GPU.json").write_text(json.dumps([entry._asdict()]))
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(toolchain, "toolchain", lambda: GOOD)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    caches = tuning.entries, tuning._measured, tuning._target

    def chosen(**changes):
        for cache in caches:
            cache.cache_clear()
        key = {"kernel": "op.forward", "bucket": "d64", "dtype": torch.bfloat16, "device": torch.device("cuda", 0), **changes}
        return tuning.configuration(**key, defaults={0: {"queries": 16}, 80: {"queries": 64}, 90: {"queries": 256}})["queries"]

    try:
        assert chosen() == 128
        assert chosen(bucket="d128") == chosen(dtype=torch.float16) == chosen(kernel="op.backward") == 64
        assert chosen(device=torch.device("cpu")) == 16
        monkeypatch.setattr(toolchain, "toolchain", lambda: Toolchain("3.8.0", "13.1.80"))
        assert chosen() == 64
    finally:
        for cache in caches:
            cache.cache_clear()
