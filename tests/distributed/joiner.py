"""A rank that joins others, and prints the sum of all ranks' numbers or why it could not join."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

from megadiff.config.errors import UserError
from megadiff.distributed import joining
from megadiff.distributed.ranks import Ranks
from megadiff.engine.start import start_process_group

request = json.loads(sys.argv[1])
place = int(os.environ["RANK"])
world = request["worlds"][place] if "worlds" in request else int(os.environ["WORLD_SIZE"])
ranks = Ranks(place + request.get("shift", 0), world, place)
if "timeout_s" in request:
    os.environ[joining.TIMEOUT_VARIABLE] = str(request["timeout_s"])
try:
    start_process_group(ranks, request["facts"][place])
    total = torch.tensor(place)
    dist.all_reduce(total)
    print(json.dumps(f"sum {total.item()}"))
except UserError as error:
    print(json.dumps(str(error)))
