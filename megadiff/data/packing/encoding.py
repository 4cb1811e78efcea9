"""Pictures and captions of shards to latents, token ids and features, once, so that training reads what it trains on.

Latents: an autoencoder's mean and deviation, float16 [2, C, H, W], from which training draws one per visit. Token ids: int32
[captions, longest], filled up with -1, without marks. Features: float16 [S, F] of a frozen vision model, for alignment (REPA,
arXiv 2410.06940).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megadiff import torchvision_ops
from megadiff.config.errors import ConfigError, UserError
from megadiff.config.schema import GridSpace, PixelField
from megadiff.data import npy
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.base import FEATURES, LATENTS, TOKENS, Array
from megadiff.data.codecs.captions import CLEANING, NO_TOKEN, captions_of, load_tokenizer
from megadiff.data.codecs.latents import PICTURE_CHANNELS, downscaling_of, load_autoencoder, own_device
from megadiff.data.codecs.pictures import PixelCodec
from megadiff.data.errors import SampleError
from megadiff.data.packing.pack import Transformed
from megadiff.data.packing.source import NOT_ENCODED
from megadiff.data.packing.units import Done, run_units
from megadiff.data.pictures import PICTURE_ENDINGS
from megadiff.data.shards.reader import ShardReader
from megadiff.data.shards.shard import Manifest, Members, Shard, Views, read_manifest, write_shard
from megadiff.storage import addresses, store

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and deviation per channel, which the vision models expect."""


@dataclass(frozen=True)
class Encoding:
    """How each sample is encoded.

    Attributes:
        autoencoder: a folder with a diffusers AutoencoderKL; None keeps pictures as they are.
        tokenizer: a tokenizer.json; None keeps captions as they are.
        cleaning: applied to a caption first, as in `CaptionField`.
        captions: ending of the member with the captions, json or txt.
        size: edge in pixels of shards that have no bucket.
        features: a folder with a transformers vision model (DINOv2).
        feature_stride: pixels per token of the features along an edge; 16 fits latents of 8 in patches of 2.
        keep: endings of members that are copied as they are.
        batch: pictures that the networks get at once.
        threads: threads that decode pictures.
        precision: precision of the autoencoder and the vision model.
    """

    autoencoder: str | None = None
    tokenizer: str | None = None
    cleaning: Literal["plain", "clip"] = "plain"
    captions: str = "json"
    size: int | None = None
    features: str | None = None
    feature_stride: int = 16
    keep: tuple[str, ...] = ()
    batch: int = 32
    threads: int = 4
    precision: Literal["fp32", "bf16"] = "fp32"


