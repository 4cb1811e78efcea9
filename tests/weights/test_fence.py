"""Only the newest start of a run may publish."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megadiff.config.run_folder import RunFolder
from megadiff.weights.checkpoint import CheckpointError
from megadiff.weights.fence import Fence


def test_a_newer_start_takes_the_fence_from_all_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    first, second = Fence.take(folder), Fence.take(folder)
    second.check()
    assert (first.token.partition("-")[0], second.token.partition("-")[0]) == ("1", "2")
    with pytest.raises(CheckpointError, match=rf"run belongs to a newer start of this run \({second.token}; this one is 1-"):
        first.check()
    assert [path.name for path in folder.root.iterdir()] == [".fence"]


def test_of_starts_at_once_one_has_the_fence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        fences = list(pool.map(lambda _: Fence.take(folder), range(32)))
    assert sorted(int(fence.token.partition("-")[0]) for fence in fences) == list(range(1, 33))
    owners = [fence for fence in fences if fence.token == folder.fence.read_text()]
    assert len(owners) == 1
    owners[0].check()
