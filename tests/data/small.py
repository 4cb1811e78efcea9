"""A small source of pairs for tests, and the codecs' settings that fit it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megadiff import torchvision_ops
from megadiff.config.load import load_run
from megadiff.config.schema import Data, Model
from megadiff.data.shards.shard import Manifest, Members, write_manifest, write_shard
from tests.ranks import ROOT

TOKENIZER = ROOT / "examples" / "emoji32" / "tokenizer.json"
TRAIN = ROOT / "examples" / "emoji32" / "train"


def tiny() -> tuple[Data, Model]:
    """The data and model sections of tests/tiny.yaml, with absolute paths."""
    run = load_run(ROOT / "tests" / "tiny.yaml")
    return run.data.model_copy(update={"train": str(TRAIN / "manifest.json"), "fields": _absolute(run.data)}), run.model


def data_of(train: Path | str, **changes: Any) -> Data:
    """The tiny run's data section on another manifest."""
    return tiny()[0].model_copy(update={"train": str(train), **changes})


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int) -> Members:
    """A picture that says its number in its pixels, with three captions that say it too."""
    pixels = np.full((32, 32, 3), number % 256, dtype=np.uint8)
    captions = [f"{word} {number}" for word in ("one", "two", "three")]
    return {"png": png(pixels), "json": json.dumps({"captions": captions}).encode()}


def write_source(folder: Path | str, sizes: list[int], changed: Mapping[int, Members] | None = None) -> str:
    """Shards of numbered samples with a manifest; `changed` replaces samples by number. Returns the manifest's address."""
    entries, first = [], 0
    for shard, size in enumerate(sizes):
        members = {f"{number:05d}": (changed or {}).get(number) or sample(number) for number in range(first, first + size)}
        entries.append(write_shard(str(folder), f"{shard:03d}.tar", members))
        first += size
    return write_manifest(str(folder), Manifest(tuple(entries)))


def make_autoencoder(folder: Path) -> str:
    """An AutoencoderKL of random weights; two halvings, so 4 pixels per latent."""
    torchvision_ops.declare_missing()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    network = AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, **blocks)
    network.save_pretrained(folder)
    return str(folder)


def _absolute(data: Data) -> dict[str, Any]:
    return {
        name: field.model_copy(update={"tokenizer": str(TOKENIZER)}) if field.kind == "caption" else field
        for name, field in data.fields.items()
    }
