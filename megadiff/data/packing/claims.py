"""A folder belongs to one data set: before anything else a record of what the output depends on is written there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megadiff.config.errors import UserError
from megadiff.data.shards.shard import MANIFEST
from megadiff.storage import addresses, store

RECIPE, JOB = "recipe.json", ".units/job.json"
"""Names of that record: for data sets written in one go, and for those cut into units."""
TRAIN, HELD_OUT = "train", "held_out"


def claim(out: str, record: str, identity: Mapping[str, Any]) -> None:
    """Take a folder for a data set, or continue the data set that is there if it is the same.

    Args:
        out: a folder or an address, `train` and `held_out` inside it included.
        record: RECIPE or JOB.
        identity: what the output depends on, as JSON can hold it.

    Raises:
        UserError: `out` holds another data set, or the same made with other settings.
    """
    address, own = addresses.join(out, record), json.loads(json.dumps(identity))
    if not store.exists(address):
        stranger = next(_strangers(out, record), None)
        if stranger and not store.exists(address):  # else another process of the same job has been faster
            raise UserError(f"{out} holds another data set ({stranger}); name a new folder")
        store.write_bytes(address, (json.dumps(own, indent=1, ensure_ascii=False) + "\n").encode())
        return
    try:
        stored = dict(json.loads(store.read_bytes(address)))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{address} is damaged; delete {out} or name a new folder") from None
    differing = [key for key in sorted({*stored, *own}) if stored.get(key) != own.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {stored.get(key)} there, {own.get(key)} here" for key in differing[:4])
        raise UserError(f"{out} holds shards made with other settings ({shown}); name a new folder or delete it")


def _strangers(out: str, record: str) -> Iterator[str]:
    """Names that show that another data set is there."""
    yield from (name for name in (RECIPE, JOB) if name != record and store.exists(addresses.join(out, name)))
    for inside in ("", f"{TRAIN}/", f"{HELD_OUT}/"):
        folder = addresses.join(out, inside).rstrip("/")
        if not addresses.is_local(folder) or addresses.local_path(folder).is_dir():
            yield from (f"{inside}{name}" for name in store.list_names(folder) if name == MANIFEST or name.endswith(".tar"))
