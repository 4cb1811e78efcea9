"""CLIP's tokenizer out of its published vocabulary, without a download: ids equal to open_clip's.

Source: https://github.com/openai/CLIP (clip/simple_tokenizer.py) and its copy in open_clip. A caption is cleaned (`clean`), cut
into contractions, runs of letters, single digits and runs of anything else, and each piece is merged from its bytes; the last
byte of a piece carries the mark `</w>`. One difference is meant: a caption that spells a special token never becomes it.
"""

from __future__ import annotations

import gzip
import html
import json
import zlib
from pathlib import Path
from typing import Any

import ftfy
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megadiff.config.errors import ConfigError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MERGES = 49152 - 256 - 2
"""Number of published merges that CLIP uses (the file holds more)."""
VOCABULARY = 2 * 256 + MERGES + 2
"""Its ids: the bytes, alone and at the end of a word, the merges, and the two marks: 49,408."""
_SPACE = "Ġ"
"""How a blank is written in the alphabet of bytes."""
_PIECES = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

Merge = tuple[str, str]


def clean(caption: str) -> str:
    """CLIP's cleaning of a caption: mojibake mended, HTML entities resolved twice, white space collapsed, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(text.split()).lower()


def build_clip_tokenizer(vocabulary: Path) -> Tokenizer:
    """A tokenizer whose ids are CLIP's.

    Args:
        vocabulary: `bpe_simple_vocab_16e6.txt.gz` (as in the packages open_clip_torch and clip-anytorch), a folder with
            `vocab.json` and `merges.txt`, or a tokenizer.json.

    Raises:
        ConfigError: it is missing, damaged, or numbers its tokens otherwise than CLIP does.
    """
    try:
        merges, ids = _read(vocabulary)
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} does not exist; give {_WAYS}") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{vocabulary} holds no CLIP vocabulary ({type(error).__name__}: {reason}); give {_WAYS}") from None
    tokens = [*_alphabet(), *(f"{byte}{WORD_END}" for byte in _alphabet()), *("".join(pair) for pair in merges), START, END]
    numbered = {token: number for number, token in enumerate(tokens)}
    if len(numbered) != len(tokens) or (ids is not None and ids != numbered):
        raise ConfigError(f"{vocabulary} does not number its {len(tokens)} tokens as CLIP does; give {_WAYS}")
    return _tokenizer(numbered, merges)


_WAYS = "bpe_simple_vocab_16e6.txt.gz, a folder with vocab.json and merges.txt, or a tokenizer.json, of CLIP"


def _read(vocabulary: Path) -> tuple[list[Merge], dict[str, int] | None]:
    """The merges, and the ids where the source states them."""
    if vocabulary.is_dir():
        ids = json.loads((vocabulary / "vocab.json").read_text(encoding="utf-8"))
        return _merges((vocabulary / "merges.txt").read_text(encoding="utf-8")), dict(ids)
    if vocabulary.suffix == ".json":
        tree = json.loads(vocabulary.read_text(encoding="utf-8"))
        pairs = [_pair(entry) for entry in tree["model"]["merges"]]
        added = {entry["content"]: entry["id"] for entry in tree.get("added_tokens", [])}
        return pairs, {**tree["model"]["vocab"], **added}
    packed = vocabulary.read_bytes()
    return _merges((gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed).decode("utf-8")), None


def _merges(text: str) -> list[Merge]:
    """CLIP's merges from a file with a version line and one line per merge; further merges are left out."""
    lines = text.split("\n")[1 : MERGES + 1]
    return [_pair(line) for line in lines if line.strip()]


def _pair(entry: Any) -> Merge:
    """A merge is written `a b` or, in newer files, [a, b]."""
    first, second = entry.split() if isinstance(entry, str) else entry
    return first, second


def _alphabet() -> list[str]:
    """A printable letter for every byte, in CLIP's order: printable bytes stand for themselves and come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]


def _tokenizer(ids: dict[str, int], merges: list[Merge]) -> Tokenizer:
    try:
        bpe = models.BPE(vocab=ids, merges=merges, end_of_word_suffix=WORD_END, fuse_unk=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"the vocabulary's merges do not fit together: {error}") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Lowercase()  # for callers that do not clean first
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(WORD_END, _SPACE), decoders.ByteLevel()])
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (START, END)])
    return tokenizer
