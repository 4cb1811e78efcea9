"""Pictures with captions as tar shards: the part that all kinds of sources share.

A source names units of work and reads a unit's samples; a unit becomes shards, one row of them per bucket and side (train, held
out). A shard's content depends on the source and the options alone, not on processes, restarts or time.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from megadiff.config.errors import UserError
from megadiff.data import pictures
from megadiff.data.buckets import Bucket, Buckets
from megadiff.data.errors import DataError, picture_fault
from megadiff.data.packing.claims import HELD_OUT, TRAIN
from megadiff.data.packing.source import (
    NO_CAPTION,
    NOT_ENCODED,
    TOO_SMALL,
    UNREACHABLE,
    UNREADABLE,
    Encoded,
    LeaveOut,
    LeftOut,
    Raw,
    Source,
    clean,
    hashed,
    key_of,
)
from megadiff.data.packing.units import Done, run_units
from megadiff.data.shards.shard import Manifest, Members, ShardEntry, write_manifest, write_shard
from megadiff.data.threads import in_order
from megadiff.storage import addresses

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Endings of the pictures that are written, with Pillow's names for the formats."""

_NAMED = 20
_LONGEST = 1000
"""Letters kept of each entry about a left-out sample: a cell that is no address may be a whole picture in base64."""
_HOPELESS = 20
_SHARDS_PER_UNIT = 8
_IN_MEMORY_BYTES = 256 * 2**20
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Transformed:
    """The samples written in place of a shard's samples, by the same keys, and the reasons for those left out, by key."""

    samples: Mapping[str, Members]
    left_out: Mapping[str, str]


Transform = Callable[[Mapping[str, Members], "Bucket | None"], Transformed]
"""A function of a shard's samples by key and their bucket."""


@dataclass(frozen=True)
class Packing:
    """How samples are written.

    Attributes:
        shard_samples: most samples in a shard.
        buckets: shards hold pictures of one bucket each; None for one row of shards.
        size_px: pictures with a longer shorter edge are scaled down to it; None leaves their bytes as they are.
        format, quality: for pictures that are encoded again.
        min_size_px: pictures with a shorter edge are left out.
        held_out_share: share of the samples that are held out, chosen by a hash of the key.
    """

    shard_samples: int = 1000
    buckets: Buckets | None = None
    size_px: int | None = None
    format: str = "jpg"
    quality: int = 95
    min_size_px: int = 1
    held_out_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_share < 1:
            raise UserError(f"held_out_share ({self.held_out_share}) must be a share from 0 to below 1")
        if self.format not in FORMATS:
            raise UserError(f"format {self.format} is unknown; known: {', '.join(FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality ({self.quality}) must lie between 1 and 100")
        if self.shard_samples < 1:
            raise UserError(f"shard_samples ({self.shard_samples}) must be 1 or more")

    def record(self) -> dict[str, Any]:
        """The options, as JSON can hold them."""
        buckets = None if self.buckets is None else [str(bucket) for bucket in self.buckets.buckets]
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "buckets": buckets}


@dataclass(frozen=True)
class PackedSample:
    """A sample that can be written; `source` as in `Raw`."""

    key: str
    source: str
    members: Members
    bucket: Bucket | None


