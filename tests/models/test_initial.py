"""Initial values are functions of seed, name and index: parts of a parameter are made alone."""

from __future__ import annotations

import pytest
import torch

from megadiff.models import initial, mmdit
from megadiff.models.initial import Constant, Initial, Normal, Uniform, initial_range
from megadiff.models.mmdit import build_model, initial_distributions
from megadiff.models.names import named_parameters
from tests.models.small import small_config

KINDS = [Uniform(0.3), Normal(0.02), Constant(0.5, ones=((3, 40), (900, 2000)))]


@pytest.mark.parametrize("kind", KINDS)
def test_any_part_of_a_parameter_is_that_part_of_the_whole(kind: Initial, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = initial_range(kind, 1, "embed.weight", 0, 1001)
    for at_once in (8, 2**20):
        monkeypatch.setattr(initial, "_AT_ONCE", at_once)
        for start, stop in [(0, 1001), (0, 1), (1, 2), (3, 3), (5, 30), (7, 1000), (999, 1001)]:
            assert torch.equal(initial_range(kind, 1, "embed.weight", start, stop), whole[start:stop])


def test_values_have_their_distribution_and_neighbours_are_independent() -> None:
    uniform, normal = (initial_range(kind, 5, "a", 0, 100_000) for kind in (Uniform(2.0), Normal(3.0)))
    assert uniform.abs().max() < 2.0
    assert uniform.std().item() == pytest.approx(2 / 3**0.5, rel=0.01)
    assert normal.std().item() == pytest.approx(3.0, rel=0.01)
    assert (normal.abs() > 9).float().mean().item() == pytest.approx(0.0027, rel=0.2)
    for values in (uniform, normal):
        assert abs(values.mean()) < 0.02 * values.std()
        assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.01


def test_values_follow_the_seed_and_the_name() -> None:
    values = [initial_range(Uniform(1.0), seed, name, 0, 64) for seed in (1, 2) for name in ("a.weight", "b.weight")]
    assert len({tuple(each.tolist()) for each in values}) == 4
    assert torch.equal(values[0], initial_range(Uniform(1.0), 1, "a.weight", 0, 64))


def test_these_values_stay_what_they_are() -> None:
    """A run's curve depends on them."""
    torch.testing.assert_close(initial_range(Uniform(1.0), 0, "a", 5, 8), torch.tensor([-0.256712, -0.561177, 0.847393]))
    torch.testing.assert_close(initial_range(Normal(1.0), 0, "a", 5, 8), torch.tensor([0.848330, 1.545362, -0.803410]))


def test_a_model_starts_alike_whatever_else_it_has_and_every_parameter_has_a_distribution() -> None:
    both, alone = (build_model(small_config(), predicted, seed=3) for predicted in (["words", "picture"], ["picture"]))
    parameters = dict(named_parameters(both))
    for name, parameter in named_parameters(alone):
        assert torch.equal(parameter, parameters[name])
    assert set(initial_distributions(both)) == set(parameters)
    other = dict(named_parameters(build_model(small_config(), ["words", "picture"], seed=4)))
    assert not torch.equal(parameters["embed.states.words.weight"], other["embed.states.words.weight"])


def test_on_the_meta_device_and_without_a_seed_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(mmdit, "initial_range", drawn)
    with torch.device("meta"):
        assert next(build_model(small_config(), ["picture"]).parameters()).is_meta
    build_model(small_config(), ["picture"], seed=None)
