"""Which codec a field asks for, and whether encoded shards fit the fields that read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from megadiff.config import checks
from megadiff.config.alignment import check_features
from megadiff.config.errors import ConfigError
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
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.base import Codec
from megadiff.data.codecs.captions import CaptionCodec
from megadiff.data.codecs.columns import ClassCodec, NumberCodec
from megadiff.data.codecs.latents import LatentCodec
from megadiff.data.codecs.pictures import PixelCodec
from megadiff.data.shards.shard import Manifest
from megadiff.storage import store


def check_manifest(address: str, manifest: Manifest, data: Data, model: Model, features: Iterable[str] = ()) -> None:
    """Compare what encoded shards say of themselves with the fields that read them.

    Args:
        features: modalities whose precomputed features are read as well.

    Raises:
        ConfigError: latents were made for another scale, tokens by another tokenizer, or shards have buckets and the model
            learned positions, or features of another number than the model has tokens.
    """
    buckets = {str(Bucket.parse(bucket)) for bucket in {shard.bucket for shard in manifest.shards} if bucket is not None}
    for name in features:
        check_features(address, buckets, manifest.facts.get("encoded", {}), data, model, name)
    for name, field in data.fields.items():
        told = manifest.facts.get("encoded", {}).get(field.member, {})
        where = f"data.fields.{name}"
        if isinstance(field, LatentField) and told and told["scale"] != field.scale:
            raise ConfigError(f"{where}.scale is {field.scale:g}, and {address} holds latents for {told['scale']:g}")
        if isinstance(field, CaptionField) and told:
            found = hashlib.sha256(store.read_bytes(field.tokenizer)).hexdigest()
            if found != told["tokenizer"]:
                raise ConfigError(f"{where}.tokenizer ({field.tokenizer}) is not the one that made the tokens of {address}")
            if field.cleaning != told["cleaning"]:
                raise ConfigError(f"{where}.cleaning is {field.cleaning}, and {address} holds tokens of {told['cleaning']}")
        modality = model.modalities.get(name)
        if buckets and isinstance(field, PixelField | LatentField) and modality and modality.positions == "learned":
            raise ConfigError(
                f"{address} has buckets, and model.modalities.{name}.positions are learned for one size; take sincos or rope"
            )


def build_codecs(data: Data, model: Model) -> dict[str, Codec]:
    """A codec per modality.

    Raises:
        ConfigError: a field does not fit its modality's space, or a tokenizer is missing.
    """
    codecs: dict[str, Codec] = {}
    for name, modality in model.modalities.items():
        field, space = data.fields[name], modality.space
        checks.require(checks.field_faults(name, field, space))
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
            raise TypeError(f"{name}: there is no codec for a {field.kind} field in a {space.kind} space")
    return codecs
