"""How a rank starts: nothing is compiled, no lock is waited for, no home folder is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import finish, start_python

SCRIPT = """
from megadiff.distributed.ranks import Ranks
from megadiff.engine.start import start_process_group
print(start_process_group(Ranks()))
from deepspeed.ops.op_builder.builder import OpBuilder
print(len(OpBuilder._loaded_ops))
"""


@pytest.mark.distributed
def test_a_lock_that_a_killed_process_left_stops_nobody_and_nothing_is_built(tmp_path: Path) -> None:
    extension = tmp_path / "extensions" / "deepspeed_shm_comm"
    extension.mkdir(parents=True)
    (extension / "lock").touch()
    ended = finish(start_python("-c", SCRIPT, TORCH_EXTENSIONS_DIR=str(extension.parent), HOME="/proc/nowhere"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["cpu", "0"]
    assert [path.name for path in (tmp_path / "extensions").rglob("*")] == ["deepspeed_shm_comm", "lock"]
