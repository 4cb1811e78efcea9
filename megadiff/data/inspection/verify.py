"""Whether a data set is what its manifest says: every shard, and with `decode` every member."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadiff.data.codecs.base import array_of
from megadiff.data.errors import SampleError, in_one_line
from megadiff.data.inspection.show import kind_of, load_picture
from megadiff.data.pictures import PICTURE_ENDINGS
from megadiff.data.shards import tar
from megadiff.data.shards.shard import TAR, Manifest, Shard, ShardEntry, place_of, read_manifest
from megadiff.data.threads import in_order
from megadiff.storage import addresses, store
from megadiff.storage.errors import MissingError, StorageError


class Kind(StrEnum):
    """Kinds of faults."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    SIZE = "another size"
    CORRUPT = "corrupt"
    SAMPLES = "another number of samples"
    DUPLICATE = "duplicate"
    UNLISTED = "not listed"
    INCOMPLETE = "incomplete"
    DAMAGED = "damaged member"


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, its object, and the details."""

    kind: Kind
    object: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.object}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """The result of comparing shards with their manifest.

    Attributes:
        shards, samples, bytes: as listed.
        counts: faults by kind, without zeros.
        faults: the first ones of each kind, or all.
        note: what could not be checked; empty if everything was.
    """

    address: str
    shards: int
    samples: int
    bytes: int
    counts: dict[Kind, int]
    faults: tuple[Fault, ...]
    note: str = ""

    @property
    def whole(self) -> bool:
        return not self.counts


def verify(
    address: str,
    *,
    quick: bool = False,
    decode: bool = False,
    workers: int = 8,
    keep: int | None = None,
    report: Callable[[Fault], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare shards with their manifest. Faults come in the manifest's order, whatever the number of workers.

    Args:
        quick: presence and sizes alone; no shard is read.
        decode: open every picture, array and text.
        workers: shards at once, each of them whole in memory.
        keep: most faults of each kind in the result; None keeps all.
        report: called for each fault as soon as it is found.
        progress: called with the number of shards done and of all.

    Raises:
        StorageError, DataError: the manifest itself cannot be read.
    """
    manifest = read_manifest(address)
    folder = addresses.folder_of(address)
    faults = _Faults(keep, report)
    for fault in _listed_twice(folder, manifest):
        faults.add(fault)
    note = ""
    try:
        for fault in _unlisted(folder, manifest):
            faults.add(fault)
    except StorageError as error:
        note = f"tars that the manifest does not list were not looked for: {error}"
    entries = list({entry.name: entry for entry in manifest.shards}.values())
    contents = _Contents(folder)
    checks = in_order(entries, lambda entry: _check(addresses.join(folder, entry.name), entry, quick, decode), workers)
    for done, (entry, checked) in enumerate(zip(entries, checks, strict=True), 1):
        for fault in checked.faults:
            faults.add(fault)
        contents.add(entry, checked)
        if progress:
            progress(done, len(entries))
    for fault in (*contents.duplicates(), *contents.incomplete()):
        faults.add(fault)
    size = sum(entry.bytes for entry in manifest.shards)
    kept = tuple(faults.kept)
    return Verification(address, len(manifest.shards), manifest.samples, size, dict(faults.counts), kept, note)


class _Faults:
    """Faults, counted and reported; at most `keep` of each kind stay."""

    def __init__(self, keep: int | None, report: Callable[[Fault], None] | None) -> None:
        self.keep, self.report = keep, report
        self.counts: Counter[Kind] = Counter()
        self.kept: list[Fault] = []

    def add(self, fault: Fault) -> None:
        fault = replace(fault, object=addresses.printable(fault.object), detail=addresses.printable(fault.detail))
        self.counts[fault.kind] += 1
        if self.keep is None or self.counts[fault.kind] <= self.keep:
            self.kept.append(fault)
        if self.report:
            self.report(fault)


# --------------------------------------------------------------------------------------------------------- the manifest


