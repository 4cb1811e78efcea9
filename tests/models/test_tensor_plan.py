"""The plan of tensor parallelism, without processes: every number of a split parameter lies on one rank."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megadiff.models.names import named_parameters
from megadiff.models.tensor_plan import splits
from megadiff.weights.boxes import Extent
from tests.models.small import small_config, small_model

WORDS = {"kind": "tokens", "vocabulary": 12, "length": 5}
SPLIT = ("projection", "output.weight", "mlp.up", "mlp.down.weight", "modulation.weight")


def model_of(**changes):
    modalities = {
        "words": {"space": WORDS, "process": {"kind": "masked", "loss": "plain", "mask_class": True}, "tower_depth": 1},
        "picture": {**small_config().modalities["picture"].model_dump(), "width": 32},
    }
    return small_model(small_config(modalities=modalities, heads=4, attention_bias=True, **changes))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_the_boxes_of_all_ranks_hold_every_number_of_a_split_parameter_once(tensor, mlp):
    model = model_of(mlp=mlp)
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(model)}
    seen = {name: np.zeros(math.prod(shapes[name]), int) for name in splits(model, tensor, 0)}
    for rank in range(tensor):
        for name, part in splits(model, tensor, rank).items():
            assert part.shape == shapes[name]
            size = sum(math.prod(stop - start for start, stop in box) for box in part.boxes)
            runs = Extent(0, size, part.boxes).runs(part.shape)
            assert runs[:, 2].sum() == size
            for start, _, length in runs:
                seen[name][start : start + length] += 1
            assert math.prod(part.local) >= size
            assert math.prod(part.local) == size or name == "embed.states.words.weight"
    assert all((counts == 1).all() for counts in seen.values())


def test_blocks_and_vocabularies_are_split_and_nothing_else_is():
    model = model_of(mlp="swiglu")
    expected = {"embed.states.words.weight", "heads.words.weight", "heads.words.bias"}
    expected |= {f"heads.{name}.modulation.weight" for name in ("words", "picture")}
    blocks = [name for name, _ in named_parameters(model) if name.startswith(("joint.", "towers."))]
    expected |= {name for name in blocks if any(f".{part}" in name for part in SPLIT)}
    assert set(splits(model, 2, 0)) == expected


def test_local_shapes_and_boxes_are_those_of_heads_halves_and_rows():
    last = splits(model_of(mlp="swiglu"), 4, 3)
    assert last["joint.0.parts.words.projection.linear.weight"] == (
        (144, 16),
        (((36, 48), (0, 16)), ((84, 96), (0, 16)), ((132, 144), (0, 16))),  # one head of each: query, key, value
        (36, 16),
    )
    assert last["joint.0.parts.words.projection.query_gain"] == ((4, 12), (((3, 4), (0, 12)),), (1, 12))
    assert last["joint.0.parts.words.mlp.up.bias"] == ((96,), (((36, 48),), ((84, 96),)), (24,))
    assert last["joint.0.parts.words.mlp.down.weight"] == ((16, 48), (((0, 16), (36, 48)),), (16, 12))
    assert last["joint.0.parts.picture.modulation.weight"] == ((192, 32), (((0, 192), (24, 32)),), (192, 8))
    assert last["embed.states.words.weight"] == ((13, 16), (((12, 13), (0, 16)),), (4, 16))  # three rows of padding
    assert last["heads.words.weight"] == ((12, 16), (((9, 12), (0, 16)),), (3, 16))
