"""What a stage writes about itself, and when it stops itself."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from megadiff.config.errors import UserError
from megadiff.config.run_folder import IncidentKind, RunFolder
from megadiff.engine.api import Inspection, StepResult
from megadiff.training.board import Description
from megadiff.training.exporting import Background, Exporter
from megadiff.training.health import Diverged, Health
from megadiff.training.incidents import Incidents
from megadiff.training.monitor import LineFile, Monitor
from megadiff.training.tags import QUARTERS
from megadiff.types import Metric

MEASURED = ["held-out image/t 0.500 given ema", "held-out image/t 0.500 absent ema", "gap/text"]


def result(*, total: float = 1.0, grad_norm: float = 0.5, applied: bool = True) -> StepResult:
    quartiles = {"image": [1.0, 2.0, math.nan, 4.0]}
    return StepResult({"image": total}, quartiles, total, grad_norm, 1e-3, applied, samples=16)


def samples() -> str:
    return "samples of rank 0: a.tar/1"


def health(folder: Path, most_in_a_row: int = 3) -> Health:
    return Health(most_in_a_row, Incidents(RunFolder(folder).stage("first"), writes=True))


def monitor(
    folder: Path,
    *,
    first_step: int = 0,
    active: bool = True,
    exporters: Sequence[Background] = (),
    failed: Callable[[int, str], object] = print,
) -> Monitor:
    return Monitor(
        paths=RunFolder(folder).stage("first"),
        total_steps=4,
        first_step=first_step,
        log_every=2,
        global_samples=16,
        tokens_per_sample=10,
        flops_per_sample=1e6,
        device=torch.device("cpu"),
        ranks=1,
        active=active,
        description=Description({"optimizer.learning_rate": 1e-3}, ["image"], MEASURED),
        exporters=exporters,
        failed=failed,
    )


def test_every_step_is_a_line_and_every_other_one_an_event(tmp_path: Path) -> None:
    watched = monitor(tmp_path)
    for step in range(1, 5):
        watched.record(step, result(total=float(step)), data_wait_s=0.0, unreadable=3)
    watched.close()
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 60
    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert [(event.step, event.value) for event in events.Scalars("1 loss/total")] == [(2, 1.5), (4, 3.5)]
    assert [event.value for event in events.Scalars("6 data/unreadable samples")] == [3, 3]
    assert {"2 loss by time/image t 0.00-0.25", "4 speed/samples per s", "4 speed/model FLOPs utilisation"} <= set(tags)
    assert "2 loss by time/image t 0.50-0.75" not in tags, "a quarter in which nothing fell has no point"


def test_losses_by_source_are_curves_and_a_part_of_each_line(tmp_path: Path) -> None:
    watched = monitor(tmp_path)
    for step, web in ((1, 1.0), (2, 3.0)):
        by_source = {"image": {"web": web, "books": math.nan}}
        watched.record(step, replace(result(), by_source=by_source), data_wait_s=0.0, unreadable=0)
    watched.close()
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["by_source"] == {"image": {"web": 1.0, "books": None}}
    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    assert [event.value for event in events.Scalars("2 loss by source/image web")] == [2.0]
    assert "2 loss by source/image books" not in events.Tags()["scalars"]


def test_a_checkpoint_is_two_points_at_its_step_and_stands_in_the_next_line(tmp_path: Path) -> None:
    watched = monitor(tmp_path)
    for step in range(1, 5):
        watched.record(step, result(), data_wait_s=0.0, unreadable=0)
        if step == 2:
            watched.saved(1, stalled_s=0.25, took_s=1.5)
    watched.close()
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert [row.get("checkpoint") for row in rows] == [None, None, {"step": 1, "stalled_s": 0.25, "took_s": 1.5}, None]
    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert points["4 speed/checkpoint stall s"] == [(1, 0.25)]
    assert points["4 speed/checkpoint until published s"] == [(1, 1.5)]


def test_a_run_that_resumes_drops_the_lines_that_it_repeats(tmp_path: Path) -> None:
    watched = monitor(tmp_path)
    for step in range(1, 4):
        watched.record(step, result(), data_wait_s=0.0, unreadable=0)
    watched.close()
    with (tmp_path / "first/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = monitor(tmp_path, first_step=2)
    again.record(3, result(total=9.0), data_wait_s=0.0, unreadable=0)
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    watched = monitor(tmp_path, active=False)
    watched.record(1, result(), data_wait_s=0.0, unreadable=0)
    watched.close()
    assert list(tmp_path.iterdir()) == []


def test_a_non_finite_step_that_was_applied_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 7: loss nan.*learning_rate"):
        health(tmp_path).check(result(total=math.nan), 7, samples)


def test_skipped_steps_are_counted_recorded_and_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    watched = health(tmp_path, most_in_a_row=3)
    for step, skipped in enumerate((True, True, False, True, True), 1):
        watched.check(result(grad_norm=math.inf, applied=False) if skipped else result(), step, samples)
    assert watched.skipped_steps == 4
    with pytest.raises(Diverged, match=r"step 6: .*3 steps in a row were skipped"):
        watched.check(result(grad_norm=math.inf, applied=False), 6, samples)
    rows = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("skipped", step) for step in (1, 2, 4, 5, 6)]
    assert rows[0]["detail"] == "loss 1, gradient norm inf; samples of rank 0: a.tar/1"


def test_a_step_that_was_skipped_is_a_line_of_json_and_in_no_mean(tmp_path: Path) -> None:
    watched = monitor(tmp_path)
    watched.record(1, result(total=3.0), data_wait_s=0.0, unreadable=0)
    watched.record(2, result(total=math.nan, grad_norm=math.inf, applied=False), data_wait_s=0.0, unreadable=0)
    watched.close()
    skipped = json.loads((tmp_path / "first/metrics.jsonl").read_text().splitlines()[1])
    assert (skipped["loss"], skipped["grad_norm"], skipped["applied"]) == (None, None, False)
    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    assert [event.value for event in events.Scalars("1 loss/total")] == [3.0]
    assert [event.value for event in events.Scalars("3 optimizer/gradient norm")] == [0.5]


def test_training_goes_on_where_its_records_cannot_be_written_and_they_go_on_when_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = monitor(tmp_path)
    watched.total_steps = 8

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in range(1, 9):
        with monkeypatch.context() as patched:
            if step in (3, 4):
                patched.setattr(LineFile, "append", full)
                patched.setattr(SummaryWriter, "add_scalar", full)
            watched.record(step, result(total=float(step)), data_wait_s=0.0, unreadable=0)
    watched.close()
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 5, 6, 7, 8]
    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    assert [event.step for event in events.Scalars("1 loss/total")] == [2, 6, 8]
    assert capsys.readouterr().err.count("training goes on, but its records cannot be written") == 1


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = LineFile(tmp_path / "lines")
    lines.append("first")
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        with pytest.raises(OSError, match="No space left"):
            lines.append("second")
    lines.append("third")
    lines.close()
    assert (tmp_path / "lines").read_text() == "first\nthird\n"
    full = LineFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        full.append("fourth")
    full.close()


def test_records_that_cannot_be_begun_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match="the records of stage first cannot be written"):
        monitor(tmp_path)


def test_a_picture_is_kept_as_a_png_and_a_figure_as_a_line(tmp_path: Path) -> None:
    watched = monitor(tmp_path)
    watched.picture("samples/text-to-image", Image.new("RGB", (4, 4), "red"), 3)
    watched.metrics([Metric("gap/text", 0.5, low=0.4, depends={"seed": 1}), Metric("fid", 12.5), Metric("is", math.nan)], 3)
    watched.close()
    with Image.open(tmp_path / "first/pictures/samples-text-to-image-00000003.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)
    line, *others = (tmp_path / "first/results.jsonl").read_text().splitlines()
    told = {"step": 3, "name": "gap/text", "value": 0.5, "low": 0.4, "high": None, "depends": {"seed": 1}}
    assert json.loads(line) == told
    assert [json.loads(other)["value"] for other in others] == [12.5, None]
    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    assert events.Tags()["scalars"] == ["7 gap/text", "7 results/fid"]
    monitor(tmp_path, first_step=2).close()
    assert (tmp_path / "first/results.jsonl").read_text() == ""


def test_the_share_of_evaluation_is_recorded_and_warned_of_once_above_two_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    monkeypatch.setattr("megadiff.training.monitor.peak_flops", lambda _: 1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    watched = monitor(tmp_path)
    for step, (steps_s, evaluation_s) in enumerate([(10.0, 10.0), (90.0, 0.0), (100.0, 1.0), (1000.0, 2.0)], 1):
        clock += steps_s
        watched.record(step, result(), data_wait_s=0.0, unreadable=0)
        began = watched.pause()
        clock += evaluation_s
        if evaluation_s:
            watched.evaluated(step, since=began)
    watched.close()
    rows = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert [row["evaluation_share"] for row in rows] == [0.0, 0.5, 0.5, 11 / 211]
    events = EventAccumulator(str(tmp_path / "tensorboard/first"))
    events.Reload()
    shares = {event.step: event.value for event in events.Scalars("4 speed/evaluation share")}
    assert shares == pytest.approx({1: 0.5, 3: 11 / 211, 4: 13 / 1213})
    told = [line for line in capsys.readouterr().err.splitlines() if "evaluation has taken" in line]
    assert len(told) == 2
    assert "5.2 %" in told[0]  # the first one came too early to be judged
    assert "more than 2 %: let held_out_loss and samples be rarer or smaller" in told[0]
    assert told[1] == "first: evaluation has taken 1.1 % of the time since this start"


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard/first"))
    events.Reload()
    return events


INSPECTION = Inspection(
    gradients={"embed": 0.3, "tower image": 0.4},
    updates={"embed": 1e-3, "tower image": 2e-3},
    weights={"embed": 3.0, "tower image": 4.0},
    activations={"trunk image": 7.5},
    scored={"text": 0.25},
    computed={"text": 0.75},
)


def test_what_a_step_shows_of_the_network_is_curves_and_stands_in_its_line(tmp_path: Path) -> None:
    watched = monitor(tmp_path)
    watched.record(1, result(), data_wait_s=0.0, unreadable=0)
    watched.record(2, replace(result(), inspection=INSPECTION), data_wait_s=0.0, unreadable=0)
    watched.close()
    expected = {
        "3 gradient norm/embed": 0.3,
        "3 gradient norm/tower image": 0.4,
        "3 update norm/tower image": 2e-3,
        "3 weight norm/embed": 3.0,
        "3 largest activation/trunk image": 7.5,
        "6 data/text scored share": 0.25,
        "6 data/text computed share": 0.75,
    }
    first, second = (json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines())
    assert "curves" not in first
    assert expected.items() <= second["curves"].items()
    events = events_of(tmp_path)
    for tag in events.Tags()["scalars"]:
        assert [event.value for event in events.Scalars(tag)] == [pytest.approx(second["curves"][tag])]


def test_charts_put_training_and_held_out_losses_together_and_name_curves_by_patterns(tmp_path: Path) -> None:
    monitor(tmp_path).close()
    events = events_of(tmp_path)
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    patterns = charts["image loss, training and held out at each t"]
    shown = {"1 loss/image", "7 held-out image/t 0.500 given ema"}
    others = {"1 loss/image NELBO", "7 held-out image/t 0.500 absent ema"}
    assert {tag for tag in shown | others if any(re.match(pattern, tag) for pattern in patterns)} == shown
    assert charts["image loss by quarter of its clock"] == [re.escape(f"2 loss by time/image t {q}") + "$" for q in QUARTERS]
    (places,) = charts["gradient norm by place"]
    assert re.match(places, "3 gradient norm/tower image")


def test_hyper_parameters_stand_in_the_run_s_own_events(tmp_path: Path) -> None:
    monitor(tmp_path).close()
    assert [path.parent.name for path in (tmp_path / "tensorboard").rglob("events*")] == ["first"]
    content = events_of(tmp_path).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["optimizer.learning_rate"].number_value == 1e-3


def test_incidents_are_texts_at_their_step_before_during_and_after_a_monitor_and_survive_a_resumption(tmp_path: Path) -> None:
    def told() -> list[tuple[int, str]]:
        events = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard/first"))  # hides texts too
        shown = events.Reload().Tensors("incidents/text_summary")
        return [(event.step, event.tensor_proto.string_val[0].decode()) for event in shown]

    def begun(first_step: int) -> tuple[Incidents, Monitor]:
        incidents = Incidents(RunFolder(tmp_path).stage("first"), writes=True)
        incidents.add(IncidentKind.PREFLIGHT, first_step, "a slow node")
        watched = monitor(tmp_path, first_step=first_step)
        incidents.told_to(watched.incident)
        return incidents, watched

    incidents, watched = begun(0)
    incidents.add(IncidentKind.SKIPPED, 3, "loss nan")
    watched.close()
    incidents.add(IncidentKind.ERROR, 3, "memory")
    slow, skipped, error = (
        "**preflight** at step {}: a slow node",
        "**skipped** at step 3: loss nan",
        "**error** at step 3: memory",
    )
    assert told() == [(0, slow.format(0)), (3, skipped), (3, error)]
    begun(2)[1].close()
    again = [(0, slow.format(0)), (2, skipped), (2, error), (2, slow.format(2))]
    assert told() == again, "what the resumption hides is told again, and no step is below the one before"


def test_exporters_get_finite_numbers_and_a_failure_is_an_incident_and_a_line_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Kept(Exporter):
        def __init__(self) -> None:
            self.numbers: dict[int, Mapping[str, float]] = {}

        def scalars(self, numbers: Mapping[str, float], step: int) -> None:
            self.numbers[step] = numbers
            if step == 4:
                raise ConnectionError("no network")

    kept, failures = Kept(), []
    background = Background("service", lambda fail: kept)
    watched = monitor(tmp_path, exporters=[background], failed=lambda step, why: failures.append((step, why)))
    for step in range(1, 5):
        watched.record(step, result(total=float(step)), data_wait_s=0.0, unreadable=0)
    watched.close()
    assert {step: numbers["1 loss/total"] for step, numbers in kept.numbers.items()} == {2: 1.5, 4: 3.5}
    assert "2 loss by time/image t 0.50-0.75" not in kept.numbers[2]
    assert failures == [(4, "service: ConnectionError: no network")]
    said = "training goes on, but not all records are exported: service: ConnectionError: no network"
    assert capsys.readouterr().err.count(said) == 1
