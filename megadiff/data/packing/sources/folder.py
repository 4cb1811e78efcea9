"""A folder of pictures with captions beside them: cat.jpg and cat.txt (a caption a line) or cat.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.data.errors import DataError
from megadiff.data.packing.source import NO_CAPTION, NO_PICTURE, LeaveOut, LeftOut, Raw, captions_in, clean
from megadiff.data.pictures import PICTURE_ENDINGS
from megadiff.storage import addresses, store


class FolderSource:
    """Units are runs of the sorted paths."""

    kind = "folder"
    threads = 1

    def __init__(self, folder: str, unit_samples: int) -> None:
        """Raises UserError if the folder is not local, or holds no pictures."""
        if not addresses.is_local(folder):
            raise UserError(f"{folder} is not local; loose files are read from a local folder only: mount or copy it")
        self.folder = addresses.local_path(folder)
        digest, paths = hashlib.blake2b(digest_size=16), []
        for path, size in sorted(_pictures(self.folder)):
            paths.append(path)
            digest.update(os.fsencode(path) + f"\0{size}\n".encode())
        if not paths:
            raise DataError(f"{folder} holds no pictures ({', '.join(PICTURE_ENDINGS)})")
        self.chunks = [paths[start : start + unit_samples] for start in range(0, len(paths), unit_samples)]
        self.names = [f"{number:06d}" for number in range(len(self.chunks))]
        self.identity = {"pictures": len(paths), "paths_and_sizes": digest.hexdigest(), "unit_samples": unit_samples}

    def samples(self, unit: int) -> Iterator[Raw | LeftOut]:
        for path in self.chunks[unit]:
            source = addresses.printable(path)
            captions = captions_beside(self.folder / path)
            if isinstance(captions, str):
                yield LeftOut(source, NO_CAPTION, captions)
            else:
                yield Raw(path, source, captions, partial(_bytes, self.folder / path))


def captions_beside(path: Path) -> list[str] | str:
    """The captions of a picture: those of its .json, else the lines of its .txt; or a sentence about their fault."""
    fault = ""
    for ending in (".json", ".txt"):
        beside = _beside(path, ending)
        if beside is None:
            continue
        try:
            text = beside.read_bytes().decode("utf-8-sig")
            captions = clean(captions_in(json.loads(text)) if ending == ".json" else re.split(r"\r\n|\n|\r", text))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{beside} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            fault = f"{addresses.printable(beside.name)} cannot be read: {error}"
            continue
        if captions:
            return captions
    return fault


def _beside(path: Path, ending: str) -> Path | None:
    """The file with a picture's name and this ending in any case, such as D.TXT beside D.PNG; lower case wins."""
    beside = path.with_suffix(ending)
    if store.exists(str(beside)):
        return beside
    name = _in_capitals(path.parent).get(beside.name)
    return None if name is None else path.parent / name


@lru_cache(maxsize=4)
def _in_capitals(folder: Path) -> dict[str, str]:
    """The caption files of a folder whose endings are not in lower case, by their names with lower-case endings."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from None
    parts = [name.rpartition(".") for name in names]
    capitals = [(stem, ending) for stem, _, ending in parts if ending != ending.lower() in ("json", "txt")]
    return {f"{stem}.{ending.lower()}": f"{stem}.{ending}" for stem, ending in capitals}


def _pictures(folder: Path, inside: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, int]]:
    """(path within the folder, bytes) of every picture.

    Hidden files and folders are skipped. Linked folders are entered unless they lead back to a folder that they lie in
    (`above`, by device and inode).
    """
    here = folder / inside
    try:
        status = here.stat()
        place = status.st_dev, status.st_ino
        entries = [] if place in above else [entry for entry in os.scandir(here) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{here} cannot be listed: {error.strerror}") from None
    for entry in entries:
        if _is_folder(entry):
            yield from _pictures(folder, f"{inside}{entry.name}/", above | {place})
        elif entry.name.rpartition(".")[2].lower() in PICTURE_ENDINGS:
            try:
                size = entry.stat().st_size
            except OSError:
                size = -1  # a link to nothing; it is left out with the others that cannot be read
            yield inside + entry.name, size


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise LeaveOut(NO_PICTURE, "the file is gone, or a link to nothing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
