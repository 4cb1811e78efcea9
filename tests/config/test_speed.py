"""The least time of a step, beside numbers worked out by hand."""

from __future__ import annotations

from typing import get_args

import pytest

from megadiff.config.derived import flops_per_sample, layer_flops
from megadiff.config.footprint import Plan, bytes_sent_per_step, imbalance
from megadiff.config.gpus import GPUS
from megadiff.config.layout import Layout
from megadiff.config.schema.cluster import Machines
from megadiff.config.speed import Hardware, StepTime, step_time
from tests.config.small import MODELS, stage

MODEL = MODELS["rope and swiglu"]
H100 = GPUS["h100"]


def times(layout: Layout, per_node: int = 8, network: float = 1e9, zero: int = 0, **changes) -> StepTime:
    return step_time(Plan(MODEL, stage(**changes), layout, zero, "bf16"), Hardware(H100, per_node, network))


def test_one_rank_computes_its_model_flops_at_the_peak_rate_and_sends_nothing():
    time = times(Layout())
    assert time.compute_s == pytest.approx(64 * flops_per_sample(MODEL, stage()) / 989e12)
    assert time.utilisation(time.compute_s) == pytest.approx(1.0)
    assert time.network_s == 0
    assert time.least_s == max(time.compute_s, time.memory_s) < time.apart_s


def test_fp32_runs_at_the_rate_without_tf32():
    hardware = Hardware(H100, 8, 1e9)
    bf16, fp32 = (step_time(Plan(MODEL, stage(), Layout(), 0, precision), hardware) for precision in ("bf16", "fp32"))
    assert fp32.compute_s / bf16.compute_s == pytest.approx(989 / 67)


def test_activation_checkpointing_computes_the_blocks_forward_once_more():
    plain, again = times(Layout()), times(Layout(), activation_checkpointing=True)
    layers = Plan(MODEL, stage(), Layout(), 0, "bf16").layers
    blocks = sum(flops for flops, layer in zip(layer_flops(MODEL, stage()), layers, strict=True) if layer.block)
    forward = 64 * blocks / 3 / 989e12  # a trained block costs three times its forward pass
    assert again.compute_s - plain.compute_s == pytest.approx(forward, rel=0.01)  # but for its first maps, behind no gradient
    frozen = {"freeze": ["joint"]}
    towers = times(Layout(), activation_checkpointing=True, **frozen).compute_s - times(Layout(), **frozen).compute_s
    assert 0 < towers < forward


def test_pipeline_stages_wait_at_both_ends_of_a_step():
    layout = Layout(0, 2, pipeline=2)
    time, plan = times(layout), Plan(MODEL, stage(), layout, 1, "bf16")
    balanced = time.perfect_s * (plan.micro_batches + 1) / plan.micro_batches
    assert balanced <= time.compute_s <= balanced * imbalance(plan)


@pytest.mark.parametrize(
    ("per_node", "bandwidth"),
    [(4, 450e9), (2, 2 * 1e9), (1, 1e9), (3, 1e9)],  # the last has one rank alone on its node
)
def test_a_ring_over_nodes_has_all_ports_of_the_node_with_the_fewest_ranks(per_node: int, bandwidth: float):
    plan = Plan(MODEL, stage(), Layout(0, 4), 1, "bf16")
    sent = bytes_sent_per_step(plan)[0]
    expected = (2 * sent["all_reduce"] + sent["all_gather"]) * 3 / 4 / bandwidth
    assert times(Layout(0, 4), per_node, zero=1).network_s == pytest.approx(expected)


def test_tensor_ranks_are_neighbours_and_replicas_are_not():
    near, far = times(Layout(0, 4, tensor=2), 2), times(Layout(0, 4, tensor=2), 1)
    only_tensor = times(Layout(0, 2, tensor=2), 2)
    assert only_tensor.network_s < near.network_s < far.network_s


def test_sends_between_nodes_take_the_network():
    assert times(Layout(0, 2, pipeline=2), 1, 1e9).network_s == pytest.approx(
        450 * times(Layout(0, 2, pipeline=2), 2, 1e9).network_s
    )


def test_more_memory_traffic_comes_from_averages_and_micro_batches():
    base, average = times(Layout()).memory_s, {"kind": "constant"}
    assert base < times(Layout(), ema={"main": average, "more": average}).memory_s
    assert base < times(Layout(), batch={"global_samples": 64, "micro_batch": 1}).memory_s


def test_offloaded_numbers_do_not_go_through_the_gpu():
    layout, hardware = Layout(), Hardware(H100, 8, 1e9)
    options = {"offload_optimizer": {"device": "cpu"}}
    whole, offloaded = (step_time(Plan(MODEL, stage(), layout, 3, "bf16", more), hardware) for more in ({}, options))
    assert offloaded.memory_s < whole.memory_s


def test_a_cluster_file_may_name_every_gpu():
    (names, _) = get_args(Machines.model_fields["gpu"].annotation)
    assert set(get_args(names)) == set(GPUS)
