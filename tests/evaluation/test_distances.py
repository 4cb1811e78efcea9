"""Distances of features, beside clean-fid's own functions, definitions and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff import torchvision_ops
from megadiff.config.errors import UserError
from megadiff.evaluation import distances
from megadiff.evaluation.distances import Moments, cmmd, density_coverage, frechet_distance, kernel_distance, precision_recall


def features(count: int, shift: float = 0.0, width: int = 12, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    return np.abs(chance.normal(shift, 1, (count, width)) @ chance.normal(0, 0.5, (width, width)) + 1)


GENERATED, REFERENCE = features(300), features(400, shift=0.2, seed=1)


@pytest.fixture(scope="module")
def cleanfid():
    torchvision_ops.declare_missing()
    from cleanfid import fid

    return fid


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
def test_frechet_distance_equals_clean_fids_and_the_formula_with_eigenvalues_of_the_product(cleanfid):
    one, other = Moments.of(GENERATED), Moments.of(REFERENCE)
    own = frechet_distance(one, other)
    assert own == pytest.approx(cleanfid.fid_from_feats(GENERATED, REFERENCE), rel=1e-6)
    # torch-fidelity's form.
    root = np.sqrt(np.linalg.eigvals(one.covariance @ other.covariance).astype(complex)).real.sum()
    difference = ((one.mean - other.mean) ** 2).sum()
    assert own == pytest.approx(difference + np.trace(one.covariance + other.covariance) - 2 * root, rel=1e-6)


def test_kernel_distance_equals_clean_fids_for_the_same_seed(cleanfid):
    np.random.seed(7)
    theirs = cleanfid.kernel_distance(GENERATED, REFERENCE)
    assert kernel_distance(GENERATED, REFERENCE, seed=7) == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    x, y = GENERATED, REFERENCE[:300]
    within, across = ((one @ one.T / 12 + 1) ** 3 for one in (x, y)), (x @ y.T / 12 + 1) ** 3
    expected = sum((kernel.sum() - np.trace(kernel)) / (300 * 299) for kernel in within) - 2 * across.mean()
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_equal_their_definition():
    def share(inner, outer):
        radii = np.sort(np.linalg.norm(outer[:, None] - outer[None], axis=2), axis=1)[:, 3]
        return (np.linalg.norm(inner[:, None] - outer[None], axis=2) <= radii).any(1).mean()

    expected = (share(GENERATED, REFERENCE), share(REFERENCE, GENERATED))
    assert precision_recall(GENERATED, REFERENCE) == pytest.approx(expected)
    assert 0 < min(expected) < 1


def test_density_and_coverage_equal_their_definition():
    between = np.linalg.norm(REFERENCE[:, None] - GENERATED[None], axis=2)
    radii = np.sort(np.linalg.norm(REFERENCE[:, None] - REFERENCE[None], axis=2), axis=1)[:, 5]
    inside = between < radii[:, None]
    expected = (inside.sum(0).mean() / 5, (between.min(1) < radii).mean())
    assert density_coverage(GENERATED, REFERENCE) == pytest.approx(expected)


def test_cmmd_equals_its_definition():
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (GENERATED, REFERENCE))

    def kernel(one, other):
        return np.exp(-(np.linalg.norm(one[:, None] - other[None], axis=2) ** 2) / 200).mean()

    assert cmmd(GENERATED, REFERENCE) == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-9)


def test_frechet_distance_of_normal_distributions_is_the_closed_form_also_where_covariances_are_singular():
    one, other = Moments(np.zeros(3), np.diag([1.0, 4.0, 0.0])), Moments(np.ones(3), np.diag([9.0, 1.0, 0.0]))
    assert frechet_distance(one, other) == pytest.approx(3 + (3 - 1) ** 2 + (2 - 1) ** 2)
    flat = Moments.of(features(11, width=40))
    without_factor = Moments(flat.mean, flat.covariance)
    for other in (flat, without_factor):
        assert frechet_distance(other, without_factor) == pytest.approx(0, abs=1e-6 * np.trace(flat.covariance))


def test_a_covariance_of_too_few_pictures_is_known_as_rank_deficient():
    assert Moments.of(features(12)).rank_deficient
    assert not Moments.of(features(13)).rank_deficient


def test_equal_sets_are_at_no_distance_and_cover_each_other():
    assert kernel_distance(GENERATED, GENERATED) < 0  # unbiased: the diagonal is left out
    assert cmmd(GENERATED, GENERATED) == pytest.approx(0, abs=1e-9)
    assert precision_recall(GENERATED, GENERATED) == (1, 1)
    assert density_coverage(GENERATED, GENERATED)[1] == 1


@pytest.mark.parametrize("metric", [kernel_distance, precision_recall, density_coverage, cmmd])
@pytest.mark.parametrize("sizes", [(9, 20), (20, 9)])
def test_fewer_than_ten_pictures_are_refused(metric, sizes):
    with pytest.raises(UserError, match="there are 9 pictures, and this metric takes 10 or more"):
        metric(features(sizes[0]), features(sizes[1]))
    with pytest.raises(UserError, match="9 pictures"):
        Moments.of(features(9))
    assert distances.FEWEST == 10
