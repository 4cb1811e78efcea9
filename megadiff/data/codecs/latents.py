"""Latents of an autoencoder: read as such, or made from a picture and shown as one (latent diffusion, arXiv 2112.10752)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadiff import rng, torchvision_ops
from megadiff.config.errors import ConfigError
from megadiff.config.schema import GridSpace, LatentField, PixelField
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.base import Array, array_of, arrays_of
from megadiff.data.codecs.pictures import PictureCodec, PixelCodec
from megadiff.data.errors import SampleError
from megadiff.data.shards.shard import Views
from megadiff.distributed.ranks import Ranks

PICTURE_CHANNELS = 3
_FLOATS = tuple(map(np.dtype, ("<f2", "<f4", "<f8")))


class LatentCodec(PictureCodec):
    """Latents [C, H, W] times the field's scale; pictures go through the autoencoder, which is loaded when first needed."""

    def __init__(self, field: LatentField, space: GridSpace, name: str = "image") -> None:
        self.field, self.space, self.name = field, space, name
        self._loaded: tuple[Any, PixelCodec] | None = None
        self._lock = threading.Lock()

    @classmethod
    def check_encoded(cls, field: LatentField, facts: Mapping[str, Any], address: str, where: str) -> None:
        if facts["scale"] != field.scale:
            raise ConfigError(f"{where}.scale is {field.scale:g}, and {address} holds latents for {facts['scale']:g}")

    def read(self, members: Views, key: int) -> Tensor | Image.Image:
        """Scaled latents, float32 [C, H, W]; or the picture, where the field's member is one."""
        if not self.field.member.endswith("npy"):
            return self._autoencoder()[1].read(members, key)
        stacked = torch.from_numpy(self.stack([self.load(members, key)]))
        return self.finish(stacked, rng.sample_keys(key))[0]

    def encode(self, value: Tensor | Image.Image, bucket: Bucket | None = None) -> Tensor:
        """A picture to the scaled mean of its latents, float32 [C, H, W]; latents stay as they are.

        Raises:
            ConfigError: it is a picture and there is no autoencoder.
        """
        return value if isinstance(value, Tensor) else self._mean(value, bucket) * self.field.scale

    def load(self, members: Views, key: int, bucket: Bucket | None = None) -> Array:
        """Latents [C, H, W] or their mean and deviation [2, C, H, W], not scaled."""
        if self.field.member.endswith("npy"):
            return self._array(members, bucket)
        return self._mean(self._autoencoder()[1].read(members, key), bucket).numpy()

    def load_batch(
        self, samples: Sequence[Views], keys: Sequence[int], bucket: Bucket | None = None
    ) -> tuple[Array, dict[int, SampleError]]:
        """All at once where all are arrays of one shape without a fault."""
        together = arrays_of(samples, self.field.member) if self.field.member.endswith("npy") else None
        if together is None or self._fault(together.shape[1:], bucket) or not _finite(together):
            return super().load_batch(samples, keys, bucket)
        return together, {}

    def stack(self, values: Sequence[Array | None], bucket: Bucket | None = None) -> Array:
        """As the base; latents beside means and deviations become means with a deviation of 0."""
        if len({value.ndim for value in values if value is not None}) == 2:
            values = [np.stack([v, np.zeros_like(v)]) if v is not None and v.ndim == 3 else v for v in values]
        return super().stack(values, bucket)

    def finish(self, stacked: Tensor, keys: Tensor) -> Tensor:
        """Scaled latents, float32 [B, C, H, W], drawn as mean + deviation * normal(key) where both are stored."""
        values = stacked.float()
        if values.ndim == 5:
            values = values[:, 0] + values[:, 1] * rng.normal(keys, "latent of a picture", values.shape[2:])
        return values * self.field.scale

    @property
    def downscaling(self) -> int:
        """Pixels per latent along an edge. Raises ConfigError if there is no autoencoder."""
        return downscaling_of(self._autoencoder()[0])

    def _mean(self, picture: Image.Image, bucket: Bucket | None) -> Tensor:
        network, pictures = self._autoencoder()
        with torch.no_grad():
            pixels = pictures.encode(picture, bucket)[None].to(network.device)
            mean: Tensor = network.encode(pixels).latent_dist.mean
            return mean[0].float().cpu()

    def decode(self, state: Tensor) -> Image.Image:
        """Scaled latents [C, H, W] to a picture. Raises ConfigError if there is no autoencoder."""
        network, pictures = self._autoencoder()
        with torch.no_grad():
            latents = state.float()[None].to(network.device) / self.field.scale
            return pictures.decode(network.decode(latents).sample[0])

    def _array(self, members: Views, bucket: Bucket | None) -> Array:
        values = array_of(members, self.field.member)
        if fault := self._fault(values.shape, bucket):
            raise SampleError(f"its .{self.field.member} member has the shape {list(values.shape)}, {fault}")
        if not _finite(values):
            raise SampleError(f"its .{self.field.member} member must hold finite floating-point numbers ({values.dtype})")
        return values

    def _fault(self, array_shape: Sequence[int], bucket: Bucket | None) -> str:
        """The fault of an array's shape; empty for latents [C, H, W] and their moments [2, C, H, W]."""
        shape = (self.space.channels, self.space.height, self.space.width)
        if bucket is None:
            return "" if tuple(array_shape) in (shape, (2, *shape)) else f"not {list(shape)} or {[2, *shape]}"
        if len(array_shape) not in (3, 4) or array_shape[-3] != shape[0]:
            return f"without {shape[0]} channels"
        if array_shape[-2] * bucket.width != array_shape[-1] * bucket.height:
            return f"not of the sides of its bucket ({bucket})"
        return "" if len(array_shape) == 3 or array_shape[0] == 2 else "not a mean and a deviation"

    def _autoencoder(self) -> tuple[Any, PixelCodec]:
        """The autoencoder, and the codec of pictures of its size."""
        with self._lock:  # the loader decodes in threads
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> tuple[Any, PixelCodec]:
        where, folder = f"data.fields.{self.name}.autoencoder", self.field.autoencoder
        if folder is None:
            raise ConfigError(self.field.unshown(f"data.fields.{self.name}"))
        network = load_autoencoder(folder, where)
        channels = int(network.config.latent_channels)
        if channels != self.space.channels:
            raise ConfigError(f"{where}: {folder} has {channels} latent channels, and the model's grid {self.space.channels}")
        factor = downscaling_of(network)
        pixels = GridSpace(channels=PICTURE_CHANNELS, height=self.space.height * factor, width=self.space.width * factor)
        return network, PixelCodec(PixelField(member=self.field.member), pixels)


def load_autoencoder(folder: str, where: str) -> Any:
    """A frozen diffusers AutoencoderKL on this rank's device, in float32; `where` names its setting in errors.

    Raises:
        ConfigError: the folder holds none.
    """
    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"{where}: {folder} has no config.json; give the folder of a diffusers AutoencoderKL")
    torchvision_ops.declare_missing()
    from diffusers import AutoencoderKL

    try:
        options: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        network = AutoencoderKL.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{where}: {folder} cannot be read as a diffusers AutoencoderKL: {reason}") from None
    return network.eval().requires_grad_(False).to(own_device())


def downscaling_of(network: Any) -> int:
    """Pixels per latent along an edge."""
    return int(2 ** (len(network.config.block_out_channels) - 1))


def own_device() -> torch.device:
    """This rank's GPU, else the CPU; threads of the loader do not inherit the current GPU."""
    return torch.device("cuda", Ranks.from_environment().local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _finite(values: Array) -> bool:
    """Whether all are finite floating-point numbers that torch takes."""
    if values.dtype not in _FLOATS:
        return False
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    exponents = values.view(np.uint16) & 0x7C00  # many times faster than isfinite
    return bool(exponents.max() < 0x7C00)
