"""The training of one stage on one rank: one step, one screen."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.profiler import record_function

from megadiff.config import derived, parameters
from megadiff.config.drift import drift, stored_run
from megadiff.config.errors import UserError
from megadiff.config.layout import Layout
from megadiff.config.load import dump_run, leaves
from megadiff.config.run_folder import IncidentKind, Phase
from megadiff.config.schema import Run, Stage
from megadiff.data.reading.loader import Loader, check_unreadable
from megadiff.data.shards.shard import manifest_of
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.distributed.joining import Facts, check_alike, software
from megadiff.distributed.preflight import PreflightError, preflight
from megadiff.distributed.ranks import Ranks
from megadiff.distributed.reduce import barrier, gather_objects, sum_over_replicas
from megadiff.engine.build import build_engine
from megadiff.engine.engine import Engine
from megadiff.engine.saving import Published, Saver
from megadiff.files import write_text
from megadiff.training import tags
from megadiff.training.board import Description
from megadiff.training.exporters import exporters_of
from megadiff.training.health import Diverged, Health
from megadiff.training.incidents import Incidents
from megadiff.training.monitor import Monitor
from megadiff.training.progress import Progress
from megadiff.training.pulse import Pulse
from megadiff.training.resuming import resume, take_fence
from megadiff.training.spikes import Spike, SpikeWatch
from megadiff.training.stages import initialise, stage_seed
from megadiff.training.stopping import StopFile
from megadiff.training.suspects import samples_of
from megadiff.training.trace import DATA, FirstTrace
from megadiff.types import Denoiser, Metric, Moment

log = logging.getLogger(__name__)


@dataclass
class Training:
    """A stage in training; callbacks see it as a Moment.

    Attributes:
        failed_at: the step at which the start before this one ended badly; 0 if it did not, or that is unknown.
    """

    run: Run
    stage: Stage
    layout: Layout
    engine: Engine
    monitor: Monitor
    progress: Progress
    pulse: Pulse
    incidents: Incidents
    saver: Saver
    failed_at: int = 0

    @property
    def step(self) -> int:
        return self.progress.optimizer_step

    @property
    def last(self) -> bool:
        return self.step == self.stage.steps

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def denoiser(self, weights: str | None = None) -> AbstractContextManager[Denoiser]:
        return self.engine.denoiser(weights)

    def scalar(self, tag: str, value: float) -> None:
        self.monitor.scalars({tag: value}, self.step)

    def picture(self, tag: str, picture: Image.Image) -> None:
        self.monitor.picture(tag, picture, self.step)

    def text(self, tag: str, text: str) -> None:
        self.monitor.text(tag, text, self.step)

    def metrics(self, metrics: Sequence[Metric]) -> None:
        self.monitor.metrics(metrics, self.step)
        rule = self.stage.checkpoint.best
        for metric in metrics:
            if rule and metric.name == rule.metric and rule.better(metric.value, self.progress.best_value):
                self.progress.best_step, self.progress.best_value = self.step, metric.value
                self.monitor.say(f"{self.stage.name}: best {metric.name} so far, {metric.value:.5g} at step {self.step}")

    def failed(self, sentence: str) -> None:
        self.incidents.add(IncidentKind.EVALUATION, self.step, sentence)
        self.monitor.say(f"{self.stage.name}, step {self.step}: {sentence}; training goes on")


class Callback(Protocol):
    """Work between steps, at the same steps on every rank."""

    @property
    def measures(self) -> Sequence[str]:
        """Names of the figures that it records."""
        return ()

    def due(self, moment: Moment) -> bool: ...
    def __call__(self, moment: Moment) -> None: ...


def train_stage(
    run: Run,
    stage_name: str,
    deepspeed: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    *,
    failed_at: int = 0,
    allow_changes: bool = False,
) -> None:
    """Train a stage to its end, from its newest checkpoint if it has one. Runs on every rank.

    Where the run's stop file is seen first, training ends after the step with a checkpoint, and without the stage's DONE.

    Args:
        failed_at: the step at which the start before this one ended badly, whose samples are named before it is done again.
        allow_changes: go on where the run was trained otherwise.

    Raises:
        UserError: the configuration, the data or a checkpoint is at fault.
    """
    stage, paths, ranks = run.stage(stage_name), run.paths.stage(stage_name), Ranks.from_environment()
    incidents = Incidents(paths, writes=ranks.rank == 0)
    run.monitoring.check_installed()
    with closing(Pulse(paths, ranks.rank, run.safeguards)) as pulse, ExitStack() as records:
        try:
            _train_stage(run, stage, deepspeed, ranks, pulse, incidents, records, callbacks, failed_at, allow_changes)
        except Exception as error:
            kind = IncidentKind.PREFLIGHT if isinstance(error, PreflightError) else IncidentKind.ERROR
            incidents.add(kind, pulse.step, f"{type(error).__name__}: {error}")
            if not isinstance(error, UserError):
                pulse.write_collectives()
            raise


def _train_stage(
    run: Run,
    stage: Stage,
    deepspeed: Mapping[str, Any],
    ranks: Ranks,
    pulse: Pulse,
    incidents: Incidents,
    records: ExitStack,
    callbacks: Sequence[Callback],
    failed_at: int,
    allow_changes: bool,
) -> None:
    measured = [name for callback in callbacks for name in callback.measures]
    _check_best(stage, measured)
    paths, seed = run.paths.stage(stage.name), stage_seed(run, stage)
    timeout = timedelta(seconds=run.safeguards.collective_timeout_s)
    facts = _facts(run, deepspeed)

    def examine(joined: Store, device: torch.device) -> None:
        if notes := preflight(run, stage, _manifests(run), ranks=ranks, joined=joined, device=device):
            incidents.add(IncidentKind.PREFLIGHT, 0, notes)

    engine = build_engine(run.model, stage, deepspeed, seed=seed, ranks=ranks, facts=facts, timeout=timeout, examine=examine)
    layout, fence = engine.layout, take_fence(run, paths, engine.layout)
    stored = stored_run(run)
    if stored is not None:
        drift(stored, run).accepted(run.folder, allowed=allow_changes)
    # What the folder holds was accepted when it was launched.
    resumed = resume(engine, run, incidents, allow_changes=allow_changes or stored is not None)
    if resumed is None:
        initialise(engine, run, stage)
        progress = Progress()
    else:
        progress = Progress.of(resumed.progress)
    if layout.leads and stored != run:  # the launcher writes it, and torchrun does not
        run.paths.root.mkdir(parents=True, exist_ok=True)
        write_text(run.paths.run, dump_run(run))
    loader = loader_of(run, stage, layout, seed, progress)
    check_alike({"manifests of the data": loader.fingerprint()})
    monitor = monitor_of(run, stage, engine, measured, export_failed=partial(incidents.add, IncidentKind.EXPORT))
    records.enter_context(closing(monitor))  # closed last, so that it hears of an error as well
    incidents.told_to(monitor.incident)
    if resumed is not None:
        monitor.say(f"{stage.name} resumes from its checkpoint of step {progress.optimizer_step}")
        for line in resumed.changes:
            monitor.say(f"changed since then: {line}")
        if resumed.changes:
            incidents.add(IncidentKind.CHANGED, progress.optimizer_step, "; ".join(resumed.changes))
    incidents.add(IncidentKind.RESUME if resumed else IncidentKind.START, progress.optimizer_step, f"{ranks.world} ranks")

    copy_failed = partial(incidents.add, IncidentKind.COPY)
    with closing(loader), closing(engine.saver(paths.checkpoints, fence, copy_failed)) as saver:
        training = Training(run, stage, layout, engine, monitor, progress, pulse, incidents, saver, failed_at)
        _train(training, loader, DiffusionObjective(run.model, stage, seed), callbacks)
    barrier()
    if layout.leads and training.last:
        paths.done.touch()


def _check_best(stage: Stage, measured: Sequence[str]) -> None:
    """Raises UserError if nothing measures what the best checkpoint is chosen by."""
    rule = stage.checkpoint.best
    if rule and rule.metric not in measured:
        nearest = difflib.get_close_matches(rule.metric, measured, n=1, cutoff=0.3)
        way = f"the nearest that is: {nearest[0]}" if nearest else "set held_out_loss or evaluation"
        raise UserError(f"checkpoint.best.metric {rule.metric} is not measured in stage {stage.name}; {way}")


def _facts(run: Run, deepspeed: Mapping[str, Any]) -> Facts:
    """What all ranks must have in common before they build anything."""
    configuration = hashlib.blake2b(f"{dump_run(run)}{json.dumps(deepspeed)}".encode(), digest_size=8)
    return {"configuration": configuration.hexdigest(), **software()}


def _manifests(run: Run) -> dict[str, str]:
    """The manifests of the run's data, by the key of the source."""
    sources = {"data.train" + (f".{name}" if len(run.data.sources) > 1 else ""): at for name, at in run.data.sources.items()}
    if run.data.held_out:
        sources["data.held_out"] = run.data.held_out
    return {key: manifest_of(address) for key, address in sources.items()}


