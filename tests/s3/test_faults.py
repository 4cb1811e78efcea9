"""A whole epoch from a real S3 server, through all that goes wrong between it and us: every sample once, in the same order.

What cannot be mended stops the run with one sentence that names the object.
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadiff.config.errors import UserError
from megadiff.config.schema import Data, Model
from megadiff.data.errors import DataError
from megadiff.data.reading.loader import Loader, check_unreadable
from megadiff.data.shards.shard import Manifest, Members, ShardEntry, read_manifest, write_manifest, write_shard
from megadiff.storage import addresses, clients, store
from megadiff.types import Batch
from tests.data.small import data_of, sample, tiny, write_source
from tests.s3.faults import FaultProxy, Plan
from tests.s3.server import Ceph

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

SHARDS, SHARD_SAMPLES, GLOBAL = 25, 400, 200
SAMPLES = SHARDS * SHARD_SAMPLES
STEPS = SAMPLES // GLOBAL
SHARD_BYTES = 2 * 10**6
"""Roughly; more than one piece of the body, so that a reading can break between two."""

MODEL = Model.model_validate(
    {
        "modalities": {
            "image": {
                "space": {"kind": "grid", "channels": 1, "height": 1, "width": 2, "patch": 1},
                "process": {"kind": "gaussian", "schedule": "rectified_flow", "target": "velocity"},
                "tower_depth": 1,
            }
        },
        "width": 8,
        "heads": 1,
        "head_dim": 8,
        "joint_depth": 1,
    }
)


def settings(address: str, **changes: Any) -> Data:
    """Four lanes, which need few shards at a time: most of the epoch's are still to come when something happens."""
    field = {"kind": "latents", "member": "n.npy", "scale": 1.0}
    return Data.model_validate({"train": address, "fields": {"image": field}, "lanes": 4, "block_shards": 1, **changes})


def members(number: int) -> Members:
    """A sample that says its number as an array, and some kilobytes beside it that differ from sample to sample."""
    array = io.BytesIO()
    np.save(array, np.array([[[number, -number]]], dtype=np.float32))
    return {"n.npy": array.getvalue(), "bin": hashlib.shake_128(str(number).encode()).digest(3000)}


def name_of(shard: int) -> str:
    return f"{shard:03d}.tar"


def write_numbered(folder: str, shards: int = SHARDS, size: int = SHARD_SAMPLES) -> str:
    """Shards of numbered samples and their manifest, whose address is returned."""
    entries = []
    for shard in range(shards):
        numbers = range(shard * size, (shard + 1) * size)
        entries.append(write_shard(folder, name_of(shard), {f"{number:06d}": members(number) for number in numbers}))
    return write_manifest(folder, Manifest(tuple(entries)))


@dataclass(frozen=True)
class Source:
    """The same shards on this machine and on the server, and the order of their samples in the first epoch."""

    local: str
    distant: str
    order: list[str]

    @property
    def last_needed(self) -> tuple[int, str]:
        """The shard that is needed first at the latest, after the step with the returned number."""
        first: dict[str, int] = {}
        for place, name in enumerate(self.order):
            first.setdefault(name.partition("/")[0], place)
        latest = max(first, key=lambda name: first[name])
        return first[latest] // GLOBAL, latest


