"""The records of a CSV, for whoever reads a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from megadiff.data.errors import DataError

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}


def records_of(text: str, source: str, separator: str | None = None) -> list[tuple[int, list[str]]]:
    """(line of the file on which it begins, cells) of every record; empty lines are none.

    Args:
        source: names the table in errors.
        separator: None takes a comma, and refuses a table whose first line has another one and no comma.

    Raises:
        DataError: it is no CSV.
    """
    if separator is None and (name := _other_separator(text)):
        raise DataError(
            f"{source} seems to have a {name} between its cells; give --separator {name}, or --separator comma for one column"
        )
    records, begins = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator or ",", strict=True)
    try:
        for record in reader:
            if record:
                records.append((begins, record))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}, line {begins} is no CSV: {error}") from None
    return records


def shown(names: Iterable[str]) -> str:
    """Names of columns in a sentence."""
    return ", ".join(name or "(unnamed)" for name in names)


def _other_separator(text: str) -> str | None:
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    return None if "," in first else next((name for name, mark in SEPARATORS.items() if mark in first.strip("\r\n")), None)
