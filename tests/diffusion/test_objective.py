"""The objective: the same loss for any split of a batch, and what is scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megadiff import rng
from megadiff.diffusion.conditional import exact_losses
from megadiff.diffusion.objective import DiffusionObjective
from megadiff.types import Batch, LossTerms, TokenLosses
from tests.diffusion.ideal import GRIDS, SHARES, TOKENS, IdealDenoiser, draw_pairs
from tests.diffusion.small import batch_of, model_of, part_of, stage_of

MODEL = model_of()
DENOISER = IdealDenoiser(MODEL)
MIXED = {"tokens": {"conditioning": {"clean": 0.2}, "loss_weight": 0.3}, "grid": {"conditioning": {"absent": 0.2}}}

ONES = {"tokens": torch.ones(()), "grid": torch.ones(())}


def pairs(count: int) -> Batch:
    drawn = draw_pairs(count)
    return batch_of({"tokens": drawn["tokens"], "grid": drawn["grid"]})


def losses_of(objective: DiffusionObjective, parts: list[Batch]) -> list[LossTerms]:
    """As an engine does it: counts of all micro-batches first, then every one with the same normaliser."""
    prepared = [objective.prepare(part) for part in parts]
    counts = {name: sum(one.counts[name] for one in prepared) for name in objective.scored}
    normaliser = {name: 1 / count for name, count in counts.items()}
    return [objective.score(DENOISER(one.noised, one.readout), one, normaliser) for one in prepared]


@pytest.mark.parametrize("parts", [2, 3, 12])
@pytest.mark.parametrize("config", [{}, {"loss": "plain"}, {"end_id": 4, "after_end_weight": 0.5}])
def test_the_loss_is_the_same_for_any_split_into_micro_batches(parts, config):
    objective = DiffusionObjective(model_of(**config), stage_of(12, **MIXED), seed=1)
    batch = pairs(12)
    batch = replace(batch, weight=torch.tensor([1.0, 0.0] + [1.0] * 10))
    (whole,) = losses_of(objective, [batch])
    split = losses_of(objective, [part_of(batch, rows) for rows in torch.randperm(12).chunk(parts)])
    assert sum(part.total for part in split).item() == pytest.approx(whole.total.item(), rel=1e-5)
    for name in objective.scored:
        assert sum(part.sums[name] for part in split).item() == pytest.approx(whole.sums[name].item(), rel=1e-5)
        assert sum(part.counts[name] for part in split).item() == pytest.approx(whole.counts[name].item())


def test_the_total_is_the_weighted_sum_of_the_mean_losses():
    objective = DiffusionObjective(MODEL, stage_of(32, **MIXED), seed=1)
    (terms,) = losses_of(objective, [pairs(32)])
    expected = 0.3 * terms.sums["tokens"] / terms.counts["tokens"] + terms.sums["grid"] / terms.counts["grid"]
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-6)
    for name in objective.scored:
        assert terms.sample_sums[name].sum().item() == pytest.approx(terms.sums[name].item(), rel=1e-6)
        assert terms.sample_counts[name].sum().item() == pytest.approx(terms.counts[name].item())


def test_counts_before_the_prediction_are_those_after_it():
    objective = DiffusionObjective(model_of(end_id=4), stage_of(12, **MIXED), seed=1)
    prepared = objective.prepare(pairs(12))
    terms = objective.score(DENOISER(prepared.noised, prepared.readout), prepared, ONES)
    for name in objective.scored:
        assert prepared.counts[name].item() == terms.counts[name].item()


def test_the_loss_gives_gradients_to_scored_samples_only_and_the_terms_carry_none():
    objective = DiffusionObjective(MODEL, stage_of(64, grid={"conditioning": {"clean": 0.5}}), seed=1)
    prepared = objective.prepare(pairs(64))
    prediction = DENOISER(prepared.noised, prepared.readout)
    leaves = {"tokens": prediction["tokens"].weighted.requires_grad_(), "grid": prediction["grid"].requires_grad_()}
    terms = objective.score(prediction, prepared, ONES)
    assert not any(value.requires_grad for value in (*terms.sums.values(), *terms.sample_sums.values()))
    terms.total.backward()
    touched = leaves["grid"].grad.flatten(1).abs().sum(1) > 0
    held = prepared.times["grid"] == 0
    assert held.sum() == 32
    assert not touched[held].any()
    assert touched[~held].any()


def test_the_noise_of_a_sample_is_the_same_in_any_batch():
    objective = DiffusionObjective(MODEL, stage_of(16), seed=1)
    batch = pairs(16)
    rows = torch.tensor([9, 2, 14])
    whole, part = objective.prepare(batch), objective.prepare(part_of(batch, rows))
    for name in objective.processes:
        assert torch.equal(part.noised.states[name], whole.noised.states[name][rows])
        assert torch.equal(part.noised.clocks[name], whole.noised.clocks[name][rows])


def test_a_sample_of_weight_0_changes_nothing_whatever_it_holds():
    objective = DiffusionObjective(MODEL, stage_of(8), seed=1)
    batch = replace(pairs(8), weight=torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1]))
    junk = {name: state.clone() for name, state in batch.states.items()}
    junk["grid"][3], junk["tokens"][3] = 1e3, 0
    (clean,), (spoilt,) = losses_of(objective, [batch]), losses_of(objective, [replace(batch, states=junk)])
    rest = losses_of(objective, [part_of(batch, torch.tensor([0, 1, 2, 4, 5, 6, 7]))])[0]
    assert clean.total.item() == pytest.approx(spoilt.total.item(), rel=1e-6)
    assert clean.total.item() == pytest.approx(rest.total.item(), rel=1e-6)
    assert clean.counts["tokens"] == 21
    assert clean.counts["grid"] == 14
    readout = objective.prepare(batch).readout["tokens"]
    assert isinstance(readout, TokenLosses)
    assert not readout.scored[3].any()


def test_the_same_modalities_are_read_out_whatever_the_samples():
    """ZeRO-3 gathers weights in the order of calls: a rank that skipped a head would wait for ever."""
    for share in (0.0, 0.5, 1.0):
        objective = DiffusionObjective(MODEL, stage_of(8, tokens={"conditioning": {"clean": share}}), seed=1)
        for weight in (torch.ones(8), torch.zeros(8)):
            prepared = objective.prepare(replace(pairs(8), weight=weight))
            assert list(prepared.readout) == ["tokens", "grid"]
            terms = objective.score(DENOISER(prepared.noised, prepared.readout), prepared, ONES)
            assert torch.isfinite(terms.total)


@pytest.mark.parametrize("section", [{"predicted": False}, {"loss_weight": 0.0}])
def test_a_modality_that_is_not_scored_is_not_read_out_but_is_still_noised_at_its_times__released_code_fault_t1(section):
    """The released code's stage 1 left the text clean: its `use_all_times` noised the image alone (PAPER.md, T1)."""
    count = 4000
    objective = DiffusionObjective(MODEL, stage_of(count, tokens=section), seed=1)
    prepared = objective.prepare(pairs(count))
    assert list(prepared.readout) == ["grid"]
    times = prepared.noised.clocks["tokens"]
    assert abs(times.mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack((times, prepared.noised.clocks["grid"])))[0, 1]) < 4 / count**0.5
    hidden = (prepared.noised.states["tokens"] == 5).float().mean(1)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (times > low) & (times <= low + 0.25)
        share, expected = hidden[inside].mean().item(), times[inside].mean().item()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / (3 * inside.sum().item())) ** 0.5


