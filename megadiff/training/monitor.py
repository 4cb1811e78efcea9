"""Records of a stage in training for people: a progress bar or plain lines, metrics.jsonl, TensorBoard and other exporters."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from megadiff.config.errors import UserError
from megadiff.config.gpus import GPUS
from megadiff.config.run_folder import Incident, StageFolder
from megadiff.engine.api import StepResult
from megadiff.files import write_text
from megadiff.training import tags
from megadiff.training.board import Board, Description
from megadiff.training.exporting import Background, Exporter
from megadiff.types import Metric

PEAK_FLOPS = {
    **{name.upper(): gpu.bf16_flops for name, gpu in GPUS.items()},
    "B200": 2250e12,
    "L40S": 362e12,
    "V100": 125e12,
}
"""Dense bf16 (V100: fp16) tensor-core peaks by name, from the makers' data sheets."""

MOST_EVALUATING, JUDGED_AFTER_S = 0.02, 60.0
"""The share of the time above which evaluation is warned of, once the first steps weigh little."""


def peak_flops(device: torch.device) -> float:
    """FLOP/s at full utilisation: the data sheet's on a known GPU, else those of a matrix product here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, peak in PEAK_FLOPS.items():
            if model in name:
                return peak
    size = 1024
    matrix = torch.ones(size, size, device=device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        _ = (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Monitor:
    """Records steps on rank 0; on other ranks it writes nothing and every call is cheap."""

    def __init__(
        self,
        *,
        paths: StageFolder,
        total_steps: int,
        first_step: int,
        log_every: int,
        global_samples: int,
        tokens_per_sample: int,
        flops_per_sample: float,
        device: torch.device,
        ranks: int,
        active: bool,
        description: Description,
        exporters: Sequence[Background],
        failed: Callable[[int, str], object],
    ) -> None:
        """
        Args:
            exporters: where records go besides; none where it is not active.
            failed: hears at which step an exporter has failed, and why; once for each.
        """
        self.paths, self.total_steps, self.log_every, self.active = paths, total_steps, log_every, active
        self.global_samples, self.tokens_per_sample = global_samples, tokens_per_sample
        self.flops_per_sample = flops_per_sample
        self._device = device
        self._peak = peak_flops(device) * ranks if active else 1.0
        self._began = self._since = time.perf_counter()
        self._waited = self._evaluating_s = self._evaluating = 0.0
        self._warned = False
        self._results: list[StepResult] = []
        self._besides: dict[str, Any] = {}
        self._background, self._failed = exporters, failed
        self._step = first_step
        self._exporters: list[Exporter] = []
        if not active:
            return
        self._complained = False
        try:
            for folder in (paths.tensorboard, paths.pictures):
                folder.mkdir(parents=True, exist_ok=True)
            for lines in (paths.metrics, paths.results):
                _drop_after(lines, first_step)
            self._board = Board(paths, first_step, description)
            self._metrics = LineFile(paths.metrics)
        except OSError as error:
            raise UserError(f"the records of stage {paths.name} cannot be written: {error}") from None
        self._exporters = [self._board, *exporters]
        hidden = not sys.stderr.isatty()
        bar = {"total": total_steps, "initial": first_step, "desc": paths.name, "unit": "step"}
        self._bar = tqdm(**bar, dynamic_ncols=True, disable=hidden)

    def writes_at(self, step: int) -> bool:
        """Whether a step writes the means since the last time: every `log_every` steps, and at the end."""
        return step % self.log_every == 0 or step == self.total_steps

    def record(self, step: int, result: StepResult, *, data_wait_s: float, unreadable: int) -> None:
        """Record one step (step 1 is the first).

        Args:
            unreadable: unreadable samples so far; used at the steps of `writes_at`.
        """
        if not self.active:
            return
        self._step = step
        self._results.append(result)
        self._waited += data_wait_s
        writes = self.writes_at(step)
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rate = len(self._results) * self.global_samples / elapsed
        means = average(self._results)
        numbers = self._numbers(means, rate, self._waited / elapsed, unreadable) if writes else {}
        curves = {"curves": _finite(numbers)} if writes else {}
        with self._spared():
            share = {"evaluation_share": self._evaluating}
            row = {"step": step, "time": time.time(), **_row(result), **share, **self._besides, **curves}
            self._besides = {}
            self._metrics.append(json.dumps(row))
        if not writes:
            self._bar.update(1)
            return
        self.scalars(numbers, step)
        self._report_failures()
        self._show(step, means, rate)
        self._since, self._waited = time.perf_counter(), 0.0
        self._results.clear()

    def pause(self) -> float:
        """The clock before a pause in training (a checkpoint, samples), for `resume`."""
        return time.perf_counter()

    def resume(self, paused_at: float) -> None:
        self._since += time.perf_counter() - paused_at

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the speed what is done within, during a step."""
        paused_at = self.pause()
        yield
        self.resume(paused_at)

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Export numbers by their tags, the finite ones."""
        finite = {tag: value for tag, value in numbers.items() if math.isfinite(value)}
        self._export(lambda exporter: exporter.scalars(finite, step))

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        """Export a picture, and write it as a PNG into the stage's folder."""
        self._export(lambda exporter: exporter.picture(tag, picture, step))
        if self.active:
            with self._spared():
                picture.save(self.paths.pictures / f"{tag.replace('/', '-')}-{step:08d}.png", "PNG", optimize=True)

    def text(self, tag: str, text: str, step: int) -> None:
        self._export(lambda exporter: exporter.text(tag, text, step))

    def incident(self, incident: Incident) -> None:
        self._export(lambda exporter: exporter.incident(incident))

    def metrics(self, metrics: Sequence[Metric], step: int) -> None:
        """Export figures, and write them with what they depend on as lines into the stage's results."""
        self.scalars({tags.of_metric(metric.name): metric.value for metric in metrics}, step)
        if self.active:
            with self._spared(), closing(LineFile(self.paths.results)) as lines:
                for metric in metrics:
                    lines.append(json.dumps({"step": step, **asdict(metric), **_finite({"value": metric.value})}))

    def evaluated(self, step: int, since: float) -> None:
        """Record that an evaluation has come to its end, and the share of the time that all of them have taken.

        Args:
            since: the clock of `pause` when it began.
        """
        now = time.perf_counter()
        self._evaluating_s += now - since
        self._evaluating = self._evaluating_s / max(now - self._began, 1e-9)
        self.scalars({tags.EVALUATION_SHARE: self._evaluating}, step)
        told = f"evaluation has taken {100 * self._evaluating:.1f} % of the time since this start"
        if self._evaluating > MOST_EVALUATING and now - self._began > JUDGED_AFTER_S and not self._warned:
            self._warned = True
            most = f"more than {100 * MOST_EVALUATING:g} %"
            self.say(f"{self.paths.name}: {told}, {most}: let held_out_loss and samples be rarer or smaller")
        elif step == self.total_steps:
            self.say(f"{self.paths.name}: {told}")

    def saved(self, step: int, *, stalled_s: float, took_s: float) -> None:
        """Record that the checkpoint of a step is published, in the line of the next step as well.

        Args:
            stalled_s: seconds that training has waited for it.
            took_s: seconds from the end of the step to the publication.
        """
        self._besides["checkpoint"] = {"step": step, "stalled_s": stalled_s, "took_s": took_s}
        self.scalars({tags.CHECKPOINT_STALL: stalled_s, tags.CHECKPOINT_TOOK: took_s}, step)

    def traced(self, step: int, communication_share: float) -> None:
        """Record the share that communication has of the traced steps, the last of which this is; in the next line as well."""
        self._besides |= _finite({"communication_share": communication_share})
        self.scalars({tags.COMMUNICATION_SHARE: communication_share}, step)

    def say(self, message: str) -> None:
        """Print a line above the progress bar, or in the log."""
        if self.active:
            tqdm.write(message, file=sys.stderr)

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`, which are done again."""
        self._results.clear()
        self._since, self._waited = time.perf_counter(), 0.0
        if not self.active:
            return
        self._bar.update(step - self._bar.n)
        with self._spared():
            self._board.rewind(step)
        with self._spared():
            self._metrics.close()
            for lines in (self.paths.metrics, self.paths.results):
                _drop_after(lines, step)
            self._metrics = LineFile(self.paths.metrics)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._metrics.close()
            self._export(lambda exporter: exporter.close())
            self._report_failures()

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Continue training if its records cannot be written (a full disk), and say so once."""
        try:
            yield
        except OSError as error:
            if not self._complained:
                self._complained = True
                self.say(f"training goes on, but its records cannot be written: {error}")

    def _export(self, send: Callable[[Exporter], None]) -> None:
        for exporter in self._exporters:
            with self._spared():
                send(exporter)

    def _report_failures(self) -> None:
        for exporter in self._background:
            if why := exporter.failure():
                self.say(f"training goes on, but not all records are exported: {why}")
                self._failed(self._step, why)

    def _numbers(self, result: StepResult, rate: float, waiting: float, unreadable: int) -> dict[str, float]:
        """What is shown of the steps since the last time, by tag."""
        numbers = {
            **tags.of_result(result),
            f"{tags.SPEED}/samples per s": rate,
            f"{tags.SPEED}/tokens per s": rate * self.tokens_per_sample,
            f"{tags.SPEED}/model FLOPs utilisation": rate * self.flops_per_sample / self._peak,
            f"{tags.SPEED}/data-wait share": waiting,
            f"{tags.MEMORY}/host peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            f"{tags.DATA}/unreadable samples": unreadable,
        }
        if self._device.type == "cuda":
            numbers[f"{tags.MEMORY}/device peak GiB"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return numbers

    def _show(self, step: int, result: StepResult, rate: float) -> None:
        losses = " ".join(f"{name} {loss:.4f}" for name, loss in result.losses.items())
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {result.total:.4f} ({losses}), {rate:.1f} samples/s", refresh=False)
            self._bar.update(1)
            return
        left = (self.total_steps - step) * self.global_samples / rate
        clock = timedelta(seconds=round(left))
        self.say(
            f"{self.paths.name} {step}/{self.total_steps}: loss {result.total:.4f} ({losses}), "
            f"gradient norm {result.grad_norm:.3f}, {rate:.1f} samples/s, {clock} left"
        )


def average(results: Sequence[StepResult]) -> StepResult:
    """The means over several steps, without steps that scored nothing, and without what was not finite."""
    last = results[-1]
    names = last.losses
    return replace(
        last,
        losses={name: _mean([result.losses[name] for result in results]) for name in names},
        quartiles={name: [_mean(q) for q in zip(*(r.quartiles[name] for r in results), strict=True)] for name in names},
        total=_mean([result.total for result in results]),
        nelbo={name: _mean([result.nelbo.get(name, math.nan) for result in results]) for name in last.nelbo},
        grad_norm=_mean([result.grad_norm for result in results]),
        by_source={
            name: {source: _mean([result.by_source[name][source] for result in results]) for source in losses}
            for name, losses in last.by_source.items()
        },
    )


def _mean(values: Sequence[float]) -> float:
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _row(result: StepResult) -> dict[str, Any]:
    return {
        **_finite({"loss": result.total}),
        "losses": _finite(result.losses),
        "nelbo": _finite(result.nelbo),
        "by_source": {name: _finite(losses) for name, losses in result.by_source.items()},
        **_finite({"grad_norm": result.grad_norm}),
        "learning_rate": result.learning_rate,
        "applied": result.applied,
        "samples": result.samples,
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Non-finite numbers as None, since JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _drop_after(metrics: Path, step: int) -> None:
    """Delete the lines after `step`, which a resumed run repeats, and a last line cut off by a crash or a full disk."""
    if not metrics.exists():
        return
    write_text(metrics, "".join(line + "\n" for line in read_lines(metrics) if json.loads(line)["step"] <= step))


def read_lines(metrics: Path) -> Sequence[str]:
    """The whole lines of a metrics file."""
    return [line for line in metrics.read_text(encoding="utf-8").split("\n")[:-1] if line]


class LineFile:
    """A file that grows by whole lines only, even on a disk that is full at times."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it cannot be opened."""
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, line: str) -> None:
        """Raises OSError if the line cannot be written whole; then none of it is."""
        data = (line + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        if os.write(self._descriptor, data) != len(data):
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        os.close(self._descriptor)
