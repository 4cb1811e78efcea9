"""An export: one set of weights with its configuration and tokenizers, in one self-contained folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.run_folder import EXPORT
from megadiff.config.schema import Data, FieldSource, Model
from megadiff.storage import store

CONFIG, WEIGHTS, CARD = EXPORT, "model.safetensors", "README.md"
FORMAT, VERSION = "megadiff-export", 1


@dataclass(frozen=True)
class Exported:
    """Configuration and whole float32 tensors by parameter name.

    Attributes:
        card: the model card's text.
    """

    model: Model
    data: Data
    predicted: tuple[str, ...]
    tensors: dict[str, Tensor]
    card: str


class _File(BaseModel):
    """The contents of megadiff.yaml."""

    model_config = ConfigDict(extra="forbid")

    format: str
    version: int
    model: Model
    fields: dict[str, FieldSource]
    predicted: tuple[str, ...]


def write(out: Path, exported: Exported) -> None:
    """Write an export; copies tokenizers and other files that its fields name beside the weights.

    Raises:
        UserError: `out` exists already or cannot be written, or such a file is missing.
    """
    fields: dict[str, Any] = {}
    copies: dict[str, str] = {}
    for name, source in exported.data.fields.items():
        fields[name] = source.model_dump(mode="json")
        for key in source.FILES:
            if (path := fields[name][key]) is not None:
                fields[name][key] = copies.setdefault(path, f"{key}.{name}{Path(path).suffix}")
    contents = {name: store.read_bytes(path) for path, name in copies.items() if not Path(path).is_dir()}
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "model": exported.model.model_dump(mode="json"),
        "fields": fields,
        "predicted": list(exported.predicted),
    }
    with new_folder(out):
        for path, name in copies.items():
            if name in contents:
                (out / name).write_bytes(contents[name])
            else:
                shutil.copytree(path, out / name)
        save_file({name: tensor.contiguous() for name, tensor in exported.tensors.items()}, out / WEIGHTS)
        (out / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        (out / CARD).write_text(exported.card, encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """A folder to be filled in the block; if that fails, it is emptied, so that the same command can be given again.

    Raises:
        UserError: it exists already and is not empty, or it cannot be written.
    """
    existed = out.is_dir()
    if out.exists() and (not existed or any(out.iterdir())):
        raise UserError(f"{out} is there already; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        _empty(out)
        if not existed and out.is_dir():
            out.rmdir()
        if reason := _unwritable(error, out):
            raise UserError(
                f"{out} cannot be written: {reason}; nothing of it is left, so mend that and give the command again"
            ) from None
        raise


def _empty(folder: Path) -> None:
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _unwritable(error: BaseException, folder: Path) -> str:
    """Why a file in the folder could not be written; empty for other errors."""
    if isinstance(error, shutil.Error):  # of copying a folder: (from, to, why) for each of its files
        return str(error.args[0][0][2])
    if isinstance(error, OSError) and (error.filename is None or Path(error.filename).is_relative_to(folder)):
        return error.strerror or str(error)
    # Libraries in Rust (safetensors, tokenizers) raise errors of their own, with the reason in words.
    match = re.search(r"([^:(]+) \(os error \d+\)", str(error)) if isinstance(error, Exception) else None
    return match[1].strip() if match else ""


def read(folder: Path) -> Exported:
    """Raises UserError if the export is damaged or of another version."""
    path = folder / CONFIG
    try:
        file = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
    except (ValidationError, yaml.YAMLError, SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise UserError(f"{folder} is no whole export: {reason.removeprefix('Value error, ')}") from None
    if (file.format, file.version) != (FORMAT, VERSION):
        raise UserError(f"{path} is a {file.format} of version {file.version}; this program reads {FORMAT} {VERSION}")
    fields = {name: _beside(source, folder) for name, source in file.fields.items()}
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else ""
    return Exported(file.model, Data(train="", fields=fields), file.predicted, tensors, card)


def _beside(source: FieldSource, folder: Path) -> FieldSource:
    """The field with its files in the export's folder."""
    paths = {key: getattr(source, key) for key in source.FILES}
    return source.model_copy(update={key: str(folder / path) for key, path in paths.items() if path is not None})
