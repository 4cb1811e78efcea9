"""Captions: members to token ids and back."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import (
    CaptionField,
    TokenSpace,
)
from megadiff.data.buckets import Bucket
from megadiff.data.codecs import clip
from megadiff.data.codecs.base import TEXT, Array, Codec, array_of, member_of, row_of
from megadiff.data.errors import SampleError
from megadiff.data.shards.shard import Views
from megadiff.storage import store

NO_TOKEN = -1
"""Padding of the shorter captions in an array of token ids."""


class CaptionCodec(Codec):
    """Captions: the start mark where there is one, tokens, the end mark, padding."""

    medium = TEXT
    space: TokenSpace

    def __init__(self, field: CaptionField, space: TokenSpace, name: str = "") -> None:
        """Raises ConfigError if the tokenizer is missing or does not fit the space."""
        self.member, self.first, self.space = field.member, field.first, space
        self.clean = CLEANING[field.cleaning]
        self.tokenizer = load_tokenizer(field.tokenizer)
        if self.tokenizer.get_vocab_size() != space.vocabulary:
            ids = self.tokenizer.get_vocab_size()
            raise ConfigError(f"tokenizer {field.tokenizer} has {ids} ids, and the model's vocabulary is {space.vocabulary}")
        pad = space.pad_id if space.pad_id is not None else space.end_id or 0
        self._empty = np.full(space.length, pad, dtype=np.int64)

    @classmethod
    def check_encoded(cls, field: CaptionField, facts: Mapping[str, Any], address: str, where: str) -> None:
        if hashlib.sha256(store.read_bytes(field.tokenizer)).hexdigest() != facts["tokenizer"]:
            raise ConfigError(f"{where}.tokenizer ({field.tokenizer}) is not the one that made the tokens of {address}")
        if field.cleaning != facts["cleaning"]:
            raise ConfigError(f"{where}.cleaning is {field.cleaning}, and {address} holds tokens of {facts['cleaning']}")

    def read(self, members: Views, key: int) -> str:
        if self.member.endswith("npy"):
            text: str = self.tokenizer.decode(self._ids(members, key), skip_special_tokens=False)
            return text
        captions = self.read_all(members)
        return captions[key % len(captions)]

    def read_all(self, members: Views) -> list[str]:
        """All captions in a sample's members, or its first ones. Raises SampleError as `read`."""
        if self.member.endswith("npy"):
            return [self.read(members, number) for number in range(len(array_of(members, self.member)[: self.first]))]
        return captions_of(members, self.member)[: self.first]

    def encode(self, value: str) -> Tensor:
        """A caption to int64 [S]; what is too long is cut so that the end mark stays."""
        return torch.from_numpy(self._sequence(self.ids(value)))

    def load(self, members: Views, key: int, bucket: Bucket | None = None) -> Array:
        """int64 [S]."""
        if self.member.endswith("npy"):
            return self._sequence(self._ids(members, key))
        return self._sequence(self.ids(self.read(members, key)))

    def ids(self, caption: str) -> list[int]:
        """A caption's token ids, without marks, of any length."""
        ids: list[int] = self.tokenizer.encode(self.clean(caption), add_special_tokens=False).ids
        return ids

    def _sequence(self, ids: list[int]) -> Array:
        """Token ids with their marks, cut or filled up to int64 [S]."""
        length, start, end = self.space.length, self.space.start_id, self.space.end_id
        ids = ids if start is None else [start, *ids]
        ids = ids[:length] if end is None else [*ids[: length - 1], end]
        sequence = self._empty.copy()
        sequence[: len(ids)] = ids
        return sequence

    def _ids(self, members: Views, key: int) -> list[int]:
        """One of the captions in an array of token ids [captions, longest]."""
        ids = row_of(members, self.member, key, self.first)
        if ids is None:
            captions = array_of(members, self.member)
            if captions.ndim != 2 or captions.dtype.kind != "i" or not len(captions):
                array = f"{captions.dtype} {list(captions.shape)}"
                raise SampleError(f"its .{self.member} member must hold whole numbers [captions, longest], not {array}")
            ids = captions[key % len(captions[: self.first])].tolist()
        ids = ids[: ids.index(NO_TOKEN)] if NO_TOKEN in ids else ids
        if ids and not 0 <= min(ids) <= max(ids) < self.space.vocabulary:
            raise SampleError(f"its .{self.member} member has the id {max(ids)}, and the vocabulary is {self.space.vocabulary}")
        return ids

    def encode_partly(self, value: str, unknown: int) -> tuple[Tensor, Tensor]:
        """(ids int64 [S], where they are known bool [S]) of a text with blanks (___).

        A blank takes `unknown` positions. If the text ends with a blank, nothing after it is known, not even its end.

        Raises:
            UserError: it is too long.
        """
        pieces = re.split(r"_{3,}", " ".join(value.split()))
        length, end, pad = self.space.length, self.space.end_id, self.space.pad_id
        closed = bool(pieces[-1].strip())
        marks = [end] if closed and end is not None else []
        parts = [self._piece_ids(piece) for piece in pieces]
        taken = len(self._start()) + sum(map(len, parts)) + (len(parts) - 1) * unknown + len(marks)
        if taken > length:
            raise UserError(
                f"the text takes {taken} tokens with its blanks, and the model's captions have {length}; shorten it"
            )
        ids = [*self._start(), *parts[0]]
        known = [True] * len(ids)
        for part in parts[1:]:
            ids += [0] * unknown + part
            known += [False] * unknown + [True] * len(part)
        ids += marks
        known += [True] * len(marks)
        rest = length - len(ids)
        fill = pad if pad is not None else end if end is not None else 0
        return torch.tensor([*ids, *[fill] * rest]), torch.tensor([*known, *[closed] * rest], dtype=torch.bool)

    def decode(self, state: Tensor) -> str:
        """int64 [S] to text, cut at the end mark; the mask state, the start mark and padding show as nothing."""
        ids = state.tolist()
        if self.space.end_id in ids:
            ids = ids[: ids.index(self.space.end_id)]
        hidden = {self.space.vocabulary, self.space.start_id, self.space.pad_id}
        text: str = self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
        return text.strip()

    def _piece_ids(self, piece: str) -> list[int]:
        """The tokens of a text between two blanks."""
        text = f" {self.clean(piece)}" if piece.startswith(" ") else self.clean(piece)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids if text.strip() else []
        return ids

    def _start(self) -> list[int]:
        return [] if self.space.start_id is None else [self.space.start_id]


