"""The sheet at a run's end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadiff.config.schema import Run, Sampling, Showcase
from megadiff.data.shards.shard import Shard, read_manifest
from megadiff.evaluation import showcase
from megadiff.report.sheet import SheetSection, contact_sheet
from megadiff.weights.loading import load

PROMPTS = ("a red heart", "a cat")


def captions_in(manifest: str) -> set[str]:
    folder, shards = Path(manifest).parent, read_manifest(manifest).shards
    opened = [Shard(entry.name, folder / entry.name) for entry in shards]
    samples = [shard.members(offset) for shard in opened for offset in range(len(shard))]
    return {caption for members in samples for caption in json.loads(members["json"])["captions"]}


def test_the_sheet_tells_what_was_trained_on_from_what_was_not(
    tiny: Run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Showcase(prompts=PROMPTS, count=2, sampling=Sampling(steps=2), gap_pairs=16)
    run = tiny.model_copy(update={"folder": str(tmp_path), "showcase": rule})
    sheets: list[list[SheetSection]] = []
    monkeypatch.setattr(showcase, "load", lambda *_: load(str(exported)))
    monkeypatch.setattr(showcase, "contact_sheet", lambda sections: sheets.append(sections) or contact_sheet(sections))
    showcase.make_showcase(run)
    cells = {section.title: section.cells for section in sheets[0]}
    assert set(cells) == {
        *(
            f"{task} ({of})"
            for task in ("image for a given text", "text for a given image")
            for of in ("seen in training", "never seen")
        ),
        "image for a given text (prompts)",
        "everything from nothing (joint)",
    }
    assert run.data.held_out is not None
    for of, manifest in (("seen in training", run.data.sources["train"]), ("never seen", run.data.held_out)):
        given = {cell.caption for cell in cells[f"image for a given text ({of})"]}
        assert len(given) == 2
        assert given <= captions_in(manifest)
    assert {cell.caption for cell in cells["image for a given text (prompts)"]} == set(PROMPTS)
    assert (tmp_path / "samples.png").exists()