def _listed_twice(folder: str, manifest: Manifest) -> Iterator[Fault]:
    names: dict[str, ShardEntry] = {}
    hashes: dict[str, str] = {}
    for entry in manifest.shards:
        address = _shown(folder, entry.name)
        if entry.name in names:
            alike = "alike" if names[entry.name] == entry else "with other numbers"
            yield Fault(Kind.DUPLICATE, address, f"the manifest lists it twice, {alike}")
        elif entry.sha256 in hashes:
            yield Fault(Kind.DUPLICATE, address, f"the manifest lists the same hash for {hashes[entry.sha256]}")
        names.setdefault(entry.name, entry)
        hashes.setdefault(entry.sha256, entry.name)


def _unlisted(folder: str, manifest: Manifest) -> Iterator[Fault]:
    """Tars beside those listed. Raises StorageError where a folder cannot be listed."""
    if addresses.is_url(folder):
        raise StorageError(f"{addresses.shown(folder)} cannot be listed over HTTP")
    listed = {entry.name for entry in manifest.shards}
    for inside in sorted({"", *(name.rpartition("/")[0] for name in listed)}):
        place = addresses.join(folder, inside) if inside else folder
        if addresses.is_local(place) and not addresses.local_path(place).is_dir():
            continue  # its shards are missing: each of them is a fault
        for name in store.list_names(place):
            whole = f"{inside}/{name}" if inside else name
            if name.lower().endswith(TAR) and whole not in listed:
                yield Fault(Kind.UNLISTED, _shown(folder, whole), "lies there, and the manifest does not list it")


# ------------------------------------------------------------------------------------------------------------- a shard


@dataclass(frozen=True)
class _Checked:
    """The result of checking one shard.

    Attributes:
        keys: its samples' keys, or None if it could not be opened.
        members: the sorted endings of each sample.
    """

    faults: list[Fault] = field(default_factory=list)
    keys: list[str] | None = None
    members: list[tuple[str, ...]] = field(default_factory=list)


def _check(address: str, entry: ShardEntry, quick: bool, decode: bool) -> _Checked:
    name = addresses.shown(address)
    try:
        size = store.size(address)
        if size != entry.bytes:
            kind = Kind.TRUNCATED if size < entry.bytes else Kind.SIZE
            return _Checked([Fault(kind, name, f"it has {size:,} bytes, and the manifest says {entry.bytes:,}")])
        return _Checked() if quick else _check_body(name, store.read_whole(address), entry, decode)
    except MissingError:
        return _Checked([Fault(Kind.MISSING, name, "the manifest lists it, and it is not there")])
    except StorageError as error:
        return _Checked([Fault(Kind.UNREADABLE, name, str(error))])


def _check_body(name: str, data: memoryview, entry: ShardEntry, decode: bool) -> _Checked:
    reasons = []
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        reasons.append(f"its sha256 is {digest[:12]}..., and the manifest says {str(entry.sha256)[:12]}...")
    names = None
    try:
        names = [member.name for member in tar.index(data)]
    except tar.KindError as error:
        reasons.append(f"its member {error}")
    except ValueError as error:
        reasons.append(f"no whole tar ({error})")
    faults = [Fault(Kind.CORRUPT, name, "; ".join(reasons))] if reasons else []
    if names is None:
        return _Checked(faults)
    shard = Shard(name, data)
    if len(shard) != entry.samples:
        detail = f"it holds {len(shard):,} samples, and the manifest says {entry.samples:,}"
        faults.append(Fault(Kind.SAMPLES, name, detail))
    views = [shard.views(place) for place in range(len(shard))]
    places = Counter(place for member in names if (place := place_of(member)))
    for (key, ending), count in places.items():
        if count > 1:
            faults.append(Fault(Kind.DUPLICATE, f"{name} {key}.{ending}", "the tar holds this member more than once"))
    keys = [shard.key(place) for place in range(len(shard))]
    if decode:
        for key, sample in zip(keys, views, strict=True):
            for ending, content in sorted(sample.items()):
                if reason := undecodable(ending, bytes(content)):
                    faults.append(Fault(Kind.DAMAGED, f"{name} {key}.{ending}", reason))
    return _Checked(faults, keys, [tuple(sorted(sample)) for sample in views])


