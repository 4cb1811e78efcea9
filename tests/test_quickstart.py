"""The quickstart's own configuration from launch to samples, on a few steps: real processes, real data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ranks import LAUNCH_S, finish, fork_megadiff, free_port, run_megadiff, start_python

pytestmark = pytest.mark.distributed

FEW = [
    "stages.*.steps=2",
    "stages.*.log_every_steps=1",
    "stages.*.held_out_loss.pairs=2",
    "stages.*.samples.every_steps=2",
    "stages.*.samples.count=2",
    "stages.*.samples.sampling.steps=2",
    "showcase.sampling.steps=2",
    "showcase.count=2",
    "showcase.gap_pairs=16",
]


Command = Callable[..., subprocess.CompletedProcess[str]]
"""What runs a command line of megadiff to its end: a process as a user starts it, one that is forked, or several."""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as two ranks of torchrun."""
    runner = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return finish(start_python("-m", *runner, "-m", "megadiff", *arguments))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    overrides = [f"folder={folder}", *FEW]
    command = ("launch", "configs/run/quickstart.yaml", "--deepspeed", "ds_configs/zero3.json", *overrides)
    return folder, run_megadiff(*command, timeout_s=3 * LAUNCH_S)  # three launches of ranks, and the samples


def test_three_stages_end_in_a_sheet_a_gap_and_a_log(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = launched
    # After two steps a stage the conditions are not used yet, and the launcher says so by its exit code.
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-4000:]
    for stage in ("noisy_text_to_image", "text_tower", "joint"):
        assert (folder / stage / "DONE").exists()
        assert len((folder / stage / "metrics.jsonl").read_text().splitlines()) == 2
        assert list((folder / "tensorboard" / stage).iterdir())
        assert f"{stage}: evaluation has taken" in done.stdout + done.stderr
    curves = [json.loads(line)["name"] for line in (folder / "joint/results.jsonl").read_text().splitlines()]
    assert {"held-out image/t 0.500 absent ema", "held-out text/NELBO given ema"} <= set(curves)
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 100
    for direction in ("image given text", "text given image"):
        assert f"conditioning gap, {direction}" in done.stdout
    assert "tensorboard --logdir" in done.stdout


def test_stage_one_reads_text_without_predicting_it_and_stage_two_adds_it(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = launched
    losses = {
        stage: set(json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[0])["losses"])
        for stage in ("noisy_text_to_image", "text_tower", "joint")
    }
    assert losses == {"noisy_text_to_image": {"image"}, "text_tower": {"text", "image"}, "joint": {"text", "image"}}


def sampled(folder: Path, out: Path, *flags: str, by: Command = fork_megadiff) -> list[dict[str, object]]:
    done = by("sample", "--checkpoint", str(folder), "--steps", "3", "--out", str(out), *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (out / "sheet.png").exists()
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


@pytest.mark.slow
def test_a_seed_gives_the_same_samples_in_any_batch_and_on_any_number_of_processes(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = launched
    flags = ["--task", "joint", "-n", "5", "--seed", "7"]
    whole = sampled(folder, tmp_path / "whole", *flags, by=run_megadiff)
    for name, split in {
        "batches": sampled(folder, tmp_path / "batches", *flags, "--batch", "2"),
        "processes": sampled(folder, tmp_path / "processes", *flags, by=torchrun),
    }.items():
        assert split == whole
        for record in whole:
            picture = record["generated"]["image"]["picture"]  # type: ignore[index]
            assert np.abs(pixels(tmp_path / "whole" / picture) - pixels(tmp_path / name / picture)).max() <= 1
    few = sampled(folder, tmp_path / "few", *flags[:3], "1", *flags[4:], by=partial(fork_megadiff, world=2))
    assert few == whole[:1], "one sample on two processes: one of them has nothing to do"
    other = sampled(folder, tmp_path / "other", *flags[:-1], "8")
    assert [r["generated"] for r in other] != [r["generated"] for r in whole]


def test_an_export_samples_as_its_run_does_and_takes_every_kind_of_condition(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = launched
    export = tmp_path / "export"
    assert fork_megadiff("export", str(folder), str(export)).returncode == 0
    again = fork_megadiff("export", str(folder), str(export))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"cat": "black cat", "sun": "sun"}))
    flags = ["--task", "text-to-image", "--prompts", str(prompts), "--guidance", "2", "--limit-context-len", "3"]
    from_run = sampled(folder, tmp_path / "run", *flags)
    from_export = sampled(export, tmp_path / "exported", *flags)
    assert from_run == from_export
    assert [record["name"] for record in from_run] == ["000000-cat", "000001-sun"]
    assert (pixels(tmp_path / "run" / "000000-cat.image.png") == pixels(tmp_path / "exported" / "000000-cat.image.png")).all()
    picture = tmp_path / "run" / "000000-cat.image.png"
    captions = sampled(export, tmp_path / "captions", "--task", "image-to-text", "--image", str(picture), "-n", "2")
    assert len(captions) == 2
    held_out = sampled(export, tmp_path / "data", "--task", "image-to-text", "--data", "examples/emoji32/held_out", "-n", "3")
    assert all("text" in record["generated"] for record in held_out)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--task", "text-to-image"], "needs a condition"),
        (["--task", "sound-to-image", "--prompt", "x"], "it can do: image-to-text, text-to-image, joint"),
        (["--task", "image-to-text", "--image", "README.md"], "cannot be read as a picture"),
        (["--task", "text-to-image", "--prompts", "README.md"], "is not JSON"),
        (["--task", "text-to-image", "--prompts", "none.json"], "cannot be read"),
    ],
)
def test_a_mistake_in_sampling_is_one_sentence(
    launched: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, flags: list[str], reason: str
) -> None:
    folder, _ = launched
    done = fork_megadiff("sample", "--checkpoint", str(folder), "--out", str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_without_weights_is_one_sentence(tmp_path: Path) -> None:
    done = fork_megadiff("sample", "--checkpoint", str(tmp_path), "--task", "joint", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "is neither a run" in done.stderr
