"""Columns of a table as modalities: numbers by their rank, categories by their index.

A number becomes the standard normal quantile of its rank among the training data's. Equal values share an interval of ranks,
and each visit draws a place in it: so the training data's marginal is exactly normal, however discrete the column, and every
state stands for a value that occurs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import ClassField, GridSpace, NumberField, TokenSpace
from megadiff.data.codecs.base import COLUMN, Codec, member_of
from megadiff.data.errors import DataError, SampleError
from megadiff.data.shards.shard import Views
from megadiff.storage import addresses, store

FORMAT, VERSION = "megadiff-columns", 1
COLUMNS = "columns.json"
NORMAL = NormalDist()
_MASK64 = 2**64 - 1
_ROUNDING = 2e-8
"""Bound on the error in rank of a float32 normal quantile: half its spacing times the density is at most 1.5e-8 (at 1 to 2)."""


@dataclass(frozen=True)
class Column:
    """The distinct values of one column in the training rows.

    Attributes:
        kind: `number` or `class`.
        values: distinct values, in order.
        counts: rows with each value.
        decimals: digits after the point, for numbers.
    """

    kind: str
    values: tuple[Any, ...]
    counts: tuple[int, ...]
    decimals: int = 0


def write_columns(folder: str, columns: Mapping[str, Column]) -> str:
    """Write columns.json into a folder; returns its address."""
    address = addresses.join(folder, COLUMNS)
    tree = {"format": FORMAT, "version": VERSION, "columns": {name: vars(column) for name, column in columns.items()}}
    store.write_bytes(address, (json.dumps(tree, ensure_ascii=False) + "\n").encode())
    read_columns.cache_clear()  # it may hold an older version
    return address


@functools.lru_cache(maxsize=8)
def read_columns(address: str) -> Mapping[str, Column]:
    """Raises DataError if it is no columns.json, StorageError if it is not there."""
    try:
        tree = json.loads(store.read_bytes(address))
        if (tree["format"], tree["version"]) != (FORMAT, VERSION):
            raise DataError(
                f"{address} is a {tree['format']} of version {tree['version']}; this program reads {FORMAT} {VERSION}"
            )
        columns = {
            name: Column(c["kind"], tuple(c["values"]), tuple(c["counts"]), c["decimals"])
            for name, c in tree["columns"].items()
        }
        for name, column in columns.items():
            if len(column.values) != len(column.counts) or sum(column.counts) <= 0:
                raise ValueError(f"column {name} has {len(column.values)} values and {len(column.counts)} counts")
        return columns
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{address} is no {COLUMNS} ({reason}); make one with `megadiff data table`") from None


class RankedNumber(NamedTuple):
    """A number, and its place in (0, 1) among equal ones."""

    value: float
    place: float


class NumberCodec(Codec):
    """One column of numbers."""

    medium = COLUMN
    column: str

    def __init__(self, field: NumberField, space: GridSpace, name: str = "") -> None:
        """Raises ConfigError if the column is unknown or of another kind."""
        self.member, self.column, self.space = field.member, field.column, space
        column = _column(field.columns, field.column, "number")
        self.values = np.asarray(column.values, dtype=np.float64)
        self.decimals = column.decimals
        ends = np.concatenate([[0], np.cumsum(column.counts)]) / sum(column.counts)
        self.starts, self.stops = ends[:-1], ends[1:]
        self.least = 0.5 / sum(column.counts)
        self._index = {float(value): index for index, value in enumerate(self.values)}
        self._salt = int.from_bytes(hashlib.blake2b(field.column.encode(), digest_size=8).digest(), "little")

    def read(self, members: Views, key: int) -> RankedNumber:
        return RankedNumber(_number(_cell(members, self.member, self.column), self.column), _place(key ^ self._salt))

    def encode(self, value: RankedNumber | float | str) -> Tensor:
        """A number to float32 [1, 1, 1]; a plain one takes the middle of its interval of ranks.

        Raises:
            UserError: it is no finite number.
        """
        if not isinstance(value, RankedNumber):
            number = number_in(value) if isinstance(value, str) else _finite(value)
            if number is None:
                raise UserError(f"column {self.column} takes numbers, not {value!r}")
            value = RankedNumber(number, 0.5)
        rank = min(max(self._rank(value), self.least), 1 - self.least)
        return torch.full((1, 1, 1), NORMAL.inv_cdf(rank))

    def decode(self, state: Tensor) -> float | int:
        """A state [1, 1, 1] to the value whose interval of ranks holds it."""
        rank = NORMAL.cdf(float(state))
        index = min(int(np.searchsorted(self.stops, rank, side="right")), len(self.values) - 1)
        value = float(self.values[index])
        return int(value) if self.decimals == 0 else value

    def _rank(self, ranked: RankedNumber) -> float:
        index = self._index.get(ranked.value)
        if index is None:  # a new value lies between the ranks of its neighbours
            middles = (self.starts + self.stops) / 2
            return float(np.interp(ranked.value, self.values, middles, left=0.0, right=1.0))
        start, stop = float(self.starts[index]), float(self.stops[index])
        # At its very ends, rounding the state to float32 would make it a neighbour's.
        margin = min(_ROUNDING, (stop - start) / 2)
        return min(max(start + ranked.place * (stop - start), start + margin), stop - margin)


class ClassCodec(Codec):
    """One column of categories."""

    medium = COLUMN
    column: str

    def __init__(self, field: ClassField, space: TokenSpace, name: str = "") -> None:
        """Raises ConfigError if the column is unknown, of another kind, or has another number of classes."""
        self.member, self.column, self.space = field.member, field.column, space
        self.values = [str(value) for value in _column(field.columns, field.column, "class").values]
        if len(self.values) != space.vocabulary:
            raise ConfigError(
                f"column {field.column} of {field.columns} has {len(self.values)} classes, and the model's vocabulary is "
                f"{space.vocabulary}"
            )
        self._states = {value: torch.tensor([index]) for index, value in enumerate(self.values)}

    def read(self, members: Views, key: int) -> str:
        value = str(_cell(members, self.member, self.column))
        if value not in self._states:
            raise SampleError(f"its {self.column} is {value!r}, which {COLUMNS} does not list")
        return value

    def encode(self, value: str) -> Tensor:
        """A category to int64 [1]. Raises UserError if it is unknown."""
        if value not in self._states:
            raise UserError(f"column {self.column} has no class {value!r}; it has {', '.join(self.values)}")
        return self._states[value]

    def decode(self, state: Tensor) -> str:
        """int64 [1] to a category; the mask state is an empty text."""
        index = int(state)
        return self.values[index] if index < len(self.values) else ""


def _column(address: str, name: str, kind: str) -> Column:
    columns = read_columns(address)
    if name not in columns:
        raise ConfigError(f"{address} has no column {name}; it has {', '.join(columns)}")
    if columns[name].kind != kind:
        raise ConfigError(f"column {name} of {address} is a {columns[name].kind}, and the field asks for a {kind}")
    return columns[name]


@functools.lru_cache(maxsize=256)
def _row(data: bytes) -> Mapping[str, Any]:
    """The row in a member; the codecs of all columns ask for the same one."""
    row = json.loads(data)
    if not isinstance(row, dict):
        raise TypeError("it is no JSON object")
    return row


def _cell(members: Views, member: str, column: str) -> Any:
    data = member_of(members, member)
    try:
        return _row(data)[column]
    except KeyError:
        raise SampleError(f"its row has no column {column}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise SampleError(f"its .{member} member holds no row: {error}") from None


def _number(value: Any, column: str) -> float:
    number = _finite(value)
    if number is None:
        raise SampleError(f"its {column} is {value!r}, which is no number")
    return number


def _finite(value: Any) -> float | None:
    """A number as a float; None for all else, NaN and infinity included."""
    if isinstance(value, bool | str):
        return None
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _place(key: int) -> float:
    """A number in (0, 1) from a key: splitmix64. Pure Python, since it runs for every number of every sample."""
    word = (key + 0x9E3779B97F4A7C15) & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (((word ^ (word >> 31)) >> 11) + 0.5) * 2.0**-53


_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_SURELY_EXACT = 15
"""Decimal digits that every float64 keeps."""
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


def number_in(text: str) -> float | None:
    """The finite number that a cell spells, or None. Python itself would also read 2024_01, nan, and digits of any script."""
    number = float(text) if _NUMBER.fullmatch(text.strip()) else math.inf
    return number if math.isfinite(number) else None


def comes_back(text: str, number: float) -> bool:
    """Whether a cell's number gives back its text to the last digit.

    Ids of 19 digits and codes that begin with 0 do not.
    """
    written = text.strip().lstrip("+-").lower()
    if written[0] == "0" and written[1:2].isdigit():
        return False
    if len(written) <= _SURELY_EXACT and "e" not in written:
        return True
    exact = Decimal(written)
    return Decimal(abs(number)).quantize(exact, context=_EXACT) == exact


def column_of_numbers(values: Sequence[float], texts: Sequence[str]) -> Column:
    """A column of numbers from its cells, parsed and as written."""
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    exponents = (Decimal(text.strip()).as_tuple().exponent for text in texts)  # 1e-05 has five decimals as well
    decimals = max((-exponent for exponent in exponents if isinstance(exponent, int)), default=0)
    return Column("number", tuple(distinct.tolist()), tuple(counts.tolist()), max(0, decimals))


def column_of_classes(values: Sequence[str], everything: Sequence[str]) -> Column:
    """A column of categories; `everything` holds the cells of all rows, held-out ones included."""
    names, counts = sorted(set(everything)), Counter(values)
    return Column("class", tuple(names), tuple(counts[name] for name in names))
