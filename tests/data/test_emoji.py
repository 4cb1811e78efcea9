"""The emoji recipe: captions, grouping, hold-out, the same bytes every time, second starts; npm's failures."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from megadiff.config.errors import UserError
from megadiff.data.packing.claims import HELD_OUT, TRAIN
from megadiff.data.recipes import emoji, npm
from megadiff.data.recipes.emoji import END, PAD, Emoji, Picture, captions, is_held_out, make_emoji, render
from megadiff.data.shards.shard import Shard, index_shards, read_manifest
from tests.data.packages import THINGS, write_packages

PICTURES = len(THINGS) + 3 * 3 + 1 + 2
"""Things, three people in three variants each, a heart, and a handshake in two."""
SMALL: dict[str, Any] = {"size": 8, "sets": ("noto",), "shard_samples": 4, "held_out_share": 0.3, "vocabulary": 300}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def made(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of noto; tests only read it."""
    out = tmp_path_factory.mktemp("made") / "emoji"
    make_emoji(str(out), packages=packages, **SMALL)
    return out


def samples_of(folder: Path) -> Iterator[tuple[str, dict[str, Any], np.ndarray[Any, Any]]]:
    """Key, facts and pixels of each sample of a split."""
    for path in sorted(folder.glob("*.tar")):
        shard = Shard(str(path), path)
        for place in range(len(shard)):
            members = shard.members(place)
            assert set(members) == {"png", "json"}
            with Image.open(io.BytesIO(members["png"])) as picture:
                assert picture.mode == "RGB"
                yield shard.key(place), json.loads(members["json"]), np.asarray(picture)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def an_emoji(hexcode: str, label: str = "waving hand", tags: tuple[str, ...] = ()) -> Emoji:
    return Emoji(hexcode, "?", label, tags)


# ------------------------------------------------------------------------------------------------- captions and groups


def test_captions_are_the_name_a_sentence_and_tags_that_the_name_lacks() -> None:
    picture = Picture(an_emoji("1F44B", "waving hand", ("hand", "wave", "hello", "bye", "hi", "goodbye")), "noto", "")
    assert captions(picture, styled=False) == [
        "waving hand",
        "an emoji of waving hand",
        "waving hand, wave, hello",
        "waving hand, bye, hi",
    ]


def test_captions_say_the_style_only_where_there_are_several() -> None:
    picture = Picture(an_emoji("1F44B"), "noto-v1", "")
    assert captions(picture, styled=True) == ["waving hand", "an emoji of waving hand", "waving hand in blob style"]


def test_captions_are_clean_text() -> None:
    assert captions(Picture(an_emoji("2764", "red  heart &amp; love"), "noto", ""), styled=False)[0] == "red heart & love"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F44B", "1F44B-1F3FB"),
        ("1F44B-1F3FB", "1F44B-1F3FF"),
        ("2764", "2764-FE0F"),
        ("1F468", "1F469"),
        ("1F468-1F3FB", "1F9D1"),
        ("1F466", "1F467"),
        ("1F468-200D-1F680", "1F469-1F3FE-200D-1F680"),
        ("1F3C3-200D-2640-FE0F", "1F3C3-200D-2642-FE0F"),
        ("1F3C3", "1F3C3-1F3FD-200D-2642-FE0F"),
        ("1F3C3", "1F3C3-200D-27A1-FE0F"),
        ("1F3C3", "1F3C3-1F3FB-200D-2640-FE0F-200D-27A1-FE0F"),
    ],
)
def test_skin_tones_genders_selectors_and_directions_share_a_base(one: str, other: str) -> None:
    assert an_emoji(one).base == an_emoji(other).base


@pytest.mark.parametrize(
    ("one", "other"), [("1F468", "1F466"), ("1F680", "1F468-200D-1F680"), ("1F34E", "1F34F"), ("27A1", "2B05")]
)
def test_different_things_have_different_bases(one: str, other: str) -> None:
    assert an_emoji(one).base != an_emoji(other).base


def test_a_variant_that_is_spelled_otherwise_has_the_base_of_its_root() -> None:
    assert Emoji("1FAF1-1F3FB-200D-1FAF2-1F3FF", "?", "handshake", (), root="1F91D").base == an_emoji("1F91D").base


def test_variants_that_are_spelled_otherwise_are_read_with_their_root(tmp_path: Path) -> None:
    write_packages(tmp_path)
    found = emoji.read_labels(npm.fetch(*emoji.LABELS, tmp_path))
    assert found["1FAF1-1F3FB-200D-1FAF2-1F3FF"].base == found["1F91D"].base == "1F91D"


