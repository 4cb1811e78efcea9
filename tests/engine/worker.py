"""One rank of an engine test: trains a stage of tests/tiny.yaml and prints what it saw as one JSON line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.errors import UserError
from megadiff.config.layouts import with_sizes
from megadiff.config.load import load_run
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Run
from megadiff.data.reading.loader import Loader
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.evaluation import features, in_training
from megadiff.evaluation.build import callbacks as evaluation_callbacks
from megadiff.models.names import named_parameters
from megadiff.training import loop, stopping, tags
from megadiff.types import Batch, Denoiser, Dense, DrawRule, LossTerms, Noised, RowKeys, RowLogits, SampledRows
from megadiff.weights import checkpoint
from megadiff.weights.checkpoint import FileEntry


class KillAt(loop.Callback):
    """A callback that ends this rank as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def due(self, training: Any) -> bool:
        return bool(training.progress.optimizer_step == self.step)

    def __call__(self, training: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class WaitAt(loop.Callback):
    """A callback that stands still, as ranks do that are cut off from their job, until a file `go` is there."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def due(self, training: Any) -> bool:
        return bool(training.progress.optimizer_step == self.step)

    def __call__(self, training: Any) -> None:
        (self.folder / f"waiting_{training.layout.rank}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.01)


class CoarseFeatures:
    """An extractor's network of a few numbers, of which the first call on some rank fails."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.fails:
            self.fails = False
            raise RuntimeError("no memory left")
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def coarse_extractor(name: str, weights: str | None, device: torch.device, *, fails: bool = False) -> features.Extractor:
    """In the place of `build_extractor`, for metrics of pictures in no time."""
    return features.Extractor("Coarse", CoarseFeatures(fails), 8, "coarse", device)


class AskToStopAt(loop.Callback):
    """A callback that asks the run to stop, on the rank that looks."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def due(self, training: Any) -> bool:
        return bool(training.progress.optimizer_step == self.step)

    def __call__(self, training: Any) -> None:
        if training.layout.leads:
            self.file.touch()


class HeldWrite(loop.Callback):
    """The last rank's write of a step's checkpoint, which is held until the callback of a later step."""

    def __init__(self, held: int, until: int, checkpoints: CheckpointsFolder) -> None:
        self.held, self.until, self.checkpoints = f"{held:08d}", until, checkpoints
        self.write, self.may = checkpoint.write_rank_file, Event()
        self.newest: str | None = None

    def write_rank_file(self, folder: Path, rank: int, *of: Any) -> FileEntry:
        if self.held in folder.name and rank == int(os.environ["WORLD_SIZE"]) - 1:
            assert self.may.wait(60)
        return self.write(folder, rank, *of)

    def due(self, training: Any) -> bool:
        return bool(training.progress.optimizer_step == self.until)

    def __call__(self, training: Any) -> None:
        newest = self.checkpoints.newest()
        self.newest = newest and newest.name
        self.may.set()


class Poison(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(context: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * torch.inf


class PoisonedObjective(DiffusionObjective):
    """Of one step on the last rank, either the loss or the gradient alone is not finite."""

    step, kind = 0, ""

    def score(self, *of: Any) -> LossTerms:
        terms = super().score(*of)
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if not last or len(WatchedLoader.samples) != self.step:
            return terms
        return replace(terms, total=Poison.apply(terms.total) if self.kind == "gradient" else terms.total * torch.inf)


class SpikedObjective(DiffusionObjective):
    """The losses of some data steps, first to last, are far too large on every rank."""

    data_steps = range(0)

    def score(self, *of: Any) -> LossTerms:
        terms = super().score(*of)
        if WatchedLoader.data_steps[-1] not in self.data_steps:
            return terms
        sums = {name: 1000 * loss for name, loss in terms.sample_sums.items()}
        return replace(terms, total=terms.total * 1000, sample_sums=sums)


class WatchedLoader(Loader):
    """Remembers by step the key of each sample that it gave, by its slot."""

    samples: ClassVar[list[dict[int, int]]] = []
    data_steps: ClassVar[list[int]] = []

    def take(self, device: torch.device | str = "cpu") -> list[Batch]:
        batches = super().take(device)
        pairs = [zip(batch.slots.tolist(), batch.keys.tolist(), strict=True) for batch in batches]
        self.samples.append(dict(chain.from_iterable(pairs)))
        self.data_steps.extend(batch.data_step for batch in batches[:1])  # a rank may take none
        return batches


class Probe(loop.Callback):
    """At the last step, what the averaged weights predict, and that the trained weights are back afterwards."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def due(self, training: Any) -> bool:
        return bool(training.progress.optimizer_step == training.stage.steps)

    def __call__(self, training: Any) -> None:
        noised, readout = probe_input()
        before = [shard.master.clone() for shard in training.engine.pieces.trained]
        with training.engine.denoiser() as denoiser:
            averaged = denoiser(noised, readout)
        with training.engine.denoiser("raw") as denoiser:
            trained = denoiser(noised, readout)
        after = [shard.master for shard in training.engine.pieces.trained]
        self.seen = {
            "averaged": averaged["image"].flatten()[:64].tolist(),
            "trained": trained["image"].flatten()[:64].tolist(),
            "masters_restored": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        }
        if training.stage.modalities["text"].predicted:
            with training.engine.denoiser("raw") as denoiser:
                self.seen |= text_readouts(denoiser)


def probe_input() -> tuple[Noised, dict[str, Dense]]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, 2000, (2, 16), generator=generator)
    states = {"text": text, "image": torch.randn(2, 3, 32, 32, generator=generator)}
    clocks = {"text": torch.tensor([0.0, 0.4]), "image": torch.tensor([0.3, 0.9])}
    return Noised(states, clocks, {"text": None, "image": None}), {"image": Dense()}


