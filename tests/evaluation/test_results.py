"""results.json: what was measured, and what it depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadiff.config.errors import UserError
from megadiff.evaluation.pieces import wait_for
from megadiff.evaluation.results import differing, read_results, write_results
from megadiff.types import Metric

GAP = Metric("gap/text", 0.05, low=0.03, high=0.07, depends={"pairs": 256, "seed": 0})


def test_figures_are_read_as_they_were_written_and_stand_beside_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, [GAP, Metric("fid", 12.5)])
    write_results(path, [Metric("fid", 11.0)])
    assert read_results(path) == {"gap/text": GAP, "fid": Metric("fid", 11.0)}


def test_what_two_figures_do_not_share_is_named() -> None:
    other = Metric("gap/text", 0.06, depends={"pairs": 128, "seed": 0, "weights": "ab"})
    assert differing(GAP, other) == ["pairs", "weights"]
    assert differing(GAP, GAP) == []


@pytest.mark.parametrize("text", ["", "[]", '{"format": "megadiff-results"}', '{"format": "x", "version": 1}'])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"results\.json") as caught:
        read_results(path)
    assert "\n" not in str(caught.value)


def test_where_data_lies_does_not_count_but_their_contents_do() -> None:
    here, there = ({"drawn.data": place, "drawn.contents": ["a"], "out": place} for place in ("here", "there"))
    assert differing(Metric("fid", 1.0, depends=here), Metric("fid", 1.0, depends=there)) == ["out"]
    there["drawn.contents"] = ["b"]
    assert differing(Metric("fid", 1.0, depends=here), Metric("fid", 1.0, depends=there)) == ["drawn.contents", "out"]


def test_a_wait_for_what_nobody_writes_ends_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    wait_for([tmp_path / "there"], most_s=0)
    with pytest.raises(UserError, match=r"missing is missing, and nothing has been written there for 0\.3 s"):
        wait_for([tmp_path / "there", tmp_path / "missing"], most_s=0.3)
