"""Contact sheets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from megadiff.report.sheet import Cell, SheetSection, _font, contact_sheet, wrap

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet)


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((pixels(sheet) == colour).all(-1).sum())


def test_a_small_picture_is_enlarged_by_a_whole_factor_without_smoothing() -> None:
    picture = Image.new("RGB", (32, 32), RED)
    picture.putpixel((0, 0), BLUE)
    sheet = contact_sheet([SheetSection("", [Cell(picture)])])
    assert count(sheet, BLUE) == 3 * 3
    assert count(sheet, RED) == 96 * 96 - 9


@pytest.mark.parametrize("size", [(400, 200), (200, 400)])
def test_a_large_picture_is_shrunk_to_the_cell_and_keeps_its_shape(size: tuple[int, int]) -> None:
    sheet = contact_sheet([SheetSection("", [Cell(Image.new("RGB", size, RED))])])
    assert count(sheet, RED) == 96 * 48


def test_cells_stand_in_rows_and_sections_below_each_other() -> None:
    cells = [Cell(Image.new("RGB", (32, 32), RED), "one")] * 5
    narrow = contact_sheet([SheetSection("a", cells)], columns=2)
    wide = contact_sheet([SheetSection("a", cells)], columns=5)
    twice = contact_sheet([SheetSection("a", cells), SheetSection("b", cells)], columns=5)
    assert narrow.width < wide.width == twice.width
    assert narrow.height > wide.height
    assert wide.height < twice.height < 2 * wide.height
    assert count(narrow, RED) == count(wide, RED) == count(twice, RED) / 2


def test_a_caption_is_drawn_under_its_picture_and_not_over_it() -> None:
    picture = Image.new("RGB", (32, 32), RED)
    bare, captioned = (contact_sheet([SheetSection("", [Cell(picture, text)])]) for text in ("", "a red square"))
    assert captioned.height > bare.height
    assert count(captioned, RED) == count(bare, RED)
    assert (pixels(captioned).sum(-1) < 300).sum() > (pixels(bare).sum(-1) < 300).sum()


def test_a_cell_of_text_alone_takes_no_room_for_a_picture() -> None:
    text = contact_sheet([SheetSection("captions", [Cell(None, "black cat")])])
    both = contact_sheet([SheetSection("captions", [Cell(Image.new("RGB", (8, 8)), "black cat")])])
    assert text.height + 96 == both.height


def test_an_empty_sheet_is_a_picture() -> None:
    assert contact_sheet([]).height > 0
    assert contact_sheet([SheetSection("nothing", [])]).height > 0


@given(st.text(st.characters(codec="utf-8"), max_size=120), st.integers(1, 5))
def test_wrapped_lines_fit_the_width_and_their_number(text: str, most: int) -> None:
    font = _font(11)
    lines = wrap(text, font, 96, most)
    assert len(lines) <= most
    assert all(font.getlength(line) <= 96 for line in lines)


def test_wrapping_loses_no_word_while_there_is_room() -> None:
    assert wrap("man with  curly hair", _font(11), 60, 9) == ["man with", "curly hair"]
    assert "".join(wrap("a" * 100, _font(11), 96, 99)) == "a" * 100
    assert wrap("one two three four five six", _font(11), 40, 2)[-1].endswith("...")
    assert wrap("", _font(11), 96, 4) == []


class Counting:
    """A font that counts the letters it has measured."""

    def __init__(self) -> None:
        self.letters = 0

    def getlength(self, text: str) -> float:
        self.letters += len(text)
        return _font(11).getlength(text)


@pytest.mark.parametrize("piece", ["a", "\u732b", "\u0301", "ab ", " ", "a\n", "a" * 3000 + " "])
def test_the_work_for_a_few_lines_does_not_grow_with_the_text(piece: str) -> None:
    shown, measured = set(), []
    for size in (4_000, 400_000):
        font = Counting()
        shown.add(tuple(wrap(piece * (size // len(piece)), font, 96, 4)))
        measured.append(font.letters)
    assert len(shown) == 1
    assert measured[0] == measured[1] < 20_000


@given(st.text("ab \u732bW.", max_size=80))
def test_a_line_takes_as_much_as_fits(text: str) -> None:
    font, lines = _font(11), [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= 40:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        while word:
            fits = max(end for end in range(1, len(word) + 1) if end == 1 or font.getlength(word[:end]) <= 40)
            lines.append(word[:fits])
            word = word[fits:]
    assert wrap(text, font, 40, 99) == [line for line in lines if line]


def test_accents_and_arrows_have_glyphs() -> None:
    font = _font(12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    missing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != missing for letter in "→éñüÅø")
