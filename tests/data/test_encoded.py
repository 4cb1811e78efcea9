"""What the paper's scripts have encoded, as shards that training reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from megadiff.cli import main as cli
from megadiff.config.errors import UserError
from megadiff.config.schema import CaptionField, GridSpace, LatentField, TokenSpace
from megadiff.data.buckets import Bucket, Buckets
from megadiff.data.codecs.captions import CaptionCodec
from megadiff.data.codecs.clip import VOCABULARY
from megadiff.data.codecs.latents import LatentCodec
from megadiff.data.packing.build import kind_of
from megadiff.data.packing.pack import Packing
from megadiff.data.shards.shard import Members, read_manifest
from tests.data.test_pack import packed, samples_in

START, END, LENGTH = 49406, 49407, 10
NUMBERS = (3, 12, 10_007, 223_750)
"""In the folders 0000, 0000, 0001 and 0022."""


def place(root: Path, number: int) -> Path:
    """As the scripts name them: a folder after the first four of eight digits."""
    path = root / f"{number:08d}"[:4] / f"sa_{number}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def moments(number: int) -> np.ndarray:
    return np.random.default_rng(number).random((8, 4, 6), dtype=np.float32)


def caption(number: int) -> np.ndarray:
    """A few ids between the marks, filled up with the second."""
    ids = [number % 1000 + place for place in range(1 + number % 5)]
    return np.array([START, *ids, *[END] * (LENGTH - 1 - len(ids))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "datasets"
    for number in NUMBERS:
        np.save(place(root / "images", number), moments(number))
        np.save(place(root / "tokens", number), caption(number))
    np.save(root / "all_indexes.npy", np.array(NUMBERS))
    return root


def by_number(folder: Path) -> dict[int, Members]:
    return {int(key.split("-")[0].removeprefix("sa_")): members for key, members in samples_in(folder).items()}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> CaptionCodec:
    """With a tokenizer of as many ids as CLIP's."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")).save(str(path))
    space = TokenSpace(vocabulary=VOCABULARY, length=LENGTH, start_id=START, end_id=END, pad_id=END)
    return CaptionCodec(CaptionField(tokenizer=str(path), member="tokens.npy"), space)


