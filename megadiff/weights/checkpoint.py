"""Checkpoints keyed by parameter name: any layout of ranks writes them, any other reads them.

A checkpoint is a folder: one safetensors file of flat fp32 tensors per rank (weight, exp_avg, exp_avg_sq and one average per
EMA profile for trained parameters; weight for frozen ones), and manifest.json with their extents, sizes and hashes. It is
written under a hidden name and renamed when whole; then `latest` is replaced to name it. It holds no random generator's state:
all random numbers of a run are functions of its seed and of the stored progress (megadiff.rng).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.run_folder import MANIFEST, RUN, CheckpointsFolder, RunFolder
from megadiff.config.schema import Checkpointing
from megadiff.files import sha256, sync
from megadiff.weights.boxes import Extent, overlaps, whole

BEST, LATEST = "best", "latest"
MOMENTS = ("exp_avg", "exp_avg_sq")
FORMAT, VERSION, READ_VERSIONS = "megadiff-checkpoint", 2, (1, 2)
"""Version 1 knew flat ranges of whole parameters only."""
_WRITTEN_AT_ONCE = 2**22
"""Bytes that are hashed and written while they are in the processor's cache."""

log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit what it is loaded into."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that lacks a file, or whose content is not what was written."""


@dataclass(frozen=True)
class FileEntry:
    """One rank's file; `extents` are the parts of parameters in it, by name."""

    name: str
    bytes: int
    sha256: str
    extents: dict[str, Extent]


@dataclass(frozen=True)
class CheckpointManifest:
    """The contents of a checkpoint.

    Attributes:
        parameters: by name, the whole shape and whether the parameter was trained.
        ema: names of the EMA profiles; the first is the default.
        progress: counters of the run (see megadiff.training.loop.Progress) and of the optimizer.
        config: the resolved run as YAML.
        software: versions of the packages that trained it, and a hash of megadiff's own files; empty if unknown.
    """

    stage: str
    parameters: dict[str, tuple[tuple[int, ...], bool]]
    ema: tuple[str, ...]
    progress: dict[str, Any]
    config: str
    files: tuple[FileEntry, ...]
    software: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- writing


