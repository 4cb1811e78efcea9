"""The source that raw data is read through, and its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megadiff.config.errors import UserError
from megadiff.data.packing.source import Source, expand, is_encoded
from megadiff.data.packing.sources.folder import FolderSource
from megadiff.data.packing.sources.rows import LINES, PARQUET, RowsSource
from megadiff.data.packing.sources.sam_llava import SamLlavaSource
from megadiff.data.packing.sources.tars import TarsSource
from megadiff.data.shards.shard import COMPRESSED, TAR
from megadiff.storage import addresses, store

_READ = "a folder of pictures, .parquet, .pq, .jsonl or .ndjson tables, .tar files, or a list of them in .txt or .tsv"


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None takes the first usual name that the table has."""

    image: str | None = None
    caption: str | None = None


def open_source(
    kind: str,
    sources: Sequence[str],
    unit_samples: int,
    scratch: Path,
    *,
    columns: Columns | None = None,
    captions: str | None = None,
) -> Source:
    """Raw data of a kind: folder, table, tars, sam-llava, paper, or auto.

    Args:
        captions: the table of captions, for sam-llava.

    Raises:
        UserError: it cannot be found or read, or the arguments do not go together.
    """

    kind = kind_of(sources[0]) if kind == "auto" else kind
    columns = columns or Columns()
    if kind in ("folder", "sam-llava", "paper") and len(sources) > 1:
        raise UserError(f"--kind {kind} takes one source, and {len(sources)} are given: {', '.join(sources[:3])}")
    if captions is not None and kind != "sam-llava":
        raise UserError(f"--captions goes with --kind sam-llava, and {sources[0]} is of kind {kind}; leave it out")
    if columns != Columns() and kind not in ("table", "sam-llava"):
        raise UserError(
            f"--image-column and --caption-column go with tables, and {sources[0]} is of kind {kind}; leave them out"
        )
    if kind == "folder":
        return FolderSource(sources[0], unit_samples)
    if kind == "paper":
        from megadiff.data.packing.sources.encoded import EncodedSource  # which needs torch

        return EncodedSource(sources[0], unit_samples)
    if kind == "table":
        return RowsSource(sources, unit_samples, columns.image, columns.caption)
    if kind == "tars":
        return TarsSource(sources, scratch)
    if captions is None:
        raise UserError("--kind sam-llava needs --captions TABLE, the captions by the pictures' names")
    return SamLlavaSource(sources[0], captions, scratch, columns.image, columns.caption)


def kind_of(source: str) -> str:
    """The kind of raw data at an address. Raises UserError if it is unclear."""

    address = expand(source)[0]
    if is_encoded(address):
        return "paper"
    if (kind := _kind_of_name(address, PARQUET + LINES)) is not None:
        return kind
    if addresses.is_local(address) and addresses.local_path(address).is_file():
        raise UserError(f"{addresses.shown(source)} is no kind of file that is read: {_READ}")
    names = store.list_names(address)
    kinds = {kind for name in names if not name.startswith(".") and (kind := _kind_of_name(name, PARQUET + LINES))}
    kinds.discard("sam-llava")  # a README.txt beside the data
    if len(kinds) > 1:
        raise UserError(f"{source} holds {' and '.join(sorted(kinds))}; say which by --kind")
    if kinds:
        return kinds.pop()
    if not addresses.is_local(source):
        raise UserError(f"{source} holds neither .tar files nor tables; name what should be read, or its --kind")
    return "folder"


def _kind_of_name(name: str, tables: tuple[str, ...]) -> str | None:
    endings = {
        **dict.fromkeys((TAR, *COMPRESSED), "tars"),
        ".txt": "sam-llava",
        ".tsv": "sam-llava",
        **dict.fromkeys(tables, "table"),
    }
    return next((kind for ending, kind in endings.items() if name.lower().endswith(ending)), None)
