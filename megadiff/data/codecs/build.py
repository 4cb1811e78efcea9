"""The codecs of fields, and the check that encoded shards fit the fields that read them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping

from megadiff.config import checks
from megadiff.config.alignment import check_features
from megadiff.config.errors import ConfigError
from megadiff.config.schema import Data, DataField, Model
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.base import PICTURE, Codec
from megadiff.data.shards.shard import Manifest


def check_manifest(address: str, manifest: Manifest, data: Data, model: Model, features: Iterable[str] = ()) -> None:
    """Compare the facts of encoded shards with the fields that read them.

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
        facts = manifest.facts.get("encoded", {}).get(field.member, {})
        codec = codec_of(field)
        if facts:
            codec.check_encoded(field, facts, address, f"data.fields.{name}")
        modality = model.modalities.get(name)
        if buckets and codec.medium == PICTURE and modality and modality.positions == "learned":
            raise ConfigError(
                f"{address} has buckets, and model.modalities.{name}.positions are learned for one size; take sincos or rope"
            )


def codec_of(field: DataField) -> type[Codec]:
    """The class that a field names. Raises ConfigError if it cannot be imported."""
    module, _, name = field.CODEC.partition(":")
    try:
        codec = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the codec of {field.kind} fields, {field.CODEC}, cannot be imported: {reason}") from None
    if not (isinstance(codec, type) and issubclass(codec, Codec) and hasattr(codec, "medium")):
        raise ConfigError(
            f"the codec of {field.kind} fields, {field.CODEC}, is no megadiff.data.codecs.base.Codec with a `medium`"
        )
    return codec


def build_codecs(data: Data, model: Model) -> dict[str, Codec]:
    """A codec per modality.

    Raises:
        ConfigError: a field does not fit its modality's space, or a tokenizer is missing.
    """
    codecs: dict[str, Codec] = {}
    for name, modality in model.modalities.items():
        field = data.fields[name]
        checks.require(checks.field_faults(name, field, modality.space))
        make: Callable[..., Codec] = codec_of(field)
        codecs[name] = make(field, modality.space, name)
    return codecs


def table_columns(codecs: Mapping[str, Codec]) -> dict[str, str]:
    """The column of each modality, if all modalities come from a table; else empty."""
    columns = {name: codec.column for name, codec in codecs.items() if codec.column is not None}
    return columns if len(columns) == len(codecs) else {}
