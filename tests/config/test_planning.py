"""Layouts side by side, and models that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.config.errors import ConfigError
from megadiff.config.gpus import GPUS
from megadiff.config.load import load_run
from megadiff.config.planning import check_fits, choices, node_count
from megadiff.config.schema import Cluster, DeepSpeedCluster, LocalCluster, Run, SlurmCluster
from tests.minimal import ZERO3, write_json

ROOT = Path(__file__).parents[2]
ZERO0 = {**ZERO3, "zero_optimization": {"stage": 0}}


def paper(**batch: int) -> Run:
    """The paper's run, with one average, and batches that divide over anything."""
    sizes = {"global_samples": 4096, "micro_batch": 16, **batch}
    overrides = [f"stages.*.batch.{key}={value}" for key, value in sizes.items()]
    return load_run(ROOT / "configs/run/paper_8gpu.yaml", overrides)


def slurm(**changes: Any) -> SlurmCluster:
    return SlurmCluster.model_validate({"nodes": 1, "gpus_per_node": 8, "gpu": "h100", **changes})


def test_each_stage_has_a_choice_with_its_numbers():
    rows = choices(paper(), "zero3.json", ZERO3, slurm(), 2, GPUS["h100"])
    assert [row.stage for row in rows] == ["noisy_text_to_image", "text_tower", "joint"]
    for row in rows:
        assert (row.ranks, row.layout.data_ranks, row.micro_batches, row.fault) == (16, 16, 16, "")
        assert row.held
        assert row.sent
        assert row.time
        assert row.held["total"] == sum(count for kind, count in row.held.items() if kind != "total")


def test_ranks_that_do_not_divide_are_one_row_with_the_reason():
    (row,) = choices(paper(), "zero3.json", ZERO3, slurm(), 3, None)
    assert row.fault.startswith("data.lanes (64) must be a multiple of the data ranks (24); nearest: 48 or 72; stage ")
    assert (row.stage, row.held, row.time) == (None, None, None)


def test_a_network_of_its_own_changes_times_between_nodes_only():
    def network(nodes: int, **changes: Any) -> float:
        row = choices(paper(), "zero3.json", ZERO3, slurm(**changes), nodes, GPUS["h100"])[0]
        return row.time.network_s if row.time else 0.0

    assert network(1, network_gbit_per_s=10) == network(1)
    assert network(2, network_gbit_per_s=10) > 10 * network(2)


def test_offloaded_kinds_do_not_count_on_the_gpu():
    offloaded = {**ZERO3, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    (here, *_), (there, *_) = (choices(paper(), "a", tree, slurm(), 1, GPUS["h100"]) for tree in (ZERO3, offloaded))
    assert here.held
    assert there.held
    assert set(here.held) - set(there.held) == {"master", "adam", "ema"}


@pytest.mark.parametrize(
    ("cluster", "nodes"),
    [
        (LocalCluster(gpus_per_node=8), 1),
        (SlurmCluster(nodes=3), 3),
        (DeepSpeedCluster(nodes=4), 4),
        (DeepSpeedCluster(hosts=("a", "b")), 2),
    ],
)
def test_nodes_are_counted_in_every_kind_of_cluster(cluster: Cluster, nodes: int):
    assert node_count(cluster) == nodes


def test_a_model_that_fits_or_an_unknown_gpu_passes(tmp_path: Path):
    check_fits(paper(), tmp_path / "zero0.json", ZERO0, slurm())
    check_fits(paper(micro_batch=512), tmp_path / "zero0.json", ZERO0, slurm(gpu=None))


def test_a_model_that_does_not_fit_is_refused_with_what_would(tmp_path: Path):
    write_json(tmp_path / "offload.json", ZERO3 | {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    write_json(tmp_path / "tensor.json", {**ZERO3, "tensor_model_parallel_size": 4})
    write_json(tmp_path / "broken.json", {"no": "such key"})
    with pytest.raises(ConfigError) as caught:
        check_fits(paper(micro_batch=512), tmp_path / "zero0.json", ZERO0, slurm())
    said = str(caught.value)
    assert said.startswith("stage joint with zero0.json on 1 node: a rank holds ")
    assert " GiB, and an h100 has 80; would fit: " in said
    assert "tensor.json" in said
    assert "broken" not in said


def test_more_nodes_are_recommended_where_they_help(tmp_path: Path):
    run = load_run(
        ROOT / "configs/run/paper_8gpu.yaml",
        ["stages.*.batch.global_samples=4096", "model.width=6144", "model.heads=48", "model.head_dim=128"],
    )
    with pytest.raises(ConfigError, match=r"would fit: \d+ nodes$"):
        check_fits(run, tmp_path / "zero3.json", ZERO3, slurm())


def test_where_nothing_fits_the_batch_is_to_blame(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"no JSON beside it would fit, nor would more nodes, up to 16; lower batch.micro_batch"
    ):
        check_fits(paper(micro_batch=1024, global_samples=1024 * 512), tmp_path / "zero3.json", ZERO3, slurm())


def test_a_run_that_does_not_divide_is_refused_as_by_launch(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^data.lanes \(64\) must be a multiple of the data ranks \(24\)"):
        check_fits(paper(), tmp_path / "zero3.json", ZERO3, slurm(nodes=3))
