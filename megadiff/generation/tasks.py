"""The tasks of one set of weights: any modality given the others, or all of them without conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from megadiff.config.errors import UserError
from megadiff.config.schema import Model, Sampling
from megadiff.data.codecs.base import Codec
from megadiff.data.pictures import flat, plain
from megadiff.diffusion.sampler import Conditions, Sampler
from megadiff.report.sheet import Cell
from megadiff.types import Denoiser

JOINT, INPAINT, IMPUTE = "joint", "inpaint", "impute"


@dataclass(frozen=True)
class Task:
    """`given` modalities are held at time 0, `generated` ones are sampled."""

    name: str
    given: tuple[str, ...]
    generated: tuple[str, ...]


def tasks_of(modalities: Sequence[str], predicted: Collection[str]) -> list[Task]:
    """Every task of a model with these heads: one per predicted modality, and joint if all are predicted."""
    tasks = []
    for target in modalities:
        given = tuple(name for name in modalities if name != target)
        if target in predicted and given:
            tasks.append(Task(f"{'+'.join(given)}-to-{target}", given, (target,)))
    if set(modalities) <= set(predicted):
        tasks.append(Task(JOINT, (), tuple(modalities)))
    return tasks


def find_task(name: str, modalities: Sequence[str], predicted: Collection[str]) -> Task:
    """The task of a name. Raises UserError, listing the model's tasks, if it has no such task."""
    tasks = tasks_of(modalities, predicted)
    for task in tasks:
        if task.name == name:
            return task
    raise UserError(f"this model cannot do {name}; it can do: {', '.join(task.name for task in tasks)}")


def inpainting(given: Sequence[str], generated: Sequence[str]) -> Task:
    """The task of filling in the unknown parts of `generated` modalities."""
    return Task(INPAINT, tuple(given), tuple(generated))


def draw(
    denoiser: Denoiser,
    model: Model,
    sampling: Sampling,
    task: Task,
    keys: Tensor,
    conditions: Conditions,
    *,
    batch: int,
    guide: Denoiser | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Samples for a task, in batches.

    Args:
        keys: int64 [N]; a key gives the same sample in any batch.
        conditions: those of all N samples.
        guide: a weaker network for autoguidance.
        progress: called with (steps done, steps in all), over all batches.

    Returns:
        The generated modalities' states, [N, ...].
    """
    sampler = Sampler(model, sampling)
    parts: list[dict[str, Tensor]] = []
    batches = [slice(start, start + batch) for start in range(0, len(keys), batch)]
    for index, part in enumerate(batches):
        report = None if progress is None else _offset(progress, index, len(batches))
        states = sampler.sample(
            denoiser,
            keys[part],
            generate=task.generated,
            conditions=conditions.part(part),
            guide=guide,
            progress=report,
        )
        parts.append({name: states[name] for name in task.generated})
    return {name: torch.cat([part[name] for part in parts]) for name in task.generated}


def cell_of(task: Task, values: Mapping[str, Image.Image | str]) -> Cell:
    """A contact sheet's cell from pictures and texts by modality; an arrow precedes generated texts."""
    # A sheet has room for one picture: a generated one before a given one.
    names = sorted(values, key=lambda name: name not in task.generated)
    pictures = [value for name in names if isinstance(value := values[name], Image.Image)]
    texts = [
        ("→ " if name in task.generated else "") + value for name, value in values.items() if not isinstance(value, Image.Image)
    ]
    return Cell(flat(plain(pictures[0])) if pictures else None, " ".join(texts))


def shown_cell(task: Task, states: Mapping[str, Tensor], index: int, codecs: Mapping[str, Codec]) -> Cell:
    """The `cell_of` sample `index`, from states [N, ...] of a task's modalities."""
    return cell_of(task, {name: codecs[name].shown(codecs[name].decode(state[index])) for name, state in states.items()})


@contextmanager
def progress_bar(title: str, *, active: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, for the `progress` of `draw`."""
    with tqdm(desc=title, unit="step", dynamic_ncols=True, disable=None if active else True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def _offset(progress: Callable[[int, int], None], index: int, batches: int) -> Callable[[int, int], None]:
    return lambda done, total: progress(index * total + done, batches * total)
