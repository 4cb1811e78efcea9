"""Emoji art with names: real text-image pairs under permissive licences, out of npm packages.

A sample is a PNG on white and a JSON with captions made of the emoji's English name and tags (emojibase). Samples are
held out by base emoji: all styles, skin tones and genders of one thing are on the same side of the split.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from megadiff.config.errors import UserError
from megadiff.data.buckets import LONGEST_PX
from megadiff.data.codecs.captions import normalise
from megadiff.data.packing.claims import HELD_OUT, RECIPE, TRAIN, claim
from megadiff.data.pictures import flat, open_picture
from megadiff.data.recipes.npm import Package, fetch
from megadiff.data.shards.shard import Manifest, Members, Shard, ShardEntry, write_manifest, write_shard
from megadiff.storage import addresses, store

log = logging.getLogger(__name__)

LABELS = ("emojibase-data", "17.0.0")
TOKENIZER = "tokenizer.json"
PAD, END = "<|pad|>", "<|end|>"
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 256 + 2, 2**20
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_NEUTRAL = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
_FACING_RIGHT = "27A1"
_IGNORED_IN_BASE = SKIN_TONES | {"FE0F", "200D", "2640", "2642"}


@dataclass(frozen=True)
class Art:
    """One set of pictures: its npm package, what captions call its style, and its licence."""

    package: str
    version: str
    style: str
    licence: str
    holder: str


SETS: Mapping[str, Art] = {
    "noto": Art(
        "@iconify-json/noto", "1.2.9", "noto", "Apache-2.0", "Google Inc, Noto Emoji, https://github.com/googlefonts/noto-emoji"
    ),
    "noto-v1": Art(
        "@iconify-json/noto-v1",
        "1.2.5",
        "blob",
        "Apache-2.0",
        "Google Inc, Noto Emoji v1, https://github.com/googlefonts/noto-emoji",
    ),
    "fluent-emoji-flat": Art(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "flat",
        "MIT",
        "Microsoft, Fluent Emoji, https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent-emoji-3d": Art(
        "@lobehub/fluent-emoji-3d", "1.1.0", "3d", "MIT", "Microsoft, Fluent Emoji, https://github.com/microsoft/fluentui-emoji"
    ),
}


@dataclass(frozen=True)
class Emoji:
    """One emoji of Unicode: hexcode like 1F44B-1F3FB, English name and tags.

    Attributes:
        root: hexcode of the emoji whose skin-tone variant this is ("" for itself). Some variants are spelled with other code
            points than their root (handshake, couples), so that the hexcode alone does not tell.
    """

    hexcode: str
    text: str
    label: str
    tags: tuple[str, ...]
    root: str = ""

    @property
    def base(self) -> str:
        """The root's hexcode without skin tones, genders, selectors and direction; a hold-out by it leaks none of these."""
        spelled = (self.root or self.hexcode).split("-")
        parts = [_NEUTRAL.get(part, part) for part in spelled if part not in _IGNORED_IN_BASE]
        # "Facing right" is the mirror image; alone, the arrow is an emoji of its own.
        if len(parts) > 1 and parts[-1] == _FACING_RIGHT:
            parts = parts[:-1]
        return "-".join(parts)

    @property
    def has_skin_tone(self) -> bool:
        return bool(SKIN_TONES & set(self.hexcode.split("-")))


@dataclass(frozen=True)
class Picture:
    """One emoji in one set; `source` is SVG text or the bytes of a raster picture."""

    emoji: Emoji
    set: str
    source: str | bytes

    @property
    def key(self) -> str:
        return f"{self.set}-{self.emoji.hexcode.lower()}"


