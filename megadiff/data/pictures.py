"""Opening a picture, the same way for training, packing, encoding, sampling and looking at data. Without torch.

A picture is read as a viewer shows it: turned by its EXIF orientation, and transparent by its alpha channel or its transparent
colour (a PNG's tRNS).
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PICTURE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")
"""Endings of the files and members that count as pictures."""
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, OverflowError, struct.error, Image.DecompressionBombError)
"""Errors that Pillow raises at damaged pictures and at files that are none."""

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
_GREY_STEP = {"L;2": 85, "L;4": 17}
"""Grey levels per step of a PNG with 2 or 4 bits, as Pillow unpacks it."""


def open_picture(source: bytes | str | Path, enough: tuple[int, int] | None = None) -> Image.Image:
    """The picture in a file or in bytes, decoded whole and made `plain`.

    Args:
        enough: (width, height); the picture may come scaled down to no less than this, if its format makes that cheap.

    Raises:
        UNREADABLE: it is none, or damaged.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        if enough:
            turned = shown_size(picture, from_header=True) != picture.size
            picture.draft(None, enough[::-1] if turned else enough)
        return plain(picture)


def plain(picture: Image.Image) -> Image.Image:
    """A picture turned by its EXIF orientation, with 8 bits, in L or RGB, or in RGBA if any of it may be transparent.

    Raises:
        UNREADABLE: its file is damaged, or its values are floating-point numbers.
    """
    clear = _clear_colour(picture)
    picture = ImageOps.exif_transpose(picture)
    if clear is not None:
        picture.info["transparency"] = clear
    if picture.mode == "F":
        raise ValueError("its values are floating-point numbers")
    if picture.mode.startswith("I"):
        return _eight_bit(picture)
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        return picture if picture.mode == "RGBA" else picture.convert("RGBA")
    if picture.mode == "1":
        return picture.convert("L")
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")


def flat(picture: Image.Image, mode: str = "RGB") -> Image.Image:
    """A plain picture on white, in RGB or L."""
    if picture.mode == "RGBA":
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        picture = ground
    return picture if picture.mode == mode else picture.convert(mode)


def shown_size(picture: Image.Image, *, from_header: bool = False) -> tuple[int, int]:
    """(width, height) of an opened picture as a viewer shows it.

    Args:
        from_header: skip an EXIF orientation that stands at the end of a PNG and needs it decoded.
    """
    # Pillow gives the upright size of a TIFF by itself.
    upright = picture.format == "TIFF" or (from_header and picture.format == "PNG" and "exif" not in picture.info)
    turned = not upright and picture.getexif().get(_ORIENTATION) in _SIDEWAYS
    return picture.size[::-1] if turned else picture.size


def _clear_colour(picture: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent colour of a PNG of 2, 4 or 48 bits, on the scale of its unpacked pixels; Pillow leaves it as written."""
    colour, tile = picture.info.get("transparency"), getattr(picture, "tile", None)
    raw_mode = tile[0][3] if tile else None
    if isinstance(colour, int) and raw_mode in _GREY_STEP:
        return colour * _GREY_STEP[raw_mode]
    if isinstance(colour, tuple) and raw_mode == "RGB;16B":
        return tuple(value >> 8 for value in colour)
    return None


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits; Pillow's own conversion would make all above 255 white."""
    values = np.asarray(picture, dtype=np.float64)
    grey = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if "transparency" not in picture.info:
        return grey
    opaque = Image.fromarray(np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, opaque))
