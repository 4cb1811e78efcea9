"""The ZeRO engine over real processes: one curve whatever the layout, resume to the bit, stages, averages."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megadiff.weights.checkpoint import MOMENTS, CheckpointReader, write_rank_file
from megadiff.weights.loading import load
from tests.data.small import sample, write_source
from tests.engine import layouts
from tests.engine.layouts import (
    CLIPPED,
    HELD_OUT,
    PARTITION_ALL,
    SHORT,
    STAGES,
    WORKER,
    assert_idle_weights_stay,
    assert_same_curve,
    assert_same_held_out,
    newest,
)
from tests.engine.worker import probe_input
from tests.ranks import finish, run_ranks, start_ranks

pytestmark = pytest.mark.distributed


def train(folder: Path, world: int, zero: int, *, stages: tuple[str, ...] = ("first",), **request: Any) -> dict[str, Any]:
    """Rank 0's report; all ranks must agree on the error, if there is one."""
    reports = run_ranks(
        WORKER,
        world,
        {"folder": str(folder), "deepspeed": f"ds_configs/zero{zero}.json", "stages": list(stages), **request},
    )
    assert len({report.get("error") for report in reports}) == 1
    return reports[0]


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All three stages on two ranks with ZeRO-3, every parameter partitioned."""
    folder = tmp_path_factory.mktemp("zero3")
    watched = {"zero_options": PARTITION_ALL, "watch_gathered": True}
    return {"folder": folder, **layouts.train("ZeRO-3 x 2", folder, SHORT, HELD_OUT, **watched)[0]}


@pytest.mark.parametrize("stage", STAGES)
def test_zero3_on_two_ranks_follows_the_curve_of_one_rank(stage: str, one_rank: dict[str, Any], zero3: dict[str, Any]) -> None:
    assert_same_curve(zero3[stage], one_rank[stage])
    assert_same_held_out(zero3, one_rank, stage)


@pytest.mark.parametrize(("zero", "ranks"), [(0, 2), (1, 2), (2, 2), (2, 1), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_other_zero_stages_follow_the_curve_of_one_rank_without_any(
    zero: int, ranks: int, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_curve(train(tmp_path, ranks, zero, overrides=[SHORT, CLIPPED]), one_rank["first"])
    assert_idle_weights_stay(tmp_path)


def test_what_no_loss_reaches_is_neither_stepped_nor_decayed(one_rank: dict[str, Any], zero3: dict[str, Any]) -> None:
    assert_idle_weights_stay(one_rank["folder"])
    assert_idle_weights_stay(zero3["folder"])


def test_ranks_whose_samples_score_no_token_run_the_same_branches(tmp_path: Path) -> None:
    nothing_scored = [
        "stages.first.modalities.text.predicted=true",
        "stages.first.modalities.text.conditioning={clean: 1.0, absent: 0.0}",
        "stages.first.modalities.image.conditioning={clean: 0.0, absent: 0.0}",
    ]
    report = train(tmp_path, 2, 3, overrides=nothing_scored)
    assert report["text_losses"] == [None] * 4
    assert all(loss > 0 for loss in report["loss"])


def test_under_zero3_every_parameter_is_partitioned_and_no_rank_ever_holds_the_model(zero3: dict[str, Any]) -> None:
    for stage in ("first", "third"):
        report = zero3[stage]
        assert report["all_partitioned"]
        assert report["held_between_steps"] < report["whole"] * 0.01
        assert len(report["hooked"]) > 10
        assert [path for path, owns_weights in report["hooked"].items() if not owns_weights] == [""]  # the root's start a step
        # The largest single layer here is the token head or embedding with a third of all parameters.
        assert 0 < report["most_gathered"] < report["whole"] * 0.6


def test_a_run_killed_and_resumed_repeats_the_uninterrupted_curve_to_the_bit(tmp_path: Path) -> None:
    waits = "stages.*.checkpoint.asynchronous=false"
    steps = ["stages.*.steps=8", waits, HELD_OUT.replace("every_steps: 100", "every_steps: 3")]
    whole = train(tmp_path / "whole", 2, 3, overrides=steps)
    request = {"folder": str(tmp_path / "cut"), "deepspeed": "ds_configs/zero3.json", "stages": ["first"], "overrides": steps}
    ended = []
    for process in start_ranks(WORKER, 2, {**request, "kill_at": 7}):
        finish(process)
        ended.append(process.returncode)
    # The first to die may take the other down in a collective before that one kills itself.
    assert -signal.SIGKILL in ended
    assert 0 not in ended
    assert newest(tmp_path / "cut" / "first").name == "step_00000005"
    resumed = train(tmp_path / "cut", 2, 3, overrides=steps)
    assert resumed["steps"] == list(range(1, 9))
    assert resumed["loss"] == whole["loss"]
    assert resumed["grad_norm"] == whole["grad_norm"]
    assert resumed["held_out"] == whole["held_out"]
    assert len(whole["held_out"]) == 3 * 8  # after steps 3, 6 and 8


@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_asked_to_stop_saves_ends_without_done_and_goes_on_to_the_bit(zero: int, tmp_path: Path) -> None:
    steps = ["stages.*.steps=8"]
    whole = train(tmp_path / "whole", 2, zero, overrides=steps)
    stopped = train(tmp_path / "cut", 2, zero, overrides=steps, stop_at=3)
    assert stopped["steps"] == [1, 2, 3]
    assert newest(tmp_path / "cut/first").name == "step_00000003"
    assert not (tmp_path / "cut/STOP").exists()
    assert not (tmp_path / "cut/first/DONE").exists()
    resumed = train(tmp_path / "cut", 2, zero, overrides=steps)
    assert (tmp_path / "cut/first/DONE").exists()
    assert resumed["steps"] == whole["steps"] == list(range(1, 9))
    for seen in ("loss", "grad_norm", "averaged", "digests"):
        assert resumed[seen] == whole[seen], seen


def test_a_run_asked_to_stop_at_its_last_step_is_done_and_the_next_stage_stops(tmp_path: Path) -> None:
    report = train(tmp_path, 2, 1, overrides=["stages.*.steps=2"], stages=("first", "second"), stop_at=2)
    assert (tmp_path / "first/DONE").exists()
    assert report["by_stage"]["second"]["steps"] == [1]


def test_a_checkpoint_in_which_idle_weights_were_trained_is_gone_on_from(one_rank: dict[str, Any], tmp_path: Path) -> None:
    """As such checkpoints were written before: with moments and averages, and decayed."""
    shutil.copytree(one_rank["folder"] / "first", tmp_path / "first")
    (tmp_path / "first/DONE").unlink()
    folder = newest(tmp_path / "first")
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = load_file(folder / manifest["files"][0]["name"])
    decayed = [name for name, (_, trained) in manifest["parameters"].items() if not trained]
    assert decayed
    for name in decayed:
        manifest["parameters"][name][1] = True
        weight = tensors[f"weight:{name}"].mul_(0.9)
        tensors |= {f"{kind}:{name}": torch.zeros_like(weight) for kind in MOMENTS}
        tensors |= {f"ema.{profile}:{name}": weight / 0.95 for profile in manifest["ema"]}
    ranges = manifest["files"][0]["extents"]
    entry = write_rank_file(folder, 0, tensors, {})
    file = {"name": entry.name, "bytes": entry.bytes, "sha256": entry.sha256, "ranges": ranges}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 1, "files": [file]}))
    resumed = train(tmp_path, 1, 0, overrides=["stages.*.steps=5"])
    assert resumed["steps"] == [1, 2, 3, 4, 5]
    reader = CheckpointReader(newest(tmp_path / "first"))
    for name in decayed:
        assert torch.equal(reader.read_whole("weight", name).flatten(), tensors[f"weight:{name}"])


@pytest.mark.slow
def test_zero3_on_one_rank_goes_on_where_two_stopped(tmp_path: Path) -> None:
    overrides = ["stages.*.steps=8"]
    uninterrupted = train(tmp_path / "whole", 2, 3, overrides=overrides)
    train(tmp_path / "cut", 2, 3, overrides=["stages.*.steps=5"])
    assert_same_curve(train(tmp_path / "cut", 1, 3, overrides=overrides), uninterrupted)


def test_the_frozen_part_stays_as_the_averaged_weights_of_the_stage_before(zero3: dict[str, Any]) -> None:
    first = CheckpointReader(newest(zero3["folder"] / "first"))
    second = CheckpointReader(newest(zero3["folder"] / "second"))
    moved, trained = 0, 0
    for name, (_, was_trained) in second.manifest.parameters.items():
        if was_trained:
            trained += 1
            continue
        assert torch.equal(second.read_whole("weight", name), first.read_whole("ema.main", name)), name
        moved += not torch.equal(first.read_whole("ema.main", name), first.read_whole("weight", name))
    assert moved > 0
    assert trained > 0


def test_new_parameters_must_be_declared(zero3: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(zero3["folder"] / "first", tmp_path / "first")
    report = train(tmp_path, 1, 0, stages=("second",), overrides=["stages.second.initialise.new=[]"])
    assert "lacks towers.text.0" in report["error"]
    assert "initialise.new" in report["error"]


def test_averaged_weights_sample_alike_under_zero3_and_in_one_process(zero3: dict[str, Any]) -> None:
    report = zero3["third"]
    assert report["masters_restored"]
    noised, readout = probe_input()
    for weights, key in (("ema", "averaged"), ("raw", "trained")):
        module = load(str(newest(zero3["folder"] / "third")), weights).module
        with torch.no_grad():
            expected = module(noised, readout)["image"].flatten()[:64]
        torch.testing.assert_close(torch.tensor(report[key]), expected, rtol=1e-4, atol=1e-5)
    assert report["averaged"] != report["trained"]


def test_a_damaged_file_stops_all_ranks_with_one_sentence(zero3: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(zero3["folder"] / "first", tmp_path / "first")
    path = newest(tmp_path / "first") / "rank_00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 0xFF
    path.write_bytes(bytes(damaged))
    report = train(tmp_path, 2, 3, overrides=["stages.*.steps=8"])
    assert "rank_00001.safetensors is damaged" in report["error"]
    assert "\n" not in report["error"]
    assert json.dumps(report["error"])


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before_it(tmp_path: Path) -> None:
    overrides = ["stages.*.checkpoint={every_steps: 2, keep: 9}", "stages.*.steps=6"]
    whole = train(tmp_path / "whole", 2, 1, overrides=overrides)
    stopped = train(tmp_path / "cut", 2, 1, overrides=overrides, stop_at=4)
    assert stopped["steps"] == [1, 2, 3, 4]
    path = newest(tmp_path / "cut/first") / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    resumed = train(tmp_path / "cut", 2, 1, overrides=overrides)
    assert resumed["loss"] == whole["loss"]
    assert resumed["digests"] == whole["digests"]
    incidents = [json.loads(line) for line in (tmp_path / "cut/incidents.jsonl").read_text().splitlines()]
    assert [(each["kind"], each["step"]) for each in incidents] == [("start", 0), ("stop", 4), ("damaged", 0), ("resume", 2)]
    assert "rank_00001.safetensors has" in incidents[2]["detail"]
    again = CheckpointReader(path.parent)
    assert not again.damaged(again.manifest.files)


@pytest.fixture(scope="module")
def with_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of numbered samples that carry features of 16 tokens with 6 numbers each."""
    folder = tmp_path_factory.mktemp("features")
    members = {}
    for number in range(32):
        buffer = io.BytesIO()
        np.save(buffer, np.random.default_rng(number).normal(size=(16, 6)).astype(np.float16))
        members[number] = {**sample(number), "dino.npy": buffer.getvalue()}
    members[5].pop("dino.npy")  # one sample cannot be read
    return Path(write_source(folder, [16, 16], members))


