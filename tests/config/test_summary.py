"""The derived numbers of a run in one tree."""

from __future__ import annotations

import json

from megadiff.config import derived
from megadiff.config.footprint import Plan
from megadiff.config.layout import Layout
from megadiff.config.summary import layout_summary, summary
from tests.config.small import MODELS, run, stage


def test_the_summary_is_json_and_adds_up():
    whole = run(MODELS["emoji32"])
    frozen = stage(freeze=["joint"])
    numbers = json.loads(json.dumps(summary(whole, frozen, 2)))
    counts = numbers["parameters"]
    assert (
        counts["total"]
        == counts["trained"] + counts["idle"] + counts["frozen"]
        == sum(part["total"] for part in counts["parts"].values())
    )
    assert counts["parts"]["joint"]["trained"] == 0
    assert numbers["batch"]["equation"] == "global_samples 64 = micro_batch 4 x data ranks 2 x accumulation 8"
    assert numbers["batch"]["lanes_per_rank"] == 4
    assert numbers["tokens_per_sample"] == {"total": 80, "modalities": {"text": 16, "image": 64}}
    assert numbers["flops_per_step"] == 64 * derived.flops_per_sample(whole.model, frozen)
    assert set(numbers["bytes_per_rank"]) == {"precision", "zero0", "zero1", "zero2", "zero3"}


def test_a_layouts_summary_places_every_rank_and_every_layer_once():
    plan = Plan(MODELS["trunk norm with towers"], stage(), Layout(0, 12, pipeline=3, tensor=2), 1, "bf16")
    numbers = json.loads(json.dumps(layout_summary(plan)))
    stages = numbers["pipeline_stages"]
    assert [len(stage["ranks"]) for stage in stages] == [numbers["data"]] * 3 == [2, 2, 2]
    assert [rank for stage in stages for replica in stage["ranks"] for rank in replica] == list(range(12))
    layers = [layer for stage in stages for layer in stage["layers"]]
    assert layers == ["embed", "joint 0", "joint 1", "joint 2", "trunk norm", "text 0", "text norm", "image 0", "image 1",
                      "image norm", "heads"]  # fmt: skip
    assert numbers["bytes_per_rank"] in [stage["bytes_held"] for stage in stages]
    assert numbers["bytes_sent_per_step"]["total"] == max(stage["bytes_sent_per_step"]["total"] for stage in stages)
    for place in ([0, 0], [1, 1], [2, 0]):
        for rank in stages[place[0]]["ranks"][place[1]]:
            layout = Layout(rank, 12, pipeline=3, tensor=2)
            assert [layout.pipeline_rank, layout.data_rank] == place
