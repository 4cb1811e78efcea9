"""Who am I among the processes."""

from __future__ import annotations

import pytest

from megadiff.config.errors import UserError
from megadiff.distributed.ranks import Ranks


def test_a_process_without_a_launcher_is_the_only_rank() -> None:
    assert Ranks.from_environment({}) == Ranks(rank=0, world=1, local_rank=0)


def test_a_launchers_variables_are_read() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Ranks.from_environment(environment) == Ranks(rank=5, world=8, local_rank=1)


def test_the_processes_own_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(1, 2, 1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE"),
        ({"RANK": "1"}, "RANK must be below WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "RANK must be below WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "LOCAL_RANK is at most its RANK"),
    ],
)
def test_values_that_cannot_be_are_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Ranks.from_environment(environment)


def test_srun_without_ranks_is_refused_instead_of_starting_many_single_runs() -> None:
    with pytest.raises(UserError, match=r"srun started 8 tasks, but RANK is not set.*RANK=\$SLURM_PROCID"):
        Ranks.from_environment({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"})
    mapped = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    assert Ranks.from_environment(mapped) == Ranks(3, 8, 3)