def make_emoji(
    out: str,
    *,
    size: int = 64,
    sets: Sequence[str] = tuple(SETS),
    skin_tones: bool = True,
    shard_samples: int = 500,
    held_out_share: float = 0.08,
    vocabulary: int = 2000,
    packages: Path | None = None,
) -> None:
    """Write OUT/train and OUT/held_out (tar shards with manifests), OUT/tokenizer.json and the licences' notices.

    The same arguments give the same bytes. A second start keeps the shards that are there.

    Args:
        out: a folder or an s3:// address.
        size: edge of the pictures, px.
        packages: where npm archives are kept; None takes the user's cache.

    Raises:
        UserError: a set is unknown, the vocabulary too small, npm fails, or `out` holds the result of other arguments.
    """
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets:
        raise UserError(f"unknown emoji set {', '.join(unknown) or '(none is named)'}; known: {', '.join(SETS)}")
    if size > LONGEST_PX:
        raise UserError(f"size ({size}) is too large: no edge of a picture may have more than {LONGEST_PX} px")
    if vocabulary < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary ({vocabulary}) has no room for every byte and two marks; it must be at least {SMALLEST_VOCABULARY}"
        )
    if vocabulary > LARGEST_VOCABULARY:
        raise UserError(f"vocabulary ({vocabulary}) must be at most {LARGEST_VOCABULARY}")
    recipe = {
        "recipe": "emoji", "size_px": size, "sets": list(sets), "skin_tones": skin_tones, "shard_samples": shard_samples,
        "held_out_share": held_out_share, "vocabulary": vocabulary, "labels": "@".join(LABELS),
    }  # fmt: skip
    emojis = read_labels(fetch(*LABELS, packages))
    everything = [p for name in sets for p in pictures(name, fetch(SETS[name].package, SETS[name].version, packages), emojis)]
    kept = sorted((p for p in everything if skin_tones or not p.emoji.has_skin_tone), key=lambda p: _mix(p.key))
    splits = {TRAIN: [p for p in kept if not is_held_out(p.emoji.base, held_out_share)]}
    splits[HELD_OUT] = [p for p in kept if is_held_out(p.emoji.base, held_out_share)]
    claim(out, RECIPE, recipe)
    _write_notices(out, sets)
    words = [caption for picture in splits[TRAIN] for caption in captions(picture, styled=len(sets) > 1)]
    store.write_bytes(addresses.join(out, TOKENIZER), train_tokenizer(words, vocabulary).to_str(pretty=True).encode())
    for split, members in splits.items():
        _write_split(addresses.join(out, split), split, members, recipe, shard_samples)


def read_labels(package: Package) -> dict[str, Emoji]:
    """Every emoji by hexcode, skin-tone variants included."""
    emojis: dict[str, Emoji] = {}
    for entry in package.json("en/data.json"):
        tags = tuple(entry.get("tags", ()))
        for variant in (entry, *entry.get("skins", ())):
            label = variant["label"].replace(":", ",").lower()
            emojis[variant["hexcode"]] = Emoji(variant["hexcode"], variant["emoji"], label, tags, entry["hexcode"])
    return emojis


def pictures(name: str, package: Package, emojis: Mapping[str, Emoji]) -> list[Picture]:
    """A set's pictures of known emoji."""
    return list(
        _raster(name, package, emojis)
        if "package.json" in package.names() and _has_assets(package)
        else _icons(name, package, emojis)
    )


def captions(picture: Picture, *, styled: bool) -> list[str]:
    """A picture's captions: its name, alone and in a sentence, with tags, and (`styled`) with its set's style."""
    label, tags = picture.emoji.label, picture.emoji.tags
    others = [tag for tag in tags if tag not in label.split()]
    texts = [label, f"an emoji of {label}"]
    texts += [f"{label} in {SETS[picture.set].style} style"] if styled else []
    texts += [f"{label}, {', '.join(others[i : i + 2])}" for i in range(0, min(len(others), 4), 2)]
    return [normalise(caption) for caption in texts]


def is_held_out(base: str, share: float) -> bool:
    return _mix(base) < share


def render(source: str | bytes, size: int) -> bytes:
    """A picture as PNG, size x size px, RGB on white."""
    if isinstance(source, str):
        source = bytes(
            resvg_py.svg_to_bytes(svg_string=source, width=size, height=size, background="#ffffff", skip_system_fonts=True)
        )
    picture = flat(open_picture(source)).resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE with exactly `vocabulary` ids: 0 is padding, 1 the end mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    missing = vocabulary - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|unused{number}|>" for number in range(missing)])
    return tokenizer


