"""The loader: the same global batches whatever the ranks, the workers and the interruptions; bad samples and bad shards."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import Cache, Model
from megadiff.data.errors import DataError
from megadiff.data.reading import loader as loader_module
from megadiff.data.reading.loader import FEWEST_READ, HeldOut, Loader, LoaderStats, check_unreadable, read_held_out
from megadiff.data.reading.mixture import Mixture
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import Members, read_manifest
from megadiff.types import Batch
from tests.data.small import TRAIN, data_of, sample, tiny, write_source
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.thorough

WORKER = ROOT / "tests" / "data" / "loader_worker.py"
GLOBAL = 16


@pytest.fixture
def opened() -> Iterator[Any]:
    """Makes loaders and closes them."""
    loaders: list[Loader] = []

    def open_loader(data: Any = None, model: Model | None = None, **changes: Any) -> Loader:
        made = {"seed": 5, "global_samples": GLOBAL, "micro_batch": 4, **changes}
        loaders.append(Loader(data or tiny()[0], model or tiny()[1], **made))
        return loaders[-1]

    yield open_loader
    for loader in loaders:
        loader.close()


def joined(parts: list[list[Batch]]) -> dict[str, Any]:
    """One global batch from the micro-batches of its ranks, as plain values."""
    batches = [batch for part in parts for batch in part]
    states = {name: torch.cat([batch.states[name] for batch in batches]) for name in batches[0].states}
    return {
        "states": {name: state.tolist() for name, state in states.items()},
        "keys": torch.cat([batch.keys for batch in batches]).tolist(),
        "slots": torch.cat([batch.slots for batch in batches]).tolist(),
        "weight": torch.cat([batch.weight for batch in batches]).tolist(),
        "ids": [name for batch in batches for name in batch.ids],
        "step": {batch.data_step for batch in batches},
    }


def global_batches(opened: Any, steps: int, ranks: int = 1, **changes: Any) -> list[dict[str, Any]]:
    loaders = [opened(data_rank=rank, data_ranks=ranks, **changes) for rank in range(ranks)]
    return [joined([loader.take() for loader in loaders]) for _ in range(steps)]


# ------------------------------------------------------------------------------------------------- what a batch holds


def test_micro_batches_cover_the_slots_of_a_global_batch_in_order(opened: Any) -> None:
    batches = opened().take()
    assert [len(batch.ids) for batch in batches] == [4] * 4
    assert torch.cat([batch.slots for batch in batches]).tolist() == list(range(GLOBAL))
    for batch in batches:
        assert batch.states["image"].shape == (4, 3, 32, 32)
        assert batch.states["image"].dtype == batch.weight.dtype == torch.float32
        assert batch.states["text"].shape == (4, 16)
        assert batch.states["text"].dtype == batch.keys.dtype == batch.slots.dtype == torch.int64
        assert (batch.weight == 1).all()
        assert (batch.data_step, batch.global_samples) == (0, GLOBAL)


def test_a_batch_holds_the_samples_that_the_order_names(opened: Any) -> None:
    manifest = read_manifest(str(TRAIN))
    data = tiny()[0]
    order = Mixture({"train": manifest}, data.lanes, data.block_shards, seed=5)
    batch = joined([opened(data_step=40).take()])
    shards = [manifest.shards[shard].name for shard in order.step(40, range(GLOBAL), GLOBAL).shard]
    assert [name.split("/")[0] for name in batch["ids"]] == shards


def test_picture_and_caption_of_a_sample_stay_together(tmp_path: Path, opened: Any) -> None:
    loader = opened(data_of(write_source(tmp_path, [20, 20]), lanes=4))
    codec = loader._codecs.codecs["text"]
    for batch in loader.take():
        numbers = (batch.states["image"][:, 0, 0, 0].add(1).mul(127.5)).round().int().tolist()
        assert [int(codec.decode(text).split()[1]) for text in batch.states["text"]] == numbers
        assert [int(name.split("/")[1]) for name in batch.ids] == numbers


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_are_the_same_for_any_ranks_and_workers(opened: Any, ranks: int, workers: int) -> None:
    reference = global_batches(opened, 3, data=tiny()[0].model_copy(update={"workers": 0}))
    data = tiny()[0].model_copy(update={"workers": workers})
    assert global_batches(opened, 3, ranks, data=data) == reference


def test_the_micro_batch_does_not_change_the_global_batch(opened: Any) -> None:
    assert global_batches(opened, 2, micro_batch=2) == global_batches(opened, 2, micro_batch=16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_resumes_goes_on_as_if_never_stopped(opened: Any, workers: int) -> None:
    data = tiny()[0].model_copy(update={"workers": workers})
    whole = global_batches(opened, 6, data=data)
    first = opened(data)
    for _ in range(3):
        first.take()
    state = json.loads(json.dumps(first.state()))
    later = [opened(data, data_rank=rank, data_ranks=2) for rank in range(2)]
    for loader in later:
        loader.take()
        loader.load_state(state)
    assert [joined([loader.take() for loader in later]) for _ in range(3)] == whole[3:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skip_forgets_what_was_read_ahead(opened: Any, workers: int) -> None:
    data = tiny()[0].model_copy(update={"workers": workers})
    loader = opened(data)
    loader.take()
    loader.skip_to(10**9)
    assert loader.state() == {"data_step": 10**9}
    assert joined([loader.take()]) == joined([opened(data, data_step=10**9).take()])


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_named_before_and_after_they_are_taken(opened: Any, workers: int) -> None:
    loader = opened(tiny()[0].model_copy(update={"workers": workers}))
    told = [loader.names(data_step) for data_step in range(3)]
    assert told == [[name for batch in loader.take() for name in batch.ids] for _ in range(3)]
    assert told == [loader.names(data_step) for data_step in range(3)]


def test_samples_of_a_shard_that_is_gone_are_named_by_their_number(tmp_path: Path, opened: Any) -> None:
    loader = opened(data_of(write_source(tmp_path, [8, 8]), lanes=1, workers=0))
    (tmp_path / "000.tar").unlink()
    names = [f"000.tar/sample number {number}" for number in range(8)] + [f"001.tar/{number:05d}" for number in range(8, 16)]
    assert sorted(loader.names(0)) == sorted(names)


def test_keys_differ_between_samples_visits_and_seeds(tmp_path: Path, opened: Any) -> None:
    data = data_of(write_source(tmp_path, [8]), lanes=8)
    loader, other = opened(data, global_samples=8), opened(data, global_samples=8, seed=6)
    visits = [joined([loader.take()]) for _ in range(4)]
    assert {tuple(sorted(visit["ids"])) for visit in visits} == {tuple(sorted(visits[0]["ids"]))}
    keys = [key for visit in visits for key in visit["keys"]] + joined([other.take()])["keys"]
    assert len(set(keys)) == len(keys)


def test_another_caption_may_be_drawn_at_the_next_visit(tmp_path: Path, opened: Any) -> None:
    loader = opened(data_of(write_source(tmp_path, [8]), lanes=8), global_samples=8)
    codec = loader._codecs.codecs["text"]
    drawn: dict[str, set[str]] = {}
    for _ in range(12):
        for batch in loader.take():
            for name, text in zip(batch.ids, batch.states["text"], strict=True):
                drawn.setdefault(name, set()).add(codec.decode(text))
    # The chance that a sample shows less than two of its three captions in 12 visits is 3 ** -11.
    assert all(len(captions) > 1 for captions in drawn.values())


@pytest.mark.distributed
def test_real_ranks_read_the_same_global_batches_whatever_their_number_also_after_a_resume() -> None:
    request = {"seed": 11, "global_samples": GLOBAL, "micro_batch": 2, "workers": 2}

    def batches_of(world: int, steps: int, state: Any = None) -> tuple[list[dict[str, list[Any]]], Any]:
        reports = run_ranks(WORKER, world, {**request, "steps": steps, "state": state})
        assert [report["rank"] for report in reports] == list(range(world))
        assert len({json.dumps(report["state"]) for report in reports}) == 1
        names = ("ids", "slots", "keys", "states")
        steps_read = [
            {name: [item for report in reports for item in report["steps"][step][name]] for name in names}
            for step in range(steps)
        ]
        return steps_read, reports[0]["state"]

    whole, _ = batches_of(1, 6)
    assert [batch["slots"] for batch in whole] == [list(range(GLOBAL))] * 6
    on_two, state = batches_of(2, 3)
    on_four, _ = batches_of(4, 3, state)
    assert on_two + on_four == whole


# ------------------------------------------------------------------------------------------- samples that are damaged


BAD: dict[int, Members] = {
    1: {**sample(1), "png": sample(1)["png"][:45]},
    5: {"png": sample(5)["png"]},
    9: {**sample(9), "json": b"{}"},
    12: {**sample(12), "json": b'{"captions": ["\\ud800"]}'},
}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_keeps_its_slot_with_weight_zero_and_is_named_and_counted(
    tmp_path: Path, opened: Any, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    good = data_of(write_source(tmp_path / "good", [16]), lanes=8, workers=workers)
    bad = data_of(write_source(tmp_path / "bad", [16], BAD), lanes=8, workers=workers)
    loader = opened(bad)
    with caplog.at_level(logging.WARNING):
        found = joined([loader.take()])
    expected = joined([opened(good).take()])
    for slot, name in enumerate(expected["ids"]):
        is_bad = int(name.split("/")[1]) in BAD
        assert found["weight"][slot] == (0 if is_bad else 1)
        for modality in ("text", "image"):
            same = found["states"][modality][slot] == expected["states"][modality][slot]
            assert same is not is_bad
    assert (found["ids"], found["keys"], found["slots"]) == (expected["ids"], expected["keys"], expected["slots"])
    for number in BAD:
        assert f"sample 000.tar/{number:05d} is skipped" in caplog.text
    assert caplog.text.count("is skipped") == len(BAD)
    assert loader.stats() == LoaderStats(read=16, unreadable=4)


def test_counts_do_not_run_ahead_of_what_was_taken(tmp_path: Path, opened: Any) -> None:
    loader = opened(data_of(write_source(tmp_path, [16], BAD), lanes=8, workers=2))
    assert loader.stats() == LoaderStats(0, 0)
    loader.take()
    assert loader.stats() == LoaderStats(16, 4)
    loader.take()
    assert loader.stats() == LoaderStats(32, 8)


def test_the_log_names_a_few_unreadable_samples_and_says_that_it_stops(
    tmp_path: Path, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {number: {"png": b""} for number in range(64)}
    loader = opened(data_of(write_source(tmp_path, [64], bad), workers=0), global_samples=64)
    with caplog.at_level(logging.WARNING):
        loader.take()
    assert caplog.text.count("is skipped") == 20
    assert caplog.text.count("further unreadable samples are counted, not named") == 1
    assert loader.stats() == LoaderStats(64, 64)


@pytest.mark.parametrize(
    ("read", "unreadable", "share", "stops"),
    [
        (FEWEST_READ - 1, FEWEST_READ - 1, 0.01, False),
        (FEWEST_READ, 2, 0.01, False),
        (FEWEST_READ, 3, 0.01, True),
        (10**6, 10**4, 0.01, False),
        (10**6, 10**4 + 1, 0.01, True),
        (FEWEST_READ, 1, 0.0, True),
        (FEWEST_READ, 0, 0.0, False),
        (FEWEST_READ, FEWEST_READ, 1.0, False),
    ],
)
def test_a_run_stops_when_more_than_the_share_cannot_be_read(read: int, unreadable: int, share: float, stops: bool) -> None:
    if not stops:
        check_unreadable(read, unreadable, share)
        return
    with pytest.raises(DataError, match=rf"^{unreadable} of {read} samples could not be read.*\({share:g}\)"):
        check_unreadable(read, unreadable, share)


# --------------------------------------------------------------------------------------------- shards that are damaged


def mistake(opened: Any, data: Any) -> str:
    """The one sentence that a loader gives within an epoch."""
    loader = opened(data)
    with pytest.raises(DataError) as caught:
        [loader.take() for _ in range(4)]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar_is_one_sentence_that_names_the_shard(tmp_path: Path, opened: Any, workers: int) -> None:
    address = write_source(tmp_path, [16, 16])
    path = tmp_path / "001.tar"
    path.write_bytes(path.read_bytes()[:-3000])
    assert "001.tar has" in mistake(opened, data_of(address, workers=workers))


def test_a_tar_damaged_at_its_full_size_is_one_sentence_that_names_the_shard(tmp_path: Path, opened: Any) -> None:
    address = write_source(tmp_path, [16, 16])
    path = tmp_path / "001.tar"
    content = bytearray(path.read_bytes())
    content[:512] = b"x" * 512
    path.write_bytes(content)
    assert "001.tar is damaged" in mistake(opened, data_of(address))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_one_sentence_that_names_it(tmp_path: Path, opened: Any, workers: int) -> None:
    address = write_source(tmp_path, [16, 16])
    (tmp_path / "000.tar").unlink()
    assert "000.tar cannot be read (No such file or directory)" in mistake(opened, data_of(address, workers=workers))


def test_a_wrong_number_of_samples_is_one_sentence_with_both_numbers(tmp_path: Path, opened: Any) -> None:
    address = write_source(tmp_path, [16, 16])
    tree = json.loads(Path(address).read_text())
    tree["shards"][1]["samples"] = 17
    Path(address).write_text(json.dumps(tree))
    assert "001.tar holds 16 samples, and the manifest says 17" in mistake(opened, data_of(address))


def test_a_rank_that_does_not_read_counts_the_steps_and_opens_no_shard(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ShardReader, "shard", read)
    idle = opened(reads=False)
    assert [idle.take(), idle.take()] == [[], []]
    assert (idle.data_step, idle.stats()) == (2, LoaderStats(0, 0))


def test_samples_of_several_sources_say_which_they_are_of(tmp_path: Path, opened: Any) -> None:
    train = {name: write_source(tmp_path / name, [40, 40]) for name in ("web", "books")}
    loader = opened(data_of("").model_copy(update={"train": train}), mixture={"web": 3, "books": 1})
    batches = [batch for _ in range(4) for batch in loader.take()]
    assert loader.sources == ("web", "books")
    assert [name.split("/")[0] for batch in batches for name in batch.ids] == [s for batch in batches for s in batch.sources]
    assert sum(batch.sources.count("web") for batch in batches) == 48
    alone = opened()
    assert (alone.sources, alone.take()[0].sources) == ((), ())


def test_the_fingerprint_is_that_of_the_manifests(tmp_path: Path, opened: Any) -> None:
    sources = [data_of(write_source(tmp_path / name, [4, samples])) for name, samples in (("a", 4), ("b", 4), ("c", 5))]
    prints = [opened(source).fingerprint() for source in (*sources, sources[0])]
    assert prints[0] == prints[3] != prints[2]


def test_a_micro_batch_that_does_not_divide_a_ranks_share_is_refused_with_the_numbers(opened: Any) -> None:
    with pytest.raises(ConfigError, match=r"global_samples \(16\) must be .* micro_batch \(3\) x data ranks \(2\) = 6"):
        opened(micro_batch=3, data_ranks=2)


def test_ranks_that_do_not_divide_the_lanes_are_refused(opened: Any) -> None:
    with pytest.raises(UserError, match=r"data\.lanes \(8\) .* ranks \(3\)"):
        opened(data_ranks=3)


# ------------------------------------------------------------------------------------------------ shards that are open


@pytest.mark.parametrize("ranks", [1, 4])
def test_an_epoch_reads_each_shard_about_as_often_as_lanes_pass_it(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Each lane of a rank has a block of shards open; with too few places every sample would open a shard anew."""
    read: list[str] = []
    original = loader_module.ShardReader._read  # type: ignore[attr-defined]
    monkeypatch.setattr(
        loader_module.ShardReader,  # type: ignore[attr-defined]
        "_read",
        lambda self, index: read.append(str(index)) or original(self, index),  # type: ignore[attr-defined]
    )
    # 32 lanes of 12 samples in blocks of 4 shards: about 160 shards are open at once on one rank.
    data = data_of(write_source(tmp_path, [3] * 128), lanes=32, block_shards=4, workers=0)
    loaders = [opened(data, global_samples=32, data_rank=rank, data_ranks=ranks) for rank in range(ranks)]
    for _ in range(12):
        for loader in loaders:
            loader.take()
    # A lane of 4 shards' worth begins and ends amid a shard: at most 5 for each of 32 lanes.
    assert len(read) <= 32 * 5


