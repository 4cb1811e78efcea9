"""Conditions that end before their space does: packed into rows, the network gives what it gives on dense tokens."""

from __future__ import annotations

import pytest
import torch

from megadiff.types import Dense, Ragged, RowLogits
from tests.models.small import small_config, small_model, small_noised

LENGTHS = [2, 5, 1]


def ragged_noised():
    noised = small_noised()
    noised.visible["words"] = None
    ragged = {"words": Ragged(torch.tensor(LENGTHS, dtype=torch.int32), sum(LENGTHS), max(LENGTHS))}
    return noised, noised._replace(ragged=ragged)


def hidden_noised():
    """The same with the missing positions hidden as keys only."""
    noised, ragged = ragged_noised()
    visible = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return noised._replace(visible={"words": visible, "picture": None}), ragged


def gradients(model, outputs):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(outputs.square().sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_condition_without_its_padding_gives_the_same_picture_and_the_same_gradients(packs, positions):
    model = small_model(small_config(positions=(positions, "sincos")))
    hidden, ragged = hidden_noised()
    model.embed.packs = packs
    assert bool(model.embed(ragged).rows) == packs
    expected, found = (model(noised, {"picture": Dense()})["picture"] for noised in (hidden, ragged))
    torch.testing.assert_close(found, expected)
    for actual, wanted in zip(gradients(model, found), gradients(model, expected), strict=True):
        if wanted is None or actual is None:
            assert actual is None or not actual.any()
            assert wanted is None or not wanted.any()
        else:
            torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packs", [False, True])
def test_a_modality_that_is_whole_in_some_samples_only_is_read_out_there(packs):
    model = small_model()
    hidden, ragged = hidden_noised()
    model.embed.packs = packs
    rows = torch.arange(5, 10)  # the sample of full length
    expected, found = (model(noised, {"words": RowLogits(rows)})["words"] for noised in (hidden, ragged))
    torch.testing.assert_close(found, expected)


def test_nearly_full_conditions_stay_dense():
    _, noised = ragged_noised()
    full = Ragged(torch.tensor([5, 5, 4], dtype=torch.int32), 14, 5)
    assert not small_model().embed(noised._replace(ragged={"words": full})).rows


def test_packed_rows_are_the_leading_positions_sample_by_sample():
    _, noised = ragged_noised()
    stream = small_model().embed(noised)
    rows = stream.rows["words"]
    assert rows.places.tolist() == [0, 1, 5, 6, 7, 8, 9, 10]
    assert rows.samples.tolist() == [0, 0, 1, 1, 1, 1, 1, 2]
    assert rows.starts.tolist() == [0, 2, 7]
    dense = small_model().embed.states["words"](noised.states["words"])
    assert stream.dense("words").shape == dense.shape
