"""Raw pictures with captions for tests of packing, and what is packed of them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megadiff.data.packing.build import open_source
from megadiff.data.packing.pack import Packing, pack, unit_samples
from megadiff.data.shards.shard import Manifest, Members, Shard, read_manifest


def encoded(width: int = 24, height: int = 16, format: str = "JPEG", mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """A smooth picture, different for every seed."""
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None] + seed % 5
    picture = Image.fromarray(np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def rotated(width: int, height: int) -> bytes:
    """A JPEG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(width, height, exif=exif)


def samples_in(folder: Path | str) -> dict[str, Members]:
    """Every sample of a packed folder by key."""
    found: dict[str, Members] = {}
    for entry in read_manifest(str(folder)).shards:
        path = Path(folder) / entry.name
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
        shard = Shard(str(path), path)
        assert len(shard) == entry.samples
        for offset in range(len(shard)):
            assert shard.key(offset) not in found
            found[shard.key(offset)] = shard.members(offset)
    return found


def facts_by_source(folder: Path | str) -> dict[str, dict[str, Any]]:
    facts = [json.loads(members["json"]) for members in samples_in(folder).values()]
    return {entry["source"]: entry for entry in facts}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".scratch" not in path.parts
    }


def packed(source: Any, out: Path, kind: str = "auto", packing: Packing | None = None, **options: Any) -> Manifest:
    """Open a source and pack it in this process."""
    packing = packing or Packing()
    sources = source if isinstance(source, list) else [str(source)]
    opened = open_source(kind, sources, unit_samples(packing), out / ".scratch", **options)
    manifest = pack(opened, str(out), packing)
    assert manifest is not None
    return manifest


def write_tar(path: Path, members: Mapping[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, with captions of every form."""
    for number in range(12):
        place = tmp_path / "raw" / ("a" if number % 2 else "b/deep")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(encoded(seed=number))
        if number % 3 == 0:
            (place / f"{number}.json").write_text(json.dumps({"captions": [f"picture {number}", "again"]}))
        elif number % 3 == 1:
            (place / f"{number}.json").write_text(json.dumps({"caption": f"picture {number}"}))
        else:
            (place / f"{number}.txt").write_text(f"\ufeff picture {number} \r\n\r\nagain\n", encoding="utf-8")
    return tmp_path / "raw"


def write_parquet(path: Path, columns: Mapping[str, Any], group_rows: int = 4) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(columns)), path, row_group_size=group_rows)


def img2dataset_tar(path: Path, first: int, count: int = 5) -> bytes:
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        facts = {"caption": f"picture {number}", "url": "http://x", "key": f"{number:09d}", "status": "success"}
        members[f"{number:09d}.jpg"] = encoded(seed=number)
        members[f"{number:09d}.txt"] = f"picture {number}".encode()
        members[f"{number:09d}.json"] = json.dumps(facts).encode()
    return write_tar(path, members)