def _train(training: Training, loader: Loader, objective: DiffusionObjective, callbacks: Sequence[Callback]) -> None:
    engine, monitor, pulse, safeguards = training.engine, training.monitor, training.pulse, training.run.safeguards
    health = Health(safeguards.skipped_in_a_row, training.incidents)
    spikes = SpikeWatch(safeguards.spikes) if safeguards.spikes else None
    trace = FirstTrace(training.run.monitoring.trace, monitor, monitor.paths.trace, engine.device)
    stop = StopFile(training.run.paths.stop, looks=training.layout.leads, device=engine.device)
    while training.step < training.stage.steps:
        progress, step = training.progress, training.step + 1
        data_step = progress.next_data_step(loader.data_step)
        if data_step != loader.data_step:
            loader.skip_to(data_step)
        samples = partial(samples_of, loader, training.layout, [data_step])
        before = loader.stats().waited_s
        pulse.beat(step, Phase.DATA)
        if step == training.failed_at:
            training.incidents.add(IncidentKind.SUSPECT, step, f"the start before this one ended here; {samples()}")
        with trace.step(step):
            with record_function(DATA):
                batches = loader.take(engine.device)
            waited = loader.stats().waited_s - before
            pulse.beat(step, Phase.STEP)
            result = engine.step(batches, objective, loader.sources, inspect=monitor.writes_at(step))
        health.check(result, step, samples)
        if (
            spikes
            and (spike := spikes.look(result.total, step, data_step))
            and _go_back(training, loader, spike, spikes.rule.most)
        ):
            continue
        progress.optimizer_step, progress.data_step = step, loader.data_step
        progress.samples += result.samples
        progress.loader = loader.state()
        unreadable = _check_data(training, loader) if monitor.writes_at(step) else 0
        monitor.record(step, result, data_wait_s=waited, unreadable=unreadable)
        if not result.applied:
            training.scalar(tags.SKIPPED, health.skipped_steps)
        paused = monitor.pause()
        due = [callback for callback in callbacks if callback.due(training)]
        for callback in due:
            trace.end()
            pulse.beat(step, Phase.EVALUATE)
            callback(training)
        if due:
            monitor.evaluated(step, since=paused)
        stops = stop.asked() and not training.last
        _published(training, training.saver.publish_if_written())
        due_now = step % training.stage.checkpoint.every_steps == 0 or progress.best_step == step
        if stops or training.last or due_now:
            trace.end()
            # The last: a resumed run does not repeat the step, so its callbacks must have run.
            save(training, waits=stops or training.last or not training.stage.checkpoint.asynchronous)
        monitor.resume(paused)
        if stops:
            monitor.say(f"{training.stage.name} stops at step {step} as asked; its checkpoint is whole")
            training.incidents.add(IncidentKind.STOP, step)
            stop.obey()
            return


