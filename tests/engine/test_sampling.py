"""Samples through engines of several ranks are those of one process, and no rank ever holds the model."""

from __future__ import annotations

from contextlib import chdir
from typing import Any

import pytest
import torch

from megadiff.config.layout import Layout
from megadiff.config.load import load_run
from megadiff.weights.loading import load
from tests.engine.layouts import LAYOUTS, PARTITION_ALL, newest
from tests.engine.sampling_worker import Drawn, draw_all
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.distributed

WORKER = ROOT / "tests" / "engine" / "sampling_worker.py"
MOST_HELD = {"ZeRO-3 x 2": 0.6, "pipeline x 2": 0.7, "tensor x 2": 0.6}
"""By layout, the largest share of the model's elements that a rank may hold at once, or write. In ZeRO-3 the largest layer,
the head or the embedding of tokens, is a third; the pipeline cuts between layers; tensor ranks repeat the small parameters.
"""


@pytest.fixture(scope="module")
def alone(one_rank: dict[str, Any]) -> tuple[Drawn, list[str]]:
    """What one process draws."""
    run = load_run(ROOT / "tests/tiny.yaml")
    module = load(str(newest(one_rank["folder"] / "third"))).module
    with chdir(ROOT), torch.no_grad():  # data and tokenizers are named relative to it
        return draw_all(module, run, run.stage("third"), Layout())


@pytest.mark.parametrize("layout", MOST_HELD)
def test_samples_are_those_of_one_process_and_no_rank_holds_the_model(layout, one_rank, alone, tmp_path):
    file, ranks, _ = LAYOUTS[layout]
    request = {
        "deepspeed": f"ds_configs/{file}.json",
        "zero_options": PARTITION_ALL if layout.startswith("ZeRO-3") else {},
        "checkpoint": str(newest(one_rank["folder"] / "third")),
        "out": str(tmp_path),
    }
    reports = run_ranks(WORKER, ranks, request)
    assert_same_samples([torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)], alone[0])
    for report in reports:
        assert report["captions"] == reports[0]["captions"]
        assert len(report["captions"]) == len(alone[1])
        shares = report["shares"]
        assert max(shares.values()) < MOST_HELD[layout], shares
        assert min(shares[moment] for moment in ("building", "sampling", "written")) > 0.1, shares  # it was watched


def assert_same_samples(drawn: list[Drawn], expected: Drawn) -> None:
    """On every rank, which may have drawn a share: pictures but for rounding, and tokens but for one in a hundred."""
    assert {name for own in drawn for name in own} == expected.keys()
    tokens = different = 0
    for own in drawn:
        for name, states in own.items():
            for modality, state in states.items():
                if state.is_floating_point():
                    torch.testing.assert_close(state, expected[name][modality], rtol=1e-3, atol=1e-3)
                else:
                    tokens += state.numel()
                    different += int((state != expected[name][modality]).sum())
    assert different <= tokens / 100
    assert tokens > 0
