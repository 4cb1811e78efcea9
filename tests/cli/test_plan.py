"""`megadiff plan`, and `launch --cluster` of a model that does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadiff.cli import main as cli
from tests.minimal import ZERO3, minimal_run, write_json, write_yaml
from tests.ranks import ROOT

HUGE = ["model.width=65536", "model.heads=1024", "model.head_dim=64", "model.joint_depth=48"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    minimal_run(tmp_path, launch={})
    write_json(tmp_path / "pipeline.json", {**ZERO3, "zero_optimization": {"stage": 1}, "pipeline": {"stages": 2}})
    write_json(tmp_path / "zero3.json", ZERO3)
    write_yaml(tmp_path / "cluster.yaml", {"kind": "slurm", "nodes": 2, "gpus_per_node": 2, "gpu": "h100"})
    return [str(tmp_path / name) for name in ("minimal.yaml", "pipeline.json", "zero3.json", "cluster.yaml")]


def plan(files: list[str], *more: str) -> list[str]:
    run, *jsons, cluster = files
    return ["plan", run, *more, "--deepspeed", *jsons, "--cluster", cluster]


def test_the_table_has_a_line_per_json_nodes_gpu_and_stage(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*plan(files), "--nodes", "1", "2", "3", "--gpu", "a100", "h200"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["JSON", "nodes", "ranks", "GPU", "stage"]
    places = [tuple(line.split()[:5]) for line in lines if " must be " not in line]
    assert places == [
        (name, nodes, ranks, gpu, stage)
        for name in ("pipeline.json", "zero3.json")
        for nodes, ranks in (("1", "2"), ("2", "4"))
        for gpu in ("a100", "h200")
        for stage in ("first", "second")
    ]
    refused = [line for line in lines if " must be " in line]
    assert len(refused) == 4
    assert all("3      6" in line and "must be a multiple of the data ranks" in line for line in refused)


def test_without_a_gpu_there_are_no_times(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(plan(files, "cluster.gpu=null")) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert not {"GPU", "MFU", "limit"} & set(header.split())
    assert len(lines) == 4


def test_json_has_every_number(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*plan(files), "--nodes", "2", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    first = rows[0]
    assert (first["json"], first["nodes"], first["ranks"], first["gpu"]) == ("pipeline.json", 2, 4, "h100")
    assert first["layout"] == {"pipeline": 2, "data": 2, "tensor": 1}
    assert first["held"]["total"] > first["held"]["weights"] > 0
    assert first["time"]["least_s"] == first["time"][f"{first['time']['limit']}_s"] <= first["time"]["apart_s"]
    assert 0 < first["utilisation"]["apart"] <= first["utilisation"]["most"] <= 1
    refused = [row for row in rows if row["nodes"] == 3]
    assert [(row["stage"], row["layout"], row["held"]) for row in refused] == [(None, None, None)] * 2
    assert all("must be a multiple" in row["fault"] for row in refused)


def test_a_model_that_does_not_fit_says_so_in_its_row(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(plan(files, *HUGE)) == 0
    assert capsys.readouterr().out.count("GiB, and an h100 has 80") == 4


def test_a_gpu_for_nodes_without_is_refused(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*plan(files, "cluster.gpus_per_node=0", "cluster.gpu=null"), "--gpu", "h100"]) == 2
    assert "--gpu h100, and the nodes of" in capsys.readouterr().err


def test_launch_refuses_a_model_that_cannot_fit_before_it_submits(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _, zero3, cluster = files
    assert cli.main(["launch", run, "--deepspeed", zero3, "--cluster", cluster, *HUGE]) == 2
    said = capsys.readouterr().err
    assert "with zero3.json on 2 nodes: a rank holds" in said
    assert len(said.splitlines()) == 1


def test_plan_imports_no_torch(files: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = sys.modules['numpy'] = None\n"
        f"from megadiff.cli.main import main\nassert main({plan(files)!r}) == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
