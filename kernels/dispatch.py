"""Which implementation of an op runs: the reference, or its Triton twin if there is one that takes the arguments.

A twin is the file kernels/<folder>/op.py, which registers with torch what the kernels of triton.py do. It has, for some ops of
the folder, a function of the op's name, and

    refusal(op, *arguments) -> str | None    why it cannot take such arguments (`toolchain.unfit`; shape), or None
    example(op, device) -> tuple             small arguments for the check at start-up, with requires_grad where it applies

By default twins run on GPUs, for which toolchain's versions are known to be right, and after the check: outputs and gradients
of the example equal the reference's. On a CPU, or with MEGADIFF_KERNELS=reference, references run; MEGADIFF_KERNELS=triton
requires the twins that there are, on a CPU in Triton's interpreter. The choice and its reason are logged once per op.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from megadiff.kernels import agreement, toolchain

P = ParamSpec("P")
R = TypeVar("R")
VARIABLE, KINDS = "MEGADIFF_KERNELS", ("reference", "triton")
CHECK_LIMIT = 0.02
"""Relative error that the check at start-up allows: bfloat16 stays below it, wrong code is of the order of 1."""
NO_TWIN = "it has no Triton kernel yet"
log = logging.getLogger(__name__)


class Twin(NamedTuple):
    """An op's Triton implementation.

    Attributes:
        refusal: the reason why it cannot take some arguments, or None.
        must: whether a refusal is an error; else the reference runs.
    """

    run: Callable[..., Any]
    refusal: Callable[..., str | None]
    must: bool


_OPS: dict[str, Callable[..., Any]] = {}
"""The reference of every op, by name."""
_TWINS: dict[str, Twin | None] = {}
"""The choice for every op that is settled, by name; None: the reference, whatever the arguments."""
_LOGGED: set[tuple[str, str]] = set()


def dispatched(reference: Callable[P, R]) -> Callable[P, R]:
    """The op that a reference defines; calls run the implementation that takes their arguments.

    Raises:
        ValueError: see `settle`; or Triton is required and cannot take the arguments.
    """
    op = reference.__name__
    _OPS[op] = reference

    @functools.wraps(reference)
    def run(*arguments: P.args, **keywords: P.kwargs) -> R:
        twin = _TWINS[op] if op in _TWINS else _decide(op)
        if twin is None:
            return reference(*arguments, **keywords)
        refusal = twin.refusal(op, *arguments, **keywords)
        if refusal is None:
            say(op, "triton", "it takes these arguments")
            result: R = twin.run(*arguments, **keywords)
            return result
        if twin.must:
            raise ValueError(
                f"{VARIABLE} is triton, but {op} cannot run so: {refusal}; unset it to let the reference run there"
            )
        say(op, "reference", refusal)
        return reference(*arguments, **keywords)

    return run


def settle() -> None:
    """Decide for every op now, not at its first call.

    Raises:
        ValueError: the environment variable is neither of its two values, or requires a kernel that cannot run here.
    """
    for op in _OPS:
        if op not in _TWINS:
            _decide(op)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def say(op: str, kind: str, why: str) -> None:
    """Log once which implementation of an op runs, and why."""
    if (op, kind) not in _LOGGED:
        _LOGGED.add((op, kind))
        log.info("%s: %s runs (%s)", op, kind, why)


def _decide(op: str) -> Twin | None:
    kind = os.environ.get(VARIABLE, "")
    if kind not in ("", *KINDS):
        raise ValueError(f"{VARIABLE} ({kind}) must be {' or '.join(KINDS)}, or unset")
    if kind == "reference":
        _reference(op, f"{VARIABLE} says so")
        return None
    file = f"{_OPS[op].__module__.rpartition('.')[0]}.op"
    if importlib.util.find_spec(file) is None:
        _reference(op, NO_TWIN)
        return None
    fault = _fault(kind)
    if fault is None:
        module = importlib.import_module(file)
        if not hasattr(module, op):
            _reference(op, NO_TWIN)
            return None
        fault = None if toolchain.interpreted() else _check(op, module)
        if fault is None:
            twin = _TWINS[op] = Twin(getattr(module, op), module.refusal, must=kind == "triton")
            return twin
    if kind == "triton":
        raise ValueError(f"{VARIABLE} is triton, but {op} cannot run so: {fault}; unset it, or set it to reference")
    _reference(op, fault)
    return None


def _reference(op: str, why: str) -> None:
    say(op, "reference", why)
    _TWINS[op] = None


def _fault(kind: str) -> str | None:
    """Why no twin may run in this process, or None. Triton's interpreter is for tests: it runs only if Triton is required."""
    if toolchain.interpreted() and kind != "triton":
        return f"kernels run in Triton's interpreter only if {VARIABLE} is triton"
    return toolchain.fault()


def _check(op: str, module: ModuleType) -> str | None:
    """What is wrong with the numbers of an op's kernels on this GPU, or None."""
    example = module.example(op, torch.device("cuda"))
    with torch.enable_grad():
        actual = agreement.outcome(getattr(module, op), example)
        expected = agreement.outcome(_OPS[op], agreement.converted(example, torch.float32))
    errors = agreement.relative_errors(actual, expected)
    wrong = {name: error for name, error in errors.items() if not error <= CHECK_LIMIT}
    return f"the check at start-up gives relative errors of {wrong}, above {CHECK_LIMIT}" if wrong else None
