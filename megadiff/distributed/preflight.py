"""What ranks find out about their nodes before a stage is built: a minute at most, and a sentence for each fault."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]

from megadiff.config.errors import UserError
from megadiff.config.parameters import stage_parameters, trainable
from megadiff.config.schema import Run, Stage
from megadiff.distributed.ranks import Ranks, node_name
from megadiff.distributed.verdict import Findings, Verdict, judge
from megadiff.storage.store import read_bytes

log = logging.getLogger(__name__)

WIDE = 4
"""Bytes of a float32 number, as checkpoints hold them."""
GPU_BYTES, CPU_BYTES, TURNS = 2**26, 2**22, 3
"""Of an all-reduce that is timed; the best of some turns counts, after one that makes the connections."""
GROUP_TIMEOUT = timedelta(minutes=30)
"""More than the whole preflight takes: a group's own time-out ends the process without a word under nccl."""
_READ_BYTES = 4096
_FAREWELL_S = 10.0
_CACHES = ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")


class PreflightError(UserError):
    """The allocation is not fit for the run."""


def versions() -> dict[str, str]:
    """What may differ between nodes with the same packages."""
    driver = Path("/sys/module/nvidia/version")
    found = {"NVIDIA driver": driver.read_text(encoding="utf-8").strip()} if driver.exists() else {}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def read_beginning(address: str) -> None:
    """Read the first bytes of an object. Raises StorageError."""
    read_bytes(address, 0, _READ_BYTES)


@dataclass(frozen=True)
class Probes:
    """How a rank looks at its node; tests put others in their place."""

    clock: Callable[[], float] = time.time
    versions: Callable[[], dict[str, str]] = versions
    free_bytes: Callable[[Path], int] = free_bytes
    read: Callable[[str], None] = read_beginning
    all_reduce: Callable[..., Any] = dist.all_reduce


EYES = Probes()


def preflight(
    run: Run,
    stage: Stage,
    objects: Mapping[str, str],
    *,
    ranks: Ranks,
    joined: Store,
    device: torch.device,
    probes: Probes = EYES,
) -> str:
    """Check the nodes of a run by its section `preflight`. Collective, of ranks with a process group.

    Args:
        objects: by what the run calls them, addresses that every node must be able to read.
        joined: where the ranks have met.

    Returns:
        What the run starts in spite of, in a sentence, or nothing.

    Raises:
        PreflightError: on all ranks, with a sentence for each fault.
    """
    rules, began = run.preflight, time.monotonic()
    if rules.enabled is False:
        return ""
    # Calls of one client wait for each other, and one for a group's sake may never return.
    store = PrefixStore("preflight", joined.clone())  # type: ignore[attr-defined]
    talk = _Talk(store, ranks, began + rules.at_most_s)
    slurm = "SLURM_JOB_ID" in os.environ

    def nodes_of(names: Mapping[int, str]) -> dict[str, Any]:
        wanted = rules.enabled is True or slurm or len(set(names.values())) > 1
        return {"names": names, "wanted": wanted, "absent": [rank for rank in range(ranks.world) if rank not in names]}

    met = talk.confer("nodes", node_name(), nodes_of)
    clock_s = probes.clock()
    if met["absent"]:
        talk.leave(f"no answer from ranks {', '.join(map(str, met['absent'][:8]))}; see their logs")
    if not met["wanted"]:
        return ""
    nodes = [met["names"][str(rank)] for rank in range(ranks.world)]
    until = began + 0.8 * rules.at_most_s
    errands = [] if ranks.local_rank else [_Errand(work, name) for name, work in _errands(run, stage, objects, probes).items()]
    network = _Network(nodes, ranks, device, probes)
    network.measure(until)
    faults = [fault for errand in errands if (fault := errand.fault(until))]
    own = Findings(clock_s, probes.versions(), faults, network.bandwidths, network.wrong)

    def judged(all_of: Mapping[int, dict[str, Any]]) -> dict[str, str]:
        return asdict(judge(nodes, {rank: Findings(**one) for rank, one in all_of.items()}, rules, slurm=slurm))

    verdict = Verdict(**talk.confer("findings", asdict(own), judged))
    log.info("preflight: %s; %.1f s", verdict.summary, time.monotonic() - began)
    if verdict.faults:
        talk.leave(verdict.faults)
    if verdict.notes:
        log.warning("preflight: %s", verdict.notes)
    return verdict.notes


