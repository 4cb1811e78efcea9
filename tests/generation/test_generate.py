"""`megadiff sample`: what is drawn, stored, gone on with and refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pydantic import ValidationError

from megadiff.config.errors import UserError
from megadiff.config.schema import Data, Run, Sampling
from megadiff.data.shards.shard import Shard, read_manifest
from megadiff.generation import generate as module
from megadiff.generation import loading
from megadiff.generation.generate import generate
from megadiff.generation.loading import codecs_of
from megadiff.generation.planner import Planner, keys_of
from megadiff.generation.request import GenerateRequest
from megadiff.generation.tasks import draw
from megadiff.launcher.local import free_port
from megadiff.weights import loading as weights_loading
from megadiff.weights.loading import load

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
HELD_OUT = str(ROOT / "examples/emoji32/held_out")
FEW = Sampling(steps=3)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def ask(exported: Path, out: Path, **fields: Any) -> list[dict[str, Any]]:
    request = {"checkpoint": str(exported), "task": "joint", "out": str(out), "sampling": FEW, "batch": 4, **fields}
    generate(GenerateRequest(**request))
    return records(out)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int64)


def picture(path: Path, colour: str = "red") -> str:
    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), fill=colour)
    image.save(path)
    return str(path)


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (4, 4), (5, 2), (7, 3)])
def test_exactly_as_many_samples_as_asked_for(exported, tmp_path, count, batch):
    found = ask(exported, tmp_path / "out", n=count, batch=batch)
    assert [record["number"] for record in found] == list(range(count))
    assert len(list((tmp_path / "out").glob("*.image.png"))) == count
    assert (tmp_path / "out/sheet.png").exists()


def test_a_sample_is_the_same_in_any_batch_and_with_other_samples_beside_it(exported, tmp_path):
    few = ask(exported, tmp_path / "few", n=3, batch=1)
    many = ask(exported, tmp_path / "many", n=6, batch=5)
    for one, other in zip(few, many[:3], strict=True):
        assert one["generated"]["text"] == other["generated"]["text"]
        difference = pixels(tmp_path / f"few/{one['name']}.image.png") - pixels(tmp_path / f"many/{other['name']}.image.png")
        assert np.abs(difference).max() <= 1
    assert few[0]["generated"]["text"] != few[1]["generated"]["text"]
    other_seed = ask(exported, tmp_path / "seed", n=3, seed=9)
    assert other_seed[0]["generated"]["text"] != few[0]["generated"]["text"]


@pytest.mark.distributed
def test_two_processes_draw_what_one_draws(exported, tmp_path):
    alone = ask(exported, tmp_path / "alone", task="text-to-image", data=HELD_OUT, n=7, batch=2)
    command = [sys.executable, "-m", "megadiff", "sample", "--checkpoint", str(exported), "--task", "text-to-image"]
    command += ["--data", HELD_OUT, "-n", "7", "--batch", "2", "--steps", "3", "--out", str(tmp_path / "both")]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said.decode()
    both = records(tmp_path / "both")
    assert both == alone
    for record in alone:
        assert (
            pixels(tmp_path / f"both/{record['name']}.image.png") == pixels(tmp_path / f"alone/{record['name']}.image.png")
        ).all()


def test_finished_chunks_are_not_drawn_again_and_an_interrupted_one_is(exported, tmp_path, monkeypatch):
    drawn: list[int] = []
    draw = module.draw  # type: ignore[attr-defined]

    def watched(*arguments: Any, **named: Any) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(arguments[4]))
        return draw(*arguments, **named)

    monkeypatch.setattr(module, "draw", watched)
    with pytest.raises(KeyboardInterrupt):
        ask(exported, tmp_path / "out", n=10)
    assert drawn == [4, 4]
    assert not (tmp_path / "out/samples.jsonl").exists()
    drawn.clear()
    resumed = ask(exported, tmp_path / "out", n=10)
    assert drawn == [2]
    drawn.clear()
    monkeypatch.setattr(module, "draw", draw)
    assert ask(exported, tmp_path / "whole", n=10) == resumed


def test_a_folder_of_another_request_or_of_other_things_is_refused(exported, tmp_path):
    ask(exported, tmp_path / "out", n=2)
    with pytest.raises(UserError, match=r"holds samples of another request \(seed: 0, now 1\); name a new folder"):
        ask(exported, tmp_path / "out", n=2, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\); name a new folder"):
        ask(exported, tmp_path / "mine", n=2)


def test_a_file_that_changed_is_another_request(exported, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["red heart", "cat"]))
    ask(exported, tmp_path / "out", task="text-to-image", prompts=str(prompts))
    prompts.write_text(json.dumps(["blue sky", "dog"]))
    with pytest.raises(UserError, match=r"holds samples of another request \(contents: "):
        ask(exported, tmp_path / "out", task="text-to-image", prompts=str(prompts))


def test_tar_shards_hold_the_samples_and_are_listed_in_a_manifest(exported, tmp_path):
    out = tmp_path / "out"
    found = ask(exported, out, task="text-to-image", data=HELD_OUT, n=6, format="tar")
    manifest = read_manifest(str(out))
    assert [(entry.name, entry.samples) for entry in manifest.shards] == [("samples-000000.tar", 4), ("samples-000001.tar", 2)]
    assert manifest.facts["request"]["task"] == "text-to-image"
    shard = Shard("x", out / "samples-000001.tar")
    assert [shard.key(offset) for offset in range(2)] == [record["name"] for record in found[4:]]
    members = shard.members(0)
    assert set(members) == {"image.png", "json"}
    assert json.loads(members["json"]) == found[4]
    assert not list(out.glob("*.image.png"))
    assert (out / "sheet.png").exists()


def test_a_whole_data_set_is_sampled_with_each_condition_once(exported, tmp_path):
    found = ask(exported, tmp_path / "out", task="image-to-text", data=HELD_OUT, batch=64, sampling=Sampling(steps=1))
    assert len(found) == read_manifest(HELD_OUT).samples
    assert len({record["name"].partition("-")[2] for record in found}) == len(found)
    assert (tmp_path / f"out/{found[0]['name']}.image.given.png").exists()


def test_prompts_are_repeated_and_cut_as_asked(exported, tmp_path):
    """--limit-context-len takes the smaller of the two lengths."""
    common = {"task": "text-to-image", "prompt": ("a red heart on a green apple beside a blue car",), "n": 1}
    plain = ask(exported, tmp_path / "plain", **common)
    cut = ask(exported, tmp_path / "cut", **common, limit_context_len=3)
    ask(exported, tmp_path / "long", **common, limit_context_len=500)
    same = pixels(tmp_path / f"plain/{plain[0]['name']}.image.png")
    assert (same == pixels(tmp_path / f"long/{plain[0]['name']}.image.png")).all()
    assert (same != pixels(tmp_path / f"cut/{cut[0]['name']}.image.png")).any()


@pytest.mark.parametrize("order", ["ancestral", "tau_leaping", "first_hitting", "confidence", "threshold"])
@pytest.mark.parametrize("task", ["image-to-text", "joint"])
def test_a_generated_caption_ends_within_the_limit(exported, task, order):
    loaded = load(str(exported))
    space = loaded.model.modalities["text"].space
    given = () if task == "joint" else (Image.new("RGB", (32, 32)),)

    def texts(**limit: int) -> torch.Tensor:
        sampling = Sampling(steps=3, order=order)
        request = GenerateRequest("", task, "", image=given, n=2, sampling=sampling, **limit)
        (chunk,) = Planner(request, loaded, codecs_of(loaded)).chunks()
        items, conditions = chunk.load()
        with torch.no_grad():
            return draw(loaded.module, loaded.model, sampling, chunk.task, keys_of(items, 0), conditions, batch=2)["text"]

    assert (texts(limit_context_len=5)[:, 5:] == space.pad_id).all()
    assert (texts(limit_context_len=5)[:, :5] < space.vocabulary).all()
    assert (texts()[:, 5:] != space.pad_id).any()
    assert texts(limit_context_len=space.length).equal(texts())


def test_a_caption_that_is_varied_ends_within_the_limit(exported, tmp_path):
    image = (picture(tmp_path / "square.png"),)
    common = {"task": "image-to-text", "image": image, "prompt": ("a red heart " * 5,), "strength": 0.01}
    (kept,) = ask(exported, tmp_path / "kept", **common)
    (cut,) = ask(exported, tmp_path / "cut", **common, limit_context_len=4)
    assert kept["generated"]["text"]["text"].startswith(cut["generated"]["text"]["text"])
    assert len(cut["generated"]["text"]["text"]) < len(kept["generated"]["text"]["text"])


def test_captions_of_a_data_set_are_repeated_as_asked(exported, tmp_path):
    common = {"task": "text-to-image", "data": HELD_OUT, "n": 2}
    plain = ask(exported, tmp_path / "plain", **common)
    ask(exported, tmp_path / "repeated", **common, repeat_prompt=True)
    for record in plain:
        name = f"{record['name']}.image.png"
        assert (pixels(tmp_path / "plain" / name) != pixels(tmp_path / "repeated" / name)).any()


@pytest.mark.parametrize("last", ["request.json", "000002.image.png", "000000.json", "samples.jsonl", "sheet.png"])
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on_once_there_is_room(exported, tmp_path, monkeypatch, last):
    write = Path.write_bytes

    def full(path, data):
        write(path, data[:10])
        if last in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=rf"{last} cannot be written: No space left"):
            ask(exported, tmp_path / "out", n=5)
    assert [path for path in (tmp_path / "out").rglob(".*") if path.name != ".parts"] == []
    assert len(ask(exported, tmp_path / "out", n=5)) == 5


def test_a_given_picture_is_turned_and_on_white_like_those_that_training_reads(exported, tmp_path):
    image = Image.new("RGB", (32, 32), (0, 200, 0))
    image.paste("black", (0, 0, 32, 8))
    turn = Image.Exif()
    turn[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=turn, transparency=(0, 200, 0))
    ask(exported, tmp_path / "out", task="image-to-text", image=(str(tmp_path / "turned.png"),))
    (given,) = (tmp_path / "out").glob("*.image.given.png")
    assert (pixels(given)[24:] == 0).all()
    assert (pixels(given)[:24] == 255).all()


def test_a_mask_is_turned_like_the_picture_that_it_belongs_to(exported, tmp_path):
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 32, 16))
    turn = Image.Exif()
    turn[0x0112] = 3  # upside down: the lower half is to be filled in
    mask.save(tmp_path / "mask.png", exif=turn)
    image = picture(tmp_path / "red.png")
    ask(exported, tmp_path / "out", task="inpaint", image=(image,), mask_image=str(tmp_path / "mask.png"))
    kept = pixels(next((tmp_path / "out").glob("*.image.png")))
    assert (kept[:16] == pixels(Path(image))[:16]).all()
    assert (kept[16:] != pixels(Path(image))[16:]).any()


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_of_one_command_say_a_mistake_once(exported, tmp_path):
    command = [sys.executable, "-m", "megadiff", "sample", "--checkpoint", str(exported), "--processes", "2", "--steps", "2"]
    flags = ["--task", "text-to-image", "--out", str(tmp_path / "out")]
    wrong = subprocess.run([*command, *flags, "--prompts", "none.json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "--prompts none.json cannot be read" in wrong.stderr
    right = subprocess.run(
        [*command, *flags, "--prompt", "cat", "-n", "3", "--batch", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert right.returncode == 0
    assert right.stdout.count("samples: ") == 1
    assert len(records(tmp_path / "out")) == 3


def test_in_painting_keeps_what_is_known_of_the_picture_and_of_the_text(exported, tmp_path):
    mask = Image.new("L", (32, 32), 0)
    ImageDraw.Draw(mask).rectangle((16, 0, 31, 31), fill=255)
    mask.save(tmp_path / "mask.png")
    shown = picture(tmp_path / "shown.png")
    found = ask(
        exported,
        tmp_path / "out",
        task="inpaint",
        image=(shown,),
        mask_image=str(tmp_path / "mask.png"),
        prompt=("a ___ heart",),
        n=3,
    )
    texts = [record["generated"]["text"]["text"] for record in found]
    assert all(text.startswith("a") and text.endswith("heart") and text != "a heart" for text in texts)
    assert len(set(texts)) > 1
    for record in found:
        made = pixels(tmp_path / f"out/{record['name']}.image.png")
        assert (made[:, :16] == pixels(Path(shown))[:, :16]).all()
        assert (made[:, 16:] != pixels(Path(shown))[:, 16:]).any()


def test_only_the_picture_or_only_the_text_may_have_an_unknown_part(exported, tmp_path):
    shown = picture(tmp_path / "shown.png")
    text = ask(exported, tmp_path / "text", task="inpaint", image=(shown,), prompt=("heart ___",))
    assert list(text[0]["generated"]) == ["text"]
    assert text[0]["generated"]["text"]["text"].startswith("heart")
    Image.new("L", (64, 64), 255).save(tmp_path / "all.png")
    drawn = ask(
        exported, tmp_path / "image", task="inpaint", image=(shown,), mask_image=str(tmp_path / "all.png"), prompt=("red",)
    )
    assert list(drawn[0]["generated"]) == ["image"]
    with pytest.raises(UserError, match="nothing is to be filled in: give --mask-image"):
        ask(exported, tmp_path / "none", task="inpaint", image=(shown,), prompt=("a heart",))
    with pytest.raises(UserError, match=r"takes 43 tokens with its blanks, and the model's captions have 16; shorten it"):
        ask(exported, tmp_path / "long", task="inpaint", prompt=("a ___ heart",), blank_tokens=40)


def test_variations_are_the_nearer_the_smaller_the_strength(exported, tmp_path):
    shown = picture(tmp_path / "shown.png")
    away = []
    for strength in (0.05, 0.9):
        common = {"task": "text-to-image", "prompt": ("red",), "image": (shown,), "strength": strength}
        (record,) = ask(exported, tmp_path / f"out{strength}", **common)
        away.append(np.abs(pixels(tmp_path / f"out{strength}/{record['name']}.image.png") - pixels(Path(shown))).mean())
    assert away[0] < 25 < away[1]


def test_autoguidance_goes_away_from_the_weaker_network(exported, tiny, tmp_path, monkeypatch):
    from tests.exports import write_export

    monkeypatch.chdir(ROOT)
    weaker = write_export(tiny, tmp_path / "weaker", seed=5)
    plain = ask(exported, tmp_path / "plain", n=2)
    same = ask(exported, tmp_path / "same", n=2, guide=str(exported), sampling=Sampling(steps=3, autoguidance=2.0))
    other = ask(exported, tmp_path / "other", n=2, guide=str(weaker), sampling=Sampling(steps=3, autoguidance=2.0))
    assert [record["generated"] for record in same] == [record["generated"] for record in plain]
    for record in plain:
        mine = pixels(tmp_path / f"plain/{record['name']}.image.png")
        assert np.abs(mine - pixels(tmp_path / f"same/{record['name']}.image.png")).max() <= 1
        assert (mine != pixels(tmp_path / f"other/{record['name']}.image.png")).any()
    assert other


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"task": "text-to-image", "image": ("x.png",)}, "x.png cannot be read as a picture"),
        ({"task": "text-to-sound"}, "this model cannot do text-to-sound; it can do: image-to-text, text-to-image, joint"),
        ({"task": "image-to-text", "prompt": ("a cat",)}, "image-to-text needs image: give --image FILE or --data MANIFEST"),
        (
            {"task": "text-to-image", "prompt": ("a",), "strength": 0.5},
            "--strength varies something that is there: give --image",
        ),
        ({"data": HELD_OUT}, "joint takes no condition: leave out --data, or vary the data's samples with --strength"),
        ({"task": "impute", "table": "x.csv"}, "not all of this model's modalities are columns"),
        ({"task": "text-to-image", "prompt": ("\udcff",)}, "a prompt holds bytes that are no UTF-8 text"),
        ({"task": "inpaint", "prompt": ("a ___ \udcff",)}, "a prompt holds bytes that are no UTF-8 text"),
        ({"autoencoder": "vae"}, "--autoencoder is for models of latents, and this model has none"),
        ({"task": "inpaint", "prompt": ("a ___", "b ___")}, "in-painting takes one picture, one text, or both"),
        ({"prompt": ("a",)}, "joint makes text: leave it out, or say with --strength how far to start from it"),
    ],
)
def test_an_impossible_request_is_one_sentence(exported, tmp_path, fields, sentence):
    with pytest.raises(UserError) as error:
        ask(exported, tmp_path / "out", **fields)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_pictures_of_another_size_where_positions_are_not_learned(exported, tmp_path):
    ask(exported, tmp_path / "wide", n=2, size="16x48")
    drawn = [path for path in (tmp_path / "wide").rglob("*.png") if path.name != "sheet.png"]
    assert [pixels(path).shape for path in drawn] == [(16, 48, 3)] * 2
    with pytest.raises(UserError, match="--size 20x32 must be made of multiples of 8x8 pixels for image"):
        ask(exported, tmp_path / "odd", size="20x32")


# ------------------------------------------------------------------------------------------------- files and numbers


@pytest.mark.parametrize("where", ["project/data/t.json", "project/runs/r/data/t.json", "elsewhere/data/t.json"])
def test_what_a_run_names_is_found_from_any_folder(tiny, tmp_path, monkeypatch, where):
    checkpoint = tmp_path / "project/runs/r/joint/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / where).parent.mkdir(parents=True)
    (tmp_path / where).touch()
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = weights_loading._with_own_files(naming(tiny, "data/t.json"), checkpoint)
    assert Path(found.fields["text"].tokenizer).samefile(tmp_path / where)


def test_the_files_of_a_run_go_before_those_of_the_folder_that_one_happens_to_be_in(tiny, tmp_path, monkeypatch):
    for folder in ("project", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.json").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = weights_loading._with_own_files(naming(tiny, "t.json"), tmp_path / "project/runs/r/joint/checkpoints/step_00000001")
    assert found.fields["text"].tokenizer == str(tmp_path / "project/t.json")


def test_what_a_run_names_and_is_nowhere_is_one_sentence_without_flags_that_are_not_there(tiny, tmp_path):
    with pytest.raises(UserError, match=r"needs the tokenizer of text, data/none.json, which lies neither .* nor in \S+/r or"):
        weights_loading._with_own_files(naming(tiny, "data/none.json"), tmp_path / "r/joint/checkpoints/step_00000001")


def naming(run: Run, tokenizer: str) -> Data:
    text = run.data.fields["text"].model_copy(update={"tokenizer": tokenizer})
    return run.data.model_copy(update={"fields": {**run.data.fields, "text": text}})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"size": "100000x100000"}, "100000x100000 is too large: no edge of a picture may have more than 32768 px"),
        ({"size": f"{'9' * 5000}x32"}, "is too large: no edge of a picture"),
        ({"size": "32768x32768"}, "--size 32768x32768 takes at least"),
        ({"n": 10**23}, "samples are too many for one folder; draw at most 10,000,000"),
        ({"task": "inpaint", "prompt": ("a ___",), "n": 10**12}, "samples are too many for one folder"),
        ({"task": "inpaint", "prompt": ("a ___",), "blank_tokens": 10**12}, "takes 1000000000001 tokens with its blanks"),
    ],
)
def test_numbers_that_nothing_could_hold_are_one_sentence(exported, tmp_path, monkeypatch, fields, sentence):
    monkeypatch.setattr(loading, "_memory", lambda: 8 * 2**30)
    with pytest.raises(UserError) as error:
        ask(exported, tmp_path / "out", **fields)
    assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"steps": 10**23}, {"steps": 10**12}, {"guidance": 1e308}, {"autoguidance": 1e308}])
def test_sampling_options_end_where_their_numbers_do(fields):
    with pytest.raises(ValidationError):
        Sampling(**fields)


def test_a_batch_may_be_larger_than_anything(exported, tmp_path):
    assert len(ask(exported, tmp_path / "out", n=2, batch=10**23)) == 2