def write_rank_file(folder: Path, rank: int, tensors: Mapping[str, Tensor], extents: Mapping[str, Extent]) -> FileEntry:
    """Write one rank's tensors and wait until they are on the disk; each is hashed as it goes there, and not read again.

    Args:
        tensors: float32, on any device, by `tensor_key`; one at a time is copied to the host.
    """
    name = f"rank_{rank:05d}.safetensors"
    digest = hashlib.sha256()
    (folder / name).unlink(missing_ok=True)  # tensors that were read from it may be views of the file
    with (folder / name).open("wb") as file:
        for part in _safetensors(tensors):
            for start in range(0, len(part), _WRITTEN_AT_ONCE):
                chunk = part[start : start + _WRITTEN_AT_ONCE]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileEntry(name, size, digest.hexdigest(), dict(extents))


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a file of float32 tensors: the header's length, the header (a JSON object), the numbers one after another.

    Source: the format's description, https://github.com/huggingface/safetensors (README, "Format").
    """
    header, stop = {}, 0
    for key, tensor in tensors.items():
        start, stop = stop, stop + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        numbers = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        yield numbers.reshape(-1).view("u1").data


def tensor_key(kind: str, parameter: str) -> str:
    """`kind` is weight, exp_avg, exp_avg_sq or ema.<profile>."""
    return f"{kind}:{parameter}"


def begin(checkpoints: CheckpointsFolder, step: int, token: str = "") -> None:
    """Make an empty folder to write into and remove what interrupted saves left. For one process.

    Args:
        token: of the start of the run, here and below; the folder that is written into is its own.
    """
    checkpoints.root.mkdir(parents=True, exist_ok=True)
    clear(checkpoints)
    checkpoints.partial(step, token).mkdir()


def clear(checkpoints: CheckpointsFolder) -> None:
    """Remove what interrupted saves left, and what ranks of an earlier start still write. For one process."""
    for leftover in checkpoints.partials():
        _clear(leftover)


def abandon(checkpoints: CheckpointsFolder, step: int, token: str = "") -> None:
    """Remove the files of a failed save, which would fill the disk for the next one. For one process."""
    _clear(checkpoints.partial(step, token))


def publish(
    checkpoints: CheckpointsFolder, step: int, manifest: CheckpointManifest, rule: Checkpointing, token: str = ""
) -> Path:
    """Give a wholly written folder its name, point `latest` at it, retire older ones. For one process.

    Folders of later steps stay: they are copies, or of a run that then resumed from an earlier step.

    Returns:
        The folder.
    """
    partial = checkpoints.partial(step, token)
    tree = {"format": FORMAT, "version": VERSION, **asdict(manifest), "files": [_entry_tree(entry) for entry in manifest.files]}
    (partial / MANIFEST).write_text(json.dumps(tree), encoding="utf-8")
    sync(partial / MANIFEST)
    final = give_name(checkpoints, step, token)
    whole = checkpoints.published()
    best = manifest.progress.get("best_step")
    if best in whole:
        _point(checkpoints.best, whole[best])
    for old in retired([each for each in whole if each <= step], rule, best):
        _remove(whole[old], old)
    return final


def give_name(checkpoints: CheckpointsFolder, step: int, token: str = "") -> Path:
    """Rename a folder that was wholly written to what it holds, and point `latest` at it. For one process."""
    partial, final = checkpoints.partial(step, token), checkpoints.step(step)
    sync(partial)
    if final.exists():
        _remove(final, step)
    _set_aside(final)
    partial.rename(final)
    sync(checkpoints.root)
    point_latest(checkpoints, final)
    return final


def point_latest(checkpoints: CheckpointsFolder, folder: Path) -> None:
    """Let a whole checkpoint be the newest, from which the stage is resumed. For one process."""
    _point(checkpoints.latest, folder)


def _point(pointer: Path, folder: Path) -> None:
    """Let a pointer, `latest` or `best`, name a checkpoint beside it."""
    aside = pointer.with_name(f".{pointer.name}")
    for path in (aside, pointer):
        if path.is_dir():
            _set_aside(path)
    aside.write_text(folder.name, encoding="utf-8")
    sync(aside)
    aside.replace(pointer)
    sync(pointer.parent)


def _clear(path: Path) -> None:
    """Delete whatever has a name that only saves use."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _set_aside(path: Path) -> None:
    """Rename whatever stands at a path; it is not ours."""
    if path.exists() or path.is_symlink():
        path.rename(path.with_name(f"{path.name}.{time.time_ns()}"))


def _remove(folder: Path, step: int) -> None:
    """Delete the files that the save of a step wrote; links, copies and all else stay. Faults are logged only."""
    if folder.is_symlink():
        return
    try:
        manifest = read_manifest(folder)
        if manifest.progress.get("optimizer_step") != step:
            return
        (folder / MANIFEST).rename(folder / f".{MANIFEST}")  # from here on it is no checkpoint
        for name in (*(entry.name for entry in manifest.files), f".{MANIFEST}"):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds other files
            folder.rmdir()
    except (OSError, CheckpointError) as error:
        log.warning("an old checkpoint could not be removed: %s", error)


def retired(steps: Iterable[int], rule: Checkpointing, best: int | None = None) -> list[int]:
    """The steps of checkpoints to delete: all but the newest `keep`, multiples of `keep_every_steps` and the best one."""
    newest_first = sorted(steps, reverse=True)
    stays = {best, *newest_first[: rule.keep]}
    if rule.keep_every_steps:
        stays |= {step for step in newest_first if step % rule.keep_every_steps == 0}
    return sorted(step for step in newest_first if step not in stays)


# ------------------------------------------------------------------------------------------------------------- reading


