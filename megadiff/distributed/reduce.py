"""Our few collectives. In one process without a process group they work and cost nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.layout import Layout

Value = TypeVar("Value")
log = logging.getLogger(__name__)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_over_replicas(values: Tensor, layout: Layout) -> Tensor:
    """Element-wise sum over one rank per replica, float64 [n], equal on all ranks. Collective."""
    total = values.to(torch.float64).clone() if layout.speaks else torch.zeros_like(values, dtype=torch.float64)
    if _several():
        dist.all_reduce(total)
    return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, equal on all of them. Collective."""
    total = values.clone()
    if _several():
        dist.all_reduce(total)
    return total


def max_over_ranks(values: Tensor) -> Tensor:
    """Element-wise maximum over all ranks, equal on all of them. Collective."""
    largest = values.clone()
    if _several():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def gather_objects(value: Value) -> list[Value]:
    """Every rank's value, in rank order, on every rank; for small values. Collective."""
    if not _several():
        return [value]
    out: list[Value | None] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out  # type: ignore[return-value]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether a flag is up on any rank. Collective; one number goes round, and all ranks wait for it."""
    if not _several():
        return flag
    flags = torch.tensor(flag, dtype=torch.float32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def barrier() -> None:
    if _several():
        dist.barrier()


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Let the block's failure on one rank, whatever it is, be that of all. Collective at its end: the block has no collectives.

    Raises:
        UserError: in one sentence.
    """
    fault: UserError | None = None
    try:
        yield
    except UserError as error:
        fault = error
    except Exception as error:
        log.exception("%s failed", what)
        fault = UserError(f"{what} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    raise_together(fault)


def raise_together(error: UserError | None) -> None:
    """Raise an error of one rank on every rank, so that none waits for a rank that has stopped. Collective.

    Raises:
        UserError: the error of the first rank that has one.
    """
    for fault in gather_objects(error):
        if fault is not None:
            raise fault
