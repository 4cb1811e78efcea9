"""A rank tells what it is doing, and one that stands still says where and ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megadiff.config.run_folder import Incident, IncidentKind, Phase, RunFolder
from megadiff.config.schema import Safeguards
from megadiff.training.incidents import Incidents
from megadiff.training.pulse import Pulse
from tests.minimal import fault
from tests.ranks import finish, start_python

STANDS_STILL = """
import sys, time
from pathlib import Path
from megadiff.config.run_folder import Phase, RunFolder
from megadiff.config.schema import Safeguards
from megadiff.training.pulse import Pulse

def waits_for_ever():
    pulse.beat(7, Phase.SAVE)
    time.sleep(60)

pulse = Pulse(RunFolder(Path(sys.argv[1])).stage("first"), 3, Safeguards(stalled_after_s=1.0, ended_after_s=4.0))
waits_for_ever()
"""


def test_a_rank_that_stands_still_says_where_and_ends(tmp_path: Path) -> None:
    ended = finish(start_python("-c", STANDS_STILL, str(tmp_path)), 30)
    assert ended.returncode == 1
    stacks = (tmp_path / "first/logs/rank_3.log").read_text()
    assert stacks.count("in waits_for_ever") == 2, "once when it stalls, once when it ends"
    heartbeat = json.loads((tmp_path / "first/heartbeats/rank_3.json").read_text())
    assert (heartbeat["step"], heartbeat["phase"]) == (7, "save")


def test_a_rank_that_moves_lives_on_and_leaves_no_watch_behind(tmp_path: Path) -> None:
    paths = RunFolder(tmp_path).stage("first")
    pulse = Pulse(paths, 0, Safeguards(stalled_after_s=1.5, ended_after_s=2.5))
    began = time.time()
    for step in range(8):
        time.sleep(0.5)
        pulse.beat(step, Phase.STEP)
    time.sleep(1.2)
    heartbeat = json.loads(paths.heartbeat(0).read_text())
    pulse.close()
    assert (heartbeat["step"], heartbeat["phase"]) == (7, "step")
    assert began + 3 < heartbeat["time"] < time.time()
    assert paths.log(0).read_text() == ""
    time.sleep(2.6)  # the timer that ends the process is gone


def test_a_rank_is_ended_only_after_its_stacks_were_written(tmp_path: Path) -> None:
    assert "ended_after_s (60) must be more than stalled_after_s (60)" in fault(
        tmp_path, safeguards={"stalled_after_s": 60, "ended_after_s": 60}
    )


def test_incidents_are_lines_of_rank_0_and_stop_nothing_where_they_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = RunFolder(tmp_path).stage("first")
    Incidents(paths, writes=True).add(IncidentKind.SKIPPED, 5, "loss nan")
    Incidents(paths, writes=False).add(IncidentKind.SKIPPED, 5, "loss nan")
    (line,) = paths.of.incidents.read_text().splitlines()
    incident = Incident(**json.loads(line))
    assert (incident.kind, incident.stage, incident.step, incident.detail) == ("skipped", "first", 5, "loss nan")
    Incidents(RunFolder(tmp_path / "gone").stage("first"), writes=True).add(IncidentKind.STOP, 6)
    assert "an incident (stop) cannot be written" in caplog.text
