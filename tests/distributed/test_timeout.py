"""How long ranks wait for each other in a collective."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks

SCRIPT = """
import json, os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from megadiff.distributed.ranks import Ranks
from megadiff.engine.start import start_process_group

rank = int(os.environ["RANK"])
start_process_group(Ranks(rank, 2, rank), timeout=timedelta(seconds=2))
waited = []
made_later = dist.new_group()
for group in (None, made_later):
    began = time.monotonic()
    try:
        time.sleep(8) if rank else dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError:
        waited.append(time.monotonic() - began)
    if rank:
        break
print(json.dumps(waited))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.distributed
def test_the_time_out_is_that_of_groups_made_later_too(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(SCRIPT)
    waited, _ = run_ranks(script, 2, {})
    assert len(waited) == 2
    assert all(1.5 < seconds < 6 for seconds in waited)
