"""Weights and their codecs, ready to draw from; optionally with another autoencoder or picture size."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch

from megadiff.config.errors import UserError
from megadiff.config.schema import Data, GridSpace, Model
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.base import PICTURE, Codec
from megadiff.data.codecs.build import build_codecs
from megadiff.weights import loading
from megadiff.weights.loading import AUTOENCODER, Loaded


def load(
    address: str,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    *,
    autoencoder: str | None = None,
    size: str | None = None,
) -> Loaded:
    """Load weights for sampling; see `megadiff.weights.loading.load`.

    Args:
        autoencoder: replaces the one that the latent fields name.
        size: HEIGHTxWIDTH of pictures in pixels; None takes the model's.

    Raises:
        UserError: the address holds nothing loadable, or the model cannot make pictures of that size.
    """
    loaded = loading.load(address, weights, device)
    if autoencoder is not None:
        loaded = replace(loaded, data=_with_autoencoder(loaded.data, autoencoder))
    return loaded if size is None else replace(loaded, model=_of_size(loaded, Bucket.parse(size)))


def codecs_of(loaded: Loaded) -> dict[str, Codec]:
    """By modality, the codec between its states and values for people."""
    return build_codecs(loaded.data, loaded.model)


def _of_size(loaded: Loaded, size: Bucket) -> Model:
    """The model with its pictures' grids in another size, which learned positions do not allow."""
    modalities, codecs = dict(loaded.model.modalities), codecs_of(loaded)
    for name, modality in loaded.model.modalities.items():
        codec, space = codecs[name], modality.space
        if codec.medium != PICTURE or not isinstance(space, GridSpace):
            continue
        if modality.positions == "learned":
            raise UserError(f"--size: the positions of {name} are learned for {space.height} x {space.width}; leave it out")
        factor = codec.downscaling
        step = Bucket(*(factor * side for side in space.patch_sides))
        if size.height % step.height or size.width % step.width:
            raise UserError(f"--size {size} must be made of multiples of {step} pixels for {name}")
        grid = space.model_copy(update={"height": size.height // factor, "width": size.width // factor})
        modalities[name] = modality.model_copy(update={"space": grid})
        needed, available = _least_bytes(grid, loaded.model.width), _memory()
        if needed > available:
            much = f"{needed / 2**30:,.0f} GiB for one picture, and there are {available / 2**30:,.0f}"
            raise UserError(f"--size {size} takes at least {much}; take a smaller one")
    return loaded.model.model_copy(update={"modalities": modalities})


def _least_bytes(space: GridSpace, width: int) -> int:
    """Least bytes of one sample, in float32: its state, a prediction, and one attention's input, q, k and v."""
    places = space.height * space.width
    return 4 * (2 * space.channels * places + 4 * width * (places // math.prod(space.patch_sides)))


def _memory() -> int:
    """Bytes of memory of the device that draws samples."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _with_autoencoder(data: Data, folder: str) -> Data:
    fields = {
        name: field.model_copy(update={AUTOENCODER: folder}) if AUTOENCODER in field.FILES else field
        for name, field in data.fields.items()
    }
    return data.model_copy(update={"fields": fields})
