"""`megadiff evaluate`: pictures and references in every form; drawing and scoring, killed and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megadiff import torchvision_ops
from megadiff.cli import main as cli
from megadiff.config.errors import UserError
from megadiff.data.shards.shard import Manifest, Shard, read_manifest, write_manifest, write_shard
from megadiff.evaluation.distances import Moments, frechet_distance
from megadiff.evaluation.evaluate import EvaluateRequest, evaluate
from megadiff.evaluation.features import Extractor
from megadiff.evaluation.results import RESULTS, read_results
from tests.evaluation.networks import stand_in_inception, tiny_clip

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
HELD_OUT = str(ROOT / "examples/emoji32/held_out")
LITE = {"features": "effnet-lite0"}


def write_pictures(folder: Path, count: int = 12, seed: int = 0, size: tuple[int, int] = (20, 20)) -> Path:
    folder.mkdir(parents=True)
    chance = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    return write_pictures(tmp_path / "generated"), write_pictures(tmp_path / "reference", seed=1)


def ask(source: Path | str, *metrics: str, **fields: Any) -> dict[str, float]:
    request = EvaluateRequest(**{"source": str(source), "metrics": metrics, "out": str(source), **fields})
    return {metric.name: metric.value for metric in evaluate(request)}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_fid_of_two_folders_is_clean_fids(sides, tmp_path, capsys):
    torchvision_ops.declare_missing()
    from cleanfid.fid import get_folder_features, kernel_distance
    from cleanfid.inception_torchscript import InceptionV3W

    weights = stand_in_inception(tmp_path / "inception-2015-12-05.pt")
    command = ["evaluate", str(sides[0]), "--reference", str(sides[1]), "--metrics", "fid,kid", "--inception", str(weights)]
    assert cli.main(command) == 0
    network = InceptionV3W(str(tmp_path), download=False)
    options = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    features = [get_folder_features(str(side), network, **options).astype(np.float64) for side in sides]
    found = read_results(sides[0] / RESULTS)
    np.random.seed(0)
    assert found["KID"].value == pytest.approx(kernel_distance(*features), rel=1e-6)
    # On the same features; test_distances.py holds this function to clean-fid's, which takes minutes for 2048 of them.
    assert found["FID"].value == pytest.approx(frechet_distance(*map(Moments.of, features)), rel=1e-6)
    assert found["FID"].depends["rank_deficient"]
    printed = capsys.readouterr().out
    assert "FID: " in printed
    assert "of 12 and 12 pictures: no more on one side than the network has features" in printed


def test_shards_a_folder_and_saved_statistics_of_the_same_pictures_are_the_same_reference(sides, tmp_path):
    samples = {path.stem: {"png": path.read_bytes(), "txt": b"a"} for path in sorted(sides[1].iterdir())}
    shards = str(tmp_path / "shards")
    write_manifest(shards, Manifest((write_shard(shards, "0.tar", samples),)))
    names = ("fd", "kd", "precision-recall", "density-coverage")
    of_folder = ask(sides[0], *names, reference=str(sides[1]), save_statistics=str(tmp_path / "kept/reference.npz"), **LITE)
    assert set(of_folder) == {f"{metric}-EffNetLite0" for metric in ("FD", "KD", "precision", "recall", "density", "coverage")}
    assert ask(sides[0], *names, reference=shards, **LITE) == of_folder
    assert ask(sides[0], *names, reference=str(tmp_path / "kept/reference.npz"), **LITE) == of_folder
    with np.load(tmp_path / "kept/reference.npz") as file:
        np.savez(tmp_path / "clean-fid.npz", mu=file["mu"], sigma=file["sigma"])
    moments_alone = ask(sides[0], "fd", reference=str(tmp_path / "clean-fid.npz"), **LITE)
    assert moments_alone["FD-EffNetLite0"] == pytest.approx(of_folder["FD-EffNetLite0"], rel=1e-9)
    with pytest.raises(
        UserError, match="kd needs the reference's features, and its file has mu and sigma only: take fid or fd"
    ):
        ask(sides[0], "kd", reference=str(tmp_path / "clean-fid.npz"), **LITE)


def test_statistics_of_other_features_are_refused(sides, tmp_path):
    kept = tmp_path / "kept.npz"
    ask(sides[0], "fd", reference=str(sides[1]), save_statistics=str(kept), **LITE)
    weights = str(stand_in_inception(tmp_path / "inception.pt"))
    with pytest.raises(UserError, match="holds statistics of other features \\(features: EffNetLite0, now Inception\\)"):
        ask(sides[0], "fid", reference=str(kept), weights={"inception": weights})
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match="holds 7 features a picture, and EffNetLite0 gives 1280"):
        ask(sides[0], "fd", reference=str(tmp_path / "narrow.npz"), **LITE)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"is no \.npz with mu and sigma"):
        ask(sides[0], "fd", reference=str(tmp_path / "text.npz"), **LITE)


def test_a_changed_picture_is_computed_again_and_others_are_not(sides, monkeypatch):
    before = ask(sides[0], "fd", reference=str(sides[1]), **LITE)
    calls = []

    def count(self: Any, pictures: Any) -> Any:
        calls.append(len(pictures))
        return original(self, pictures)

    original = Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", count)
    assert ask(sides[0], "fd", reference=str(sides[1]), **LITE) == before
    assert calls == []
    Image.new("RGB", (20, 20), "red").save(sides[0] / "00.png")
    assert ask(sides[0], "fd", reference=str(sides[1]), **LITE) != before
    assert calls == [12]


def test_a_square_reference_is_cropped(tmp_path):
    tall = write_pictures(tmp_path / "tall", size=(20, 30))
    cropped = tmp_path / "cropped"
    cropped.mkdir()
    for path in tall.iterdir():
        Image.open(path).crop((0, 5, 20, 25)).save(cropped / path.name)
    metric = {"reference": str(tall), **LITE}
    assert ask(cropped, "fd", square=True, **metric)["FD-EffNetLite0"] == pytest.approx(0, abs=1e-6)
    assert ask(cropped, "fd", **metric)["FD-EffNetLite0"] > 0.1


@pytest.mark.parametrize(
    ("metrics", "fields", "message"),
    [
        (("ifd",), {}, "--metrics ifd is unknown; known: fid, "),
        (("fd",), {"features": "vgg"}, "--features vgg is unknown; known: inception, "),
        (("kd",), {}, "kd needs --reference"),
        (("fid", "fd"), {"reference": "r", "save_statistics": "s.npz", **LITE}, "--save-statistics is for"),
        (("fd",), {"reference": "r.npz", "square": True}, "--square crops"),
        (("fd",), {"reference": "r", "weights": {"clip": "c"}, **LITE}, "--clip has no effect on fd"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_computed(metrics, fields, message):
    with pytest.raises(UserError, match=message):
        ask("nowhere", *metrics, **fields)


def test_sources_that_hold_no_pictures_are_named(sides, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    for source, message in (("none", "is no folder"), ("empty", "holds no pictures"), ("broken", "a.png .* cannot be read")):
        with pytest.raises(UserError, match=message):
            ask(tmp_path / source, "fd", reference=str(sides[1]), **LITE)
    assert cli.main(["evaluate", str(sides[0]), "--metrics", "fd", "--steps", "3"]) == 2


def test_results_that_differ_in_what_they_depend_on_are_said_not_to_compare(sides, tmp_path, capsys):
    command = ["evaluate", str(sides[0]), "--metrics", "fd", "--features", "effnet-lite0", "--reference"]
    assert cli.main([*command, str(sides[1])]) == 0
    earlier = tmp_path / "earlier.json"
    (sides[0] / RESULTS).rename(earlier)
    assert cli.main([*command, str(sides[1]), "--against", str(earlier)]) == 0
    assert "earlier.json: FD-EffNetLite0 " in (printed := capsys.readouterr().out)
    assert "DOES NOT COMPARE" not in printed
    other = write_pictures(tmp_path / "other", count=11, seed=2)
    assert cli.main([*command, str(other), "--against", str(earlier)]) == 0
    assert "DOES NOT COMPARE: reference_pictures_hash: " in (printed := capsys.readouterr().out)
    assert "reference_count: 12, now 11" in printed


DRAW = ("--task", "text-to-image", "--data", HELD_OUT, "-n", "24", "--batch", "4", "--steps", "3", "--seed", "5")
SCORE = ("--metrics", "fd,kd", "--features", "effnet-lite0", "--reference")


def draw_and_score(exported: Path, reference: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megadiff", "evaluate", str(exported), *DRAW, *SCORE, str(reference), "--out", str(out)]
    command += more
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def test_a_network_is_drawn_from_and_scored_with_all_that_its_numbers_depend_on(exported, sides, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["evaluate", str(exported), *DRAW, *SCORE, str(sides[1]), "--out", str(out)]) == 0
    found = read_results(out / RESULTS)
    depends = found["FD-EffNetLite0"].depends
    expected = {"drawn.seed": 5, "drawn.sampling.steps": 3, "drawn.weights": "ema", "count": 24, "reference_count": 12}
    assert {name: depends[name] for name in expected} == expected
    hashes = ("drawn.weights_hash", "pictures_hash", "reference_pictures_hash", "features_hash")
    assert all(len(depends[name]) == 64 for name in hashes)
    assert depends["resize"] == "clean-fid bicubic 224 px"
    capsys.readouterr()
    # The folder of samples is scored without its sheet and without a network.
    assert cli.main(["evaluate", str(out), *SCORE, str(sides[1])]) == 0
    assert read_results(out / RESULTS) == found


def test_captions_and_pairs_are_scored_and_so_is_the_likelihood(exported, tmp_path):
    clip, out = str(tmp_path / "clip"), str(tmp_path / "out")
    tiny_clip(Path(clip))
    draw = ["--task", "image-to-text", "--data", HELD_OUT, "-n", "4", "--steps", "2", "--out", out]
    score = ["--metrics", "captions,clip-score,retrieval,likelihood", "--clip", clip, "--reference", HELD_OUT, "--pairs", "3"]
    assert cli.main(["evaluate", str(exported), *draw, *score]) == 0
    found = read_results(tmp_path / "out" / RESULTS)
    assert {"BLEU", "chrF", "CIDEr", "self-BLEU", "distinct-2", "CLIP score", "R@5 text-to-image"} <= set(found)
    assert {"NELBO text/given", "error image/absent", "likelihood gap/image t 0.75-1.00"} <= set(found)
    assert found["CIDEr"].depends["drawn.task"] == "image-to-text"
    assert found["NELBO text/given"].depends["pairs"] == 3
    assert found["CLIP score"].depends["count"] == 4
    # The folder of samples alone has the pairs; captions need the data.
    assert cli.main(["evaluate", out, "--metrics", "clip-score", "--clip", clip]) == 0
    assert read_results(tmp_path / "out" / RESULTS) == found
    assert cli.main(["evaluate", out, "--metrics", "captions"]) == 2


def first_pairs(folder: Path, count: int) -> str:
    """A manifest of the first held-out pairs of the emoji."""
    entry = read_manifest(f"{HELD_OUT}/manifest.json").shards[0]
    shard = Shard(entry.name, Path(HELD_OUT) / entry.name)
    samples = {shard.key(offset): shard.members(offset) for offset in range(count)}
    return write_manifest(str(folder), Manifest((write_shard(str(folder), "0.tar", samples),)))


def test_every_task_is_scored_by_what_applies_to_it_and_shown_on_a_page(exported, tmp_path, capsys):
    out, pairs = tmp_path / "all", first_pairs(tmp_path / "pairs", 12)
    command = ["evaluate", str(exported), "--task", "all", "--reference", pairs, "--out", str(out), "-n", "10"]
    score = ["--steps", "2", "--metrics", "kd,captions,likelihood", "--features", "effnet-lite0", "--pairs", "3"]
    assert cli.main([*command, *score]) == 0
    assert f"page: {out / 'report.html'}" in capsys.readouterr().out
    captions = {"BLEU", "chrF", "CIDEr"}
    found = {task: set(read_results(out / task / RESULTS)) for task in ("text-to-image", "image-to-text", "joint", "")}
    assert found["text-to-image"] == {"KD-EffNetLite0"}
    assert captions | {"self-BLEU", "distinct-1"} < found["image-to-text"]
    assert {"KD-EffNetLite0", "self-BLEU", "distinct-1 of references"} < found["joint"]
    assert not captions & found["joint"]
    assert {"NELBO text/given", "likelihood gap/image"} < found[""]
    page = (out / "report.html").read_text()
    headings = re.findall(r"<h2>([\w-]+):", page)
    assert sorted(headings) == ["image-to-text", "joint", "text-to-image"]
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<td>likelihood gap/image") == 2  # with its task, and by quarter of time
    assert "<td>drawn.sampling.steps</td><td>2</td><td>image-to-text, text-to-image, joint</td>" in page
    assert cli.main([*command, *score, "--data", pairs]) == 2
    assert "--task all takes its pairs from --reference" in capsys.readouterr().err


def test_the_likelihood_of_a_network_draws_nothing(exported, tmp_path):
    command = ["evaluate", str(exported), "--metrics", "likelihood", "--reference", HELD_OUT, "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--pairs", "2"]) == 0
    assert not (tmp_path / "out/samples.jsonl").exists()
    assert cli.main([*command, "--steps", "3"]) == 2
    assert cli.main(["evaluate", str(tmp_path), "--metrics", "likelihood", "--reference", HELD_OUT]) == 2


def test_a_network_needs_a_task_and_a_folder(exported, capsys):
    assert cli.main(["evaluate", str(exported), *SCORE, "reference"]) == 2
    assert "say with --task what it is to draw, and with --out DIR where to" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_killed_and_gone_on_with_give_the_number_of_one_that_was_not(exported, sides, tmp_path):
    alone = draw_and_score(exported, sides[1], tmp_path / "alone")
    assert alone.wait(timeout=300) == 0
    for kill_after in (".parts/000001.json", ".pieces"):
        process = draw_and_score(exported, sides[1], tmp_path / "killed", "--processes", "2")
        while not (tmp_path / "killed" / kill_after).exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        time.sleep(2)  # its children end with it
        assert not (tmp_path / "killed" / RESULTS).exists()
    process = draw_and_score(exported, sides[1], tmp_path / "killed", "--processes", "2")
    assert process.wait(timeout=300) == 0
    found, expected = (json.loads((tmp_path / name / RESULTS).read_text())["metrics"] for name in ("killed", "alone"))
    assert [metric["depends"] for metric in found] == [metric["depends"] for metric in expected]
    assert [metric["value"] for metric in found] == pytest.approx([metric["value"] for metric in expected], rel=1e-9)
