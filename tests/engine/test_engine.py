"""What every engine has in common, in one process over a backend without DeepSpeed."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megadiff.config.layout import Layout
from megadiff.config.run_folder import CheckpointsFolder, RunFolder
from megadiff.config.schema import Batching, Checkpointing, ConstantEma, Initialise, Optimizer, Stage
from megadiff.engine.api import Outcome, PreparedBatch, Score
from megadiff.engine.engine import RAW, Engine
from megadiff.engine.pieces import FrozenPiece, Piece, Pieces
from megadiff.engine.saving import Saver
from megadiff.models.idle import Idle
from megadiff.types import Batch, Denoiser, LossTerms
from megadiff.weights import checkpoint, universal
from megadiff.weights.boxes import whole
from megadiff.weights.checkpoint import CheckpointError, CheckpointReader, FileEntry
from megadiff.weights.fence import Fence
from megadiff.weights.remote import RemoteCheckpoints
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
    return Engine(FakeBackend(), STAGE, Idle(frozenset(), {}), ())


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


class Held:
    """`write_rank_file`, which waits until it may."""

    def __init__(self) -> None:
        self.write, self.may = checkpoint.write_rank_file, Event()

    def __call__(self, *of: Any) -> FileEntry:
        assert self.may.wait(60)
        return self.write(*of)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held()
    monkeypatch.setattr(checkpoint, "write_rank_file", held)
    yield held
    held.may.set()


def test_a_checkpoint_is_of_its_moment_although_steps_go_on_while_it_is_written(tmp_path: Path, held: Held) -> None:
    one, folder = engine(), CheckpointsFolder(tmp_path)
    with closing(one.saver(folder)) as saver:
        one.step(batches(), Sums())
        moment = {"weight": one.pieces.trained[0].master.clone()}
        moment |= {f"ema.{name}": averages[0].clone() for name, averages in one.ema.averages.items()}
        saver.begin(one.counters(), "config")
        one.step(batches(), Sums())
        assert not torch.equal(one.pieces.trained[0].master, moment["weight"])
        assert saver.publish_if_written() is None
        assert folder.newest() is None
        held.may.set()
        published = saver.publish()
    assert published is not None
    assert (published.folder, published.step) == (folder.newest(), 1)
    assert 0 < published.stalled_s < published.took_s
    reader = CheckpointReader(published.folder)
    assert reader.damaged(reader.manifest.files) == []
    assert reader.manifest.progress["optimizer_step"] == 1
    for kind, values in moment.items():
        assert torch.equal(reader.read_whole(kind, "embed"), values), kind


def test_checkpoints_are_published_at_the_first_look_after_they_are_written_out_of_the_same_memory(tmp_path: Path) -> None:
    one, folder = engine(), CheckpointsFolder(tmp_path)
    addresses = []
    with closing(one.saver(folder)) as saver:
        for step in (1, 2):
            one.step(batches(), Sums())
            saver.begin(one.counters(), "config")
            addresses.append({key: tensor.data_ptr() for key, tensor in saver._host.items()})
            while (published := saver.publish_if_written()) is None:
                time.sleep(0.001)
            assert published.folder == folder.step(step) == folder.newest()
        assert saver.publish() is None
    assert addresses[0] == addresses[1]
    masters = {piece.master.data_ptr() for piece in one.pieces.trained}
    assert not masters & set(addresses[0].values())


def test_without_a_copy_no_host_memory_is_taken(tmp_path: Path) -> None:
    one = engine()
    one.stage = STAGE.model_copy(update={"checkpoint": Checkpointing(asynchronous=False)})
    with closing(one.saver(CheckpointsFolder(tmp_path))) as saver:
        saver.begin(one.counters(), "config")
        assert saver.publish() is not None
        assert saver._host == {}


def test_a_newer_start_takes_the_fence_while_a_checkpoint_is_written(tmp_path: Path, held: Held) -> None:
    run, folder, one = RunFolder(tmp_path), CheckpointsFolder(tmp_path / "checkpoints"), engine()
    with closing(one.saver(folder, Fence.take(run))) as saver:
        saver.begin(one.counters(), "config")
        Fence.take(run)
        held.may.set()
        with pytest.raises(CheckpointError, match="belongs to a newer start of this run"):
            saver.publish()
    assert list(folder.root.iterdir()) == []


def copying(tmp_path: Path, told: list[tuple[int, str]]) -> tuple[Engine, Saver]:
    """A stage that keeps one checkpoint here and two copies."""
    one = engine()
    rule = Checkpointing(keep=1, remote=str(tmp_path / "there"), remote_keep=2)
    one.stage = STAGE.model_copy(update={"checkpoint": rule})
    return one, one.saver(CheckpointsFolder(tmp_path / "here"), copy_failed=lambda *of: told.append(of))


def test_each_published_checkpoint_is_copied_before_the_next_one_retires_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may, copy = Event(), RemoteCheckpoints.copy

    def held(*of: Any) -> None:
        assert may.wait(60)
        copy(*of)

    monkeypatch.setattr(RemoteCheckpoints, "copy", held)
    one, saver = copying(tmp_path, told := [])
    with closing(saver):
        for step in (1, 2, 3):
            one.step(batches(), Sums())
            saver.begin(one.counters(), "config")
            if step == 2:
                time.sleep(0.2)
                assert saver.publish_if_written() is None, "the first one is still copied"
                may.set()
            saver.publish()
        there = RemoteCheckpoints(str(tmp_path / "there"), "only")
    assert list(there.published()) == [2, 3]
    assert list(CheckpointsFolder(tmp_path / "here").published()) == [3]
    assert told == []


def test_a_copy_that_fails_is_told_of_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("no folder")
    one, saver = copying(tmp_path, told := [])
    with closing(saver):
        for _ in range(2):
            one.step(batches(), Sums())
            saver.begin(one.counters(), "config")
            assert saver.publish() is not None
    assert [step for step, _ in told] == [1, 2]
    assert "there" in told[0][1]


def test_going_back_holds_for_the_copies_too(tmp_path: Path) -> None:
    one, saver = copying(tmp_path, [])
    with closing(saver):
        for _ in range(2):
            one.step(batches(), Sums())
            saver.begin(one.counters(), "config")
            saver.publish()
        saver.go_back(CheckpointsFolder(tmp_path / "here").step(1))
    there = RemoteCheckpoints(str(tmp_path / "there"), "only")
    assert list(there.published()) == [1, 2]
    assert there.newest_first() == [there.step(1)]


def test_a_thread_that_cannot_write_fails_the_publication_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> FileEntry:
        raise OSError(errno.ENOSPC, "No space left on device")

    one, folder = engine(), CheckpointsFolder(tmp_path)
    before = one.save(folder, {}, "config")
    monkeypatch.setattr(checkpoint, "write_rank_file", full)
    one.step(batches(), Sums())
    with closing(one.saver(folder)) as saver:
        saver.begin(one.counters(), "config")
        with pytest.raises(CheckpointError, match="No space left on device; what was saved before is still there"):
            saver.publish()
        assert saver.publish() is None
    assert folder.newest() == before
    assert folder.partials() == []


def test_what_is_trained_cannot_change_within_a_stage(tmp_path: Path) -> None:
    saved = engine().save(CheckpointsFolder(tmp_path), {}, "config")
    other = engine()
    still = Piece("still", (1,), whole((1,)), torch.zeros(1), 0, owned=True)
    other.pieces.frozen, other.pieces.trained = [], [*other.pieces.trained, still]
    with pytest.raises(CheckpointError, match="still and 0 more were trained there and are not now, or the other way round"):
        other.load(saved)
