"""The losses of one modality at chosen times, some of the others given and the rest absent.

Legend: P samples, K times of each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.objective import noised_of
from megadiff.diffusion.process import Losses, Process
from megadiff.diffusion.times import SMALLEST_TIME
from megadiff.types import Denoiser


def losses_at(
    denoiser: Denoiser,
    processes: Mapping[str, Process],
    clean: Mapping[str, Tensor],
    times: Tensor,
    keys: Tensor,
    *,
    target: str,
    given: Collection[str],
    rows: int,
    exact: bool = False,
) -> Losses:
    """The loss of `target` at each time: `given` modalities are clean at t = 0, the rest is absent, the prior at t = 1.

    Args:
        clean: states [P, ...] of `target` and the given modalities.
        times: float32 [K, P].
        keys: int64 [K, P], of the noise; whether a modality is given changes nothing of it.
        rows: how many of the K x P are computed in one call of the denoiser.
        exact: take the true weight in time, not the training one.

    Returns:
        Sums and counts, float32 [K, P] each.
    """
    count, sums, counts = keys.shape[1], [], []
    samples = torch.arange(count, device=keys.device).expand_as(keys)
    for at, own, sample in zip(*(torch.split(values.flatten(), rows) for values in (times, keys, samples)), strict=True):
        noised = processes[target].noise(clean[target][sample], at, own)
        states, clocks = dict[str, Tensor](), dict[str, Tensor]()
        for name, process in processes.items():
            if name == target:
                states[name], clocks[name] = noised.state, at
            elif name in given:
                states[name], clocks[name] = clean[name][sample], torch.zeros_like(at)
            else:
                states[name], clocks[name] = process.prior(own), torch.ones_like(at)
        everywhere = torch.ones_like(at, dtype=torch.bool)
        readout = {target: processes[target].readout(noised, at, everywhere)}
        prediction = denoiser(noised_of(processes, states, clocks, {target: everywhere}), readout)
        losses = processes[target].losses(prediction[target], noised, at, exact=exact)
        sums.append(losses.sums)
        counts.append(losses.counts)
    return Losses(torch.cat(sums).view_as(times), torch.cat(counts).view_as(times))


def exact_losses(
    denoiser: Denoiser,
    model: Model,
    clean: Mapping[str, Tensor],
    keys: Tensor,
    *,
    target: str,
    given: Collection[str],
    times: int,
    rows: int | None = None,
) -> Tensor:
    """The mean over all times of the loss of `target` per element, float64 [P], the true weight in time; see `losses_at`.

    For grids it is the mean squared error, for tokens the negative evidence lower bound (NELBO) in nats per token.

    The NELBO is an integral over time, of masked tokens (Sahoo et al., arXiv 2406.07524; Shi et al., arXiv 2406.04329)

        -log p(x | given) <= int_0^1 w(t) E[sum over masked positions i of -log p(x_i | x_t, given)] dt,
        w(t) = -alpha'(t) / (1 - alpha(t)),

    without further terms, since x_1 is all masks; for uniform noise see `Uniform`. Training caps w, which here is as it is. One
    time is drawn in each of K equal strata, t_k = (k + u_k) / K with uniform u_k: the mean of the integrand over them has the
    integral as its expectation, and no more variance than K times drawn anywhere. Times below 1e-5 are moved up to it.

    Args:
        keys: int64 [P]; of times and noise.
        times: K.
        rows: see `losses_at`; by default P.
    """
    return stratum_losses(denoiser, model, clean, keys, target=target, given=given, times=times, rows=rows).mean(0)


def stratum_losses(
    denoiser: Denoiser,
    model: Model,
    clean: Mapping[str, Tensor],
    keys: Tensor,
    *,
    target: str,
    given: Collection[str],
    times: int,
    rows: int | None = None,
) -> Tensor:
    """The losses whose mean over times is `exact_losses`, by stratum of times: float64 [K, P]."""
    own = torch.stack([rng.fold(keys, stratum) for stratum in range(times)])
    strata = torch.arange(times, device=keys.device)[:, None]
    at = ((strata + rng.uniform(own.flatten(), "evaluation time").view_as(own)) / times).clamp_min(SMALLEST_TIME)
    processes, rows = build_processes(model), rows or len(keys)
    losses = losses_at(denoiser, processes, clean, at, own, target=target, given=given, rows=rows, exact=True)
    return losses.sums.double() / losses.counts.double()
