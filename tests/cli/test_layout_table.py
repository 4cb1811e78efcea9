"""The grid of ranks, and rows of bytes."""

from __future__ import annotations

from megadiff.cli import layout_table
from megadiff.config.footprint import Plan
from megadiff.config.layout import Layout
from megadiff.config.summary import layout_summary
from tests.config.small import MODELS, stage


def summary(layout: Layout, **changes):
    return layout_summary(Plan(MODELS["rope and swiglu"], stage(**changes), layout, 1, "bf16"))


def test_the_grid_has_a_row_per_pipeline_stage_and_joins_tensor_ranks():
    numbers = summary(Layout(0, 8, pipeline=2, tensor=2))
    assert layout_table.grids([("joint", numbers)]).splitlines() == [
        "replica                                       0    1",
        "stage 0: embed, joint 0-1                   0+1  2+3",
        "stage 1: joint 2, text 0, image 0-1, heads  4+5  6+7",
    ]


def test_more_replicas_than_sixteen_are_abbreviated():
    header, row = layout_table.grids(
        [("joint", summary(Layout(0, 32), batch={"global_samples": 128, "micro_batch": 4}))]
    ).splitlines()
    assert header.split()[-3:] == row.split()[-3:] == ["13", "...", "31"]


def test_stages_with_the_same_cut_share_a_grid():
    layout = Layout(0, 2, pipeline=2)
    same = layout_table.grids([("one", summary(layout)), ("two", summary(layout))])
    assert "one" not in same
    other = layout_table.grids(
        [("one", summary(layout)), ("two", summary(layout)), ("three", summary(layout, freeze=["joint"]))]
    )
    assert [line for line in other.splitlines() if line.endswith(":")] == ["one, two:", "three:"]


def test_rows_leave_out_kinds_that_are_zero_everywhere():
    rows = dict(layout_table.rows([summary(Layout(0, 2, pipeline=2))]))
    assert "  gathered" not in rows
    assert rows["  send"] == [layout_table.size(summary(Layout(0, 2, pipeline=2))["bytes_sent_per_step"]["send"])]
    assert rows["bubble"] == ["5.9%"]
    assert layout_table.size(3 * 2**29) == "1.50 GiB"