def _go_back(training: Training, loader: Loader, spike: Spike, most: int) -> bool:
    """Load the newest checkpoint from before a spike, and leave out the batches of the spike from then on. Collective.

    Args:
        most: how often a stage may.

    Returns:
        Whether there is such a checkpoint; without one nothing has changed.

    Raises:
        Diverged: the run has gone back too often.
    """
    checkpoints = training.run.paths.stage(training.stage.name).checkpoints
    first, last = spike.data_steps
    what = f"losses above {spike.bound:g}, up to {spike.loss:g}, from step {spike.step} on"
    samples = samples_of(loader, training.layout, range(first, last + 1))
    _published(training, training.saver.publish())
    folders = gather_objects(checkpoints.published())[0]
    before = [folder for step, folder in folders.items() if step < spike.step]
    if not before:
        training.incidents.add(
            IncidentKind.SPIKE, training.step, f"{what}; no checkpoint from before, so training goes on; {samples}"
        )
        return False
    skipped = [*training.progress.skipped, (first, last)]
    if len(skipped) > most:
        raise Diverged(f"{what}, after {len(skipped) - 1} rollbacks; lower optimizer.learning_rate and go on from {before[-1]}")
    saved = training.engine.load(before[-1])
    training.saver.go_back(before[-1])
    training.progress = Progress.of(saved)
    training.progress.skipped = skipped
    loader.skip_to(training.progress.data_step)
    back = f"back to step {training.step}, without the batches {first} to {last}"
    training.incidents.add(IncidentKind.SPIKE, training.step, f"{what}; {back}; {samples}")
    training.monitor.rewind(training.step)
    return True


