"""How a user's mistake is reported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.launcher.children import ERROR_FILE


def say(error: Exception) -> None:
    """Print one line on stderr; a rank leaves it to `megadiff launch`, which prints it once for all ranks."""
    if not _left_for_launcher(str(error)):
        print(f"megadiff: error: {error}", file=sys.stderr)


@contextmanager
def enough_memory(flags: str) -> Iterator[None]:
    """Turn a lack of memory into a user's mistake that names the flags to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        # torch raises a RuntimeError; for the CPU's memory it has no class of its own.
        if isinstance(error, RuntimeError) and "out of memory" not in message and "can't allocate memory" not in message:
            raise
        raise UserError(f"there is not enough memory for this; take a smaller {flags}") from None


def _left_for_launcher(message: str) -> bool:
    """Leave the message to the launcher, if there is one; the first rank to fail wins."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(message + "\n")
    except FileExistsError:
        pass
    except OSError:
        return False
    return True