def text_readouts(denoiser: Denoiser) -> dict[str, Any]:
    """Tokens drawn in two branches of guidance, their log-probabilities, and some logits."""
    noised, _ = probe_input()
    places = torch.arange(16)
    rows, weights = torch.stack([places, places + 16]), torch.tensor([[1.5], [-0.5]]).expand(2, 16)
    keys = RowKeys(torch.full((16,), 7), "a test", places)
    draws = denoiser(noised, {"text": SampledRows(rows, weights, keys, DrawRule(top_p=0.9))})["text"]
    logits = denoiser(noised, {"text": RowLogits(places)})["text"]
    return {"ids": draws.ids.tolist(), "logs": draws.log_probability.tolist(), "logits": logits[:, ::50].flatten().tolist()}


def megatron_classes(module: torch.nn.Module) -> list[str]:
    """The classes of megatron-core that a module inherits from."""
    return [base.__name__ for base in type(module).__mro__ if base.__module__.startswith("megatron.")]


def held_elements(module: torch.nn.Module) -> int:
    """Elements of all parameters that this rank can read right now."""
    return sum(parameter.data.numel() for parameter in module.parameters())


class Gathered:
    """Records the largest number of gathered elements: while the model is built, and in every module's forward."""

    def __init__(self) -> None:
        self.most = 0
        self._alive: list[torch.nn.Parameter] = []
        torch.nn.modules.module.register_module_parameter_registration_hook(self._registered)
        torch.nn.modules.module.register_module_forward_hook(lambda *_: self.look())

    def take(self) -> int:
        """The largest number since the last call, or so far."""
        self.look()
        most, self.most = self.most, 0
        return most

    def forget(self) -> None:
        """Watch no parameter of the models so far."""
        self._alive.clear()

    def _registered(self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            self._alive.append(parameter)
        self.look()

    def look(self) -> None:
        self.most = max(self.most, sum(parameter.data.numel() for parameter in self._alive))


def main(request: dict[str, Any]) -> None:
    """Train the stages asked for, one after the other; prints what was seen of the last one, and of each by its name."""
    run = load_run("tests/tiny.yaml", [f"folder={request['folder']}", *request.get("overrides", [])])
    tree = load_deepspeed(request["deepspeed"])
    tree.setdefault("zero_optimization", {}).update(request.get("zero_options", {}))
    tree = with_sizes(tree, request.get("pipeline"), request.get("tensor"))
    if "poison" in request:
        PoisonedObjective.step, PoisonedObjective.kind = request["poison"]
        loop.DiffusionObjective = PoisonedObjective  # type: ignore[attr-defined, misc]
    if "spike" in request:
        SpikedObjective.data_steps = range(*request["spike"])
        loop.DiffusionObjective = SpikedObjective  # type: ignore[attr-defined, misc]
    gathered = Gathered() if request.get("watch_gathered") else None
    reports = {}
    for stage in request["stages"]:
        WatchedLoader.samples.clear()
        WatchedLoader.data_steps.clear()
        seen = reports[stage] = trained(run, stage, tree, request)
        if gathered is not None:
            seen["most_gathered"] = gathered.take()
            gathered.forget()
        if "error" in seen:
            break
    print(json.dumps({**reports[stage], "by_stage": reports}))


def trained(run: Run, stage: str, tree: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    probe = Probe()
    seen: dict[str, Any] = {}

    class Look(loop.Callback):
        def due(self, training: Any) -> bool:
            return True

        def __call__(self, training: Any) -> None:
            module, deepspeed = training.engine.backend.module, training.engine.backend.engine
            seen["engine"], seen["engine_steps"] = type(deepspeed).__name__, deepspeed.global_steps
            seen["whole"] = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
            seen["held_between_steps"] = held_elements(module)
            seen["all_partitioned"] = all(hasattr(p, "ds_tensor") for p in module.parameters())
            seen["hooked"] = {path: bool(child._parameters) for path, child in module.named_modules() if child._forward_hooks}
            seen["local_shapes"] = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named_parameters(module)}
            seen["megatron"] = {path: base for path, child in module.named_modules() for base in megatron_classes(child)}
            seen["digests"] = {
                piece.name: hashlib.sha256(piece.master.numpy().tobytes()).hexdigest()
                for piece in training.engine.pieces.trained
            }

    if "failing_features" in request:
        fails = request["failing_features"] == int(os.environ["RANK"])
        in_training.build_extractor = partial(coarse_extractor, fails=fails)  # type: ignore[attr-defined]
    callbacks: list[Any] = [Look(), probe, *evaluation_callbacks(run, run.stage(stage))]
    if "kill_at" in request:
        callbacks.append(KillAt(request["kill_at"]))
    if "stop_at" in request:
        callbacks.append(AskToStopAt(request["stop_at"], run.paths.stop))
    if "wait_at" in request:
        callbacks.append(WaitAt(request["wait_at"], Path(request["signals"])))
    begun, until = request.get("hold_write", (0, 0))
    held = HeldWrite(begun, until, run.paths.stage(stage).checkpoints)
    callbacks.append(held)
    try:
        with (
            patch.object(checkpoint, "write_rank_file", held.write_rank_file),
            patch.object(loop, "Loader", WatchedLoader),
            patch.object(stopping, "LOOK_EVERY_S", 0.0),
        ):
            # Tests change steps in the middle.
            loop.train_stage(run, stage, tree, callbacks, allow_changes=True)
    except UserError as error:
        seen["error"] = str(error)
    seen["newest_while_held"] = held.newest
    metrics, results = run.paths.stage(stage).metrics, run.paths.stage(stage).results
    if results.exists():
        figures = [json.loads(line) for line in results.read_text().splitlines()]
        seen["held_out"] = {f"{figure['step']} {figure['name']}": figure["value"] for figure in figures}
    if metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        seen["loss"] = [row["loss"] for row in rows]
        seen["grad_norm"] = [row["grad_norm"] for row in rows]
        seen["text_losses"] = [row["losses"].get("text") for row in rows]
        seen["applied"] = [row["applied"] for row in rows]
        seen["steps"] = [row["step"] for row in rows]
        seen["inspected"] = {
            name: value
            for row in rows
            for name, value in row.get("curves", {}).items()
            if name.startswith((tags.GRADIENT, tags.UPDATE, tags.WEIGHT, tags.ACTIVATION, tags.DATA))
        }
    return {**seen, **probe.seen, "samples": WatchedLoader.samples[:], "data_steps": WatchedLoader.data_steps[:]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
