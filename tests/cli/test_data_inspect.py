"""`megadiff data verify`, `data stats` and `data show`: what they print, write and draw, and one sentence per mistake."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megadiff.cli import main as cli
from megadiff.data.codecs.captions import load_tokenizer
from megadiff.data.inspection.pictures import channels_picture, decoder, sample_cell, stats_picture
from megadiff.data.inspection.show import ShownSample, find_samples
from megadiff.data.inspection.stats import Seen, Stats, measure
from megadiff.data.shards.shard import Manifest, Members, read_manifest, write_manifest
from tests.cli.mistakes import mistake
from tests.data.small import TOKENIZER, TRAIN, make_autoencoder, sample, write_source

pytestmark = pytest.mark.thorough

RED = (255, 0, 0)


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def encoded(width: int, height: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), RED).save(buffer, format)
    return buffer.getvalue()


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    """What a command prints; it must end with a code and say nothing on stderr."""
    assert cli.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


# ------------------------------------------------------------------------------------------------------------------ verify


@pytest.mark.parametrize(
    ("options", "depth"), [([], "every shard"), (["--quick"], "names and sizes"), (["--decode"], "every member")]
)
def test_whole_data_is_one_line_and_exit_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], depth: str
) -> None:
    write_source(tmp_path, [2, 3])
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    line = f"verified: {tmp_path} (2 shards, 5 samples, {size / 1000:.3g} kB; {depth}): whole\n"
    assert said(capsys, 0, "data", "verify", tmp_path, *options) == line


def test_each_fault_is_a_line_that_names_the_object_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path, [2, 2, 2], {3: {"png": b"", "json": b"{}"}})
    (tmp_path / "000.tar").unlink()
    (tmp_path / "more.tar").write_bytes(b"")
    *faults, last = said(capsys, 1, "data", "verify", tmp_path, "--decode").splitlines()
    assert faults == [
        f"not listed: {tmp_path}/more.tar: lies there, and the manifest does not list it",
        f"missing: {tmp_path}/000.tar: the manifest lists it, and it is not there",
        f"damaged member: {tmp_path}/001.tar 00003.png: it is no readable picture: its format is not known",
    ]
    assert last.endswith("every member): 3 faults: 1 not listed, 1 missing, 1 damaged member")


def test_a_quick_look_passes_over_what_only_a_reading_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, [2])
    path = tmp_path / "000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    said(capsys, 0, "data", "verify", tmp_path, "--quick")
    assert said(capsys, 1, "data", "verify", tmp_path).startswith(f"corrupt: {path}: ")


def test_20_faults_of_a_kind_are_printed_and_the_rest_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, [1] * 23)
    for number in range(22):
        (tmp_path / f"{number:03d}.tar").unlink()
    (tmp_path / "022.tar").write_bytes(b"")
    lines = said(capsys, 1, "data", "verify", tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == ["missing"] * 20 + ["truncated", "missing", "verified"]
    assert lines[-2] == "missing: and 2 more; --json FILE writes all"
    assert lines[-1].endswith("23 faults: 22 missing, 1 truncated")


def test_json_holds_all_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, [1] * 25)
    for number in range(24):
        (tmp_path / f"{number:03d}.tar").unlink()
    out = said(capsys, 1, "data", "verify", tmp_path, "--json", tmp_path / "faults.json")
    assert "missing: and 4 more\n" in out
    tree = json.loads((tmp_path / "faults.json").read_text())
    assert tree["counts"] == {"missing": 24}
    assert [fault["object"] for fault in tree["faults"]] == [f"{tmp_path}/{number:03d}.tar" for number in range(24)]
    assert {fault["kind"] for fault in tree["faults"]} == {"missing"}
    assert (tree["shards"], tree["samples"], tree["quick"], tree["decode"]) == (25, 25, False, False)


def test_json_of_whole_data_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, [1])
    said(capsys, 0, "data", "verify", tmp_path, "--quick", "--json", tmp_path / "faults.json")
    tree = json.loads((tmp_path / "faults.json").read_text())
    assert (tree["faults"], tree["counts"], tree["quick"]) == ([], {}, True)


@pytest.mark.parametrize("options", [["--quick", "--decode"], ["--workers", "0"]])
def test_options_that_do_not_fit_are_refused_with_the_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "verify", str(tmp_path), *options])
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["verify", "stats", "show"])
def test_a_folder_without_a_manifest_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert "manifest.json cannot be read" in mistake(capsys, "data", verb, tmp_path)


# ------------------------------------------------------------------------------------------------------------------- stats


def test_stats_print_a_table_and_write_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, 0, "data", "stats", TRAIN, "--tokenizer", TOKENIZER, "--lanes", "64", "--out", tmp_path / "out")
    table = dict(line.split(maxsplit=1) for line in out.splitlines() if line.strip())
    assert table["samples"] == "1,418 in 12 shards, 4.19 MB, 2.95 kB a sample"
    assert table["members"] == "json in all, png in all"
    assert table["pictures"] == "32x32: 1,418 (height x width)"
    assert table["captions"].startswith("2 to 4 a sample")
    assert len(table["tokens"].split()) == len(table["words"].split()) == 6
    assert table["epoch"].startswith("with 64 lanes it leaves 10 samples over")
    assert "read" not in table
    assert json.loads((tmp_path / "out/stats.json").read_text())["samples"] == 1418
    assert np.asarray(Image.open(tmp_path / "out/stats.png")).std() > 10


def test_a_part_of_the_data_is_told_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, 0, "data", "stats", TRAIN, "--samples", "200", "--out", tmp_path)
    assert "\nread          240 samples of 2 shards" in out
    everything = said(capsys, 0, "data", "stats", TRAIN, "--samples", "0", "--out", tmp_path)
    assert "\nread " not in everything


def test_shares_rare_resolutions_and_what_is_unreadable_are_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members: list[Members] = [{"png": encoded(10, 10 + number), "txt": b"a"} for number in range(7)]
    write_source(tmp_path, [9], dict(enumerate([*members, {"txt": b"a"}, {"png": b"", "txt": b"a"}])))
    out = said(capsys, 0, "data", "stats", tmp_path, "--out", tmp_path)
    assert "members       txt in all, png in 8 (88.9 %)\n" in out
    assert "unreadable    1 png; `megadiff data verify --decode` names them\n" in out
    assert "10x10: 1, 11x10: 1, 12x10: 1, 13x10: 1, 14x10: 1, 2 others: 2 (height x width)\n" in out
    assert "aspect ratio  0.62 to 1, median 0.77 (width / height)\n" in out


@pytest.mark.parametrize("options", [["--samples", "-1"], ["--lanes", "0"]])
def test_numbers_out_of_range_are_refused_with_the_usage(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "stats", str(TRAIN), *options])
    assert ended.value.code == 2
    assert f"argument {options[0]}: '{options[1]}' is no whole number" in capsys.readouterr().err


def numbers(**counts: Any) -> Stats:
    return Stats("data", 10, 1, 10, counts.pop("buckets", {}), 1, Seen(samples=10, **counts))


def panels(stats: Stats) -> int:
    """How many panels a picture has, from its size: three a row."""
    picture = stats_picture(stats)
    return round(picture.width / 506) if picture.height < 600 else 3 * round(picture.height / 407)


def test_the_picture_has_a_panel_for_what_there_is(tmp_path: Path) -> None:
    lengths = Counter({3: 5, 4: 9, 900: 1})
    assert panels(numbers()) == 1
    assert panels(numbers(words=lengths)) == 1
    assert panels(numbers(words=lengths, tokens=lengths)) == 2
    assert panels(numbers(words=lengths, resolutions=Counter({(32, 32): 9}))) == 1
    assert panels(numbers(words=lengths, resolutions=Counter({(32, 32): 9, (32, 48): 1}))) == 3
    assert panels(numbers(words=lengths, tokens=lengths, buckets={"32x32": 9, "no bucket": 1})) == 3


def test_the_buckets_are_drawn_into_the_resolutions(tmp_path: Path) -> None:
    sizes = Counter({(300, 400): 5, (500, 300): 3})
    red = [
        int(((pixels := np.asarray(stats_picture(stats)).astype(int))[..., 0] - pixels[..., 2] > 120).sum())
        for stats in (numbers(resolutions=sizes), numbers(resolutions=sizes, buckets={"320x384": 9}))
    ]
    assert red[0] == 0
    assert red[1] > 10


def test_many_resolutions_and_buckets_can_be_drawn() -> None:
    sizes = Counter({(height, width): 1 for height in range(100, 180) for width in range(100, 200)})
    buckets = {f"{64 * number}x{64 * (60 - number)}": number for number in range(1, 60)}
    assert stats_picture(numbers(resolutions=sizes, buckets=buckets)).width > 1000


# -------------------------------------------------------------------------------------------------------------------- show


def red(picture: Image.Image) -> int:
    return int((np.asarray(picture) == RED).all(-1).sum())


def test_a_sheet_shows_pictures_in_their_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: list[Members] = [{"png": encoded(168 * 4, 168 * 2), "txt": b"wide"}, {"png": encoded(168, 336), "txt": b"tall"}]
    write_source(tmp_path, [2], dict(enumerate(members)))
    line = said(capsys, 0, "data", "show", tmp_path, "--out", tmp_path / "sheet.png")
    assert line == f"sheet: {tmp_path}/sheet.png (2 of 2 samples)\n"
    assert red(Image.open(tmp_path / "sheet.png")) == 2 * 168 * 84


def test_a_sheet_is_the_same_for_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sheet(*options: str) -> bytes:
        said(capsys, 0, "data", "show", TRAIN, "--out", tmp_path / "sheet.png", *options)
        return (tmp_path / "sheet.png").read_bytes()

    assert sheet("--count", "4") == sheet("--count", "4", "--seed", "0")
    assert sheet("--count", "4") != sheet("--count", "4", "--seed", "1")
    many = Image.open(io.BytesIO(sheet("--count", "9", "--columns", "3")))
    assert many.height > 3 * 168
    assert 3 * 168 < many.width < 4 * 168


def test_named_samples_are_shown_in_the_order_of_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, [4, 4])
    names = ["001.tar/00006", "000.tar/00001"]
    line = said(capsys, 0, "data", "show", tmp_path, "--samples", *names, "--out", tmp_path / "sheet.png")
    assert line == f"sheet: {tmp_path}/sheet.png (2 of 8 samples)\n"
    found = find_samples(str(tmp_path), read_manifest(str(tmp_path)), names)
    assert [(each.shard, each.key) for each in found] == [("001.tar", "00006"), ("000.tar", "00001")]
    assert [json.loads(each.members["json"])["captions"][0] for each in found] == ["one 6", "one 1"]


def drawn(members: Members) -> ShownSample:
    return ShownSample("000.tar", "key-1", members)


def test_a_cell_has_the_first_caption_and_the_key() -> None:
    cell = sample_cell(drawn(sample(7)))
    assert (cell.caption, cell.note) == ("one 7", "key-1")
    assert cell.picture is not None
    assert cell.picture.getpixel((0, 0)) == (7, 7, 7)


def test_a_cell_of_a_row_shows_its_columns() -> None:
    cell = sample_cell(drawn({"json": b'{"size": 3, "colour": "red"}'}))
    assert (cell.picture, cell.caption) == (None, "size: 3, colour: red")


def test_a_cell_shows_a_transparent_picture_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 255, 0)).save(buffer, "PNG")
    picture = sample_cell(drawn({"png": buffer.getvalue()})).picture
    assert picture is not None
    assert picture.getcolors() == [(16, (255, 255, 255))]


def test_a_cell_turns_its_picture_as_a_viewer_does() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    picture = sample_cell(drawn({"jpg": buffer.getvalue()})).picture
    assert picture is not None
    assert picture.size == (30, 40)


def test_what_is_damaged_says_so_in_its_cell() -> None:
    cell = sample_cell(drawn({"png": b"", "json": b"{"}))
    assert cell.picture is None
    first, second, third = cell.note.splitlines()
    assert (first, second) == ("key-1", "it is no readable picture: its format is not known")
    assert third.startswith("its .json member is no JSON")


@pytest.mark.parametrize("values", [np.full((4, 8, 8), np.nan), np.zeros((8, 8)), np.zeros((4, 8, 8), np.int32)])
def test_latents_that_are_none_say_so(values: Any) -> None:
    cell = sample_cell(drawn({"latents.npy": npy(values)}))
    assert cell.picture is None
    assert "holds no finite latents" in cell.note


def test_latents_without_an_autoencoder_show_as_their_first_channels() -> None:
    values = np.random.default_rng(0).normal(size=(2, 4, 6, 10)).astype(np.float16)
    cell = sample_cell(drawn({"latents.npy": npy(values), "txt": b"a"}))
    assert cell.picture is not None
    assert cell.picture.size == (10, 6)
    assert cell.note == "key-1\nfirst 3 of 4 latent channels"
    assert (np.asarray(cell.picture) == np.asarray(channels_picture(values[0]))).all()


def test_each_channel_is_stretched_to_the_whole_range() -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    pixels = np.asarray(channels_picture(np.stack([ramp, 100 * ramp - 7, 1 - ramp, ramp * 0])))
    assert pixels.shape == (8, 8, 3)
    assert (pixels.min((0, 1)) == 0).all()
    assert (pixels.max((0, 1)) == 255).all()
    assert (np.abs(pixels[..., 0].astype(int) - pixels[..., 1]) <= 1).all()
    assert np.asarray(channels_picture(np.zeros((2, 3, 4)))).shape == (3, 4)


def test_latents_are_decoded_by_the_autoencoder(tmp_path: Path) -> None:
    decode = decoder(make_autoencoder(tmp_path))
    mean = np.random.default_rng(0).normal(size=(4, 6, 10)).astype(np.float32)
    members = {"latents.npy": npy(np.stack([mean, np.ones_like(mean)])), "png": encoded(5, 5)}
    cell = sample_cell(drawn(members), decode)
    assert cell.note == "key-1"
    assert cell.picture is not None
    assert cell.picture.size == (40, 24)
    assert (np.asarray(cell.picture) == np.asarray(decode(mean))).all()
    plain = sample_cell(drawn(members)).picture
    assert plain is not None
    assert plain.size == (5, 5)


def test_scaled_latents_are_unscaled_before_they_are_decoded(tmp_path: Path) -> None:
    folder = make_autoencoder(tmp_path)
    values = np.random.default_rng(0).normal(size=(4, 6, 6)).astype(np.float32)
    expected = np.asarray(decoder(folder)(values)).astype(int)
    assert np.abs(np.asarray(decoder(folder, 0.5)(values / 2)) - expected).max() <= 1
    assert np.abs(np.asarray(decoder(folder)(values / 2)) - expected).max() > 1


def test_tokens_are_spelled_out_by_the_tokenizer() -> None:
    tokenizer = load_tokenizer(str(TOKENIZER))
    ids = tokenizer.encode("red heart", add_special_tokens=False).ids
    tokens = npy(np.array([[*ids, -1, -1], [1] * (len(ids) + 2)], dtype=np.int32))
    assert sample_cell(drawn({"tokens.npy": tokens}), tokenizer=tokenizer).caption.strip() == "red heart"
    assert sample_cell(drawn({"tokens.npy": tokens})).caption == f"({len(ids)} tokens)"
    assert sample_cell(drawn({"tokens.npy": tokens, "txt": b"text"})).caption == "text"


def latent_source(folder: Path, facts: dict[str, Any] | None = None) -> Path:
    tokens = npy(np.array([[1, 2, 3]], dtype=np.int32))
    members: Members = {"latents.npy": npy(np.ones((4, 8, 8), np.float16)), "tokens.npy": tokens}
    manifest = read_manifest(write_source(folder, [2], {0: members, 1: members}))
    write_manifest(str(folder), replace(manifest, facts=facts or {}))
    return folder


def test_a_sheet_of_latents_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, vae = latent_source(tmp_path / "data"), make_autoencoder(tmp_path / "vae")
    out = tmp_path / "sheet.png"
    said(capsys, 0, "data", "show", folder, "--out", out)
    plain = out.read_bytes()
    decode = ["--autoencoder", vae, "--tokenizer", TOKENIZER]
    said(capsys, 0, "data", "show", folder, "--out", out, *decode)
    decoded = out.read_bytes()
    said(capsys, 0, "data", "show", folder, "--out", out, *decode, "--scale", "0.01")
    assert len({plain, decoded, out.read_bytes()}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "sheet.jpg"], "--out sheet.jpg must end with .png"),
        (["--scale", "0.18"], "--scale goes with --autoencoder"),
        (["--samples", "web/000.tar/1"], "lists no shard of web/000.tar/1; give SHARD/KEY"),
        (["--tokenizer", "none.json"], "tokenizer none.json does not exist"),
        (["--autoencoder", "none"], "--autoencoder: none has no config.json"),
        (["--tokenizer", str(TOKENIZER)], "--tokenizer has no effect: no sample that was drawn has a tokens.npy member"),
    ],
)
def test_a_mistake_in_show_is_one_sentence(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in mistake(capsys, "data", "show", TRAIN, *options)


def test_an_autoencoder_that_does_not_fit_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = make_autoencoder(tmp_path / "vae")
    assert "--autoencoder has no effect" in mistake(capsys, "data", "show", TRAIN, "--autoencoder", vae)
    write_source(tmp_path / "data", [1], {0: {"latents.npy": npy(np.ones((3, 8, 8), np.float16))}})
    message = mistake(capsys, "data", "show", tmp_path / "data", "--autoencoder", vae, "--out", tmp_path / "x.png")
    assert "has 4 latent channels, and the shards' latents 3" in message


def test_another_tokenizer_than_the_one_that_made_the_tokens_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = latent_source(tmp_path, {"encoded": {"tokens.npy": {"tokenizer": "0" * 64}}})
    assert "is not the one that made the tokens" in mistake(capsys, "data", "show", folder, "--tokenizer", TOKENIZER)


@pytest.mark.parametrize("options", [["--scale", "0"], ["--scale", "nan"], ["--count", "0"]])
def test_numbers_of_show_out_of_range_are_refused(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "show", str(TRAIN), *options])
    assert ended.value.code == 2
    assert f"argument {options[0]}" in capsys.readouterr().err


def test_shards_with_one_manifest_for_two_folders_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "train", [2])
    entry = read_manifest(str(tmp_path / "train")).shards[0]
    address = write_manifest(str(tmp_path), Manifest((replace(entry, name="train/000.tar"),)))
    said(capsys, 0, "data", "verify", address)
    said(capsys, 0, "data", "stats", address, "--out", tmp_path / "out")
    said(capsys, 0, "data", "show", address, "--out", tmp_path / "sheet.png")
    assert measure(address).seen.samples == 2
