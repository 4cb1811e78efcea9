"""Where ranks stand, and where a run's files lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadiff.config.errors import ConfigError
from megadiff.config.layout import Layout
from megadiff.config.run_folder import CheckpointsFolder, RunFolder
from tests.minimal import minimal_run


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
def test_every_place_in_the_box_is_one_ranks(pipeline: int, tensor: int) -> None:
    world = 2 * pipeline * tensor
    ranks = [Layout(rank, world, pipeline, tensor) for rank in range(world)]
    places = {(layout.pipeline_rank, layout.data_rank, layout.tensor_rank) for layout in ranks}
    assert len(places) == world
    assert {layout.data_ranks for layout in ranks} == {2}
    assert sorted(layout.data_rank for layout in ranks if layout.speaks) == [0, 1], "one speaks for each replica"
    assert [layout.data_rank for layout in ranks if layout.leads] == [0]
    assert all(layout.reads for layout in ranks if layout.speaks)
    assert sum(layout.reads for layout in ranks) == 2 * tensor * min(pipeline, 2)


def test_tensor_parts_run_fastest_then_replicas() -> None:
    ranks = [Layout(rank, 8, pipeline=2, tensor=2) for rank in range(8)]
    assert [layout.tensor_rank for layout in ranks] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [layout.data_rank for layout in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [layout.pipeline_rank for layout in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_runs_files_lie_here(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    stage = run.paths.stage("first")
    root = tmp_path / "run"
    assert run.paths == RunFolder(root)
    assert (run.paths.run, stage.done) == (root / "run.yaml", root / "first" / "DONE")
    assert (stage.log(3), stage.metrics) == (root / "first/logs/rank_3.log", root / "first/metrics.jsonl")
    assert stage.tensorboard == root / "tensorboard" / "first"
    assert stage.checkpoints.step(10) == root / "first/checkpoints/step_00000010"


def test_only_whole_checkpoints_of_this_programs_names_count(tmp_path: Path) -> None:
    folder = CheckpointsFolder(tmp_path)
    assert folder.newest() is None
    for name in ("step_00000002", "step_00000010", "step_00000020.bak", "step_x", ".partial-step_00000030"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "step_00000040").mkdir()
    assert list(folder.published()) == [2, 10]
    assert folder.newest() == folder.step(10)
    (tmp_path / "latest").write_text("step_00000002\n")
    assert folder.newest() == folder.step(2)
    assert folder.newest_first() == [folder.step(2)]
    assert folder.partials() == [folder.partial(30)]
    (tmp_path / "latest").unlink()
    assert folder.newest_first() == [folder.step(10), folder.step(2)]
    (tmp_path / "latest").write_text("step_00000020.bak")
    assert folder.newest_first() == [tmp_path / "step_00000020.bak"]


def test_a_stage_is_had_by_its_name(tmp_path: Path) -> None:
    run = minimal_run(tmp_path)
    assert run.stage("second") is run.stages[1]
    with pytest.raises(ConfigError, match="the run has no stage third; its stages: first, second"):
        run.stage("third")
