"""The records of a CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence

from megadiff.data.errors import DataError

_LOOKED_AT = 50
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}


def records_of(text: str, source: str, separator: str | None = None) -> list[tuple[int, list[str]]]:
    """(first line in the file, cells) of every record; empty lines are no records.

    Args:
        source: names the table in errors.
        separator: None takes a comma, and refuses a table that seems to have another one.

    Raises:
        DataError: it is no CSV.
    """
    if separator is None and (name := _other_separator(text)):
        raise DataError(
            f"{source} seems to have a {name} between its cells; give --separator {name}, or --separator comma for one column"
        )
    records, first_line = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator or ",", strict=True)
    try:
        for record in reader:
            if record:
                records.append((first_line, record))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}, line {first_line} is no CSV: {error}") from None
    return records


def shown(names: Iterable[str]) -> str:
    """Names of columns in a sentence."""
    return ", ".join(name or "(unnamed)" for name in names)


def _other_separator(text: str) -> str | None:
    """The separator that a table seems to have instead of a comma: it is in the first line and cuts all lines alike."""
    lines = [line for line in itertools.islice(io.StringIO(text), _LOOKED_AT) if line.strip()]
    first = lines[0] if lines else ""
    for name, mark in SEPARATORS.items():
        if mark != "," and mark in first.strip("\r\n") and ("," not in first or _cuts_alike(lines, mark)):
            return name
    return None


def _cuts_alike(lines: Sequence[str], mark: str) -> bool:
    counts = {len(cells) for cells in csv.reader(lines, delimiter=mark)}
    return len(lines) > 1 and len(counts) == 1
