"""Arrays that several processes compute together, in pieces that are kept: what is there is not computed again."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadiff.config.errors import UserError
from megadiff.distributed.ranks import Ranks
from megadiff.storage import store

SECONDS_BETWEEN_LOOKS = 0.2
Piece = Mapping[str, NDArray[Any]]
"""Arrays by name."""


def wait_for(paths: Sequence[Path], most_s: float = 1800.0) -> None:
    """Wait for files that other processes write.

    Args:
        most_s: without a change in the folders of those that are missing, and in the folders below them.

    Raises:
        UserError: nothing has changed there for so long.
    """
    seen: list[float] = []
    since = time.monotonic()
    while missing := [path for path in paths if not path.exists()]:
        times = seen
        with suppress(OSError):  # a folder has just been removed
            around = [place for folder in {path.parent for path in missing} for place in (folder, *folder.iterdir())]
            times = sorted(place.stat().st_mtime for place in around if place.is_dir())
        if times != seen:
            seen, since = times, time.monotonic()
        if time.monotonic() - since > most_s:
            raise UserError(
                f"{missing[0]} is missing, and nothing has been written there for {most_s:g} s: another process has ended or "
                "stands still; the same command goes on with what there is"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def key_of(facts: Mapping[str, Any]) -> str:
    """The key of a piece: a hash of all that it depends on, as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Pieces:
    """Pieces in a folder, one file each."""

    folder: Path
    ranks: Ranks

    def gather(self, keys: Sequence[str], compute: Callable[[int], Piece]) -> list[Piece] | None:
        """All pieces in the order of their keys, on rank 0; None on the others. Each rank computes its share of those missing.

        Rank 0 waits for the others; their launcher ends all if one fails.
        """
        for number in range(self.ranks.rank, len(keys), self.ranks.world):
            if not self._path(keys[number]).exists():
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **compute(number))
                store.write_bytes(str(self._path(keys[number])), buffer.getvalue())
        if self.ranks.rank:
            return None
        wait_for([self._path(key) for key in keys])
        return [self._read(key) for key in keys]

    def _read(self, key: str) -> Piece:
        with np.load(self._path(key)) as file:
            return dict(file)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.npz"
