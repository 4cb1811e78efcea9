"""One of two ranks; the second leaves step 2 and waits until both have said where they stand, then it ends."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.load import load_run
from megadiff.training import loop


def main(request: dict[str, Any]) -> None:
    run = load_run("tests/tiny.yaml", request["overrides"])
    records = run.paths.stage("first").collectives

    class StandStill(loop.Callback):
        def due(self, moment: Any) -> bool:
            return bool(moment.step == 2 and os.environ["RANK"] == "1")

        def __call__(self, moment: Any) -> None:
            since, deadline = time.time(), time.monotonic() + 60
            while time.monotonic() < deadline and min(map(written, (f"{records}0", f"{records}1"))) < since:
                time.sleep(0.05)
            os._exit(7)

    loop.train_stage(run, "first", load_deepspeed("ds_configs/zero1.json"), [StandStill()])


def written(path: str) -> float:
    return Path(path).stat().st_mtime if Path(path).exists() else 0.0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
