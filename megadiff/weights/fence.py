"""Who may publish checkpoints of a run: its newest start, not ranks that have outlived an earlier one.

Cut off from its network a node is declared dead and its job started again elsewhere, but its ranks live on, and write again
once they are back.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from megadiff.config.run_folder import RunFolder
from megadiff.files import locked, write_text
from megadiff.weights.checkpoint import CheckpointError


@dataclass(frozen=True)
class Fence:
    """The right of one start to publish, until another start takes it.

    Attributes:
        path: the file that holds the token of the newest start.
        token: the number of this start, and a random part: some file systems have no locks, and two starts may count alike.
    """

    path: Path
    token: str

    @classmethod
    def take(cls, folder: RunFolder) -> Fence:
        """Take it from whoever has it. For one process of a start; raises OSError."""
        with locked(folder.fence_lock):
            before = folder.fence.read_text(encoding="utf-8") if folder.fence.exists() else "0"
            number = int(before.partition("-")[0])
            token = f"{number + 1}-{secrets.token_hex(4)}"
            write_text(folder.fence, token)
        return cls(folder.fence, token)

    def check(self) -> None:
        """Raises CheckpointError if another start has taken it, OSError if that cannot be known."""
        newest = self.path.read_text(encoding="utf-8")
        if newest != self.token:
            raise CheckpointError(
                f"{self.path.parent} belongs to a newer start of this run ({newest}; this one is {self.token}): "
                "nothing more is saved here; end these ranks"
            )
