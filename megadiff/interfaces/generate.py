"""`megadiff sample`: pictures, captions and one contact sheet from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import CaptionField, PixelField, Sampling
from megadiff.data.encode import Codec
from megadiff.data.loader import read_held_out
from megadiff.distributed.ranks import Ranks
from megadiff.evaluation.report import Section, contact_sheet
from megadiff.evaluation.tasks import Task, cell_of, draw, find_task, progress_bar
from megadiff.interfaces.weights import Loaded, load

SHEET_CELLS = 32
RECORDS = "samples.jsonl"


@dataclass(frozen=True)
class GenerateRequest:
    """The flags of `megadiff sample`, one field each."""

    checkpoint: str
    task: str
    out: str
    weights: str = "ema"
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    data: str | None = None
    image: tuple[str, ...] = ()
    steps: int = 50
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_final_time: float = 1.0
    seed: int = 0
    n: int | None = None
    limit_context_len: int | None = None
    batch: int = 32


@dataclass(frozen=True)
class Item:
    """One sample to be drawn: its number decides its random key, whatever the batch or the process."""

    number: int
    name: str
    condition: dict[str, Any]


def generate(request: GenerateRequest) -> Path:
    """Sample, write `samples.jsonl`, pictures and `sheet.png` under `request.out`; returns the sheet's path.

    With RANK and WORLD_SIZE set (torchrun), the items are shared out; each process writes its own samples and rank 0 joins the
    records once all are there.

    Raises:
        UserError: the checkpoint, the task or a condition is at fault.
    """
    ranks = Ranks.from_environment()
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    loaded = load(request.checkpoint, request.weights, device)
    task = find_task(request.task, list(loaded.model.modalities), loaded.predicted)
    codecs = loaded.codecs()
    items, given = conditions(request, loaded, task, codecs)
    mine = range(ranks.rank, len(items), ranks.world)
    sampling = Sampling(
        steps=request.steps,
        guidance=request.guidance,
        guidance_interval=request.guidance_interval,
        guidance_final_time=request.guidance_final_time,
    )
    picked = torch.tensor(list(mine), dtype=torch.int64)
    out = Path(request.out)
    _make_folder(out)
    with progress_bar(task.name, active=ranks.rank == 0) as report, torch.no_grad():
        # With fewer items than processes some have none.
        drawn = (
            {}
            if not mine
            else draw(
                loaded.module,
                loaded.model,
                sampling,
                task,
                rng.sample_keys(request.seed, picked).to(device),
                {name: state[picked].to(device) for name, state in given.items()},
                batch=request.batch,
                progress=report,
            )
        )
    _write([items[number] for number in mine], {name: state.cpu() for name, state in drawn.items()}, codecs, out, ranks)
    if ranks.world > 1:
        _wait_for_all(ranks)
    if ranks.rank == 0:
        _join(out, task, loaded.source, ranks.world)
    return out / "sheet.png"


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; name another folder") from None


def conditions(
    request: GenerateRequest, loaded: Loaded, task: Task, codecs: dict[str, Codec]
) -> tuple[list[Item], dict[str, Tensor]]:
    """The items to draw and the states that are given, [N, ...]."""
    per_item = request.n or 1
    if not task.given:
        return [Item(number, f"{number:06d}", {}) for number in range(request.n or 16)], {}
    if request.data is not None:
        held = read_held_out(request.data, loaded.data, loaded.model, request.n or 16)
        states = {name: held.states[name] for name in task.given}
        shown = {name: [codecs[name].decode(state) for state in states[name]] for name in task.given}
        items = [Item(i, f"{i:06d}-{held.ids[i]}", {k: v[i] for k, v in shown.items()}) for i in range(len(held.ids))]
        return items, {name: _limit(state, loaded, name, request) for name, state in states.items()}
    if len(task.given) > 1:
        raise UserError(f"{task.name} has several conditions; give them with --data MANIFEST")
    name = task.given[0]
    source = loaded.data.fields[name]
    if isinstance(source, CaptionField):
        named: list[tuple[str, Any]] = [*_prompts(request)]
    elif isinstance(source, PixelField) and request.image:
        named = [(Path(path).stem, _open(path)) for path in request.image]
    else:
        raise UserError(f"{task.name} needs {name}: give --image FILE or --data MANIFEST")
    states = {name: torch.stack([codecs[name].encode(value) for _, value in named])}
    items = [
        Item(i * per_item + j, f"{i * per_item + j:06d}-{label}", {name: condition})
        for i, (label, condition) in enumerate(named)
        for j in range(per_item)
    ]
    limited = {key: _limit(state, loaded, key, request) for key, state in states.items()}
    return items, {key: state.repeat_interleave(per_item, 0) for key, state in limited.items()}


def read_prompts(path: str) -> list[tuple[str, str]]:
    """(id, caption) pairs from a JSON file: a list of captions, {"id": "caption"}, or {"text": [captions]}.

    Raises:
        UserError: the file is missing or has another form.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} is not JSON: {error}") from None
    if isinstance(tree, dict) and isinstance(tree.get("text"), list):
        tree = tree["text"]
    pairs = list(enumerate(tree)) if isinstance(tree, list) else list(tree.items()) if isinstance(tree, dict) else []
    if not pairs or not all(isinstance(text, str) for _, text in pairs):
        raise UserError(
            f'--prompts {path} must be a list of captions, {{"id": "caption"}}, or {{"text": [captions]}}, and not empty'
        )
    return [(str(label), text) for label, text in pairs]