def test_a_cache_smaller_than_what_is_open_still_gives_the_right_samples(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = write_source(tmp_path / "far", [4] * 8)
    expected = joined([opened(data_of(address, workers=0)).take()])
    small = Cache(folder=str(tmp_path / "cache"), max_bytes=2 * read_manifest(address).shards[0].bytes)
    # Local shards are read in place; here the folder plays a bucket.
    monkeypatch.setattr("megadiff.storage.addresses.is_local", lambda address: str(tmp_path / "far") not in address)
    content = {f"{tmp_path}/far/{path.name}": path.read_bytes() for path in (tmp_path / "far").iterdir()}

    def chunks(address: str, *_: Any) -> Iterator[tuple[int, memoryview]]:
        yield len(content[address]), memoryview(content[address])

    monkeypatch.setattr("megadiff.storage.store._chunks", chunks)
    monkeypatch.setattr("megadiff.storage.addresses.parent", lambda address: address.rpartition("/")[0])
    found = joined([opened(data_of(address, cache=small, workers=0)).take()])
    assert found == expected


# ------------------------------------------------------------------------------------------------------------- held out


def held_out(address: str, count: int, **changes: Any) -> HeldOut:
    return read_held_out(address, *tiny(), count, **changes)


def test_held_out_samples_are_the_same_every_time_and_differ_with_the_seed(tmp_path: Path) -> None:
    address = write_source(tmp_path, [10, 10])
    first, again, other = held_out(address, 6), held_out(address, 6), held_out(address, 6, seed=1)
    assert first.ids == again.ids != other.ids
    assert (first.states["image"] == again.states["image"]).all()
    assert first.states["image"].shape == (6, 3, 32, 32)
    assert held_out(address, 20).ids[:6] == first.ids


def test_held_out_samples_are_all_when_there_are_fewer_and_leave_out_the_unreadable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = write_source(tmp_path, [16], BAD)
    with caplog.at_level(logging.WARNING):
        found = held_out(address, 100)
    assert sorted(map(int, found.ids)) == sorted(set(range(16)) - set(BAD))
    assert len(found.states["text"]) == 12
    assert "sample 000.tar/00005 is skipped" in caplog.text


def test_a_held_out_source_without_any_readable_sample_is_named(tmp_path: Path) -> None:
    address = write_source(tmp_path, [2], {0: {"png": b""}, 1: {"png": b""}})
    with pytest.raises(DataError, match=r"manifest\.json holds no sample that can be read"):
        held_out(address, 4)


def test_held_out_samples_of_a_large_source_come_from_few_shards(tmp_path: Path) -> None:
    data = data_of(write_source(tmp_path, [10] * 40))
    shards = {name.partition("/")[0] for name in _held_out_names(data, 60)}
    assert len(shards) == 60
    opened = {int(name) // 10 for name in shards}
    assert len(opened) <= 16


def _held_out_names(data: Any, count: int) -> list[str]:
    return read_held_out(str(data.train), data, tiny()[1], count).ids
