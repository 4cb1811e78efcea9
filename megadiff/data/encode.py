"""Codecs: a sample's members to a modality's clean state, and a state back to something that people look at."""

from __future__ import annotations

import html
import io
import json
import re
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import (
    CaptionField,
    ClassField,
    Data,
    GridSpace,
    LatentField,
    Model,
    NumberField,
    PixelField,
    TokenSpace,
)
from megadiff.data import clip
from megadiff.data.columns import ClassCodec, NumberCodec
from megadiff.data.errors import SampleError
from megadiff.data.shards import Members
from megadiff.storage import store


class Codec(Protocol):
    """One modality's way in and out."""

    def read(self, members: Members, key: int) -> Any:
        """The value (a picture, a text) in a sample's members; `key` decides where there are several.

        Raises:
            SampleError: it is missing or damaged.
        """

    def encode(self, value: Any) -> Tensor:
        """A value to a clean state, without the batch axis."""

    def decode(self, state: Tensor) -> Any:
        """A state to a value."""


class PixelCodec:
    """Pictures: RGB on white, scaled and centre-cropped to the grid, values in [-1, 1]."""

    def __init__(self, field: PixelField, space: GridSpace) -> None:
        """Raises ConfigError if the grid has neither one nor three channels."""
        if space.channels not in (1, 3):
            raise ConfigError(f"a pixel field needs a grid of 1 or 3 channels, not {space.channels}")
        self.member, self.space = field.member, space

    def read(self, members: Members, key: int) -> Image.Image:
        if self.member not in members:
            raise SampleError(f"it has no .{self.member} member (it has {', '.join(sorted(members)) or 'none'})")
        try:
            with Image.open(io.BytesIO(members[self.member])) as picture:
                picture.load()
                return picture.copy()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SampleError(f"its .{self.member} member is no readable picture: {error}") from None

    def encode(self, value: Image.Image) -> Tensor:
        """A picture to float32 [C, H, W]."""
        picture = eight_bit(value).convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        cropped = _fit(ground.convert("RGB" if self.space.channels == 3 else "L"), self.space.width, self.space.height)
        pixels = np.asarray(cropped, dtype=np.float32).reshape(self.space.height, self.space.width, self.space.channels)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()

    def decode(self, state: Tensor) -> Image.Image:
        """float [C, H, W] to a picture; values outside [-1, 1] are clipped."""
        pixels = ((state.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(pixels if self.space.channels == 3 else pixels[..., 0])


def unknown_region(mask: Image.Image, space: GridSpace) -> Tensor:
    """A mask (white: unknown) to bool [C, H, W]; a place of the grid with any unknown pixel in it is unknown."""
    grey = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA")).convert("L")
    picture = grey.point(lambda value: 255 if value >= 128 else 0).convert(
        "F"
    )  # in 8 bits one pixel of many would round to none
    factor = max(space.width / picture.width, space.height / picture.height)
    size = (max(space.width, round(picture.width * factor)), max(space.height, round(picture.height * factor)))
    scaled = picture.resize(size, Image.Resampling.BOX)
    left, top = (scaled.width - space.width) // 2, (scaled.height - space.height) // 2
    cropped = scaled.crop((left, top, left + space.width, top + space.height))
    unknown = torch.from_numpy(np.asarray(cropped) > 0)
    return unknown.expand(space.channels, -1, -1)


_LONGEST_PX = 2**15
"""A picture that is longer than this once its short edge fits is no picture of anything, and could take all memory."""


def eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit greys scaled to 8 bits; Pillow's own conversion would make all above 255 white."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture, dtype=np.float64).clip(0, 65535) / 257).round().astype(np.uint8))


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale so that the picture covers width x height, then crop the centre. Raises SampleError if it is far too thin."""
    if picture.size == (width, height):
        return picture
    factor = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * factor)), max(height, round(picture.height * factor)))
    if max(size) > max(_LONGEST_PX, width, height):
        raise SampleError(f"it is {picture.width} x {picture.height} px, too thin to fill {width} x {height}")
    scaled = picture.resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


class CaptionCodec:
    """Captions: the start mark where there is one, tokens, the end mark, padding."""

    def __init__(self, field: CaptionField, space: TokenSpace) -> None:
        """Raises ConfigError if the tokenizer is missing or does not fit the space."""
        self.member, self.space = field.member, space
        self.clean = clip.clean if field.cleaning == "clip" else normalise
        path = field.tokenizer
        if not store.exists(path):
            raise ConfigError(f"tokenizer {path} does not exist; give the path of a tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_buffer(store.read_bytes(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"tokenizer {path} cannot be read: {error}") from None
        if self.tokenizer.get_vocab_size() != space.vocabulary:
            found = self.tokenizer.get_vocab_size()
            raise ConfigError(f"tokenizer {path} has {found} ids, and the model's vocabulary is {space.vocabulary}")
        # Captions are data: one that spells a special token must not become it.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def read(self, members: Members, key: int) -> str:
        captions = self._captions(members)
        return captions[key % len(captions)]

    def encode(self, value: str) -> Tensor:
        """A caption to int64 [S]; what is too long is cut so that the end mark stays."""
        ids = [*self._start(), *self.tokenizer.encode(self.clean(value), add_special_tokens=False).ids]
        length, end, pad = self.space.length, self.space.end_id, self.space.pad_id
        if end is not None:
            ids = [*ids[: length - 1], end]
        fill = pad if pad is not None else end if end is not None else 0
        ids = [*ids[:length], *[fill] * (length - len(ids))]
        return torch.tensor(ids, dtype=torch.int64)

    def encode_with_blanks(self, value: str, blank_tokens: int) -> tuple[Tensor, Tensor]:
        """A text with blanks (___) to int64 [S] ids and bool [S], where they are known.

        A blank takes `blank_tokens` positions. After a text that ends with a blank nothing is known, not even where it ends.

        Raises:
            UserError: it is too long.
        """
        pieces = re.split(r"_{3,}", " ".join(value.split()))
        ids = self._start()
        known = [True] * len(ids)
        for number, piece in enumerate(pieces):
            if number:
                ids += [0] * blank_tokens
                known += [False] * blank_tokens
            text = f" {self.clean(piece)}" if piece.startswith(" ") else self.clean(piece)
            found = self.tokenizer.encode(text, add_special_tokens=False).ids if text.strip() else []
            ids += found
            known += [True] * len(found)
        length, end, pad = self.space.length, self.space.end_id, self.space.pad_id
        closed = bool(pieces[-1].strip())
        if closed and end is not None:
            ids.append(end)
            known.append(True)
        if len(ids) > length:
            raise UserError(
                f"the text takes {len(ids)} tokens with its blanks, and the model's captions have {length}; shorten it"
            )
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

    def _start(self) -> list[int]:
        return [] if self.space.start_id is None else [self.space.start_id]

    def _captions(self, members: Members) -> list[str]:
        if self.member not in members:
            raise SampleError(f"it has no .{self.member} member (it has {', '.join(sorted(members)) or 'none'})")
        try:
            text = members[self.member].decode("utf-8")
            captions = json.loads(text)["captions"] if self.member.endswith("json") else [text]
        except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise SampleError(f"its .{self.member} member holds no captions: {type(error).__name__} {error}") from None
        if not isinstance(captions, list) or not captions or not all(isinstance(item, str) for item in captions):
            raise SampleError(f"`captions` in its .{self.member} member must be a list of texts, not empty")
        if any("\ud800" <= letter <= "\udfff" for item in captions for letter in item):
            raise SampleError(f"a caption in its .{self.member} member holds half of a surrogate pair, which is no text")
        return captions


def normalise(caption: str) -> str:
    """HTML entities resolved, white space collapsed."""
    return " ".join(html.unescape(caption).split())


def build_codecs(data: Data, model: Model) -> dict[str, Codec]:
    """A codec per modality.

    Raises:
        ConfigError: a field does not fit its modality's space, or a tokenizer is missing.
    """
    from megadiff.data.latents import LatentCodec  # which is built on the codec of pictures

    codecs: dict[str, Codec] = {}
    for name, modality in model.modalities.items():
        field, space = data.fields[name], modality.space
        if isinstance(field, PixelField) and isinstance(space, GridSpace):
            codecs[name] = PixelCodec(field, space)
        elif isinstance(field, LatentField) and isinstance(space, GridSpace):
            codecs[name] = LatentCodec(field, space, name)
        elif isinstance(field, CaptionField) and isinstance(space, TokenSpace):
            codecs[name] = CaptionCodec(field, space)
        elif isinstance(field, NumberField) and isinstance(space, GridSpace):
            codecs[name] = NumberCodec(field, space)
        elif isinstance(field, ClassField) and isinstance(space, TokenSpace):
            codecs[name] = ClassCodec(field, space)
        else:
            raise ConfigError(f"data.fields.{name} is {field.kind}, which cannot fill a {space.kind} space")
    return codecs
