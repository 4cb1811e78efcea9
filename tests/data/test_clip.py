"""CLIP's tokenizer from a vocabulary file, and captions that begin with a mark."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megadiff.config.errors import ConfigError
from megadiff.config.schema import CaptionField, TokenSpace
from megadiff.data.codecs.captions import CaptionCodec
from megadiff.data.codecs.clip import build_clip_tokenizer, clean
from tests.data.clip_reference import encode, merges, vocabulary

LINES = ['"a vocabulary#version: 0.2', *(" ".join(pair) for pair in merges())]
SIZE = len(vocabulary())
CAPTIONS = [
    "The cat and the red apple",
    "A DOG'S life: it'll end, they're in; isn't it?",
    "café CAFÉ cafe\u0301 caf&eacute; caf&amp;eacute; cafÃ©",
    "12 1,200 ½ ² Ⅳ ٣",
    "😀😀 👩‍👩‍👧 🇩🇪 ❤️",
    "double  spaces\t\ttabs\nand\r\nlines\u00a0\u2003end",
    "<|endoftext|>",
    "the end<|endoftext|>of <|startoftext|> text",
    "AT&amp;T &lt;b&gt; &amp;lt; &#39;s &nbsp; &notanentity;",
    "“smart” \u2018quotes\u2019 — dash …",
    "â€œmojibakeâ€\u009d",
    "ΟΔΟΣ. İstanbul ß \u017f '\u017f ﬁ Å",
    "!!!!!??? '''' 'LL 'T 's",
    "xxxxx aaaaa",
    "日本語 한국어 العربية हिन्दी",
    "a\x00b\x1bc\u200bd\ufeff",
    "",
    "   ",
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join([*LINES, ""]).encode()))
    return path


@pytest.fixture(scope="module")
def tokenizer(packed: Path) -> Tokenizer:
    return build_clip_tokenizer(packed)


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def codec(path: Path, length: int = 16, cleaning: str = "clip") -> CaptionCodec:
    space = TokenSpace(vocabulary=SIZE, length=length, start_id=SIZE - 2, end_id=SIZE - 1, pad_id=SIZE - 1)
    return CaptionCodec(CaptionField(tokenizer=str(path), cleaning=cleaning), space)


def words(path: Path, caption: str) -> list[int]:
    """What lies between the marks."""
    ids = codec(path, 2000).encode(caption).tolist()
    return ids[1 : ids.index(SIZE - 1)]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ids_are_those_of_clip(tokenizer_file: Path, caption: str) -> None:
    assert words(tokenizer_file, caption) == encode(caption)


ALPHABET = st.sampled_from([*"theandcaf rdogis'TSLM!<|>&;#19\t\né", "😀", "&amp;", "<|endoftext|>", "日", "\u0301", "Σ", "½"])


@given(st.lists(ALPHABET, max_size=30).map("".join))
def test_ids_are_those_of_clip_for_any_caption(tokenizer_file: Path, caption: str) -> None:
    assert words(tokenizer_file, caption) == encode(caption)


def test_a_folder_and_a_tokenizer_file_give_the_same_ids(tmp_path: Path, tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *LINES[1:], ""]))
    for source in (tmp_path, tokenizer_file):
        assert build_clip_tokenizer(source).to_str() == tokenizer.to_str()


def test_the_marks_are_the_last_two_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == SIZE
    assert [tokenizer.token_to_id(mark) for mark in ("<|startoftext|>", "<|endoftext|>")] == [SIZE - 2, SIZE - 1]


@pytest.mark.parametrize("caption", ["the red apple", "a dog ' s café", "😀 and 日 !!"])
def test_a_caption_comes_back_with_blanks_between_its_pieces(tokenizer_file: Path, caption: str) -> None:
    both = codec(tokenizer_file, 64)
    assert both.decode(both.encode(caption)) == caption


def test_a_caption_begins_with_the_start_mark_and_is_cut_before_the_end_mark(tokenizer_file: Path) -> None:
    ids = codec(tokenizer_file, 5).encode("the the the the the the").tolist()
    the = vocabulary()["the</w>"]
    assert ids == [SIZE - 2, the, the, the, SIZE - 1]
    assert codec(tokenizer_file, 5).encode("the").tolist() == [SIZE - 2, the, SIZE - 1, SIZE - 1, SIZE - 1]


def test_a_text_with_blanks_begins_with_the_start_mark_too(tokenizer_file: Path) -> None:
    ids, known = codec(tokenizer_file, 6).encode_partly("___ the", 2)
    assert ids.tolist() == [SIZE - 2, 0, 0, vocabulary()["the</w>"], SIZE - 1, SIZE - 1]
    assert known.tolist() == [True, False, False, True, True, True]


def test_plain_cleaning_leaves_mojibake(tokenizer_file: Path) -> None:
    assert clean("  CafÃ© &amp;amp;\n") == "café &"
    plain, clip = (codec(tokenizer_file, cleaning=cleaning).encode("cafÃ©").tolist() for cleaning in ("plain", "clip"))
    assert plain != clip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt.gz", None, "does not exist"),
        ("text.txt.gz", b"#version\na b c\n", "holds no CLIP vocabulary"),
        ("cut.txt.gz", gzip.compress(b"#version\na b\n" * 99)[:30], "holds no CLIP vocabulary"),
        ("tokenizer.json", b'{"model": {}}', "holds no CLIP vocabulary"),
        ("other.json", b'{"model": {"vocab": {"a": 0}, "merges": []}}', "does not number its"),
        ("twice.txt", b"#version\na b\na b\n", "does not number its"),
        ("gap.txt", b"#version\nab cd\n", "do not fit together"),
    ],
    ids=["missing", "text", "cut", "tokenizer", "other", "twice", "gap"],
)
def test_what_is_no_vocabulary_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build_clip_tokenizer(path)