@pytest.fixture(scope="session")
def source(ceph: Ceph, new_bucket: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Source:
    local = str(tmp_path_factory.mktemp("source"))
    manifest, distant = write_numbered(local), new_bucket()
    with pytest.MonkeyPatch.context() as patched:
        ceph.use(patched)
        clients.bucket_client.cache_clear()
        for path in Path(local).iterdir():
            store.write_bytes(addresses.join(distant, path.name), path.read_bytes())
        clients.bucket_client.cache_clear()
    order = read(settings(manifest))
    assert sorted(order) == [f"{name_of(number // SHARD_SAMPLES)}/{number:06d}" for number in range(SAMPLES)]
    return Source(manifest, f"{distant}/manifest.json", order)


@pytest.fixture(params=["in memory", "cached"])
def changes(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a loader that holds shards in memory, and of one with a cache too small for all of them."""
    if request.param == "in memory":
        return {}
    return {"cache": {"folder": str(tmp_path / "cache"), "max_bytes": 16 * SHARD_BYTES}}


def read(data: Data, acts: Mapping[int, Callable[[], Any]] | None = None, *, ranks: int = 1) -> list[str]:
    """The names of an epoch's samples in order. `acts` are done before the steps (of the first rank) with their numbers.

    Checks on the way that each sample has its weight and says the number that its name says.
    """

    def steps_of(rank: int) -> list[list[Batch]]:
        options = {"global_samples": GLOBAL, "micro_batch": GLOBAL // 4, "data_rank": rank, "data_ranks": ranks}
        with closing(Loader(data, MODEL, seed=3, **options)) as loader:
            steps = []
            for step in range(STEPS):
                if rank == 0:
                    (acts or {}).get(step, lambda: None)()
                steps.append(loader.take())
            assert loader.state() == {"data_step": STEPS}
            return steps

    with ThreadPoolExecutor(ranks) as pool:
        parts = list(pool.map(steps_of, range(ranks)))
    return [name for step in range(STEPS) for part in parts for batch in part[step] for name in names_in(batch)]


def names_in(batch: Batch) -> tuple[str, ...]:
    numbers = [int(name.rpartition("/")[2]) for name in batch.ids]
    assert (batch.weight == 1).all()
    assert batch.states["image"].flatten(1).tolist() == [[number, -number] for number in numbers]
    return batch.ids


@pytest.fixture
def proxy(s3: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What the test reads through; it does nothing until it is given a plan."""
    with FaultProxy(s3.url) as proxy:
        s3.use(monkeypatch, proxy.url)
        yield proxy
        clients.bucket_client.cache_clear()


# ------------------------------------------------------------------------------------------------- what must be mended


def test_an_epoch_without_faults_is_the_same_as_from_files(s3: Ceph, source: Source, changes: dict[str, Any]) -> None:
    assert read(settings(source.distant, **changes)) == source.order


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_busy_server_is_asked_again(
    proxy: FaultProxy, s3: Ceph, client: Any, bucket: str, source: Source, changes: dict[str, Any], ranks: int
) -> None:
    """It serves one request at a time, and for a second none but that of somebody who does not take the body."""
    name = bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="large", Body=bytes(48 * 2**20))
    body = client.get_object(Bucket=name, Key="large")["Body"]
    s3.busy(1)
    release = threading.Timer(1.0, body.close)
    release.start()
    try:
        assert read(settings(source.distant, **changes), ranks=ranks) == source.order
    finally:
        release.join()
        s3.busy(0)
    assert proxy.statuses[503] >= 4


def test_replies_of_503_cost_no_sample(proxy: FaultProxy, source: Source, changes: dict[str, Any]) -> None:
    proxy.plan = Plan(seed=1, busy=0.4)
    assert read(settings(source.distant, **changes)) == source.order
    assert proxy.done["busy"] >= 8


@pytest.mark.parametrize("seed", [1, 2])
def test_bodies_cut_at_random_places_cost_no_sample(
    proxy: FaultProxy, source: Source, changes: dict[str, Any], seed: int
) -> None:
    proxy.plan = Plan(seed, truncated=0.25, reset=0.25)
    assert read(settings(source.distant, **changes)) == source.order
    assert proxy.done["truncated"] >= 4
    assert proxy.done["reset"] >= 4


def test_bodies_that_stand_still_for_seconds_are_waited_for(proxy: FaultProxy, source: Source, changes: dict[str, Any]) -> None:
    proxy.plan = Plan(stalls=2, stall_s=5.0)
    assert read(settings(source.distant, **changes)) == source.order
    assert proxy.done["stalled"] == 2


def test_all_faults_at_once_cost_no_sample(proxy: FaultProxy, source: Source, changes: dict[str, Any]) -> None:
    proxy.plan = Plan(seed=4, busy=0.2, truncated=0.15, reset=0.15, stalls=1, stall_s=1.0)
    assert read(settings(source.distant, **changes), ranks=2) == source.order
    assert all(proxy.done[fault] for fault in ("busy", "truncated", "reset", "stalled"))


def test_connections_refused_for_a_while_cost_no_sample(proxy: FaultProxy, source: Source, changes: dict[str, Any]) -> None:
    with Away(proxy.refuse, proxy.admit) as away:
        assert read(settings(source.distant, **changes), {10: away.begin}) == source.order
        assert away.is_back


def test_a_server_killed_and_started_again_within_an_epoch_costs_no_sample(
    s3: Ceph, source: Source, changes: dict[str, Any]
) -> None:
    with Away(s3.kill, s3.restart) as away:
        assert read(settings(source.distant, **changes), {10: away.begin}) == source.order
        assert away.is_back


class Away:
    """Something that goes away for some seconds from `begin` on; it is back, or never was away, after the context."""

    SECONDS = 2.5

    def __init__(self, go: Callable[[], None], come_back: Callable[[], None]) -> None:
        self._go = go
        self._back = threading.Timer(self.SECONDS, come_back)

    def __enter__(self) -> Away:
        return self

    def begin(self) -> None:
        self._go()
        self._back.start()

    @property
    def is_back(self) -> bool:
        return self._back.ident is not None and not self._back.is_alive()

    def __exit__(self, *_: object) -> None:
        if self._back.ident is not None:
            self._back.join()


# ----------------------------------------------------------------------------------------- what must stop with a sentence


@pytest.mark.parametrize("size", ["same size", "other size"])
def test_a_shard_that_is_replaced_during_a_run_stops_it_and_is_named(
    bucket: str, source: Source, changes: dict[str, Any], size: str
) -> None:
    step, name = source.last_needed
    assert step > 20
    address = copy_of(source, bucket)
    others = {
        f"{number:06d}": members(number + (size == "same size")) for number in range(SHARD_SAMPLES - (size != "same size"))
    }
    taken, error = read_until_error(settings(address, **changes), {5: lambda: write_shard(bucket, name, others)})
    assert name_in(error) == f"{bucket}/{name}"
    assert taken == source.order[: len(taken)]
    assert len(taken) > 5 * GLOBAL


def test_a_shard_that_is_missing_stops_the_run_and_is_named(bucket: str, source: Source, changes: dict[str, Any]) -> None:
    step, name = source.last_needed
    address = copy_of(source, bucket, without=name)
    taken, error = read_until_error(settings(address, **changes))
    assert name_in(error) == f"{bucket}/{name}"
    assert "does not exist" in str(error)
    assert taken == source.order[: len(taken)]
    assert len(taken) <= step * GLOBAL


DAMAGES = {"name": 3, "size": 134, "checksum": 150, "kind": 156, "magic": 257}
"""Places within a header of 512 bytes."""


@pytest.mark.parametrize("member", ["first", "middle"])
@pytest.mark.parametrize("place", DAMAGES)
def test_a_damaged_tar_header_stops_the_run_and_the_shard_is_named(
    bucket: str, tmp_path: Path, changes: dict[str, Any], place: str, member: str
) -> None:
    write_numbered(bucket, shards=4, size=50)
    entries = list(read_manifest(bucket).shards)
    whole = store.read_bytes(addresses.join(bucket, entries[2].name))
    header = 0 if member == "first" else whole.index(b"000125.n.npy")
    at = header + DAMAGES[place]
    damaged = whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :]
    store.write_bytes(addresses.join(bucket, entries[2].name), damaged)
    entries[2] = replace(entries[2], sha256=hashlib.sha256(damaged).hexdigest())
    data = settings(write_manifest(bucket, Manifest(tuple(entries))), **changes)
    _, error = read_until_error(data)
    assert isinstance(error, DataError)
    assert name_in(error) == f"{bucket}/{name_of(2)}"


