"""Averages of lengths that were never tracked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megadiff.config.run_folder import CheckpointsFolder
from megadiff.config.schema import Checkpointing, ConstantEma, PowerEma
from megadiff.weights import checkpoint
from megadiff.weights.boxes import Extent
from megadiff.weights.checkpoint import CheckpointError, CheckpointManifest, tensor_key
from megadiff.weights.posthoc import Profile, combine, decay, inner_product, power_exponent, reconstruct, tracked_averages

pytestmark = pytest.mark.thorough

UPDATES = 2000
PROFILES = {"short": PowerEma(length=0.05), "long": PowerEma(length=0.10)}


def weights_at(update: int) -> torch.Tensor:
    """A path that moves fast at first and trembles all along."""
    share = update / UPDATES
    return torch.tensor([math.sqrt(share), math.sin(12 * share), share + 0.3 * math.cos(900 * share)], dtype=torch.float64)


def averages(profile: PowerEma, every: int) -> dict[int, torch.Tensor]:
    """As training makes them: by update number, kept at multiples of `every`."""
    average, kept = weights_at(0), {}
    for update in range(1, UPDATES + 1):
        average = torch.lerp(weights_at(update), average, decay(profile, update))
        if update % every == 0:
            kept[update] = average
    return kept


@pytest.mark.parametrize("length", [0.03, 0.07, 0.13, 0.2])
def test_an_average_of_any_length_is_made_of_two_that_were_tracked(length):
    kept = {name: averages(profile, every=125) for name, profile in PROFILES.items()}
    order = [(name, update) for update in kept["short"] for name in PROFILES]
    profiles = [Profile(update, power_exponent(PROFILES[name].length)) for name, update in order]
    found = combine(profiles, Profile(UPDATES, power_exponent(length)))
    made = sum(c * kept[name][update] for c, (name, update) in zip(found.coefficients, order, strict=True))
    truth = averages(PowerEma(length=length), every=UPDATES)[UPDATES]
    assert torch.allclose(made, truth, atol=6e-3)
    assert found.error < 0.06
    assert sum(found.coefficients) == pytest.approx(1, abs=0.01)


def test_a_profile_that_was_tracked_is_found_again():
    profiles = [Profile(updates, power_exponent(length)) for updates in (500, 1000) for length in (0.05, 0.1)]
    found = combine(profiles, profiles[-1])
    assert found.coefficients == pytest.approx((0, 0, 0, 1), abs=1e-6)
    assert found.error < 1e-6


def test_inner_products_are_the_integrals_of_the_profiles():
    one, other = Profile(600, 6.9), Profile(1000, 16.97)
    step = torch.linspace(0, 1000, 400_001, dtype=torch.float64)
    shapes = [
        torch.where(step <= p.updates, (p.exponent + 1) * step**p.exponent / p.updates ** (p.exponent + 1), 0.0)
        for p in (one, other)
    ]
    assert inner_product(one, other) == pytest.approx(torch.trapezoid(shapes[0] * shapes[1], step).item(), rel=1e-3)
    assert inner_product(other, one) == inner_product(one, other)


def publish(folder: Path, step: int, values: dict[str, torch.Tensor]) -> None:
    checkpoint.begin(CheckpointsFolder(folder), step)
    tensors = {tensor_key(f"ema.{name}", "w"): value for name, value in values.items()}
    tensors |= {tensor_key("weight", "w"): torch.zeros(3), tensor_key("weight", "frozen"): torch.tensor([5.0])}
    extents = {"w": Extent(0, 3), "frozen": Extent(0, 1)}
    entry = checkpoint.write_rank_file(CheckpointsFolder(folder).partial(step), 0, tensors, extents)
    parameters = {"w": ((3,), True), "frozen": ((1,), False)}
    progress = {"optimizer_step": step, "ema_updates": step}
    manifest = CheckpointManifest("only", parameters, tuple(values), progress, "", (entry,))
    checkpoint.publish(CheckpointsFolder(folder), step, manifest, Checkpointing(keep=100))


def test_tracked_averages_a_stage_are_combined_parameter_by_parameter(tmp_path):
    kept = {name: averages(profile, every=250) for name, profile in PROFILES.items()}
    for step in kept["short"]:
        publish(tmp_path, step, {name: kept[name][step].float() for name in PROFILES})
    snapshots = tracked_averages(CheckpointsFolder(tmp_path), {**PROFILES, "plain": ConstantEma()})
    assert len(snapshots) == 2 * UPDATES // 250
    found = combine([snapshot.profile for snapshot in snapshots], Profile(UPDATES, power_exponent(0.08)))
    truth = averages(PowerEma(length=0.08), every=UPDATES)[UPDATES]
    assert torch.allclose(reconstruct(snapshots, found.coefficients, "w").double(), truth, atol=1e-2)
    assert reconstruct(snapshots, found.coefficients, "frozen").tolist() == [5.0]


def test_without_power_profiles_the_way_out_is_told(tmp_path):
    publish(tmp_path, 10, {"main": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="profiles of kind power"):
        tracked_averages(CheckpointsFolder(tmp_path), {"main": ConstantEma()})
