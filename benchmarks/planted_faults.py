"""What held-out curves look like when something is wrong: a picture of faults that are planted.

    python -m benchmarks.planted_faults [--steps N] [--picture FILE] [--json FILE]

Four runs of a small network on drawn shapes whose captions name colour, shape and place, at the same time. They differ in one
thing each:

    healthy         as they are
    overfit         trained on 64 pairs alone
    dead condition  every caption of the training data goes with every picture, so that neither tells anything about the other
    lost times      the image's times are drawn around t = 0.1, so that t > 0.5 is hardly ever trained

They compare curves, not times: any machine will do, busy or not.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

from megadiff.config.load import load_run
from megadiff.data.shards.shard import Manifest, Members, write_manifest, write_shard
from megadiff.report.records import HeldOutCurve, Series, StageRecord, read_run
from megadiff.report.sheet import png_bytes

MANY, FEW, HELD_OUT_PAIRS = 4000, 64, 64
SIDE_PX, FINE = 16, 8
"""Pictures are drawn FINE times as large and shrunk, for smooth edges."""
COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "pink")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
CORNERS = {"triangle": 3, "square": 4, "circle": 64}
LOST = {"kind": "logit_normal", "location": -2.0, "scale": 0.5, "uniform_share": 0.0}
STAGE = {
    "name": "joint",
    "batch": {"global_samples": 64, "micro_batch": 64},
    "optimizer": {"learning_rate": 3.0e-3, "weight_decay": 0.01, "warmup_steps": 20},
    "ema": {"main": {"kind": "constant", "decay": 0.98}},
    "modalities": {
        "image": {"conditioning": {"clean": 0.15, "absent": 0.15}},
        "text": {"conditioning": {"clean": 0.3, "absent": 0.1}},
    },
    "checkpoint": {"every_steps": 100_000, "keep": 1},
}
HELD_OUT = {"pairs": HELD_OUT_PAIRS, "times": [0.3, 0.95], "nelbo_times": 4, "weights": "ema"}
MODEL = {
    "width": 64,
    "heads": 2,
    "joint_depth": 2,
    "modalities": {"image": {"space": {"kind": "grid", "channels": 3, "height": SIDE_PX, "width": SIDE_PX, "patch": 4}}},
}
SHOWN = (("image", 0.3), ("image", 0.95), ("text", None))
"""The curves in the picture, by modality and time; None: the NELBO."""


def pair(chance: random.Random) -> tuple[Image.Image, str]:
    """A shape of random colour, kind, place and size, and its caption."""
    colour, shape, place = (chance.choice(sorted(names)) for names in (COLOURS, CORNERS, PLACES))
    side = SIDE_PX * FINE
    centre = [side * (0.28 + 0.44 * half + chance.uniform(-0.04, 0.04)) for half in PLACES[place]]
    picture = Image.new("RGB", (side, side), "white")
    radius = side * chance.uniform(0.16, 0.24)
    ImageDraw.Draw(picture).regular_polygon((*centre, radius), CORNERS[shape], fill=colour)
    return picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS), f"{colour} {shape} {place}"


def write_data(folder: Path) -> dict[str, Path]:
    """The manifests of held-out pairs and of what each run trains on."""
    chance = random.Random(0)
    pairs = [pair(chance) for _ in range(HELD_OUT_PAIRS + MANY)]
    held_out, many = pairs[:HELD_OUT_PAIRS], pairs[HELD_OUT_PAIRS:]
    mixed = [(picture, chance.choice(many)[1]) for picture, _ in many]
    sets = {"held out": held_out, "healthy": many, "overfit": many[:FEW], "dead condition": mixed, "lost times": many}
    return {name: write_pairs(folder / name, chosen) for name, chosen in sets.items()}


def write_pairs(folder: Path, pairs: list[tuple[Image.Image, str]]) -> Path:
    samples: dict[str, Members] = {
        f"{number:05d}": {"png": png_bytes(picture), "json": json.dumps({"captions": [caption]}).encode()}
        for number, (picture, caption) in enumerate(pairs)
    }
    return Path(write_manifest(str(folder), Manifest((write_shard(str(folder), "00000.tar", samples),))))


def train(name: str, manifests: dict[str, Path], folder: Path, steps: int) -> StageRecord:
    """Train one of the runs; its curves."""
    configs = Path("configs").absolute()
    tree: dict[str, object] = {
        "base": [str(configs / "model/emoji32.yaml"), str(configs / "data/emoji32.yaml")],
        "name": name.replace(" ", "-"),
        "folder": str(folder / "run"),
        "launch": {"processes": 1},
        "model": MODEL,
        "data": {"train": str(manifests[name]), "held_out": str(manifests["held out"]), "block_shards": 1},
        "stages": [{**STAGE, "steps": steps, "held_out_loss": {"every_steps": steps // 10, **HELD_OUT}}],
    }
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
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--picture", type=Path, default=Path("docs/held_out_faults.png"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/planted_faults.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifests = write_data(folder / "data")
        names = [name for name in manifests if name != "held out"]
        with ThreadPoolExecutor() as pool:  # a thread waits for a run's processes
            stages = pool.map(lambda name: train(name, manifests, folder / name, arguments.steps), names)
            found = dict(zip(names, stages, strict=True))
    draw(found, arguments.picture)
    record = {name: record_of(stage) for name, stage in found.items()}
    arguments.json.write_text(json.dumps({"steps": arguments.steps, "curves": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
