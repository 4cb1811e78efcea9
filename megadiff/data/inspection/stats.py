"""Statistics of a data set, over a fixed choice of its shards, so that distant data need not be read whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from megadiff.data.codecs.base import TOKENS, array_of
from megadiff.data.codecs.captions import normalise
from megadiff.data.errors import SampleError
from megadiff.data.inspection.show import choose_shards, kind_of, picture_member, picture_size, texts_of, tokens_of
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import Manifest, Views, read_manifest
from megadiff.data.threads import in_order
from megadiff.storage import addresses

_READERS = 4
CAPTIONS = "captions"
QUANTILES = {"least": 0.0, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "most": 1.0}

Key = TypeVar("Key")


@dataclass
class Seen:
    """Counts over the samples that were read.

    Attributes:
        members: samples that have a member, by its ending.
        resolutions: pictures by (height, width), as a viewer shows them.
        arrays: NumPy members other than token ids, by (ending, dtype and shape).
        captions: samples by their number of captions.
        characters, words, tokens: captions by their length; words are separated by white space, tokens exclude marks.
        unreadable: members that could not be read, by their ending, or `captions`.
    """

    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    resolutions: Counter[tuple[int, int]] = field(default_factory=Counter)
    arrays: Counter[tuple[str, str]] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Seen) -> Seen:
        for each in fields(self):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Counter):
                mine.update(more)
            else:
                setattr(self, each.name, mine + more)
        return self

    def add(self, members: Views, tokenizer: Tokenizer | None) -> None:
        """Count one sample."""
        self.samples += 1
        self.members.update(list(members))  # a mapping would add its values
        if (ending := picture_member(members)) is not None:
            with self._counted(ending):
                self.resolutions[picture_size(bytes(members[ending]))] += 1
        for ending in sorted(members):
            if kind_of(ending) == "npy" and ending != TOKENS:
                with self._counted(ending):
                    values = array_of(members, ending)
                    self.arrays[ending, f"{values.dtype} {list(values.shape)}"] += 1
        texts: list[str] = []
        lengths: list[int] = []
        with self._counted(CAPTIONS):
            texts = texts_of(members)
        with self._counted(TOKENS):
            lengths = _lengths(texts, tokenizer) if tokenizer and texts else list(map(len, tokens_of(members)))
        self.captions[len(texts) or len(lengths)] += 1
        self.characters.update(map(len, texts))
        self.words.update(len(text.split()) for text in texts)
        self.tokens.update(lengths)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        try:
            yield
        except SampleError:
            self.unreadable[what] += 1


def _lengths(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    encodings = tokenizer.encode_batch([normalise(text) for text in texts], add_special_tokens=False)
    return [len(encoding.ids) for encoding in encodings]


@dataclass(frozen=True)
class Stats:
    """A data set in numbers.

    Attributes:
        samples, shards, bytes: totals that the manifest lists.
        buckets: samples of all shards by bucket, HEIGHTxWIDTH; empty where no shard has one.
        read_shards: number of shards that were read.
        seen: their content.
        lanes: data.lanes; None if it was not given.
    """

    address: str
    samples: int
    shards: int
    bytes: int
    buckets: dict[str, int]
    read_shards: int
    seen: Seen
    lanes: int | None = None

    @property
    def left_over(self) -> int | None:
        """Samples that each epoch leaves out; others each time."""
        return None if self.lanes is None else self.samples % self.lanes

    def as_tree(self) -> dict[str, Any]:
        """For JSON."""
        seen = self.seen
        return {
            "address": addresses.shown(self.address),
            "samples": self.samples,
            "shards": self.shards,
            "bytes": self.bytes,
            "buckets": self.buckets,
            "lanes": self.lanes,
            "left_over": self.left_over,
            "read": {"samples": seen.samples, "shards": self.read_shards},
            "members": _by_count(seen.members),
            "resolutions": _by_count({f"{height}x{width}": n for (height, width), n in seen.resolutions.items()}),
            "aspect_ratios": spread(aspect_ratios(seen.resolutions)),
            "arrays": {name: {shape: n for (of, shape), n in _by_count(seen.arrays).items() if of == name}
                       for name in sorted({name for name, _ in seen.arrays})},
            "captions_per_sample": dict(sorted(seen.captions.items())),
            "caption_lengths": {
                unit: {**spread(lengths), "counts": dict(sorted(lengths.items()))} for unit, lengths in lengths_of(seen).items()
            },
            "unreadable": _by_count(seen.unreadable),
        }  # fmt: skip


def measure(
    address: str,
    *,
    samples: int = 10_000,
    tokenizer: Tokenizer | None = None,
    lanes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """The numbers of a data set.

    Args:
        samples: least number to read, in whole shards, always the same ones; 0 reads all.
        tokenizer: counts captions' tokens; else those of tokens.npy are counted, where there are some.
        progress: called with the number of shards read and to be read.

    Raises:
        StorageError, DataError: the manifest or a shard cannot be had or is damaged.
    """
    manifest = read_manifest(address)
    chosen = choose_shards(manifest, samples)
    reader = ShardReader(addresses.folder_of(address), manifest, keep=1)

    def read(index: int) -> Seen:
        shard, seen = reader.shard(index), Seen()
        for place in range(len(shard)):
            seen.add(shard.views(place), tokenizer)
        return seen

    total = Seen()
    for done, part in enumerate(in_order(chosen, read, _READERS), 1):
        total += part
        if progress:
            progress(done, len(chosen))
    size = sum(entry.bytes for entry in manifest.shards)
    return Stats(address, manifest.samples, len(manifest.shards), size, _buckets(manifest), len(chosen), total, lanes)


def _buckets(manifest: Manifest) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in manifest.shards:
        counts[entry.bucket or "no bucket"] += entry.samples
    return {} if set(counts) == {"no bucket"} else _by_count(counts)


def aspect_ratios(resolutions: Mapping[tuple[int, int], int]) -> Counter[float]:
    """Pictures by width / height, to two places."""
    ratios: Counter[float] = Counter()
    for (height, width), count in resolutions.items():
        ratios[round(width / height, 2)] += count
    return ratios


def lengths_of(seen: Seen) -> dict[str, Counter[int]]:
    """The lengths of captions that were counted, by unit."""
    lengths = {"characters": seen.characters, "words": seen.words, "tokens": seen.tokens}
    return {unit: counts for unit, counts in lengths.items() if counts}


def spread(counts: Mapping[int, int] | Mapping[float, int]) -> dict[str, float]:
    """Mean and quantiles of values, from the count of each; empty without values."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    times = np.array([counts[value] for value in values.tolist()])
    ends = np.cumsum(times)
    places = np.maximum(np.ceil(np.array(list(QUANTILES.values())) * ends[-1]).astype(np.int64), 1)
    quantiles = values[np.searchsorted(ends, places)].tolist()
    return {**dict(zip(QUANTILES, quantiles, strict=True)), "mean": round(float(values @ times) / int(ends[-1]), 2)}


def _by_count(counts: Mapping[Key, int]) -> dict[Key, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], str(item[0]))))