def _prompts(request: GenerateRequest) -> list[tuple[str, str]]:
    named = read_prompts(request.prompts) if request.prompts else [(str(i), text) for i, text in enumerate(request.prompt)]
    if not named:
        raise UserError(f"{request.task} needs --prompt TEXT, --prompts FILE.json or --data MANIFEST")
    return [("".join(c if c.isalnum() or c in "-_." else "_" for c in label)[:60], text) for label, text in named]


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGBA")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--image {path} cannot be read as a picture: {error}") from None


def _limit(state: Tensor, loaded: Loaded, name: str, request: GenerateRequest) -> Tensor:
    """Cut a condition of tokens after `limit_context_len` tokens: what follows becomes end mark and padding."""
    space = loaded.model.modalities[name].space
    if request.limit_context_len is None or space.kind != "tokens" or request.limit_context_len >= space.length:
        return state
    if space.end_id is None or space.pad_id is None:
        raise UserError(f"--limit-context-len needs an end mark, and {name} has none")
    limited = state.clone()
    cut = request.limit_context_len
    ended = (state[:, :cut] == space.end_id).any(1)
    limited[:, cut - 1] = torch.where(ended, limited[:, cut - 1], space.end_id)
    limited[:, cut:] = space.pad_id
    return limited


def _write(items: Sequence[Item], drawn: dict[str, Tensor], codecs: dict[str, Codec], out: Path, ranks: Ranks) -> None:
    lines = []
    for index, item in enumerate(items):
        record: dict[str, Any] = {"number": item.number, "name": item.name, "given": {}, "generated": {}}
        for name, condition in item.condition.items():
            record["given"][name] = _store(condition, out / f"{item.name}.{name}.given.png")
        for name, states in drawn.items():
            record["generated"][name] = _store(codecs[name].decode(states[index]), out / f"{item.name}.{name}.png")
        lines.append(json.dumps(record, ensure_ascii=False))
    _records(out, ranks.rank).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _store(value: Any, path: Path) -> dict[str, str]:
    if isinstance(value, Image.Image):
        value.convert("RGB").save(path)
        return {"picture": path.name}
    return {"text": str(value)}


def _records(out: Path, rank: int) -> Path:
    return out / f".{RECORDS}.{rank}"


def _wait_for_all(ranks: Ranks) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world)
    dist.barrier()
    dist.destroy_process_group()


def _join(out: Path, task: Task, source: str, world: int) -> None:
    records = []
    for rank in range(world):
        path = _records(out, rank)
        records += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.unlink()
    records.sort(key=lambda record: int(record["number"]))
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (out / RECORDS).write_text(text, encoding="utf-8")
    shown = [{**record["given"], **record["generated"]} for record in records[:SHEET_CELLS]]
    cells = [cell_of(task, {name: _value(stored, out) for name, stored in values.items()}) for values in shown]
    contact_sheet([Section(f"{task.name}, {source}", cells)]).save(out / "sheet.png")


def _value(stored: dict[str, str], folder: Path) -> Any:
    return Image.open(folder / stored["picture"]) if "picture" in stored else stored["text"]