def loaded(members: Members, captions: CaptionCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample's moments and ids as training reads them."""
    latents = LatentCodec(LatentField(), GridSpace(channels=4, height=4, width=6))
    return torch.from_numpy(latents.load(members, 0).copy()), torch.from_numpy(captions.load(members, 0))


def test_training_reads_the_numbers_that_the_scripts_have_written(folder: Path, tmp_path: Path, captions: CaptionCodec) -> None:
    manifest = packed(folder, tmp_path / "out", packing=Packing(shard_samples=3))
    assert [entry.samples for entry in manifest.shards] == [3, 1]
    assert manifest.facts == {"source_kind": "paper", "counts": {"written": 4}}
    found = by_number(tmp_path / "out")
    assert set(found) == set(NUMBERS)
    for number, members in found.items():
        latents, ids = loaded(members, captions)
        assert np.array_equal(latents[0], moments(number)[:4])  # the mean
        assert np.array_equal(latents[1], moments(number)[4:])  # the deviation
        assert np.array_equal(ids, caption(number))


def test_the_index_chooses_and_without_it_or_with_an_empty_one_every_picture_is_taken(folder: Path, tmp_path: Path) -> None:
    np.save(folder / "all_indexes.npy", np.array([12, 3]))
    packed(folder, tmp_path / "chosen")
    assert set(by_number(tmp_path / "chosen")) == {3, 12}
    np.save(folder / "all_indexes.npy", np.array([]))
    packed(folder, tmp_path / "empty")
    (folder / "all_indexes.npy").unlink()
    packed(folder, tmp_path / "none")
    assert set(by_number(tmp_path / "empty")) == set(by_number(tmp_path / "none")) == set(NUMBERS)


def test_pictures_a_folder_deeper_are_found(folder: Path, tmp_path: Path) -> None:
    (folder / "images").rename(folder / "inner")
    (folder / "images").mkdir()
    (folder / "inner").rename(folder / "images/images")
    (folder / "all_indexes.npy").unlink()
    assert packed(folder, tmp_path / "out").samples == 4


def test_several_captions_and_cut_ones_are_read(folder: Path, tmp_path: Path, captions: CaptionCodec) -> None:
    long = np.array([START, *range(100, 108), END])
    np.save(place(folder / "tokens", 3), np.stack([long, caption(12), np.array([START, *[END] * 9])]))
    packed(folder, tmp_path / "out")
    members = by_number(tmp_path / "out")[3]
    stored = np.load(io.BytesIO(members["tokens.npy"]))
    assert stored.dtype == np.int32
    assert stored.tolist() == [list(range(100, 108)), [12, 13, 14, *[-1] * 5]]
    assert np.array_equal(loaded(members, captions)[1], long)


def test_what_cannot_be_used_is_counted_and_named(folder: Path, tmp_path: Path) -> None:
    numbers = [*NUMBERS, *range(500, 509)]
    for number in numbers[4:]:
        np.save(place(folder / "images", number), moments(number))
        np.save(place(folder / "tokens", number), caption(number))
    place(folder / "images", 500).unlink()
    place(folder / "tokens", 501).unlink()
    np.save(place(folder / "images", 502), np.full((8, 4, 6), np.nan, dtype=np.float32))
    np.save(place(folder / "images", 503), moments(503)[:7])
    place(folder / "images", 504).write_bytes(b"")
    place(folder / "tokens", 505).write_bytes(place(folder / "tokens", 505).read_bytes()[:-3])
    np.save(place(folder / "tokens", 506), np.array([START, *[END] * 9]))
    np.save(place(folder / "tokens", 507), np.array([101, 5, 102]))
    np.save(place(folder / "tokens", 508), np.array([START, VOCABULARY, END]))
    np.save(folder / "all_indexes.npy", np.array(numbers))
    manifest = packed(folder, tmp_path / "out")
    counts = {"no picture": 1, "no caption": 5, "unreadable picture": 3}
    assert manifest.facts["counts"] == {"written": 4, **{f"left out: {reason}": count for reason, count in counts.items()}}
    lines = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    told = {line["source"]: line.get("detail", "") for line in lines}
    assert told["0000/sa_500.npy"] == "images/0000/sa_500.npy does not exist"
    assert told["0000/sa_503.npy"] == "float32 [7, 4, 6] is no mean and deviation of latents [2 C, H, W]"
    assert told["0000/sa_507.npy"] == "its ids [101, 5, 102]... are not CLIP's, which begin with 49406"


def test_the_command_line_packs_it_and_makes_held_out_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["data", "pack", str(folder), str(out), "--held-out-share", "0.5"]) == 0
    assert sum(read_manifest(str(out / side)).samples for side in ("train", "held_out")) == 4
    assert "(4 samples in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"size_px": 256},
        {"min_size_px": 64},
        {"buckets": Buckets([Bucket(8, 8)])},
    ],
)
def test_what_is_of_pictures_is_refused(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is encoded already; leave out"):
        packed(folder, tmp_path / "out", packing=Packing(**options))
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_folder_or_an_index_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    assert kind_of(str(folder)) == "paper"
    with pytest.raises(UserError, match="is no local folder with images/ and tokens/ in it"):
        packed(tmp_path, tmp_path / "out", kind="paper")
    (folder / "all_indexes.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="is no NumPy array of whole numbers"):
        packed(folder, tmp_path / "out")
    np.save(folder / "all_indexes.npy", np.array([0.5]))
    with pytest.raises(UserError, match="holds float64"):
        packed(folder, tmp_path / "out")
    with pytest.raises(UserError, match="takes one source, and 2 are given"):
        packed([str(folder), str(folder)], tmp_path / "out")


def test_clips_ids_are_as_many_as_its_vocabulary_has() -> None:
    assert (VOCABULARY, END) == (49408, VOCABULARY - 1)
