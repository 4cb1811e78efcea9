"""npm archives in miniature, as the emoji recipe expects them, made without npm."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.data.recipes.emoji import LABELS, SETS
from tests.data.small import png

TONES = {"1F3FB": "light skin tone", "1F3FF": "dark skin tone"}
PEOPLE = {"1F468": "man", "1F469": "woman", "1F9D1": "person"}
THINGS = ("red apple", "green pear", "cat", "dog", "sun", "moon", "house", "tree", "boat", "key", "cup", "bell")


def _entry(hexcode: str, label: str, tags: list[str], skins: bool = False) -> dict[str, Any]:
    def text(code: str) -> str:
        return "".join(chr(int(part, 16)) for part in code.split("-"))

    entry: dict[str, Any] = {"hexcode": hexcode, "emoji": text(hexcode), "label": label, "tags": tags}
    if skins:
        codes = {f"{hexcode}-{tone}": f"{label}: {name}" for tone, name in TONES.items()}
        entry["skins"] = [{"hexcode": code, "emoji": text(code), "label": name} for code, name in codes.items()]
    return entry


def labels() -> list[dict[str, Any]]:
    """Things, three people with two skin tones each, a handshake with one, and a heart with a selector."""
    made = [
        _entry(f"1F{number:03X}", label, [label.split()[-1], "thing", "small"]) for number, label in enumerate(THINGS, 0x400)
    ]
    made += [_entry(code, label, ["human"], skins=True) for code, label in PEOPLE.items()]
    handshake = _entry("1F91D", "handshake", ["deal"])
    # Two hands of different colours are spelled as two hands.
    handshake["skins"] = [_entry("1FAF1-1F3FB-200D-1FAF2-1F3FF", "handshake: light skin tone, dark skin tone", [])]
    made.append(handshake)
    made.append(_entry("2764-FE0F", "red heart &amp; love", ["love"]))
    return made


def icon(number: int) -> dict[str, str]:
    return {"body": f'<rect width="16" height="16" fill="#{number * 37 % 256:02x}40{number * 91 % 256:02x}"/>'}


def write_packages(folder: Path, icons: dict[str, Any] | None = None) -> Path:
    """Archives of the labels, of noto (drawings) and of the 3d set (pictures); returns their folder."""
    everything = [variant for entry in labels() for variant in (entry, *entry.get("skins", ()))]
    slugs = ["-".join("".join(c if c.isalnum() else " " for c in e["label"]).split()) for e in everything]
    drawn = {slug: icon(number) for number, slug in enumerate(slugs)}
    tree = {"icons": {**drawn, **(icons or {})}, "aliases": {}, "width": 16, "height": 16}
    raster = {f"assets/{e['hexcode'].lower()}.png": _flat(number) for number, e in enumerate(everything)}
    _archive(folder, *LABELS, {"en/data.json": json.dumps(labels()).encode()})
    noto, three_d = SETS["noto"], SETS["fluent-emoji-3d"]
    _archive(folder, noto.package, noto.version, {"icons.json": json.dumps(tree).encode(), "package.json": b"{}"})
    _archive(folder, three_d.package, three_d.version, {**raster, "package.json": b"{}"})
    return folder


def _flat(number: int) -> bytes:
    pixels = np.zeros((24, 24, 4), dtype=np.uint8)
    pixels[4:20, 4:20] = (number * 7 % 256, number * 29 % 256, 128, 255)
    return png(pixels)


def _archive(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", "w:gz") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
