"""The data: the shards, the field that each modality is read from, the order of samples."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, ValidationError

from megadiff.config.schema.base import LocalPath, Name, NotNegative, Positive, Section, Share
from megadiff.config.schema.model import GridSpace, Space, TokenSpace


class DataField(Section):
    """Where a modality is read from: a member of each sample. Further kinds are subclasses of this one, anywhere, and are named
    as `kind: module:Class`."""

    CODEC: ClassVar[str] = ""
    """module:Class of the codec (a megadiff.data.codecs.base.Codec) that reads and shows it; by name, as it needs torch."""
    FILES: ClassVar[tuple[str, ...]] = ()
    """Keys of this field that name a file or folder needed beside the weights."""
    kind: str
    member: str

    def misfit(self, space: Space) -> str:
        """Why it cannot fill a space; empty if it can."""
        return ""

    def unshown(self, where: str) -> str:
        """Why its states cannot be shown to people; empty if they can. `where` is its place in the run, for the sentence."""
        return ""


class PixelField(DataField):
    """A modality read from a picture: resized and centre-cropped to the modality's grid, values in [-1, 1], on white."""

    CODEC: ClassVar = "megadiff.data.codecs.pictures:PixelCodec"
    kind: Literal["pixels"] = "pixels"
    member: str = "png"
    """Ending of the tar member."""

    def misfit(self, space: Space) -> str:
        if not isinstance(space, GridSpace):
            return _wrong_kind(self, space)
        return "" if space.channels in (1, 3) else f"pixels, which fill 1 or 3 channels, and its grid has {space.channels}"


class LatentField(DataField):
    """A modality of an autoencoder's latents: read as such from the shards, or made from a picture by the autoencoder."""

    CODEC: ClassVar = "megadiff.data.codecs.latents:LatentCodec"
    kind: Literal["latents"] = "latents"
    member: str = "latents.npy"
    """Ending of the tar member: a NumPy array, [C, H, W] (a latent) or [2, C, H, W] (mean and deviation, from which one is
    drawn per visit), not yet multiplied by `scale`."""
    FILES: ClassVar = ("autoencoder",)
    autoencoder: str | None = None
    """A local folder with a diffusers AutoencoderKL; needed to read or show pictures."""
    scale: Annotated[float, Field(gt=0)] = 0.18215
    """Latents are multiplied by it, so that their deviation is about 1 (Stable Diffusion's autoencoder: 0.18215)."""

    def misfit(self, space: Space) -> str:
        return "" if isinstance(space, GridSpace) else _wrong_kind(self, space)

    def unshown(self, where: str) -> str:
        if self.autoencoder is not None:
            return ""
        return (
            f"{where}.autoencoder is not set, and it takes an autoencoder to read or show pictures; set it, or give "
            "--autoencoder FOLDER (a diffusers AutoencoderKL such as stabilityai/sd-vae-ft-mse)"
        )


class CaptionField(DataField):
    """A modality read from captions: one of the sample's captions (or of its `first`) is drawn per visit and tokenized."""

    CODEC: ClassVar = "megadiff.data.codecs.captions:CaptionCodec"
    kind: Literal["caption"] = "caption"
    member: str = "json"
    """Ending of the tar member: json with a list under `captions`, txt with one caption, or tokens.npy with their token ids
    (what `megadiff data encode` writes: int32 [captions, longest], filled up with -1, without marks)."""
    FILES: ClassVar = ("tokenizer",)
    tokenizer: str
    """Path of a Hugging Face tokenizer.json."""
    cleaning: Literal["plain", "clip"] = "plain"
    """plain: HTML entities resolved, white space collapsed; clip: ftfy first and lower case after, as CLIP's tokenizer does."""
    first: Positive | None = None
    """Only so many captions of a sample are read, its first ones; None reads all."""

    def misfit(self, space: Space) -> str:
        return "" if isinstance(space, TokenSpace) else _wrong_kind(self, space)


class ColumnField(DataField):
    """A modality read from a column of a table."""

    FILES: ClassVar = ("columns",)
    member: str = "json"
    column: str
    columns: str
    """Path of the columns.json that `megadiff data table` writes."""


class NumberField(ColumnField):
    """A 1 x 1 x 1 modality read from a column of numbers, by its rank among the training data's as a normal quantile."""

    CODEC: ClassVar = "megadiff.data.codecs.columns:NumberCodec"
    kind: Literal["number"] = "number"

    def misfit(self, space: Space) -> str:
        if not isinstance(space, GridSpace):
            return _wrong_kind(self, space)
        single = (space.channels, space.height, space.width) == (1, 1, 1)
        return "" if single else "a number, which fills a grid of 1 x 1 x 1"


