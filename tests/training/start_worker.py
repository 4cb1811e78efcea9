"""One rank that starts a stage of tests/tiny.yaml as its entry of the request says; prints why it stopped, and its steps."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.errors import UserError
from megadiff.config.load import load_run
from megadiff.distributed.joining import software
from megadiff.training import loop


def main(request: dict[str, Any]) -> None:
    own = request["ranks"][int(os.environ["RANK"])]
    run = load_run("tests/tiny.yaml", [*request["overrides"], *own.get("overrides", [])])
    tree = load_deepspeed("ds_configs/zero1.json")
    os.chdir(own.get("folder", "."))
    if "code" in own:
        loop.software = lambda: {**software(), "code of megadiff": own["code"]}  # type: ignore[attr-defined]
    steps: list[int] = []

    class Count(loop.Callback):
        def due(self, moment: Any) -> bool:
            return True

        def __call__(self, moment: Any) -> None:
            steps.append(moment.step)

    said = ""
    try:
        loop.train_stage(run, "first", tree, [Count()])
    except UserError as error:
        said = str(error)
    print(json.dumps({"said": said, "steps": steps}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