def test_a_stage_aligns_with_features_of_its_shards_alike_on_one_rank_and_under_zero3(with_features, tmp_path):
    overrides = [
        f"data.train={with_features}",
        "data.features={image: dino.npy}",
        "data.block_shards=1",
        "stages.first.alignment={modality: image, block: 0, features: 6, weight: 0.5}",
        "stages.first.steps=3",
        "stages.second.initialise={source: previous, new: [text], dropped: [alignment]}",
        "stages.second.steps=1",
    ]
    reference = train(tmp_path / "one", 1, 0, overrides=overrides, stages=("first", "second"))
    assert "error" not in reference
    shared = train(tmp_path / "shared", 2, 3, overrides=overrides, zero_options=PARTITION_ALL)
    assert_same_curve(shared, reference["by_stage"]["first"])
    rows = [json.loads(line) for line in (tmp_path / "one/first/metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["losses"]["alignment"] < 2 for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["losses"]["image"] + 0.5 * row["losses"]["alignment"], rel=1e-5)
    assert load(str(newest(tmp_path / "one/first"))).predicted == ("image",)  # sampling does not need the projection


def test_the_true_bound_of_tokens_is_reported_with_every_step(one_rank):
    rows = [json.loads(line) for line in (one_rank["folder"] / "third/metrics.jsonl").read_text().splitlines()]
    assert all(row["nelbo"]["text"] > 0 for row in rows)
    assert all("image" not in row["nelbo"] for row in rows)
