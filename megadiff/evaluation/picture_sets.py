"""Sets of pictures that are compared: a folder of files, the samples that `megadiff sample` wrote, or tar shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.config.errors import UserError
from megadiff.data import pictures
from megadiff.data.errors import picture_fault
from megadiff.data.pictures import PICTURE_ENDINGS, UNREADABLE
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import MANIFEST, read_manifest
from megadiff.evaluation.features import Extractor, Features, Pixels
from megadiff.evaluation.pieces import Piece, Pieces, key_of
from megadiff.generation.writing import RECORDS
from megadiff.storage import addresses, store

PER_PIECE = 256
"""Pictures whose features are computed and kept together."""
AT_ONCE = 32


@dataclass(frozen=True)
class PictureSet:
    """Pictures by number.

    Attributes:
        identities: of each what changes if it does, without reading it: name, size and time of a file, hash of a shard.
        read: the contents of a picture's file.
        square: whether they are cropped to their middle square, as training crops them for a square grid.
    """

    source: str
    identities: Sequence[str]
    read: Callable[[int], bytes]
    square: bool = False

    def __len__(self) -> int:
        return len(self.identities)

    def pixels(self, number: int, data: bytes) -> Pixels:
        """A picture as RGB on white, turned upright. Raises UserError if it cannot be read."""
        try:
            picture = pictures.flat(pictures.open_picture(data))
        except UNREADABLE as error:
            name = self.identities[number]
            raise UserError(f"{self.source}: {name} cannot be read as a picture: {picture_fault(error)}") from None
        if self.square:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        return np.array(picture)


def features_of(pictures: PictureSet, extractor: Extractor, pieces: Pieces) -> tuple[Features, str] | None:
    """The features [N, D] of a set and a hash of its pictures, on rank 0; None on the others."""
    keys = []
    for start in range(0, len(pictures), PER_PIECE):
        own = {"pictures": list(pictures.identities[start : start + PER_PIECE]), "square": pictures.square}
        keys.append(key_of({**extractor.depends, **own}))
    found = pieces.gather(keys, partial(piece_of, pictures, extractor))
    return None if found is None else joined(found)


def piece_of(pictures: PictureSet, extractor: Extractor, number: int) -> Piece:
    """The features of the PER_PIECE pictures of that number, and a hash of their files."""
    digest, parts = hashlib.sha256(), []
    for start in range(number * PER_PIECE, min((number + 1) * PER_PIECE, len(pictures)), AT_ONCE):
        stop = min(start + AT_ONCE, (number + 1) * PER_PIECE, len(pictures))
        files = [pictures.read(index) for index in range(start, stop)]
        for file in files:
            digest.update(hashlib.sha256(file).digest())
        parts.append(extractor([pictures.pixels(start + place, file) for place, file in enumerate(files)]))
    return {"features": np.concatenate(parts), "digest": np.frombuffer(digest.digest(), np.uint8)}


def joined(found: Sequence[Piece]) -> tuple[Features, str]:
    """The features [N, D] of all pieces in order, and a hash of all pictures."""
    digests = hashlib.sha256(b"".join(piece["digest"].tobytes() for piece in found)).hexdigest()
    return np.concatenate([piece["features"] for piece in found]), digests


def open_pictures(address: str, *, square: bool = False) -> PictureSet:
    """The pictures at an address: samples if the folder has their records, shards if it has a manifest, else all files.

    Raises:
        UserError: there are none.
    """
    if addresses.is_json(address) or store.exists(addresses.join(address, MANIFEST)):
        return _in_shards(address, square)
    folder = Path(address)
    if not folder.is_dir():
        raise UserError(f"{address} is no folder of pictures")
    if (folder / RECORDS).exists():
        names = [name for record in records_in(folder) if (name := generated_picture(record))]
    else:
        visible = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix[1:].lower() in PICTURE_ENDINGS)
        names = sorted(str(path) for path in visible if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise UserError(f"{address} holds no pictures ({', '.join(PICTURE_ENDINGS)})")
    stats = [(folder / name).stat() for name in names]
    identities = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(names, stats, strict=True)]
    return PictureSet(address, identities, lambda number: (folder / names[number]).read_bytes(), square)


def records_in(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder of samples."""
    return [json.loads(line) for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines()]


def generated_picture(record: Mapping[str, Any]) -> str | None:
    """The file of the picture that was generated for a record; None if none was."""
    return next((entry["picture"] for entry in record["generated"].values() if "picture" in entry), None)


@dataclass(frozen=True)
class Pair:
    """A sample's picture, by its file, and caption; one of them, or both, generated."""

    picture: str
    caption: str


def pairs_in(folder: Path) -> list[Pair]:
    """The pairs in a folder of samples.

    Raises:
        UserError: it holds none, or they lie in tar shards.
    """
    if not (folder / RECORDS).exists() or (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds no pairs: give a folder of samples with pictures and captions in --format folder")
    pairs = []
    for record in records_in(folder):
        entries = [*record["generated"].values(), *record["given"].values()]
        picture = next((entry["picture"] for entry in entries if "picture" in entry), None)
        caption = next((entry["text"] for entry in entries if "text" in entry), None)
        if picture is None or caption is None:
            raise UserError(f"{folder}: sample {record['name']} is no pair of a picture and a caption")
        pairs.append(Pair(picture, caption))
    return pairs


def _in_shards(address: str, square: bool) -> PictureSet:
    manifest = read_manifest(address)
    reader = ShardReader(addresses.folder_of(address), manifest)
    places = [(shard, offset) for shard, entry in enumerate(manifest.shards) for offset in range(entry.samples)]

    def read(number: int) -> bytes:
        shard, offset = places[number]
        members = reader.shard(shard).views(offset)
        endings = {name: name.split(".") for name in members}
        own = [name for name, parts in endings.items() if parts[-1] in PICTURE_ENDINGS and "given" not in parts]
        if len(own) != 1:
            key = f"{manifest.shards[shard].name}/{reader.shard(shard).key(offset)}"
            raise UserError(f"{address}: sample {key} must have one picture, and has {', '.join(sorted(members))}")
        return bytes(members[own[0]])

    identities = [f"{manifest.shards[shard].sha256} {offset}" for shard, offset in places]
    return PictureSet(address, identities, read, square)
