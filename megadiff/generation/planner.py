"""From prompts, pictures, masks, tables and data sets to the sampler's conditions, a chunk of samples at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.errors import UserError
from megadiff.config.schema import (
    TokenSpace,
)
from megadiff.data.codecs.base import PICTURE, TEXT, Codec
from megadiff.data.codecs.build import table_columns
from megadiff.data.reading.loader import ShuffledSamples
from megadiff.diffusion.sampler import Conditions, Known, Sampler
from megadiff.generation.inputs import checked_text, open_picture, read_prompts, read_rows
from megadiff.generation.presets import PROMPT_REPEATS
from megadiff.generation.request import GenerateRequest
from megadiff.generation.tasks import IMPUTE, Task, find_task, inpainting
from megadiff.weights.loading import Loaded

DEFAULT_COUNT = 16
MOST_SAMPLES = 10_000_000
"""Most samples of a request without a data set: each is an object, and a file."""
LONGEST_LABEL = 60
"""Bytes of a prompt's or picture's name in a file name."""


@dataclass(frozen=True)
class Item:
    """One sample to be drawn: its number decides its random key, in any batch or process."""

    number: int
    name: str
    condition: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Samples that are drawn and stored together; `load` gives their items (without unreadable ones) and conditions."""

    task: Task
    load: Callable[[], tuple[list[Item], Conditions]]


