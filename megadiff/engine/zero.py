"""DeepSpeed ZeRO-0/1/2/3 behind the Engine protocol."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from torch import Tensor

from megadiff.config.deepspeed import resolve, zero_stage
from megadiff.config.derived import is_trained
from megadiff.config.layout import Layout
from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Initialise, Model, Stage
from megadiff.distributed.ranks import Ranks
from megadiff.distributed.reduce import gather_objects, raise_together, sum_over_replicas
from megadiff.engine import checkpoint
from megadiff.engine.api import QUARTILES, Objective, StepResult
from megadiff.engine.checkpoint import MOMENTS, CheckpointError, CheckpointReader, FileEntry, Manifest, tensor_key
from megadiff.engine.ema import Ema
from megadiff.engine.optimizer import build_optimizer, hold_still, learning_rate
from megadiff.engine.shards import FrozenShard, Shard, ShardedWeights
from megadiff.engine.start import start_process_group
from megadiff.models.idle import idle_parameters
from megadiff.models.mmdit import build_model, decayed_names, part_of
from megadiff.types import ALIGNMENT, Batch, Denoiser, LossTerms

log = logging.getLogger(__name__)


class ZeroEngine:
    """One stage's model, optimizer and averages, sharded over data-parallel ranks by DeepSpeed."""

    def __init__(self, model: Model, stage: Stage, tree: Mapping[str, Any], *, seed: int, ranks: Ranks) -> None:
        """Build the model (freshly initialised from `seed`) and wrap it. Collective.

        Args:
            tree: the DeepSpeed JSON as read, "auto" still in it.

        Raises:
            ConfigError: the JSON contradicts the stage, or the batch does not divide.
        """
        self.stage, self.layout = stage, Layout(ranks.rank, ranks.world)
        self.device = start_process_group(ranks)
        config = resolve(dict(tree), stage, data_ranks=self.layout.data_ranks, accelerator=self.device.type != "cpu")
        if zero_stage(config) == 0 and config["bf16"]["enabled"]:
            # bf16 needs fp32 masters, and DeepSpeed keeps them only where it partitions the optimizer.
            log.info("bf16 with ZeRO-0 runs as ZeRO-1, which keeps fp32 master weights")
            config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": 1}
        self.accumulation: int = config["gradient_accumulation_steps"]
        predicted = [name for name, modality in stage.modalities.items() if modality.predicted]
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=zero_stage(config) == 3):
            torch.manual_seed(seed)
            module = build_model(model, predicted, stage.alignment)
        module.activation_checkpointing = stage.activation_checkpointing
        self.parts = {name: part_of(name) for name, _ in module.named_parameters()}
        self.idle = idle_parameters(model, stage, self.parts)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(is_trained(self.parts[name], stage) and name not in self.idle.whole)
        optimizer = build_optimizer(module, stage.optimizer, decayed_names(module))
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module = self.engine.module
        self.weights = ShardedWeights(self.engine, self.layout.data_ranks, self.layout.data_rank)
        hold_still(self.weights.optimizer, self.weights.trained, self.idle.partial)
        self.ema = Ema(stage.ema, self.weights)
        self.optimizer_step = 0

    # ------------------------------------------------------------------------------------------------------- training

    def step(self, batches: Sequence[Batch], objective: Objective) -> StepResult:
        """One optimizer step over this rank's micro-batches. Collective.

        Masked counts differ between ranks and micro-batches while DeepSpeed averages over both, so everything is prepared
        first, the counts are summed once, and each micro-batch's sum is scaled to the global mean.
        """
        prepared = [objective.prepare(batch) for batch in batches]
        names = list(prepared[0].counts)
        own = torch.stack([sum_tensors([p.counts[name] for p in prepared]) for name in names])
        counts = sum_over_replicas(own, self.layout)
        share = self.layout.data_ranks * self.accumulation
        normaliser = {name: share / count if count > 0 else 0.0 for name, count in zip(names, counts.tolist(), strict=True)}
        rate = learning_rate(self.stage.optimizer, self.optimizer_step, self.stage.steps)
        for group in self.weights.optimizer.param_groups:
            group["lr"] = rate
        statistics = torch.zeros(len(names), QUARTILES + 1, 2, dtype=torch.float64, device=self.device)
        bounds = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)
        for micro_batch in prepared:
            prediction = self.engine(micro_batch.noised, micro_batch.readout)
            terms = objective.score(prediction, micro_batch, normaliser)
            self.engine.backward(terms.total)
            own_norm = self._gradient_norm()
            self.engine.step()
            statistics += _statistics(terms, names)
            bounds += _bounds(terms, names)
        self.optimizer_step += 1
        readable = sum_tensors([batch.weight.sum() for batch in batches]).to(self.device)
        sizes = [statistics.numel(), bounds.numel(), 1]
        sums = torch.cat([statistics.flatten(), bounds.flatten(), readable.reshape(1).to(torch.float64)])
        totals, bound_totals, samples = torch.split(sum_over_replicas(sums, self.layout), sizes)
        means = _means(totals.reshape(statistics.shape), names)
        weights = {name: self._loss_weight(name) for name, share in normaliser.items() if share}
        return StepResult(
            losses={name: values[0] for name, values in means.items()},
            quartiles={name: values[1:] for name, values in means.items()},
            total=sum(weight * means[name][0] for name, weight in weights.items()),
            grad_norm=float(self.engine.get_global_grad_norm() or own_norm),
            learning_rate=rate,
            applied=bool(self.engine.was_step_applied()),
            samples=int(samples),
            nelbo={
                name: total / count
                for name, (total, count) in zip(names, bound_totals.reshape(bounds.shape).tolist(), strict=True)
                if count
            },
        )

    def _loss_weight(self, name: str) -> float:
        if name == ALIGNMENT and self.stage.alignment is not None:
            return self.stage.alignment.weight
        return self.stage.modalities[name].loss_weight

    def _gradient_norm(self) -> float:
        """In ZeRO-0 DeepSpeed clips by the norm but does not tell it; in the other stages it does."""
        if self.engine.optimizer is not self.weights.optimizer or not self.engine.is_gradient_accumulation_boundary():
            return 0.0
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @contextmanager
    def raw_denoiser(self) -> Iterator[Denoiser]:
        """The model with its plain weights, for sampling and evaluation; equal numbers of calls on all ranks."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train()

    @contextmanager
    def ema_denoiser(self, profile: str | None = None) -> Iterator[Denoiser]:
        """The same with averaged weights (of the first profile by default)."""
        with self.raw_denoiser() as denoiser, self.ema.swapped_in(profile):
            yield denoiser

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self, checkpoints: CheckpointsFolder, progress: Mapping[str, Any], config: str) -> Path:
        """Write and publish a checkpoint; `latest` changes only when all of it is on the disk. Collective."""
        step, writes = self.optimizer_step, self.layout.leads
        try:
            with all_or_none(checkpoints.root):
                if writes:
                    checkpoint.begin(checkpoints, step)
            tensors, ranges = self._tensors()
            folder = checkpoints.partial(step)
            entry: FileEntry | None = None
            with all_or_none(checkpoints.root):
                entry = checkpoint.write_rank_file(folder, self.layout.rank, tensors, ranges)
            files = [found for found in gather_objects(entry) if found is not None]
            shapes = gather_objects(self._shapes())
            with all_or_none(checkpoints.root):
                if writes:
                    manifest = self._manifest(progress, config, files, shapes)
                    checkpoint.publish(checkpoints, step, manifest, self.stage.checkpoint)
        except CheckpointError:
            if writes:
                checkpoint.abandon(checkpoints, step)
            raise
        return checkpoints.step(step)

    def _manifest(
        self,
        progress: Mapping[str, Any],
        config: str,
        files: Sequence[FileEntry],
        shapes: Sequence[Mapping[str, tuple[tuple[int, ...], bool]]],
    ) -> Manifest:
        counters = {
            "optimizer_step": self.optimizer_step,
            "adam_steps": self.weights.adam_steps,
            "ema_updates": self.ema.updates,
        }
        return Manifest(
            stage=self.stage.name,
            parameters={name: shape for part in shapes for name, shape in part.items()},
            ema=tuple(self.ema.profiles),
            progress={**progress, **counters},
            config=config,
            files=tuple(files),
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on where `folder` ended: weights, moments, averages, counters. Collective. Returns the saved progress.

        Raises:
            CheckpointError: it is damaged, or its parameters or EMA profiles differ from this stage's.
        """
        reader = self._open(folder)
        check_same_profiles(reader, self.ema.profiles)
        checkpoint.check_names(reader, self._whole_shapes(), parts=self.parts)
        self._check_same_trained(reader)
        with torch.no_grad():
            self._load_weights(reader, "weight", set(self.parts))
            for index, shard in enumerate(self.weights.trained):
                for kind in MOMENTS:
                    shard.moment(self.weights.optimizer, kind).copy_(reader.read(kind, shard.name, shard.start, shard.stop))
                for profile, averages in self.ema.averages.items():
                    averages[index].copy_(reader.read(f"ema.{profile}", shard.name, shard.start, shard.stop))
        progress = reader.manifest.progress
        self.weights.set_adam_steps(progress["adam_steps"])
        self.ema.updates = progress["ema_updates"]
        self.optimizer_step = progress["optimizer_step"]
        return dict(progress)

    def initialise_from(self, folder: Path, rule: Initialise) -> list[str]:
        """Start from another stage's weights with a fresh optimizer; returns the names that start fresh. Collective.

        Raises:
            CheckpointError: parameters are missing or unexpected and not declared new or dropped.
        """
        reader = self._open(folder)
        known = {**{name: part_of(name) for name in reader.manifest.parameters}, **self.parts}
        names = checkpoint.check_names(reader, self._whole_shapes(), new=rule.new, dropped=rule.dropped, parts=known)
        with torch.no_grad():
            self._load_weights(reader, reader.weight_kind(rule.weights, rule.ema), set(names))
        self.ema.reset()
        return [name for name in self.parts if name not in set(names)]

    def _check_same_trained(self, reader: CheckpointReader) -> None:
        """Raises CheckpointError if other parameters are trained now than when the checkpoint was written.

        What is idle now may have been trained there: its moments are not needed any more.
        """
        now = {name: parameter.requires_grad for name, parameter in self.module.named_parameters()}
        before = {name: trained and name not in self.idle.whole for name, (_, trained) in reader.manifest.parameters.items()}
        changed = [name for name, trained in before.items() if now[name] != trained]
        if changed:
            raise CheckpointError(
                f"{reader.folder}: {changed[0]} and {len(changed) - 1} more were trained there and are not now, or the other "
                "way round; what is frozen or has no loss cannot change within a stage: add a stage that starts from it"
            )

    def _open(self, folder: Path) -> CheckpointReader:
        """A reader of a folder whose hashes the ranks have checked between them."""
        error: CheckpointError | None = None
        reader: CheckpointReader | None = None
        try:
            reader = CheckpointReader(folder)
            damaged = reader.damaged(reader.manifest.files[self.layout.rank :: self.layout.world])
            if damaged:
                error = CheckpointError(f"{folder}: {', '.join(damaged)} is damaged (its hash differs); delete {folder}")
        except CheckpointError as found:
            error = found
        raise_together(error)
        return reader  # type: ignore[return-value]

    def _load_weights(self, reader: CheckpointReader, kind: str, names: set[str]) -> None:
        for shard in self.weights.trained:
            if shard.name in names:
                shard.master.copy_(reader.read(kind, shard.name, shard.start, shard.stop))
        for frozen in self.weights.frozen:
            if frozen.name in names:
                frozen.write(reader.read(kind, frozen.name, frozen.local_start, frozen.local_stop))
        self.weights.publish()

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
        """What this rank saves."""
        tensors: dict[str, Tensor] = {}
        ranges: dict[str, tuple[int, int]] = {}
        for index, shard in enumerate(self.weights.trained):
            if not shard.owned:
                continue
            ranges[shard.name] = (shard.start, shard.stop)
            tensors[tensor_key("weight", shard.name)] = shard.master.cpu()
            for kind in MOMENTS:
                tensors[tensor_key(kind, shard.name)] = shard.moment(self.weights.optimizer, kind).cpu()
            for profile, averages in self.ema.averages.items():
                tensors[tensor_key(f"ema.{profile}", shard.name)] = averages[index].cpu()
        for frozen in self.weights.frozen:
            if frozen.stop > frozen.start:
                ranges[frozen.name] = (frozen.start, frozen.stop)
                tensors[tensor_key("weight", frozen.name)] = frozen.master
        return tensors, ranges

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        shards: list[Shard | FrozenShard] = [*self.weights.trained, *self.weights.frozen]
        return {shard.name: (shard.shape, isinstance(shard, Shard)) for shard in shards}

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of the model: under ZeRO-3 a rank's own tensors are empty."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.module.named_parameters()}


