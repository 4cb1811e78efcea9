"""How a user's mistake is said."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.launcher.children import ERROR_FILE


def say(error: Exception) -> None:
    """One line on stderr; in a rank, left for `megadiff launch`, which says it once for all ranks."""
    if not _left_for_launcher(str(error)):
        print(f"megadiff: error: {error}", file=sys.stderr)


@contextmanager
def enough_memory(flags: str) -> Iterator[None]:
    """What takes more memory than there is, is a mistake of the user's, who can lower `flags`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = " ".join(str(error).split())
        # torch's own error is a RuntimeError, of the CPU's memory one without a name of its own.
        if isinstance(error, RuntimeError) and "out of memory" not in told and "can't allocate memory" not in told:
            raise
        raise UserError(f"there is not enough memory for this; take a smaller {flags}") from None


def _left_for_launcher(message: str) -> bool:
    """Whether there is a launcher to say it; the first rank to fail wins."""
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