def undecodable(ending: str, content: bytes) -> str:
    """Why a member cannot be decoded; empty if it can be, or if its kind is not checked."""
    kind = kind_of(ending)
    try:
        if kind in PICTURE_ENDINGS:
            load_picture(content)
        elif kind == "npy":
            values = array_of({ending: content}, ending)
            if values.dtype.kind in "fc" and not np.isfinite(values).all():
                return f"{int((~np.isfinite(values)).sum()):,} of its {values.size:,} numbers are not finite"
        elif kind == "json":
            json.loads(content.decode("utf-8-sig"))
        elif kind == "txt":
            content.decode("utf-8")
    except SampleError as error:
        return str(error)
    except UnicodeDecodeError as error:
        return f"it is no text in UTF-8: {error}"
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {in_one_line(error)}"
    return ""


# ----------------------------------------------------------------------------------------------------------- all shards


class _Contents:
    """Keys and members of all samples, about 10 bytes per sample, compared over shards at the end."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._hashes: set[str] = set()
        self._shards: list[str] = []
        self._keys: list[bytes] = []
        self._digests: list[NDArray[np.uint64]] = []
        self._members: dict[tuple[str, ...], int] = {}
        self._numbers: list[NDArray[Any]] = []

    def add(self, entry: ShardEntry, checked: _Checked) -> None:
        """Take a shard's samples, unless the same shard was taken under another name."""
        if checked.keys is None or entry.sha256 in self._hashes:
            return
        self._hashes.add(entry.sha256)
        self._shards.append(entry.name)
        encoded = [key.encode("utf-8", "surrogateescape") for key in checked.keys]
        self._keys.append(zlib.compress(b"\0".join(encoded)))
        digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in encoded)
        self._digests.append(np.frombuffer(digests, dtype=np.uint64))
        numbers = [self._members.setdefault(members, len(self._members)) for members in checked.members]
        self._numbers.append(np.array(numbers, dtype=np.min_scalar_type(len(self._members))))

    def duplicates(self) -> Iterator[Fault]:
        """Keys that an earlier shard has as well."""
        if not self._shards:
            return
        digests = np.concatenate(self._digests)
        order = np.argsort(digests, kind="stable")
        alike = np.flatnonzero(np.diff(digests[order]) == 0)
        first_in: dict[str, str] = {}
        for shard, key in self._at(np.unique(np.concatenate([order[alike], order[alike + 1]]))):
            if key in first_in:
                detail = f"{_shown(self.folder, first_in[key])} has a sample of this key as well"
                yield Fault(Kind.DUPLICATE, f"{_shown(self.folder, shard)} {key}", detail)
            first_in.setdefault(key, shard)

    def incomplete(self) -> Iterator[Fault]:
        """Samples without a member that more than half of all have."""
        counts: Counter[str] = Counter()
        samples = np.zeros(len(self._members), dtype=np.int64)
        for numbers in self._numbers:
            samples += np.bincount(numbers, minlength=len(self._members))
        for members, number in self._members.items():
            counts.update(dict.fromkeys(members, int(samples[number])))
        total = int(samples.sum())
        usual = {ending for ending, count in counts.items() if 2 * count > total}
        lacking = {number: sorted(usual - set(members)) for members, number in self._members.items() if usual - set(members)}
        if not lacking:
            return
        places = np.flatnonzero(np.isin(np.concatenate(self._numbers), list(lacking)))
        everything = np.concatenate(self._numbers)
        for place, (shard, key) in zip(places.tolist(), self._at(places), strict=True):
            missing = lacking[int(everything[place])]
            shares = ", ".join(f".{ending} (as {counts[ending]:,} of {total:,} samples have)" for ending in missing)
            yield Fault(Kind.INCOMPLETE, f"{_shown(self.folder, shard)} {key}", f"it has no {shares}")

    def _at(self, places: NDArray[np.intp]) -> Iterator[tuple[str, str]]:
        """(shard, key) of ascending places over all samples."""
        ends = np.cumsum([len(numbers) for numbers in self._numbers])
        opened, keys = -1, list[str]()
        for place in places.tolist():
            shard = int(np.searchsorted(ends, place, side="right"))
            if shard != opened:
                opened, keys = shard, _keys(self._keys[shard])
            yield self._shards[shard], keys[place - int(ends[shard]) + len(keys)]


def _keys(packed: bytes) -> list[str]:
    return [key.decode("utf-8", "surrogateescape") for key in zlib.decompress(packed).split(b"\0")]


def _shown(folder: str, name: str) -> str:
    return addresses.shown(addresses.join(folder, name))
