"""Embeddings, positions, norms, initial values."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from megadiff.config.schema import GridSpace, TokenSpace
from megadiff.kernels.qk_norm_pack.reference import rms_normalise, rotate
from megadiff.models.embeddings import (
    PatchEmbedding,
    TokenEmbedding,
    patchify,
    rotary_table,
    sincos_positions,
    time_features,
    unpatchify,
)
from megadiff.models.layers import CachedConstant, Linear, Mlp, Modulation, Rule
from megadiff.models.mmdit import initialise

SPACE = GridSpace(channels=3, height=8, width=12, patch=2)
CPU = torch.device("cpu")


def test_unpatchify_undoes_patchify():
    grid = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(grid, (2, 2)), 3, (2, 2), 4, 6), grid)


def test_patches_run_row_by_row_and_hold_row_column_channel():
    grid = torch.arange(3 * 8 * 12).reshape(1, 3, 8, 12)
    patches = patchify(grid, (2, 2))
    assert patches.shape == (1, 24, 12)
    for index, row, column, channel in [(0, 0, 0, 0), (7, 1, 0, 2), (23, 1, 1, 1)]:
        y, x = index // 6 * 2 + row, index % 6 * 2 + column
        assert patches[0, index, (row * 2 + column) * 3 + channel] == grid[0, channel, y, x]


def test_sincos_positions_hold_the_column_in_the_first_half_and_the_row_in_the_second():
    table = sincos_positions(16, CPU, 4, 6)
    row, column, k = 3, 4, 2
    rate = 10000.0 ** (-k / 4)
    vector = table[row * 6 + column]
    wanted = [math.sin(column * rate), math.cos(column * rate), math.sin(row * rate), math.cos(row * rate)]
    assert torch.allclose(vector[[k, 4 + k, 8 + k, 12 + k]], torch.tensor(wanted))


def test_time_features_are_cosines_then_sines_of_the_scaled_clock():
    features = time_features(torch.tensor([0.25]), 1000.0)
    assert features.shape == (1, 256)
    assert features[0, 0].item() == pytest.approx(math.cos(250.0), abs=1e-4)
    assert features[0, 128 + 64].item() == pytest.approx(math.sin(250.0 / 100.0), abs=1e-4)


@pytest.mark.parametrize("axis", ["tokens", "rows", "columns"])
def test_rotary_scores_depend_only_on_relative_positions(axis):
    sizes = (9,) if axis == "tokens" else (6, 5)
    step = {"tokens": 1, "rows": 5, "columns": 1}[axis]
    table = rotary_table(16, CPU, *sizes)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at: int, to: int) -> float:
        return float((rotate(query, table[:, at : at + 1]) * rotate(key, table[:, to : to + 1])).sum())

    assert score(0, step) == pytest.approx(score(2 * step, 3 * step), abs=1e-5)
    assert score(0, step) != pytest.approx(score(0, 2 * step), abs=1e-3)


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    vectors = torch.randn(2, 9, 3, 16)
    turned = rotate(vectors, rotary_table(16, CPU, 9))
    assert torch.allclose(turned.norm(dim=-1), vectors.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[:, 0], vectors[:, 0])


def test_rows_and_columns_of_a_grid_turn_different_channels():
    table = rotary_table(16, CPU, 4, 4)
    assert torch.equal(table[:, 1, 0, :4], table[:, 0, 0, :4])
    assert torch.equal(table[:, 4, 0, 4:], table[:, 0, 0, 4:])
    assert not torch.allclose(table[:, 1, 0, 4:], table[:, 0, 0, 4:])


def test_a_learned_grid_and_shorter_token_sequences_get_their_positions():
    patches = initialise(PatchEmbedding(SPACE, 16, "learned"), 0)
    assert torch.allclose(patches(torch.zeros(1, 3, 8, 12))[0], patches.positions)
    tokens = initialise(TokenEmbedding(TokenSpace(vocabulary=5, length=9), 16, "learned"), 0)
    mask = torch.full((1, 4), 5)
    assert torch.equal(tokens(mask)[0], tokens.weight[5] + tokens.positions[:4])


def test_rms_norm_has_length_sqrt_d_and_survives_a_zero_vector():
    vectors = torch.randn(4, 2, 8)
    gain = torch.full((2, 8), 3.0)
    assert torch.allclose(rms_normalise(vectors, gain).norm(dim=-1), torch.full((4, 2), 3 * 8**0.5))
    assert torch.equal(rms_normalise(torch.zeros(1, 2, 8), gain), torch.zeros(1, 2, 8))


def test_gelu_is_exact_and_swiglu_gates_the_second_half_with_the_first():
    tokens = torch.randn(2, 3, 8)
    gelu = initialise(Mlp(8, 16, "gelu"), 0)
    assert torch.allclose(gelu(tokens), gelu.down(F.gelu(gelu.up(tokens), approximate="none")))
    swiglu = initialise(Mlp(8, 16, "swiglu"), 0)
    gate, value = swiglu.up(tokens)[..., :16], swiglu.up(tokens)[..., 16:]
    assert torch.allclose(swiglu(tokens), swiglu.down(gate * torch.sigmoid(gate) * value))


def test_linear_maps_start_by_their_rule():
    rules: list[Rule] = ["xavier", "normal", "zero", "torch"]
    xavier, normal, zero, default = (initialise(Linear(64, 128, rule=rule), 0) for rule in rules)
    assert xavier.weight.abs().max() <= (6 / 192) ** 0.5
    assert normal.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not zero.weight.any()
    assert default.weight.abs().max() <= 1 / 8
    assert default.bias.any()
    assert not any(linear.bias.any() for linear in (xavier, normal, zero))


def test_a_linear_map_casts_its_input_to_its_weights_type():
    assert Linear(4, 4).bfloat16()(torch.randn(2, 4)).dtype == torch.bfloat16


def test_modulation_starts_with_the_named_slots_at_one_whatever_the_conditioning():
    first, second, third = initialise(Modulation(4, 3, ones=(1,)), 0)(torch.randn(2, 4))
    assert first.shape == (2, 4)
    assert not first.any()
    assert not third.any()
    assert torch.equal(second, torch.ones(2, 4))


def test_a_table_made_in_inference_mode_serves_training_and_is_not_pickled():
    table = CachedConstant(zeros)
    with torch.inference_mode():
        table(CPU)
    scale = torch.ones(3, requires_grad=True)
    (scale * table(CPU)).sum().backward()
    assert pickle.loads(pickle.dumps(table)).cache == {}


def zeros(device: torch.device) -> torch.Tensor:
    return torch.zeros(3, device=device)
