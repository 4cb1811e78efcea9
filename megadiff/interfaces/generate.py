"""`megadiff sample`: draw what was asked for, chunk by chunk, on any number of processes; what is finished is kept.

Layout of the output folder: `request.json`, `.parts/` (one file of records per finished chunk), the pictures (or one tar shard
per chunk), and, once all chunks are there, `samples.jsonl`, `sheet.png`, for tables `samples.csv`, for tars `manifest.json`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from megadiff.config import checks
from megadiff.config.errors import UserError
from megadiff.config.schema import ClassField, LatentField, NumberField
from megadiff.data.codecs.base import Codec
from megadiff.data.pictures import flat
from megadiff.data.shards.shard import MANIFEST, Manifest, Members, Shard, ShardEntry, write_manifest, write_shard
from megadiff.distributed.ranks import Ranks
from megadiff.evaluation.report import Section, contact_sheet
from megadiff.evaluation.tasks import Task, cell_of, draw
from megadiff.interfaces.conditions import Chunk, Item, Planner, keys_of
from megadiff.interfaces.request import GenerateRequest
from megadiff.interfaces.weights import Loaded, load
from megadiff.storage import store

SHEET_CELLS = 32
RECORDS, SHEET, TABLE, REQUEST, PARTS = "samples.jsonl", "sheet.png", "samples.csv", "request.json", ".parts"
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LOOKS = 10.0, 0.2


def generate(request: GenerateRequest) -> Path:
    """Draw samples into `request.out`; returns the path of the records.

    With RANK and WORLD_SIZE set (torchrun) the chunks are shared out, and rank 0 joins the records once all are there. Chunks
    that an earlier, interrupted call has finished are not drawn again.

    Raises:
        UserError: the checkpoint, the task, a condition or the output folder is at fault.
    """
    ranks = Ranks.from_environment()
    device = _device(ranks)
    loaded = load(request.checkpoint, request.weights, device, autoencoder=request.autoencoder, size=request.size)
    guide = None if request.guide is None else _guide(request.guide, request.weights, loaded, device, request.size)
    _check_autoencoders(loaded, request)
    codecs = loaded.codecs()
    chunks = Planner(request, loaded, codecs).chunks()
    out = Path(request.out)
    identity = {**request.record(), "weights_hash": loaded.fingerprint, "guide_hash": guide and guide.fingerprint}
    identity["contents"] = _contents(request)
    _open_folder(out, identity)
    writer = _Writer(out, codecs, request.format)
    mine = [number for number in range(ranks.rank, len(chunks), ranks.world) if not writer.has(number)]
    with _progress(request.task, len(mine), active=ranks.rank == 0) as report, torch.no_grad():
        for done, number in enumerate(mine):
            items, drawn = _draw(chunks[number], request, loaded, guide, device, _offset(report, done))
            writer.write(number, chunks[number].task, items, drawn)
    if ranks.rank == 0:
        # Other processes may not be done; their launcher ends all if one fails.
        while not all(writer.has(number) for number in range(len(chunks))):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        _join(writer, chunks, loaded, identity)
    return out / RECORDS


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def _check_autoencoders(loaded: Loaded, request: GenerateRequest) -> None:
    """Before anything is drawn. Raises UserError if latents could not be shown, or `autoencoder` has nothing to decode."""
    fields = loaded.data.fields
    checks.require(checks.autoencoder_faults(fields))
    if request.autoencoder is not None and not any(isinstance(field, LatentField) for field in fields.values()):
        raise UserError("--autoencoder is for models of latents, and this model has none; leave it out")


def _contents(request: GenerateRequest) -> dict[str, str]:
    """Hashes of the files that samples depend on: a path may name other contents tomorrow."""
    named = [request.prompts, request.table, request.mask_image, *request.image]
    paths = [str(path) for path in named if path is not None]
    if request.data is not None:
        paths.append(request.data if request.data.endswith(".json") else store.join(request.data, MANIFEST))
    return {path: hashlib.sha256(store.read_bytes(path)).hexdigest() for path in paths}


def _guide(address: str, weights: str, loaded: Loaded, device: torch.device, size: str | None) -> Loaded:
    """The weaker network for autoguidance. Raises UserError if it models something else."""
    guide = load(address, weights, device, size=size)
    same = {name: modality.space for name, modality in guide.model.modalities.items()}
    if same != {name: modality.space for name, modality in loaded.model.modalities.items()}:
        raise UserError(
            f"--guide {address} has other modalities than the checkpoint; take an earlier checkpoint of the same run"
        )
    return guide


def _draw(
    chunk: Chunk,
    request: GenerateRequest,
    loaded: Loaded,
    guide: Loaded | None,
    device: torch.device,
    report: Callable[[int, int], None],
) -> tuple[list[Item], dict[str, Tensor]]:
    items, conditions = chunk.load()
    if not items or not chunk.task.generated:
        return items, {}
    drawn = draw(
        loaded.module,
        loaded.model,
        request.sampling,
        chunk.task,
        keys_of(items, request.seed).to(device),
        conditions.to(device),
        batch=len(items),
        guide=None if guide is None else guide.module,
        progress=report,
    )
    return items, {name: state.cpu() for name, state in drawn.items()}


# ---------------------------------------------------------------------------------------------------------------- output


def _open_folder(out: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, or go on in one that holds part of the same request. Several processes may do so at once."""
    path = out / REQUEST
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        strangers = [entry.name for entry in out.iterdir() if entry.name != PARTS and REQUEST not in entry.name]
        if not path.exists():  # looked for after the listing: another process writes it before anything else
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
class _Writer:
    """Stores chunks; a chunk's records come last, so that a chunk that has them is whole."""

    out: Path
    codecs: Mapping[str, Codec]
    format: str

    def has(self, number: int) -> bool:
        return self._records(number).exists()

    def write(self, number: int, task: Task, items: Sequence[Item], drawn: Mapping[str, Tensor]) -> None:
        lines: list[dict[str, Any]] = []
        shard: dict[str, Members] = {}
        for index, item in enumerate(items):
            files: Members = {}
            given = {name: _stored(value, item.name, f"{name}.given.png", files) for name, value in item.condition.items()}
            values = {name: self.codecs[name].decode(state[index]) for name, state in drawn.items()}
            generated = {name: _stored(value, item.name, f"{name}.png", files) for name, value in values.items()}
            record = {"number": item.number, "name": item.name, "task": task.name, "given": given, "generated": generated}
            lines.append(record)
            shard[item.name] = {**files, "json": json.dumps(record, ensure_ascii=False).encode()}
        entry = None
        if self.format == "tar" and shard:
            entry = vars(write_shard(str(self.out), self.shard_name(number), shard))
        elif self.format == "folder":
            for name, members in shard.items():
                for ending, data in members.items():
                    if ending != "json":
                        store.write_bytes(str(self.out / f"{name}.{ending}"), data)
        chunk = json.dumps({"shard": entry, "records": lines}, ensure_ascii=False)
        store.write_bytes(str(self._records(number)), chunk.encode())

    def read(self, number: int) -> tuple[ShardEntry | None, list[dict[str, Any]]]:
        tree = json.loads(self._records(number).read_text(encoding="utf-8"))
        return None if tree["shard"] is None else ShardEntry(**tree["shard"]), tree["records"]

    def value(self, number: int, name: str, stored: Mapping[str, Any]) -> Any:
        """What a record of a chunk stands for: the picture, text or number."""
        if "picture" not in stored:
            return next(iter(stored.values()))
        if self.format == "folder":
            return Image.open(self.out / stored["picture"])
        path = self.out / self.shard_name(number)
        shard = Shard(str(path), path)
        offset = next(offset for offset in range(len(shard)) if shard.key(offset) == name)
        return Image.open(io.BytesIO(shard.members(offset)[stored["picture"].removeprefix(f"{name}.")]))

    def shard_name(self, number: int) -> str:
        return f"samples-{number:06d}.tar"

    def _records(self, number: int) -> Path:
        return self.out / PARTS / f"{number:06d}.json"


