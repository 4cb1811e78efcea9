"""The command line: exit codes, one sentence per mistake, no torch where none is needed."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadiff.cli import check_config
from megadiff.cli import main as cli
from megadiff.config.schema import Sampling
from tests.cli.mistakes import mistake
from tests.minimal import ZERO3, tree, write_json, write_yaml
from tests.ranks import run_megadiff

ROOT = Path(__file__).parents[2]


def test_check_config_prints_a_column_per_stage(run_file: str, json_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", run_file, "--deepspeed", json_file]) == 0
    out = capsys.readouterr().out
    rows = {line[:20].strip(): line.split()[-2:] for line in out.splitlines()[2:-2]}
    assert rows["stage"] == ["first", "second"]
    assert rows["x data ranks"] == ["2", "2"]
    assert rows["x accumulation"] == ["2", "2"]
    assert rows["ZeRO stage"] == ["3", "3"]
    assert rows["precision"] == ["fp32", "fp32"]
    assert rows["bubble"] == ["0.0%", "0.0%"]
    assert "stage 0: embed, joint" in out


def test_check_config_json_holds_the_resolved_run_and_the_derived_numbers(
    run_file: str, json_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check-config", run_file, "--deepspeed", json_file, "--ranks", "4", "--json", "stages.*.steps=10"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [stage["steps"] for stage in report["run"]["stages"]] == [10, 10]
    assert report["deepspeed"]["second"]["gradient_accumulation_steps"] == 1
    second = report["stages"][1]
    assert sum(second["parameters"][kind] for kind in ("trained", "idle", "frozen")) == second["parameters"]["total"]
    assert second["batch"]["data_ranks"] == 4
    assert second["tokens_per_sample"]["total"] == 8 + 4
    assert second["flops_per_sample"] > 0
    assert [stage["ranks"] for stage in second["layout"]["pipeline_stages"]] == [[[0], [1], [2], [3]]]
    assert second["layout"]["bytes_per_rank"]["total"] > second["layout"]["bytes_per_rank"]["weights"] > 0


def test_check_config_and_dry_run_import_no_torch(run_file: str, json_file: str, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"  # an import of either then fails
        "from megadiff.cli.main import main\n"
        f"assert main(['check-config', {run_file!r}, '--deepspeed', {json_file!r}, '--json']) == 0\n"
        f"assert main(['launch', {run_file!r}, '--deepspeed', {json_file!r}, '--dry-run']) == 0\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'numpy', 'transformers', 'obstore', 'PIL', 'matplotlib'}\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_after_options(run_file: str, json_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [run_file, "seed=5", "--deepspeed", json_file, "--dry-run"],
        [run_file, "--deepspeed", json_file, "--dry-run", "seed=5"],
        ["--deepspeed", json_file, run_file, "seed=5", "--dry-run", "name=other"],
    ):
        parsed = cli.parse(["launch", *arguments])
        assert parsed.overrides[0] == "seed=5"
    assert parsed.overrides == ["seed=5", "name=other"]


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"sead": 1}, [], "unknown key sead; did you mean seed?"),
        ({}, ["stages.second.stepps=3"], "did you mean steps?"),
        (
            {},
            ["stages.*.batch.micro_batch=3"],
            "must be a multiple of micro_batch (3) x data ranks (2) = 6; nearest: 12 or 18",
        ),
        ({}, ["data.lanes=1"], "data.lanes (1) must be a multiple of the data ranks (2)"),
        ({}, ["seed"], "must look like a.b=value"),
    ],
)
def test_a_mistake_in_the_run_is_one_sentence(
    tmp_path: Path,
    json_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = str(write_yaml(tmp_path / "run.yaml", tree(**changes)))
    for verb in (["check-config", path], ["launch", path, "--deepspeed", json_file]):
        assert said in mistake(capsys, *verb, *overrides)


def test_a_mistake_in_the_json_is_one_sentence(run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"bf16": {"enabled": "auto"},}')
    fp16 = str(write_json(tmp_path / "fp16.json", {"fp16": {"enabled": True}}))
    twice = str(write_json(tmp_path / "twice.json", {**ZERO3, "train_batch_size": 7}))
    assert "line 1" in mistake(capsys, "launch", run_file, "--deepspeed", str(broken))
    assert "bf16 or fp32" in mistake(capsys, "check-config", run_file, "--deepspeed", fp16)
    assert "stages.first.batch.global_samples" in mistake(capsys, "launch", run_file, "--deepspeed", twice, "--dry-run")
    assert "does not exist" in mistake(capsys, "launch", run_file, "--deepspeed", "nowhere.json")


def test_missing_files_are_a_mistake_for_launch_and_a_note_for_a_dry_run(
    run_file: str, json_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.json").unlink()
    assert "data.train" in mistake(capsys, "launch", run_file, "--deepspeed", json_file)
    assert cli.main(["launch", run_file, "--deepspeed", json_file, "--dry-run"]) == 0
    assert "megadiff: note: not there yet: data.train" in capsys.readouterr().err


def test_an_unknown_stage_is_named_before_torch_is_imported(
    run_file: str, json_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake(capsys, "train", run_file, "--stage", "third", "--deepspeed", json_file)
    assert "no stage third; its stages: first, second" in said


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["lunch"],
        ["launch"],
        ["launch", "run.yaml"],
        ["launch", "run.yaml", "--deepspeed", "x.json", "--nonsense"],
        ["check-config", "run.yaml", "--ranks", "0"],
        ["sample", "--checkpoint", "x", "--task", "joint"],
        ["sample", "--checkpoint", "x", "--task", "joint", "--out", "y", "left over"],
        ["data"],
        ["data", "emoji", "--sets", "noto,nato", "out"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: megadiff" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    [[], *([verb.__name__.rsplit(".")[-1].replace("_", "-")] for verb in cli.VERBS), ["data", "emoji"], ["data", "index"]],
)
def test_every_verb_has_help_with_a_description(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {' '.join(['megadiff', *verb])}")
    assert max(map(len, out.splitlines())) <= 128


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "text-to-image"], "--task text-to-image needs a condition: --prompt TEXT"),
        (["--task", "joint", "--prompt", "cat"], "makes everything from nothing; leave out --prompt, or vary"),
        (["--task", "text-to-image", "--prompt", "cat", "--data", "m.json"], "--prompt and --data exclude each other"),
        (["--task", "picture"], "write GIVEN-to-WANTED"),
        (["--task", "joint", "--guidance-interval", "0.8", "0.3"], "guidance_interval (0.8, 0.3) must be (lower, upper)"),
        (["--task", "joint", "--guidance", "-1"], "--guidance -1.0: Input should be greater than or equal to 0"),
        (
            ["--task", "joint", "--guidance-final-time", "2"],
            "--guidance-final-time 2.0: Input should be less than or equal to 1",
        ),
        (["--task", "joint", "--solver", "rk4"], "--solver rk4: Input should be 'euler', 'heun'"),
        (["--task", "joint", "--remask", "cap", "--order", "confidence"], "remask goes with the ancestral order"),
        (["--task", "joint", "--preset", "mine"], "--preset mine is unknown; known: paper-t2i, paper-joint"),
        (["--task", "joint", "--guide", "runs/y"], "--guide RUN and --autoguidance V go together"),
        (["--task", "joint", "--grid-shift", "2"], "--grid-shift goes with --grid shifted, and has no effect without"),
        (["--task", "joint", "--threshold", "0.5"], "--threshold goes with --order threshold"),
        (["--task", "joint", "--order-noise", "1"], "order_noise goes with the confidence, entropy and margin orders"),
        (["--task", "joint", "--remask-strength", "0.1"], "--remask-strength goes with --remask cap or conf or loop"),
        (["--task", "joint", "--guidance-interval", "0.3", "0.8"], "go with a --guidance other than 1"),
        (["--task", "joint", "--resample", "3"], "--resample has no effect on --task joint; leave it out"),
        (["--task", "joint", "--condition-time", "0.5"], "--condition-time has no effect on --task joint"),
        (["--task", "inpaint", "--text", "a ___", "--limit-context-len", "3"], "--limit-context-len has no effect on"),
        (["--task", "text-to-image", "--prompt", "a", "--blank-tokens", "3"], "--blank-tokens has no effect on"),
        (["--task", "impute"], "--task impute and --table FILE.csv go together"),
        (["--task", "joint", "--mask-image", "m.png"], "--mask-image goes with --task inpaint"),
        (["--task", "inpaint", "--text", "a ___", "--text", "b"], "takes one --image, one --text"),
        (["--task", "joint", "--image", "a.png", "--strength", "2"], "--strength 2 must lie between 0 and 1"),
        (["--task", "joint", "--seed", "-1"], "--seed -1 must be"),
    ],
)
def test_flags_of_sample_that_do_not_go_together_are_named(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in mistake(capsys, "sample", "--checkpoint", "runs/x", "--out", "out", *flags)


def test_the_flags_of_sample_are_the_fields_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadiff.generation import generate
    from megadiff.generation.request import GenerateRequest

    seen: list[GenerateRequest] = []
    monkeypatch.setattr(generate, "generate", seen.append)
    assert cli.main(["sample", "--checkpoint", "x", "--task", "joint", "--out", "y"]) == 0
    assert seen.pop() == GenerateRequest(checkpoint="x", task="joint", out="y")
    flags = ["--preset", "paper-t2i", "--guidance", "2", "--top-p", "0.5", "--prompt", "cat"]
    assert cli.main(["sample", "--checkpoint", "x", "--task", "text-to-image", "--out", "y", *flags]) == 0
    (asked,) = seen
    assert (asked.prompt, asked.repeat_prompt) == (("cat",), True)
    sampling = asked.sampling
    assert (sampling.guidance, sampling.guidance_interval, sampling.top_p) == (2.0, (0.3, 0.8), 0.5)
    assert (sampling.order, sampling.grid, sampling.steps) == ("tau_leaping", "paper", 50)


def test_python_m_megadiff_is_the_same_command_and_a_closed_pipe_is_quiet(run_file: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megadiff", "check-config", run_file, "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def code_of(arguments: list[str]) -> object:
    """The exit code, whether the verb returns it or argparse ends the program."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "train", "x.yaml"], "launch starts train by RUN.yaml and --deepspeed, not after --"),
        (
            ["run.yaml", "--", "data", "verify", "x"],
            "before -- only --processes N may stand, or --cluster CLUSTER.yaml and --dry-run",
        ),
        (["--processes", "2", "run.yaml", "--deepspeed", "x.json"], "--processes is of a verb after --"),
        ([], "give RUN.yaml and --deepspeed DS.json, or -- and another verb"),
    ],
)
def test_launch_says_what_may_stand_where(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert code_of(["launch", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.distributed
def test_launch_runs_another_verb_as_several_processes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["launch", "--processes", "2", "--", "data", "verify", str(tmp_path)]) == 2
    assert capfd.readouterr().err.count("manifest.json cannot be read") == 1


@pytest.mark.parametrize("verb", [["check-config"], ["launch", "--dry-run"]])
def test_alignment_over_buckets_of_other_sizes_is_one_mistake_before_anything_is_read(
    run_file: str, json_file: str, tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    aligned = ["stages.first.alignment={modality: image, block: 0, features: 6}", "data.features={image: features.npy}"]
    command = [verb[0], run_file, *(["--deepspeed", json_file] if verb[1:] else []), *verb[1:]]
    for address in (tmp_path / "set", f"file://{tmp_path}/set/manifest.json"):
        for buckets, fits in ((["8x8", "16x4"], True), ([], True), ([None, "x", 3], True), (["8x8", "16x8"], False)):
            shards = [{"name": "a", "samples": 1, "bytes": 1, "sha256": "", "bucket": bucket} for bucket in buckets]
            tree = {"format": "megadiff-shards", "version": 1, "shards": shards}
            (tmp_path / "set/manifest.json").write_text(json.dumps(tree))
            arguments = [*command, *aligned, f"data.train={address}"]
            if fits:
                assert cli.main(arguments) == 0
                capsys.readouterr()
            else:
                said = mistake(capsys, *arguments)
                assert "has buckets (16x8: 8 features a sample), and alignment takes 4 of image" in said
                assert cli.main([*command, f"data.train={address}"]) == 0
                capsys.readouterr()


# ------------------------------------------------------------------------------------------------------------ a full disk


# ---------------------------------------------------------------------------------------------------------- no memory


# ------------------------------------------------------------------------------------------------------------- examples


def test_every_file_of_ours_that_an_example_names_is_there() -> None:
    texts = [cli.EXAMPLES]
    parsers = [cli.parser()]
    while parsers:
        parser = parsers.pop()
        texts.append(parser.epilog or "")
        for action in parser._actions:
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    named = set(re.findall(r"(?:configs|ds_configs|examples|tests)/[\w./-]+", " ".join(texts)))
    assert {"configs/run/quickstart.yaml", "ds_configs/zero3.json"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_examples_of_check_config_are_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("configs", "ds_configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)  # one of them writes a picture
    for line in check_config.EXAMPLES.splitlines():
        assert cli.main(line.split()[1:]) == 0, line
    assert capsys.readouterr().err == ""


def test_every_field_of_sampling_is_a_flag_with_its_text() -> None:
    shown = " ".join(run_megadiff("sample", "--help").stdout.split())
    for name, field in Sampling.model_fields.items():
        assert field.description, f"{name} has no text"
        first_words = " ".join(field.description.split())[1:30].removesuffix(".")
        assert f"--{name.replace('_', '-')} " in shown
        assert first_words in shown


def test_a_size_on_the_command_line_wins_over_the_json_and_one_that_cannot_be_is_refused(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {**ZERO3, "zero_optimization": {"stage": 1}, "pipeline": {"stages": 2}}
    pipeline = str(write_json(tmp_path / "pipeline.json", tree))
    assert cli.main(["launch", run_file, "--deepspeed", pipeline, "--dry-run"]) == 0
    assert "as 2 pipeline stages" in capsys.readouterr().out
    plain = ["launch", run_file, "--deepspeed", pipeline, "--dry-run", "--pipeline-stages", "1"]
    assert cli.main([*plain, "--tensor-parallel", "2"]) == 0
    assert "as 2 tensor ranks" in capsys.readouterr().out
    assert "2 ranks cannot be 3 pipeline stages" in mistake(capsys, *plain[:-1], "3")
    assert "a multiple of the tensor-parallel ranks (4)" in mistake(
        capsys,
        "check-config",
        run_file,
        "--deepspeed",
        pipeline,
        "--pipeline-stages",
        "1",
        "--tensor-parallel",
        "4",
        "--ranks",
        "4",
    )
