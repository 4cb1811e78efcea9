"""Which implementation of an op runs: the reference, or its Triton twin where there is one that can.

A twin is the file kernels/<folder>/triton.py: a function of the op's name for each op of the folder that it has, and
`refusal(op, *arguments)`, which says why it cannot take such arguments (device, dtype, shape), or None. The environment
variable MEGADIFF_KERNELS=reference|triton decides for all ops; unset, a twin runs wherever it can. Which one runs, and why, is
logged once per op.
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
    """An op's other implementation, and why it cannot take some arguments; `must`: an error then, not the reference."""

    run: Callable[..., Any]
    refusal: Callable[..., str | None]
    must: bool


_OPS: dict[str, Callable[..., Any]] = {}
"""By name the reference of every op."""
_TWINS: dict[str, Twin | None] = {}
"""By name what was decided; None: the reference, whatever the arguments. An op that is not here was not asked for yet."""
_SAID: set[tuple[str, str]] = set()


def dispatched(reference: Callable[P, R]) -> Callable[P, R]:
    """The op that a reference defines; calls go to the implementation that fits their arguments.

    Raises:
        ValueError: see `settle`; and where Triton must take arguments that it cannot.
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
        ValueError: the environment variable is neither of its two values, or asks for what there is not.
    """
    for op in _OPS:
        if op not in _TWINS:
            _decide(op)


def _decide(op: str) -> Twin | None:
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", *KINDS):
        raise ValueError(f"{VARIABLE} ({asked}) must be {' or '.join(KINDS)}, or unset")
    file = f"{_OPS[op].__module__.rpartition('.')[0]}.triton"
    module = None if asked == "reference" or importlib.util.find_spec(file) is None else importlib.import_module(file)
    run = getattr(module, op, None)
    if module is None or run is None:
        if asked == "triton":
            raise ValueError(f"{VARIABLE} is triton, but {op} has no Triton kernel yet; unset it, or set it to reference")
        _say(op, "reference", f"{VARIABLE} says so" if asked else "it has no Triton kernel yet")
        _TWINS[op] = None
        return None
    twin = _TWINS[op] = Twin(run, module.refusal, must=asked == "triton")
    return twin


def _say(op: str, kind: str, why: str) -> None:
    if (op, kind) not in _SAID:
        _SAID.add((op, kind))
        log.info("%s: %s runs (%s)", op, kind, why)
