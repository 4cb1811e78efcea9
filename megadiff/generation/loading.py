"""Weights and their codecs, ready to draw from; with another autoencoder or size of pictures, where one is asked for."""

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
        autoencoder: takes the place of the one that its latent fields name.
        size: HEIGHTxWIDTH in pixels of pictures, other than the one that the model names.

    Raises:
        UserError: nothing loadable is there, or the model has no pictures of that size.
    """
    loaded = loading.load(address, weights, device)
    if autoencoder is not None:
        loaded = replace(loaded, data=_with_autoencoder(loaded.data, autoencoder))
    return loaded if size is None else replace(loaded, model=_of_size(loaded, Bucket.parse(size)))


def codecs_of(loaded: Loaded) -> dict[str, Codec]:
    """By modality what turns its states into values that people read, and back."""
    return build_codecs(loaded.data, loaded.model)


def _of_size(loaded: Loaded, size: Bucket) -> Model:
    """The model with its pictures' grids of another size, which only learned positions would stand against."""
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
        needed, there = _least_bytes(grid, loaded.model.width), _memory()
        if needed > there:
            much = f"{needed / 2**30:,.0f} GiB for one picture, and there are {there / 2**30:,.0f}"
            raise UserError(f"--size {size} takes at least {much}; take a smaller one")
    return loaded.model.model_copy(update={"modalities": modalities})


def _least_bytes(space: GridSpace, width: int) -> int:
    """What one sample takes at least, in float32: its state, a prediction, and one attention's input, q, k and v."""
    places = space.height * space.width
    return 4 * (2 * space.channels * places + 4 * width * (places // math.prod(space.patch_sides)))


def _memory() -> int:
    """Bytes of the device that samples are drawn on."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _with_autoencoder(data: Data, folder: str) -> Data:
    fields = {
        name: field.model_copy(update={AUTOENCODER: folder}) if AUTOENCODER in field.FILES else field
        for name, field in data.fields.items()
    }
    return data.model_copy(update={"fields": fields})
