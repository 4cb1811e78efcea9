"""`megadiff data table` and `data diamonds`: what they print, and one sentence per mistake."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import yaml

from megadiff.cli import main as cli
from megadiff.config.schema import Data, Model
from megadiff.data.recipes import table
from tests.cli.mistakes import mistake

ROWS = "Size,Colour,Code\n" + "".join(f"{i % 5 / 2},{'red' if i % 2 else 'green'},{i % 3}\n" for i in range(40))


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "things.csv").write_text(ROWS)
    return str(tmp_path / "things.csv")


def test_table_prints_sections_that_the_schema_takes(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    options = ["--shard-rows", "10", "--held-out-share", "0.25", "--classes", "Code", "--numbers", "Size"]
    assert cli.main(["data", "table", source, out, *options]) == 0
    first, _, sections = capsys.readouterr().out.partition("\n\n")
    assert first == f"table: {out} (30 rows to train on, 10 held out)"
    found = yaml.safe_load(sections)
    model = Model(width=8, heads=1, head_dim=8, joint_depth=1, **found["model"])
    assert [modality.space.kind for modality in model.modalities.values()] == ["grid", "tokens", "tokens"]
    assert list(Data(train=f"{out}/train", **found["data"]).fields) == ["size", "colour", "code"]
    assert len(list(Path(out, "train").glob("*.tar"))) == 3


def test_notes_go_to_stderr_and_a_separator_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("age;size\n1;2\nNA;3\n4;5\n")
    assert "give --separator semicolon" in mistake(capsys, "data", "table", str(tmp_path / "a.csv"), str(tmp_path / "out"))
    assert cli.main(["data", "table", str(tmp_path / "a.csv"), str(tmp_path / "out"), "--separator", "semicolon"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("table: ")
    assert "note: age is kept as classes: 'NA' on line 3 is no number" in err


def test_diamonds_print_how_many_rows_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package, version, member = table.DIAMONDS
    folder = tmp_path / "megadiff" / "pip"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(member, ROWS)
    assert cli.main(["data", "diamonds", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"table: {tmp_path / 'out'} (36 rows to train on, 4 held out)\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--classes", "Weight"], "has no column Weight; it has Size, Colour, Code"),
        (["--numbers", "Colour"], "line 2: Colour is 'green', which is no number"),
        (["--classes", "Size", "--numbers", "Size"], "Size cannot be both"),
        (["--held-out-share", "0.99"], "leaves none to train on"),
    ],
)
def test_a_mistake_is_one_sentence(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert said in mistake(capsys, "data", "table", source, str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--held-out-share", "1"], "'1' is no share; give a number from 0 to below 1"),
        (["--separator", "x"], "'x' is no separator; known: comma, semicolon, tab, bar"),
        (["--shard-rows", "0"], "argument --shard-rows: '0' is no whole number above 0"),
    ],
)
def test_an_option_out_of_range_is_refused_with_the_usage(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "table", source, str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in mistake(capsys, "data", "table", str(tmp_path / "none.csv"), str(tmp_path / "out"))
    (tmp_path / "latin.csv").write_bytes(b"a\n\xe9\n")
    assert "is not UTF-8 text" in mistake(capsys, "data", "table", str(tmp_path / "latin.csv"), str(tmp_path / "out"))
