"""The likelihood of held-out pairs: equal to the functions it is made of, and the same in any shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadiff import rng
from megadiff.data.reading.loader import read_held_out
from megadiff.diffusion.conditional import exact_losses
from megadiff.distributed.ranks import Ranks
from megadiff.evaluation import likelihood
from megadiff.evaluation.gap import conditioning_gap
from megadiff.evaluation.likelihood import likelihood_metrics
from megadiff.evaluation.pieces import Pieces
from megadiff.generation.loading import load

HELD_OUT = str(Path(__file__).parents[2] / "examples/emoji32/held_out")


@pytest.fixture(scope="module")
def network(exported):
    loaded = load(str(exported))
    return loaded, read_held_out(HELD_OUT, loaded.data, loaded.model, 5).states


def test_the_numbers_are_the_exact_losses_and_the_conditioning_gap(network, tmp_path: Path):
    loaded, states = network
    found = {metric.name: metric for metric in likelihood_metrics(loaded, states, Pieces(tmp_path, Ranks()), {"w": 1}, rows=40)}
    keys = rng.sample_keys(likelihood.SEED, torch.arange(5))
    options = {"target": "text", "times": likelihood.TIMES}
    with torch.no_grad():
        given = exact_losses(loaded.module, loaded.model, states, keys, given=["image"], **options)
        absent = exact_losses(loaded.module, loaded.model, states, keys, given=[], **options)
        gap = conditioning_gap(loaded.module, loaded.model, states, seed=likelihood.SEED, **options)
    assert found["NELBO text/given"].value == pytest.approx(given.mean().item(), rel=1e-5)
    assert found["NELBO text/absent"].value == pytest.approx(absent.mean().item(), rel=1e-5)
    assert found["likelihood gap/text"].value == pytest.approx(gap.mean, abs=1e-5)
    assert found["likelihood gap/text"].low == pytest.approx(gap.low, abs=1e-5)
    quarters = [found[f"error image/given t {at:.2f}-{at + 0.25:.2f}"].value for at in (0, 0.25, 0.5, 0.75)]
    assert sum(quarters) / 4 == pytest.approx(found["error image/given"].value, rel=1e-6)
    assert found["error image/given"].depends == {"w": 1, "pairs": 5, "seed": 0, "times": likelihood.TIMES}


def test_two_processes_compute_what_one_does_and_keep_it(network, tmp_path: Path, monkeypatch):
    loaded, states = network
    monkeypatch.setattr(likelihood, "PER_PIECE", 2)
    alone = likelihood_metrics(loaded, states, Pieces(tmp_path / "alone", Ranks()), {}, rows=40)
    second, first = (Pieces(tmp_path / "both", Ranks(rank, 2)) for rank in (1, 0))
    assert likelihood_metrics(loaded, states, second, {}, rows=40) == []
    assert likelihood_metrics(loaded, states, first, {}, rows=40) == alone
    monkeypatch.setattr(likelihood, "stratum_losses", None)  # nothing is computed again
    assert likelihood_metrics(loaded, states, first, {}, rows=40) == alone
