"""The output of the paper's scripts: a folder with images/NNNN/sa_N.npy, tokens/NNNN/sa_N.npy and all_indexes.npy.

NNNN are the first four of N's eight digits. A picture is float [2 C, H, W]: the mean and then the deviation of its latents, not
scaled. A caption is int [L], or several [captions, L]: CLIP's ids between its two marks, filled up with the second. The
index holds the numbers N that have both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from megadiff.config.errors import UserError
from megadiff.data import npy
from megadiff.data.codecs.base import LATENTS, TOKENS, Array
from megadiff.data.codecs.clip import VOCABULARY
from megadiff.data.errors import DataError
from megadiff.data.packing.encoding import filled_up
from megadiff.data.packing.source import NO_CAPTION, NO_PICTURE, UNREADABLE, Encoded, LeaveOut, is_encoded
from megadiff.data.shards.shard import Members
from megadiff.storage import addresses

INDEX = "all_indexes.npy"
_PREFIX = "sa_"
_START_ID, _END_ID = VOCABULARY - 2, VOCABULARY - 1


class EncodedSource:
    """Units are runs of the sorted numbers."""

    kind = "paper"
    threads = 8

    def __init__(self, folder: str, unit_samples: int) -> None:
        """Raises UserError if the folder is not local, or lacks pictures or captions."""
        if not is_encoded(folder):
            raise UserError(f"{folder} is no local folder with images/ and tokens/ in it, as the paper's scripts make it")
        root = addresses.local_path(folder)
        # The command of the paper's README puts the pictures a folder deeper than its dataset expects.
        nested = root / "images/images"
        self.images, self.captions = nested if nested.is_dir() else root / "images", root / "tokens"
        numbers = _indexed(root / INDEX) or _listed(self.images)
        if not numbers:
            raise DataError(f"{folder} holds no pictures (images/0000/{_PREFIX}1.npy and so on)")
        self.chunks = [numbers[start : start + unit_samples] for start in range(0, len(numbers), unit_samples)]
        self.names = [f"{number:06d}" for number in range(len(self.chunks))]
        digest = hashlib.blake2b(np.array(numbers, dtype="<i8").tobytes(), digest_size=16).hexdigest()
        self.identity = {"pictures": len(numbers), "numbers": digest, "unit_samples": unit_samples}

    def samples(self, unit: int) -> Iterator[Encoded]:
        for number in self.chunks[unit]:
            inside = f"{number:08d}"[:4]
            name = f"{_PREFIX}{number}"
            yield Encoded(name, f"{inside}/{name}.npy", partial(self._read, f"{inside}/{name}.npy"))

    def _read(self, path: str) -> Members:
        """A sample's members. Raises LeaveOut."""
        captions = _captions(_array(self.captions / path, NO_CAPTION))
        latents = _latents(_array(self.images / path, NO_PICTURE))
        return {LATENTS: npy.dump(latents), TOKENS: npy.dump(captions)}


def _indexed(path: Path) -> list[int]:
    """The numbers of the index; none if it is missing or empty (the scripts write an empty one by default)."""
    if not path.exists():
        return []
    try:
        index = npy.load(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no NumPy array of whole numbers ({error}); delete it to take every picture") from None
    if index.size and (index.ndim != 1 or index.dtype.kind not in "iu" or index.min() < 0):
        raise DataError(f"{path} holds {index.dtype} {list(index.shape)}, and not numbers; delete it to take every picture")
    return sorted(set(index.tolist()))


def _listed(images: Path) -> list[int]:
    """The numbers of the pictures that are there."""
    try:
        folders = sorted(path for path in images.iterdir() if re.fullmatch(r"\d{4,}", path.name))
        matches = [re.fullmatch(rf"{_PREFIX}(\d+)\.npy", path.name) for folder in folders for path in folder.iterdir()]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from None
    return sorted(int(match[1]) for match in matches if match)


def _array(path: Path, missing: str) -> Array:
    """Raises LeaveOut if the file is missing (for the reason `missing`) or damaged."""
    try:
        array: Array = npy.load(path)
    except FileNotFoundError:
        raise LeaveOut(missing, f"{path.parent.parent.name}/{path.parent.name}/{path.name} does not exist") from None
    except ValueError as error:
        raise LeaveOut(NO_CAPTION if missing == NO_CAPTION else UNREADABLE, f"no NumPy array: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return array


def _latents(array: Array) -> Array:
    """Mean and deviation, [2, C, H, W]. Raises LeaveOut."""
    if array.ndim != 3 or len(array) % 2 or array.dtype.kind != "f":
        raise LeaveOut(UNREADABLE, f"{array.dtype} {list(array.shape)} is no mean and deviation of latents [2 C, H, W]")
    if not np.isfinite(array).all():
        raise LeaveOut(UNREADABLE, "its latents are not finite")
    return np.ascontiguousarray(array).reshape(2, len(array) // 2, *array.shape[1:])


def _captions(array: Array) -> Array:
    """Ids without marks, int32 [captions, longest], filled up with -1. Raises LeaveOut."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise LeaveOut(NO_CAPTION, f"{array.dtype} {list(array.shape)} is no caption's ids [L] or [captions, L]")
    captions = [ids for row in np.atleast_2d(array).tolist() if (ids := _without_marks(row))]
    if not captions:
        raise LeaveOut(NO_CAPTION)
    return filled_up(captions)


def _without_marks(row: list[int]) -> list[int]:
    """Raises LeaveOut if these are no ids between CLIP's marks."""
    if not row or row[0] != _START_ID or not 0 <= min(row) <= max(row) < VOCABULARY:
        raise LeaveOut(NO_CAPTION, f"its ids {row[:4]}... are not CLIP's, which begin with {_START_ID}")
    return row[1 : row.index(_END_ID) if _END_ID in row else len(row)]