class _Talk:
    """The ranks over their store, where no rank can keep the others waiting."""

    def __init__(self, store: Store, ranks: Ranks, until: float) -> None:
        self._store, self._ranks, self._until = store, ranks, until

    def confer(self, topic: str, own: Any, judgement: Callable[[dict[int, Any]], Any]) -> Any:
        """Every rank says something, rank 0 judges what has come in time, and all hear its judgement; all of it JSON.

        Raises:
            PreflightError: rank 0 has left.
        """
        self._store.set(f"{topic}/{self._ranks.rank}", json.dumps(own))
        if self._ranks.rank == 0:
            self._store.set(f"{topic}/judgement", json.dumps(judgement(self._said(topic))))
        try:
            rest_s = max(self._until - time.monotonic(), 0.0) + _FAREWELL_S
            self._store.wait([f"{topic}/judgement"], timedelta(seconds=rest_s))
            return json.loads(self._store.get(f"{topic}/judgement"))
        except (DistError, RuntimeError):
            raise PreflightError(f"preflight: rank 0 has left, says rank {self._ranks.rank}; its log says why") from None

    def leave(self, fault: str) -> NoReturn:
        """End on all ranks; on rank 0, with which the store ends, once the others have heard."""
        self._store.set(f"heard/{self._ranks.rank}", "")
        deadline, heard = time.monotonic() + _FAREWELL_S, [f"heard/{rank}" for rank in range(self._ranks.world)]
        while self._ranks.rank == 0 and time.monotonic() < deadline and not self._store.check(heard):
            time.sleep(0.05)
        raise PreflightError(f"preflight: {fault}")

    def _said(self, topic: str) -> dict[int, Any]:
        waiting, said = list(range(self._ranks.world)), dict[int, Any]()
        while waiting and time.monotonic() < self._until:
            here = [rank for rank in waiting if self._store.check([f"{topic}/{rank}"])]
            said |= {rank: json.loads(self._store.get(f"{topic}/{rank}")) for rank in here}
            waiting = [rank for rank in waiting if rank not in said]
            time.sleep(0.0 if here else 0.02)
        return said


class _Errand:
    """Work on a thread of its own, of which the end may never come."""

    def __init__(self, work: Callable[[], str], name: str = "") -> None:
        """Args: work: returns a fault, or nothing."""
        self._work, self._name, self._fault = work, name, ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fault(self, until: float) -> str:
        """What is wrong, or nothing, once the work is done or the time has come."""
        self._thread.join(max(until - time.monotonic(), 0.0))
        return (
            f"has not got an answer in time from {self._name}; see that it can be reached"
            if self._thread.is_alive()
            else self._fault
        )

    def _run(self) -> None:
        try:
            self._fault = self._work()
        except Exception as error:  # whatever it is, it is said and not raised on a thread
            log.info("preflight: %s", self._name, exc_info=error)
            self._fault = f"fails at {self._name}: {type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------------- a node by itself


def _errands(run: Run, stage: Stage, objects: Mapping[str, str], probes: Probes) -> dict[str, Callable[[], str]]:
    """By name, what the first rank of a node looks at."""
    room, trained = run.preflight.free_bytes, trainable(run.model, stage)
    # Weights, two moments and the averages.
    checkpoint = WIDE * (stage_parameters(run.model, stage).total + (2 + len(stage.ema)) * trained)
    caches = [run.data.cache.folder] if run.data.cache else []
    caches += [os.environ[name] for name in _CACHES if name in os.environ]
    return {
        **{name: partial(_unread, name, address, probes) for name, address in objects.items()},
        "the run's folder": partial(_unfit, Path(run.folder), room + checkpoint, probes, writes=True),
        **{f"the cache {cache}": partial(_unfit, Path(cache), room, probes) for cache in dict.fromkeys(caches)},
    }


