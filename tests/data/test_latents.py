"""Latents: read from shards, made from pictures, and shown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megadiff.config.errors import ConfigError
from megadiff.config.schema import Data, GridSpace, LatentField
from megadiff.data import npy
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.build import build_codecs
from megadiff.data.codecs.latents import LatentCodec
from megadiff.data.errors import SampleError
from megadiff.data.shards.shard import Members
from tests.data.small import make_autoencoder, png, tiny

SPACE = GridSpace(channels=4, height=4, width=6)
SCALE = 0.18215


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_autoencoder(tmp_path_factory.mktemp("autoencoder"))


def codec(**field: Any) -> LatentCodec:
    return LatentCodec(LatentField(**field), SPACE)


def stored(array: Any, member: str = "latents.npy") -> Members:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return {member: buffer.getvalue()}


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def picture(size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_latent_is_scaled(dtype: type) -> None:
    array = numbers(4, 4, 6).astype(dtype)
    state = codec().encode(codec().read(stored(array), 7))
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, torch.from_numpy(array).float() * SCALE)


def test_of_a_mean_and_a_deviation_one_latent_is_drawn_by_the_key() -> None:
    moments = np.stack([numbers(4, 4, 6), np.full((4, 4, 6), 0.5, dtype=np.float32)])
    draws = torch.stack([codec(scale=2.0).read(stored(moments), key) for key in range(2000)])
    noise = (draws / 2 - torch.from_numpy(moments[0])) / 0.5
    assert torch.equal(draws[5], codec(scale=2.0).read(stored(moments), 5))
    assert noise.mean(0).abs().max() < 5 / 2000**0.5
    assert abs(float(noise.var()) - 1) < 0.02


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "has no .latents.npy member"),
        ({"latents.npy": b"no array"}, "is no NumPy array"),
        (stored(numbers(4, 6, 4)), r"has the shape \[4, 6, 4\], not \[4, 4, 6\] or \[2, 4, 4, 6\]"),
        (stored(numbers(3, 4, 4, 6)), "has the shape"),
        (stored(np.zeros((4, 4, 6), dtype=np.int64)), "finite floating-point"),
        (stored(np.full((4, 4, 6), np.nan)), "finite floating-point"),
        (stored(np.array([{}], dtype=object)), "is no NumPy array"),
    ],
)
def test_what_is_no_latent_is_a_sample_error(members: Members, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        codec().read(members, 0)


def test_a_picture_becomes_the_mean_of_its_latents_and_comes_back_as_a_picture(autoencoder: str) -> None:
    from diffusers import AutoencoderKL

    pixels = torch.from_numpy(np.asarray(picture(), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    network = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        mean = network.encode(pixels).latent_dist.mean[0]
        shown = network.decode(mean[None]).sample[0].clamp(-1, 1)
    both = codec(autoencoder=autoencoder)
    state = both.encode(picture())
    torch.testing.assert_close(state, mean * SCALE)
    wanted = ((shown + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(both.decode(state), dtype=np.float32) - wanted).max() <= 1


def test_a_picture_of_another_size_is_scaled_and_cropped(autoencoder: str) -> None:
    both = codec(autoencoder=autoencoder, member="png")
    value = both.read({"png": png(np.asarray(picture((100, 40))))}, 0)
    state = both.encode(value)
    assert state.shape == (4, 4, 6)
    assert not state.requires_grad
    assert both.decode(state).size == (24, 16)


def test_without_an_autoencoder_latents_are_read_and_pictures_refused() -> None:
    assert codec().encode(torch.zeros(4, 4, 6)).shape == (4, 4, 6)
    for ask in (lambda: codec().decode(torch.zeros(4, 4, 6)), lambda: codec().encode(picture())):
        with pytest.raises(ConfigError, match=r"data.fields.image.autoencoder is not set.*give --autoencoder FOLDER"):
            ask()


def test_an_autoencoder_that_does_not_fit_is_refused(autoencoder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 4 latent channels, and the model's grid 3"):
        LatentCodec(LatentField(autoencoder=autoencoder), GridSpace(channels=3, height=4, width=4)).decode(torch.zeros(3, 4, 4))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        codec(autoencoder=str(tmp_path)).encode(picture())
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match="cannot be read as a diffusers AutoencoderKL"):
        codec(autoencoder=str(tmp_path)).encode(picture())


def test_a_field_of_latents_gets_its_codec() -> None:
    data, model = tiny()
    data = Data(train="", fields={**data.fields, "image": LatentField()})
    assert isinstance(build_codecs(data, model)["image"], LatentCodec)


@pytest.mark.parametrize(
    ("array", "fault"),
    [
        (np.zeros((4, 6, 4), "<f4"), "not of the sides of its bucket"),
        (np.zeros((3, 4, 4, 6), "<f4"), "not a mean and a deviation"),
        (np.zeros((3, 4, 6), "<f4"), "without 4 channels"),
        (np.zeros((4, 4, 6), ">f4"), "finite floating-point numbers"),
        (np.zeros((4, 4, 6), np.longdouble), "finite floating-point numbers"),
    ],
)
def test_latents_that_a_bucket_cannot_take_are_unreadable_samples(array: np.ndarray, fault: str) -> None:
    members = {"latents.npy": npy.dump(array)}
    with pytest.raises(SampleError, match=fault):
        codec().load(members, 0, Bucket(32, 48))
    assert codec().load({"latents.npy": npy.dump(np.zeros((2, 4, 8, 12), "<f2"))}, 0, Bucket(64, 96)).shape == (2, 4, 8, 12)
