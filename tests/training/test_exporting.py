"""Records that go elsewhere, which training neither waits for nor stops for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megadiff.config.errors import ConfigError
from megadiff.config.load import load_run
from megadiff.config.run_folder import Incident, IncidentKind
from megadiff.config.schema import Monitoring
from megadiff.training import exporting, tags
from megadiff.training.exporting import Background, Exporter


class Kept(Exporter):
    """Keeps numbers, as a service does, or fails."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.closed = fails, False
        self.numbers: dict[int, dict[str, float]] = {}

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        if self.fails:
            raise RuntimeError("the key has expired")
        self.numbers[step] = dict(numbers)

    def close(self) -> None:
        self.closed = True


def waited_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_records_arrive_in_order_and_what_an_exporter_has_no_use_for_is_passed_over() -> None:
    kept = Kept()
    background = Background("kept", lambda fail: kept)
    background.scalars({"a": 1.0}, 1)
    background.text("incidents", "words", 1)
    background.incident(Incident(IncidentKind.STOP, "first", 1, 0.0, ""))
    background.scalars({"a": 2.0}, 2)
    background.close()
    assert (list(kept.numbers.items()), kept.closed) == ([(1, {"a": 1.0}), (2, {"a": 2.0})], True)
    assert background.failure() is None


def test_a_failure_is_told_once_whatever_is_raised() -> None:
    background = Background("kept", lambda fail: Kept(fails=True))
    for step in (1, 2, 3):
        background.scalars({}, step)
    background.close()
    assert [background.failure(), background.failure()] == ["kept: RuntimeError: the key has expired", None]


def test_what_cannot_be_opened_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, tries = Kept(), []

    def opens(fail: Callable[[str], None]) -> Exporter:
        tries.append(True)
        if len(tries) == 1:
            raise ConnectionError("no network")
        return kept

    background = Background("kept", opens)
    background.scalars({}, 1)
    background.scalars({}, 2)
    waited_for(background.failure)
    monkeypatch.setattr(exporting, "RETRY_S", 0.0)
    background._opens_at = 0.0
    background.scalars({}, 3)
    background.close()
    assert (len(tries), list(kept.numbers)) == (2, [3])


def test_an_exporter_that_hangs_holds_up_neither_a_step_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "CLOSE_S", 0.1)
    monkeypatch.setattr(exporting, "MOST_WAITING", 5)
    goes_on = threading.Event()

    class Hangs(Exporter):
        def scalars(self, numbers: Mapping[str, float], step: int) -> None:
            goes_on.wait()

    slow = Background("slow", lambda fail: Hangs())
    slow.scalars({}, 1)
    slow.close()
    assert slow.failure() == "slow: what it had not sent 0.1 s after the end is left out"
    full = Background("full", lambda fail: Hangs())
    for step in range(10):
        full.scalars({}, step)
    assert full.failure() == "full: it is 5 records behind; others are left out"
    full.close()
    goes_on.set()


@pytest.mark.parametrize(
    ("tag", "metric"),
    [
        ("1 loss/image", ("loss", "image")),
        ("2 loss by time/image t 0.25-0.50", ("loss_by_time", "image t 0.25-0.50")),
        ("4 speed/samples per s", ("speed_samples_per_s", None)),
        ("6 data/text scored share", ("data_text_scored_share", None)),
        ("7 held-out image/t 0.500 given ema", ("held_out_image", "t 0.500 given ema")),
        ("7 results/fid", ("results", "fid")),
    ],
)
def test_a_curve_is_a_metric_with_a_name_that_prometheus_takes(tag: str, metric: tuple[str, str | None]) -> None:
    assert tags.measurement(tag) == metric


@pytest.mark.parametrize("key", ["wandb", "opentelemetry", "prometheus"])
def test_a_package_that_is_missing_is_one_sentence_with_the_way_out(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadiff.config.schema.monitoring._is_installed", lambda package: False)
    section = {"project": "p"} if key == "wandb" else {}
    with pytest.raises(ConfigError, match=rf"monitoring.{key} needs the package .*pip install 'megadiff\[{key}\]'"):
        Monitoring.model_validate({key: section}).check_installed()
    Monitoring().check_installed()


def test_the_check_knows_what_is_installed_and_overrides_reach_the_section(tmp_path: Path) -> None:
    from megadiff.config.schema.monitoring import _is_installed

    assert [_is_installed(name) for name in ("tensorboard", "no-such-package")] == [True, False]
    run = load_run("tests/tiny.yaml", ["monitoring.opentelemetry={endpoint: 'http://collector:4318'}"])
    assert run.monitoring.opentelemetry.endpoint == "http://collector:4318"
    with pytest.raises(ConfigError, match=r"monitoring.opentelemetry.endpoint"):
        load_run("tests/tiny.yaml", ["monitoring.opentelemetry={endpoint: 'collector:4318'}"])


def test_an_exporter_that_is_behind_at_the_end_is_closed_when_it_has_caught_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "MOST_WAITING", 2)
    goes_on = threading.Event()

    class Behind(Kept):
        def scalars(self, numbers: Mapping[str, float], step: int) -> None:
            goes_on.wait()
            super().scalars(numbers, step)

    behind = Behind()
    background = Background("behind", lambda fail: behind)
    background.scalars({}, 1)
    waited_for(background._records.empty)
    background.scalars({}, 2)
    background.scalars({}, 3)
    assert background._records.full()
    threading.Timer(0.2, goes_on.set).start()
    background.close()
    assert (list(behind.numbers), behind.closed) == ([1, 2, 3], True)
