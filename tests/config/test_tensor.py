"""Sizes that do not divide by the tensor-parallel ranks are named, each with what would fit."""

from __future__ import annotations

import pytest

from megadiff.config.tensor import refusals
from tests.models.small import small_config


def config(**changes):
    modalities = {"words": {"space": {"kind": "tokens", "vocabulary": 24, "length": 5}, "process": {"kind": "masked"}}}
    return small_config(**{"modalities": modalities, "width": 16, "heads": 8, "mlp": "gelu", **changes})


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_a_number_of_ranks_that_divides_all_sizes_is_accepted(tensor):
    assert refusals(config(), tensor) == []


@pytest.mark.parametrize(
    ("tensor", "changes", "sentence"),
    [
        (8, {"heads": 4}, "model.heads (4) must be a multiple of the tensor-parallel ranks (8); {} 4"),
        (
            8,
            {"width": 12, "mlp_ratio": 4 / 3},
            "the width of words (12) must be a multiple of the tensor-parallel ranks (8); {} 4",
        ),
        (
            4,
            {"mlp_ratio": 0.625},
            "the hidden width of words's MLPs (10) must be a multiple of the tensor-parallel ranks (4); {} 2",
        ),
        (3, {"heads": 6, "width": 12, "mlp_ratio": 1.5, "head_dim": 4}, None),
        (16, {"heads": 16}, "the vocabulary of words (24) must be a multiple of the tensor-parallel ranks (16); {} 8"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_the_nearest_number_of_ranks_that_fits(tensor, changes, sentence):
    expected = [] if sentence is None else [sentence.format("numbers of ranks that fit the model:")]
    assert refusals(config(**changes), tensor) == expected


def test_every_size_that_does_not_divide_has_its_sentence_and_all_name_the_same_numbers():
    faults = refusals(config(), 3)
    assert len(faults) == 3  # the vocabulary, 24, divides by 3
    assert all(fault.endswith("numbers of ranks that fit the model: 2 or 4") for fault in faults)
