"""`megadiff data pack`: all four kinds from the command line, what it prints, and one sentence per mistake."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from megadiff.cli import main as cli
from megadiff.data.shards.shard import read_manifest


def picture(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The same six pictures as a folder, a table, a tar and a list with captions; one of them has no caption."""
    for name in ("folder", "tars"):
        (tmp_path / name).mkdir()
    captions = {f"sa_{number}": f"number {number}" for number in range(5)}
    lines = []
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for number in range(6):
            name, text = f"sa_{number}", captions.get(f"sa_{number}", "")
            (tmp_path / f"folder/{name}.jpg").write_bytes(picture())
            (tmp_path / f"folder/{name}.txt").write_text(text)
            lines.append(json.dumps({"path": f"folder/{name}.jpg", "caption": text}))
            for ending, data in (("jpg", picture()), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "list.txt").write_text(f"file_name\tcdn_link\nsa_0.tar\t{tmp_path}/tars/0.tar\n")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "source", "options"),
    [
        ("folder", "folder", []),
        ("table", "table.jsonl", []),
        ("tars", "tars/{0..0}.tar", []),
        ("sam-llava", "list.txt", ["--captions", "captions.json"]),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_every_kind_is_packed(
    raw: Path, capsys: pytest.CaptureFixture[str], kind: str, source: str, options: list[str], named: bool
) -> None:
    out = str(raw / "out")
    flags = [*(str(raw / option) if option.endswith(".json") else option for option in options)]
    flags += ["--kind", kind] if named else []
    flags += ["--bucket-area", "32", "--bucket-step", "8", "--size", "20", "--format", "webp", "--shard-samples", "2"]
    assert cli.main(["data", "pack", str(raw / source), out, *flags]) == 0
    assert capsys.readouterr().out == f"packed: {out} (5 samples in 3 shards; left out: 1 no caption, see left_out.jsonl)\n"
    manifest = read_manifest(out)
    assert manifest.facts == {"source_kind": kind, "counts": {"left out: no caption": 1, "written": 5}}
    assert {entry.bucket for entry in manifest.shards} == {"24x40"}
    with tarfile.open(raw / "out" / manifest.shards[0].name) as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".webp", ".json"}
    assert not (raw / "out/.scratch").exists()


def test_a_held_out_share_makes_two_folders(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = raw / "out"
    assert cli.main(["data", "pack", str(raw / "folder"), str(out), "--held-out-share", "0.8"]) == 0
    train, held_out = (read_manifest(str(out / side)).samples for side in ("train", "held_out"))
    assert train + held_out == 5
    assert f"(5 samples in 2 shards, {held_out} of them held out; left out" in capsys.readouterr().out


def test_several_tables_are_one_source(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "more.jsonl").write_bytes((raw / "table.jsonl").read_bytes())
    tables = [str(raw / "table.jsonl"), str(raw / "more.jsonl")]
    assert cli.main(["data", "pack", *tables, str(raw / "out")]) == 0
    assert "(10 samples in 2 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("absent", [], "absent cannot be listed: No such file or directory"),
        ("absent.tar", [], "absent.tar does not exist or cannot be read"),
        ("absent.jsonl", [], "absent.jsonl cannot be read: No such file or directory"),
        ("list.txt", [], "--kind sam-llava needs --captions TABLE"),
        ("list.txt", ["--captions", "absent.json"], "absent.json does not exist"),
        ("captions.json", ["--kind", "tars"], "captions.json is a file, not a folder"),
        ("folder", ["--captions", "x.json"], "--captions goes with --kind sam-llava"),
        ("folder", ["--image-column", "x"], "--image-column and --caption-column go with tables"),
        ("tars", ["--kind", "folder"], "holds no pictures"),
        ("table.jsonl", ["--image-column", "x"], "table.jsonl has no column x; it has path, caption"),
        ("folder", ["--quality", "80"], "--format and --quality are of pictures that --size scales down"),
        ("folder", ["--size", "8", "--quality", "101"], "--quality 101 must lie between 1 and 100"),
        ("folder", ["--buckets", "8x8", "--bucket-area", "8"], "--buckets and --bucket-area exclude each other"),
        ("folder", ["--buckets", "8x8,9"], "'9' is no bucket"),
        ("folder", ["--bucket-step", "8"], "--bucket-step and --bucket-ratio go with --bucket-area"),
        ("folder", ["--held-out-share", "1"], "'1' is no share"),
        ("folder", ["--held-out-share", "1e-9"], "leaves no sample of 5 on the side of held_out; give another one"),
        ("folder", ["--min-size", "1000"], "not one sample of the 1 units could be written"),
    ],
)
def test_a_mistake_is_one_sentence(
    raw: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(raw)
    try:
        code = cli.main(["data", "pack", source, "out", *options])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
