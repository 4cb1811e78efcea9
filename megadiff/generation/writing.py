"""The folder of samples: its request, chunks that are whole or absent, and the files that join them.

Layout: `request.json`, `.parts/` (one file of records per finished chunk), the pictures (or one tar shard per chunk), and, once
all chunks are there, `samples.jsonl`, `sheet.png`, for tables `samples.csv`, for tars `manifest.json`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from megadiff.config.errors import UserError
from megadiff.data.codecs.base import Codec
from megadiff.data.codecs.build import table_columns
from megadiff.data.shards.shard import Manifest, Members, Shard, ShardEntry, write_manifest, write_shard
from megadiff.generation.planner import Chunk, Item
from megadiff.generation.tasks import Task, cell_of
from megadiff.report.sheet import SheetSection, contact_sheet, png_bytes
from megadiff.storage import store
from megadiff.weights.loading import Loaded

SHEET_CELLS = 32
RECORDS, SHEET, TABLE, REQUEST, PARTS = "samples.jsonl", "sheet.png", "samples.csv", "request.json", ".parts"


def open_folder(out: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, or continue one with part of the same request. Several processes may do so at once."""
    path = out / REQUEST
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        strangers = [entry.name for entry in out.iterdir() if entry.name != PARTS and REQUEST not in entry.name]
        if not path.exists():  # after the listing: another process writes it before anything else
            if strangers:
                raise UserError(f"--out {out} holds other files ({min(strangers)}); name a new folder")
            store.write_bytes(str(path), json.dumps(identity, indent=1, ensure_ascii=False).encode())
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; name another folder") from None
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; name a new folder") from None
    differing = [key for key in identity if before.get(key) != identity[key]]
    if differing:
        was, now = (json.dumps(tree.get(differing[0]), ensure_ascii=False) for tree in (before, identity))
        raise UserError(f"--out {out} holds samples of another request ({differing[0]}: {was}, now {now}); name a new folder")


@dataclass(frozen=True)
class SampleWriter:
    """Stores chunks. A chunk's records are written last, so a chunk with records is whole."""

    out: Path
    codecs: Mapping[str, Codec]
    format: str

    def has(self, number: int) -> bool:
        return self._records_path(number).exists()

    def write(self, number: int, task: Task, items: Sequence[Item], states: Mapping[str, Tensor]) -> None:
        lines: list[dict[str, Any]] = []
        shard: dict[str, Members] = {}
        for index, item in enumerate(items):
            files: Members = {}
            values = {name: self.codecs[name].decode(state[index]) for name, state in states.items()}
            given = self._stored(item.condition, item.name, ".given", files)
            generated = self._stored(values, item.name, "", files)
            record = {"number": item.number, "name": item.name, "task": task.name, "given": given, "generated": generated}
            lines.append(record)
            members = {name.removeprefix(f"{item.name}."): data for name, data in files.items()}
            shard[item.name] = {**members, "json": json.dumps(record, ensure_ascii=False).encode()}
        entry = None
        if self.format == "tar" and shard:
            entry = vars(write_shard(str(self.out), self.shard_name(number), shard))
        elif self.format == "folder":
            for name, members in shard.items():
                for ending, data in members.items():
                    if ending != "json":
                        store.write_bytes(str(self.out / f"{name}.{ending}"), data)
        chunk = json.dumps({"shard": entry, "records": lines}, ensure_ascii=False)
        store.write_bytes(str(self._records_path(number)), chunk.encode())

    def read(self, number: int) -> tuple[ShardEntry | None, list[dict[str, Any]]]:
        tree = json.loads(self._records_path(number).read_text(encoding="utf-8"))
        return None if tree["shard"] is None else ShardEntry(**tree["shard"]), tree["records"]

    def shown(self, number: int, sample: str, stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Image.Image | str]:
        """By modality, a picture or text for the entries of a chunk's record."""
        read = partial(self._file, number, sample)
        return {name: self.codecs[name].shown(self.codecs[name].restored(entry, read)) for name, entry in stored.items()}

    def _file(self, number: int, sample: str, name: str) -> bytes:
        """The contents of a sample's file, by its name in the record."""
        if self.format == "folder":
            return (self.out / name).read_bytes()
        path = self.out / self.shard_name(number)
        shard = Shard(str(path), path)
        offset = next(offset for offset in range(len(shard)) if shard.key(offset) == sample)
        return bytes(shard.members(offset)[name.removeprefix(f"{sample}.")])

    def _stored(self, values: Mapping[str, Any], sample: str, ending: str, files: Members) -> dict[str, dict[str, Any]]:
        """By modality, a value's entry in a record; its files are added to `files`, by their whole names."""
        entries = {name: self.codecs[name].stored(value, f"{sample}.{name}{ending}") for name, value in values.items()}
        for each in entries.values():
            files.update(each.files)
        return {name: each.entry for name, each in entries.items()}

    def shard_name(self, number: int) -> str:
        return f"samples-{number:06d}.tar"

    def _records_path(self, number: int) -> Path:
        return self.out / PARTS / f"{number:06d}.json"


def join_records(writer: SampleWriter, chunks: Sequence[Chunk], loaded: Loaded, identity: Mapping[str, Any]) -> None:
    """Join the chunks of a folder: its records, and a sheet or a table."""
    parts = [writer.read(number) for number in range(len(chunks))]
    records = [(chunk, record) for chunk, (_, lines) in enumerate(parts) for record in lines]
    records.sort(key=lambda pair: int(pair[1]["number"]))
    if not records:
        raise UserError("not one sample could be read from --data; see the warnings above")
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for _, record in records)
    store.write_bytes(str(writer.out / RECORDS), text.encode())
    if writer.format == "tar":
        facts = {"request": dict(identity), "source": loaded.source}
        write_manifest(str(writer.out), Manifest(tuple(entry for entry, _ in parts if entry is not None), facts))
    if columns := table_columns(writer.codecs):
        _write_table(writer.out / TABLE, [record for _, record in records], columns)
    else:
        _write_sheet(writer, chunks[0].task, records, loaded)


def _write_table(path: Path, records: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(columns.values())
    for record in records:
        cells = {**record["given"], **record["generated"]}
        rows.writerow([next(iter(cells[name].values())) if name in cells else "" for name in columns])
    store.write_bytes(str(path), buffer.getvalue().encode())


def _write_sheet(writer: SampleWriter, task: Task, records: Sequence[tuple[int, Mapping[str, Any]]], loaded: Loaded) -> None:
    cells = []
    for number, record in records[:SHEET_CELLS]:
        cells.append(cell_of(task, writer.shown(number, record["name"], {**record["given"], **record["generated"]})))
    sheet = contact_sheet([SheetSection(f"{task.name}, {loaded.source}", cells)])
    store.write_bytes(str(writer.out / SHEET), png_bytes(sheet))