def _mix(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


def _has_assets(package: Package) -> bool:
    return any(name.startswith("assets/") for name in package.names())


def _raster(name: str, package: Package, emojis: Mapping[str, Emoji]) -> Iterator[Picture]:
    by_code = {_plain(code): emoji for code, emoji in emojis.items()}
    for path in package.names():
        emoji = by_code.get(_plain(Path(path).stem)) if path.startswith("assets/") else None
        if emoji is not None:
            yield Picture(emoji, name, package.bytes(path))


def _icons(name: str, package: Package, emojis: Mapping[str, Emoji]) -> Iterator[Picture]:
    tree = package.json("icons.json")
    codes: dict[str, str] = package.json("chars.json") if "chars.json" in package.names() else {}
    named = {_plain(code): icon for code, icon in codes.items()}
    for emoji in emojis.values():
        icon = named.get(_plain(emoji.hexcode), _slug(emoji.label))
        icon = tree.get("aliases", {}).get(icon, {}).get("parent", icon)
        if icon in tree["icons"]:
            yield Picture(emoji, name, _svg(tree, tree["icons"][icon]))


def _plain(code: str) -> str:
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def _slug(label: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in label).split())


def _svg(tree: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    box = (icon.get("width", tree.get("width", 16)), icon.get("height", tree.get("height", 16)))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="0 0 {box[0]} {box[1]}">{icon["body"]}</svg>'


def _write_split(folder: str, split: str, members: Sequence[Picture], recipe: Mapping[str, Any], shard_samples: int) -> None:
    groups = [members[start : start + shard_samples] for start in range(0, len(members), shard_samples)]
    entries = []
    with tqdm(total=len(members), desc=split, unit="picture", disable=None) as bar:
        for number, group in enumerate(groups):
            name, styled = f"{number:05d}.tar", len(recipe["sets"]) > 1
            entries.append(_finished(folder, name) or _write_group(folder, name, group, recipe["size_px"], styled=styled))
            bar.update(len(group))
    facts = {"split": split, **recipe, "licences": {name: SETS[name].licence for name in recipe["sets"]}}
    write_manifest(folder, Manifest(tuple(entries), facts))


def _finished(folder: str, name: str) -> ShardEntry | None:
    """A shard that an earlier start has written (objects appear whole or not at all)."""
    address = addresses.join(folder, name)
    if not store.exists(address):
        return None
    data = store.read_bytes(address)
    return ShardEntry(name, len(Shard(address, data)), len(data), hashlib.sha256(data).hexdigest())


def _write_group(folder: str, name: str, group: Sequence[Picture], size: int, *, styled: bool) -> ShardEntry:
    samples: dict[str, Members] = {}
    for picture in group:
        try:
            png = render(picture.source, size)
        except (ValueError, OSError) as error:
            log.warning("%s cannot be drawn and is left out: %s", picture.key, error)
            continue
        facts = {
            "captions": captions(picture, styled=styled),
            "emoji": picture.emoji.text,
            "base": picture.emoji.base,
            "set": picture.set,
        }
        samples[picture.key] = {"png": png, "json": json.dumps(facts, ensure_ascii=False).encode()}
    return write_shard(folder, name, samples)


def _write_notices(out: str, sets: Sequence[str]) -> None:
    lines = ["Pictures in these shards, by set:", ""]
    lines += [
        f"- {name}: {SETS[name].holder} ({SETS[name].licence}), package {SETS[name].package} {SETS[name].version}"
        for name in sets
    ]
    lines += [
        "",
        "They were drawn at another size on a white ground; nothing else was changed.",
        f"Names and tags: emojibase-data {LABELS[1]} (MIT).",
    ]
    store.write_bytes(addresses.join(out, "NOTICE"), ("\n".join(lines) + "\n").encode())
