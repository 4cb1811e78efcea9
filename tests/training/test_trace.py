"""The trace that a stage keeps of its first settled steps."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megadiff.config.schema.monitoring import Trace
from megadiff.training import tags
from megadiff.training.profiling import PHASES
from megadiff.training.trace import STEP, Event, FirstTrace, communication_share
from tests.ranks import fork_megadiff


class Watched:
    """What a trace asks of a monitor."""

    def __init__(self, active: bool = True) -> None:
        self.active, self.shares, self.said = active, {}, []

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def traced(self, step: int, communication_share: float) -> None:
        self.shares[step] = communication_share

    def say(self, message: str) -> None:
        self.said.append(message)


def trained(trace: FirstTrace, steps: Sequence[int], evaluated: Sequence[int] = ()) -> None:
    """Steps with an operation each, and another one between them."""
    for step in steps:
        with trace.step(step):
            torch.ones(4, 4, requires_grad=True).exp().sum().backward()
        if step in evaluated:
            trace.end()
            torch.ones(4).cos()


def names_in(file: Path) -> list[str]:
    with gzip.open(file, "rt") as text:
        return [event.get("name") for event in json.load(text)["traceEvents"]]


def test_the_settled_steps_are_traced_and_no_others_after_a_resumption(tmp_path: Path) -> None:
    file, watched, rule = tmp_path / "trace.json.gz", Watched(), Trace(after_steps=2, steps=2)
    trained(FirstTrace(rule, watched, file, torch.device("cpu")), range(11, 17))
    names = names_in(file)
    assert [names.count(name) for name in (STEP, "aten::exp", "ExpBackward0")] == [2, 2, 2]
    assert watched.shares == {14: 0.0}
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
    written = file.stat().st_mtime_ns
    trained(FirstTrace(rule, watched, file, torch.device("cpu")), range(11, 17))
    assert (file.stat().st_mtime_ns, list(watched.shares)) == (written, [14])


def test_a_trace_ends_before_an_evaluation(tmp_path: Path) -> None:
    file, watched = tmp_path / "trace.json.gz", Watched()
    trained(FirstTrace(Trace(after_steps=1, steps=3), watched, file, torch.device("cpu")), range(1, 8), evaluated=(1, 3, 5))
    names = names_in(file)
    assert [names.count(name) for name in (STEP, "aten::exp", "aten::cos")] == [2, 2, 0]
    assert watched.shares == {3: 0.0}


@pytest.mark.parametrize(("rule", "active"), [(None, True), (Trace(after_steps=0), False), (Trace(after_steps=9), True)])
def test_nothing_is_traced_where_it_is_not_wanted_or_the_stage_is_shorter(
    tmp_path: Path, rule: Trace | None, active: bool
) -> None:
    watched = Watched(active)
    trained(FirstTrace(rule, watched, tmp_path / "trace.json.gz", torch.device("cpu")), range(1, 6))
    assert (watched.shares, list(tmp_path.iterdir())) == ({}, [])


def test_a_trace_that_cannot_be_written_is_a_line_and_the_share_is_told(tmp_path: Path) -> None:
    watched = Watched()
    trained(FirstTrace(Trace(after_steps=0), watched, tmp_path / "gone/trace.json.gz", torch.device("cpu")), [1, 2, 3])
    assert list(watched.shares) == [2]
    assert len(watched.said) == 1
    assert watched.said[0].startswith(f"training goes on, but {tmp_path}/gone/trace.json.gz cannot be written")


@pytest.mark.distributed
def test_a_stage_of_two_ranks_keeps_one_trace_and_the_share_of_its_collectives(tmp_path: Path) -> None:
    stage = ("--stage", "first", "--deepspeed", "ds_configs/zero1.json")
    changes = ("stages.*.steps=3", "monitoring.trace={after_steps: 1, steps: 1}", f"folder={tmp_path}")
    ended = fork_megadiff("train", "tests/tiny.yaml", *changes, *stage, world=2)
    assert ended.returncode == 0, ended.stderr
    names = names_in(tmp_path / "first/trace.json.gz")
    assert {STEP, *PHASES, "gloo:all_reduce"} <= set(names)
    assert names.count(STEP) == 1
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert ["communication_share" in row for row in rows] == [False, True, False]
    share = rows[1]["communication_share"]
    assert 0 < share < 1
    events = EventAccumulator(str(tmp_path / "tensorboard/first")).Reload()
    assert [(event.step, event.value) for event in events.Scalars(tags.COMMUNICATION_SHARE)] == [(2, pytest.approx(share))]


def kernel(name: str, start: int, end: int) -> Event:
    return Event(name, start, end, kernel=True)


def host(name: str, start: int, end: int) -> Event:
    return Event(name, start, end, kernel=False)


STEPS = [host(STEP, 0, 90), host(STEP, 100, 200)]


@pytest.mark.parametrize(
    ("events", "on_gpu", "share"),
    [
        # Two collectives at once count once.
        ([host("gloo:all_reduce", 10, 30), host("gloo:all_gather", 20, 50), host("gloo:broadcast", 110, 120)], False, 0.25),
        ([], False, 0.0),
        # Of 60 in NCCL 20 are beside a matrix product, and 10 more beside another one.
        ([kernel("ncclDevKernel_AllReduce", 20, 80), kernel("gemm", 0, 40), kernel("gemm", 70, 90)], True, 0.15),
        ([kernel("gemm", 0, 40)], True, 0.0),
        ([host("gloo:all_reduce", 10, 30)], True, math.nan),
    ],
)
def test_communication_is_what_nothing_is_computed_beside(events: list[Event], on_gpu: bool, share: float) -> None:
    assert communication_share([*STEPS, *events], on_gpu=on_gpu) == pytest.approx(share, nan_ok=True)