class ClassField(ColumnField):
    """A modality of one token read from a column of categories."""

    CODEC: ClassVar = "megadiff.data.codecs.columns:ClassCodec"
    kind: Literal["class"] = "class"

    def misfit(self, space: Space) -> str:
        if not isinstance(space, TokenSpace):
            return _wrong_kind(self, space)
        single = space.length == 1 and space.end_id is None
        return "" if single else "a class, which fills a token space of length 1 without an end_id"


def _wrong_kind(field: DataField, space: Space) -> str:
    return f"{field.kind}, which cannot fill a {space.kind} space"


OTHER = "module:Class"
_KINDS = ("pixels", "latents", "caption", "number", "class")


def _kind_of(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return OTHER if isinstance(kind, str) and ":" in kind else kind


def _imported(value: Any) -> Any:
    """A field of a class that is named as module:Class."""
    if isinstance(value, DataField):
        return value
    kind = str(value["kind"])
    module, _, name = kind.partition(":")
    try:
        field = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"kind {kind} cannot be imported ({reason}); PYTHONPATH must name the folder of its module") from None
    if not (isinstance(field, type) and issubclass(field, DataField) and field.CODEC):
        raise ValueError(f"kind {kind} is no subclass of megadiff.config.schema.DataField with a CODEC")
    try:
        return field.model_validate(value)
    except ValidationError as error:
        raise ValueError("; ".join(_fault_of(field, fault) for fault in error.errors())) from None


def _fault_of(field: type[DataField], fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] != "extra_forbidden":
        return f"{place}: {fault['msg']}"
    near = difflib.get_close_matches(place, field.model_fields, n=1, cutoff=0.5)
    return f"unknown key {place}; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(field.model_fields)}")


FieldSource = Annotated[
    Annotated[PixelField, Tag("pixels")]
    | Annotated[LatentField, Tag("latents")]
    | Annotated[CaptionField, Tag("caption")]
    | Annotated[NumberField, Tag("number")]
    | Annotated[ClassField, Tag("class")]
    | Annotated[SerializeAsAny[DataField], BeforeValidator(_imported), Tag(OTHER)],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_kind",
        custom_error_message=f"kind must be one of {', '.join(_KINDS)}, or the {OTHER} of another field",
    ),
]


class Cache(Section):
    """A node-local folder for shards that come from afar, shared by the ranks of the node."""

    folder: LocalPath
    max_bytes: Positive = 100 * 2**30
    """Size above which the least used shards are dropped; it must hold the open shards (see `Data.cache`) and a few more."""


class Data(Section):
    """Where samples come from and in which order."""

    train: str | Annotated[dict[Name, str], Field(min_length=1)]
    """Manifest of the training shards: a path or an s3://, gs://, az://, http(s):// address; or several by name, mixed in every
    batch in proportion to their sizes or to a stage's `mixture`."""
    held_out: str | None = None
    """Manifest of the shards that are never trained on."""
    fields: dict[Name, FieldSource]
    features: dict[Name, str] = Field(default_factory=dict)
    """Ending, by modality, of the tar member with precomputed features (a NumPy array [S, F]) that a stage may align with."""
    lanes: Positive = 8
    """Lanes of the sample order; a divisor of the global batch and a multiple of the number of data-parallel ranks."""
    block_shards: Positive = 4
    """Samples are shuffled within blocks of this many shards' worth of a lane."""
    max_unreadable_share: Share = 0.01
    """Largest share of undecodable samples among those read so far; above it the run stops."""
    workers: NotNegative = 2
    """Decoding threads per rank; 0 decodes, and fetches shards, in the training thread."""
    prefetch_batches: Positive = 4
    """Global batches that are decoded ahead."""
    downloads: Positive = 4
    """Shards that a rank fetches at once, ahead of their use."""
    cache: Cache | None = None
    """None keeps distant shards in memory: on average 1.5 block_shards per lane of the rank."""

    @property
    def sources(self) -> dict[str, str]:
        """Manifests of the training shards, by name."""
        return {"train": self.train} if isinstance(self.train, str) else dict(self.train)

    @property
    def reference(self) -> str:
        """Manifest of the shards that samples are compared with: the held-out ones, else the first training source."""
        return self.held_out or next(iter(self.sources.values()))
