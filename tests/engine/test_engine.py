"""What every engine has in common, in one process over a backend without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.config.run_folder import CheckpointsFolder, RunFolder
from megadiff.config.schema import Batching, ConstantEma, Initialise, Optimizer, Stage
from megadiff.engine.api import Outcome, PreparedBatch, Score
from megadiff.engine.engine import RAW, Engine
from megadiff.engine.pieces import FrozenPiece, Piece, Pieces
from megadiff.models.idle import Idle
from megadiff.types import Batch, Denoiser, LossTerms
from megadiff.weights import checkpoint, universal
from megadiff.weights.boxes import whole
from megadiff.weights.checkpoint import CheckpointError, CheckpointReader
from megadiff.weights.fence import Fence
from tests.diffusion.small import batch_of, part_of

STAGE = Stage(
    name="only",
    steps=10,
    modalities={"grid": {"loss_weight": 2.0}, "tokens": {}},
    batch=Batching(global_samples=4, micro_batch=2),
    optimizer=Optimizer(learning_rate=0.1, warmup_steps=0),
    ema={"main": ConstantEma(decay=0.5, warmup=False), "slow": ConstantEma(decay=0.9, warmup=False)},
)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.still = nn.Parameter(torch.tensor([5.0]), requires_grad=False)

    def forward(self, noised: Any, readout: Any) -> dict[str, Tensor]:
        return {"grid": self.embed[0] * noised, "tokens": self.embed[1] * noised}


class FakeBackend:
    """SGD on one process; `applied` says what becomes of a step."""

    def __init__(self) -> None:
        self.layout, self.device, self.accumulation = Layout(), torch.device("cpu"), 2
        self.module, self.applied = Network(), True
        self.optimizer = torch.optim.SGD([self.module.embed], lr=0.0)
        self.rates: list[float] = []
        flat, still = self.module.embed, self.module.still
        self.pieces = Pieces(
            self.optimizer,
            [Piece("embed", (2,), whole((2,)), flat, 0, owned=True)],
            [FrozenPiece("still", (1,), still.view(-1), whole((1,)), whole((1,)), still.detach().clone())],
            {"embed": (2,), "still": (1,)},
            lambda: None,
        )

    def run(self, prepared: Sequence[PreparedBatch], score: Score, learning_rate: float) -> Outcome:
        self.rates.append(learning_rate)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        terms = [score(self.module(one.noised, one.readout), one) for one in prepared]
        (sum(term.total for term in terms) / self.accumulation).backward()
        if self.applied:
            self.optimizer.step()
        return Outcome(terms, 0.25, self.applied)

    @contextmanager
    def denoiser(self) -> Iterator[Denoiser]:
        with torch.no_grad():
            yield self.module


class Sums:
    """The prediction itself is the loss; of the tokens of the first micro-batch nothing is scored."""

    losses = ("grid", "tokens")

    def prepare(self, batch: Batch) -> Any:
        first = int(batch.slots[0]) == 0
        counts = {"grid": torch.tensor(2.0), "tokens": torch.tensor(0.0 if first else 2.0)}
        noised = batch.weight * (1.0 if first else 3.0)
        return type("PreparedBatch", (), {"noised": noised, "readout": {}, "counts": counts, "first": first})

    def score(self, prediction: Any, prepared: Any, normaliser: Any) -> LossTerms:
        scored = {"grid": 1.0, "tokens": 0.0 if prepared.first else 1.0}
        sums = {name: prediction[name] * scored[name] for name in self.losses}
        counts = {name: torch.full((2,), scored[name]) for name in self.losses}
        weights = {"grid": 2.0, "tokens": 1.0}
        total = sum((weights[name] * normaliser[name] * sums[name].sum() for name in self.losses), torch.zeros(()))
        times = dict.fromkeys(self.losses, torch.tensor([0.1, 0.9]))
        detached = {name: value.detach() for name, value in sums.items()}
        return LossTerms(total, {}, {}, detached, counts, times)


def engine() -> Engine:
    return Engine(FakeBackend(), STAGE, Idle(frozenset(), {}))


def batches() -> list[Batch]:
    whole = batch_of({"grid": torch.zeros(4, 1), "tokens": torch.zeros(4, 1)})
    return [part_of(whole, torch.arange(start, start + 2)) for start in (0, 2)]


def test_losses_are_means_over_all_that_is_scored_and_the_total_is_their_weighted_sum() -> None:
    result = engine().step(batches(), Sums())
    assert result.losses == {"grid": 2.0, "tokens": 6.0}, "of 1, 1, 3, 3 times 1, and of 3, 3 times 2"
    assert result.total == 2.0 * 2.0 + 6.0
    assert result.quartiles["grid"][0] == result.quartiles["grid"][3] == 2.0
    assert result.quartiles["grid"][1] != result.quartiles["grid"][1], "a quarter without samples has no mean"
    assert (result.samples, result.grad_norm, result.applied, result.learning_rate) == (4, 0.25, True, 0.1)


def test_losses_are_told_apart_by_the_source_of_each_sample() -> None:
    first, second = batches()
    told = [replace(first, sources=("web", "web")), replace(second, sources=("books", "web"))]
    result = engine().step(told, Sums(), ("web", "books", "code"))
    assert result.losses == engine().step(batches(), Sums()).losses
    assert result.by_source["grid"].keys() == {"web", "books", "code"}
    assert result.by_source["grid"]["web"] == pytest.approx((1 + 1 + 3) / 3)
    assert (result.by_source["grid"]["books"], result.by_source["tokens"]["books"]) == (3.0, 6.0)
    assert math.isnan(result.by_source["grid"]["code"]), "a source without samples has no mean"
    assert engine().step(batches(), Sums()).by_source == {}


def test_the_gradient_is_that_of_the_global_mean() -> None:
    one = engine()
    one.step(batches(), Sums())
    before = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(one.pieces.trained[0].master, before - 0.1 * torch.tensor([2 * 2.0, 3.0]))


def test_averages_follow_applied_steps_only() -> None:
    one = engine()
    one.backend.applied = False  # type: ignore[attr-defined]
    assert not one.step(batches(), Sums()).applied
    assert (one.optimizer_step, one.ema.updates) == (1, 0)
    one.backend.applied = True  # type: ignore[attr-defined]
    one.step(batches(), Sums())
    assert (one.optimizer_step, one.ema.updates) == (2, 1)
    torch.testing.assert_close(one.ema.averages["main"][0], torch.tensor([0.8, 1.85]))


def test_a_denoiser_has_the_weights_that_are_asked_for_and_gives_the_trained_ones_back() -> None:
    one = engine()
    one.step(batches(), Sums())
    trained = one.pieces.trained[0].master.clone()
    scales = {}
    for weights in (None, "slow", RAW):
        with one.denoiser(weights) as denoiser:
            scales[weights] = denoiser(torch.ones(1), {})["grid"].item()
    assert scales == pytest.approx({None: 0.8, "slow": 0.96, RAW: 0.6})
    torch.testing.assert_close(one.pieces.trained[0].master, trained)


def test_what_is_saved_goes_on_and_starts_another_stage(tmp_path: Path) -> None:
    one, folder = engine(), CheckpointsFolder(tmp_path)
    one.step(batches(), Sums())
    saved = one.save(folder, {"data_step": 7}, "config")
    assert saved == folder.step(1) == folder.newest()
    other = engine()
    assert other.load(saved)["data_step"] == 7
    assert (other.optimizer_step, other.ema.updates) == (1, 1)
    one.step(batches(), Sums())
    other.step(batches(), Sums())
    for profile in STAGE.ema:
        torch.testing.assert_close(other.ema.averages[profile][0], one.ema.averages[profile][0], rtol=0, atol=0)
    fresh = engine()
    assert fresh.initialise_from(saved, Initialise(weights="ema")) == []
    torch.testing.assert_close(fresh.pieces.trained[0].master, torch.tensor([0.8, 1.85]))
    assert fresh.ema.updates == 0


def test_a_stage_starts_from_the_universal_format_with_plain_weights_but_does_not_go_on_from_it(tmp_path: Path) -> None:
    one, folder = engine(), tmp_path / "universal"
    one.step(batches(), Sums())
    universal.write(CheckpointReader(one.save(CheckpointsFolder(tmp_path), {}, "config")), folder, lambda: None)
    other = engine()
    assert other.initialise_from(folder, Initialise(weights="raw")) == []
    assert torch.equal(other.pieces.trained[0].master, one.pieces.trained[0].master)
    with pytest.raises(CheckpointError, match=r"no averages; write initialise\.weights: raw"):
        other.initialise_from(folder, Initialise(weights="ema"))
    with pytest.raises(CheckpointError, match="has no EMA profile main, slow"):
        other.load(folder)
    file = folder / "zero/embed/fp32.pt"
    content = bytearray(file.read_bytes())
    content[content.index(one.pieces.trained[0].master.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"zero/embed/fp32\.pt is damaged"):
        other.initialise_from(folder, Initialise(weights="raw"))


def test_a_save_that_a_newer_start_overtakes_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder, write = RunFolder(tmp_path), CheckpointsFolder(tmp_path / "checkpoints"), checkpoint.write_rank_file

    def overtaken(*of: Any) -> Any:
        Fence.take(run)
        return write(*of)

    fence = Fence.take(run)
    assert engine().save(folder, {}, "config", fence) == folder.step(0)
    monkeypatch.setattr(checkpoint, "write_rank_file", overtaken)
    later = engine()
    later.optimizer_step = 1
    with pytest.raises(CheckpointError, match="belongs to a newer start of this run"):
        later.save(folder, {}, "config", fence)
    assert sorted(path.name for path in folder.root.iterdir()) == ["latest", "step_00000000"]


def test_what_is_trained_cannot_change_within_a_stage(tmp_path: Path) -> None:
    saved = engine().save(CheckpointsFolder(tmp_path), {}, "config")
    other = engine()
    still = Piece("still", (1,), whole((1,)), torch.zeros(1), 0, owned=True)
    other.pieces.frozen, other.pieces.trained = [], [*other.pieces.trained, still]
    with pytest.raises(CheckpointError, match="still and 0 more were trained there and are not now, or the other way round"):
        other.load(saved)