def test_the_held_out_share_of_bases_is_about_the_one_asked_for() -> None:
    bases = [f"{number:X}" for number in range(0x1F000, 0x1F000 + 4000)]
    for share in (0.0, 0.1, 0.5, 1.0):
        found = sum(is_held_out(base, share) for base in bases)
        # Four standard deviations of a binomial.
        assert abs(found - share * 4000) <= 4 * (4000 * share * (1 - share)) ** 0.5


def test_a_larger_share_keeps_what_a_smaller_one_holds_out() -> None:
    bases = [f"{number:X}" for number in range(500)]
    assert {b for b in bases if is_held_out(b, 0.1)} < {b for b in bases if is_held_out(b, 0.3)}


# ------------------------------------------------------------------------------------------------- what is written


def test_every_emoji_is_on_one_side_of_the_split_with_all_its_variants(made: Path) -> None:
    split = {name: {facts["base"] for _, facts, _ in samples_of(made / name)} for name in (TRAIN, HELD_OUT)}
    assert split[TRAIN]
    assert split[HELD_OUT]
    assert not split[TRAIN] & split[HELD_OUT]
    assert len(split[TRAIN] | split[HELD_OUT]) == len(THINGS) + 3


def test_every_picture_is_written_once_at_the_size_asked_for(made: Path) -> None:
    keys = []
    for name in (TRAIN, HELD_OUT):
        for key, facts, pixels in samples_of(made / name):
            keys.append(key)
            assert pixels.shape == (8, 8, 3)
            assert facts["set"] == "noto"
            assert facts["captions"][1] == f"an emoji of {facts['captions'][0]}"
    assert len(keys) == len(set(keys)) == PICTURES


def test_without_skin_tones_their_variants_are_left_out(packages: Path, tmp_path: Path) -> None:
    make_emoji(str(tmp_path / "out"), packages=packages, skin_tones=False, **SMALL)
    names = [facts["captions"][0] for split in (TRAIN, HELD_OUT) for _, facts, _ in samples_of(tmp_path / "out" / split)]
    assert len(names) == len(THINGS) + 3 + 2
    assert not any("skin tone" in name for name in names)


def test_manifests_list_the_shards_and_name_split_recipe_and_licences(made: Path) -> None:
    for split in (TRAIN, HELD_OUT):
        manifest = read_manifest(str(made / split))
        assert manifest.shards == index_shards(str(made / split)).shards
        assert all(shard.samples == 4 for shard in manifest.shards[:-1])
        assert manifest.facts["split"] == split
        assert manifest.facts["licences"] == {"noto": "Apache-2.0"}
        assert manifest.facts["size_px"] == 8
    assert "Apache-2.0" in (made / "NOTICE").read_text()


def test_raster_and_vector_sets_go_together(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_emoji(str(out), packages=packages, **{**SMALL, "sets": ("noto", "fluent-emoji-3d")})
    found = {key: facts for split in (TRAIN, HELD_OUT) for key, facts, _ in samples_of(out / split)}
    assert len(found) == 2 * (PICTURES)
    for key, facts in found.items():
        style = {"noto": "noto", "fluent-emoji-3d": "3d"}[facts["set"]]
        assert key.startswith(facts["set"])
        assert facts["captions"][2].endswith(f"in {style} style")
    bases = {split: {facts["base"] for _, facts, _ in samples_of(out / split)} for split in (TRAIN, HELD_OUT)}
    assert not bases[TRAIN] & bases[HELD_OUT]


def test_the_same_arguments_give_the_same_bytes(made: Path, packages: Path, tmp_path: Path) -> None:
    make_emoji(str(tmp_path / "again"), packages=packages, **SMALL)
    assert files_of(tmp_path / "again") == files_of(made)


def test_a_second_start_keeps_finished_shards_and_makes_the_rest(
    made: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    drawn: list[int] = []
    original = emoji.render

    def stops_after_ten(source: str | bytes, size: int) -> bytes:
        drawn.append(size)
        if len(drawn) == 10:
            raise KeyboardInterrupt
        return original(source, size)

    monkeypatch.setattr(emoji, "render", stops_after_ten)
    with pytest.raises(KeyboardInterrupt):
        make_emoji(str(out), packages=packages, **SMALL)
    assert sorted(path.name for path in (out / TRAIN).iterdir()) == ["00000.tar", "00001.tar"]
    make_emoji(str(out), packages=packages, **SMALL)
    assert files_of(out) == files_of(made)
    assert len(drawn) == 10 + PICTURES - 8


def test_a_folder_made_with_other_arguments_is_refused_and_stays(made: Path, packages: Path) -> None:
    before = files_of(made)
    with pytest.raises(UserError, match=r"other settings \(size_px: 8 there, 16 here; vocabulary: 300 there, 400 here\)"):
        make_emoji(str(made), packages=packages, **{**SMALL, "size": 16, "vocabulary": 400})
    assert files_of(made) == before


@pytest.mark.parametrize("content", ["", "{", "7"])
def test_a_damaged_recipe_is_one_sentence_that_names_it(packages: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.json is damaged; delete "):
        make_emoji(str(tmp_path), packages=packages, **SMALL)


def test_a_drawing_that_is_damaged_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packages = write_packages(tmp_path / "packages", {"cat": {"body": "<path d="}})
    with caplog.at_level(logging.WARNING):
        make_emoji(str(tmp_path / "out"), packages=packages, **SMALL)
    assert "noto-1f402 cannot be drawn and is left out" in caplog.text
    counts = [read_manifest(str(tmp_path / "out" / split)).samples for split in (TRAIN, HELD_OUT)]
    assert sum(counts) == PICTURES - 1


# -------------------------------------------------------------------------------------------------------- rendering


def test_a_drawing_is_on_white() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="8" height="16" fill="#f00"/></svg>'
    with Image.open(io.BytesIO(render(svg, 8))) as picture:
        assert picture.size == (8, 8)
        assert picture.getpixel((1, 4)) == (255, 0, 0)
        assert picture.getpixel((6, 4)) == (255, 255, 255)


# -------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("vocabulary", [258, 300, 4000])
def test_the_tokenizer_has_exactly_the_vocabulary_with_padding_and_end_first(vocabulary: int) -> None:
    tokenizer = emoji.train_tokenizer(["red apple", "green pear"] * 3, vocabulary)
    assert tokenizer.get_vocab_size() == vocabulary
    assert [tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)] == [0, 1]
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocabulary))
    assert tokenizer.decode(tokenizer.encode("naïve 🍎 pear").ids) == "naïve 🍎 pear"


