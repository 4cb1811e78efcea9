"""The data: the shards, the field that each modality is read from, the order of samples."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megadiff.config.schema.base import LocalPath, Name, NotNegative, Positive, Section, Share


class PixelField(Section):
    """A modality read from a picture: resized and centre-cropped to the modality's grid, values in [-1, 1], on white."""

    FILES: ClassVar[tuple[str, ...]] = ()
    """Of every field: its keys that name a file or folder which is needed beside the weights."""
    kind: Literal["pixels"] = "pixels"
    member: str = "png"
    """Ending of the tar member."""


class LatentField(Section):
    """A modality of an autoencoder's latents: read as such from the shards, or made from a picture by the autoencoder."""

    kind: Literal["latents"] = "latents"
    member: str = "latents.npy"
    """Ending of the tar member: a NumPy array, [C, H, W] (a latent) or [2, C, H, W] (mean and deviation, from which one is
    drawn per visit), not yet multiplied by `scale`."""
    FILES: ClassVar = ("autoencoder",)
    autoencoder: str | None = None
    """A local folder with a diffusers AutoencoderKL; needed to read or show pictures."""
    scale: Annotated[float, Field(gt=0)] = 0.18215
    """Latents are multiplied by it, so that their deviation is about 1 (Stable Diffusion's autoencoder: 0.18215)."""


class CaptionField(Section):
    """A modality read from captions: one of the sample's captions is drawn per visit and tokenized."""

    kind: Literal["caption"] = "caption"
    member: str = "json"
    """Ending of the tar member: json with a list under `captions`, txt with one caption, or tokens.npy with their token ids
    (what `megadiff data encode` writes: int32 [captions, longest], filled up with -1, without marks)."""
    FILES: ClassVar = ("tokenizer",)
    tokenizer: str
    """Path of a Hugging Face tokenizer.json."""
    cleaning: Literal["plain", "clip"] = "plain"
    """plain: HTML entities resolved, white space collapsed; clip: ftfy first and lower case after, as CLIP's tokenizer does."""


class NumberField(Section):
    """A 1 x 1 x 1 modality read from a column of numbers, by its rank among the training data's as a normal quantile."""

    kind: Literal["number"] = "number"
    member: str = "json"
    column: str
    FILES: ClassVar = ("columns",)
    columns: str
    """Path of the columns.json that `megadiff data table` writes."""


class ClassField(Section):
    """A modality of one token read from a column of categories."""

    kind: Literal["class"] = "class"
    member: str = "json"
    column: str
    FILES: ClassVar = ("columns",)
    columns: str
    """Path of the columns.json that `megadiff data table` writes."""


FieldSource = Annotated[PixelField | LatentField | CaptionField | NumberField | ClassField, Field(discriminator="kind")]


class Cache(Section):
    """A node-local folder for shards that come from afar, shared by the ranks of the node."""

    folder: LocalPath
    max_bytes: Positive = 100 * 2**30
    """The least used shards are dropped above this; room for what is open (see `Data.cache`) and a few more is the least."""


class Data(Section):
    """Where samples come from and in which order."""

    train: str | Annotated[dict[Name, str], Field(min_length=1)]
    """Manifest of the training shards: a path or an s3://, gs://, az://, http(s):// address; or several by name, which are
    mixed in every batch in the proportion of their sizes, or as a stage's `mixture` says."""
    held_out: str | None = None
    """Manifest of the shards that are never trained on."""
    fields: dict[Name, FieldSource]
    features: dict[Name, str] = Field(default_factory=dict)
    """By modality the ending of a tar member with precomputed features, a NumPy array [S, F]: what a stage may align with."""
    lanes: Positive = 8
    """L: divides the global batch and is a multiple of every number of data-parallel ranks."""
    block_shards: Positive = 4
    """Samples are shuffled within blocks of this many shards' worth of a lane."""
    max_unreadable_share: Share = 0.01
    """A run stops when a larger share of the samples read so far could not be decoded."""
    workers: NotNegative = 2
    """Decoding threads per rank; 0 decodes, and fetches shards, in the training thread."""
    prefetch_batches: Positive = 4
    """Global batches that are decoded ahead."""
    downloads: Positive = 4
    """Shards that a rank fetches at once, ahead of their use."""
    cache: Cache | None = None
    """Without one, distant shards are held in memory: lanes per rank x 1.5 block_shards of them on average."""

    @property
    def sources(self) -> dict[str, str]:
        """Manifests of the training shards, by name."""
        return {"train": self.train} if isinstance(self.train, str) else dict(self.train)

    @property
    def reference(self) -> str:
        """What samples are compared with: the shards that are held out, else the first to train on."""
        return self.held_out or next(iter(self.sources.values()))
