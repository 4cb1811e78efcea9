"""Distances between two sets of features, of generated and of reference pictures, in float64.

Legend: N generated, M reference, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megadiff.config.errors import UserError

Features = NDArray[np.floating[Any]]
"""[N, D]."""

FEWEST = 10
"""Fewest pictures of either set; distances between fewer say nothing."""
KID_SUBSETS, KID_SUBSET = 100, 1000
"""Subsets, and the most pictures of each, over which the kernel distance is averaged (clean-fid's)."""
MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""k of precision and recall (arXiv 1904.06991), and of density and coverage (arXiv 2002.09797)."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_ROWS = 1024


@dataclass(frozen=True)
class Moments:
    """A set of features as a normal distribution.

    Attributes:
        mean, covariance: [D] and [D, D].
        count: how many pictures, if that is known.
        factor: [R, D] with factor^T factor = covariance and R < D, if there is one.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int | None = None
    factor: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, features: Features) -> Moments:
        """Raises UserError if there are fewer than FEWEST."""
        check_count(features, FEWEST)
        values, count = features.astype(np.float64), len(features)
        factor = (values - values.mean(0)) / np.sqrt(count - 1)
        return cls(values.mean(0), factor.T @ factor, count, factor if count < values.shape[1] else None)

    @property
    def rank_deficient(self) -> bool:
        """Whether there were too few pictures (no more than D) for a covariance of full rank: the distance is then biased."""
        return self.count is not None and self.count <= len(self.mean)


def check_count(features: Features, fewest: int) -> None:
    """Raises UserError if there are fewer features than that."""
    if len(features) < fewest:
        raise UserError(f"there are {len(features)} pictures, and this metric takes {fewest} or more on either side")


def frechet_distance(one: Moments, other: Moments) -> float:
    """|mu_1 - mu_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) (Heusel et al., arXiv 1706.08500, eq. 6).

    With C = F^T F the last trace is the sum of the singular values of F_1 F_2^T: unlike a square root of C_1 C_2 it needs no
    correction where a covariance is singular, and of few pictures it takes no time.
    """
    singular = np.linalg.svd(_factor(one) @ _factor(other).T, compute_uv=False)
    difference = one.mean - other.mean
    return float(difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * singular.sum())


def _factor(moments: Moments) -> NDArray[np.float64]:
    if moments.factor is not None:
        return moments.factor
    values, vectors = np.linalg.eigh(moments.covariance)
    factor: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))).T
    return factor


def kernel_distance(generated: Features, reference: Features, seed: int = 0) -> float:
    """The unbiased squared MMD of the kernel (x.y / D + 1)^3 (KID: Binkowski et al., arXiv 1801.01401), a mean over subsets.

    Subsets are drawn as clean-fid draws them, so that the same seed gives its number.

    Raises:
        UserError: a set has fewer than FEWEST.
    """
    for features in (generated, reference):
        check_count(features, FEWEST)
    chance = np.random.RandomState(seed)
    size, width = min(len(generated), len(reference), KID_SUBSET), generated.shape[1]
    total = 0.0
    for _ in range(KID_SUBSETS):
        x, y = (
            features[chance.choice(len(features), size, replace=False)].astype(np.float64)
            for features in (reference, generated)
        )
        within = (x @ x.T / width + 1) ** 3 + (y @ y.T / width + 1) ** 3
        between = (x @ y.T / width + 1) ** 3
        total += (within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * between.mean()
    return float(total / KID_SUBSETS)


def precision_recall(generated: Features, reference: Features, neighbours: int = MANIFOLD_NEIGHBOURS) -> tuple[float, float]:
    """The share of generated pictures within the reference's manifold, and of reference pictures within the generated one.

    A manifold is the union of the balls around its pictures that reach to their k-th nearest neighbour (Kynkaanniemi et al.,
    arXiv 1904.06991, eq. 1 to 3).

    Raises:
        UserError: a set has fewer than FEWEST.
    """
    return _share_within(generated, reference, neighbours), _share_within(reference, generated, neighbours)


def density_coverage(generated: Features, reference: Features, neighbours: int = DENSITY_NEIGHBOURS) -> tuple[float, float]:
    """How many of the reference's balls a generated picture lies in, over k; and the share of balls with any picture in them.

    Both are about 1 for equal distributions; density is not bounded by 1 (Naeem et al., arXiv 2002.09797, eq. 3 and 4).

    Raises:
        UserError: a set has fewer than FEWEST.
    """
    radii = _radii(reference, neighbours)
    inside, nearest = 0, torch.full((len(reference),), torch.inf, dtype=torch.float64)
    check_count(generated, FEWEST)
    for distances in _distances(generated, reference):
        inside += int((distances < radii).sum())
        nearest = torch.minimum(nearest, distances.min(0).values)
    return inside / (neighbours * len(generated)), float((nearest < radii).double().mean())


def cmmd(generated: Features, reference: Features) -> float:
    """1000 times the squared MMD of a Gaussian kernel with sigma 10 on normalised CLIP embeddings (CMMD).

    Jayasumana et al., arXiv 2401.09603; as in their code with diagonal terms, which makes it no less than 0.

    Raises:
        UserError: a set has fewer than FEWEST.
    """
    x, y = (side / np.linalg.norm(side.astype(np.float64), axis=1, keepdims=True) for side in (generated, reference))
    return CMMD_SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Features, y: Features) -> float:
    check_count(x, FEWEST)
    total = sum(float(torch.exp(-(distances**2) / (2 * CMMD_SIGMA**2)).sum()) for distances in _distances(x, y))
    return total / (len(x) * len(y))


def _share_within(inner: Features, outer: Features, neighbours: int) -> float:
    check_count(inner, FEWEST)
    radii = _radii(outer, neighbours)
    return sum(int((distances <= radii).any(1).sum()) for distances in _distances(inner, outer)) / len(inner)


def _radii(features: Features, neighbours: int) -> torch.Tensor:
    """The distance [M] of each to its k-th nearest other."""
    check_count(features, FEWEST)
    return torch.cat([part.kthvalue(neighbours + 1, dim=1).values for part in _distances(features, features)])


def _distances(one: Features, other: Features) -> Iterator[torch.Tensor]:
    """Euclidean distances [N, M], some rows at a time; without the matrix product, whose rounding would part equal pictures."""
    whole = torch.from_numpy(other.astype(np.float64))
    for start in range(0, len(one), _ROWS):
        part = torch.from_numpy(one[start : start + _ROWS].astype(np.float64))
        yield torch.cdist(part, whole, compute_mode="donot_use_mm_for_euclid_dist")