class WeightSource(Protocol):
    """Parameters on the disk, ours or of another format: what stages start from, and what the tools look at."""

    folder: Path
    manifest: CheckpointManifest

    def damaged(self, files: Sequence[FileEntry]) -> list[str]:
        """Names of the files with a wrong checksum (reads them whole)."""

    def read(self, kind: str, parameter: str, extent: Extent) -> Tensor:
        """Float32 [extent.size]: a part of one parameter; raises CheckpointError if some of it is not there."""

    def weight_kind(self, weights: str, profile: str | None = None) -> str:
        """The tensor kind of `raw` or `ema` weights; raises CheckpointError if there are none."""


class CheckpointReader:
    """Ranges of a checkpoint's tensors by parameter name."""

    def __init__(self, folder: Path) -> None:
        """Raises DamagedCheckpoint if a file is missing or has another size, CheckpointError if the folder is no checkpoint."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._handles: dict[str, Any] = {}
        for entry in self.manifest.files:
            path = folder / entry.name
            size = path.stat().st_size if path.exists() else -1
            if size != entry.bytes:
                fault = "is missing" if size < 0 else f"has {size} bytes instead of {entry.bytes}"
                raise DamagedCheckpoint(f"{path} {fault}; delete {folder} to go on from the checkpoint before it")

    def damaged(self, files: Sequence[FileEntry]) -> list[str]:
        """Names of the files with a wrong hash (reads them whole)."""
        return [entry.name for entry in files if sha256(self.folder / entry.name) != entry.sha256]

    def read(self, kind: str, parameter: str, extent: Extent) -> Tensor:
        """Float32 [extent.size]: a part of one parameter, however it was split when written.

        A frozen parameter's `ema.*` is its weight; it has no moments.

        Raises:
            CheckpointError: some of it is in no file.
        """
        shape, trained = self.manifest.parameters[parameter]
        if not trained and kind in MOMENTS:
            raise CheckpointError(f"{self.folder}: {parameter} was frozen there and has no {kind}")
        kind = kind if trained else "weight"
        out = torch.empty(extent.size, dtype=torch.float32)
        filled = 0
        for entry in self.manifest.files:
            runs = overlaps(entry.extents[parameter], extent, shape) if parameter in entry.extents else iter(())
            if (first := next(runs, None)) is None:
                continue
            stored = self._handle(entry.name).get_tensor(tensor_key(kind, parameter))  # mapped: only what is copied is read
            for here, there, length in chain([first], runs):
                out[there : there + length] = stored[here : here + length]
                filled += length
        if filled != extent.size:
            raise CheckpointError(f"{self.folder}: {kind} of {parameter} covers {filled} of {extent.size} elements")
        return out

    def read_whole(self, kind: str, parameter: str) -> Tensor:
        """The whole parameter in its shape, float32."""
        shape, _ = self.manifest.parameters[parameter]
        return self.read(kind, parameter, whole(shape)).reshape(shape)

    def weight_kind(self, weights: str, profile: str | None = None) -> str:
        """The tensor kind of `raw` or `ema` weights."""
        if weights == "raw":
            return "weight"
        name = profile or self.manifest.ema[0]
        if name not in self.manifest.ema:
            raise CheckpointError(f"{self.folder} has no EMA profile {name}; it has {', '.join(self.manifest.ema)}")
        return f"ema.{name}"

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            try:
                self._handles[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise DamagedCheckpoint(f"{self.folder / name} is damaged ({error}); delete {self.folder}") from None
        return self._handles[name]


def newest_checkpoint(folder: RunFolder, stage_names: list[str]) -> Path:
    """The newest checkpoint of the last stage that has one.

    Raises:
        CheckpointError: no stage has any.
    """
    for name in reversed(stage_names):
        if newest := folder.stage(name).checkpoints.newest():
            return newest
    raise CheckpointError(f"{folder.root} has no checkpoint yet in any stage ({', '.join(stage_names)}); train it first")


def pointed_to(path: Path) -> Path | None:
    """The checkpoint that a path names as RUN/best, RUN/STAGE/best or RUN/STAGE/checkpoints/best, or likewise with `latest`.

    Returns:
        None for other paths.

    Raises:
        CheckpointError: there is none of that name.
    """
    place, name = path.parent, path.name
    if name not in (BEST, LATEST) or path.is_dir():
        return None
    stages = list(place.glob("*/checkpoints")) if (place / RUN).exists() else [place, place / "checkpoints"]
    found = [one for stage in stages if (one := CheckpointsFolder(stage).named(name))]
    if not found:
        raise CheckpointError(f"{place} has no {name} checkpoint")
    return max(found, key=lambda one: (one / MANIFEST).stat().st_mtime)


def check_names(
    reader: WeightSource,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    new: Sequence[str] = (),
    dropped: Sequence[str] = (),
    parts: Mapping[str, str],
) -> list[str]:
    """The names to load from `reader`; lists and refuses everything that does not fit.

    Args:
        wanted: by name, the shape of every parameter of the model.
        new, dropped: parts or name patterns that may be missing in the checkpoint, or in the model.
        parts: by name, the part of every parameter of both.

    Raises:
        CheckpointError: parameters are missing, unexpected, or have other shapes.
    """
    stored = {name: shape for name, (shape, _) in reader.manifest.parameters.items()}
    missing = [name for name in wanted if name not in stored and not _matches(name, parts, new)]
    unexpected = [name for name in stored if name not in wanted and not _matches(name, parts, dropped)]
    shapes = [f"{name} {stored[name]} -> {wanted[name]}" for name in wanted if name in stored and stored[name] != wanted[name]]
    faults = []
    for title, names, way_out in (
        ("lacks", missing, "name them under initialise.new to start them fresh"),
        ("has parameters the model lacks:", unexpected, "name them under initialise.dropped to leave them out"),
        ("has other shapes:", shapes, "use the model configuration it was trained with"),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            faults.append(f"{title} {', '.join(names[:5])}{more} ({way_out})")
    if faults:
        raise CheckpointError(f"{reader.folder} does not fit this stage: it " + "; it ".join(faults))
    return [name for name in wanted if name in stored and not _matches(name, parts, new)]


def _matches(name: str, parts: Mapping[str, str], patterns: Collection[str]) -> bool:
    return parts.get(name) in patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _entry_tree(entry: FileEntry) -> dict[str, Any]:
    """A file's entry in the manifest; an extent is [start, stop] or [start, stop, boxes]."""
    extents = {name: [each.start, each.stop, *([each.boxes] if each.boxes else [])] for name, each in entry.extents.items()}
    return {"name": entry.name, "bytes": entry.bytes, "sha256": entry.sha256, "extents": extents}


def _file_entry(tree: Mapping[str, Any]) -> FileEntry:
    extents = {}
    for name, (start, stop, *boxes) in tree["extents" if "extents" in tree else "ranges"].items():
        cut = tuple(tuple((low, high) for low, high in box) for box in boxes[0]) if boxes else None
        extents[name] = Extent(start, stop, cut)
    return FileEntry(tree["name"], tree["bytes"], tree["sha256"], extents)


def read_manifest(folder: Path) -> CheckpointManifest:
    """Raises DamagedCheckpoint if it cannot be read, CheckpointError if there is none, or one of another format."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT or tree["version"] not in READ_VERSIONS:
            raise CheckpointError(
                f"{path} is a {tree['format']} of version {tree['version']}; this program reads 1 to {VERSION}"
            )
        return CheckpointManifest(
            stage=tree["stage"],
            parameters={name: (tuple(shape), bool(trained)) for name, (shape, trained) in tree["parameters"].items()},
            ema=tuple(tree["ema"]),
            progress=tree["progress"],
            config=tree["config"],
            files=tuple(_file_entry(entry) for entry in tree["files"]),
            software=tree.get("software", {}),
        )
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({type(error).__name__}: {error}); delete {folder}") from None
