"""Checkpoints in an object store: copies of those of a run, and the way back.

REMOTE/  run.yaml  STAGE/latest  STAGE/best  STAGE/step_XXXXXXXX/manifest.json, rank_*.safetensors

A folder counts once it has a manifest, which goes up last and is deleted first.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from megadiff.config.load import validate
from megadiff.config.run_folder import MANIFEST, RUN, CheckpointsFolder, step_of
from megadiff.config.schema import Checkpointing
from megadiff.files import locked, sha256, sync
from megadiff.storage import addresses, store
from megadiff.storage.errors import MissingError
from megadiff.weights.checkpoint import (
    BEST,
    LATEST,
    CheckpointError,
    DamagedCheckpoint,
    FileEntry,
    read_manifest,
    retired,
)

FILES_AT_ONCE = 8


@dataclass(frozen=True)
class RemoteCheckpoints:
    """The copies of one stage's checkpoints. Everything here raises StorageError."""

    run: str
    stage: str

    @property
    def root(self) -> str:
        return addresses.join(self.run, self.stage)

    def step(self, step: int) -> str:
        return addresses.join(self.root, CheckpointsFolder(Path()).step(step).name)

    def published(self) -> dict[int, str]:
        """Whole copies by step, oldest first."""
        return {step: self.step(step) for step in self._steps() if store.exists(addresses.join(self.step(step), MANIFEST))}

    def _steps(self) -> list[int]:
        """Of all folders, those of broken copies too."""
        return sorted(step for name in store.list_folders(self.root) if (step := step_of(name)) is not None)

    def newest_first(self) -> list[str]:
        """The copies of the step that `latest` names, and of those before it; without it, all."""
        whole = self.published()
        try:
            named = step_of(store.read_bytes(addresses.join(self.root, LATEST)).decode(errors="replace"))
        except MissingError:
            named = None
        return [whole[step] for step in sorted(whole, reverse=True) if named is None or step <= named]

    def point_latest(self, folder: Path) -> None:
        """Let the copy of a checkpoint be the newest."""
        store.write_bytes(addresses.join(self.root, LATEST), folder.name.encode())

    def copy(self, folder: Path, config: str, rule: Checkpointing, check: Callable[[], None]) -> None:
        """Copy a published checkpoint, its files in parallel; then delete older copies, and what broken ones have left.

        Args:
            config: the resolved run as YAML.
            check: raises if another start of the run has taken over; called before anything there changes, and before the
                manifest goes up.
        """
        manifest, step = read_manifest(folder), step_of(folder.name)
        assert step is not None
        check()
        there = self.step(step)
        store.delete(addresses.join(there, MANIFEST))
        names = [entry.name for entry in manifest.files]
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda name: store.upload(folder / name, addresses.join(there, name)), names))
        check()
        store.upload(folder / MANIFEST, addresses.join(there, MANIFEST))
        self.point_latest(folder)
        store.write_bytes(addresses.join(self.run, RUN), config.encode())
        earlier, whole = [each for each in self._steps() if each < step], [each for each in self.published() if each <= step]
        best = manifest.progress.get("best_step")
        if best in whole:
            store.write_bytes(addresses.join(self.root, BEST), self.step(best).rpartition("/")[2].encode())
        stays = set(whole) - set(retired(whole, rule.model_copy(update={"keep": rule.remote_keep}), best))
        for address in (self.step(each) for each in earlier if each not in stays):
            store.delete(addresses.join(address, MANIFEST))
            for name in store.list_names(address):
                store.delete(addresses.join(address, name))


def fetch_files(address: str, folder: Path, files: Collection[FileEntry]) -> None:
    """Download files of a copy into a folder, in parallel.

    Raises:
        DamagedCheckpoint: one is missing, or is not what was written.
    """
    for entry in files:
        if Path(entry.name).name != entry.name:
            raise DamagedCheckpoint(f"{addresses.shown(address)}: {entry.name!r} is no name of a file")

    def is_whole(entry: FileEntry) -> bool:
        try:
            store.download(addresses.join(address, entry.name), folder / entry.name)
        except MissingError:
            return False
        return sha256(folder / entry.name) == entry.sha256

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        damaged = [entry.name for entry, whole in zip(files, pool.map(is_whole, files), strict=True) if not whole]
    if damaged:
        raise DamagedCheckpoint(f"{addresses.shown(address)}: {', '.join(damaged)} is missing or damaged; delete the folder")


def fetch_manifest(address: str, folder: Path) -> None:
    """Download a copy's manifest into a folder."""
    (folder / MANIFEST).write_bytes(store.read_bytes(addresses.join(address, MANIFEST)))
    sync(folder / MANIFEST)


def fetched(address: str) -> Path:
    """A folder of this machine's cache with the checkpoint at an address: the folder of one, a run's newest, or what
    RUN/best or RUN/STAGE/best (or `latest`) names.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StorageError: it cannot be reached.
    """
    if not store.exists(addresses.join(address, MANIFEST)):
        place, _, name = address.rstrip("/").rpartition("/")
        address = _pointed_to(place, name) if name in (BEST, LATEST) else _newest(address)
    text = store.read_bytes(addresses.join(address, MANIFEST))
    name = address.rstrip("/").rpartition("/")[2]
    parent = _cache() / hashlib.sha256(text).hexdigest()[:16]  # it holds the hashes of all files
    with locked(parent / f".{name}.lock"):  # the first of several ranks downloads
        if not (parent / name / MANIFEST).exists():
            with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as aside:
                folder = Path(aside) / name
                folder.mkdir()
                (folder / MANIFEST).write_bytes(text)
                fetch_files(address, folder, read_manifest(folder).files)
                folder.rename(parent / name)
    return parent / name


def _newest(run: str) -> str:
    for stage in _stages(run):
        for address in RemoteCheckpoints(run, stage).newest_first()[:1]:
            return address
    raise CheckpointError(f"{addresses.shown(run)} has no checkpoint in any stage")


def _pointed_to(place: str, pointer: str) -> str:
    """What the pointer of a stage names, or that of a run's last stage with one."""
    own = store.exists(addresses.join(place, pointer))
    for stage in [place] if own else [addresses.join(place, name) for name in _stages(place)]:
        if store.exists(addresses.join(stage, pointer)):
            named = store.read_bytes(addresses.join(stage, pointer)).decode(errors="replace").strip()
            address = addresses.join(stage, named)
            if step_of(named) is not None and store.exists(addresses.join(address, MANIFEST)):
                return address
    raise CheckpointError(f"{addresses.shown(place)} has no {pointer} checkpoint")


def _stages(run: str) -> list[str]:
    """The names of a run's stages, the last one first."""
    try:
        config = store.read_bytes(addresses.join(run, RUN))
    except MissingError:
        raise CheckpointError(f"{addresses.shown(run)} is neither a run (no {RUN}) nor a checkpoint (no {MANIFEST})") from None
    stages = validate(yaml.safe_load(config), addresses.shown(addresses.join(run, RUN))).stages
    return [stage.name for stage in reversed(stages)]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megadiff" / "checkpoints"
