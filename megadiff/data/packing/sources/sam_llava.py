"""The paper's pictures and captions: the tars of SA-1B, each downloaded, used and deleted, with captions of LLaVA from a table.

The list has a line per tar, `name.tar<TAB>URL[<TAB>sha256]`. Its links expire; a newer list of the same tars goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from megadiff.config.errors import UserError
from megadiff.data.errors import DataError
from megadiff.data.packing.source import LeftOut, Raw, captions_in, clean, unit_name
from megadiff.data.packing.sources.rows import CAPTION_COLUMNS, IMAGE_COLUMNS, LINES, PARQUET, TableFile, column_of, open_table
from megadiff.data.packing.sources.tars import fetched, samples_of
from megadiff.data.shards.shard import Members, Shard
from megadiff.files import locked, sha256
from megadiff.storage import addresses, store

NAME_COLUMNS = (*IMAGE_COLUMNS, "name", "image_id", "id", "key", "__key__")
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Line:
    """A tar of the list."""

    name: str
    address: str
    sha256: str | None


class SamLlavaSource:
    """A unit is a line of the list."""

    kind = "sam-llava"
    threads = 1

    def __init__(
        self,
        source: str,
        captions: str,
        scratch: Path,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        """Raises UserError if the list or the captions cannot be read."""
        self.lines = read_list(source)
        self.names = [unit_name(line.name) for line in self.lines]
        self.captions = Captions(captions, scratch, image_column, caption_column)
        self.identity = {"captions": self.captions.digest}
        self.scratch = scratch

    def samples(self, unit: int) -> Iterator[Raw | LeftOut]:
        line = self.lines[unit]
        with fetched(line.address, self.scratch / f"{self.names[unit]}.tar", partial(_check, line)) as path:
            yield from samples_of(Shard(line.name, path), line.name, self.captions.of)


def read_list(source: str) -> list[Line]:
    """The lines of a list; a header is passed over.

    Raises:
        DataError: a line is no `name.tar<TAB>URL[<TAB>sha256]`, a tar is listed twice, or there is none.
    """
    try:
        text = store.read_bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{source} is no UTF-8 text; give a list of lines `name.tar<TAB>URL`") from None
    lines: dict[str, Line] = {}
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not any(cells) or (not lines and number == 1 and not is_list_line(line)):
            continue
        if not is_list_line(line):
            raise DataError(f"{source} line {number} is no `name.tar<TAB>URL[<TAB>sha256]`: {cells[0][:60]!r}")
        name, sha256 = cells[0], cells[2].lower() if len(cells) == 3 else None
        if name in lines:
            raise DataError(f"{source} line {number} lists {name} again; take it out")
        lines[name] = Line(name, cells[1], sha256 or None)
    if not lines:
        raise DataError(f"{source} lists no tars; give lines `name.tar<TAB>URL[<TAB>sha256]`")
    return list(lines.values())


def is_list_line(line: str) -> bool:
    """Whether a line is `name.tar<TAB>URL[<TAB>sha256]`."""
    return re.fullmatch(r"[^\t]+\.tar\s*\t\s*[^\t]*/[^\t]*(\t\s*([0-9a-fA-F]{64})?\s*)?", line.strip("\r\n ")) is not None


def _check(line: Line, path: Path) -> None:
    if line.sha256 is None:
        return
    digest = sha256(path)
    if digest != line.sha256:
        raise DataError(
            f"{line.name} from {addresses.shown(line.address)} has the SHA-256 {digest[:12]}..., and the list says "
            f"{line.sha256[:12]}...; start again, or mend the list"
        )


class Captions:
    """Captions by a picture's name without its ending; on disk, so that ten million of them need no memory."""

    def __init__(self, address: str, scratch: Path, image_column: str | None, caption_column: str | None) -> None:
        """Read the table into a database under `scratch`, unless an earlier start or another process has done so.

        Raises:
            UserError: it cannot be read, or holds no captions.
        """
        self.address, self._columns = address, (image_column, caption_column)
        name = hashlib.blake2b(json.dumps([_version(address), *self._columns]).encode(), digest_size=8).hexdigest()
        path = scratch / f"captions-{name}.sqlite"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                self._build(path)
        self._database = sqlite3.connect(path, check_same_thread=False)
        ((self.digest,),) = self._database.execute("SELECT text FROM digest")

    def of(self, key: str, _: Members) -> Sequence[Any]:
        """The captions of a tar's sample; none if its name is no text."""
        if not clean([key]):
            return []
        rows = self._database.execute("SELECT texts FROM captions WHERE name = ? ORDER BY rowid", (_stem(key),))
        return [text for (texts,) in rows for text in json.loads(texts)]

    def _build(self, path: Path) -> None:
        partial_path = path.with_suffix(".partial")
        partial_path.unlink(missing_ok=True)
        digest, rows = hashlib.blake2b(digest_size=16), 0
        with closing(sqlite3.connect(partial_path)) as database:
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.execute("CREATE TABLE captions (name TEXT, texts TEXT)")
            database.execute("CREATE TABLE digest (text TEXT)")
            waiting: list[tuple[str, str]] = []
            for name, texts in tqdm(self._rows(), desc="captions", unit="row", disable=None):
                waiting.append((_stem(name), json.dumps(texts, ensure_ascii=False)))
                digest.update("\0".join(waiting[-1]).encode() + b"\n")
                rows += 1
                if len(waiting) == _ROWS_AT_ONCE:
                    database.executemany("INSERT INTO captions VALUES (?, ?)", waiting)
                    waiting.clear()
            database.executemany("INSERT INTO captions VALUES (?, ?)", waiting)
            database.execute("CREATE INDEX names ON captions (name)")
            database.execute("INSERT INTO digest VALUES (?)", (digest.hexdigest(),))
            database.commit()
        if not rows:
            partial_path.unlink()
            raise DataError(f"{self.address} holds no captions; give a table of pictures' names and their captions")
        partial_path.replace(path)

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        for name, cell in _pairs(self.address, *self._columns):
            texts = clean(captions_in(cell))
            if texts and clean([name]):
                yield name, texts


