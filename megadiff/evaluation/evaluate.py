"""`megadiff evaluate`: draw samples where a network is given, score them, and keep every number with what it depends on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadiff.config.errors import UserError
from megadiff.distributed.ranks import Ranks
from megadiff.evaluation import scores
from megadiff.evaluation.features import FEATURES, build_extractor
from megadiff.evaluation.picture_sets import features_of, open_pictures
from megadiff.evaluation.pieces import Pieces
from megadiff.evaluation.results import RESULTS, comparison, read_results, write_results
from megadiff.evaluation.scores import DISTANCES, OWN_FEATURES, FeatureSet
from megadiff.generation.generate import SECONDS_BETWEEN_LOOKS, generate
from megadiff.generation.request import GenerateRequest
from megadiff.generation.writing import RECORDS, REQUEST
from megadiff.types import Metric

PIECES = ".pieces"
WITHOUT_EFFECT = ("batch", "format")
"""Parts of a request that change nothing of its samples."""
METRICS = DISTANCES


@dataclass(frozen=True)
class EvaluateRequest:
    """The flags of `megadiff evaluate`, one field each (see its help).

    Attributes:
        samples: how samples are drawn; None for a folder of pictures that is there.
        out: the folder of samples, of results.json and of features.
        weights: paths of networks' weights by the names of `FEATURES`.
    """

    source: str
    metrics: tuple[str, ...]
    out: str
    reference: str | None = None
    features: str = "inception"
    weights: Mapping[str, str | None] | None = None
    square: bool = False
    save_statistics: str | None = None
    samples: GenerateRequest | None = None


def evaluate(request: EvaluateRequest) -> list[Metric]:
    """Score; returns the metrics, which are also in `out`/results.json. On ranks other than 0 the list is empty.

    With RANK and WORLD_SIZE set (torchrun) the ranks share drawing and features. What an interrupted call has finished is kept.

    Raises:
        UserError: a metric is unknown or lacks what it needs, or a source cannot be read.
    """
    check(request)
    ranks = Ranks.from_environment()
    device = (
        torch.device("cuda", ranks.local_rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    out = Path(request.out)
    if request.samples is not None:
        generate(request.samples)
        while not (out / RECORDS).exists():  # rank 0 writes them when all have drawn
            time.sleep(SECONDS_BETWEEN_LOOKS)
    metrics = _distances(request, Pieces(out / PIECES, ranks), device)
    if ranks.rank:
        return []
    write_results(out / RESULTS, metrics)
    return metrics


def check(request: EvaluateRequest) -> None:
    """Raises UserError if the metrics do not go with the other flags."""
    if unknown := [name for name in request.metrics if name not in METRICS]:
        raise UserError(f"--metrics {unknown[0]} is unknown; known: {', '.join(METRICS)}")
    if request.features not in FEATURES:
        raise UserError(f"--features {request.features} is unknown; known: {', '.join(FEATURES)}")
    distances = [name for name in request.metrics if name in DISTANCES]
    if distances and request.reference is None:
        raise UserError(f"{distances[0]} needs --reference: a folder of pictures, tar shards, or statistics.npz")
    if request.square and (request.reference or ".npz").endswith(".npz"):
        raise UserError("--square crops the reference's pictures; leave it out where there are none")
    used = {OWN_FEATURES.get(name, request.features) for name in distances}
    if idle := [name for name, path in (request.weights or {}).items() if path is not None and name not in used]:
        raise UserError(f"--{idle[0]} has no effect on {', '.join(request.metrics)}; leave it out")
    if request.save_statistics and len(used) != 1:
        raise UserError("--save-statistics is for metrics of one network's features: one file holds one network's")


def report(metrics: list[Metric], against: tuple[str, ...]) -> str:
    """Lines for people: values, warnings, and how they compare with other results.

    Raises:
        UserError: other results cannot be read.
    """
    lines = [f"{metric.name}: {metric.value:.6g}{_interval(metric)}{_warning(metric)}" for metric in metrics]
    for path in against:
        others = read_results(Path(path) / RESULTS if Path(path).is_dir() else Path(path))
        lines += [f"{path}: {comparison(metric, others[metric.name])}" for metric in metrics if metric.name in others]
    return "\n".join(lines)


def _interval(metric: Metric) -> str:
    return "" if metric.low is None else f" [{metric.low:.6g}, {metric.high:.6g}]"


def _warning(metric: Metric) -> str:
    if not metric.depends.get("rank_deficient"):
        return ""
    counts = [metric.depends.get(key) for key in ("count", "reference_count")]
    return (
        f"  (of {counts[0]} and {counts[1]} pictures: no more on one side than the network has features, so the covariance is "
        "singular and the value too high or too low by an unknown amount; take more pictures)"
    )


def _distances(request: EvaluateRequest, pieces: Pieces, device: torch.device) -> list[Metric]:
    by_features: dict[str, list[str]] = {}
    for name in request.metrics:
        if name in DISTANCES:
            by_features.setdefault(OWN_FEATURES.get(name, request.features), []).append(name)
    metrics = []
    for features, names in by_features.items():
        extractor = build_extractor(features, (request.weights or {}).get(features), device)
        reference = str(request.reference)
        statistics = reference.endswith(".npz")
        sets = [open_pictures(request.out if request.samples else request.source)]
        sets += [] if statistics else [open_pictures(reference, square=request.square)]
        found = [features_of(pictures, extractor, pieces) for pictures in sets]
        known = []
        for pictures, pair in zip(sets, found, strict=True):
            if pair is not None:
                facts = {**extractor.depends, "pictures_hash": pair[1], "square": pictures.square}
                known.append(FeatureSet.of(pair[0], facts))
        if not known:
            continue
        known += [scores.read_statistics(reference, extractor.depends)] if statistics else []
        if request.save_statistics:
            scores.save_statistics(Path(request.save_statistics), known[1])
        made = scores.distance_metrics(names, *known)
        metrics += [Metric(one.name, one.value, depends={**one.depends, **drawn_by(sets[0].source)}) for one in made]
    return metrics


def drawn_by(folder: str) -> dict[str, Any]:
    """How the samples of a folder were drawn, by its request.json; empty for other pictures."""
    path = Path(folder) / REQUEST
    tree = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return _flat("drawn", {key: value for key, value in tree.items() if key not in WITHOUT_EFFECT}) if tree else {}


def _flat(name: str, tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {key: value for own, part in tree.items() for key, value in _flat(f"{name}.{own}", part).items()}
