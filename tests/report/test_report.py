"""`megadiff report` and `megadiff compare` on folders of runs that were written by hand."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megadiff.cli import main as cli
from megadiff.config.load import dump_run
from megadiff.config.schema import Run
from megadiff.report.records import GRADIENT, SPEED, Series, read_run
from tests.minimal import minimal_run

STEPS = 40


def write_run(folder: Path, loss: Callable[[int], float] = lambda step: 10 / step, **changes: Any) -> Run:
    """A run whose first stage has trained; every step takes half a second, and a restart an hour before step 21."""
    folder.mkdir(parents=True, exist_ok=True)
    run = minimal_run(folder, **changes)
    run.paths.root.mkdir(parents=True, exist_ok=True)
    run.paths.run.write_text(dump_run(run))
    run.paths.ranks_lock.touch()
    for stage in run.stages[:1]:
        paths = run.paths.stage(stage.name)
        paths.pictures.mkdir(parents=True)
        rows = [
            {
                "step": step,
                "time": 1e9 + step / 2 + 3600 * (step > 20),
                "loss": loss(step),
                "losses": {"text": loss(step) if step != 5 else None, "image": 0.5},
                "nelbo": {"text": loss(step)},
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "samples": 16,
            }
            for step in range(1, STEPS + 1)
        ]
        paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "ti')
        names = [
            f"held-out text/{what} {given} ema" for what in ("t 0.300", "t 0.700", "NELBO") for given in ("given", "absent")
        ]
        figures = [{"step": step, "name": name, "value": 1 / step, "depends": {}} for step in (20, 40) for name in names]
        paths.results.write_text(
            "".join(json.dumps(row) + "\n" for row in [*figures, {"step": 40, "name": "other", "value": 1.0}])
        )
        for step in (20, 40):
            Image.new("RGB", (8, 8), (step, 0, 0)).save(paths.pictures / f"samples-joint-{step:08d}.png")
    incident = {"kind": "skipped", "stage": "first", "step": 7, "time": 1e9, "detail": "loss <nan>"}
    run.paths.incidents.write_text(json.dumps(incident) + "\n")
    metric = {"name": "fid", "value": loss(1), "low": 1.0, "high": 2.0, "depends": {"seed": run.seed, "weights": str(folder)}}
    run.paths.results.write_text(json.dumps({"format": "megadiff-results", "version": 1, "metrics": [metric]}))
    return run


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


class Elements(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]


def test_records_are_what_the_folder_holds(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path), "minimal")
    (stage,) = record.stages
    assert stage.training["loss"] == Series([*range(1, STEPS + 1)], [10 / step for step in range(1, STEPS + 1)])
    assert 5 not in stage.training["loss/text"].steps
    assert len(stage.training["loss/text"].steps) == STEPS - 1
    assert set(stage.training[GRADIENT].values) == {1.0}
    assert stage.training[SPEED].values == [32.0] * 19 + [16 / 3600.5] + [32.0] * 19
    assert [(curve.target, curve.time, curve.given, curve.weights) for curve in stage.held_out[::3]] == [
        ("text", 0.3, True, "ema"),
        ("text", 0.7, False, "ema"),
    ]
    assert stage.held_out[-1].time is None
    assert [step for step, _ in stage.pictures["samples-joint"]] == [20, 40]


def test_a_damaged_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    metrics = run.paths.stage("first").metrics
    metrics.write_text(metrics.read_text().replace('"step": 3,', "step 3"))
    assert f"{metrics}, line 3 is damaged" in said(capsys, "report", run.folder, code=2)


def test_means_of_neighbours_end_where_the_series_does() -> None:
    series = Series([*range(1, 11)], [float(step) for step in range(1, 11)])
    assert series.smoothed(5) == Series([2, 4, 6, 8, 10], [1.5, 3.5, 5.5, 7.5, 9.5])
    assert series.smoothed(4) == Series([3, 6, 9, 10], [2.0, 5.0, 8.0, 10.0])
    assert series.smoothed() == series
    assert series.end == 10.0


def test_a_page_holds_everything_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    assert said(capsys, "report", run.folder) == f"report: {run.paths.report}\n"
    page = run.paths.report.read_text()
    elements = Elements(page)
    # Losses; bound and held-out losses of text (image has no held-out ones); gradient, speed, rate.
    assert elements.open.count("svg") == 6
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in elements.sources)
    assert not re.search(r"(src|href)=\"?https?:|url\(\s*['\"]?http|@import", page)
    pictures = [source for source in elements.sources if source.startswith("data:")]
    first = Image.open(io.BytesIO(base64.b64decode(pictures[0].split(",")[1])))
    assert (len(pictures), first.getpixel((0, 0))) == (2, (20, 0, 0))
    assert "skipped loss &lt;nan&gt;" in page
    assert "held out, others absent" in page
    assert "joint_depth: 2" in page


def test_a_run_beside_another_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", name="other", seed=3)
    out = tmp_path / "page.html"
    said(capsys, "report", one.folder, "--against", other.folder, "--out", str(out))
    page = out.read_text()
    assert "<h1>minimal, beside other</h1>" in page
    assert page.count("-seed: 0") == page.count("+seed: 3") == 1


def test_compare_says_where_curves_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "a")
    other = write_run(tmp_path / "b", loss=lambda step: 10 / step * (1.0 if step < 30 else 1.1), seed=3, name="other")
    printed = said(capsys, "compare", one.folder, other.folder)
    rows = {tuple(line.split()[:2]): line for line in printed.splitlines() if line.startswith("first ")}
    assert re.search(r"0.25996\s+0.28596\s+30\s+9.1 %$", rows["first", "loss"])
    assert re.search(r"1\s+1\s+-\s+0 %$", rows["first", "gradient"])
    assert "fid" in printed
    assert "do not compare: other seed" in printed
    assert {"-seed: 0", "+seed: 3"} <= {*printed.splitlines()}
    same = said(capsys, "compare", one.folder, one.folder)
    assert "the same" in same
    assert "do not compare" not in same


def test_means_over_steps_are_of_whole_windows() -> None:
    series = Series([1, 2, 4, 5, 6, 7], [1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    assert series.windows(3) == Series([3, 6], [2.0, 7.0])
    assert series.windows(1) == series


def wavy(share: float, start: int = 1) -> Callable[[int], float]:
    """A loss that alternates about 10 / step from a step on."""
    return lambda step: 10 / step * (1 + (share if step % 2 and step >= start else 0.0))


def test_a_run_departs_from_kept_curves_only_beyond_the_noise_of_reruns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megadiff.report.kept.MOST_POINTS", 20)
    kept = str(tmp_path / "curves/minimal.jsonl")
    first, rerun = write_run(tmp_path / "a"), write_run(tmp_path / "b", wavy(0.1, start=11))
    assert f"curves: {kept}" in said(capsys, "compare", first.folder, rerun.folder, "--keep", kept)
    loss = next(line for line in map(json.loads, Path(kept).read_text().splitlines()[1:]) if line["curve"] == "loss")
    assert (loss["every"], loss["steps"][:2], loss["values"][0]) == (2, [2, 4], 7.5)
    assert loss["noise"][4] == 0 < loss["noise"][5] < 0.06
    for other, start in ((wavy(0.2, start=11), None), (wavy(0.4, start=21), 22), (wavy(0.1, start=3), 4)):
        run = write_run(tmp_path / f"other{start}", other)
        printed = said(capsys, "compare", run.folder, kept)
        departs = f"minimal departs from {kept} in 3 of 11 curves: first loss from step {start}, "
        assert (departs if start else f"minimal does not depart from {kept} in any curve\n") in printed
    page = tmp_path / "page.html"
    said(capsys, "report", first.folder, "--against", kept, "--out", str(page))
    assert f"<h1>minimal, beside {kept}</h1>" in page.read_text()


def test_a_file_that_holds_no_kept_curves_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    metrics = str(run.paths.stage("first").metrics)
    assert f"{metrics} holds no kept curves" in said(capsys, "compare", run.folder, metrics, code=2)
    assert "does not exist" in said(capsys, "compare", run.folder, "none.jsonl", code=2)
    assert "--keep a.json must end in .jsonl" in said(capsys, "compare", run.folder, run.folder, "--keep", "a.json", code=2)


def test_compare_needs_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "two runs or more" in said(capsys, "compare", write_run(tmp_path).folder, code=2)


def test_there_is_no_report_of_a_run_that_was_not_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = minimal_run(tmp_path)
    (tmp_path / "run.yaml").write_text(dump_run(run))
    assert "nothing was launched" in said(capsys, "report", str(tmp_path / "run.yaml"), code=2)
