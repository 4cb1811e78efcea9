"""How a picture is opened, the same for training, packing, encoding, sampling and looking at data.

What counts is what a viewer shows: turned as its EXIF says, and see-through where it says so, be that by an alpha channel or by
one colour (a PNG's tRNS). Without torch.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PICTURE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")
"""Endings of files and members that are taken for pictures."""
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, OverflowError, struct.error, Image.DecompressionBombError)
"""What Pillow raises at files that are no picture or a damaged one."""

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
_GREY_STEP = {"L;2": 85, "L;4": 17}
"""Of a PNG's grey with few bits, as Pillow unpacks it."""


def open_picture(source: bytes | str | Path, enough: tuple[int, int] | None = None) -> Image.Image:
    """The picture in a file or in bytes, decoded to its end, as `plain` makes it.

    Args:
        enough: (width, height); where its format makes that cheap, the picture comes scaled down, though no smaller than this.

    Raises:
        UNREADABLE: it is none, or damaged.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        if enough:
            turned = shown_size(picture, from_header=True) != picture.size
            picture.draft(None, enough[::-1] if turned else enough)
        return plain(picture)


def plain(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says, with 8 bits, in L or RGB, or in RGBA if any of it may be see-through.

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
        from_header: do not decode a PNG to its end to look there for a turn that its header does not tell.
    """
    # Of a TIFF Pillow tells the upright size by itself.
    upright = picture.format == "TIFF" or (from_header and picture.format == "PNG" and "exif" not in picture.info)
    turned = not upright and picture.getexif().get(_ORIENTATION) in _SIDEWAYS
    return picture.size[::-1] if turned else picture.size


def _clear_colour(picture: Image.Image) -> int | tuple[int, ...] | None:
    """The see-through colour of a PNG of 2, 4 or 48 bits as its unpacked pixels have it, where Pillow leaves it as written."""
    told, tile = picture.info.get("transparency"), getattr(picture, "tile", None)
    how = tile[0][3] if tile else None
    if isinstance(told, int) and how in _GREY_STEP:
        return told * _GREY_STEP[how]
    if isinstance(told, tuple) and how == "RGB;16B":
        return tuple(value >> 8 for value in told)
    return None


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits; Pillow's own conversion would make all above 255 white."""
    values = np.asarray(picture, dtype=np.float64)
    grey = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    if "transparency" not in picture.info:
        return grey
    opaque = Image.fromarray(np.where(values == picture.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, opaque))
