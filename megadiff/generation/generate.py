"""`megadiff sample`: draw a request's samples chunk by chunk, on any number of processes; finished chunks are kept."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megadiff.config import checks
from megadiff.config.errors import UserError
from megadiff.data.shards.shard import manifest_of
from megadiff.distributed.ranks import Ranks
from megadiff.generation.loading import codecs_of, load
from megadiff.generation.planner import Chunk, Item, Planner, keys_of
from megadiff.generation.request import GenerateRequest
from megadiff.generation.tasks import draw
from megadiff.generation.writing import RECORDS, SampleWriter, join_records, open_folder
from megadiff.storage import store
from megadiff.weights.loading import AUTOENCODER, Loaded, compile_network

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LOOKS = 10.0, 0.2


def generate(request: GenerateRequest) -> Path:
    """Draw samples into `request.out`; returns the path of the records.

    With RANK and WORLD_SIZE set (torchrun) the ranks share the chunks, and rank 0 joins the records when all are stored. Chunks
    that an interrupted call has finished are not drawn again.

    Raises:
        UserError: the checkpoint, the task, a condition or the output folder is at fault.
    """
    ranks = Ranks.from_environment()
    device = device_of(ranks)
    loaded = load(request.checkpoint, request.weights, device, autoencoder=request.autoencoder, size=request.size)
    guide = None if request.guide is None else _guide(request, loaded, device)
    if request.compile:
        for network in (loaded, *([] if guide is None else [guide])):
            compile_network(network)
    _check_autoencoders(loaded, request)
    codecs = codecs_of(loaded)
    chunks = Planner(request, loaded, codecs).chunks()
    out = Path(request.out)
    identity = {**request.record(), "weights_hash": loaded.fingerprint, "guide_hash": guide and guide.fingerprint}
    identity["contents"] = _contents(request)
    open_folder(out, identity)
    writer = SampleWriter(out, codecs, request.format)
    mine = [number for number in range(ranks.rank, len(chunks), ranks.world) if not writer.has(number)]
    with _progress(request.task, len(mine), active=ranks.rank == 0) as report, torch.no_grad():
        for done, number in enumerate(mine):
            items, states = _draw(chunks[number], request, loaded, guide, device, _offset(report, done))
            writer.write(number, chunks[number].task, items, states)
    if ranks.rank == 0:
        # Other processes may still draw; their launcher ends all if one fails.
        while not all(writer.has(number) for number in range(len(chunks))):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        join_records(writer, chunks, loaded, identity)
    return out / RECORDS


def device_of(ranks: Ranks) -> torch.device:
    """The device that a process draws on."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


def _check_autoencoders(loaded: Loaded, request: GenerateRequest) -> None:
    """Raises UserError, before drawing, if latents could not be shown or `autoencoder` has nothing to decode."""
    fields = loaded.data.fields
    checks.require(checks.showing_faults(fields))
    if request.autoencoder is not None and not any(AUTOENCODER in field.FILES for field in fields.values()):
        raise UserError("--autoencoder is for models of latents, and this model has none; leave it out")


def _contents(request: GenerateRequest) -> dict[str, str]:
    """Hashes of the files that samples depend on, since the contents of a path may change."""
    inputs = [request.prompts, request.table, request.mask_image, *request.image]
    paths = [str(path) for path in inputs if path is not None]
    if request.data is not None:
        paths.append(manifest_of(request.data))
    return {path: hashlib.sha256(store.read_bytes(path)).hexdigest() for path in paths}


def _guide(request: GenerateRequest, loaded: Loaded, device: torch.device) -> Loaded:
    """The weaker network for autoguidance. Raises UserError if its modalities differ."""
    address = str(request.guide)
    guide = load(address, request.weights, device, autoencoder=request.autoencoder, size=request.size)
    spaces = {name: modality.space for name, modality in guide.model.modalities.items()}
    if spaces != {name: modality.space for name, modality in loaded.model.modalities.items()}:
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
    states = draw(
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
    return items, {name: state.cpu() for name, state in states.items()}


@contextmanager
def _progress(title: str, chunks: int, *, active: bool) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, a line now and then in a log; call the result with the number of chunks done."""
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