def save(training: Training, *, waits: bool) -> None:
    """Begin a checkpoint of this moment, once the one before is published; `waits` until this one is as well. Collective."""
    training.pulse.beat(training.step, Phase.SAVE)
    _published(training, training.saver.publish())
    training.saver.begin({**asdict(training.progress), **training.engine.counters()}, dump_run(training.run))
    if waits:
        _published(training, training.saver.publish())


def _published(training: Training, published: Published | None) -> None:
    if published is not None:
        training.monitor.saved(published.step, stalled_s=published.stalled_s, took_s=published.took_s)


def _check_data(training: Training, loader: Loader) -> int:
    """The number of unreadable samples over all ranks.

    Raises:
        DataError: on all ranks, if their share is too large.
    """
    stats = loader.stats()
    own = torch.tensor([stats.read, stats.unreadable], dtype=torch.float64, device=training.engine.device)
    read, unreadable = sum_over_replicas(own, training.layout).tolist()
    check_unreadable(int(read), int(unreadable), training.run.data.max_unreadable_share)
    return int(unreadable)


def loader_of(run: Run, stage: Stage, layout: Layout, seed: int, progress: Progress) -> Loader:
    loader = Loader(
        run.data,
        run.model,
        seed=seed,
        global_samples=stage.batch.global_samples,
        micro_batch=stage.batch.micro_batch,
        data_rank=layout.data_rank,
        data_ranks=layout.data_ranks,
        data_step=progress.data_step,
        features=_features(run, stage),
        mixture=stage.mixture,
        reads=layout.reads,
    )
    if progress.loader:
        loader.load_state(progress.loader)
    return loader


def _features(run: Run, stage: Stage) -> dict[str, tuple[int, int]]:
    """Shapes of the precomputed features for a stage's alignment."""
    rule = stage.alignment
    return {} if rule is None else {rule.modality: (derived.tokens(run.model)[rule.modality], rule.features)}


def monitor_of(
    run: Run, stage: Stage, engine: Engine, measured: Sequence[str], export_failed: Callable[[int, str], object]
) -> Monitor:
    hyper_parameters, leads = _hyper_parameters(run, stage, engine.layout), engine.layout.leads
    return Monitor(
        paths=run.paths.stage(stage.name),
        total_steps=stage.steps,
        first_step=engine.optimizer_step,
        log_every=stage.log_every_steps,
        global_samples=stage.batch.global_samples,
        tokens_per_sample=sum(derived.tokens(run.model).values()),
        flops_per_sample=derived.flops_per_sample(run.model, stage),
        device=engine.device,
        ranks=engine.layout.world,
        active=leads,
        description=Description(hyper_parameters, parameters.scored(stage), measured),
        exporters=exporters_of(run, stage, hyper_parameters) if leads else (),
        failed=export_failed,
    )


def _hyper_parameters(run: Run, stage: Stage, layout: Layout) -> dict[str, float | str | bool]:
    """What tells a stage's training from that of others: its own numbers, the network's, and the ranks'."""
    model = run.model.model_dump(mode="json", exclude={"modalities"})
    own = stage.model_dump(mode="json", include={"steps", "batch", "optimizer", "precision", "ema", "freeze", "modalities"})
    ranks = {"data": layout.data_ranks, "pipeline": layout.pipeline, "tensor": layout.tensor}
    counted = parameters.stage_parameters(run.model, stage).total
    tree = {"seed": run.seed, "parameters": counted, "model": model, **own, "ranks": ranks}
    return {
        name: value if isinstance(value, float | int | str) else json.dumps(value)
        for name, value in leaves(tree).items()
        if value is not None
    }