@pytest.mark.parametrize(
    "config", [{}, {"loss": "plain"}, {"loss": "plain", "mask_class": True}, {"end_id": 4, "after_end_weight": 0.5}]
)
def test_the_readout_tells_how_many_positions_are_scored(config):
    objective = DiffusionObjective(model_of(**config), stage_of(12, **MIXED), seed=1)
    prepared = objective.prepare(replace(pairs(12), weight=torch.tensor([1.0, 0.0] + [1.0] * 10)))
    readout = prepared.readout["tokens"]
    assert isinstance(readout, TokenLosses)
    assert 0 < readout.number == readout.scored.sum() < readout.scored.numel()


def test_a_caption_that_is_only_a_condition_ends_at_its_end_mark():
    model = model_of(end_id=4)
    objective = DiffusionObjective(model, stage_of(64, tokens={"conditioning": {"clean": 0.5}}), seed=1)
    batch = pairs(64)
    batch.states["tokens"][:, 1:] = 4
    prepared = objective.prepare(batch)
    held = prepared.times["tokens"] == 0
    ragged = prepared.noised.ragged["tokens"]
    assert ragged.lengths.tolist() == torch.where(held, 2, 3).tolist()
    assert (ragged.total, ragged.longest) == (int(ragged.lengths.sum()), 3)


