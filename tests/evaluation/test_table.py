"""Error rates of tables against numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megadiff.evaluation.table import columns_of, compare, picture, shape_errors, trend_errors

pytestmark = pytest.mark.thorough

RNG = np.random.default_rng(0)
ROOT = Path(__file__).parents[2]


def test_shape_is_the_largest_gap_of_distribution_functions_or_the_total_variation():
    real = columns_of([{"n": float(i), "c": "ab"[i % 2]} for i in range(4)])
    drawn = columns_of([{"n": float(i) + 1, "c": "a" if i else "c"} for i in range(4)])
    # n: {0, 1, 2, 3} against {1, 2, 3, 4}: a quarter lies below 1. c: a 1/2 -> 3/4, b 1/2 -> 0, c 0 -> 1/4.
    assert shape_errors(real, drawn) == pytest.approx({"n": 0.25, "c": 0.5})


def test_trend_is_half_the_difference_of_correlations_or_the_contingency():
    x = np.arange(10.0)
    real = {"x": x, "y": x, "c": np.array(["lo"] * 5 + ["hi"] * 5)}
    drawn = {"x": x, "y": -x, "c": np.array(["hi"] * 5 + ["lo"] * 5)}
    errors = trend_errors(real, drawn)
    assert errors["x", "y"] == pytest.approx(1.0)
    assert errors["x", "c"] == pytest.approx(1.0)
    constant = {"x": x, "y": np.zeros(10), "c": real["c"]}
    assert trend_errors(real, constant)["x", "y"] == pytest.approx(0.5)


def test_equal_tables_and_shuffled_rows_have_no_error():
    number = RNG.normal(size=500)
    real = {"n": number, "m": number + RNG.normal(size=500), "c": np.where(number > 0, "up", "down")}
    order = RNG.permutation(500)
    shuffled = {name: column[order] for name, column in real.items()}
    report = compare(real, shuffled, real)
    assert max(*report.shape.values(), *report.trend.values()) < 1e-9
    independent = {name: RNG.permutation(column) for name, column in real.items()}
    broken = compare(real, independent, real)
    assert max(broken.shape.values()) < 1e-9
    assert min(broken.trend.values()) > 0.2
    assert "mean trend error" in str(broken)


def test_numbers_beyond_the_real_range_fall_into_the_end_bins():
    real = {"n": np.linspace(0, 1, 100), "c": np.array(["a"] * 100)}
    drawn = {"n": np.linspace(0, 1, 100) * 1000, "c": np.array(["a"] * 100)}
    assert 0.8 < trend_errors(real, drawn)["n", "c"] <= 1


def test_the_picture_has_a_panel_for_every_column():
    real = {"n": RNG.normal(size=200), "c": RNG.choice(["red", "green"], 200)}
    image = picture(real, {"n": RNG.normal(size=100), "c": RNG.choice(["red", "blue"], 100)})
    assert image.mode == "RGB"
    assert image.width > 1000
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize(
    ("real", "drawn"),
    [
        (np.ones(50), np.ones(50)),
        (RNG.normal(size=50), RNG.normal(size=50) + 100),
        (np.where(np.arange(5000) < 2, 1.0, 0.0), np.zeros(10)),
        (np.array([f"street {i % 40}" for i in range(200)]), np.array([f"street {i % 60}" for i in range(200)])),
    ],
    ids=["one value", "far away", "almost all zero", "many categories"],
)
def test_awkward_columns_can_be_drawn(real, drawn):
    assert picture({"a": real}, {"a": drawn}).width > 1000


def test_the_picture_leaves_the_backend_of_a_notebook_alone():
    script = (
        "import matplotlib, numpy as np; matplotlib.use('svg')\n"
        "from megadiff.evaluation.table import picture\n"
        "picture({'a': np.arange(9.0)}, {'a': np.arange(9.0)})\n"
        "assert matplotlib.get_backend() == 'svg'"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