def _pairs(address: str, image_column: str | None, caption_column: str | None) -> Iterator[tuple[Any, Any]]:
    """(picture's name, captions) of a JSON, JSONL or Parquet table."""
    if address.lower().endswith(PARQUET + LINES):
        table = open_table(address)
        image = column_of(table, image_column, NAME_COLUMNS, "--image-column")
        caption = column_of(table, caption_column, CAPTION_COLUMNS, "--caption-column")
        yield from _cells(table, image, caption)
        return
    if not address.lower().endswith(".json"):
        raise UserError(f"--captions {address} must be a .json, .jsonl or .parquet file")
    try:
        tree = json.loads(store.read_bytes(address).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{address} is no JSON: {error}") from None
    if isinstance(tree, dict):
        yield from tree.items()
        return
    records = [record for record in tree if isinstance(record, dict)] if isinstance(tree, list) else []
    if not records:
        raise DataError(f'{address} must hold {{"picture": "caption"}} or a list of objects with a name and a caption each')
    image = _key_of(address, records[0], image_column, NAME_COLUMNS)
    caption = _key_of(address, records[0], caption_column, CAPTION_COLUMNS)
    yield from ((record.get(image), record.get(caption)) for record in records)


def _cells(table: TableFile, image: str, caption: str) -> Iterator[tuple[Any, Any]]:
    for span in table.spans(1 << 20, whole_groups=True):
        for _, cells in table.rows(span, [image, caption]):
            if cells is not None:
                yield cells.get(image), cells.get(caption)


def _key_of(address: str, record: dict[str, Any], name: str | None, usual: Sequence[str]) -> str:
    names = [name] if name is not None else usual
    key = next((key for key in names if key in record), None)
    if key is None:
        raise UserError(f"the objects of {address} have no {' or '.join(names)}; they have {', '.join(record)}")
    return key


def _stem(name: str) -> str:
    """sa_1.jpg, ./sa_1.jpg and sa_1 alike."""
    return PurePosixPath(name.strip()).name.partition(".")[0]


def _version(address: str) -> list[Any]:
    changed = 0
    with suppress(OSError):
        changed = os.stat(addresses.local_path(address)).st_mtime_ns if addresses.is_local(address) else 0  # noqa: PTH116
    return [address, store.size(address), changed]
