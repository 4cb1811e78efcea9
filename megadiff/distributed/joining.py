"""How ranks find each other: at a store on rank 0, where they say what they are before any of them computes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megadiff import __version__
from megadiff.config.errors import UserError
from megadiff.distributed.ranks import Ranks, node_name
from megadiff.distributed.reduce import gather_objects

TIMEOUT_VARIABLE, TIMEOUT_S = "MEGADIFF_JOIN_TIMEOUT_S", 600.0
"""How long ranks wait for each other; containers of a large allocation start minutes apart."""
_FAREWELL_S = 10.0
_VERDICT = "verdict"

Facts = Mapping[str, str]
"""What must be equal on all ranks: by its name for people, its value or a short hash."""


def software() -> dict[str, str]:
    """The versions of this rank's packages, and a hash of megadiff's own files."""
    code = hashlib.blake2b(digest_size=8)
    package = Path(__file__).parents[1]
    # Path.rglob does not enter a symlink below its start.
    for top in sorted(package.iterdir()):
        for path in sorted(top.resolve().rglob("*.py")) if top.is_dir() else [top]:
            code.update(path.read_bytes() if path.suffix == ".py" else b"")
    versions = {name: version(name) for name in ("torch", "deepspeed", "numpy")}
    return {"megadiff": __version__, "code of megadiff": code.hexdigest(), "Python": platform.python_version(), **versions}


def join(ranks: Ranks, facts: Facts) -> Store:
    """Wait for all ranks, and compare what they say with what rank 0 says. Collective.

    Returns:
        The store, for the process group.

    Raises:
        UserError: on all ranks that have come, if a rank is missing or differs.
    """
    timeout_s = _timeout_s()
    own = {"WORLD_SIZE": str(ranks.world), **facts}
    store = _store(ranks, timeout_s)
    store.set(_key(ranks.rank), json.dumps({"node": node_name(), "facts": own}))
    if ranks.rank == 0:
        store.set(_VERDICT, _judge(store, own, ranks.world, timeout_s))
    try:
        store.wait([_key(0), _VERDICT], timedelta(seconds=timeout_s + 30))
        verdict, first = store.get(_VERDICT).decode(), json.loads(store.get(_key(0)))["facts"]
        store.set(_key(ranks.rank, "heard"), "")
    except (DistError, RuntimeError):
        raise UserError(f"rank {ranks.rank}: rank 0 has left while the others were joining; its log says why") from None
    # A rank that rank 0 does not count on compares for itself.
    if fault := verdict or difference(ranks.rank, own, first):
        if ranks.rank == 0:
            _wait_until_heard(store, ranks.world)
        raise UserError(fault)
    return store


def check_alike(facts: Facts) -> None:
    """Compare facts of ranks that are joined. Collective.

    Raises:
        UserError: on all ranks, if one differs.
    """
    first, *others = gather_objects(dict(facts))
    for rank, theirs in enumerate(others, 1):
        if fault := difference(rank, theirs, first):
            raise UserError(fault)


def difference(rank: int, facts: Facts, first: Facts, node: str = "") -> str:
    """A sentence if a rank's facts are not rank 0's, or else nothing.

    Args:
        node: the rank's, if it is not rank 0's.
    """
    for name in dict.fromkeys([*first, *facts]):
        one, other = first.get(name, "nothing"), facts.get(name, "nothing")
        if one != other:
            return (
                f"rank {rank}{f' on {node}' if node else ''} differs from rank 0 in its {name}: {other} instead of {one}; "
                "start all ranks with the same files, packages and settings"
            )
    return ""


def _judge(store: Store, own: Facts, world: int, timeout_s: float) -> str:
    """On rank 0: what is wrong with the ranks, in a sentence, or nothing."""
    deadline, waiting = time.monotonic() + timeout_s, list(range(1, world))
    while waiting:
        here = [rank for rank in waiting if store.check([_key(rank)])]
        for rank in here:
            theirs = json.loads(store.get(_key(rank)))
            elsewhere = theirs["node"] if theirs["node"] != node_name() else ""
            if fault := difference(rank, theirs["facts"], own, elsewhere):
                return fault
        waiting = [rank for rank in waiting if rank not in here]
        if waiting and time.monotonic() > deadline:
            named = ", ".join(map(str, waiting[:8])) + (f" and {len(waiting) - 8} more" if len(waiting) > 8 else "")
            return (
                f"rank{'s' * (len(waiting) > 1)} {named} of {world} did not join within {timeout_s:g} s; "
                f"see that all {world} were started and reach rank 0 ({TIMEOUT_VARIABLE} waits longer)"
            )
        time.sleep(0.01 if here else 0.05)
    return ""


def _store(ranks: Ranks, timeout_s: float) -> Store:
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    # torchrun's agent has the store already, and keeps it over restarts.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            int(port),
            is_master=ranks.rank == 0 and not agent,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (DistError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {ranks.rank} cannot reach rank 0 at MASTER_ADDR {host}, MASTER_PORT {port}: {reason}; "
            "is rank 0 started there, and is the port free and open?"
        ) from None
    return PrefixStore(f"megadiff/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_until_heard(store: Store, world: int) -> None:
    """On rank 0, with which the store ends: give the ranks that are here some time to read the verdict."""
    deadline = time.monotonic() + _FAREWELL_S
    here = [rank for rank in range(world) if store.check([_key(rank)])]
    while time.monotonic() < deadline and not store.check([_key(rank, "heard") for rank in here]):
        time.sleep(0.05)


def _key(rank: int, what: str = "rank") -> str:
    return f"{what}/{rank}"


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"{TIMEOUT_VARIABLE} is {text!r}; it must be a number of seconds")
    return seconds
