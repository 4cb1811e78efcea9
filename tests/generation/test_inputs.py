"""Prompts, pictures and masks as they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megadiff.config.errors import UserError
from megadiff.config.schema import GridSpace
from megadiff.data.codecs.pictures import unknown_region
from megadiff.generation.inputs import open_picture, read_prompts

pytestmark = pytest.mark.thorough


def test_16_bit_pictures_are_read_as_in_training(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_picture(str(tmp_path / "deep.png")).convert("RGB").getpixel((0, 0))[0] == 156
    assert open_picture(Image.open(tmp_path / "deep.png")).convert("RGB").getpixel((0, 0))[0] == 156


def test_one_white_pixel_of_a_large_mask_is_a_hole():
    mask = Image.new("L", (2048, 2048), 0)
    mask.putpixel((5, 2000), 255)
    unknown = unknown_region(mask, GridSpace(channels=3, height=32, width=32))
    assert unknown.nonzero().tolist() == [[channel, 31, 0] for channel in range(3)]


def prompts_of(path: Path, text: str | bytes) -> list[tuple[str, str]]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_prompts(str(path))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ('["a", "b"]', [("0", "a"), ("1", "b")]),
        ('{"x": "a", "y": "a"}', [("x", "a"), ("y", "a")]),
        ('{"text": ["a"]}', [("0", "a")]),
    ],
)
def test_prompts_come_in_three_forms_with_or_without_a_byte_order_mark(tmp_path, text, pairs, mark):
    assert prompts_of(tmp_path / "p.json", mark + text) == pairs


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ("[" + "9" * 5000 + "]", "is not JSON: Exceeds the limit"),
        ('{"a": "one", "b": "two", "a": "three"}', 'has the key "a" twice; name each caption differently'),
        ('{"text": ["one"], "text": ["two"]}', 'has the key "text" twice'),
        ('[{"a": 1, "a": 2}]', 'has the key "a" twice'),
        ("[", "is not JSON"),
        (b"\xff[]", "is not JSON"),
        ("[1]", "must be a list of captions"),
        ("[]", "must be a list of captions"),
        ("7", "must be a list of captions"),
    ],
)
def test_prompts_that_cannot_be_taken_are_one_sentence(tmp_path, text, sentence):
    with pytest.raises(UserError) as error:
        prompts_of(tmp_path / "p.json", text)
    assert sentence in str(error.value)