def check_same_profiles(reader: CheckpointReader, profiles: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint lacks an EMA profile of the stage."""
    missing = [name for name in profiles if name not in reader.manifest.ema]
    if missing:
        raise CheckpointError(
            f"{reader.folder} has no EMA profile {', '.join(missing)} (it has {', '.join(reader.manifest.ema)}); "
            "a profile cannot be added in the middle of a stage"
        )


@contextmanager
def all_or_none(place: Path) -> Iterator[None]:
    """Work on the disk: if it fails on one rank, all raise. Collective at its end.

    Raises:
        CheckpointError: the disk is full, read-only, or gone.
    """
    error: CheckpointError | None = None
    try:
        yield
    except (OSError, SafetensorError) as found:
        error = CheckpointError(f"a checkpoint cannot be written to {place}: {found}; what was saved before is still there")
    raise_together(error)


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """The element-wise sum of a few tensors of one shape."""
    return torch.stack([tensor.to(torch.float64) for tensor in tensors]).sum(0)


def _statistics(terms: LossTerms, names: Sequence[str]) -> Tensor:
    """Loss sums and counts, over all times and per quarter of the time axis: [modalities, 1 + QUARTILES, 2]."""
    rows = []
    for name in names:
        pairs = torch.stack([terms.sample_sums[name], terms.sample_counts[name]], dim=-1).to(torch.float64)
        quarter = (terms.times[name] * QUARTILES).long().clamp(0, QUARTILES - 1)
        per_quarter = pairs.new_zeros(QUARTILES, 2).index_add_(0, quarter, pairs)
        rows.append(torch.cat([pairs.sum(0, keepdim=True), per_quarter]))
    return torch.stack(rows)


def _bounds(terms: LossTerms, names: Sequence[str]) -> Tensor:
    """Sum and count of every loss's likelihood bound, zeros where it has none: [modalities, 2]."""
    nothing = torch.zeros((), dtype=torch.float64, device=terms.total.device)
    pairs = [terms.exact.get(name, (nothing, nothing)) for name in names]
    return torch.stack([torch.stack([value.to(torch.float64) for value in pair]) for pair in pairs])


def _means(statistics: Tensor, names: Sequence[str]) -> dict[str, list[float]]:
    means = statistics[..., 0] / statistics[..., 1]
    return {name: means[index].tolist() for index, name in enumerate(names)}
