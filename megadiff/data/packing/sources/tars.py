"""Existing tars in WebDataset's layout, such as img2dataset's: jpg, txt and json with a `caption`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.data.errors import DataError
from megadiff.data.packing.source import NO_PICTURE, LeftOut, Raw, captions_in, clean, expand, unit_name
from megadiff.data.pictures import PICTURE_ENDINGS
from megadiff.data.shards.shard import Members, Shard, is_tar, tars_in
from megadiff.files import locked
from megadiff.storage import addresses, store

Captions = Callable[[str, Members], Sequence[Any]]
"""A function that gives the captions of a sample, from its key and its members."""


class TarsSource:
    """A unit is a tar; remote ones are downloaded to `scratch`, and deleted once they are done."""

    kind = "tars"
    threads = 1

    def __init__(self, sources: Sequence[str], scratch: Path) -> None:
        """Raises UserError if there are no tars, or two with one name."""
        self.tars = [address for source in sources for address in tars_of(source)]
        self.origins = origins_of(self.tars)
        self.names = [unit_name(origin) for origin in self.origins]
        self.identity: dict[str, Any] = {}
        self.scratch = scratch

    def samples(self, unit: int) -> Iterator[Raw | LeftOut]:
        address = self.tars[unit]
        if addresses.is_local(address):
            yield from samples_of(Shard(address, _existing(address)), self.origins[unit], captions_of)
            return
        with fetched(address, self.scratch / f"{self.names[unit]}.tar") as path:
            yield from samples_of(Shard(address, path), self.origins[unit], captions_of)


def tars_of(source: str) -> list[str]:
    """The tars that a pattern, an address or a folder stands for. Raises DataError if there are none, or a compressed one."""
    tars: list[str] = []
    for address in expand(source):
        tars += [address] if is_tar(address) else [addresses.join(address, name) for name in tars_in(address)]
    return tars


def origins_of(files: Sequence[str]) -> list[str]:
    """The shortest ends by which the addresses differ: a data set that moves keeps its keys."""
    if len(set(files)) < len(files):
        twice = next(address for address in files if files.count(address) > 1)
        raise UserError(f"{twice} is named twice")
    parts = [address.split("/") for address in files]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    raise UserError(f"two of the sources are the same: {', '.join(files[:2])}")


@contextmanager
def fetched(address: str, path: Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A distant tar as a local file, which is deleted after its use; a killed process leaves it for the next start.

    Raises:
        StorageError: it cannot be had. What `check` raises, after the file was deleted.
    """
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            store.download(address, path)
        if check is not None:
            try:
                check(path)
            except DataError:
                path.unlink()
                raise
        try:
            yield path
        except DataError:
            path.unlink(missing_ok=True)  # The next start must not reuse a damaged file.
            raise
        path.unlink(missing_ok=True)


def samples_of(shard: Shard, origin: str, captions: Captions) -> Iterator[Raw | LeftOut]:
    """Every sample of a tar; `origin` names the tar."""
    for offset in range(len(shard)):
        key = shard.key(offset).removeprefix("./")
        members = shard.members(offset)
        source = addresses.printable(f"{origin}/{key}")
        picture = picture_in(members)
        if picture is None:
            yield LeftOut(source, NO_PICTURE, f"its members are {', '.join(sorted(members))}"[:200])
        else:
            yield Raw(f"{origin}/{key}", source, captions(key, members), partial(members.__getitem__, picture))


def picture_in(members: Members) -> str | None:
    """The member that is the picture: .jpg, or else .image.jpg."""
    exact = [ending for ending in PICTURE_ENDINGS if ending in members]
    return next(iter(exact or [name for name in sorted(members) if name.rpartition(".")[2] in PICTURE_ENDINGS]), None)


def captions_of(_: str, members: Members) -> Sequence[Any]:
    """The captions of the json member (`captions` or `caption`), else the whole txt member."""
    try:
        captions = clean(captions_in(json.loads(members["json"]))) if "json" in members else []
    except (ValueError, RecursionError):
        captions = []
    return captions or [members.get("txt", b"").decode("utf-8-sig", "replace")]


def _existing(address: str) -> Path:
    path = addresses.local_path(address)
    if not os.access(path, os.R_OK) or not path.is_file():
        raise DataError(f"{address} does not exist or cannot be read; mend the name or take it out")
    return path