def pack(
    source: Source,
    out: str,
    packing: Packing,
    *,
    transform: Transform | None = None,
    identity: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Manifest | None:
    """Write a source as shards under `out` (with a held-out share: `out`/train and `out`/held_out), each unit once.

    Args:
        transform: applied to the samples of every shard before it is written.
        identity: what `transform` depends on.
        facts: go into the manifests beside the kind of source and the counts.

    Returns:
        The manifest of all shards on rank 0, which waits for the others; None elsewhere.

    Raises:
        UserError: the source is at fault, `out` holds something else, or not one sample is left, in all or on one side; or the
            source is encoded, and something is to be done to its pictures.
    """
    plain = Packing(shard_samples=packing.shard_samples, held_out_share=packing.held_out_share)
    if source.kind == "paper" and (transform is not None or packing != plain):
        raise UserError("a source of kind paper is encoded already; leave out what pictures are scaled, chosen and encoded by")
    job = {"source": source.kind, **source.identity, **packing.record(), **(identity or {})}
    all_facts = {"source_kind": source.kind, **(facts or {})}
    manifest = run_units(
        out,
        source.names,
        lambda unit: _make(source, unit, out, packing, transform),
        identity=job,
        facts=all_facts,
        rank=rank,
        world=world,
        label=source.kind,
        publish=not packing.held_out_share,
    )
    if manifest is None:
        return None
    if manifest.samples == 0:
        raise DataError(f"not one sample of the {len(source.names)} units could be written{_reasons(manifest)}")
    if packing.held_out_share:
        _split(out, manifest, packing.held_out_share)
    return manifest


def scratch_of(out: str, folder: str | None) -> Path:
    """This job's own folder for downloads that are not used yet; a restart gets the same one."""
    if folder is None and addresses.is_local(out):
        return addresses.local_path(out) / ".scratch"
    return Path(folder or tempfile.gettempdir()) / f"megadiff-pack-{os.getuid()}-{hashed(out.rstrip('/'), 6)}"


def unit_samples(packing: Packing) -> int:
    """Samples per unit: several shards' worth if they are dealt to several rows, so that few shards are small."""
    return packing.shard_samples * (_SHARDS_PER_UNIT if packing.buckets or packing.held_out_share else 1)


# ------------------------------------------------------------------------------------------------------------ a sample


def prepare(raw: Raw | Encoded, packing: Packing) -> PackedSample | LeftOut:
    """A sample's members and bucket, or why it is left out."""
    if isinstance(raw, Encoded):
        try:
            return PackedSample(key_of(raw.origin), raw.source, raw.read(), None)
        except LeaveOut as fault:
            return LeftOut(raw.source, *fault.args)
    captions = clean(raw.captions)
    if not captions:
        return LeftOut(raw.source, NO_CAPTION)
    try:
        ending, data, height, width = _picture(raw.read(), packing)
    except LeaveOut as fault:
        return LeftOut(raw.source, *fault.args)
    facts = {"captions": captions, "width": width, "height": height, "source": raw.source}
    bucket = None if packing.buckets is None else packing.buckets.of(height, width)
    members = {ending: data, "json": json.dumps(facts, ensure_ascii=False).encode()}
    return PackedSample(key_of(raw.origin), raw.source, members, bucket)


def _picture(data: bytes, packing: Packing) -> tuple[str, bytes, int, int]:
    """(ending, bytes, height, width) as written; height and width as a viewer shows it. Raises LeaveOut."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = pictures.shown_size(picture)
            short = min(height, width)
            if short < packing.min_size_px:
                raise LeaveOut(TOO_SMALL, f"{width} x {height} px")
            ending = _ENDINGS.get(picture.format or "")
            if packing.size_px is None or short <= packing.size_px:
                if ending is not None:
                    # Decoded only to see that it is whole: an eighth of a JPEG is faster and reads it to its end as well.
                    picture.draft(None, (1, 1))
                    picture.load()
                    return ending, data, height, width
                whole = pictures.plain(picture)
                return "png", _encoded(whole, "png", packing.quality), whole.height, whole.width
            factor = packing.size_px / short
            size = (max(1, round(width * factor)), max(1, round(height * factor)))
            # The decoder may scale a JPEG down to no less than twice the size; the rest is ours.
            picture.draft(None, (2 * max(size), 2 * max(size)))
            scaled = pictures.plain(picture).resize(size, Image.Resampling.LANCZOS)
            return packing.format, _encoded(scaled, packing.format, packing.quality), scaled.height, scaled.width
    except pictures.UNREADABLE as error:
        raise LeaveOut(UNREADABLE, picture_fault(error)) from None


def _encoded(picture: Image.Image, format: str, quality: int) -> bytes:
    if format == "jpg" and picture.mode == "RGBA":
        picture = pictures.flat(picture)
    picture.info.clear()  # Pillow keeps the colour profile in some formats only, and a CMYK profile even on RGB.
    buffer = io.BytesIO()
    picture.save(buffer, FORMATS[format], **({} if format == "png" else {"quality": quality}))
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- a unit


class _Waiting(NamedTuple):
    """A sample whose members lie in a file at (start, size) until its shard is full."""

    key: str
    source: str
    places: Mapping[str, tuple[int, int]]


@dataclass
class _Row:
    """Shards of one side and bucket."""

    bucket: Bucket | None
    prefix: str
    waiting: list[_Waiting]
    written: int = 0


def _make(source: Source, unit: int, out: str, packing: Packing, transform: Transform | None) -> Done:
    counts: Counter[str] = Counter()
    left: list[LeftOut] = []
    rows: dict[tuple[str, Bucket | None], _Row] = {}
    entries: list[ShardEntry] = []
    keys: set[str] = set()

    def flush(row: _Row) -> None:
        samples: Mapping[str, Members] = {
            sample.key: {ending: _read(spill, *place) for ending, place in sample.places.items()} for sample in row.waiting
        }
        if transform is not None:
            transformed = transform(samples, row.bucket)
            samples = transformed.samples
            for sample in row.waiting:
                if sample.key not in samples:
                    counts["written"] -= 1
                    counts[f"left out: {NOT_ENCODED}"] += 1
                    left.append(LeftOut(sample.source, NOT_ENCODED, transformed.left_out[sample.key]))
        if samples:
            bucket = None if row.bucket is None else str(row.bucket)
            entries.append(write_shard(out, f"{row.prefix}{row.written:03d}.tar", samples, bucket))
            row.written += 1
        row.waiting.clear()

    def work(sample: Raw | Encoded | LeftOut) -> PackedSample | LeftOut:
        return sample if isinstance(sample, LeftOut) else prepare(sample, packing)

    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as spill:
        for sample in in_order(source.samples(unit), work, source.threads):
            if isinstance(sample, PackedSample) and sample.key in keys:
                sample = LeftOut(sample.source, "key twice", f"an earlier sample has the key {sample.key}")
            if isinstance(sample, LeftOut):
                counts[f"left out: {sample.reason}"] += 1
                left.append(sample)
                continue
            keys.add(sample.key)
            side = _side(sample.key, packing.held_out_share)
            counts["written"] += 1
            row = rows.setdefault((side, sample.bucket), _row(side, source.names[unit], sample.bucket))
            places = {ending: _append(spill, data) for ending, data in sample.members.items()}
            row.waiting.append(_Waiting(sample.key, sample.source, places))
            if len(row.waiting) == packing.shard_samples:
                flush(row)
        for row in rows.values():
            if row.waiting:
                flush(row)
    _check_reachable(counts, left, source.names[unit])
    return Done(tuple(entries), dict(counts), tuple(_first_of_each(left)))


def _row(side: str, unit: str, bucket: Bucket | None) -> _Row:
    return _Row(bucket, f"{side}{unit}-" if bucket is None else f"{side}{unit}-{bucket}-", [])


def _side(key: str, share: float) -> str:
    if not share:
        return ""
    return f"{HELD_OUT if int(hashed(key, 8), 16) / 2**64 < share else TRAIN}/"


def _check_reachable(counts: Counter[str], left: Sequence[LeftOut], name: str) -> None:
    """Some addresses are always dead; if all are, the network is."""
    failed = counts[f"left out: {UNREACHABLE}"]
    if failed >= _HOPELESS and not counts["written"]:
        last = next(entry.detail for entry in reversed(left) if entry.reason == UNREACHABLE)
        raise DataError(f"not one of {failed} pictures of unit {name} could be fetched ({last}); start again once they can be")


def _first_of_each(left: Iterable[LeftOut]) -> Iterator[dict[str, str]]:
    seen: Counter[str] = Counter()
    for entry in left:
        seen[entry.reason] += 1
        if seen[entry.reason] <= _NAMED:
            yield {name: addresses.printable(value)[:_LONGEST] for name, value in asdict(entry).items() if value}


def _append(file: Any, data: bytes) -> tuple[int, int]:
    start = file.seek(0, os.SEEK_END)
    file.write(data)
    return start, len(data)


def _read(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return bytes(file.read(size))


# ---------------------------------------------------------------------------------------------------------- the output


def _split(out: str, manifest: Manifest, share: float) -> None:
    """Write a manifest per side. Raises DataError if a side is empty."""
    for side in (TRAIN, HELD_OUT):
        inside = [entry for entry in manifest.shards if entry.name.startswith(f"{side}/")]
        if not inside:
            raise DataError(
                f"a held_out_share of {share:g} leaves no sample of {manifest.samples} on the side of {side}; give another "
                "one, and a new folder"
            )
        shards = tuple(replace(entry, name=entry.name.removeprefix(f"{side}/")) for entry in inside)
        write_manifest(addresses.join(out, side), Manifest(shards, {"split": side, **manifest.facts}))


def left_out(manifest: Manifest) -> dict[str, int]:
    """Numbers of left-out samples, by reason."""
    counts: Mapping[str, int] = manifest.facts.get("counts", {})
    return {name.removeprefix("left out: "): count for name, count in counts.items() if name.startswith("left out: ")}


def _reasons(manifest: Manifest) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out(manifest).items())
    return f" (left out: {reasons})" if reasons else ""
