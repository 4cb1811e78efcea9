"""One rank that trains the tiny run's last stage with several ZeRO stages, and prints what waited in a step, as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.load import load_run
from megadiff.data.reading.loader import Loader
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.distributed.ranks import Ranks
from megadiff.engine.build import build_engine
from tests.waits import watched


def main(request: dict[str, Any]) -> None:
    run = load_run("tests/tiny.yaml", [f"folder={request['folder']}", "stages.*.batch={global_samples: 8, micro_batch: 4}"])
    stage, seen = run.stages[-1], {}
    objective = DiffusionObjective(run.model, stage, 0)
    loader = Loader(run.data, run.model, seed=0, global_samples=8, micro_batch=4)
    for zero in request["zero"]:
        tree = load_deepspeed(f"ds_configs/zero{zero}.json")
        engine = build_engine(run.model, stage, tree, seed=0, ranks=Ranks.from_environment())
        engine.step(loader.take(), objective)  # the first one sets up
        batches, counts = loader.take(), Counter[str]()
        with watched(counts):
            result = engine.step(batches, objective)
        assert result.applied
        seen[zero] = counts
    loader.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
