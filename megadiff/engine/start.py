"""Joining the other ranks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import PrefixStore, Store, distributed_c10d  # type: ignore[attr-defined]

from megadiff.config.errors import UserError
from megadiff.distributed.joining import Facts, join
from megadiff.distributed.ranks import Ranks, free_port

TIMEOUT = timedelta(minutes=30)
"""Of a collective."""
Examine = Callable[[Store, torch.device], None]
"""A look at the machines: the store where the ranks have met, this rank's device. Collective."""


@contextmanager
def without_compiler() -> Iterator[None]:
    """Imports in the block may decorate functions with torch.compile, which then compiles nothing and imports no compiler."""
    compiling = torch.compile

    def leave_as_it_is(function: Any = None, **_: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    torch.compile = leave_as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling


def start_process_group(
    ranks: Ranks, facts: Facts | None = None, timeout: timedelta = TIMEOUT, examine: Examine | None = None
) -> torch.device:
    """Join the other ranks (nccl on GPUs, gloo on CPUs) and return this rank's device.

    Args:
        facts: what must be equal on all ranks.
        timeout: of every collective, in this group and in those that DeepSpeed and megatron make of it.
        examine: called once the ranks have a group.

    Raises:
        UserError: on all ranks, if a rank is missing or differs; or what `examine` raises.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by the names that torch 2.13 renamed, at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if ranks.world == 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError(f"WORLD_SIZE is {ranks.world}: set MASTER_ADDR and MASTER_PORT to an address on rank 0's machine")
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(ranks.local_rank))
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(ranks.local_rank) if accelerator.device_name() != "cpu" else "cpu")
    if device.type != "cpu":
        accelerator.set_device(ranks.local_rank)
    # Otherwise DeepSpeed probes the compiler, and on a CPU builds an all-reduce over shared memory that its tensor-parallel
    # inference alone calls. That takes 40 s, and its file `lock` outlives a killed rank and stops every later one.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed imports its Muon to ask whether an optimizer is one, and that decorates functions with torch.compile, which
    # imports the compiler: 2 s of CPU at every start. Nothing here is compiled, and Muon computes the same without.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    backend = accelerator.communication_backend_name() if device.type != "cpu" else "gloo"
    if not dist.is_initialized():
        joined = join(ranks, facts or {})
        # DeepSpeed makes groups without a time-out, and these take torch's defaults: with nccl 10 minutes.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
        store = PrefixStore("group", joined)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout)
        if examine is not None:
            examine(joined, device)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device
