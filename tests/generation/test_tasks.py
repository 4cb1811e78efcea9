"""What tasks show of themselves."""

from __future__ import annotations

from PIL import Image

from megadiff.generation.tasks import Task, cell_of

BLUE_BUT_TRANSPARENT = Image.new("RGBA", (4, 4), (0, 0, 255, 0))


def test_a_cell_shows_a_transparent_picture_on_white_and_generated_texts_behind_an_arrow() -> None:
    cell = cell_of(Task("image-to-text", ("image",), ("text",)), {"image": BLUE_BUT_TRANSPARENT, "text": "a cat"})
    assert cell.picture is not None
    assert cell.picture.getcolors() == [(16, (255, 255, 255))]
    assert cell.caption == "\u2192 a cat"


def test_a_cell_without_a_picture_has_only_text() -> None:
    cell = cell_of(Task("joint", (), ("a", "b")), {"a": "3", "b": "blue"})
    assert (cell.picture, cell.caption) == (None, "\u2192 3 \u2192 blue")


def test_a_generated_picture_is_shown_rather_than_the_given_one() -> None:
    given, generated = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    cell = cell_of(Task("image-to-signal", ("image",), ("signal",)), {"image": given, "signal": generated})
    assert cell.picture is not None
    assert cell.picture.getpixel((0, 0)) == (0, 0, 255)
