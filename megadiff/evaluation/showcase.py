"""The showcase of a finished run: a sheet with samples of every task, and whether conditions are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import Run, Showcase
from megadiff.data.codecs.base import TEXT, Codec
from megadiff.data.codecs.build import table_columns
from megadiff.data.reading.loader import HeldOut, read_held_out
from megadiff.diffusion.sampler import Conditions
from megadiff.evaluation.gap import conditioning_gap
from megadiff.evaluation.results import of_data, write_results
from megadiff.evaluation.table import ColumnArrays, columns_of, compare, picture
from megadiff.generation.loading import codecs_of, load
from megadiff.generation.tasks import JOINT, Task, draw, find_task, progress_bar, shown_cell, tasks_of
from megadiff.report.sheet import SheetSection, contact_sheet, png_bytes
from megadiff.storage import store
from megadiff.weights.loading import Loaded

ROWS_AT_ONCE = 2000


def make_showcase(run: Run) -> int:
    """Write `samples.png` into the run's folder and print the conditioning gap in every direction.

    Returns:
        0 if every gap's 95 % interval lies above 0, else 1.

    Raises:
        UserError: the run has no showcase section, no checkpoint, or too few held-out pairs.
    """
    rule = run.showcase
    if rule is None:
        raise UserError(f"run {run.name} has no showcase section")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(run.folder, "ema", device)
    if table_columns(codecs_of(loaded)):
        return _table(run, rule, loaded, device)
    held_out = read_held_out(run.data.reference, run.data, run.model, rule.gap_pairs)
    if len(held_out.ids) < rule.gap_pairs:
        raise UserError(f"showcase.gap_pairs is {rule.gap_pairs}, but the held-out data has {len(held_out.ids)} pairs")
    tasks = tasks_of(list(run.model.modalities), loaded.predicted)
    conditions = _conditions(run, rule, held_out, codecs_of(loaded))
    sections = [
        _section(loaded, task, of, states, rule, run.seed, device)
        for task in tasks
        for of, states in (conditions.items() if task.given else [("", {})])
        if states.keys() >= set(task.given)
    ]
    _write_sheet(run, contact_sheet(sections))
    all_used = True
    states = {name: state.to(device) for name, state in held_out.states.items()}
    metrics = []
    for target in loaded.predicted:
        with torch.no_grad():
            gap = conditioning_gap(loaded.module, run.model, states, target=target, seed=run.seed)
        print(f"conditioning gap, {gap}", flush=True)
        metrics.append(gap.metric(_depends(run, loaded, run.data.reference)))
        all_used &= gap.excludes_zero
    write_results(run.paths.results, metrics)
    return 0 if all_used else 1


def _depends(run: Run, loaded: Loaded, source: str) -> dict[str, Any]:
    """The dependencies of a figure that compares with a source of data."""
    return {"weights": loaded.fingerprint, **of_data(source), "seed": run.seed}


def _table(run: Run, rule: Showcase, loaded: Loaded, device: torch.device) -> int:
    """Compare rows drawn without conditions with the training data's; returns 0."""
    joint = find_task(JOINT, list(run.model.modalities), loaded.predicted)
    codecs = codecs_of(loaded)
    keys = rng.sample_keys(run.seed, torch.arange(rule.rows)).to(device)
    with progress_bar("rows") as report, torch.no_grad():
        states = draw(
            loaded.module, loaded.model, rule.sampling, joint, keys, Conditions(), batch=ROWS_AT_ONCE, progress=report
        )
    drawn = _columns({name: state.cpu() for name, state in states.items()}, codecs)
    sources = (next(iter(run.data.sources.values())), run.data.reference)
    real, held_out = (_columns(read_held_out(source, run.data, run.model, rule.rows).states, codecs) for source in sources)
    _write_sheet(run, picture(real, drawn))
    errors = compare(real, drawn, held_out)
    print(errors, flush=True)
    depends = {**_depends(run, loaded, sources[0]), "rows": rule.rows, "sampling": rule.sampling.model_dump(mode="json")}
    write_results(run.paths.results, errors.metrics(depends))
    return 0


def _write_sheet(run: Run, sheet: Image.Image) -> None:
    path = run.paths.samples
    store.write_bytes(str(path), png_bytes(sheet))
    print(f"samples: {path}")


def _columns(states: Mapping[str, Tensor], codecs: Mapping[str, Codec]) -> ColumnArrays:
    """Columns [N] from states [N, ...]."""
    count = len(next(iter(states.values())))
    return columns_of([{name: codecs[name].decode(state[row]) for name, state in states.items()} for row in range(count)])


def _conditions(run: Run, rule: Showcase, held_out: HeldOut, codecs: Mapping[str, Codec]) -> dict[str, dict[str, Tensor]]:
    """Conditions for the sheet, by where they are from: what was trained on and what was not are never mixed."""
    train = next(iter(run.data.sources.values()))
    found = {"seen in training": read_held_out(train, run.data, run.model, rule.count).states}
    if run.data.held_out:
        found["never seen"] = held_out.states
    for name in (name for name, codec in codecs.items() if rule.prompts and codec.medium == TEXT):
        found.setdefault("prompts", {})[name] = torch.stack([codecs[name].encode(prompt) for prompt in rule.prompts])
    return found


def _section(
    loaded: Loaded, task: Task, of: str, conditions: Mapping[str, Tensor], rule: Showcase, seed: int, device: torch.device
) -> SheetSection:
    codecs = codecs_of(loaded)
    count = min([rule.count, *(len(conditions[name]) for name in task.given)])
    keys = rng.sample_keys(seed, torch.arange(count)).to(device)
    given = {name: conditions[name][:count].to(device) for name in task.given}
    with progress_bar(task.name) as report, torch.no_grad():
        samples = draw(
            loaded.module, loaded.model, rule.sampling, task, keys, Conditions(given=given), batch=count, progress=report
        )
    states = {name: state.cpu() for name, state in {**given, **samples}.items()}
    return SheetSection(_title(task, of), [shown_cell(task, states, index, codecs) for index in range(count)])


def _title(task: Task, of: str) -> str:
    return (
        f"{' and '.join(task.generated)} for a given {' and '.join(task.given)} ({of})"
        if task.given
        else "everything from nothing (joint)"
    )
