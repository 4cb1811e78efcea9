"""Tables: rows from nothing, cells filled in, and the report of a run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from megadiff.config.errors import UserError
from megadiff.config.schema import Batching, ConstantEma, Data, Model, Run, Sampling, Showcase, Stage
from megadiff.data.recipes import table
from megadiff.evaluation import showcase
from megadiff.generation.generate import generate
from megadiff.generation.request import GenerateRequest
from megadiff.weights.loading import load
from tests.exports import write_export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("table")
    rows = np.random.default_rng(0)
    lines = [f"{rows.integers(1, 9) / 4},{rows.choice(['red', 'green'])},{rows.integers(100)}\n" for _ in range(300)]
    (folder / "things.csv").write_text("Size,Colour,Price\n" + "".join(lines))
    made = table.make_table(str(folder / "things.csv"), str(folder / "data"))
    sections = table.as_config(made.columns, str(folder / "data"))
    model = Model(width=16, heads=2, head_dim=8, joint_depth=1, **sections["model"])
    train, held_out = (f"{folder}/data/{split}" for split in ("train", "held_out"))
    data = Data(train=train, held_out=held_out, lanes=2, block_shards=1, **sections["data"])
    stage = Stage(
        name="columns",
        steps=1,
        modalities={name: {} for name in model.modalities},
        batch=Batching(global_samples=8, micro_batch=8),
        ema={"main": ConstantEma()},
    )
    rule = Showcase(rows=50, sampling=Sampling(steps=2))
    return Run(name="table", folder=str(folder / "run"), model=model, data=data, stages=(stage,), showcase=rule)


@pytest.fixture(scope="module")
def network(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_export(run, tmp_path_factory.mktemp("table") / "export"))


def cells(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_rows_from_nothing_are_a_csv_of_values_that_occur(network, run, tmp_path):
    generate(GenerateRequest(checkpoint=network, task="joint", out=str(tmp_path), n=20, sampling=Sampling(steps=2)))
    header, *rows = cells(tmp_path / "samples.csv")
    assert header == ["Size", "Colour", "Price"]
    assert len(rows) == 20
    assert {row[1] for row in rows} <= {"red", "green"}
    assert all(float(row[0]) * 4 == round(float(row[0]) * 4) for row in rows)
    assert all(row[2].isdigit() for row in rows)
    assert not (tmp_path / "sheet.png").exists()


def test_empty_cells_are_filled_in_and_the_others_stay(network, tmp_path):
    (tmp_path / "rows.csv").write_text("\ufeffColour,Price,Size\nred,,\n,7,1.25\ngreen,50,2\n,,\nred,,0.5\n")
    request = GenerateRequest(
        checkpoint=network,
        task="impute",
        out=str(tmp_path / "out"),
        table=str(tmp_path / "rows.csv"),
        sampling=Sampling(steps=2),
    )
    generate(request)
    header, *rows = cells(tmp_path / "out/samples.csv")
    assert header == ["Size", "Colour", "Price"]
    assert [row[1] for row in rows if row[1]] == [row[1] for row in rows]
    assert rows[0][1] == "red"
    assert rows[1][0] == "1.25"
    assert rows[1][2] == "7"
    assert rows[2] == ["2", "green", "50"]
    assert rows[4][:2] == ["0.5", "red"]
    assert all(all(row) for row in rows)


def test_a_column_without_a_name_is_an_index_that_the_model_does_not_know(network, tmp_path):
    (tmp_path / "rows.csv").write_text(",Colour,Price,Size\n0,red,7,\n1,green,,2\n")
    impute(network, tmp_path / "rows.csv", tmp_path / "out")
    header, *rows = cells(tmp_path / "out/samples.csv")
    assert header == ["Size", "Colour", "Price"]
    assert [row[1] for row in rows] == ["red", "green"]


def test_a_model_of_a_column_without_a_name_fills_in_its_own_samples(run, tmp_path):
    (tmp_path / "things.csv").write_text(",Size\n" + "".join(f"{i},{i % 5}\n" for i in range(40)))
    made = table.make_table(str(tmp_path / "things.csv"), str(tmp_path / "data"))
    sections = table.as_config(made.columns, str(tmp_path / "data"))
    fields = run.data.model_validate({"train": "", **sections["data"]})
    model = Model(width=16, heads=2, head_dim=8, joint_depth=1, **sections["model"])
    network = str(write_export(run.model_copy(update={"data": fields, "model": model}), tmp_path / "export"))
    generate(GenerateRequest(checkpoint=network, task="joint", out=str(tmp_path / "out"), n=3, sampling=Sampling(steps=2)))
    header, *rows = cells(tmp_path / "out/samples.csv")
    assert header == ["", "Size"]
    impute(network, tmp_path / "out/samples.csv", tmp_path / "again")
    assert cells(tmp_path / "again/samples.csv") == [header, *rows]


def impute(network: str, rows: Path, out: Path) -> None:
    generate(GenerateRequest(checkpoint=network, task="impute", out=str(out), table=str(rows), sampling=Sampling(steps=2)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Colour,Weight\nred,1\n", "has the columns Weight; the model's are Size, Colour, Price"),
        ("Colour\nblue\n", "column Colour has no class 'blue'; it has green, red"),
        ("Price,Colour\nmuch,\n", "column Price takes numbers, not 'much'"),
        ("Price\n", "has no rows under its header"),
        ("", "has no rows under its header"),
        ("Price;Size\n1;2\n", "has the columns Price;Size; the model's are Size, Colour, Price"),
        ("Price,Colour\n1_0,\n", "column Price takes numbers, not '1_0'"),
        (",Price,\n1,2,3\n", "names a column twice: (unnamed), Price, (unnamed)"),
        ("Price,Price\n1,2\n", "names a column twice: Price, Price"),
        ("Price,Size\n1,2,3\n", "row 1 has more cells than the header has columns"),
    ],
)
def test_a_row_that_cannot_be_is_one_sentence(network, tmp_path, text, sentence):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError) as error:
        generate(
            GenerateRequest(checkpoint=network, task="impute", out=str(tmp_path / "out"), table=str(tmp_path / "rows.csv"))
        )
    assert sentence in str(error.value)


def test_a_runs_showcase_prints_error_rates_and_draws_every_column(network, run, monkeypatch, capsys):
    monkeypatch.setattr(showcase, "load", lambda *_: load(network))
    Path(run.folder).mkdir()
    assert showcase.make_showcase(run) == 0
    printed = capsys.readouterr().out
    assert "mean shape error" in printed
    assert "mean trend error" in printed
    assert (Path(run.folder) / "samples.png").exists()
