"""DeepSpeed's universal checkpoint format (DeepSpeed 0.19.8, deepspeed/checkpoint/ds_to_universal.py): written and read.

    FOLDER/zero/PARAMETER/  fp32.pt, and if it was trained exp_avg.pt, exp_avg_sq.pt, step.pt
    FOLDER/zero/optimizer_state.pt
    FOLDER/mp_rank_00_model_states.pt, zero_pp_rank_0_mp_rank_00_model_states.pt   counters, for ZeRO-1/2 and for ZeRO-3
    FOLDER/../latest_universal    names FOLDER

A parameter's file holds it whole, as {"param": float32 tensor of its shape}; converted from ZeRO-3, as a flat tensor.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadiff.files import sync, write_text
from megadiff.weights.boxes import Extent, whole
from megadiff.weights.checkpoint import (
    MOMENTS,
    CheckpointError,
    CheckpointManifest,
    CheckpointReader,
    FileEntry,
    WeightSource,
)

# The strings of deepspeed/checkpoint/constants.py.
ZERO, PARAM, FP32, STEP = "zero", "param", "fp32", "step"
LATEST = "latest_universal"
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_FILES = {"weight": FP32, **{moment: moment for moment in MOMENTS}}
_DS_VERSION, _UNIVERSAL_VERSION = "0.19.8", 0.4


def open_source(folder: Path) -> WeightSource:
    """A checkpoint of ours, or a folder in DeepSpeed's universal format.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    return UniversalReader(folder) if is_universal(folder) else CheckpointReader(folder)


def is_universal(folder: Path) -> bool:
    return (folder / ZERO).is_dir()


# ------------------------------------------------------------------------------------------------------------- writing


