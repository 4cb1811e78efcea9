"""Nobody writes over another's data set, whoever the two are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadiff.config.errors import UserError
from megadiff.data.packing.build import open_source
from megadiff.data.packing.claims import JOB, RECIPE, claim
from megadiff.data.packing.encoding import Encoding, encode_shards
from megadiff.data.packing.pack import Packing, pack
from megadiff.data.recipes import table
from megadiff.data.recipes.emoji import make_emoji
from tests.data.packages import write_packages
from tests.data.small import TOKENIZER, png, write_source

Maker = Callable[[Path, Path], Any]


def make_table(raw: Path, out: Path, **options: Any) -> None:
    raw.mkdir(exist_ok=True)
    (raw / "t.csv").write_text("a,b\n" + "".join(f"{i},{i % 3}\n" for i in range(20)))
    table.make_table(str(raw / "t.csv"), str(out), **options)


def make_pack(raw: Path, out: Path, share: float = 0.0) -> None:
    (raw / "pictures").mkdir(exist_ok=True)
    for number in range(20):
        (raw / f"pictures/{number}.png").write_bytes(png(np.zeros((4, 4, 3), dtype=np.uint8)))
        (raw / f"pictures/{number}.txt").write_text("a picture")
    pack(open_source("folder", [str(raw / "pictures")], 100, raw / "scratch"), str(out), Packing(held_out_share=share))


def make_split_pack(raw: Path, out: Path) -> None:
    make_pack(raw, out, share=0.5)


def make_encoding(raw: Path, out: Path) -> None:
    encode_shards(write_source(raw / "source", [2]), str(out), Encoding(tokenizer=str(TOKENIZER)))


def draw_emoji(raw: Path, out: Path) -> None:
    make_emoji(str(out), size=8, sets=["noto"], vocabulary=300, shard_samples=8, packages=write_packages(raw / "npm"))


MAKERS: list[Maker] = [make_table, make_pack, make_split_pack, make_encoding, draw_emoji]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("first", MAKERS)
def test_a_data_set_is_written_over_by_nobody_but_goes_on_with_its_own_command(
    tmp_path: Path, first: Maker, second: Maker
) -> None:
    (tmp_path / "raw").mkdir()
    first(tmp_path / "raw", tmp_path / "out")
    before = files_of(tmp_path / "out")
    if first is second:
        second(tmp_path / "raw", tmp_path / "out")
    else:
        with pytest.raises(UserError, match=r"holds another data set|other settings"):
            second(tmp_path / "raw", tmp_path / "out")
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("inside", ["0.tar", "manifest.json", "train/0.tar", "held_out/manifest.json"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_folder_with_shards_of_somebody_else_is_refused(tmp_path: Path, maker: Maker, inside: str) -> None:
    (tmp_path / "raw").mkdir()
    theirs = tmp_path / "out" / inside
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    with pytest.raises(UserError, match=f"holds another data set .{inside}"):
        maker(tmp_path / "raw", tmp_path / "out")
    assert files_of(tmp_path / "out") == {inside: b"theirs"}


def test_held_out_rows_of_an_earlier_share_do_not_stay(tmp_path: Path) -> None:
    make_table(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"other settings \(held_out_share: 0.1 there, 0 here\)"):
        make_table(tmp_path, tmp_path / "out", held_out_share=0)


def test_another_file_of_rows_is_another_data_set(tmp_path: Path) -> None:
    make_table(tmp_path, tmp_path / "out")
    (tmp_path / "u.csv").write_text("a,b\n1,2\n2,3\n")
    with pytest.raises(UserError, match=r"other settings \(source_sha256"):
        table.make_table(str(tmp_path / "u.csv"), str(tmp_path / "out"))


def test_files_that_are_no_data_set_may_lie_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    claim(str(tmp_path), RECIPE, {"a": 1})
    claim(str(tmp_path), RECIPE, {"a": 1})
    with pytest.raises(UserError, match="holds another data set"):
        claim(str(tmp_path), JOB, {"a": 1})