def _unread(name: str, address: str, probes: Probes) -> str:
    try:
        probes.read(address)
    except UserError as error:
        return f"gets no {name}: {error}; see its network and its credentials"
    return ""


def _unfit(folder: Path, needed: int, probes: Probes, writes: bool = False) -> str:
    try:
        if writes:
            with tempfile.TemporaryFile(dir=folder):
                pass
        free = probes.free_bytes(folder)
    except OSError as error:
        return f"cannot use {folder}: {error.strerror}"
    if free < needed:
        left = f"has {free / 2**30:.2f} GiB left in {folder}, and needs {needed / 2**30:.2f}"
        return f"{left}; make room (preflight.free_bytes is the least)"
    return ""


# ------------------------------------------------------------------------------------------------------------- network


class _Network:
    """All-reduces between neighbours, and over all.

    Attributes: as in Findings.
    """

    def __init__(self, nodes: Sequence[str], ranks: Ranks, device: torch.device, probes: Probes) -> None:
        self._nodes, self._ranks, self._device, self._probes = nodes, ranks, device, probes
        self.bandwidths: dict[str, float] = {}
        self.wrong: dict[str, float] | None = {}
        self._groups: dict[str, tuple[Any, int]] = {}

    def measure(self, until: float) -> None:
        """Fill in what can be measured in time."""
        if self._ranks.world == 1:
            return
        own, self.wrong = self._nodes[self._ranks.rank], None
        pairs = [pair for turn in rounds(self._nodes) for pair in turn]
        others = [next((node for node in pair if node != own), own) for pair in pairs if own in pair]
        self.bandwidths = dict.fromkeys(others, 0.0)
        works = [partial(self._connect, pairs), *(partial(self._time, other) for other in others)]
        for done, work in enumerate(works):
            # A neighbour without an answer leaves time for the other one, and for the sum.
            share = (until - time.monotonic()) / (len(works) + 1 - done)
            _Errand(work, "the network").fault(time.monotonic() + share)
        _Errand(self._sum, "the network").fault(until)

    def _connect(self, pairs: Sequence[Sequence[str]]) -> str:
        """Make all groups before the first is used: what waits in one would keep the store from the next."""
        for pair in pairs:
            members = [rank for rank, node in enumerate(self._nodes) if node in pair]
            group = dist.new_group(members, timeout=GROUP_TIMEOUT)  # of all ranks, which number their groups
            if self._ranks.rank in members:
                own = self._nodes[self._ranks.rank]
                self._groups[next((node for node in pair if node != own), own)] = group, len(members)
        return ""

    def _time(self, other: str) -> str:
        """Bytes per second as a ring of n ranks sends them: 2 (n - 1) / n of the tensor."""
        group, members = self._groups[other]
        size = GPU_BYTES if self._device.type == "cuda" else CPU_BYTES
        numbers, best = torch.zeros(size // WIDE, device=self._device), float("inf")
        for turn in range(1 + TURNS):
            began = time.perf_counter()
            self._reduce(numbers, group)
            best = min(best, time.perf_counter() - began) if turn else best
        self.bandwidths[other] = 2 * (members - 1) / members * size / best
        dist.destroy_process_group(group)
        return ""

    def _sum(self) -> str:
        """Each rank sends its number, 1 and up, in a place of its own."""
        numbers = torch.zeros(self._ranks.world, device=self._device)
        numbers[self._ranks.rank] = self._ranks.rank + 1
        self._reduce(numbers, None)
        self.wrong = {str(rank): got for rank, got in enumerate(numbers.tolist()) if got != rank + 1}
        return ""

    def _reduce(self, numbers: torch.Tensor, group: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread starts with the first one
        self._probes.all_reduce(numbers, group=group)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Groups of nodes that are timed side by side, round by round: each node with both of its neighbours in a ring."""
    names = list(dict.fromkeys(nodes))
    if len(names) < 3:
        return [[tuple(names)]]
    pairs: list[tuple[str, ...]] = list(zip(names, [*names[1:], names[0]], strict=True))
    last = [pairs.pop()] if len(names) % 2 else []
    return [pairs[0::2], pairs[1::2], *([last] if last else [])]