def _stored(value: Any, name: str, ending: str, files: Members) -> dict[str, Any]:
    """A value as a record holds it; pictures go to `files`."""
    if not isinstance(value, Image.Image):
        return {"value": value} if isinstance(value, int | float) else {"text": str(value)}
    buffer = io.BytesIO()
    flat(value).save(buffer, "png")
    files[ending] = buffer.getvalue()
    return {"picture": f"{name}.{ending}"}


def _join(writer: _Writer, chunks: Sequence[Chunk], loaded: Loaded, identity: Mapping[str, Any]) -> None:
    parts = [writer.read(number) for number in range(len(chunks))]
    records = [(chunk, record) for chunk, (_, found) in enumerate(parts) for record in found]
    records.sort(key=lambda pair: int(pair[1]["number"]))
    if not records:
        raise UserError("not one sample could be read from --data; see the warnings above")
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for _, record in records)
    store.write_bytes(str(writer.out / RECORDS), text.encode())
    if writer.format == "tar":
        facts = {"request": dict(identity), "source": loaded.source}
        write_manifest(str(writer.out), Manifest(tuple(entry for entry, _ in parts if entry is not None), facts))
    fields = loaded.data.fields
    if all(isinstance(field, NumberField | ClassField) for field in fields.values()):
        columns = {name: getattr(field, "column", name) for name, field in fields.items()}
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


def _write_sheet(writer: _Writer, task: Task, records: Sequence[tuple[int, Mapping[str, Any]]], loaded: Loaded) -> None:
    cells = []
    for number, record in records[:SHEET_CELLS]:
        values = {**record["given"], **record["generated"]}
        shown = {name: writer.value(number, record["name"], stored) for name, stored in values.items()}
        cells.append(cell_of(task, shown))
    buffer = io.BytesIO()
    contact_sheet([Section(f"{task.name}, {loaded.source}", cells)]).save(buffer, "png")
    store.write_bytes(str(writer.out / SHEET), buffer.getvalue())


# -------------------------------------------------------------------------------------------------------------- progress


@contextmanager
def _progress(title: str, chunks: int, *, active: bool) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, a line now and then in a log; told how many chunks are done."""
    on_terminal = sys.stderr.isatty()
    began = last = time.perf_counter()
    with tqdm(total=max(chunks, 1), desc=title, unit="chunk", dynamic_ncols=True, disable=not (active and on_terminal)) as bar:

        def report(done: float) -> None:
            nonlocal last
            bar.update(done - bar.n)
            now = time.perf_counter()
            if not active or on_terminal or (now - last < SECONDS_BETWEEN_LINES and done < chunks):
                return
            last = now
            left = timedelta(seconds=round((now - began) * (chunks - done) / max(done, 1e-9)))
            print(f"{title}: {done:.1f} of {chunks} chunks, {left} left", file=sys.stderr, flush=True)

        yield report


def _offset(report: Callable[[float], None], chunk: int) -> Callable[[int, int], None]:
    return lambda done, total: report(chunk + done / total)
