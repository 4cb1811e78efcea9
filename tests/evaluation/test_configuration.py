"""The picture of a configuration: averages' spans against sums, and that it is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from megadiff.cli import main as cli
from megadiff.config.schema import ConstantEma, PowerEma
from megadiff.evaluation import configuration
from megadiff.evaluation.configuration import spans
from megadiff.weights.posthoc import decay
from tests.ranks import ROOT


@pytest.mark.parametrize("profile", [ConstantEma(decay=0.9, warmup=False), ConstantEma(decay=0.99), PowerEma(length=0.1)])
def test_the_span_is_the_mean_age_of_the_weights_in_the_average(profile):
    shares = [1.0]  # of the first weights, and then of those after each update
    for update in range(1, 41):
        kept = decay(profile, update)
        shares = [share * kept for share in shares] + [1 - kept]
    mean = sum(share * age for age, share in enumerate(reversed(shares)))
    updates, ages = spans(profile, 40)
    assert (updates[-1], ages[-1]) == (40, pytest.approx(mean))


def test_long_stages_are_followed_in_strides(monkeypatch):
    exact = spans(PowerEma(length=0.1), 4000)
    monkeypatch.setattr(configuration, "MOST_UPDATES", 400)
    strided = spans(PowerEma(length=0.1), 4000)
    assert len(strided[0]) == 400
    assert strided[1][-1] == pytest.approx(exact[1][-1], rel=0.02)


def test_check_config_draws_a_row_of_panels_per_stage(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    drawn = tmp_path / "picture.png"
    assert cli.main(["check-config", "tests/tiny.yaml", "--picture", str(drawn)]) == 0
    with Image.open(drawn) as picture:
        assert picture.height > picture.width / 4 * 2, "three stages of four panels"
    assert cli.main(["check-config", "tests/tiny.yaml", "--picture", str(tmp_path / "no/where.png")]) == 2
    assert "where.png cannot be written" in capsys.readouterr().err
