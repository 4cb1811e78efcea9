"""Input files of sampling: prompts, pictures, rows of a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from megadiff.config.errors import UserError
from megadiff.data import pictures
from megadiff.data.csv_text import records_of, shown
from megadiff.data.errors import picture_fault


def read_prompts(path: str) -> list[tuple[str, str]]:
    """(id, caption) pairs from a JSON file: a list of captions, {"id": "caption"}, or {"text": [captions]}.

    Raises:
        UserError: the file is missing or has another form.
    """
    try:
        tree = json.loads(Path(path).read_bytes().decode("utf-8-sig"), object_pairs_hook=_each_once)
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path} is not JSON: {error}") from None
    except _Twice as twice:
        raise UserError(f"--prompts {path} has the key {twice} twice; name each caption differently") from None
    if isinstance(tree, dict) and isinstance(tree.get("text"), list):
        tree = tree["text"]
    pairs = list(enumerate(tree)) if isinstance(tree, list) else list(tree.items()) if isinstance(tree, dict) else []
    if not pairs or not all(isinstance(text, str) for _, text in pairs):
        raise UserError(
            f'--prompts {path} must be a list of captions, {{"id": "caption"}}, or {{"text": [captions]}}, and not empty'
        )
    return [(str(label), text) for label, text in pairs]


class _Twice(Exception):
    """A key that a JSON object has twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise _Twice(json.dumps(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)))
    return tree


def read_rows(path: str, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """The rows of a CSV by modality, without empty cells and columns without a name (an index).

    Raises:
        UserError: it cannot be read, or a column is unknown.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--table {path} cannot be read as CSV: {error}") from None
    records = [cells for _, cells in records_of(text, f"--table {path}", ",")]
    header, rows = (records[0], records[1:]) if records else ([], [])
    if unknown := [column for column in header if column and column not in columns]:
        raise UserError(f"--table {path} has the columns {shown(unknown)}; the model's are {shown(columns)}")
    if len(set(header)) != len(header):
        raise UserError(f"--table {path} names a column twice: {shown(header)}")
    if long := [number for number, row in enumerate(rows, 1) if len(row) > len(header)]:
        raise UserError(f"--table {path}, row {long[0]} has more cells than the header has columns")
    if not rows:
        raise UserError(f"--table {path} has no rows under its header")
    pairs = [zip(header, row, strict=False) for row in rows]  # cells that a short row lacks are empty
    return [{columns[column]: cell for column, cell in row if column in columns and cell} for row in pairs]


def open_picture(path: str | Image.Image) -> Image.Image:
    """A picture, or the picture in a file, as training opens it. Raises UserError if the file holds none."""
    try:
        return pictures.plain(path) if isinstance(path, Image.Image) else pictures.open_picture(path)
    except pictures.UNREADABLE as error:
        raise UserError(f"{path} cannot be read as a picture: {picture_fault(error)}") from None


def checked_text(prompt: str) -> str:
    """The prompt. Raises UserError if it is no valid text."""
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError("a prompt holds bytes that are no UTF-8 text; write it in UTF-8")
    return prompt
