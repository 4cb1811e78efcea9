"""Work cut into units, each done once, over any number of processes, through kills and restarts.

A finished unit has a record under OUT/.units/, written after its shards. A restarted process skips units with a record; a unit
killed before its record is made again, with the same bytes under the same names.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from megadiff.data.packing.claims import JOB, claim
from megadiff.data.shards.shard import Manifest, ShardEntry, write_manifest
from megadiff.storage import addresses, store

UNITS, LEFT_OUT = JOB.rpartition("/")[0], "left_out.jsonl"
_POLL_S = 1.0
_NAMED = 1000
"""Samples named in left_out.jsonl for each reason."""


@dataclass(frozen=True)
class Done:
    """The result of making one unit.

    Attributes:
        shards: their names are relative to the output folder.
        counts: summed over all units in the manifest.
        left_out: samples left out, with the reasons; they go to left_out.jsonl.
    """

    shards: tuple[ShardEntry, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[Mapping[str, str], ...] = ()


def run_units(
    out: str,
    names: Sequence[str],
    make: Callable[[int], Done],
    *,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
    label: str = "shards",
    publish: bool = True,
) -> Manifest | None:
    """Make every unit of this process (`names[rank::world]`) that is not done.

    Args:
        out: a folder or an address.
        names: stable over restarts, each once, of letters, digits, - and _.
        identity: everything that the output depends on; it must be that of the units already there.
        facts: go into the manifest.
        label: the progress bar's name.
        publish: write the manifest; if false, the caller does.

    Returns:
        The manifest, on rank 0, which waits for all the others; None on the others.

    Raises:
        UserError: `out` holds another data set, or what `make` raises.
    """
    if bad := [name for name in names if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise ValueError(f"names of units must be plain words: {bad[0]!r}")
    if len(set(names)) != len(names):
        raise ValueError("names of units must differ")
    records = addresses.join(out, UNITS)
    claim(out, JOB, identity)
    done = _done(records)
    mine = [number for number in range(rank, len(names), world) if names[number] not in done]
    with tqdm(desc=label, unit="unit", total=len(names[rank::world]), disable=None) as bar:
        bar.update(bar.total - len(mine))
        for number in mine:
            record = asdict(make(number))
            store.write_bytes(addresses.join(records, f"{names[number]}.json"), json.dumps(record).encode())
            bar.update()
    if rank:
        return None
    _wait(records, set(names), world)
    manifest = _merge(out, records, names, facts or {})
    if publish:
        write_manifest(out, manifest)
    return manifest


def _done(records: str) -> set[str]:
    names = {name.removesuffix(".json") for name in store.list_names(records) if name.endswith(".json")}
    return names - {JOB.removeprefix(f"{UNITS}/").removesuffix(".json")}


def _wait(records: str, names: set[str], world: int) -> None:
    """Wait until every unit has a record; other processes write them."""
    missing = len(names - _done(records)) if world > 1 else 0
    with tqdm(desc="other processes", unit="unit", total=missing, disable=None if missing else True) as bar:
        while missing:
            time.sleep(_POLL_S)
            left = len(names - _done(records))
            bar.update(missing - left)
            missing = left


def _merge(out: str, records: str, names: Iterable[str], facts: Mapping[str, Any]) -> Manifest:
    shards: list[ShardEntry] = []
    counts: Counter[str] = Counter()
    left_out: list[Mapping[str, str]] = []
    for name in names:
        record = json.loads(store.read_bytes(addresses.join(records, f"{name}.json")))
        shards += [ShardEntry(**entry) for entry in record["shards"]]
        counts.update(record["counts"])
        left_out += record["left_out"]
    manifest = Manifest(tuple(shards), {**facts, **({"counts": dict(sorted(counts.items()))} if counts else {})})
    if left_out:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in _first_of_each_reason(left_out))
        store.write_bytes(
            addresses.join(out, LEFT_OUT), lines.encode("utf-8", "backslashreplace")
        )  # half a pair as JSON has it
    return manifest


def _first_of_each_reason(left_out: Iterable[Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
    named: Counter[str] = Counter()
    for entry in left_out:
        named[entry["reason"]] += 1
        if named[entry["reason"]] <= _NAMED:
            yield entry