@pytest.mark.parametrize("changes", [{"size": 10**12}, {"vocabulary": 10**12}])
def test_a_size_or_vocabulary_beyond_all_measure_is_refused(packages: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"too large|must be at most 1048576"):
        make_emoji(str(tmp_path / "out"), packages=packages, **{**SMALL, **changes})


def test_a_vocabulary_without_room_for_all_bytes_is_refused_with_the_smallest(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary \(257\) .* at least 258"):
        make_emoji(str(tmp_path / "out"), packages=packages, **{**SMALL, "vocabulary": 257})
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_that_is_written_learned_from_the_training_captions(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    whole = "an emoji of"
    assert len(tokenizer.encode(whole).ids) <= 4


# ---------------------------------------------------------------------------------------------------- mistakes and npm


@pytest.mark.parametrize("sets", [("noto", "nato"), ()])
def test_an_unknown_set_is_refused_with_the_known_ones(tmp_path: Path, sets: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="known: noto, noto-v1, fluent-emoji-flat, fluent-emoji-3d"):
        make_emoji(str(tmp_path / "out"), **{**SMALL, "sets": sets})
    assert not (tmp_path / "out").exists()


def test_a_missing_npm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not installed.*install Node\.js"):
        make_emoji(str(tmp_path / "out"), packages=tmp_path / "packages", **SMALL)


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_an_npm_that_fails_is_quoted_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, "echo 'first line' >&2; echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(UserError, match=r"^npm cannot fetch left-pad@1\.0\.0: npm error code E404$"):
        npm.fetch("left-pad", "1.0.0", tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []


def test_an_archive_is_fetched_once(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, version = emoji.LABELS
    source = packages / f"{name}-{version}.tgz"
    fake_npm(tmp_path / "bin", monkeypatch, f'echo "$@" >> {tmp_path}/calls; cp {source} "$5"')
    for _ in range(2):
        package = npm.fetch(name, version, tmp_path / "packages")
        assert package.names() == ["en/data.json"]
    assert (tmp_path / "calls").read_text().startswith(f"pack {name}@{version} --silent --pack-destination ")
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert [path.name for path in (tmp_path / "packages").iterdir()] == [source.name]


@pytest.mark.parametrize("damage", ["no archive", "cut", "changed"])
def test_a_damaged_archive_says_what_to_delete(packages: Path, tmp_path: Path, damage: str) -> None:
    whole = (packages / "{}-{}.tgz".format(*emoji.LABELS)).read_bytes()
    middle = len(whole) // 2
    content = {"no archive": b"text", "cut": whole[:middle], "changed": whole[:middle] + b"x" * 9 + whole[middle + 9 :]}[damage]
    (tmp_path / "left-pad-1.0.0.tgz").write_bytes(content)
    with pytest.raises(UserError, match=r"left-pad-1\.0\.0\.tgz is damaged .*delete it and start again"):
        npm.fetch("left-pad", "1.0.0", tmp_path)


def test_the_users_cache_holds_the_archives_by_default(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_packages(tmp_path / "megadiff" / "npm")
    assert npm.fetch(*emoji.LABELS).names() == ["en/data.json"]
