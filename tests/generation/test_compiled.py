"""`megadiff sample --compile` draws what it draws without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megadiff.config.schema import Sampling
from megadiff.generation.generate import generate
from megadiff.generation.request import GenerateRequest


def test_samples_are_not_others_for_it():
    plain = GenerateRequest("runs/one", "joint", "out")
    assert replace(plain, compile=True).record() == plain.record() != replace(plain, seed=1).record()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # on importing Inductor
def test_a_compiled_network_draws_the_same(exported, tmp_path):
    shared = {"checkpoint": str(exported), "task": "text-to-image", "prompt": ("red heart", "cat"), "n": 2}
    sampling = Sampling(steps=3, guidance=2.0)
    for name, compiled in (("plain", False), ("compiled", True)):
        generate(GenerateRequest(out=str(tmp_path / name), compile=compiled, sampling=sampling, **shared))
    pictures = sorted((tmp_path / "plain").glob("*.image.png"))
    assert len(pictures) == 4
    for one in pictures:
        pixels = [np.asarray(Image.open(file), dtype=int) for file in (one, tmp_path / "compiled" / one.name)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
