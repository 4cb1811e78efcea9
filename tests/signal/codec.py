"""How signals are read, written and shown."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from megadiff.data import npy
from megadiff.data.codecs.base import Array, Codec, Stored, array_of
from megadiff.data.errors import SampleError
from megadiff.data.shards.shard import Views
from tests.signal.field import SignalField


class SignalCodec(Codec):
    """Values are arrays [T]; states are float32 [1, 1, T], the signal times the gain."""

    medium = "signal"

    def __init__(self, field: SignalField, space: Any, name: str) -> None:
        self.field, self.space = field, space

    def read(self, members: Views, key: int) -> Array:
        signal = array_of(members, self.field.member)
        if signal.shape != (self.space.width,):
            raise SampleError(f"its .{self.field.member} member holds {list(signal.shape)}, not [{self.space.width}]")
        return signal

    def encode(self, value: Array) -> Tensor:
        return torch.tensor(value, dtype=torch.float32).view(1, 1, -1) * self.field.gain

    def decode(self, state: Tensor) -> Array:
        return (state.flatten() / self.field.gain).numpy()

    def shown(self, value: Array) -> Image.Image:
        picture = Image.new("RGB", (len(value), 32), "white")
        heights = 16 - 8 * np.clip(value, -2, 2)
        ImageDraw.Draw(picture).line([(place, height) for place, height in enumerate(heights.tolist())], fill="black")
        return picture

    def stored(self, value: Array, name: str) -> Stored:
        return Stored({"signal": f"{name}.npy"}, {f"{name}.npy": npy.dump(value)})

    def restored(self, entry: Mapping[str, Any], read: Callable[[str], bytes]) -> Array:
        return np.load(io.BytesIO(read(entry["signal"])))