def test_a_tar_without_its_end_stops_the_run_and_the_shard_is_named(bucket: str, changes: dict[str, Any]) -> None:
    write_numbered(bucket, shards=1, size=GLOBAL)
    whole = store.read_bytes(addresses.join(bucket, name_of(0)))
    for end in (len(whole) // 2, whole.rindex(b".n.npy") + 600):
        cut = whole[:end]
        store.write_bytes(addresses.join(bucket, name_of(0)), cut)
        entry = ShardEntry(name_of(0), GLOBAL, len(cut), hashlib.sha256(cut).hexdigest())
        data = settings(write_manifest(bucket, Manifest((entry,))), **changes)
        _, error = read_until_error(data)
        assert isinstance(error, DataError)
        assert name_in(error) == f"{bucket}/{name_of(0)}"


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_one_sentence_without_them(
    s3: Ceph, source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    right, wrong = s3.variables[variable], "WRONGwrong0123456789"
    monkeypatch.setenv(variable, wrong)
    clients.bucket_client.cache_clear()
    began = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        Loader(settings(source.distant), MODEL, seed=3, global_samples=GLOBAL, micro_batch=GLOBAL)
    assert time.monotonic() - began < 2  # it is not tried again
    assert name_in(caught.value) == source.distant
    assert "credentials" in str(caught.value)
    for secret in (right, wrong, s3.variables["AWS_SECRET_ACCESS_KEY"], "Signature"):
        assert secret not in str(caught.value)
    assert s3.variables["AWS_SECRET_ACCESS_KEY"] not in caplog.text
    assert variable != "AWS_SECRET_ACCESS_KEY" or wrong not in caplog.text


def test_a_bucket_that_does_not_exist_is_one_sentence(s3: Ceph) -> None:
    address = "s3://no-such-bucket/source/manifest.json"
    with pytest.raises(UserError, match="does not exist") as caught:
        Loader(settings(address), MODEL, seed=3, global_samples=GLOBAL, micro_batch=GLOBAL)
    assert name_in(caught.value) == address
    began = time.monotonic()
    with pytest.raises(UserError, match="there is no bucket s3://no-such-bucket"):
        store.list_names("s3://no-such-bucket/source")
    assert time.monotonic() - began < 2  # it is not tried again


def copy_of(source: Source, bucket: str, without: str | None = None) -> str:
    """A copy of the shards in a bucket of the test's own; returns the manifest's address."""
    for path in Path(source.local).parent.iterdir():
        if path.name != without:
            store.write_bytes(addresses.join(bucket, path.name), path.read_bytes())
    return f"{bucket}/manifest.json"


def read_until_error(data: Data, acts: Mapping[int, Callable[[], Any]] | None = None) -> tuple[list[str], UserError]:
    """The names of the samples that came before the run stopped, and what it said."""
    taken: list[str] = []
    with closing(Loader(data, MODEL, seed=3, global_samples=GLOBAL, micro_batch=GLOBAL)) as loader:
        for step in range(STEPS):
            (acts or {}).get(step, lambda: None)()
            try:
                batches = loader.take()
            except UserError as error:
                return taken, error
            taken += [name for batch in batches for name in names_in(batch)]
    pytest.fail("nothing was found wrong")


def name_in(error: UserError) -> str:
    """The address in a message of one sentence."""
    said = str(error)
    assert "\n" not in said
    assert len(said) < 400
    return next(word for word in said.split() if word.startswith("s3://")).rstrip(".,;:")


# ------------------------------------------------------------------------------------------------------ unreadable samples


@pytest.mark.parametrize(("damaged", "stops"), [(2, False), (3, True)])
def test_damaged_pictures_keep_their_slots_with_weight_zero_and_stop_the_run_when_they_are_too_many(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: int, stops: bool
) -> None:
    bad = {number * 77: {**sample(number * 77), "png": sample(0)["png"][:50]} for number in range(damaged)}
    good_data = data_of(write_source(tmp_path, [56, 56, 56, 56]), max_unreadable_share=0.01)
    bad_data = data_of(write_source(bucket, [56, 56, 56, 56], bad), max_unreadable_share=0.01)
    found: list[dict[str, tuple[float, Any, Any]]] = []
    for data in (good_data, bad_data):
        with closing(Loader(data, tiny()[1], seed=3, global_samples=56, micro_batch=28)) as loader:
            batches = [batch for _ in range(4) for batch in loader.take()]
            stats = loader.stats()
        slots = [(batch.weight, batch.states["image"], batch.states["text"]) for batch in batches]
        names = [name for batch in batches for name in batch.ids]
        rows = [(w.item(), i.tolist(), t.tolist()) for slot in slots for w, i, t in zip(*slot, strict=True)]
        found.append(dict(zip(names, rows, strict=True)))
    good, with_bad = found
    assert list(good) == list(with_bad)
    assert len(good) == 224
    lost = {name for name, row in with_bad.items() if row[0] == 0}
    assert lost == {f"{number // 56:03d}.tar/{number:05d}" for number in bad}
    assert all(good[name] == row for name, row in with_bad.items() if name not in lost)
    assert all(f"sample {name} is skipped" in caplog.text for name in lost)
    assert (stats.read, stats.unreadable) == (224, damaged)
    if stops:
        with pytest.raises(DataError, match=f"{damaged} of 224 samples could not be read"):
            check_unreadable(stats.read, stats.unreadable, bad_data.max_unreadable_share)
    else:
        check_unreadable(stats.read, stats.unreadable, bad_data.max_unreadable_share)
