"""Sheets of samples: pictures with their captions, for people."""

from __future__ import annotations

import importlib.util
import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FRAME, SMALL_INK = (255, 255, 255), (24, 24, 27), (228, 228, 231), (113, 113, 122)


@dataclass(frozen=True)
class Cell:
    """A picture (RGB; None: text only) with its caption, and a note in small print whose lines are cut."""

    picture: Image.Image | None
    caption: str = ""
    note: str = ""


@dataclass(frozen=True)
class SheetSection:
    """Cells under a title."""

    title: str
    cells: Sequence[Cell]


def contact_sheet(
    sections: Sequence[SheetSection],
    *,
    columns: int = 8,
    cell_px: int = 96,
    gap_px: int = 12,
    text_px: int = 11,
    caption_lines: int = 4,
) -> Image.Image:
    """All sections on one RGB picture, one below the other, in rows of `columns` cells.

    Pictures are enlarged by a whole factor without smoothing (a model of 32 x 32 shows its pixels) or shrunk to `cell_px`;
    captions are wrapped under them, at most `caption_lines` lines.
    """
    columns = max(1, min(columns, max((len(section.cells) for section in sections), default=1)))
    layout = _SheetLayout(columns, cell_px, gap_px, text_px, caption_lines)
    heights = [layout.height(section) for section in sections]
    sheet = Image.new("RGB", (layout.width(sections), sum(heights) + gap_px), BACKGROUND)
    top = 0
    for section, height in zip(sections, heights, strict=True):
        layout.paint(sheet, section, top)
        top += height
    return sheet


@dataclass(frozen=True)
class _SheetLayout:
    columns: int
    cell_px: int
    gap_px: int
    text_px: int
    caption_lines: int

    @property
    def title_px(self) -> int:
        return round(self.text_px * 1.4)

    @property
    def line_px(self) -> int:
        return round(self.text_px * 1.3)

    @property
    def note_px(self) -> int:
        return round(self.text_px * 0.8)

    def width(self, sections: Sequence[SheetSection]) -> int:
        titles = [round(_font(self.title_px).getlength(section.title)) for section in sections]
        return max([self.columns * (self.cell_px + self.gap_px), *titles]) + self.gap_px

    def height(self, section: SheetSection) -> int:
        return self.gap_px + 2 * self.title_px + sum(self._row_height(row) for row in self._rows(section))

    def paint(self, sheet: Image.Image, section: SheetSection, top: int) -> None:
        draw = ImageDraw.Draw(sheet)
        draw.text((self.gap_px, top + self.gap_px), section.title, INK, _font(self.title_px))
        top += self.gap_px + 2 * self.title_px
        for row in self._rows(section):
            for column, cell in enumerate(row):
                self._cell(
                    sheet, draw, cell, self.gap_px + column * (self.cell_px + self.gap_px), top, self._picture_height(row)
                )
            top += self._row_height(row)

    def _rows(self, section: SheetSection) -> list[Sequence[Cell]]:
        return [section.cells[start : start + self.columns] for start in range(0, len(section.cells), self.columns)]

    def _picture_height(self, row: Sequence[Cell]) -> int:
        return self.cell_px if any(cell.picture is not None for cell in row) else 0

    def _row_height(self, row: Sequence[Cell]) -> int:
        texts = max(self._text_height(cell) for cell in row)
        return self._picture_height(row) + self.gap_px // 2 + texts + self.gap_px

    def _text_height(self, cell: Cell) -> int:
        return len(self._lines(cell.caption)) * self.line_px + len(self._notes(cell.note)) * round(self.note_px * 1.3)

    def _notes(self, note: str) -> list[str]:
        return [line for text in note.splitlines() for line in wrap(text, _font(self.note_px), self.cell_px, 1)]

    def _lines(self, caption: str) -> list[str]:
        return wrap(caption, _font(self.text_px), self.cell_px, self.caption_lines)

    def _cell(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int, height: int) -> None:
        if cell.picture is not None:
            picture = _fitted(cell.picture, self.cell_px)
            draw.rectangle((left - 1, top - 1, left + self.cell_px, top + self.cell_px), fill=BACKGROUND, outline=FRAME)
            sheet.paste(picture, (left + (self.cell_px - picture.width) // 2, top + (self.cell_px - picture.height) // 2))
        top += height + self.gap_px // 2
        for line in self._lines(cell.caption):
            draw.text((left, top), line, INK, _font(self.text_px))
            top += self.line_px
        for line in self._notes(cell.note):
            draw.text((left, top), line, SMALL_INK, _font(self.note_px))
            top += round(self.note_px * 1.3)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int, most: int) -> list[str]:
    """Lines no wider than `width_px`; longer words are broken; text beyond `most` lines is replaced by `...`."""
    lines: list[str] = []
    longest = (most + 1) * width_px  # letters of a word that could be shown, about
    for match in re.finditer(r"\S+", text):
        word = match[0][:longest]
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and len(joined) <= longest and font.getlength(joined) <= width_px:
            lines[-1] = joined
            continue
        while word:
            fits = _fitting(word[:width_px], font, width_px)
            lines.append(word[:fits])
            word = word[fits:]
        if len(lines) > most:
            break
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "...") > width_px:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "..."]
    return lines


def _fitting(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> int:
    """The number of a word's letters that fit a line, at least 1."""
    return max(1, bisect_right(range(1, len(word) + 1), False, key=lambda end: font.getlength(word[:end]) > width_px))


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture enlarged by a whole factor, or shrunk, so that its longer edge is at most `side`."""
    longest = max(picture.size)
    if longest <= side:
        factor = side // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, picture.width * side // longest), max(1, picture.height * side // longest))
    return picture.resize(size, Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans from matplotlib's data: Pillow's own font has no accents and no arrow."""
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size=size)


def png_bytes(picture: Image.Image) -> bytes:
    """A PNG file's contents."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
