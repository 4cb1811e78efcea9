"""A trace of some steps, its table and its file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megadiff.training.profiling import PHASES
from tests.ranks import fork_megadiff


@pytest.mark.distributed
def test_a_profile_names_the_phases_of_a_step_and_its_dearest_operations_and_leaves_a_trace(tmp_path: Path) -> None:
    out, stage = tmp_path / "out", ("--stage", "third", "stages.*.initialise={source: null}")
    where = ("--deepspeed", "ds_configs/zero2.json", "--steps", "2", "--out", str(out))
    done = fork_megadiff("profile", "tests/tiny.yaml", f"folder={tmp_path / 'run'}", *stage, *where, world=2)
    assert done.returncode == 0, done.stderr
    shares = {
        name: float(share) for line in done.stdout.splitlines() if len(line.split()) == 3 for name, share, _ in [line.split()]
    }
    assert set(PHASES) <= set(shares)
    assert all(0 < shares[name] < 100 for name in PHASES)
    assert sum(shares[name] for name in PHASES if name != "reduce") < 101
    (communication,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("communication: ")]
    assert 0 < float(communication) < 100
    assert len(done.stdout.split("dearest operations")[1].splitlines()) == 12
    with gzip.open(out / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("step") >= 2
    assert set(PHASES) <= set(names)
    assert not (tmp_path / "run").exists(), "nothing is trained for good"
