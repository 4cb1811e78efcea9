"""Archives that a package client fetches into the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megadiff.config.errors import UserError


def cache_of(client: str) -> Path:
    """The user's folder for what a client (pip, npm) fetches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megadiff" / client


def fetch_archive(client: str, command: Sequence[str], into: str, package: str, folder: Path) -> None:
    """Run a package client that writes one archive into a folder, and move it to `folder` once it is whole.

    Args:
        client: its name, for errors.
        command: without the folder to write into; `into` is the flag that takes it.
        package: name and version, for errors.

    Raises:
        UserError: it cannot be fetched, in the client's words, or `folder` cannot be written.
    """
    aside = folder / f".{os.getpid()}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another cache folder by XDG_CACHE_HOME") from None
    try:
        process = subprocess.run([*command, into, str(aside)], capture_output=True, text=True, check=False)
        archives = list(aside.iterdir())
        if process.returncode or not archives:
            reason = (process.stderr.strip() or process.stdout.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"{client} cannot fetch {package}: {reason}")
        archives[0].replace(folder / archives[0].name)
    finally:
        shutil.rmtree(aside)
