"""Codecs: pictures and captions to clean states and back."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megadiff.config.errors import ConfigError
from megadiff.config.schema import CaptionField, GridSpace, PixelField, TokenSpace
from megadiff.data.codecs.build import build_codecs
from megadiff.data.codecs.captions import CaptionCodec, normalise
from megadiff.data.codecs.pictures import PixelCodec
from megadiff.data.errors import SampleError
from tests.data.small import TOKENIZER, png, tiny

WORDS = TokenSpace(vocabulary=2000, length=8, end_id=1, pad_id=0)
CAPTIONS = CaptionCodec(CaptionField(tokenizer=str(TOKENIZER)), WORDS)
LONG = "a very long caption about a red apple that lies beside a green pear on a wooden table"


def pixel_codec(size: tuple[int, int] = (4, 4), channels: int = 3) -> PixelCodec:
    return PixelCodec(PixelField(), GridSpace(channels=channels, height=size[0], width=size[1]))


def caption_codec(**space: Any) -> CaptionCodec:
    return CaptionCodec(CaptionField(tokenizer=str(TOKENIZER)), WORDS.model_copy(update=space))


def members(**captions: Any) -> dict[str, bytes]:
    return {"json": json.dumps(captions).encode()}


def read_state(codec: PixelCodec, picture: Image.Image) -> torch.Tensor:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return codec.encode(codec.read({"png": buffer.getvalue()}, 0))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_token(mark: bytes) -> None:
    codec = CaptionCodec(CaptionField(tokenizer=str(TOKENIZER), member="txt"), WORDS)
    assert (codec.encode(codec.read({"txt": mark + b"red heart"}, 0)) == CAPTIONS.encode("red heart")).all()
    assert CAPTIONS.read({"json": mark + b'{"captions": ["red heart"]}'}, 0) == "red heart"


def test_a_caption_member_that_is_nested_too_deeply_costs_its_sample_alone() -> None:
    with pytest.raises(SampleError, match="holds no captions: RecursionError"):
        CAPTIONS.read({"json": b"[" * 100_000}, 0)


@pytest.mark.parametrize(
    ("first", "drawn"), [(None, ["a", "b", "c", "a"]), (2, ["a", "b", "a", "b"]), (9, ["a", "b", "c", "a"])]
)
@pytest.mark.parametrize("member", ["json", "tokens.npy"])
def test_the_first_captions_of_a_sample_are_drawn_alone_where_asked(member: str, first: int | None, drawn: list[str]) -> None:
    codec = CaptionCodec(CaptionField(tokenizer=str(TOKENIZER), member=member, first=first), WORDS)
    buffer = io.BytesIO()
    np.save(buffer, np.array([codec.ids(letter) for letter in "abc"], dtype=np.int32))
    members = {"json": b'{"captions": ["a", "b", "c"]}', "tokens.npy": buffer.getvalue()}
    assert [codec.read(members, key) for key in range(4)] == drawn
    assert codec.read_all(members) == drawn[: min(first or 3, 3)]


# ------------------------------------------------------------------------------------------------------------- pictures


def test_every_8_bit_colour_comes_back_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels.reshape(-1, 3)[:256, 0] = np.arange(256)
    codec = pixel_codec((16, 16))
    state = codec.encode(codec.read({"png": png(pixels)}, 0))
    assert state.shape == (3, 16, 16)
    assert state.dtype == torch.float32
    assert (np.asarray(codec.decode(state)) == pixels).all()


def test_black_is_minus_one_and_white_is_one() -> None:
    assert (read_state(pixel_codec(), Image.new("RGB", (4, 4), "black")) == -1).all()
    assert (read_state(pixel_codec(), Image.new("RGB", (4, 4), "white")) == 1).all()


def test_what_is_transparent_becomes_white() -> None:
    assert (read_state(pixel_codec(), Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == 1).all()


def test_what_is_half_transparent_is_mixed_with_white() -> None:
    state = read_state(pixel_codec(), Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    torch.testing.assert_close(state, torch.full_like(state, 127 / 127.5 - 1), atol=2 / 255, rtol=0)


@pytest.mark.parametrize(("picture_size", "where"), [((12, 4), (4, 0)), ((4, 12), (0, 4)), ((36, 12), (12, 0))])
def test_a_picture_that_is_not_square_keeps_its_centre(picture_size: tuple[int, int], where: tuple[int, int]) -> None:
    picture = Image.new("RGB", picture_size, "black")
    edge = min(picture_size)
    picture.paste(Image.new("RGB", (edge, edge), "white"), where)
    state = read_state(pixel_codec(), picture)
    # Scaling blends the edge pixels with their neighbours outside the crop.
    assert (state[:, 1:3, 1:3] > 0.95).all()
    assert state.mean() > 0.8


def test_a_grid_that_is_not_square_is_filled_without_distortion() -> None:
    picture = Image.new("RGB", (8, 8), "black")
    picture.paste(Image.new("RGB", (8, 4), "white"), (0, 2))
    state = read_state(pixel_codec((4, 8)), picture)
    assert state.shape == (3, 4, 8)
    assert (state == 1).all()


def test_a_picture_is_scaled_before_it_is_cropped() -> None:
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste(Image.new("RGB", (32, 64), "white"), (32, 0))
    state = read_state(pixel_codec(), picture)
    assert (state[:, :, 0] < -0.9).all()
    assert (state[:, :, 3] > 0.9).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA"])
def test_grey_and_palette_pictures_become_rgb(mode: str) -> None:
    picture = Image.new("RGB", (4, 4), "white")
    picture.paste((0, 0, 0), (0, 0, 2, 4))
    state = read_state(pixel_codec(), picture.convert(mode))
    assert state.shape == (3, 4, 4)
    assert (state[:, :, :2] == -1).all()
    assert (state[:, :, 2:] == 1).all()


def test_the_transparent_colour_of_a_palette_becomes_white() -> None:
    picture = Image.new("P", (4, 4), 3)
    picture.putpalette([0] * 768)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=3)
    codec = pixel_codec()
    assert (codec.encode(codec.read({"png": buffer.getvalue()}, 0)) == 1).all()


def test_16_bit_greys_keep_their_shades() -> None:
    shades = np.array([[0, 257, 32896, 65535]], dtype=np.uint16).repeat(4, axis=0)
    state = read_state(pixel_codec(), Image.fromarray(shades))
    expected = torch.tensor([0.0, 1.0, 128.0, 255.0]) / 127.5 - 1
    torch.testing.assert_close(state, expected.expand(3, 4, 4))


def test_a_grid_of_one_channel_is_grey() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    codec = pixel_codec(channels=1)
    state = codec.encode(codec.read({"png": png(pixels)}, 0))
    assert state.shape == (1, 4, 4)
    assert (np.asarray(codec.decode(state)) == pixels).all()


def test_values_outside_the_range_are_clipped_when_shown() -> None:
    state = torch.tensor([-7.0, 0.0, 7.0])[:, None, None].expand(3, 4, 4)
    assert pixel_codec().decode(state).getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("content", [b"", b"no picture", png(np.zeros((9, 9, 3), np.uint8))[:45]], ids=["empty", "text", "cut"])
def test_a_damaged_picture_is_a_sample_error_that_names_the_member(content: bytes) -> None:
    with pytest.raises(SampleError, match=r"\.png member is no readable picture") as caught:
        pixel_codec().read({"png": content}, 0)
    assert "object at" not in str(caught.value)


def test_a_picture_whose_header_claims_a_giant_is_a_sample_error() -> None:
    header = bytearray(png(np.zeros((4, 4, 3), np.uint8)))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(SampleError, match="no readable picture"):
        pixel_codec().read({"png": bytes(header)}, 0)


@given(st.data())
def test_no_change_of_a_png_raises_anything_but_a_sample_error(data: st.DataObject) -> None:
    content = bytearray(png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    codec = pixel_codec()
    try:
        state = codec.encode(codec.read({"png": bytes(content[: data.draw(st.integers(0, len(content)))])}, 0))
    except SampleError:
        return
    assert state.shape == (3, 4, 4)


def test_a_sample_without_the_picture_names_what_it_has() -> None:
    with pytest.raises(SampleError, match=r"no \.png member \(it has json, webp\)"):
        pixel_codec().read({"webp": b"", "json": b""}, 0)


# ------------------------------------------------------------------------------------------------------------- captions


def test_a_caption_comes_back_and_ends_with_the_end_mark_and_padding() -> None:
    state = CAPTIONS.encode("red apple")
    assert state.shape == (8,)
    assert state.dtype == torch.int64
    end = state.tolist().index(1)
    assert (state[end + 1 :] == 0).all()
    assert end < 7
    assert CAPTIONS.decode(state) == "red apple"


def test_a_caption_that_is_too_long_keeps_the_end_mark() -> None:
    state = CAPTIONS.encode(LONG)
    assert state[-1] == 1
    assert (state[:-1] > 1).all()
    assert LONG.startswith(CAPTIONS.decode(state))


def test_without_an_end_mark_a_caption_fills_all_positions() -> None:
    state = caption_codec(end_id=None).encode(LONG)
    assert (state > 1).all()


def test_without_padding_the_end_mark_fills_the_rest() -> None:
    state = caption_codec(pad_id=None).encode("red apple")
    first = state.tolist().index(1)
    assert (state[first:] == 1).all()


def test_what_follows_the_end_mark_is_not_shown() -> None:
    red, pear = CAPTIONS.encode("red apple"), CAPTIONS.encode("pear")
    end = red.tolist().index(1)
    red[end + 1 : end + 3] = pear[:2]
    assert CAPTIONS.decode(red) == "red apple"


def test_masked_positions_show_as_nothing() -> None:
    state = CAPTIONS.encode("red apple")
    assert CAPTIONS.decode(torch.cat([torch.tensor([2000, 2000]), state])) == "red apple"
    assert CAPTIONS.decode(torch.full((8,), 2000)) == ""


@pytest.mark.parametrize("caption", ["<|end|> apple", "a <|pad|>", "<|end|><|end|>"])
def test_a_caption_that_spells_a_special_token_does_not_become_it(caption: str) -> None:
    codec = caption_codec(length=24)
    state = codec.encode(caption)
    length = state.tolist().index(1)
    assert (state[:length] > 1).all()
    assert codec.decode(state) == caption


def test_html_entities_are_resolved_and_white_space_collapses() -> None:
    assert normalise("  Tom &amp; \n Jerry\t&quot;x&quot;  ") == 'Tom & Jerry "x"'
    assert (CAPTIONS.encode("Tom  &amp;\nJerry") == CAPTIONS.encode("Tom & Jerry")).all()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back_if_it_fits(text: str) -> None:
    codec = caption_codec(length=200)
    assert codec.decode(codec.encode(text)) == normalise(text)


def test_the_key_decides_which_caption_is_read() -> None:
    sample = members(captions=["a", "b", "c"])
    assert [CAPTIONS.read(sample, key) for key in range(5)] == ["a", "b", "c", "a", "b"]
    assert CAPTIONS.read(sample, 2**63 - 1) in "abc"


def test_a_text_member_holds_one_caption() -> None:
    codec = CaptionCodec(CaptionField(tokenizer=str(TOKENIZER), member="txt"), WORDS)
    assert codec.read({"txt": "ein Apfel für dich".encode()}, 5) == "ein Apfel für dich"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b'{"caption": "x"}', b'{"captions": []}', b'{"captions": "x"}', b'{"captions": [3]}', b"\xff\xfe"],
)
def test_a_json_without_captions_is_a_sample_error_that_names_the_member(content: bytes) -> None:
    with pytest.raises(SampleError, match=r"\.json member"):
        CAPTIONS.read({"json": content}, 0)


def test_a_caption_that_is_no_unicode_text_is_a_sample_error() -> None:
    with pytest.raises(SampleError, match="surrogate"):
        CAPTIONS.read({"json": b'{"captions": ["half a pair: \\ud83d"]}'}, 0)


def test_a_sample_without_captions_names_what_it_has() -> None:
    with pytest.raises(SampleError, match=r"no \.json member \(it has png\)"):
        CAPTIONS.read({"png": b""}, 0)


def test_a_tokenizer_of_another_size_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json has 2000 ids, and the model's vocabulary is 2001"):
        caption_codec(vocabulary=2001)


def test_a_tokenizer_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json does not exist"):
        CaptionCodec(CaptionField(tokenizer="nowhere.json"), WORDS)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        CaptionCodec(CaptionField(tokenizer=str(path)), WORDS)


def test_a_field_that_cannot_fill_its_space_is_refused() -> None:
    data, model = tiny()
    swapped = data.model_copy(update={"fields": {**data.fields, "text": PixelField()}})
    with pytest.raises(ConfigError, match=r"data\.fields\.text is pixels, which cannot fill a tokens space"):
        build_codecs(swapped, model)
