"""One picture, one reading: whoever opens it sees what a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from megadiff.config.errors import UserError
from megadiff.config.schema import GridSpace, PixelField
from megadiff.data import pictures
from megadiff.data.codecs.pictures import PixelCodec
from megadiff.data.errors import SampleError
from megadiff.data.inspection.show import load_picture
from megadiff.data.packing.pack import PackedSample, Packing, prepare
from megadiff.data.packing.source import Raw
from megadiff.generation.inputs import open_picture

SIZE = 4
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
Pixels = NDArray[np.uint8]


def png_of(depth: int, colours: int, row: bytes, clear: bytes) -> bytes:
    """A PNG of 4 equal rows, written by hand: Pillow writes neither few bits with a transparent colour nor 48."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIZE, SIZE, depth, colours, 0, 0, 0)
    body = zlib.compress((b"\0" + row) * SIZE)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", clear) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def saved(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def half(clear: bool = True) -> Image.Image:
    """Black on the left; on the right see-through, with a colour hidden under it."""
    picture = Image.new("RGBA", (SIZE, SIZE), (*BLACK, 255))
    picture.paste((10, 200, 30, 0 if clear else 255), (SIZE // 2, 0, SIZE, SIZE))
    return picture


def of_a_palette() -> Image.Image:
    picture = Image.fromarray(np.array([[0, 0, 1, 1]] * SIZE, dtype=np.uint8), "P")
    picture.putpalette([*BLACK, 10, 200, 30])
    return picture


def turned(kind: str, orientation: int) -> bytes:
    """What a viewer shows as a white picture with a black quarter at the top left."""
    upright = Image.new("RGB", (16, 16), WHITE)
    upright.paste(BLACK, (0, 0, 8, 8))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(upright.transpose(back), kind, exif=exif, **({} if kind == "PNG" else {"quality": 100}))


def by_training(data: bytes) -> Pixels:
    return codec_of(data).load({"png": data}, 0)


def by_the_codec_of_a_value(data: bytes) -> Pixels:
    codec = codec_of(data)
    return np.asarray(codec.decode(codec.encode(Image.open(io.BytesIO(data)))))


def by_packing(data: bytes) -> Pixels:
    packed = prepare(Raw("a", "a", ["a"], lambda: data), Packing(size_px=2**10))
    assert isinstance(packed, PackedSample)
    return by_training(next(value for ending, value in packed.members.items() if ending != "json"))


def by_scaling_while_packing(data: bytes) -> Pixels:
    side = Image.open(io.BytesIO(data)).width
    large = Raw("a", "a", ["a"], lambda: data)
    packed = prepare(large, Packing(size_px=side - 1, format="png"))
    assert isinstance(packed, PackedSample)
    return np.asarray(Image.open(io.BytesIO(packed.members["png"])).convert("RGBA").resize((side, side), 0))


def by_sampling(data: bytes) -> Pixels:
    return np.asarray(pictures.flat(open_picture(Image.open(io.BytesIO(data)))))


def by_looking(data: bytes) -> Pixels:
    return np.asarray(pictures.flat(load_picture(data)))


def codec_of(data: bytes) -> PixelCodec:
    width, height = Image.open(io.BytesIO(data)).size
    return PixelCodec(PixelField(), GridSpace(channels=3, height=height, width=width))


EVERYBODY = [by_training, by_the_codec_of_a_value, by_packing, by_sampling, by_looking]


@pytest.mark.parametrize("look", EVERYBODY)
@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(look: Callable[[bytes], Pixels], kind: str, orientation: int) -> None:
    shown = look(turned(kind, orientation)).astype(int)
    assert shown[:7, :7].max() < 60
    assert min(shown[9:].min(), shown[:, 9:].min()) > 195


@pytest.mark.parametrize("look", EVERYBODY)
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(saved(half()), id="RGBA"),
        pytest.param(saved(half().convert("LA")), id="LA"),
        pytest.param(saved(half(clear=False).convert("RGB"), transparency=(10, 200, 30)), id="RGB with a transparent colour"),
        pytest.param(saved(of_a_palette(), transparency=1), id="P with a transparent colour"),
        pytest.param(png_of(1, 0, bytes([0b00110000]), struct.pack(">H", 1)), id="1 bit"),
        pytest.param(png_of(2, 0, bytes([0b00001010]), struct.pack(">H", 2)), id="2 bits"),
        pytest.param(png_of(4, 0, bytes([0x00, 0x55]), struct.pack(">H", 5)), id="4 bits"),
        pytest.param(png_of(8, 0, bytes([0, 0, 77, 77]), struct.pack(">H", 77)), id="8 bits"),
        pytest.param(png_of(16, 0, struct.pack(">4H", 0, 0, 20000, 20000), struct.pack(">H", 20000)), id="16 bits"),
        pytest.param(
            png_of(16, 2, struct.pack(">12H", *[0] * 6, *[1000, 2000, 30000] * 2), struct.pack(">3H", 1000, 2000, 30000)),
            id="48 bits",
        ),
    ],
)
def test_what_is_see_through_shows_white_and_never_its_hidden_colour(look: Callable[[bytes], Pixels], data: bytes) -> None:
    shown = look(data)
    assert (shown[:, : SIZE // 2] == BLACK).all()
    assert (shown[:, SIZE // 2 :] == WHITE).all()


def test_pictures_that_are_scaled_while_packing_are_turned_and_keep_what_is_see_through() -> None:
    assert by_scaling_while_packing(turned("PNG", 6))[0, 0].tolist() == [0, 0, 0, 255]
    clear = by_scaling_while_packing(saved(half(clear=False).convert("RGB"), transparency=(10, 200, 30)))
    assert clear[0, 0, 3] == 255
    assert clear[-1, -1, 3] == 0


def test_a_turned_jpeg_is_never_decoded_smaller_than_what_is_wanted() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("RGB", (200, 800)), "JPEG", exif=exif)
    assert pictures.open_picture(data, (160, 200)).size == (800, 200)
    assert pictures.open_picture(data, (400, 50)).size == (400, 100)


def test_floating_point_pictures_are_refused_by_all(tmp_path: Path) -> None:
    data = saved(Image.new("F", (SIZE, SIZE)), "TIFF")
    (tmp_path / "f.tif").write_bytes(data)
    for look in (by_training, by_looking):
        with pytest.raises(SampleError, match="floating-point"):
            look(data)
    with pytest.raises(UserError, match="floating-point"):
        open_picture(str(tmp_path / "f.tif"))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "PA", "La", "RGBa", "I", "I;16"])
def test_a_picture_of_any_mode_becomes_grey_or_colour_of_8_bits_or_is_refused(mode: str) -> None:
    try:
        shown = pictures.plain(Image.new(mode, (SIZE, SIZE)))
    except pictures.UNREADABLE:
        assert mode in ("LAB", "La")
    else:
        assert shown.mode in ("L", "RGB", "RGBA")
