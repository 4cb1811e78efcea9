"""Columns of a table: ranks and normal quantiles there and back, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import ClassField, GridSpace, NumberField, TokenSpace
from megadiff.data.codecs.columns import (
    ClassCodec,
    Column,
    NumberCodec,
    RankedNumber,
    column_of_classes,
    column_of_numbers,
    read_columns,
    write_columns,
)
from megadiff.data.errors import DataError, SampleError

ONE = GridSpace(channels=1, height=1, width=1)
PRICES = Column("number", (1.0, 2.5, 2.75, 10.0), (10, 50, 30, 10), decimals=2)
CUTS = Column("class", ("Fair", "Good", "Ideal"), (1, 2, 3))


@pytest.fixture
def columns(tmp_path) -> str:
    whole = Column("number", (3.0, 4.0), (5, 5), decimals=0)
    return write_columns(str(tmp_path), {"price": PRICES, "cut": CUTS, "whole": whole, "other": PRICES})


def number(columns: str, column: str = "price") -> NumberCodec:
    return NumberCodec(NumberField(column=column, columns=columns), ONE)


def row(**cells) -> dict[str, bytes]:
    return {"json": json.dumps(cells).encode()}


@pytest.mark.parametrize("place", [0.001, 0.3, 0.5, 0.999])
def test_a_number_comes_back_from_any_place_in_its_interval_of_ranks(columns, place):
    codec = number(columns)
    for value in PRICES.values:
        state = codec.encode(RankedNumber(value, place))
        assert state.shape == (1, 1, 1)
        assert codec.decode(state) == value
    assert number(columns, "whole").decode(number(columns, "whole").encode(3)) == 3
    assert isinstance(number(columns, "whole").decode(number(columns, "whole").encode("4")), int)


@pytest.mark.parametrize("place", [1e-16, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-16])
def test_rounding_to_float32_makes_no_value_its_neighbour_in_a_long_column(tmp_path, place):
    values = tuple(float(value) for value in range(20_000))
    address = write_columns(str(tmp_path), {"n": Column("number", values, (3,) * len(values))})
    codec = number(address, "n")
    assert [codec.decode(codec.encode(RankedNumber(value, place))) for value in values] == list(values)


def test_columns_written_anew_are_read_anew(columns, tmp_path):
    assert read_columns(columns)["price"] == PRICES
    write_columns(str(tmp_path), {"price": CUTS})
    assert read_columns(columns) == {"price": CUTS}


@pytest.mark.parametrize(
    ("texts", "decimals"), [(["1", "20"], 0), (["1.5", "2"], 1), (["1e-05", "2"], 5), (["1.5e3"], 0), ([" 2.25 "], 2)]
)
def test_decimals_are_counted_in_scientific_notation_too(texts, decimals):
    assert column_of_numbers([float(text) for text in texts], texts).decimals == decimals


def test_a_class_that_only_other_rows_have_is_listed_with_no_rows():
    assert column_of_classes(["b", "a", "b"], ["b", "a", "b", "c"]) == Column("class", ("a", "b", "c"), (1, 2, 0))


def test_the_training_data_is_standard_normal_however_discrete(columns):
    codec = number(columns)
    values = np.repeat(PRICES.values, PRICES.counts)
    states = [codec.encode(codec.read(row(price=float(values[key % 100])), key)).item() for key in range(5000)]
    points = np.sort(states)
    normal = np.array([0.5 * (1 + math.erf(point / math.sqrt(2))) for point in points])
    gap = np.abs(normal - (np.arange(5000) + 0.5) / 5000).max()
    assert gap < 2 / math.sqrt(5000)


def test_the_place_depends_on_the_key_and_the_column(columns):
    codec, other = number(columns), number(columns, "other")
    places = [codec.read(row(price=2.5), key).place for key in range(1000)]
    assert len(set(places)) == 1000
    assert abs(np.mean(places) - 0.5) < 0.04
    others = [other.read(row(other=2.5), key).place for key in range(1000)]
    assert abs(np.corrcoef(places, others)[0, 1]) < 0.13
    assert codec.read(row(price=2.5), 7) == codec.read(row(price=2.5), 7)


def test_numbers_that_do_not_occur_stand_between_their_neighbours(columns):
    codec = number(columns)
    states = [codec.encode(value).item() for value in (-5, 1.0, 1.7, 2.5, 2.6, 2.75, 5, 10.0, 1e9)]
    assert states == sorted(states)
    assert all(math.isfinite(state) for state in states)


def test_a_class_comes_back_and_the_mask_is_nothing(columns):
    codec = ClassCodec(ClassField(column="cut", columns=columns), TokenSpace(vocabulary=3, length=1))
    for index, value in enumerate(CUTS.values):
        assert codec.encode(value).tolist() == [index]
        assert codec.decode(codec.encode(value)) == value
    assert codec.decode(codec.encode("Good") * 0 + 3) == ""
    assert codec.read(row(cut="Good"), 0) == "Good"


def test_what_does_not_fit_is_one_sentence(columns, tmp_path):
    cut = ClassField(column="cut", columns=columns)
    with pytest.raises(ConfigError, match="has 3 classes, and the model's vocabulary is 5"):
        ClassCodec(cut, TokenSpace(vocabulary=5, length=1))
    with pytest.raises(ConfigError, match="has no column size; it has price, cut, whole, other"):
        number(columns, "size")
    with pytest.raises(ConfigError, match="is a class, and the field asks for a number"):
        number(columns, "cut")
    for value in ("cheap", "nan", float("inf"), None, True):
        with pytest.raises(UserError, match=f"column price takes numbers, not {value!r}"):
            number(columns).encode(value)
    with pytest.raises(UserError, match="column cut has no class 'Bad'; it has Fair, Good, Ideal"):
        ClassCodec(cut, TokenSpace(vocabulary=3, length=1)).encode("Bad")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="megadiff data table"):
        read_columns(str(tmp_path / "bad.json"))
    empty = write_columns(str(tmp_path / "empty"), {"price": Column("number", (1.0,), ())})
    with pytest.raises(DataError, match="column price has 1 values and 0 counts"):
        read_columns(empty)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({}, "it has no .json member"),
        (row(cut="Good"), "its row has no column price"),
        (row(price="much"), "its price is 'much', which is no number"),
        (row(price=True), "its price is True"),
        (row(price=math.nan), "its price is nan"),
        (row(price=10**400), "which is no number"),
        ({"json": b"[1]"}, "holds no row"),
        ({"json": b"{"}, "holds no row"),
    ],
)
def test_an_unreadable_sample_says_what_is_wrong(columns, members, sentence):
    with pytest.raises(SampleError, match=sentence):
        number(columns).read(members, 0)


def test_a_class_that_columns_json_lacks_makes_the_sample_unreadable(columns):
    codec = ClassCodec(ClassField(column="cut", columns=columns), TokenSpace(vocabulary=3, length=1))
    with pytest.raises(SampleError, match=r"its cut is 'Bad', which columns\.json does not list"):
        codec.read(row(cut="Bad"), 0)
