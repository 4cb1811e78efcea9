"""Which implementation of an op runs: the reference, or its Triton twin if there is one that takes the arguments.

A twin is the file kernels/<folder>/triton.py. It has a function of the op's name for some ops of the folder, and
`refusal(op, *arguments)`, which gives the reason why it cannot take such arguments (device, dtype, shape), or None. The
environment variable MEGADIFF_KERNELS=reference|triton decides for all ops; if it is not set, a twin runs wherever it can. The
choice and its reason are logged once per op.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
VARIABLE, KINDS = "MEGADIFF_KERNELS", ("reference", "triton")
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
            _say(op, "triton", "it takes these arguments")
            result: R = twin.run(*arguments, **keywords)
            return result
        if twin.must:
            raise ValueError(
                f"{VARIABLE} is triton, but {op} cannot run so: {refusal}; unset it to let the reference run there"
            )
        _say(op, "reference", refusal)
        return reference(*arguments, **keywords)

    return run


def settle() -> None:
    """Decide for every op now, not at its first call.

    Raises:
        ValueError: the environment variable is neither of its two values, or requires a kernel that does not exist.
    """
    for op in _OPS:
        if op not in _TWINS:
            _decide(op)


def _decide(op: str) -> Twin | None:
    kind = os.environ.get(VARIABLE, "")
    if kind not in ("", *KINDS):
        raise ValueError(f"{VARIABLE} ({kind}) must be {' or '.join(KINDS)}, or unset")
    file = f"{_OPS[op].__module__.rpartition('.')[0]}.triton"
    module = None if kind == "reference" or importlib.util.find_spec(file) is None else importlib.import_module(file)
    run = getattr(module, op, None)
    if module is None or run is None:
        if kind == "triton":
            raise ValueError(f"{VARIABLE} is triton, but {op} has no Triton kernel yet; unset it, or set it to reference")
        _say(op, "reference", f"{VARIABLE} says so" if kind else "it has no Triton kernel yet")
        _TWINS[op] = None
        return None
    twin = _TWINS[op] = Twin(run, module.refusal, must=kind == "triton")
    return twin


def _say(op: str, kind: str, why: str) -> None:
    if (op, kind) not in _LOGGED:
        _LOGGED.add((op, kind))
        log.info("%s: %s runs (%s)", op, kind, why)
