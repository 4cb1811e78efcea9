"""Which losses count as a spike."""

from __future__ import annotations

import math

import pytest

from megadiff.config.schema import Spikes
from megadiff.training.progress import Progress
from megadiff.training.spikes import SpikeWatch

RULE = Spikes(window=10, steps=3, deviations=8)
USUAL = [1.0, 1.1, 0.9, 1.05, 0.95] * 2


def looks(losses: list[float], rule: Spikes = RULE) -> list[int]:
    """The steps at which a spike is complete."""
    watch = SpikeWatch(rule)
    return [step for step, loss in enumerate(losses, 1) if watch.look(loss, step, step + 100)]


@pytest.mark.parametrize(
    ("losses", "complete"),
    [
        pytest.param([5.0, 5.0, 5.0], [13], id="it stays"),
        pytest.param([5.0, 5.0, 1.0, 5.0, 5.0, 1.0], [], id="it returns"),
        pytest.param([5.0, math.inf, math.nan, 5.0], [], id="nan is no loss"),
        pytest.param([5.0, math.inf, 5.0], [13], id="infinite is too large"),
        pytest.param([1.3, 1.3, 1.3], [], id="within the spread"),
        pytest.param([0.1] * 9, [], id="it falls"),
        pytest.param([1.0 + 0.05 * step for step in range(60)], [], id="it creeps up"),
    ],
)
def test_a_spike_is_far_above_the_usual_for_some_steps_in_a_row(losses: list[float], complete: list[int]) -> None:
    assert looks([*USUAL, *losses]) == complete


def test_nothing_is_a_spike_before_there_is_a_measure() -> None:
    assert looks([1.0] * 4 + [50.0] * 20) == []


def test_losses_that_hardly_differ_still_have_a_spread() -> None:
    assert looks([1.0] * 10 + [1.05] * 5) == []
    assert looks([1.0] * 10 + [1.2] * 3) == [13]


def test_a_spike_knows_its_first_step_and_its_batches() -> None:
    watch = SpikeWatch(RULE)
    found = [watch.look(loss, step, step + 100) for step, loss in enumerate([*USUAL, 5.0, 6.0, 7.0], 1)]
    assert found[-1] is not None
    assert (found[-1].step, found[-1].data_steps, found[-1].loss) == (11, (111, 113), 7.0)
    assert 1.0 < found[-1].bound < 5.0


def test_batches_that_are_left_out_are_passed_over() -> None:
    progress = Progress(skipped=[(7, 9), (3, 4), (5, 5)])
    assert [progress.next_data_step(step) for step in (2, 3, 5, 6, 8, 10)] == [2, 6, 6, 6, 10, 10]
