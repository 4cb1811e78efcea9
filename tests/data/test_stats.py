"""The numbers of a data set, against data whose numbers are known; and which shards and samples are looked at."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megadiff.data.codecs.captions import load_tokenizer
from megadiff.data.errors import DataError, SampleError
from megadiff.data.inspection.show import choose_shards, draw_samples, load_picture, picture_member, picture_size
from megadiff.data.inspection.stats import Stats, aspect_ratios, measure, spread
from megadiff.data.shards import reader as reader_module
from megadiff.data.shards.shard import Manifest, Members, ShardEntry, read_manifest, write_manifest
from tests.data.small import TOKENIZER, TRAIN, sample, write_source


def picture(width: int, height: int, format: str = "PNG", orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, format, **({} if orientation is None else {"exif": exif}))
    return buffer.getvalue()


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def captioned(*captions: str) -> Members:
    return {"json": json.dumps({"captions": captions}).encode()}


def measured(folder: Path, members: list[Members], **options: Any) -> Stats:
    """The numbers of samples, two a shard."""
    sizes = [2] * (len(members) // 2) + [1] * (len(members) % 2)
    return measure(write_source(folder, sizes, dict(enumerate(members))), **options)


# ----------------------------------------------------------------------------------------------------------------- numbers


def test_samples_shards_and_bytes_are_those_of_the_whole_data_set(tmp_path: Path) -> None:
    found = measure(write_source(tmp_path, [3, 1, 5]), samples=1)
    assert (found.samples, found.shards) == (9, 3)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert found.read_shards == 1
    assert found.seen.samples in (1, 3, 5)


def test_resolutions_are_counted_as_a_viewer_shows_them(tmp_path: Path) -> None:
    members = [{"jpg": picture(40, 30, "JPEG")}, {"jpg": picture(40, 30, "JPEG", 6)}, {"png": picture(40, 30)}]
    found = measured(tmp_path, members)
    assert found.seen.resolutions == {(30, 40): 2, (40, 30): 1}
    assert aspect_ratios(found.seen.resolutions) == {1.33: 2, 0.75: 1}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_a_size_from_the_header_is_that_of_the_upright_picture(format: str, orientation: int | None) -> None:
    expected = (40, 30) if orientation in (6, 8) else (30, 40)
    assert picture_size(picture(40, 30, format, orientation)) == expected


def test_a_header_is_enough_for_a_size() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(buffer, "PNG")
    cut = buffer.getvalue()[:1000]
    assert picture_size(cut) == (200, 300)
    with pytest.raises(SampleError, match="no readable picture"):
        load_picture(cut)


def test_the_plain_ending_of_a_picture_goes_before_a_longer_one() -> None:
    assert picture_member({"seg.jpg": b"", "webp": b"", "json": b""}) == "webp"
    assert picture_member({"seg.jpg": b"", "npy": b""}) == "seg.jpg"
    assert picture_member({"json": b"", "latents.npy": b""}) is None


def test_captions_are_counted_by_sample_and_by_length(tmp_path: Path) -> None:
    found = measured(tmp_path, [captioned("a cat", "two  dogs run"), captioned("ü"), {"txt": b"a cat\n"}])
    assert found.seen.captions == {2: 1, 1: 2}
    assert found.seen.characters == {5: 1, 13: 1, 1: 1, 6: 1}
    assert found.seen.words == {2: 2, 3: 1, 1: 1}
    assert found.seen.tokens == {}


def test_a_row_of_a_table_has_no_captions_and_its_text_counts_instead(tmp_path: Path) -> None:
    row = json.dumps({"size": 3}).encode()
    found = measured(tmp_path, [{"json": row}, {"json": row, "txt": b"one"}])
    assert found.seen.captions == {0: 1, 1: 1}
    assert found.seen.unreadable == {}


def test_tokens_are_counted_with_the_tokenizer_as_training_cleans_captions(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(TOKENIZER))
    captions = ["smiling  cat &amp; dog", "red heart"]
    found = measured(tmp_path, [captioned(*captions)], tokenizer=tokenizer)
    cleaned = ["smiling cat & dog", "red heart"]
    assert found.seen.tokens == Counter(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in cleaned)


def test_stored_tokens_are_counted_up_to_their_padding(tmp_path: Path) -> None:
    tokens = npy(np.array([[5, 6, 7], [8, -1, -1], [-1, -1, -1]], dtype=np.int32))
    found = measured(tmp_path, [{"tokens.npy": tokens}])
    with_one = measured(tmp_path / "told", [{"tokens.npy": tokens}], tokenizer=load_tokenizer(str(TOKENIZER)))
    assert found.seen.tokens == with_one.seen.tokens == {3: 1, 1: 1, 0: 1}
    assert found.seen.captions == {3: 1}
    assert found.seen.arrays == {}


def test_texts_beside_stored_tokens_count_once(tmp_path: Path) -> None:
    both = captioned("a b") | {"tokens.npy": npy(np.array([[1, 2, 3]], dtype=np.int32))}
    assert measured(tmp_path / "plain", [both]).seen.tokens == {3: 1}
    found = measured(tmp_path / "told", [both], tokenizer=load_tokenizer(str(TOKENIZER)))
    assert sum(found.seen.tokens.values()) == 1
    assert found.seen.captions == {1: 1}


def test_shapes_of_arrays_are_counted_by_member(tmp_path: Path) -> None:
    latents = [npy(np.zeros(shape, np.float16)) for shape in ((2, 4, 8, 8), (2, 4, 8, 8), (4, 6, 10))]
    found = measured(tmp_path, [{"latents.npy": array, "features.npy": npy(np.zeros(3))} for array in latents])
    assert found.seen.arrays == {
        ("latents.npy", "float16 [2, 4, 8, 8]"): 2,
        ("latents.npy", "float16 [4, 6, 10]"): 1,
        ("features.npy", "float64 [3]"): 3,
    }


def test_what_cannot_be_read_is_counted_and_the_rest_as_well(tmp_path: Path) -> None:
    bad: Members = {"png": b"no picture", "json": b"{", "latents.npy": b"", "tokens.npy": npy(np.zeros(3))}
    found = measured(tmp_path, [bad, sample(1)])
    assert found.seen.unreadable == {"png": 1, "captions": 1, "latents.npy": 1, "tokens.npy": 1}
    assert found.seen.members == {"png": 2, "json": 2, "latents.npy": 1, "tokens.npy": 1}
    assert found.seen.resolutions == {(32, 32): 1}


def test_samples_of_a_bucket_are_those_of_all_shards(tmp_path: Path) -> None:
    address = write_source(tmp_path, [3, 1, 5, 2])
    entries = read_manifest(address).shards
    buckets = ("64x32", "32x64", "64x32", None)
    write_manifest(str(tmp_path), Manifest(tuple(replace(e, bucket=b) for e, b in zip(entries, buckets, strict=True))))
    assert measure(address, samples=1).buckets == {"64x32": 8, "no bucket": 2, "32x64": 1}


def test_data_without_buckets_has_none(tmp_path: Path) -> None:
    assert measure(write_source(tmp_path, [3])).buckets == {}


@pytest.mark.parametrize(("lanes", "left"), [(None, None), (4, 1), (3, 0), (10, 9)])
def test_an_epoch_leaves_over_what_lanes_do_not_divide(tmp_path: Path, lanes: int | None, left: int | None) -> None:
    assert measure(write_source(tmp_path, [3, 6]), samples=1, lanes=lanes).left_over == left


def test_the_tree_is_json_and_says_what_was_counted(tmp_path: Path) -> None:
    found = measure(str(TRAIN), lanes=64)
    tree = json.loads(json.dumps(found.as_tree()))
    assert tree["samples"] == tree["read"]["samples"] == 1418
    assert tree["resolutions"] == {"32x32": 1418}
    assert tree["left_over"] == 10
    words = tree["caption_lengths"]["words"]
    assert sum(words["counts"].values()) == sum(int(many) * times for many, times in tree["captions_per_sample"].items())
    assert words["least"] <= words["median"] <= words["most"]


def test_the_tree_keeps_arrays_apart(tmp_path: Path) -> None:
    found = measured(tmp_path, [{"a.npy": npy(np.zeros(2)), "b.npy": npy(np.zeros(3, np.int32))}])
    assert found.as_tree()["arrays"] == {"a.npy": {"float64 [2]": 1}, "b.npy": {"int32 [3]": 1}}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_a_spread_is_that_of_the_listed_values(values: list[int]) -> None:
    found = spread(Counter(values))
    assert found["least"] == min(values)
    assert found["most"] == max(values)
    assert found["median"] == np.quantile(values, 0.5, method="inverted_cdf")
    assert found["95 %"] == np.quantile(values, 0.95, method="inverted_cdf")
    assert found["mean"] == pytest.approx(np.mean(values), abs=0.0051)


def test_a_spread_of_nothing_is_empty() -> None:
    assert spread({}) == {}


def test_a_damaged_shard_stops_the_count_with_its_name(tmp_path: Path) -> None:
    address = write_source(tmp_path, [2, 2])
    (tmp_path / "001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"001\.tar"):
        measure(address)


# ------------------------------------------------------------------------------------------------------------------ choice


def manifest_of(*sizes: int) -> Manifest:
    return Manifest(tuple(ShardEntry(f"{number}.tar", size, 1, "") for number, size in enumerate(sizes)))


def test_the_chosen_shards_hold_enough_and_not_one_too_many() -> None:
    manifest = manifest_of(*range(5, 45))
    for samples in (1, 50, 300, 10**6):
        chosen = choose_shards(manifest, samples)
        held = [manifest.shards[index].samples for index in chosen]
        assert chosen == sorted(set(chosen))
        assert chosen == choose_shards(manifest, samples)
        assert sum(held) >= min(samples, manifest.samples)
        assert len(chosen) == 40 or any(sum(held) - size < samples for size in held)


def test_the_chosen_shards_are_spread_over_the_data_set() -> None:
    chosen = choose_shards(manifest_of(*[10] * 1000), 1000)
    assert len(chosen) == 100
    assert 400 < np.mean(chosen) < 600


def test_no_number_chooses_all_but_empty_shards() -> None:
    assert choose_shards(manifest_of(2, 0, 3), 0) == [0, 2]
    assert choose_shards(manifest_of(2, 0, 3), 100) == [0, 2]


def test_drawn_samples_are_the_same_for_a_seed_and_each_comes_once(tmp_path: Path) -> None:
    address = write_source(tmp_path, [4, 5, 6])
    manifest = read_manifest(address)
    drawn = draw_samples(address, manifest, 8, seed=1)
    assert [found.key for found in draw_samples(address, manifest, 8, seed=1)] == [found.key for found in drawn]
    assert [found.key for found in draw_samples(address, manifest, 8, seed=2)] != [found.key for found in drawn]
    assert len({found.key for found in drawn}) == 8
    for found in drawn:
        assert found.members == sample(int(found.key))
        assert found.shard == f"00{0 if int(found.key) < 4 else 1 if int(found.key) < 9 else 2}.tar"


def test_fewer_samples_than_asked_for_are_all_drawn(tmp_path: Path) -> None:
    address = write_source(tmp_path, [1] * 12)
    assert len({found.key for found in draw_samples(address, read_manifest(address), 99, seed=0)}) == 12
    assert len(draw_samples(address, read_manifest(address), 11, seed=0)) == 11


def test_few_shards_are_opened_for_a_draw_and_large_ones_more_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = write_source(tmp_path, [1] * 40 + [60])
    manifest = read_manifest(address)
    opened: list[str] = []
    original = reader_module.Shard  # type: ignore[attr-defined]
    monkeypatch.setattr(
        reader_module, "Shard", lambda address, source: opened.append(Path(address).name) or original(address, source)
    )
    large = 0
    for seed in range(20):
        opened.clear()
        draw_samples(address, manifest, 4, seed)
        assert len(set(opened)) == len(opened) <= 4
        large += "040.tar" in opened
    assert large >= 16
