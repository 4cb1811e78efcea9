"""What it saves not to compute the padding of conditioning text: one step of training and of guided sampling, text to image.

    python -m benchmarks.ragged_text [--json FILE] [--repeats N] [--batch B]

Three ways with the same result to within rounding: padding hidden as keys but computed; left out of attention only; packed,
so that no layer computes it. Captions: those of the emoji that ship here; and the paper's space of 120 positions with lengths
log-normal around a mean of 40, in a network of its shape (8 joint blocks, a tower of 6) at a quarter of its width.
Guided sampling reads the text twice, the second time masked all over, where every position has to be computed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megadiff.config.load import load_run
from megadiff.config.schema import Model
from megadiff.data.reading.loader import Loader
from megadiff.diffusion.categorical import clean_lengths
from megadiff.models.mmdit import MMDiT, build_model
from megadiff.types import Dense, Noised, Ragged

WAYS = ("hidden as keys", "left out of attention", "packed")


def emoji(batch: int) -> tuple[Model, Tensor]:
    """The quickstart's model, and lengths of captions as its training reads them."""
    run = load_run("configs/run/quickstart.yaml")
    loader = Loader(run.data, run.model, seed=0, global_samples=batch, micro_batch=batch)
    ids = loader.take()[0].states["text"]
    lengths = clean_lengths(ids, torch.zeros(batch), run.model.modalities["text"].space)
    assert lengths is not None
    return run.model, lengths


def paper(batch: int) -> tuple[Model, Tensor]:
    """The paper's network at a quarter of its width, and lengths at even quantiles of a log-normal distribution."""
    tree = yaml.safe_load(Path("configs/model/paper.yaml").read_text(encoding="utf-8"))["model"]
    tree.update(width=256, heads=4)
    tree["modalities"]["text"]["process"] = {"kind": "masked", "padding": "after_end"}
    quantiles = (torch.arange(batch) + 0.5) / batch
    lengths = torch.exp(3.58 + 0.5 * torch.special.ndtri(quantiles))
    return Model.model_validate(tree), lengths.round().clamp(2, 120).int()


def noised(model: Model, lengths: Tensor, way: str) -> Noised:
    """Clean text and pictures at some time."""
    batch, text, image = len(lengths), model.modalities["text"].space, model.modalities["image"].space
    there = torch.arange(text.length) < lengths[:, None]
    return Noised(
        states={
            "text": torch.randint(text.vocabulary, (batch, text.length)),
            "image": torch.randn(batch, image.channels, image.height, image.width),
        },
        clocks={"text": torch.zeros(batch), "image": torch.rand(batch)},
        visible={"text": there if way == WAYS[0] else None, "image": None},
        ragged={} if way == WAYS[0] else {"text": Ragged(lengths, int(lengths.sum()), int(lengths.max()))},
    )


def training(network: MMDiT, read: Noised) -> None:
    network(read, {"image": Dense()})["image"].square().mean().backward()


def sampling(network: MMDiT, read: Noised) -> None:
    with torch.no_grad():
        network(read, {"image": Dense()})


def seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def measure(name: str, model: Model, lengths: Tensor, repeats: int) -> list[dict[str, object]]:
    network = build_model(model, ["image"])
    full = torch.full_like(lengths, model.modalities["text"].space.length)
    found = []
    for task, step, of_task in (
        ("training", training, lengths),
        ("sampling", sampling, lengths),
        ("guided sampling", sampling, torch.cat([lengths, full])),
    ):
        reads = {way: noised(model, of_task, way) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(repeats + 1):
            for way in WAYS:  # in turn, so that a slower minute slows all alike
                network.embed.packs = way == "packed"
                taken = seconds(lambda step=step, read=reads[way]: step(network, read))
                if repeat:
                    times[way].append(taken)
        medians = {way: statistics.median(values) for way, values in times.items()}
        places = full[0].item() * len(of_task)
        found.append(
            {
                "captions": name,
                "task": task,
                "text_positions_there": of_task.sum().item() / places,
                "all_tokens_there": 1 - (places - of_task.sum().item()) / (places + image_tokens(model) * len(of_task)),
                "seconds": medians,
                "relative": {way: median / medians[WAYS[0]] for way, median in medians.items()},
            }
        )
    return found


def image_tokens(model: Model) -> int:
    space = model.modalities["image"].space
    return math.prod(space.patches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/ragged_text.json"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = []
    print("| captions | task | text positions there | of all tokens | " + " | ".join(WAYS) + " |\n|---|---|" + "---|" * 5)
    for name, make in (("emoji32", emoji), ("paper, mean 40 of 120", paper)):
        model, lengths = make(arguments.batch)
        for case in measure(name, model, lengths, arguments.repeats):
            cases.append(case)
            shares = f"{case['text_positions_there']:.0%} | {case['all_tokens_there']:.0%}"
            relative = " | ".join(f"{value:.2f}" for value in case["relative"].values())
            print(f"| {name} | {case['task']} | {shares} | {relative} |", flush=True)
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    record = {**machine, "batch": arguments.batch, "repeats": arguments.repeats, "cases": cases}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
