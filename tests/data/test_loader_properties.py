"""For any numbers of shards, samples, lanes, ranks, workers and resume points: nothing lost, nothing repeated, same order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.config.schema import CaptionField, Data, Model
from megadiff.data.reading.loader import Loader
from megadiff.data.shards.shard import Manifest, write_manifest, write_shard
from tests.data.small import TOKENIZER, tiny

pytestmark = pytest.mark.thorough

MODEL = Model.model_validate(
    {
        "modalities": {"text": tiny()[1].modalities["text"].model_dump()},
        "width": 16,
        "heads": 1,
        "head_dim": 16,
        "joint_depth": 1,
    }
)
BUCKETS = st.sampled_from([None, "8x8", "4x16"])


def write(folder: Path, sizes: list[int], buckets: list[str | None]) -> str:
    entries = []
    for shard, (size, bucket) in enumerate(zip(sizes, buckets, strict=True)):
        samples = {f"{shard}-{n}": {"txt": f"shard {shard} sample {n}".encode()} for n in range(size)}
        entries.append(write_shard(str(folder), f"{shard:03d}.tar", samples, bucket))
    return write_manifest(str(folder), Manifest(tuple(entries)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[str | None], int, int, int]:
    """Sizes and buckets of shards, lanes, samples per lane and step, block_shards."""
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    sizes = draw(st.lists(st.one_of(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=12))
    bucketed = draw(st.booleans())
    buckets = [draw(BUCKETS.filter(bool)) if bucketed else None for _ in sizes]
    for bucket in set(buckets):  # each list needs a sample per lane
        own = [i for i, b in enumerate(buckets) if b == bucket]
        sizes[own[0]] += max(0, lanes - sum(sizes[i] for i in own))
    return sizes, buckets, lanes, draw(st.integers(1, 3)), draw(st.integers(1, 5))


@settings(max_examples=25)
@given(cases(), st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 1, 2]), st.integers(0, 2**40), st.data())
def test_nothing_is_lost_or_repeated_in_any_layout(
    case: tuple[list[int], list[str | None], int, int, int], ranks: int, workers: int, start: int, draw: st.DataObject
) -> None:
    sizes, buckets, lanes, per_lane, block_shards = case
    ranks = min(ranks, lanes)
    folder = Path(tempfile.mkdtemp())
    try:
        address = write(folder, sizes, buckets)
        field = CaptionField(member="txt", tokenizer=str(TOKENIZER))
        data = Data(train=address, fields={"text": field}, lanes=lanes, block_shards=block_shards, workers=0)
        samples = lanes * per_lane

        def loaders(ranks: int, workers: int, data_step: int) -> list[Loader]:
            changed = data.model_copy(update={"workers": workers})
            settings = {"seed": 3, "global_samples": samples, "micro_batch": per_lane, "data_ranks": ranks}
            return [Loader(changed, MODEL, data_rank=rank, data_step=data_step, **settings) for rank in range(ranks)]

        def take(opened: list[Loader]) -> list[tuple[str, int, str]]:
            batches = [batch for loader in opened for batch in loader.take()]
            rows = [(b.ids[i], int(b.keys[i]), str(b.states["text"][i].tolist())) for b in batches for i in range(len(b.ids))]
            assert [slot for b in batches for slot in b.slots.tolist()] == list(range(samples))
            return rows

        steps = max(1, 2 * sum(sizes) // samples)
        (single,) = loaders(1, 0, start)
        reference = [take([single]) for _ in range(steps)]
        single.close()
        resume = draw.draw(st.integers(0, steps - 1), label="resume at")
        others = loaders(ranks, workers, start + resume)
        assert [take(others) for _ in range(steps - resume)] == reference[resume:]
        for loader in others:
            loader.close()
        _check_epochs(sizes, buckets, lanes, per_lane, data, samples)
    finally:
        shutil.rmtree(folder)


def _check_epochs(sizes: list[int], buckets: list[str | None], lanes: int, per_lane: int, data: Data, samples: int) -> None:
    """From the start, every list's samples come once before any comes again, but for those that its lanes leave over."""
    loader = Loader(data, MODEL, seed=3, global_samples=samples, micro_batch=samples)
    seen: dict[str | None, list[str]] = {}
    for _ in range(2 * sum(sizes) // samples):
        names = loader.take()[0].ids
        found = {buckets[int(name[:3])] for name in names}
        assert len(found) == 1
        seen.setdefault(found.pop(), []).extend(names)
    loader.close()
    for bucket, names in seen.items():
        own = sum(size for size, b in zip(sizes, buckets, strict=True) if b == bucket)
        steps = own // lanes // per_lane  # whole steps within the first epoch
        first = names[: steps * samples]
        assert len(set(first)) == len(first)
