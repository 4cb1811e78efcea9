"""Numbers that must not depend on each other, and evaluation that must not depend on what tames training."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from megadiff import rng
from megadiff.config.schema import Model, Sampling
from megadiff.diffusion.build import build_process, build_processes
from megadiff.diffusion.categorical_solvers import Ancestral, draws
from megadiff.diffusion.conditional import exact_losses
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.process import Process
from megadiff.diffusion.solvers import SolverStep
from megadiff.kernels.head_draw import row_uniforms
from megadiff.kernels.head_draw.reference import draw_with
from megadiff.types import DrawRule, Noised, Prediction, Readout, RowKeys
from tests.diffusion.ideal import IdealDenoiser, draw_pairs
from tests.diffusion.small import model_of, told

COUNT = 4000
KEYS = rng.sample_keys(9, torch.arange(COUNT))


def drawn(process: Process, what: str) -> torch.Tensor:
    """float64 [B]: one number that shows the random draw behind a process's method."""
    half, one = torch.full((COUNT,), 0.5), torch.ones(COUNT)
    if isinstance(process, Masked):
        clean = torch.zeros(COUNT, 3, dtype=torch.int64)
        masks = torch.full((COUNT, 3), process.mask_id)
        found = {
            "noise": lambda: process.noise(clean, half, KEYS).state,
            "guidance": lambda: process.renoise(clean, 0 * half, half, KEYS),
            "unmask": lambda: _rows(Ancestral(process, Sampling()).request(masks, SolverStep(one, half, KEYS, False)).rows[0]),
            "token": lambda: _numbers(draws(process.name, Sampling(), masks > 0, SolverStep(one, half, KEYS, False)).keys),
        }[what]()
    else:
        clean = torch.zeros(COUNT, 1, 1, 2)
        found = {
            "noise": lambda: process.noise(clean, one, KEYS).state,
            "guidance": lambda: process.renoise(clean, 0 * half, half, KEYS),
            "prior": lambda: process.prior(KEYS),
        }[what]()
    return found.flatten(1)[:, 0].double()


def _numbers(keys: RowKeys) -> torch.Tensor:
    return row_uniforms(keys, 5)[:, 0, 1].view(-1, 3)


def _rows(rows: torch.Tensor) -> torch.Tensor:
    return torch.zeros(COUNT * 3).index_fill(0, rows, 1.0).view(COUNT, 3)


def test_all_draws_of_all_modalities_from_one_key_are_independent():
    """A purpose without the modality's name would give two modalities of one kind the same noise."""
    modalities = model_of().modalities
    numbers = []
    for kind, whats in (("tokens", ("noise", "guidance", "unmask", "token")), ("grid", ("noise", "guidance", "prior"))):
        for name in ("first", "second"):
            numbers += [drawn(build_process(name, modalities[kind]), what) for what in whats]
    matrix = torch.corrcoef(torch.stack(numbers))
    assert (matrix - torch.eye(len(numbers), dtype=torch.float64)).abs().max() < 4.5 / COUNT**0.5


def test_a_rare_id_behind_a_frequent_one_is_drawn_at_its_own_rate():
    """1 - 1e-9 is 1 in float32: a cumulative sum in float32 would never give the last id."""
    logits = torch.tensor([[1.0, 1e-9]], dtype=torch.float64).log().float().repeat(2, 1)
    within = torch.tensor([1 - 0.5e-9, 1 - 2e-9], dtype=torch.float64)
    uniforms = torch.stack([torch.full_like(within, 0.5), within], dim=-1)[:, None]
    assert draw_with(logits, uniforms, DrawRule()).ids.tolist() == [1, 0]


def token_losses(model: Model) -> torch.Tensor:
    states = draw_pairs(100)
    clean = {"tokens": states["tokens"], "grid": states["grid"]}
    return exact_losses(IdealDenoiser(model), model, clean, KEYS[:100], target="tokens", given=["grid"], times=4)


@pytest.mark.parametrize("training", [{"weight_cap": 1.0}, {"loss": "plain"}, {"end_id": 4, "after_end_weight": 0.0}])
def test_evaluation_of_tokens_is_the_true_nelbo_whatever_tames_the_training_loss(training):
    torch.testing.assert_close(token_losses(model_of(**training)), token_losses(model_of()))


def test_visible_positions_do_not_enter_the_true_nelbo_of_a_model_trained_with_the_plain_loss():
    """The plain readout scores every position, so that visible ones carry a loss that the NELBO must leave out."""
    process = build_processes(model_of(loss="plain"))["tokens"]
    noised = process.noise(draw_pairs(200)["tokens"], torch.full((200,), 0.5), KEYS[:200])
    half = torch.full((200,), 0.5)
    losses = process.losses(told(process, noised, half, torch.ones(200, 3)), noised, half, exact=True)
    assert losses.sums.tolist() == (2.0 * (noised.state == 5).sum(1)).tolist()


def test_every_time_of_an_evaluation_has_its_own_noise_in_its_own_stratum():
    model = model_of()
    ideal = IdealDenoiser(model)
    seen: list[Noised] = []

    def watched(noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        seen.append(noised)
        return ideal(noised, readout)

    states = draw_pairs(COUNT)
    clean = {"tokens": states["tokens"], "grid": states["grid"]}
    exact_losses(watched, model, clean, KEYS, target="grid", given=["tokens"], times=4)
    noises = []
    for stratum, noised in enumerate(seen):
        times = noised.clocks["grid"]
        assert ((times >= stratum / 4) & (times <= (stratum + 1) / 4)).all()
        wide = times[:, None, None, None]
        noises.append(((noised.states["grid"] - (1 - wide) * clean["grid"]) / wide)[:, 0, 0, 0])
    rows = torch.stack((*noises, *(noised.clocks["grid"] for noised in seen))).double()
    assert (torch.corrcoef(rows) - torch.eye(8, dtype=torch.float64)).abs().max() < 4.5 / COUNT**0.5
