"""Pictures: members to pixels in [-1, 1] and back."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.config.schema import (
    GridSpace,
    PixelField,
)
from megadiff.data.buckets import Bucket, fit
from megadiff.data.codecs.base import PICTURE, Array, Codec, Stored, member_of
from megadiff.data.errors import SampleError, picture_fault
from megadiff.data.pictures import UNREADABLE, flat, open_picture, plain
from megadiff.data.shards.shard import Views


class PictureCodec(Codec):
    """Base of pictures' codecs: a mask says what to fill in; pictures are shown as they are and kept as PNGs."""

    medium = PICTURE
    space: GridSpace

    def encode_partly(self, value: Image.Image, unknown: Image.Image | None) -> tuple[Tensor, Tensor]:
        """`unknown` is a mask, white where the picture is to be filled in; None: nowhere.

        Raises:
            UserError: mask and picture have other ratios of their sides.
        """
        clean = self.encode(value)
        if unknown is None:
            return clean, torch.ones_like(clean, dtype=torch.bool)
        if abs(unknown.width * value.height - unknown.height * value.width) > max(*unknown.size, *value.size):
            shapes = [f"{image.width} x {image.height}" for image in (unknown, value)]
            raise UserError(f"the mask is {shapes[0]} px and the picture {shapes[1]}: their sides must have one ratio")
        return clean, ~unknown_region(unknown, self.space)

    def shown(self, value: Image.Image) -> Image.Image:
        return value

    def stored(self, value: Image.Image, name: str) -> Stored:
        buffer = io.BytesIO()
        flat(value).save(buffer, "png")
        return Stored({"picture": f"{name}.png"}, {f"{name}.png": buffer.getvalue()})

    def restored(self, entry: Mapping[str, Any], read: Callable[[str], bytes]) -> Image.Image:
        return Image.open(io.BytesIO(read(entry["picture"])))


class PixelCodec(PictureCodec):
    """Pictures: RGB on white, scaled and centre-cropped to the grid, values in [-1, 1]."""

    def __init__(self, field: PixelField, space: GridSpace, name: str = "") -> None:
        """Grey for a grid of one channel, RGB for three."""
        self.member, self.space = field.member, space

    def read(self, members: Views, key: int) -> Image.Image:
        return self._read(members)

    def _read(self, members: Views, enough: tuple[int, int] | None = None) -> Image.Image:
        """The picture, possibly scaled down to no less than `enough` (width, height) if its format makes that cheap."""
        data = member_of(members, self.member)
        try:
            return open_picture(data, enough)
        except UNREADABLE as error:
            raise SampleError(f"its .{self.member} member is no readable picture: {picture_fault(error)}") from None

    def encode(self, value: Image.Image, bucket: Bucket | None = None) -> Tensor:
        """A picture to float32 [C, H, W], of the bucket's size where one is given."""
        return self.finish(torch.from_numpy(self._pixels(plain(value), bucket)[None]), _NO_KEYS)[0]

    def load(self, members: Views, key: int, bucket: Bucket | None = None) -> Array:
        """uint8 [H, W, C]."""
        height, width = bucket or (self.space.height, self.space.width)
        return self._pixels(self._read(members, (_DRAFT * width, _DRAFT * height)), bucket)

    def blank(self, bucket: Bucket | None = None) -> Array:
        height, width = bucket or (self.space.height, self.space.width)
        return np.full((height, width, self.space.channels), 128, dtype=np.uint8)

    def finish(self, stacked: Tensor, keys: Tensor) -> Tensor:
        """uint8 [B, H, W, C] to float32 [B, C, H, W]."""
        return (stacked.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    def _pixels(self, picture: Image.Image, bucket: Bucket | None) -> Array:
        height, width = bucket or (self.space.height, self.space.width)
        shown = flat(picture, "RGB" if self.space.channels == 3 else "L")
        return np.array(fit(shown, height, width)).reshape(height, width, self.space.channels)

    def decode(self, state: Tensor) -> Image.Image:
        """float [C, H, W] to a picture; values outside [-1, 1] are clipped."""
        pixels = ((state.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(pixels if self.space.channels == 3 else pixels[..., 0])


_NO_KEYS = torch.empty(0, dtype=torch.int64)
_DRAFT = 2
"""A JPEG may be decoded at a half, a quarter or an eighth of its size if that is still this many times the target size."""


def unknown_region(mask: Image.Image, space: GridSpace) -> Tensor:
    """A mask (white: unknown) to bool [C, H, W]; a place of the grid with any unknown pixel in it is unknown."""
    grey = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA")).convert("L")
    picture = grey.point(lambda value: 255 if value >= 128 else 0).convert(
        "F"
    )  # in 8 bits one pixel of many would round to none
    factor = max(space.width / picture.width, space.height / picture.height)
    size = (max(space.width, round(picture.width * factor)), max(space.height, round(picture.height * factor)))
    scaled = picture.resize(size, Image.Resampling.BOX)
    left, top = (scaled.width - space.width) // 2, (scaled.height - space.height) // 2
    cropped = scaled.crop((left, top, left + space.width, top + space.height))
    unknown = torch.from_numpy(np.asarray(cropped) > 0)
    return unknown.expand(space.channels, -1, -1)
