"""The loop with stand-ins for engine, loader and monitor: what is asked for at which step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadiff.config.layout import Layout
from megadiff.data.errors import DataError
from megadiff.training import loop
from megadiff.training.incidents import Incidents
from megadiff.training.progress import Progress
from tests.minimal import minimal_run
from tests.training.test_monitor import monitor, result


def trained(folder: Path, unreadable_at: int, share: float = 0.01) -> list[int]:
    """Train 5 steps, written out every 2; the unreadable samples that the monitor is told of where it writes."""
    run = minimal_run(folder, stage_defaults__steps=5, stage_defaults__log_every_steps=2, data__max_unreadable_share=share)
    step = 0

    def take(_: torch.device) -> list[Any]:
        nonlocal step
        step += 1
        return []

    loader = SimpleNamespace(
        take=take,
        stats=lambda: SimpleNamespace(waited_s=0.0, read=1000, unreadable=int(step >= unreadable_at)),
        state=dict,
        data_step=0,
        sources=(),
    )
    engine = SimpleNamespace(
        device=torch.device("cpu"), step=lambda *_, inspect: result(), ema=SimpleNamespace(update=lambda: None), counters=dict
    )
    saver = SimpleNamespace(begin=lambda *_: None, publish=lambda: None, publish_if_written=lambda: None)
    watched, told = monitor(folder), list[int]()
    watched.total_steps = 5
    record = watched.record

    def tell(at: int, *of: Any, unreadable: int, **how: Any) -> None:
        told.extend([unreadable] if watched.writes_at(at) else [])
        record(at, *of, unreadable=unreadable, **how)

    watched.record = tell  # type: ignore[method-assign]
    training: Any = loop.Training(
        run,
        run.stages[0],
        Layout(),
        engine,  # type: ignore[arg-type]
        watched,
        Progress(),
        SimpleNamespace(beat=lambda *_: None),  # type: ignore[arg-type]
        Incidents(run.paths.stage("first"), writes=True),
        saver,  # type: ignore[arg-type]
    )
    try:
        loop._train(training, loader, None, ())  # type: ignore[arg-type]
    finally:
        watched.close()
    return told


def test_the_last_window_is_checked_although_its_end_is_no_log_step(tmp_path: Path) -> None:
    assert trained(tmp_path, unreadable_at=5) == [0, 0, 1]
    with pytest.raises(DataError, match="1 of 1000 samples could not be read"):
        trained(tmp_path, unreadable_at=5, share=0.0)
