"""A process that only writes checkpoints, until it is killed: every number in one is its step.

It goes on from the newest checkpoint, after looking at all of its numbers. Each step that begins one is a line of a file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from megadiff.config.layout import Layout
from megadiff.config.run_folder import CheckpointsFolder, RunFolder
from megadiff.config.schema import Batching, Checkpointing, ConstantEma, Stage
from megadiff.engine.ema import Ema
from megadiff.engine.pieces import Piece, Pieces
from megadiff.engine.saving import Saver
from megadiff.weights.boxes import whole
from megadiff.weights.checkpoint import MOMENTS, CheckpointReader, clear
from megadiff.weights.fence import Fence

EVERY = 3
SIZE = 50_000
STAGE = Stage(
    name="only",
    steps=10**9,
    modalities={},
    batch=Batching(global_samples=1, micro_batch=1),
    ema={"main": ConstantEma(decay=0.5)},
    checkpoint=Checkpointing(every_steps=EVERY, keep=2),
)


def main(run: Path) -> None:
    checkpoints, fence = CheckpointsFolder(run / "only/checkpoints"), Fence.take(RunFolder(run))
    clear(checkpoints)
    step = newest_step(checkpoints)
    weight = torch.nn.Parameter(torch.full((SIZE,), float(step)))
    optimizer = torch.optim.AdamW([weight])
    pieces = Pieces(optimizer, [Piece("w", (SIZE,), whole((SIZE,)), weight, 0, owned=True)], [], {"w": (SIZE,)}, lambda: None)
    ema = Ema(STAGE.ema, pieces)
    saver = Saver(checkpoints, pieces, ema, Layout(), torch.device("cpu"), STAGE, fence)
    begun = os.open(run / "begun", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        step += 1
        with torch.no_grad():
            moments = [pieces.trained[0].moment(optimizer, kind) for kind in MOMENTS]
            for tensor in (weight, ema.averages["main"][0], *moments):
                tensor.fill_(float(step))
        saver.publish_if_written()
        if step % EVERY == 0:
            saver.publish()
            os.write(begun, b"%d\n" % step)
            saver.begin({"optimizer_step": step}, "config")


def newest_step(checkpoints: CheckpointsFolder) -> int:
    """The step of the newest checkpoint, 0 without one.

    Raises:
        AssertionError: it is not the one that was written.
    """
    newest = checkpoints.newest()
    if newest is None:
        return 0
    reader = CheckpointReader(newest)
    step = int(reader.manifest.progress["optimizer_step"])
    assert checkpoints.step(step) == newest
    assert reader.damaged(reader.manifest.files) == []
    for kind in ("weight", "ema.main", *MOMENTS):
        assert (reader.read_whole(kind, "w") == float(step)).all(), (newest, kind)
    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
