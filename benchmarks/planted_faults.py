"""What held-out curves look like when something is wrong: a picture of faults that are planted.

    python -m benchmarks.planted_faults [--steps N] [--picture FILE] [--json FILE]

Four runs of a small network on the emoji that ship with the repository, which differ in one thing each:

    healthy       as they are
    overfit       trained on 64 pairs alone
    no condition  every caption of the training data goes with every picture, so the text tells nothing
    lost times    the image's times are drawn around t = 0.1, so that t > 0.5 is hardly ever trained

They compare curves, not times: any machine will do, busy or not.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from megadiff.config.load import load_run
from megadiff.data.shards.shard import Manifest, Members, Shard, read_manifest, write_manifest, write_shard
from megadiff.report.records import HeldOutCurve, Series, StageRecord, read_run

EMOJI = Path("examples/emoji32/train")
FEW = 64
LOST = {"kind": "logit_normal", "location": -2.0, "scale": 0.5, "uniform_share": 0.0}
STAGE = {
    "name": "joint",
    "batch": {"global_samples": 64, "micro_batch": 64},
    "optimizer": {"learning_rate": 2.0e-3, "weight_decay": 0.01, "warmup_steps": 20},
    "ema": {"main": {"kind": "constant", "decay": 0.98}},
    "modalities": {"image": {"conditioning": {"absent": 0.15}}, "text": {"conditioning": {"clean": 0.3, "absent": 0.1}}},
    "checkpoint": {"every_steps": 100_000, "keep": 1},
}
HELD_OUT = {"pairs": 64, "times": [0.2, 0.8], "nelbo_times": 8, "weights": "ema"}
MODEL = {
    "width": 96,
    "heads": 3,
    "joint_depth": 3,
    "modalities": {"image": {"space": {"kind": "grid", "channels": 3, "height": 32, "width": 32, "patch": 8}}},
}
SHOWN = (("image", 0.2), ("image", 0.8), ("text", None))
"""The curves in the picture, by modality and time; None: the NELBO."""


def samples() -> Iterator[tuple[str, Members]]:
    for entry in read_manifest(str(EMOJI / "manifest.json")).shards:
        shard = Shard(entry.name, EMOJI / entry.name)
        for offset in range(len(shard)):
            yield shard.key(offset), shard.members(offset)


def write_data(folder: Path) -> dict[str, Path]:
    """The training data of every run that has its own; returns the manifests."""
    pairs = dict(samples())
    few = dict(list(pairs.items())[:FEW])
    captions = [caption for members in pairs.values() for caption in json.loads(members["json"])["captions"]]
    draw = random.Random(0)
    mixed = {
        key: {**members, "json": json.dumps({"captions": draw.sample(captions, 200)}).encode()}
        for key, members in pairs.items()
    }
    manifests = {}
    for name, chosen in (("overfit", few), ("no condition", mixed)):
        entry = write_shard(str(folder / name), "00000.tar", chosen)
        manifests[name] = Path(write_manifest(str(folder / name), Manifest((entry,))))
    return manifests


def train(name: str, manifest: Path | None, folder: Path, steps: int) -> StageRecord:
    """Train one of the runs; its curves."""
    configs = Path("configs").absolute()
    tree: dict[str, object] = {
        "base": [str(configs / "model/emoji32.yaml"), str(configs / "data/emoji32.yaml")],
        "name": name,
        "folder": str(folder / "run"),
        "launch": {"processes": 1},
        "model": MODEL,
        "stages": [{**STAGE, "steps": steps, "held_out_loss": {"every_steps": steps // 10, **HELD_OUT}}],
    }
    if manifest is not None:
        tree["data"] = {"train": str(manifest), "block_shards": 1}
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    overrides = [] if name != "lost times" else [f"stages.joint.modalities.image.times={json.dumps(LOST)}"]
    command = [sys.executable, "-m", "megadiff", "launch", str(path), "--deepspeed", "ds_configs/zero0.json", *overrides]
    subprocess.run(command, check=True)
    return read_run(load_run(folder / "run/run.yaml"), name).stages[0]


def draw(found: dict[str, StageRecord], picture: Path) -> None:
    """A row of charts per run, a column per curve of SHOWN: given and absent, and the bound in training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.1 * len(found)), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(found), len(SHOWN), squeeze=False, sharex=True, sharey="col")
    for row, (name, stage) in zip(grid, found.items(), strict=True):
        for axes, (target, time) in zip(row, SHOWN, strict=True):
            if time is None:
                training = of_training(stage, target)
                axes.plot(training.steps, training.values, color="0.6", label="in training")
            for curve in stage.held_out:
                if (curve.target, curve.time) == (target, time):
                    label = f"held out, condition {'given' if curve.given else 'absent'}"
                    axes.plot(curve.series.steps, curve.series.values, ".-", color="C0" if curve.given else "C1", label=label)
            what = f"{target}, NELBO" if time is None else f"{target}, t = {time}"
            axes.set_title(f"{name}: {what}", loc="left", fontsize=9)
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            axes.tick_params(labelsize=7, which="both")
    grid[0][-1].legend(fontsize=7)
    figure.savefig(picture)


def name_of(curve: HeldOutCurve) -> str:
    what = "NELBO" if curve.time is None else f"t {curve.time}"
    return f"{curve.target} {what} {'given' if curve.given else 'absent'}"


def of_training(stage: StageRecord, target: str) -> Series:
    """The bound in nats per token of what is trained on, smoothed."""
    return stage.training[f"NELBO/{target}"].smoothed(40)


def by_step(series: Series) -> dict[int, float]:
    return {step: round(value, 5) for step, value in zip(series.steps, series.values, strict=True)}


def record_of(stage: StageRecord) -> dict[str, dict[int, float]]:
    bounds = {f"{target} NELBO in training": by_step(of_training(stage, target)) for target, time in SHOWN if time is None}
    return {name_of(curve): by_step(curve.series) for curve in stage.held_out} | bounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--picture", type=Path, default=Path("docs/held_out_faults.png"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/planted_faults.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifests = write_data(folder / "data")
        names = ("healthy", "overfit", "no condition", "lost times")
        found = {name: train(name, manifests.get(name), folder / name, arguments.steps) for name in names}
    draw(found, arguments.picture)
    record = {name: record_of(stage) for name, stage in found.items()}
    arguments.json.write_text(json.dumps({"steps": arguments.steps, "curves": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