@dataclass(frozen=True)
class Planner:
    """Turns a request into chunks.

    Attributes:
        keys: the samples' random keys, by default functions of the request's seed and their numbers.
    """

    request: GenerateRequest
    loaded: Loaded
    codecs: Mapping[str, Codec]
    keys: Tensor | None = None

    def chunks(self) -> list[Chunk]:
        """All chunks, in an order that does not depend on the processes.

        Raises:
            UserError: the task, a prompt, a picture or a row is at fault.
        """
        names, predicted = list(self.loaded.model.modalities), self.loaded.predicted
        match self.request.task:
            case "inpaint":
                return self._inpainting()
            case "impute":
                return self._imputing()
            case task:
                return self._plain(find_task(task, names, predicted))

    # -------------------------------------------------------------------------------------------------------------- plain

    def _plain(self, task: Task) -> list[Chunk]:
        request = self.request
        if request.data is not None:
            return self._of_data(task, request.data)
        given = {name: self._values(name) for name in task.given}
        start = {name: values for name in task.generated if (values := self._values(name))}
        if missing := [name for name, values in given.items() if not values]:
            raise UserError(f"{task.name} needs {', '.join(missing)}: {self._flags(missing)}")
        if start and request.strength is None:
            names = ", ".join(start)
            raise UserError(f"{task.name} makes {names}: leave it out, or say with --strength how far to start from it")
        if request.strength is not None and not start:
            raise UserError(f"--strength varies something that is there: {self._flags(task.generated)}")
        # Several prompts take several samples each; a single picture or prompt serves all of them.
        sources = {**given, **start}
        several = max((len(values) for values in sources.values()), default=1)
        if uneven := [name for name, values in sources.items() if len(values) not in (1, several)]:
            raise UserError(f"{', '.join(uneven)} must be one or as many as the others ({several})")
        per_source = request.n or (1 if sources else DEFAULT_COUNT)
        _check_count(several * per_source)
        items, picks = [], []
        for number in range(several * per_source):
            index = number // per_source
            pairs = {name: values[index % len(values)] for name, values in sources.items()}
            label = "-".join(label for label, _ in pairs.values())
            condition = {name: pairs[name][1] for name in task.given}
            items.append(Item(number, f"{number:06d}-{_safe(label)}" if label else f"{number:06d}", condition))
            picks.append(index)
        states = {name: torch.stack([self._state(name, value) for _, value in values]) for name, values in sources.items()}

        def load(part: slice) -> tuple[list[Item], Conditions]:
            indices = torch.tensor(picks[part])
            rows = {name: state[indices % len(state)] for name, state in states.items()}
            return items[part], self._conditions(task, rows, items[part])

        return [Chunk(task, _bound(load, part)) for part in _parts(len(items), request.batch)]

    def _of_data(self, task: Task, address: str) -> list[Chunk]:
        """Every sample of a data set, or the first n in its shuffled order."""
        source = ShuffledSamples(address, self.loaded.data, self.loaded.model)
        needed = [*task.given, *(task.generated if self.request.strength is not None else ())]
        if not needed:
            raise UserError(f"{task.name} takes no condition: leave out --data, or vary the data's samples with --strength")

        def load(part: slice) -> tuple[list[Item], Conditions]:
            samples = [(n, sample) for n in range(part.start, part.stop) if (sample := source.read(n)) is not None]
            items = [Item(n, f"{n:06d}-{_safe(name)}", self._shown(task.given, states)) for n, (name, states) in samples]
            if not items:
                return [], Conditions()
            batch = {name: torch.stack([self._condition(name, states[name]) for _, (_, states) in samples]) for name in needed}
            return items, self._conditions(task, batch, items)

        return [
            Chunk(task, _bound(load, part))
            for part in _parts(min(len(source), self.request.n or len(source)), self.request.batch)
        ]

    def _conditions(self, task: Task, states: Mapping[str, Tensor], items: Sequence[Item]) -> Conditions:
        request = self.request
        given = {name: states[name] for name in task.given}
        known = {name: part for name in task.generated if (part := self._padding(name, len(items))) is not None}
        conditions = Conditions(given=given, held_at=dict.fromkeys(given, request.condition_time), known=known)
        if request.strength is None:
            return conditions
        sampler = Sampler(self.loaded.model, request.sampling)
        keys = keys_of(items, request.seed) if self.keys is None else self.keys[: len(items)]
        start = {name: sampler.noised(name, states[name], request.strength, keys) for name in task.generated if name in states}
        return conditions._replace(initial=start, start_at=dict.fromkeys(start, request.strength))

    # --------------------------------------------------------------------------------------------------------- in-painting

    def _inpainting(self) -> list[Chunk]:
        """Fill in the unknown parts of a picture with a mask, a text with blanks, or both."""
        request = self.request
        if len(request.image) > 1 or len(request.prompt) > 1:
            raise UserError("in-painting takes one picture, one text, or both; call it once for each")
        parts: dict[str, Known] = {}
        condition: dict[str, Any] = {}
        if request.image:
            name = self._only(PICTURE)
            condition[name] = open_picture(request.image[0])
            mask = open_picture(request.mask_image) if request.mask_image else None
            parts[name] = Known(*self.codecs[name].encode_partly(condition[name], mask))
        if request.prompt:
            name = self._only(TEXT)
            condition[name] = checked_text(request.prompt[0])
            parts[name] = Known(*self.codecs[name].encode_partly(condition[name], request.blank_tokens))
        open_parts = {name: part for name, part in parts.items() if not bool(part.where.all())}
        if not open_parts:
            raise UserError("nothing is to be filled in: give --mask-image (white is unknown), or a --text with ___ in it")
        if headless := [name for name in open_parts if name not in self.loaded.predicted]:
            raise UserError(f"this model cannot make {', '.join(headless)}; it predicts {', '.join(self.loaded.predicted)}")
        task = inpainting([name for name in parts if name not in open_parts], list(open_parts))
        _check_count(request.n or 1)
        items = [Item(number, f"{number:06d}", condition) for number in range(request.n or 1)]

        def load(part: slice) -> tuple[list[Item], Conditions]:
            count = len(items[part])
            repeated = {name: Known(*(t.expand(count, *t.shape) for t in known)) for name, known in parts.items()}
            given = {name: repeated[name].clean for name in task.given}
            known = {name: repeated[name] for name in task.generated}
            return items[part], Conditions(given=given, held_at=dict.fromkeys(given, request.condition_time), known=known)

        return [Chunk(task, _bound(load, part)) for part in _parts(len(items), request.batch)]

    # ---------------------------------------------------------------------------------------------------------- imputation

    def _imputing(self) -> list[Chunk]:
        """Complete the rows of a CSV; rows that lack the same columns are drawn together."""
        request, columns = self.request, table_columns(self.codecs)
        if not columns:
            raise UserError("impute fills in the rows of a table, and not all of this model's modalities are columns")
        rows = read_rows(str(request.table), {column: name for name, column in columns.items()})
        by_pattern: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_pattern[tuple(name for name in self.loaded.model.modalities if name not in row)].append(number)
        chunks = []
        for lacking, numbers in by_pattern.items():
            if headless := [name for name in lacking if name not in self.loaded.predicted]:
                raise UserError(f"this model cannot make {', '.join(headless)}, which row {numbers[0] + 1} lacks")
            task = Task(IMPUTE, tuple(name for name in self.loaded.model.modalities if name not in lacking), lacking)

            def load(part: slice, task: Task = task, numbers: list[int] = numbers) -> tuple[list[Item], Conditions]:
                own = numbers[part]
                items = [Item(number, f"{number:06d}", rows[number]) for number in own]
                given = {name: torch.stack([self._state(name, rows[n][name]) for n in own]) for name in task.given}
                return items, Conditions(given=given, held_at=dict.fromkeys(given, request.condition_time))

            chunks += [Chunk(task, _bound(load, part)) for part in _parts(len(numbers), request.batch)]
        return chunks

    # -------------------------------------------------------------------------------------------------------------- values

    def _values(self, name: str) -> list[tuple[str, Any]]:
        """(label, value) pairs that the flags give for a modality."""
        request, medium = self.request, self.codecs[name].medium
        if medium == TEXT:
            if (request.prompts or request.prompt) and name != self._only(TEXT):
                return []
            prompts = list(enumerate(request.prompt))
            pairs = read_prompts(request.prompts) if request.prompts else [(str(index), text) for index, text in prompts]
            return [(label, checked_text(prompt)) for label, prompt in pairs]
        if medium == PICTURE and request.image:
            self._only(PICTURE)
            return [
                (Path(source).stem if isinstance(source, str) else str(index), open_picture(source))
                for index, source in enumerate(request.image)
            ]
        return []

    def _only(self, medium: str) -> str:
        names = [name for name, codec in self.codecs.items() if codec.medium == medium]
        if len(names) != 1:
            fault = f"has several: {', '.join(names)}; give them with --data MANIFEST" if names else "has none"
            raise UserError(f"a {medium} is for a model with one modality of that kind, and this one {fault}")
        return names[0]

    def _flags(self, names: Iterable[str]) -> str:
        media = {self.codecs[name].medium for name in names}
        flags = ["--prompt TEXT or --prompts FILE.json"] if TEXT in media else []
        flags += ["--image FILE"] if PICTURE in media else []
        return "give " + " or ".join([*flags, "--data MANIFEST"])

    def _state(self, name: str, value: Any) -> Tensor:
        codec = self.codecs[name]
        if self.request.repeat_prompt and codec.medium == TEXT:
            value = " ".join([value] * PROMPT_REPEATS)
        return self._limited(name, codec.encode(value))

    def _condition(self, name: str, state: Tensor) -> Tensor:
        """A data set's state as a condition."""
        if self.request.repeat_prompt and self.codecs[name].medium == TEXT:
            return self._state(name, self.codecs[name].decode(state))
        return self._limited(name, state)

    def _limited(self, name: str, state: Tensor) -> Tensor:
        """Cut tokens after `limit_context_len`, and put an end mark and padding in their place."""
        limits = self._limits(name)
        if limits is None:
            return state
        limit, end, pad = limits
        cut = state.clone()
        if end not in state[:limit]:
            cut[limit - 1] = end
        cut[limit:] = pad
        return cut

    def _padding(self, name: str, count: int) -> Known | None:
        """The known part of samples that end within `limit_context_len`: the padding after it."""
        limits, space = self._limits(name), self.loaded.model.modalities[name].space
        if limits is None or not isinstance(space, TokenSpace):
            return None
        limit, _, pad = limits
        return Known(torch.full((count, space.length), pad), (torch.arange(space.length) >= limit).expand(count, -1))

    def _limits(self, name: str) -> tuple[int, int, int] | None:
        """(`limit_context_len`, end mark, padding) of a modality that it shortens; else None."""
        space, limit = self.loaded.model.modalities[name].space, self.request.limit_context_len
        if limit is None or not isinstance(space, TokenSpace) or limit >= space.length:
            return None
        if space.end_id is None or space.pad_id is None:
            raise UserError(f"--limit-context-len needs an end mark and padding, and {name} lacks one of them")
        return limit, space.end_id, space.pad_id

    def _shown(self, names: Iterable[str], states: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: self.codecs[name].decode(states[name]) for name in names}


def keys_of(items: Sequence[Item], seed: int) -> Tensor:
    """One random key per sample, int64 [B]: a function of the seed and the sample's number."""
    return rng.sample_keys(seed, torch.tensor([item.number for item in items], dtype=torch.int64))


def _check_count(count: int) -> None:
    if count > MOST_SAMPLES:
        raise UserError(f"{count:,} samples are too many for one folder; draw at most {MOST_SAMPLES:,}, and others with --seed")


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _bound(load: Callable[[slice], tuple[list[Item], Conditions]], part: slice) -> Callable[[], tuple[list[Item], Conditions]]:
    return lambda: load(part)


def _safe(label: str) -> str:
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in label)
    return safe.encode()[:LONGEST_LABEL].decode(errors="ignore")
