"""Ranks of a stage that are not alike: one sentence on all of them, before a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.small import TOKENIZER, sample, write_source
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.distributed

WORKER = ROOT / "tests" / "training" / "start_worker.py"


def said(folder: Path, second: dict[str, Any], *overrides: str, first: dict[str, Any] | None = None) -> str:
    """What two ranks say; the second one differs."""
    request = {"ranks": [first or {}, second], "overrides": [f"folder={folder}/run", *overrides]}
    reports = run_ranks(WORKER, 2, request)
    assert reports[0] == reports[1]
    assert reports[0]["steps"] == []
    assert not list(folder.rglob("metrics.jsonl"))
    sentence = str(reports[0]["said"])
    assert "\n" not in sentence
    return sentence


def test_another_configuration_on_one_rank_stops_all(tmp_path):
    sentence = said(tmp_path, {"overrides": ["stages.first.optimizer.learning_rate=1e-4"]})
    assert sentence.startswith("rank 1 differs from rank 0 in its configuration: ")


def test_other_code_on_one_rank_stops_all(tmp_path):
    assert said(tmp_path, {"code": "edited"}).startswith(
        "rank 1 differs from rank 0 in its code of megadiff: edited instead of "
    )


def test_other_data_under_the_same_name_on_one_rank_stops_all(tmp_path):
    folders = [tmp_path / "node_0", tmp_path / "node_1"]
    for number, folder in enumerate(folders):
        write_source(folder / "source", [16, 16], {5: sample(100 + number)})
    overrides = [
        "data.train=source/manifest.json",
        "data.block_shards=1",
        f"data.fields.text.tokenizer={TOKENIZER}",
    ]
    first, second = ({"folder": str(folder)} for folder in folders)
    sentence = said(tmp_path, second, *overrides, first=first)
    assert sentence.startswith("rank 1 differs from rank 0 in its manifests of the data: ")
