"""An export: one set of weights with its configuration and tokenizers, in one folder that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.schema import CaptionField, Data, FieldSource, Model
from megadiff.storage import store

CONFIG, WEIGHTS = "megadiff.yaml", "model.safetensors"
FORMAT, VERSION = "megadiff-export", 1


@dataclass(frozen=True)
class Exported:
    """Configuration and whole float32 tensors by parameter name."""

    model: Model
    data: Data
    predicted: tuple[str, ...]
    tensors: dict[str, Tensor]


class _File(BaseModel):
    """What megadiff.yaml holds."""

    model_config = ConfigDict(extra="forbid")

    format: str
    version: int
    model: Model
    fields: dict[str, FieldSource]
    predicted: tuple[str, ...]


def write(out: Path, exported: Exported) -> None:
    """Write an export; tokenizers are copied beside the weights.

    Raises:
        UserError: `out` is there already, or a tokenizer is not.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name a new folder for the export")
    fields: dict[str, Any] = {}
    tokenizers: dict[str, bytes] = {}
    for name, source in exported.data.fields.items():
        fields[name] = source.model_dump(mode="json")
        if isinstance(source, CaptionField):
            fields[name]["tokenizer"] = f"tokenizer.{name}.json"
            tokenizers[fields[name]["tokenizer"]] = store.read_bytes(source.tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    for file, text in tokenizers.items():
        (out / file).write_bytes(text)
    save_file({name: tensor.contiguous() for name, tensor in exported.tensors.items()}, out / WEIGHTS)
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "model": exported.model.model_dump(mode="json"),
        "fields": fields,
        "predicted": list(exported.predicted),
    }
    (out / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def read(folder: Path) -> Exported:
    """Raises UserError if the export is damaged or of another version."""
    path = folder / CONFIG
    try:
        file = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
    except (ValidationError, yaml.YAMLError, SafetensorError, OSError) as error:
        raise UserError(f"{folder} is no whole export: {str(error).splitlines()[0]}") from None
    if (file.format, file.version) != (FORMAT, VERSION):
        raise UserError(f"{path} is a {file.format} of version {file.version}; this program reads {FORMAT} {VERSION}")
    fields = {
        name: source.model_copy(update={"tokenizer": str(folder / source.tokenizer)})
        if isinstance(source, CaptionField)
        else source
        for name, source in file.fields.items()
    }
    return Exported(file.model, Data(train="", fields=fields), file.predicted, tensors)
