"""Metrics of generated pictures against a reference: which features each takes, its names, and what its value depends on."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.config.errors import UserError
from megadiff.evaluation import distances
from megadiff.evaluation.distances import Features, Moments
from megadiff.storage import store
from megadiff.types import Metric

SEED = 0
"""Of the subsets of the kernel distance."""
OWN_FEATURES = {"fid": "inception", "kid": "inception", "cmmd": "clip"}
"""Metrics that are defined for one network's features alone."""
DISTANCES = (*OWN_FEATURES, "fd", "kd", "precision-recall", "density-coverage")
MOMENTS_SUFFICE = ("fid", "fd")
"""Metrics for which a reference's mean and covariance are enough."""


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of pictures.

    Attributes:
        features: None if only their moments are known.
        facts: what they depend on: source, hash of the pictures, network, resize; empty if nobody wrote it down.
    """

    moments: Moments
    features: Features | None
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, features: Features, facts: Mapping[str, Any]) -> FeatureSet:
        """Raises UserError if there are too few."""
        return cls(Moments.of(features), features, {**facts, "count": len(features)})


def save_statistics(path: Path, known: FeatureSet) -> None:
    """Write a .npz with mu and sigma (clean-fid's names), the features and the facts."""
    if known.features is None:
        raise UserError(f"--save-statistics: the reference is a file of statistics already; copy it to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = np.array(json.dumps(dict(known.facts)))
    with path.open("wb") as file:
        np.savez(file, mu=known.moments.mean, sigma=known.moments.covariance, feats=known.features, facts=facts)


def read_statistics(path: str, network: Mapping[str, Any]) -> FeatureSet:
    """A file of `save_statistics`, or clean-fid's with mu and sigma, or its features (feats) alone.

    Args:
        network: the features that they are compared with; where the file says of which its own are, they must agree.

    Raises:
        UserError: it is damaged, or of other features.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
        features = arrays.get("feats")
        facts = json.loads(str(arrays["facts"])) if "facts" in arrays else {}
        if features is None:
            moments = Moments(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
        else:
            moments = Moments.of(features)
        if moments.mean.shape != moments.covariance.shape[:1] or moments.covariance.ndim != 2:
            raise ValueError(f"mu is {moments.mean.shape}, sigma {moments.covariance.shape}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--reference {path} is no .npz with mu and sigma, or feats ({type(error).__name__}: {error})"
        ) from None
    if differing := [key for key in network if key in facts and facts[key] != network[key]]:
        key = differing[0]
        raise UserError(f"--reference {path} holds statistics of other features ({key}: {facts[key]}, now {network[key]})")
    return FeatureSet(moments, features, {"reference_file": _hash(path), **facts})


def _hash(path: str) -> str:
    """The hash of a file's contents."""
    return hashlib.sha256(store.read_bytes(path)).hexdigest()


def distance_metrics(names: Sequence[str], generated: FeatureSet, reference: FeatureSet) -> list[Metric]:
    """Metrics by their names on the command line, all of the same features.

    Raises:
        UserError: features of other widths, or a metric needs features where the reference has moments only.
    """
    widths = [len(side.moments.mean) for side in (generated, reference)]
    if widths[0] != widths[1]:
        raise UserError(
            f"the reference holds {widths[1]} features a picture, and {generated.facts['features']} gives {widths[0]}"
        )
    assert generated.features is not None
    depends = {
        **generated.facts,
        **{f"reference_{key.removeprefix('reference_')}": value for key, value in reference.facts.items()},
    }
    network = str(generated.facts["features"])
    metrics = []
    for name in names:
        if reference.features is None and name not in MOMENTS_SUFFICE:
            enough = " or ".join(MOMENTS_SUFFICE)
            raise UserError(f"{name} needs the reference's features, and its file has mu and sigma only: take {enough}")
        for title, value, own in _values(name, network, generated, reference):
            metrics.append(Metric(title, value, depends={**depends, **own}))
    return metrics


def titles(name: str, network: str) -> tuple[str, ...]:
    """The names in results of a metric's values, by the name of the network whose features it takes (`Extractor.name`)."""
    inception = network == "Inception"
    return {
        "fid": ("FID",),
        "fd": ("FID" if inception else f"FD-{network}",),
        "kid": ("KID",),
        "kd": ("KID" if inception else f"KD-{network}",),
        "cmmd": ("CMMD",),
        "precision-recall": (f"precision-{network}", f"recall-{network}"),
        "density-coverage": (f"density-{network}", f"coverage-{network}"),
    }[name]


def _values(name: str, network: str, one: FeatureSet, other: FeatureSet) -> list[tuple[str, float, dict[str, Any]]]:
    """(name of the metric, value, what it alone depends on)."""
    values: tuple[float, ...]
    own: dict[str, Any]
    if name in MOMENTS_SUFFICE:
        own = {"rank_deficient": one.moments.rank_deficient or other.moments.rank_deficient}
        values = (distances.frechet_distance(one.moments, other.moments),)
    else:
        assert one.features is not None
        assert other.features is not None
        sides = (one.features, other.features)
        match name:
            case "kid" | "kd":
                own = {"seed": SEED, "subsets": distances.KID_SUBSETS, "subset": distances.KID_SUBSET}
                values = (distances.kernel_distance(*sides, seed=SEED),)
            case "cmmd":
                values, own = (distances.cmmd(*sides),), {}
            case "precision-recall":
                values, own = distances.precision_recall(*sides), {"neighbours": distances.MANIFOLD_NEIGHBOURS}
            case _:
                values, own = distances.density_coverage(*sides), {"neighbours": distances.DENSITY_NEIGHBOURS}
    return [(title, value, own) for title, value in zip(titles(name, network), values, strict=True)]
