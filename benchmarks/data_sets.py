"""The same samples in every competitor's own format, on one S3 server, for the benchmarks of reading.

Two kinds. `latents`: an autoencoder's moments, float16 [2, 4, 32, 32], and the ids of five captions, int32. `jpeg`: a picture
of 256 x 256 pixels and a caption.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from megadiff import torchvision_ops

LENGTH, VOCABULARY = 120, 2000
PER_SHARD = {"latents": 1000, "jpeg": 500}
MOMENTS = (2, 4, 32, 32)
Sample = dict[str, Any]


def samples(kind: str, count: int) -> Iterator[Sample]:
    """Always the same ones."""
    chance = np.random.default_rng(0)
    for number in range(count):
        if kind == "latents":
            ids = chance.integers(3, VOCABULARY, (5, int(chance.integers(8, 25))), dtype=np.int32)
            yield {"latents": chance.standard_normal(MOMENTS).astype(np.float16), "tokens": ids}
        else:
            pixels = chance.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((256, 256)).filter(ImageFilter.GaussianBlur(1))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            yield {"jpg": buffer.getvalue(), "txt": f"picture number {number} of many"}


def prepare(bucket: str, kind: str, count: int) -> None:
    """Write each format below s3://bucket/kind-count/, unless it is there."""
    client = s3()
    if bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=bucket)
    prefix = f"{kind}-{count}"
    for name in FORMATS:
        if client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/{name}/done")["KeyCount"]:
            continue
        print(f"writing {prefix}/{name}", file=sys.stderr, flush=True)
        folder = Path(tempfile.mkdtemp())
        try:
            write(name, folder, kind, count)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                client.upload_file(str(path), bucket, f"{prefix}/{name}/{path.relative_to(folder)}")
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}/done", Body=b"")
        finally:
            shutil.rmtree(folder)


FORMATS = ("shards", "mds", "litdata")


def write(name: str, folder: Path, kind: str, count: int) -> None:
    """One of FORMATS into a local folder."""
    {"shards": _shards, "mds": _mds, "litdata": _litdata}[name](folder, kind, count)


def s3() -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def _shards(folder: Path, kind: str, count: int) -> None:
    """Tars, for us and webdataset."""
    from megadiff.data.shards.shard import Manifest, write_manifest, write_shard

    entries, members = [], {}
    for number, sample in enumerate(samples(kind, count)):
        if kind == "latents":
            members[f"{number:08d}"] = {f"{name}.npy": _npy(value) for name, value in sample.items()}
        else:
            members[f"{number:08d}"] = {"jpg": sample["jpg"], "txt": sample["txt"].encode()}
        if len(members) == PER_SHARD[kind]:
            entries.append(write_shard(str(folder), f"{len(entries):06d}.tar", members))
            members = {}
    if members:
        entries.append(write_shard(str(folder), f"{len(entries):06d}.tar", members))
    write_manifest(str(folder), Manifest(tuple(entries)))


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _mds(folder: Path, kind: str, count: int) -> None:
    """mosaicml-streaming's format, in files of about our shards' size."""
    torchvision_ops.declare_missing()
    from streaming import MDSWriter

    columns = {"latents": f"ndarray:float16:{','.join(map(str, MOMENTS))}", "tokens": "ndarray:int32"}
    if kind == "jpeg":
        columns = {"jpg": "bytes", "txt": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=_shard_bytes(kind)) as writer:
        for sample in samples(kind, count):
            writer.write(sample)


def _litdata(folder: Path, kind: str, count: int) -> None:
    """litdata's format, in chunks of as many samples as our shards have."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=PER_SHARD[kind])
    for number, sample in enumerate(samples(kind, count)):
        writer.add_item(number, sample)
    writer.done()
    writer.merge()


def _shard_bytes(kind: str) -> int:
    return {"latents": 17_000_000, "jpeg": 10_000_000}[kind]


def caption_of(tokens: np.ndarray[Any, Any], choice: int) -> np.ndarray[Any, Any]:
    """One of the captions as int64 [LENGTH]: what every competitor makes of its token ids."""
    ids = tokens[choice % len(tokens)]
    found = np.zeros(LENGTH, dtype=np.int64)
    found[: len(ids)] = ids
    found[len(ids)] = 1
    return found


def pixels_of(data: bytes) -> np.ndarray[Any, Any]:
    """A JPEG as uint8 [256, 256, 3]."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))