def write(source: WeightSource, out: Path, wrote: Callable[[], object]) -> None:
    """Write a checkpoint's weights, moments and step as a folder, which gets its name when it is complete.

    `engine.load_checkpoint(out.parent)` loads it with `"checkpoint": {"load_universal": true}`. Hyper-parameters are not in it,
    so that the optimizer keeps its own: DeepSpeed would put those of the first group on every group (ZeRO-3). Frozen parameters
    are in `zero/` as well, but DeepSpeed does not load them. One whole parameter is in memory at a time.

    Args:
        wrote: called after each parameter.

    Raises:
        CheckpointError: `out` is there already, or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there already; name a new folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, (shape, trained) in source.manifest.parameters.items():
            folder = partial / ZERO / name
            folder.mkdir(parents=True)
            for kind, file in _FILES.items():
                if trained or kind not in MOMENTS:
                    _save({PARAM: source.read(kind, name, whole(shape)).reshape(shape)}, folder / f"{file}.pt")
            if trained:
                _save(_step(source), folder / f"{STEP}.pt")
            wrote()
        _save(_optimizer_state(source), partial / ZERO / "optimizer_state.pt")
        for file in MODEL_STATES:
            _save(_model_states(source), partial / file)
        partial.rename(out)
        sync(out.parent)
        write_text(out.with_name(LATEST), out.name)
    except (OSError, RuntimeError) as error:  # torch.save raises both
        raise CheckpointError(f"{out} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it is there only after a failure


def _save(value: object, path: Path) -> None:
    torch.save(value, path)
    sync(path)


def _step(source: WeightSource) -> Tensor:
    return torch.tensor(float(_adam_steps(source)))


def _adam_steps(source: WeightSource) -> int:
    return int(source.manifest.progress.get("adam_steps", 0))  # released weights that were imported have taken none


def _optimizer_state(source: WeightSource) -> dict[str, Any]:
    # DeepSpeed copies what is in a group over its own group, and loads no more groups than there are here.
    groups: list[dict[str, object]] = [{} for _ in source.manifest.parameters]
    return {
        "ds_version": _DS_VERSION,
        "param_groups": groups,  # read by ZeRO-1/2
        "optimizer_state_dict": {"state": {0: {"step": _step(source)}}, "param_groups": groups},  # read by ZeRO-3
    }


def _model_states(source: WeightSource) -> dict[str, Any]:
    parameters, progress = source.manifest.parameters, source.manifest.progress
    return {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, (shape, trained) in parameters.items() if trained}],
        "frozen_param_shapes": {name: torch.Size(shape) for name, (shape, trained) in parameters.items() if not trained},
        "lr_scheduler": {"last_batch_iteration": progress["optimizer_step"] - 1},
        "global_steps": progress["optimizer_step"],
        "skipped_steps": progress["optimizer_step"] - _adam_steps(source),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _DS_VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": _UNIVERSAL_VERSION},
    }


# ------------------------------------------------------------------------------------------------------------- reading


class UniversalReader:
    """A WeightSource over a folder in DeepSpeed's universal format; parameters with both moments count as trained."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if a file is missing or cannot be read."""
        self.folder = folder
        names = sorted(path.parent.name for path in (folder / ZERO).glob(f"*/{FP32}.pt"))
        if not names:
            raise CheckpointError(
                f"{folder / ZERO} has no PARAMETER/{FP32}.pt; it is no checkpoint of DeepSpeed's universal format"
            )
        parameters: dict[str, tuple[tuple[int, ...], bool]] = {}
        files: list[FileEntry] = []
        flat_shapes: Mapping[str, tuple[int, ...]] | None = None
        for name in names:
            value = _load(self._path(name, "weight"))
            tensor = _tensor(value, self._path(name, "weight"))
            shape = tuple(tensor.shape)
            if isinstance(value, Tensor):
                flat_shapes = flat_shapes or self._flat_shapes()
                shape = flat_shapes.get(name, shape)
            present = [kind for kind in _FILES if self._path(name, kind).exists()]
            if len(present) == 2:
                raise CheckpointError(
                    f"{folder / ZERO / name} has {present[1]}.pt, but not the other of {' and '.join(MOMENTS)}"
                )
            parameters[name] = (shape, len(present) == len(_FILES))
            for kind in present:
                path = self._path(name, kind)
                extents = {name: Extent(0, tensor.numel())} if kind == "weight" else {}
                files.append(FileEntry(str(path.relative_to(folder)), path.stat().st_size, "", extents))
        self.manifest = CheckpointManifest("", parameters, (), {}, "", tuple(files))

    def damaged(self, files: Sequence[FileEntry]) -> list[str]:
        """Names of the files with a wrong checksum (reads them whole): they are zip archives."""
        return [entry.name for entry in files if not _intact(self.folder / entry.name)]

    def read(self, kind: str, parameter: str, extent: Extent) -> Tensor:
        """As CheckpointReader.read."""
        shape, trained = self.manifest.parameters[parameter]
        if not trained and kind in MOMENTS:
            raise CheckpointError(f"{self.folder}: {parameter} was frozen there and has no {kind}")
        path = self._path(parameter, kind)
        stored = _tensor(_load(path), path).reshape(-1)
        if stored.numel() != whole(shape).size:
            raise CheckpointError(f"{path} has {stored.numel()} elements instead of {whole(shape).size}")
        out = torch.empty(extent.size, dtype=torch.float32)
        for start, here, length in extent.runs(shape).tolist():
            out[here : here + length] = stored[start : start + length]
        return out

    def weight_kind(self, weights: str, profile: str | None = None) -> str:
        """Raises CheckpointError for averages, which the format does not have."""
        if weights != "raw":
            raise CheckpointError(
                f"{self.folder} is in DeepSpeed's universal format, which has no averages; write initialise.weights: raw"
            )
        return "weight"

    def _path(self, parameter: str, kind: str) -> Path:
        return self.folder / ZERO / parameter / f"{_FILES[kind]}.pt"

    def _flat_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of parameters that ZeRO-3 keeps flat, from its model states."""
        path = self.folder / MODEL_STATES[1]
        try:
            groups = _load(path, mapped=False)["param_shapes"]
            return {name: tuple(shape) for group in groups for name, shape in group.items()}
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} lacks param_shapes, the shapes of the flat tensors in {ZERO}/") from None


def _load(path: Path, *, mapped: bool = True) -> Any:
    """What torch.save wrote, its tensors mapped from the file.

    Raises:
        CheckpointError: it is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from None


def _tensor(value: object, path: Path) -> Tensor:
    """Raises CheckpointError if a parameter's file holds no tensor."""
    tensor = value.get(PARAM) if isinstance(value, dict) else value
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path} holds no tensor under {PARAM}")
    return tensor


def _intact(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
