"""What has changed between two starts of a run, and whether that changes its training. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.load import load_run
from megadiff.config.schema import Run

FREE = (
    *("name", "launch", "preflight", "safeguards", "monitoring", "showcase"),
    *(f"data.{key}" for key in ("held_out", "max_unreadable_share", "workers", "prefetch_batches", "downloads", "cache")),
    *(f"stages.*.{key}" for key in ("checkpoint", "samples", "held_out_loss", "evaluation", "log_every_steps")),
    *("stages.*.batch.micro_batch", "stages.*.activation_checkpointing", "stages.*.compile"),
)
"""Keys, and sections, that change neither what is learnt nor from what; the last three change how ranks do the work."""
_SHOWN = 6
_ABSENT = object()


@dataclass(frozen=True)
class Drift:
    """The keys that differ between two configurations of a run, as lines `a.b: old -> new`.

    Attributes:
        free: those that leave the training as it is.
        training: those that do not.
    """

    free: tuple[str, ...] = ()
    training: tuple[str, ...] = ()

    def accepted(self, place: str, *, allowed: bool) -> tuple[str, ...]:
        """All lines.

        Args:
            place: what is of the old configuration, for the sentence.
            allowed: whether the training may change.

        Raises:
            UserError: it does, and may not.
        """
        if self.training and not allowed:
            more = f" and {len(self.training) - _SHOWN} more" if len(self.training) > _SHOWN else ""
            raise UserError(
                f"{place} holds a run of another configuration: {'; '.join(self.training[:_SHOWN])}{more}; "
                "name a new folder (folder=...), or go on with the new values by --allow-changes"
            )
        return self.training + self.free


def drift(before: Run, after: Run, stage: str | None = None) -> Drift:
    """Compare two configurations; stages are matched by their names.

    Args:
        stage: leave out what is of other stages.
    """
    lines: dict[bool, list[str]] = {True: [], False: []}
    for key, old, new in _differing(_by_name(before), _by_name(after), ()):
        if stage is None or key[0] != "stages" or key[1] == stage:
            lines[_free(key)].append(f"{'.'.join(key)}: {_short(old)} -> {_short(new)}")
    return Drift(tuple(lines[True]), tuple(lines[False]))


def stored_run(run: Run) -> Run | None:
    """The run as its folder holds it.

    Raises:
        UserError: it cannot be read.
    """
    path = run.paths.run
    if not path.exists():
        return None
    try:
        return load_run(path)
    except ConfigError as error:
        raise UserError(
            f"what {run.folder} holds is unknown, for its {path.name} cannot be read ({error}); "
            "delete that file or name a new folder"
        ) from None


def _by_name(run: Run) -> dict[str, Any]:
    tree = run.model_dump(mode="json", exclude={"folder"})  # a run may be moved
    stages = tree["stages"]
    return {**tree, "stages": {**{stage["name"]: stage for stage in stages}, "(order)": [stage["name"] for stage in stages]}}


def _differing(old: Any, new: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differing(old.get(name, _ABSENT), new.get(name, _ABSENT), (*key, str(name)))
    elif old != new:
        yield key, old, new


def _free(key: tuple[str, ...]) -> bool:
    return any(_begins(key, pattern.split(".")) for pattern in FREE)


def _begins(key: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(key) >= len(pattern) and all(part in ("*", name) for part, name in zip(pattern, key, strict=False))


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