def captions_of(members: Views, member: str) -> list[str]:
    """All captions in a member: json with a list under `captions`, else one text. Raises SampleError."""
    data = member_of(members, member)
    try:
        text = data.decode("utf-8-sig")
        captions = json.loads(text)["captions"] if member.endswith("json") else [text]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleError(f"its .{member} member holds no captions: {type(error).__name__} {error}") from None
    if not isinstance(captions, list) or not captions or not all(isinstance(item, str) for item in captions):
        raise SampleError(f"`captions` in its .{member} member must be a list of texts, not empty")
    if any("\ud800" <= letter <= "\udfff" for item in captions for letter in item):
        raise SampleError(f"a caption in its .{member} member holds half of a surrogate pair, which is no text")
    return captions


def load_tokenizer(path: str) -> Tokenizer:
    """A tokenizer.json, set up so that a caption that spells a special token does not become it.

    Raises:
        ConfigError: it is missing or damaged.
    """
    if not store.exists(path):
        raise ConfigError(f"tokenizer {path} does not exist; give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_buffer(store.read_bytes(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"tokenizer {path} cannot be read: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def normalise(caption: str) -> str:
    """HTML entities resolved, white space collapsed."""
    return " ".join(html.unescape(caption).split())


CLEANING = {"plain": normalise, "clip": clip.clean}
"""Functions that clean a caption before it is tokenized."""
