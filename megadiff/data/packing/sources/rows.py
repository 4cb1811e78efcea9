"""The rows of Parquet or JSONL files: a column of pictures (bytes, paths or addresses) and one of captions."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Protocol

from megadiff.config.errors import UserError
from megadiff.data.errors import DataError
from megadiff.data.packing.source import NO_PICTURE, UNREACHABLE, LeaveOut, LeftOut, Raw, captions_in, expand
from megadiff.data.packing.sources.tars import origins_of
from megadiff.storage import addresses, local, store
from megadiff.storage.errors import AddressError, MissingError, StorageError

IMAGE_COLUMNS = ("image", "image_path", "path", "url", "jpg", "png", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
PARQUET, LINES = (".parquet", ".pq"), (".jsonl", ".ndjson")

Row = tuple[int, Mapping[str, Any] | None]
"""(number of the row within its file, its cells or None if they cannot be read)."""

_BATCH_ROWS = 128
_BUFFER_BYTES = 2**20
_AHEAD = 16


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a table, and the first one's offset in the file, in bytes, for JSON Lines."""

    start: int
    stop: int
    offset: int = 0


class TableFile(Protocol):
    """A file of rows that is read piece by piece."""

    address: str
    fault: str
    """Ends the sentence about an unreadable row: `row N is ...`."""

    @property
    def columns(self) -> Sequence[str]: ...

    def holds_bytes(self, column: str) -> bool:
        """Whether the cells hold the pictures themselves, so that skipping rows costs as much as reading them."""

    def spans(self, rows: int, *, whole_groups: bool) -> list[Span]:
        """Spans of about `rows` rows that cover the table."""

    def rows(self, span: Span, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a span. Raises DataError if the file is damaged."""


class RowsSource:
    """A unit is a span of rows."""

    kind = "table"

    def __init__(
        self,
        sources: Sequence[str],
        unit_samples: int,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        """Raises UserError if there is no table, one has no such columns, or one cannot be read."""
        files = [address for source in sources for address in tables_of(source)]
        self.origins = origins_of(files)
        self.tables = [open_table(address) for address in files]
        self.image = column_of(self.tables[0], image_column, IMAGE_COLUMNS, "--image-column")
        self.caption = column_of(self.tables[0], caption_column, CAPTION_COLUMNS, "--caption-column")
        with ThreadPoolExecutor(_AHEAD) as pool:
            spans = list(pool.map(partial(self._spans, unit_samples), self.tables))
            sizes = list(pool.map(store.size, files))
        self.units = [(number, span) for number, spans_of_table in enumerate(spans) for span in spans_of_table]
        first = [number for spans_of_table in spans for number in range(len(spans_of_table))]
        self.names = [f"{table:05d}-{number:06d}" for (table, _), number in zip(self.units, first, strict=True)]
        listed = "".join(f"{origin}\0{size}\n" for origin, size in zip(self.origins, sizes, strict=True))
        self.identity = {
            "files": len(files),
            "names_and_sizes": hashlib.blake2b(listed.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest(),
            "image_column": self.image,
            "caption_column": self.caption,
            "unit_samples": unit_samples,
        }
        self.threads = 1 if all(table.holds_bytes(self.image) for table in self.tables) else _AHEAD

    def samples(self, unit: int) -> Iterator[Raw | LeftOut]:
        number, span = self.units[unit]
        table, origin = self.tables[number], self.origins[number]
        for row, cells in table.rows(span, [self.image, self.caption]):
            place = f"{origin}/{row:09d}"
            if cells is None:
                yield LeftOut(addresses.printable(place), "unreadable row", f"row {row + 1} is {table.fault}")
                continue
            address = _address(cells.get(self.image), addresses.parent(table.address))
            source = addresses.printable(place if address is None else address)
            yield Raw(place, source, captions_in(cells.get(self.caption)), partial(_bytes, cells.get(self.image), address))

    def _spans(self, unit_samples: int, table: TableFile) -> list[Span]:
        for column in (self.image, self.caption):
            if isinstance(table, ParquetTable) and column not in table.columns:
                raise DataError(f"{addresses.shown(table.address)} has no column {column}; it has {', '.join(table.columns)}")
        return table.spans(unit_samples, whole_groups=table.holds_bytes(self.image))


def tables_of(source: str) -> list[str]:
    """The tables that a pattern, an address or a folder stands for. Raises DataError if there are none."""
    tables = []
    for address in expand(source):
        if address.lower().endswith(PARQUET + LINES):
            tables.append(address)
            continue
        names = [name for name in store.list_names(address) if name.lower().endswith(PARQUET + LINES)]
        if not names:
            raise DataError(f"{address} holds no tables ({', '.join(PARQUET + LINES)})")
        tables += [addresses.join(address, name) for name in names]
    return tables


def open_table(address: str) -> TableFile:
    return ParquetTable(address) if address.lower().endswith(PARQUET) else LinesTable(address)


def column_of(table: TableFile, name: str | None, usual: Sequence[str], flag: str) -> str:
    """The column of this name, or without one the first usual column. Raises UserError if the table lacks it."""
    if name is not None:
        if name not in table.columns:
            raise UserError(f"{addresses.shown(table.address)} has no column {name}; it has {', '.join(table.columns)}")
        return name
    column = next((column for column in usual if column in table.columns), None)
    if column is None:
        raise UserError(
            f"{addresses.shown(table.address)} has none of the columns {', '.join(usual)}; give {flag}, one of its "
            f"{', '.join(table.columns)}"
        )
    return column


class ParquetTable:
    """Read by row groups, each in small batches."""

    fault = "no text in UTF-8"

    def __init__(self, address: str) -> None:
        self.address = address

    @cached_property
    def columns(self) -> Sequence[str]:
        return tuple(self._schema.names)

    def holds_bytes(self, column: str) -> bool:
        kind = str(self._schema.field(column).type)
        return "binary" in kind or kind.startswith("list")

    def spans(self, rows: int, *, whole_groups: bool) -> list[Span]:
        ends = list(accumulate(self._group_rows))
        total = ends[-1] if ends else 0
        spans, start = [], 0
        while start < total:
            stop = min(start + rows, total)
            if whole_groups:
                stop = next(end for end in ends if end >= stop)
            spans.append(Span(start, stop))
            start = stop
        return spans

    def rows(self, span: Span, columns: Sequence[str]) -> Iterator[Row]:
        ends = list(accumulate(self._group_rows, initial=0))
        groups = [number for number in range(len(ends) - 1) if ends[number] < span.stop and ends[number + 1] > span.start]
        at = ends[groups[0]]
        try:
            with _raw(self.address) as file:
                parquet = _parquet().ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
                for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(columns), use_threads=False):
                    low, high = max(span.start - at, 0), min(span.stop - at, batch.num_rows)
                    if low < high:
                        yield from zip(range(at + low, at + high), _cells_of(batch.slice(low, high - low)), strict=True)
                    at += batch.num_rows
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None

    @cached_property
    def _footer(self) -> tuple[Any, list[int]]:
        try:
            with _raw(self.address) as file:
                parquet = _parquet().ParquetFile(file)
                metadata = parquet.metadata
                return parquet.schema_arrow, [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None

    @property
    def _schema(self) -> Any:
        return self._footer[0]

    @property
    def _group_rows(self) -> list[int]:
        return self._footer[1]

    def _damaged(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:200]
        return DataError(f"{addresses.shown(self.address)} is no whole Parquet file ({reason}); write it anew or leave it out")


class LinesTable:
    """JSON Lines: an object a line."""

    fault = "no JSON object"

    def __init__(self, address: str) -> None:
        self.address = address

    @cached_property
    def columns(self) -> Sequence[str]:
        """The keys of the first line that is an object."""
        with self._open() as file:
            for line in file:
                cells = _parsed(line)
                if cells is not None:
                    return tuple(cells)
        raise DataError(f"{addresses.shown(self.address)} holds no JSON objects, one a line")

    def holds_bytes(self, column: str) -> bool:
        return False

    def spans(self, rows: int, *, whole_groups: bool) -> list[Span]:
        spans, start, offset, at = [], 0, 0, 0
        number = -1
        with self._open() as file:
            for number, line in enumerate(file):
                if number - start == rows:
                    spans.append(Span(start, number, offset))
                    start, offset = number, at
                at += len(line)
        if number >= start:
            spans.append(Span(start, number + 1, offset))
        return spans

    def rows(self, span: Span, columns: Sequence[str]) -> Iterator[Row]:
        with self._open() as file:
            file.seek(span.offset)
            for number in range(span.start, span.stop):
                line = file.readline()
                if line.strip():
                    yield number, _parsed(line)

    def _open(self) -> io.BufferedReader:
        return io.BufferedReader(_raw(self.address), 8 * _BUFFER_BYTES)


def _cells_of(batch: Any) -> list[Mapping[str, Any] | None]:
    """The rows of a batch of Parquet; None for a row whose text is not UTF-8, which writers need not check."""
    try:
        rows: list[Mapping[str, Any] | None] = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        rows = [row for number in range(batch.num_rows) for row in _cells_of(batch.slice(number, 1))]
    return rows


def _parsed(line: bytes) -> Mapping[str, Any] | None:
    try:
        cells = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return None
    return cells if isinstance(cells, Mapping) else None


def _parquet() -> Any:
    return importlib.import_module("pyarrow.parquet")  # a second of imports that no other source needs


class _Distant(io.RawIOBase):
    """A distant object as a seekable file; each read is a request for a range."""

    def __init__(self, address: str) -> None:
        self._address, self._size, self._at = address, store.size(address), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = store.read_bytes(self._address, self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _raw(address: str) -> io.RawIOBase:
    if not addresses.is_local(address):
        return _Distant(address)
    try:
        return io.FileIO(addresses.local_path(address))
    except OSError as error:
        raise local.unreadable(address, error) from None


# -------------------------------------------------------------------------------------------------------------- a cell


def _address(cell: Any, folder: str) -> str | None:
    """The address that a cell names; None if it holds the picture itself or nothing."""
    if isinstance(cell, Mapping):
        path = cell.get("path")
        return path if cell.get("bytes") and isinstance(path, str) else _address(cell.get("bytes") or path, folder)
    if not isinstance(cell, str) or not cell.strip():
        return None
    return cell if "://" in cell or cell.startswith("/") else addresses.join(folder, cell)


def _bytes(cell: Any, address: str | None) -> bytes:
    """A cell's picture. Raises LeaveOut, or StorageError if storage other than a web server is out of reach."""
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(content, bytes) and content:
        return content
    if address is None:
        raise LeaveOut(NO_PICTURE, "the cell is empty" if not cell else f"the cell is a {type(cell).__name__}")
    try:
        return store.read_bytes(address)
    except (MissingError, AddressError) as error:
        raise LeaveOut(NO_PICTURE, str(error)) from None
    except StorageError as error:
        if addresses.is_url(address):
            raise LeaveOut(UNREACHABLE, str(error)) from None
        raise