class Encoder:
    """Samples of raw members to samples of encoded ones."""

    def __init__(self, encoding: Encoding) -> None:
        """Raises ConfigError if nothing is to be encoded, or a model or tokenizer cannot be read."""
        if not (encoding.autoencoder or encoding.tokenizer or encoding.features):
            raise ConfigError("there is nothing to encode: give --autoencoder, --tokenizer or --features")
        self.encoding, self.device = encoding, own_device()
        self.autoencoder: Any = encoding.autoencoder and load_autoencoder(encoding.autoencoder, "--autoencoder")
        self.tokenizer: Any = encoding.tokenizer and load_tokenizer(encoding.tokenizer)
        self.vision: Any = encoding.features and _vision_model(encoding.features, self.device)
        self._pool = ThreadPoolExecutor(encoding.threads, thread_name_prefix="decode")

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the manifest, which the loader compares with the fields that read the shards."""
        members: dict[str, Any] = {}
        if self.autoencoder:
            scale = float(self.autoencoder.config.scaling_factor)
            members[LATENTS] = {
                "autoencoder": _fingerprint(self.encoding.autoencoder),
                "scale": scale,
                "factor": downscaling_of(self.autoencoder),
            }
        if self.tokenizer and self.encoding.tokenizer:
            digest = hashlib.sha256(store.read_bytes(self.encoding.tokenizer)).hexdigest()
            members[TOKENS] = {
                "tokenizer": digest,
                "cleaning": self.encoding.cleaning,
                "vocabulary": self.tokenizer.get_vocab_size(),
            }
        if self.vision:
            members[FEATURES] = {"model": _fingerprint(self.encoding.features), "stride": self.encoding.feature_stride}
        return {"encoded": members}

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the output depends on."""
        free = {"autoencoder", "tokenizer", "features", "batch", "threads"}
        return {**self.facts, **{key: value for key, value in asdict(self.encoding).items() if key not in free}}

    def __call__(self, samples: Mapping[str, Views], bucket: Bucket | None) -> Transformed:
        """Encode a shard's samples; those that cannot be are left out.

        Raises:
            UserError: pictures are to be encoded, and there is neither a bucket nor a size, or it does not fit the models.
        """
        faults: dict[str, str] = {}
        encoded: dict[str, Members] = {
            key: {ending: bytes(members[ending]) for ending in self.encoding.keep if ending in members}
            for key, members in samples.items()
        }
        if self.tokenizer:
            for key, members in samples.items():
                try:
                    encoded[key][TOKENS] = npy.dump(self._tokens(members))
                except SampleError as error:
                    faults[key] = str(error)
        if self.autoencoder or self.vision:
            wanted = {key: members for key, members in samples.items() if key not in faults}
            for key, members in self._pictures(wanted, self._size(bucket), faults):
                encoded[key] |= members
        left_out = {key: faults[key] for key in samples if key in faults}
        return Transformed({key: members for key, members in encoded.items() if key not in faults}, left_out)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _size(self, bucket: Bucket | None) -> Bucket:
        edge = self.encoding.size
        if bucket is None and edge is None:
            raise UserError("the shards have no buckets: give --size PX, the edge to which pictures are scaled and cropped")
        size = bucket or Bucket.parse(f"{edge}x{edge}")
        steps = [downscaling_of(self.autoencoder)] if self.autoencoder else []
        steps += [self.encoding.feature_stride] if self.vision else []
        for step in steps:
            if size.height % step or size.width % step:
                raise UserError(f"pictures of {size} px do not divide into steps of {step} px; choose other sizes or buckets")
        return size

    def _tokens(self, members: Views) -> Array:
        """int32 [captions, longest]."""
        clean = CLEANING[self.encoding.cleaning]
        captions = [clean(caption) for caption in captions_of(members, self.encoding.captions)]
        return filled_up([caption.ids for caption in self.tokenizer.encode_batch(captions, add_special_tokens=False)])

    def _pictures(self, samples: Mapping[str, Views], size: Bucket, faults: dict[str, str]) -> Iterator[tuple[str, Members]]:
        """Decode on threads two batches ahead, and encode batch by batch; what cannot be decoded goes to `faults`."""
        wanted = iter(samples.items())
        under_way: list[tuple[str, Future[Array]]] = []
        while True:
            lacking = 3 * self.encoding.batch - len(under_way)
            under_way += [(key, self._pool.submit(_pixels, members, size)) for key, members in islice(wanted, lacking)]
            if not under_way:
                return
            batch, under_way = under_way[: self.encoding.batch], under_way[self.encoding.batch :]
            read = []
            for key, future in batch:
                try:
                    read.append((key, future.result()))
                except SampleError as error:
                    faults[key] = str(error)
            if read:
                pixels = torch.from_numpy(np.stack([pixels for _, pixels in read])).to(self.device)
                yield from zip([key for key, _ in read], self._encoded(pixels), strict=True)

    @torch.inference_mode()
    def _encoded(self, pixels: Tensor) -> Sequence[Members]:
        """uint8 [B, H, W, 3] to members per sample."""
        made: list[Members] = [{} for _ in pixels]
        unit = pixels.permute(0, 3, 1, 2).float() / 255
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.encoding.precision == "bf16"):
            if self.autoencoder:
                found = self.autoencoder.encode(2 * unit - 1).latent_dist
                moments = torch.stack([found.mean.float(), found.std.float()], dim=1)
                _put(made, LATENTS, moments)
            if self.vision:
                _put(made, FEATURES, self._features(unit))
        return made

    def _features(self, unit: Tensor) -> Tensor:
        """float [B, S, F]: the vision model's tokens, as many along an edge as the pictures have strides."""
        patch = int(self.vision.config.patch_size)
        rows, columns = (edge // self.encoding.feature_stride for edge in unit.shape[2:])
        resized = torch.nn.functional.interpolate(unit, (rows * patch, columns * patch), mode="bicubic", antialias=True)
        mean, deviation = (torch.tensor(values, device=unit.device)[:, None, None] for values in (_MEAN, _DEVIATION))
        tokens: Tensor = self.vision((resized - mean) / deviation).last_hidden_state
        return tokens[:, -rows * columns :]  # the class and register tokens come first


def encode_shards(source: str, out: str, encoding: Encoding, *, rank: int = 0, world: int = 1) -> Manifest | None:
    """Encode every shard of a manifest into one of `out`; see `run_units` for processes, kills and what is returned.

    Raises:
        UserError: a shard, a model or a tokenizer cannot be read, or `out` holds shards that were made otherwise.
    """
    manifest = read_manifest(source)
    encoder = Encoder(encoding)
    names = [f"{number:06d}" for number in range(len(manifest.shards))]
    fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetch")
    reader = ShardReader(addresses.folder_of(source), manifest, fetchers=fetcher)

    def make(number: int) -> Done:
        reader.expect([n for n in (number, number + world) if n < len(names)])  # the next shard is fetched meanwhile
        entry, shard = manifest.shards[number], reader.shard(number)
        bucket = None if entry.bucket is None else Bucket.parse(entry.bucket)
        result = encoder(_samples(shard), bucket)
        left = tuple(
            {"source": f"{entry.name}/{key}", "reason": NOT_ENCODED, "detail": why} for key, why in result.left_out.items()
        )
        counts = {"written": len(result.samples), **({"left out": len(left)} if left else {})}
        shards = (write_shard(out, f"{names[number]}.tar", result.samples, entry.bucket),) if result.samples else ()
        return Done(shards, counts, left)

    digest = hashlib.sha256("".join(entry.sha256 for entry in manifest.shards).encode()).hexdigest()
    facts = {key: value for key, value in manifest.facts.items() if key not in ("encoded", "counts")}
    earlier = manifest.facts.get("encoded", {})
    try:
        return run_units(
            out,
            names,
            make,
            identity={"shards": digest, **encoder.identity},
            facts={**facts, "encoded": {**earlier, **encoder.facts["encoded"]}},
            rank=rank,
            world=world,
        )
    finally:
        encoder.close()
        fetcher.shutdown(cancel_futures=True)


def _samples(shard: Shard) -> dict[str, Views]:
    return {shard.key(place): shard.views(place) for place in range(len(shard))}


def _pixels(members: Views, size: Bucket) -> Array:
    """A sample's picture, uint8 [H, W, 3]."""
    member = next((ending for ending in PICTURE_ENDINGS if ending in members), None)
    if member is None:
        raise SampleError(f"it has no picture (it has {', '.join(sorted(members)) or 'nothing'})")
    space = GridSpace(channels=PICTURE_CHANNELS, height=size.height, width=size.width)
    return PixelCodec(PixelField(member=member), space).load(members, 0)


def _put(made: Sequence[Members], ending: str, values: Tensor) -> None:
    for members, value in zip(made, values.to(torch.float16).cpu().numpy(), strict=True):
        if not np.isfinite(value).all():
            raise UserError(f"{ending} holds numbers that float16 cannot; with --precision bf16, try fp32")
        members[ending] = npy.dump(value)


def filled_up(captions: Sequence[Sequence[int]]) -> Array:
    """Captions' ids as int32 [captions, longest], filled up with -1."""
    filled = np.full((len(captions), max(map(len, captions))), NO_TOKEN, dtype=np.int32)
    for row, ids in zip(filled, captions, strict=True):
        row[: len(ids)] = ids
    return filled


def _fingerprint(folder: str | None) -> str:
    """A hash of a model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder or "").iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _vision_model(folder: str, device: torch.device) -> Any:
    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"--features: {folder} has no config.json; give the folder of a transformers vision model (DINOv2)")
    torchvision_ops.declare_missing()
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"--features: {folder} cannot be read as a transformers model: {reason}") from None
    if not hasattr(model.config, "patch_size"):
        raise ConfigError(f"--features: {folder} is a {model.config.model_type}, not a vision transformer with patches")
    return model.eval().requires_grad_(False).to(device)
