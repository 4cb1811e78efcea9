"""What the faults of benchmarks/faults.py do: to a rank before its step, or to a run's files between two starts."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadiff.config.run_folder import MANIFEST, RunFolder

STAGE, EVERY, AT = "first", 4, 10
"""The stage, the steps between two checkpoints, and the step of most faults."""


# --------------------------------------------------------------------------------------------------------------- on a rank


@dataclass
class Place:
    """Where a rank is when a fault may strike: before a step.

    Attributes:
        start: how often the ranks have been started before.
        calls: steps of this process so far.
        undo: ends a fault.
    """

    folder: RunFolder
    rank: int
    start: int
    step: int = 0
    calls: int = 0
    undo: Callable[[], None] = lambda: None

    def strikes(self, *, rank: int | None = None, step: int = AT) -> bool:
        """Whether this is the first start, the step, and the rank (None: any); the time is kept."""
        if self.start or self.step != step or rank not in (None, self.rank):
            return False
        now(self.folder)
        return True


def now(folder: RunFolder) -> None:
    """Keep the time of a fault."""
    (folder.root / "struck").write_text(repr(time.time()))


def signalled(number: int, *ranks: int) -> Callable[[Place], None]:
    def strike(place: Place) -> None:
        if place.rank in ranks and place.strikes():
            os.kill(os.getpid(), number)

    return strike


def raises(place: Place) -> None:
    if place.strikes(rank=1):
        raise RuntimeError("a fault")


def exits(place: Place) -> None:
    if place.strikes(rank=1):
        os._exit(9)


def segfaults(place: Place) -> None:
    if place.strikes(rank=1):
        ctypes.string_at(0)


def lacks_memory(place: Place) -> None:
    import torch

    if place.strikes(rank=1):
        torch.empty(2**50)


def stands_still(place: Place) -> None:
    if place.strikes(rank=1):
        time.sleep(600)


def asks_to_stop(place: Place) -> None:
    if place.strikes(rank=0):
        place.folder.stop.touch()


def asks_to_stop_in_a_save(place: Place) -> None:
    from megadiff.weights import checkpoint

    write = checkpoint.write_rank_file

    def slow(*of: Any) -> Any:
        time.sleep(3)
        return write(*of)

    if place.strikes(rank=0, step=2 * EVERY):  # its checkpoint is begun after this step
        checkpoint.write_rank_file = slow
    if place.start == 0 and place.rank == 0 and place.step == 2 * EVERY + 1:
        place.folder.stop.touch()


def dies_in_a_save(place: Place) -> None:
    from megadiff.weights import checkpoint

    def die(folder: Path, rank: int, *_: Any) -> Any:
        (folder / f"rank_{rank:05d}.safetensors").write_bytes(b"half of it")
        now(place.folder)
        os.kill(os.getpid(), signal.SIGKILL)

    if place.strikes(rank=1, step=2 * EVERY):
        checkpoint.write_rank_file = die


def has_a_full_disk(place: Place) -> None:
    from megadiff.weights import checkpoint

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place.strikes(rank=1, step=2 * EVERY):
        checkpoint.write_rank_file = fail


def loses_its_records(place: Place) -> None:
    from megadiff.training.monitor import LineFile

    append = LineFile.append

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def undo() -> None:
        LineFile.append = append  # type: ignore[method-assign]

    if place.strikes(rank=0):
        LineFile.append, place.undo = fail, undo  # type: ignore[method-assign]
    elif place.step == AT + 1:
        place.undo()


def loses_its_store(place: Place) -> None:
    there = place.folder.root.parent / "copies"
    if place.strikes(rank=0, step=2):  # before the first copy
        there.write_text("no folder")
    if place.start == 0 and place.rank == 0 and place.step == AT:
        there.unlink()


def spoils(factor: float, *calls: int) -> Callable[[Place], None]:
    """Multiplies the loss of rank 1 at some steps of the first process."""

    def patch(place: Place) -> None:
        from megadiff.diffusion.objective import DiffusionObjective

        score = DiffusionObjective.score

        def spoilt(*of: Any) -> Any:
            terms = score(*of)
            if place.start or place.rank == 0 or place.calls not in calls:
                return terms
            if place.calls == calls[0]:
                now(place.folder)
            sums = {name: factor * loss for name, loss in terms.sample_sums.items()}
            return replace(terms, total=terms.total * factor, sample_sums=sums)

        DiffusionObjective.score = spoilt  # type: ignore[method-assign]

    return patch


# ------------------------------------------------------------------------------------------------------- between two starts


def newest(folder: RunFolder) -> Path:
    path = folder.stage(STAGE).checkpoints.newest()
    assert path is not None
    return path


def flip_a_bit(folder: RunFolder) -> None:
    path = next(newest(folder).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut_off(folder: RunFolder) -> None:
    path = next(newest(folder).glob("*.safetensors"))
    os.truncate(path, path.stat().st_size // 2)


def lose_a_file(folder: RunFolder) -> None:
    next(newest(folder).glob("*.safetensors")).unlink()


def garble_the_manifest(folder: RunFolder) -> None:
    (newest(folder) / MANIFEST).write_text('{"format": "mega')


def lose_the_pointer(folder: RunFolder) -> None:
    folder.stage(STAGE).checkpoints.latest.unlink()


def empty_the_disk(folder: RunFolder) -> None:
    shutil.rmtree(folder.root)
    folder.root.mkdir()


def cut_off_the_records(folder: RunFolder) -> None:
    with folder.stage(STAGE).metrics.open("a") as file:
        file.write('{"step": 11, "lo')


def nothing(_: Any) -> None:
    """No fault."""
