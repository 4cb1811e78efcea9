"""Exporters by other people's libraries, each with the real library and without its service."""

from __future__ import annotations

import json
import math
import socket
import struct
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megadiff.config.run_folder import Incident, IncidentKind, RunFolder
from megadiff.config.schema.monitoring import OpenTelemetry, Prometheus, WeightsAndBiases
from megadiff.training.exporters import Gauges, Scraped, WandB, otlp_reader
from megadiff.training.exporting import Background
from tests.training.test_exporting import waited_for

LABELS = {"run": "tiny", "stage": "first"}
SPIKE = Incident(IncidentKind.SPIKE, "first", 3, 0.0, "losses above 2")
ERROR = Incident(IncidentKind.ERROR, "first", 4, 0.0, "memory")


def records_of(file: Path) -> Iterator[Any]:
    """W&B's protocol buffers in an offline run: LevelDB's log format after a header of its own."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += 7 + length
        whole += data[place - length : place]
        if kind in (1, 4):  # whole, or its last part
            record = proto.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    rows = [{item.nested_key[0] or item.key: item.value_json for item in record.history.item} for record in records]
    return [{key: json.loads(value) for key, value in row.items()} for row in rows if row]


def test_wandb_goes_on_under_one_name_and_shows_steps_pictures_and_incidents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    paths = RunFolder(tmp_path).stage("first")
    paths.root.mkdir()
    section = WeightsAndBiases(project="p", mode="offline")
    for steps, ends in (((1, 2), SPIKE), ((2, 3), ERROR)):
        exporter = WandB(section, "tiny", paths, {"optimizer.learning_rate": 1e-3})
        for step in steps:
            exporter.scalars({"1 loss/total": 1 / step}, step)
        exporter.picture("samples/joint", Image.new("RGB", (4, 4), "red"), steps[-1])
        exporter.incident(ends)
        exporter.close()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    name = paths.wandb_id.read_text()
    for folder, steps, code in zip(folders, ((1, 2), (2, 3)), (0, 1)):
        file = folder / f"run-{name}.wandb"
        # W&B's own process may still be writing it.
        waited_for(lambda file=file: any(record.HasField("exit") for record in records_of(file)))
        records = list(records_of(file))
        (run,) = [record.run for record in records if record.run.run_id]
        assert (run.run_id, run.run_group, run.display_name, run.project) == (name, "tiny", "tiny/first", "p")
        assert {item.key: item.value_json for item in run.config.update}["optimizer.learning_rate"] == "0.001"
        rows = rows_of(records)
        assert [(row["step"], row["1 loss/total"]) for row in rows if "1 loss/total" in row] == [(s, 1 / s) for s in steps]
        assert [row["step"] for row in rows if "samples/joint" in row] == [steps[-1]]
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [code]
    (alert,) = [record.alert for record in records if record.HasField("alert")]
    assert (alert.title, alert.level, alert.text) == ("tiny/first: error", "ERROR", ERROR.markdown)


def test_wandb_without_a_key_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    section, paths = WeightsAndBiases(project="p"), RunFolder(tmp_path).stage("first")
    background = Background("W&B", lambda fail: WandB(section, "tiny", paths, {}))
    background.scalars({}, 1)
    background.close()
    assert background.failure() == "W&B: UserError: there is no key; set WANDB_API_KEY, or give monitoring.wandb.mode=offline"


def points_of(data: Any) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """By metric and attributes, without those that all have."""
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for metric in scope.metrics:
        for point in metric.data.data_points:
            assert point.attributes.items() >= LABELS.items()
            found.setdefault(metric.name, {})[frozenset(point.attributes.items() - LABELS.items())] = point.value
    return found


def test_gauges_have_the_last_numbers_and_incidents_are_counted_by_kind() -> None:
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    gauges = Gauges(reader, LABELS)
    gauges.scalars({"1 loss/image": 2.0, "1 loss/text": 3.0, "4 speed/samples per s": 9.0}, 1)
    gauges.scalars({"1 loss/image": 1.0}, 2)
    for incident in (SPIKE, SPIKE, ERROR):
        gauges.incident(incident)
    gauges.picture("samples/joint", Image.new("RGB", (4, 4)), 2)
    points = points_of(reader.get_metrics_data())
    gauges.close()
    assert points == {
        "megadiff.loss": {frozenset({("curve", "image")}): 1.0, frozenset({("curve", "text")}): 3.0},
        "megadiff.speed_samples_per_s": {frozenset(): 9.0},
        "megadiff.step": {frozenset(): 2},
        "megadiff.incidents": {frozenset({("kind", "spike")}): 2, frozenset({("kind", "error")}): 1},
    }


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_prometheus_scrapes_the_port_which_is_free_again_afterwards() -> None:
    pytest.importorskip("opentelemetry.exporter.prometheus")
    section = Prometheus(port=free_port(), host="127.0.0.1")
    for value in (0.5, 0.25):
        exporter = Scraped(section, LABELS)
        exporter.scalars({"3 gradient norm/tower image": value, "1 loss/total": math.pi}, 7)
        exporter.incident(ERROR)
        with urllib.request.urlopen(f"http://127.0.0.1:{section.port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("megadiff_")]
        exporter.close()
        told = {line.partition("{")[0]: line for line in lines}
        assert told["megadiff_gradient_norm"].endswith(f"}} {value}")
        for label in ('curve="tower image"', 'run="tiny"', 'stage="first"'):
            assert label in told["megadiff_gradient_norm"]
        assert told["megadiff_step"].endswith(" 7.0")
        assert 'kind="error"' in told["megadiff_incidents_total"]


def test_a_port_that_is_taken_is_a_failure_and_no_more() -> None:
    pytest.importorskip("opentelemetry.exporter.prometheus")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        section = Prometheus(port=taken.getsockname()[1], host="127.0.0.1")
        background = Background("Prometheus", lambda fail: Scraped(section, LABELS))
        background.scalars({"1 loss/total": 1.0}, 1)
        background.close()
    assert "Address already in use" in background.failure()


def test_a_collector_that_is_away_is_told() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    section = OpenTelemetry(endpoint=f"http://127.0.0.1:{free_port()}")
    background = Background("OpenTelemetry", lambda fail: Gauges(otlp_reader(section, fail), LABELS))
    background.scalars({"1 loss/total": 1.0}, 1)
    background.close()
    assert background.failure() == f"OpenTelemetry: {section.endpoint} does not take what is sent"
