"""YAML -> Cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.config.errors import ConfigError
from megadiff.config.load import dump_cluster, load_cluster
from megadiff.config.schema.cluster import KINDS
from tests.minimal import write_yaml

CONFIGS = Path(__file__).parents[2] / "configs/cluster"


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_file_of_each_kind_is_read(kind: str) -> None:
    cluster = load_cluster(CONFIGS / f"{kind}.yaml")
    assert (cluster.kind, cluster.ranks_per_node, cluster.accelerated) == (kind, 8, True)


def test_the_commented_keys_of_the_shipped_slurm_file_are_keys(tmp_path: Path) -> None:
    text = (CONFIGS / "slurm.yaml").read_text().replace("\n# ", "\n").split("\n", 1)[1]
    (tmp_path / "all.yaml").write_text(text)
    cluster = load_cluster(tmp_path / "all.yaml")
    assert cluster.nccl == {"SOCKET_IFNAME": "ib0", "IB_HCA": "mlx5_0,mlx5_1"}
    assert cluster.container[:2] == ("apptainer", "exec")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dumped_cluster_is_read_back_equal(tmp_path: Path, kind: str) -> None:
    cluster = load_cluster(CONFIGS / f"{kind}.yaml")
    (tmp_path / "dumped.yaml").write_text(dump_cluster(cluster))
    assert load_cluster(tmp_path / "dumped.yaml") == cluster


def test_overrides_and_a_base_reach_a_cluster(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "mine.yaml", {"base": str(CONFIGS / "slurm.yaml"), "partition": "gpu"})
    cluster = load_cluster(path, ["nodes=4", "nccl.DEBUG=WARN"])
    assert (cluster.partition, cluster.nodes, cluster.nccl, cluster.options[0]) == ("gpu", 4, {"DEBUG": "WARN"}, "--exclusive")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"kind": "slrum"}, "kind is 'slrum'; it must be one of local, slurm, deepspeed"),
        ({}, "kind is None"),
        ({"kind": "slurm", "nodse": 2}, "unknown key nodse; did you mean nodes?"),
        ({"kind": "local", "nodes": 2}, "unknown key nodes; known here: cache, "),
        ({"kind": "slurm", "gpus_per_node": 8, "processes_per_node": 2}, "every GPU has one rank"),
        (
            {"kind": "slurm", "time_limit_minutes": 10, "stop_before_s": 600},
            "must be less than time_limit_minutes (10) = 600 s",
        ),
        ({"kind": "slurm", "options": ["--nodes=3"]}, "megadiff sets --nodes itself"),
        ({"kind": "slurm", "options": ["-N3"]}, "must be a long option of sbatch"),
        ({"kind": "slurm", "partition": "a\nb"}, "must be printable and on one line"),
        ({"kind": "slurm", "environment": {"A-B": "1"}}, "is no name of an environment variable"),
        ({"kind": "slurm", "cache": "s3://bucket/cache"}, "must be a path on a file system"),
        ({"kind": "deepspeed", "hosts": ["a"], "nodes": 2, "qos": "high"}, "nodes, qos: of a Slurm allocation"),
        ({"kind": "deepspeed", "hosts": ["a", "a"]}, "hosts must differ"),
        ({"kind": "deepspeed", "hosts": ["-oProxyCommand=x"]}, "hosts.0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_cluster(write_yaml(tmp_path / "cluster.yaml", tree))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
