"""An ideal denoiser: the exact posterior of a finite data set of pairs, in closed form.

With it in place of the network every sign, schedule and conversion of the samplers is tested without any training.
Legend: B samples, N data points, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megadiff import rng
from megadiff.config.schema import Model
from megadiff.diffusion.build import build_processes
from megadiff.diffusion.gaussian import Gaussian
from megadiff.diffusion.masked import Masked
from megadiff.diffusion.uniform import Uniform
from megadiff.kernels.head_draw import draw_rows
from megadiff.types import CrossEntropy, Dense, Noised, Prediction, Readout, RowLogits, SampledRows, TokenDraws, TokenLosses

# Points 0 and 1 share the grid, points 1 and 2 the tokens: neither modality determines the other.
GRIDS = torch.tensor([[-1.0, -0.6], [-1.0, -0.6], [0.9, 0.8], [1.0, -0.9], [-0.1, 0.9]]).view(5, 1, 1, 2)
TOKENS = torch.tensor([[0, 1, 2], [3, 1, 4], [3, 1, 4], [0, 4, 4], [2, 2, 2]])
VOCABULARY = 5
SHARES = torch.tensor([0.15, 0.25, 0.2, 0.3, 0.1], dtype=torch.float64)
MISMATCH = -40.0
"""Log-likelihood of a visible token that a data point does not have: finite, since positions unmasked in the same step may
form a sentence that the data set lacks, and a posterior must exist there as well."""


class IdealDenoiser:
    """The posterior mean of the grid in the process's own target, and the tokens' posterior marginals."""

    def __init__(self, model: Model) -> None:
        processes = build_processes(model)
        tokens, grid = processes["tokens"], processes["grid"]
        assert isinstance(tokens, Masked | Uniform)
        assert isinstance(grid, Gaussian)
        self.tokens, self.grid = tokens, grid

    def posterior(self, noised: Noised) -> Tensor:
        """float64 [B, N]."""
        times = noised.clocks["grid"].double()
        alpha, sigma = self.grid.alpha(times), self.grid.sigma(times).clamp_min(1e-3)
        errors = noised.states["grid"].double()[:, None] - alpha[:, None, None, None, None] * GRIDS.double()
        logs = SHARES.log() - errors.square().flatten(2).sum(2) / (2 * sigma[:, None] ** 2)
        logs = logs + self._log_likelihood(noised.states["tokens"][:, None, :], noised.clocks["tokens"].double())
        return logs.softmax(1)

    def _log_likelihood(self, state: Tensor, times: Tensor) -> Tensor:
        """Of the noised tokens given every data point's, up to a constant, float64 [B, N]."""
        if isinstance(self.tokens, Masked):
            return MISMATCH * ((state != self.tokens.mask_id) & (state != TOKENS)).sum(2)
        share = self.tokens.schedule.share(times)[:, None, None]
        other = (share / VOCABULARY).clamp_min(1e-12)
        return torch.where(state == TOKENS, other + 1 - share, other).log().sum(2)

    def marginals(self, posterior: Tensor) -> Tensor:
        """Log-probabilities [B, S, V]."""
        shares = posterior @ torch.nn.functional.one_hot(TOKENS, VOCABULARY).double().flatten(1)
        return shares.view(len(posterior), *TOKENS.shape[1:], -1).clamp_min(1e-30).log()

    def __call__(self, noised: Noised, readout: Mapping[str, Readout]) -> Prediction:
        posterior = self.posterior(noised)
        prediction: Prediction = {}
        for name, request in readout.items():
            if isinstance(request, Dense):
                of_grid = name == "grid"
                prediction[name] = self._target(posterior, noised) if of_grid else self.marginals(posterior).float()
            elif isinstance(request, RowLogits):
                prediction[name] = self.marginals(posterior).flatten(0, 1)[request.rows].float()
            elif isinstance(request, SampledRows):
                prediction[name] = drawn_from(self.marginals(posterior), request)
            elif isinstance(request, TokenLosses):
                found = -self.marginals(posterior).gather(2, request.targets[..., None])[..., 0]
                entropies = torch.where(request.scored, found, 0.0).float()
                prediction[name] = CrossEntropy(entropies * request.weights, entropies)
        return prediction

    def _target(self, posterior: Tensor, noised: Noised) -> Tensor:
        times = noised.clocks["grid"].double()
        alpha = self.grid.alpha(times)[:, None, None, None]
        sigma = self.grid.sigma(times).clamp_min(1e-6)[:, None, None, None]
        clean = torch.einsum("bn,nchw->bchw", posterior, GRIDS.double())
        noise = (noised.states["grid"].double() - alpha * clean) / sigma
        return self.grid.target(clean, noise, times).float()


def drawn_from(logits: Tensor, request: SampledRows) -> TokenDraws:
    """What a head gives that has these logits [B, S, V]."""
    mixed = (request.weights[..., None] * logits.flatten(0, 1)[request.rows]).sum(0)
    return draw_rows(mixed, request.keys, request.rule)


def draw_pairs(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Clean states of `count` draws from the data set, and their data points under `index`."""
    uniforms = rng.uniform(rng.sample_keys(seed, torch.arange(count)), "data point", dtype=torch.float64).contiguous()
    index = torch.searchsorted(SHARES.cumsum(0), uniforms).clamp_max(len(SHARES) - 1)
    return {"index": index, "tokens": TOKENS[index], "grid": GRIDS[index]}


def cells(grid: Tensor, tokens: Tensor) -> Tensor:
    """int64 [B]: the data point that a sample is; N where it is none (its tokens are not those of its grid)."""
    grid_fits = (grid[:, None] - GRIDS).abs().flatten(2).amax(2) < 0.3
    both = grid_fits & (tokens[:, None] == TOKENS).all(2)
    return torch.where(both.any(1), both.long().argmax(1), len(SHARES))