# ---------------------------------------------------------------------------------------------------------- evaluation


def entropy(labels: list[tuple]) -> float:
    shares: dict[tuple, float] = {}
    for label, share in zip(labels, SHARES.tolist(), strict=True):
        shares[label] = shares.get(label, 0.0) + share
    return -sum(share * torch.tensor(share).log().item() for share in shares.values())


GRID_LABELS = [tuple(grid.flatten().tolist()) for grid in GRIDS]
TOKEN_LABELS = [tuple(tokens.tolist()) for tokens in TOKENS]
JOINT_LABELS = [grid + tokens for grid, tokens in zip(GRID_LABELS, TOKEN_LABELS, strict=True)]


def ideal_losses(target: str, given: tuple[str, ...], states: dict[str, Tensor], *, times: int = 8) -> Tensor:
    count = len(states["tokens"])
    keys = rng.sample_keys(5, torch.arange(count))
    clean = {"tokens": states["tokens"], "grid": states["grid"]}
    return exact_losses(DENOISER, MODEL, clean, keys, target=target, given=given, times=times)


@pytest.mark.parametrize(
    ("given", "nats"),
    [((), entropy(TOKEN_LABELS)), (("grid",), entropy(JOINT_LABELS) - entropy(GRID_LABELS))],
    ids=["alone", "given the grid"],
)
def test_exact_nelbo_of_the_ideal_denoiser_is_the_entropy_of_the_tokens(given, nats):
    """Any order of unmasking factorises the same joint distribution, so the ideal NELBO is tight."""
    losses = ideal_losses("tokens", given, draw_pairs(3000))
    assert abs(losses.mean().item() - nats / 3) < 4 * losses.std().item() / len(losses) ** 0.5


def test_grids_are_predicted_better_given_their_own_tokens_than_alone_or_given_others():
    states = draw_pairs(1000)
    own = ideal_losses("grid", ("tokens",), states).mean()
    alone = ideal_losses("grid", (), states).mean()
    others = ideal_losses("grid", ("tokens",), {**states, "tokens": states["tokens"].roll(1, 0)}).mean()
    assert own < 0.8 * alone
    assert alone < others


def test_evaluation_losses_do_not_depend_on_the_batch():
    states = draw_pairs(20)
    keys = rng.sample_keys(5, torch.arange(20))
    clean = {"tokens": states["tokens"], "grid": states["grid"]}
    options = {"target": "tokens", "given": ("grid",), "times": 3}
    whole = exact_losses(DENOISER, MODEL, clean, keys, **options)
    part = exact_losses(DENOISER, MODEL, {n: s[4:9] for n, s in clean.items()}, keys[4:9], **options)
    torch.testing.assert_close(part, whole[4:9])


def test_tokens_of_a_batch_on_a_gpu_are_noised_on_the_host():
    objective = DiffusionObjective(model_of(end_id=4), stage_of(12, **MIXED), seed=1)
    batch = pairs(12)
    expected = objective.prepare(batch)
    host = replace(batch, states={"tokens": batch.states["tokens"]})
    elsewhere = replace(batch, states={**batch.states, "tokens": torch.full_like(batch.states["tokens"], 99)}, host=host)
    prepared = objective.prepare(elsewhere)
    assert torch.equal(prepared.noised.states["tokens"], expected.noised.states["tokens"])
    assert torch.equal(prepared.noised.states["grid"], expected.noised.states["grid"])
    for own, other in zip(prepared.readout["tokens"], expected.readout["tokens"], strict=True):
        assert torch.equal(own, other) if isinstance(own, Tensor) else own == other
    assert batch.to(torch.device("meta")).host.states.keys() == {"tokens"}
    assert batch.to(torch.device("cpu")).host is None
