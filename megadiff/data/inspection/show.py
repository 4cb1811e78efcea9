"""Tools for looking into a data set: a fixed choice of shards, random samples, and what a member holds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from megadiff.data.codecs.base import TOKENS, array_of, member_of
from megadiff.data.codecs.captions import NO_TOKEN, captions_of
from megadiff.data.errors import DataError, SampleError, picture_fault
from megadiff.data.generator import generator
from megadiff.data.pictures import PICTURE_ENDINGS, open_picture, shown_size
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import Manifest, Members, Views
from megadiff.data.threads import in_order
from megadiff.storage import addresses

_FEWEST_SHARDS = 8
"""Least number of shards that drawn samples come from."""
_READERS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class ShownSample(NamedTuple):
    """One sample of a data set: its shard's name, its key, its members."""

    shard: str
    key: str
    members: Members


def choose_shards(manifest: Manifest, samples: int) -> list[int]:
    """Indices of shards that together hold at least `samples` samples, the same every time; 0 takes all shards."""
    if samples == 0:
        return [index for index, entry in enumerate(manifest.shards) if entry.samples]
    chosen, total = [], 0
    for index in generator("choice of shards").permutation(len(manifest.shards)).tolist():
        if total >= samples:
            break
        if manifest.shards[index].samples:
            chosen.append(index)
            total += manifest.shards[index].samples
    return sorted(chosen)


def draw_samples(address: str, manifest: Manifest, count: int, seed: int) -> list[ShownSample]:
    """`count` random samples, each once, from a few shards (distant ones are read whole); at most all samples.

    Raises:
        StorageError, DataError: a shard cannot be had or is damaged.
    """
    random = generator(seed, "samples to show")
    weights = np.array([entry.samples for entry in manifest.shards], dtype=np.float64)
    with np.errstate(divide="ignore"):  # an empty shard comes last
        order = np.argsort(random.exponential(size=len(weights)) / weights, kind="stable")
    enough = int(np.searchsorted(np.cumsum(weights[order]), min(count, manifest.samples))) + 1
    shards = [index for index in order[: max(enough, _FEWEST_SHARDS)].tolist() if manifest.shards[index].samples]
    places = [(index, offset) for index in shards for offset in range(manifest.shards[index].samples)]
    choice = [places[nth] for nth in random.permutation(len(places))[:count].tolist()]
    wanted = {index: [place for place in choice if place[0] == index] for index in shards}
    reader = ShardReader(addresses.folder_of(address), manifest, keep=1)

    def read(index: int) -> dict[tuple[int, int], ShownSample]:
        if not wanted[index]:
            return {}
        shard = reader.shard(index)
        name = manifest.shards[index].name
        return {place: ShownSample(name, shard.key(place[1]), shard.members(place[1])) for place in wanted[index]}

    samples: dict[tuple[int, int], ShownSample] = {}
    for samples_of_shard in in_order(shards, read, _READERS):
        samples |= samples_of_shard
    return [samples[place] for place in choice]


def find_samples(address: str, manifest: Manifest, names: Sequence[str]) -> list[ShownSample]:
    """Samples by shard/key, as logs and incidents of a run name them.

    Raises:
        DataError: there is no such sample.
        StorageError: a shard cannot be had.
    """
    reader = ShardReader(addresses.folder_of(address), manifest, keep=1)
    numbers = {entry.name: number for number, entry in enumerate(manifest.shards)}

    def read(name: str) -> ShownSample:
        shard_name = next((each for each in numbers if name.startswith(f"{each}/")), None)
        if shard_name is None:
            raise DataError(f"{addresses.shown(address)} lists no shard of {name}; give SHARD/KEY, without the source's name")
        shard, key = reader.shard(numbers[shard_name]), name[len(shard_name) + 1 :]
        offset = next((offset for offset in range(len(shard)) if shard.key(offset) == key), None)
        if offset is None:
            raise DataError(f"{shard_name} has no sample {key}")
        return ShownSample(shard_name, key, shard.members(offset))

    return [read(name) for name in names]


def kind_of(ending: str) -> str:
    """The last part of a member's ending: png of seg.png."""
    return ending.rpartition(".")[2]


def picture_member(members: Views) -> str | None:
    """The ending of a sample's picture: png rather than seg.png."""
    pictures = [ending for ending in members if kind_of(ending) in PICTURE_ENDINGS]
    return min(pictures, key=lambda ending: (ending.count("."), ending), default=None)


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) as a viewer shows the picture, from its header alone. Raises SampleError."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if 0 in picture.size:
                raise ValueError("it has no pixels")
            width, height = shown_size(picture, from_header=True)
            return height, width
    except Exception as error:
        raise _unreadable(error) from None


def load_picture(data: bytes) -> Image.Image:
    """The picture, decoded to its end. Raises SampleError."""
    try:
        return open_picture(data)
    except Exception as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> SampleError:
    """The error for a damaged picture; decoders raise many kinds, some without a message."""
    return SampleError(f"it is no readable picture: {picture_fault(error)}")


def texts_of(members: Views) -> list[str]:
    """A sample's captions: those of its json, else its txt. Raises SampleError if they are damaged."""
    if "json" in members and isinstance(row := row_of(members), dict) and "captions" in row:
        return captions_of(members, "json")
    return captions_of(members, "txt") if "txt" in members else []


def row_of(members: Views) -> object:
    """The content of a sample's json. Raises SampleError if it is no JSON."""
    try:
        return json.loads(member_of(members, "json").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"its .json member is no JSON: {error}") from None


def tokens_of(members: Views) -> list[list[int]]:
    """The token ids of each caption, where the shards hold them. Raises SampleError."""
    if TOKENS not in members:
        return []
    captions = array_of(members, TOKENS)
    if captions.ndim != 2 or captions.dtype.kind != "i":
        raise SampleError(f"its .{TOKENS} member must hold whole numbers [captions, longest], not {list(captions.shape)}")
    return [ids[: ids.index(NO_TOKEN)] if NO_TOKEN in ids else ids for ids in captions.tolist()]
