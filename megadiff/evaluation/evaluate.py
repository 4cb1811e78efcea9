"""`megadiff evaluate`: draw samples where a network is given, score them, and keep every number with what it depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megadiff.config.errors import UserError
from megadiff.config.load import leaves
from megadiff.data.codecs.captions import CaptionCodec
from megadiff.data.pictures import flat, open_picture
from megadiff.data.reading.loader import ShuffledSamples, read_held_out
from megadiff.data.shards.shard import MANIFEST
from megadiff.distributed.ranks import Ranks
from megadiff.evaluation import scores
from megadiff.evaluation.captions import caption_metrics, diversity_metrics
from megadiff.evaluation.clip_score import AT_ONCE, PAIRS, pair_metrics, pair_scorer
from megadiff.evaluation.features import FEATURES, build_extractor
from megadiff.evaluation.likelihood import LIKELIHOOD, likelihood_metrics
from megadiff.evaluation.picture_sets import features_of, open_pictures, pairs_in, records_in
from megadiff.evaluation.pieces import Pieces, key_of, wait_for
from megadiff.evaluation.results import RESULTS, comparison, of_data, read_results, write_results
from megadiff.evaluation.scores import DISTANCES, OWN_FEATURES, FeatureSet
from megadiff.generation.generate import device_of, generate
from megadiff.generation.loading import codecs_of, load
from megadiff.generation.request import GenerateRequest
from megadiff.generation.tasks import JOINT
from megadiff.generation.writing import RECORDS, REQUEST
from megadiff.types import Metric

PIECES = ".pieces"
WITHOUT_EFFECT = ("batch", "format")
"""Parts of a request that change nothing of its samples."""
METRICS = (*DISTANCES, *PAIRS, "captions", LIKELIHOOD)
DEFAULT_PAIRS = 1000


@dataclass(frozen=True)
class EvaluateRequest:
    """The flags of `megadiff evaluate`, one field each (see its help).

    Attributes:
        samples: how samples are drawn; None for a folder of pictures that is there, and if no metric looks at samples.
        weights_kind: `ema` or `raw`, of a network that is not drawn from.
        pairs: most held-out pairs of the likelihood.
        out: the folder of samples, of results.json and of features.
        features_out: another folder of features, which several requests may share.
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
    weights_kind: str = "ema"
    pairs: int = DEFAULT_PAIRS
    batch: int = 32
    features_out: str | None = None


def evaluate(request: EvaluateRequest) -> list[Metric]:
    """Score; returns the metrics, which are also in `out`/results.json. On ranks other than 0 the list is empty.

    With RANK and WORLD_SIZE set (torchrun) the ranks share drawing and features. What an interrupted call has finished is kept.

    Raises:
        UserError: a metric is unknown or lacks what it needs, or a source cannot be read.
    """
    check(request)
    ranks = Ranks.from_environment()
    device = device_of(ranks)
    out = Path(request.out)
    if request.samples is not None:
        generate(request.samples)
        joined = (RECORDS, MANIFEST) if request.samples.format == "tar" else (RECORDS,)
        wait_for([out / name for name in joined])  # rank 0 writes them when all have drawn
    pieces = Pieces(Path(request.features_out or out) / PIECES, ranks)
    metrics = _distances(request, pieces, device)
    metrics += _pair_metrics(request, pieces, device)
    metrics += _caption_metrics(request, ranks)
    metrics += _likelihood(request, pieces, device)
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
    needed = networks_of(request.metrics, request.features)
    if idle := [name for name, path in (request.weights or {}).items() if path is not None and name not in needed]:
        raise UserError(f"--{idle[0]} has no effect on {', '.join(request.metrics)}; leave it out")
    if request.save_statistics and len(used) != 1:
        raise UserError("--save-statistics is for metrics of one network's features: one file holds one network's")
    if "captions" in request.metrics and _captions_source(request) is None:
        raise UserError(
            "captions are scored against those of --data, from which a network draws: give RUN, --task and --data; or with "
            "--task joint as a set beside those of --reference MANIFEST"
        )
    if LIKELIHOOD in request.metrics and not is_manifest(request.reference):
        raise UserError(f"{LIKELIHOOD} needs --reference: a manifest of held-out pairs in tar shards")


def networks_of(metrics: Sequence[str], features: str) -> set[str]:
    """The networks of features that metrics need."""
    own = {OWN_FEATURES.get(name, features) for name in metrics if name in DISTANCES}
    return own | {"clip" for name in metrics if name in PAIRS}


def is_manifest(reference: str | None) -> bool:
    """Whether a reference may be a manifest of pairs: that of statistics is not."""
    return reference is not None and not reference.endswith(".npz")


def _captions_source(request: EvaluateRequest) -> str | None:
    """The manifest whose captions generated ones are scored against; None if there is none."""
    samples = request.samples
    if samples is None:
        return None
    as_a_set = samples.data is None and samples.task == JOINT and is_manifest(request.reference)
    return request.reference if as_a_set else samples.data


def report(metrics: list[Metric], against: tuple[str, ...]) -> str:
    """Lines for people: values, warnings, and how they compare with other results.

    Raises:
        UserError: other results cannot be read.
    """
    lines = [" ".join(filter(None, (f"{one.name}: {one.value:.6g}", _interval(one), warning(one)))) for one in metrics]
    for path in against:
        others = read_results(Path(path) / RESULTS if Path(path).is_dir() else Path(path))
        lines += [f"{path}: {comparison(metric, others[metric.name])}" for metric in metrics if metric.name in others]
    return "\n".join(lines)


def _interval(metric: Metric) -> str:
    return "" if metric.low is None else f"[{metric.low:.6g}, {metric.high:.6g}]"


def warning(metric: Metric) -> str:
    """What to know before trusting a value; empty if there is nothing."""
    if not metric.depends.get("rank_deficient"):
        return ""
    counts = [metric.depends.get(key) for key in ("count", "reference_count")]
    return (
        f"(of {counts[0]} and {counts[1]} pictures: no more on one side than the network has features, so the covariance is "
        "singular and the value biased upwards; take more)"
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


def _pair_metrics(request: EvaluateRequest, pieces: Pieces, device: torch.device) -> list[Metric]:
    """CLIP score and retrieval of the pairs in a folder of samples."""
    names = [name for name in request.metrics if name in PAIRS]
    if not names:
        return []
    folder = Path(request.out if request.samples else request.source)
    pairs = pairs_in(folder)
    scorer = pair_scorer((request.weights or {}).get("clip"), device)
    stats = [(folder / pair.picture).stat() for pair in pairs]
    identities = [[*vars(pair).values(), stat.st_size, stat.st_mtime_ns] for pair, stat in zip(pairs, stats, strict=True)]
    starts = range(0, len(pairs), AT_ONCE)
    keys = [key_of({**scorer.depends, "pairs": identities[start : start + AT_ONCE]}) for start in starts]

    def embed(number: int) -> dict[str, Any]:
        own = pairs[starts[number] : starts[number] + AT_ONCE]
        pictures = [np.array(flat(open_picture(folder / pair.picture))) for pair in own]
        images, texts = scorer(pictures, [pair.caption for pair in own])
        return {"images": images, "texts": texts}

    found = pieces.gather(keys, embed)
    if found is None:
        return []
    images, texts = (np.concatenate([piece[side] for piece in found]) for side in ("images", "texts"))
    return pair_metrics(names, images, texts, {**scorer.depends, "count": len(pairs), **drawn_by(str(folder))})


def _caption_metrics(request: EvaluateRequest, ranks: Ranks) -> list[Metric]:
    """Metrics of generated captions against all those of the samples that they were drawn for; of those drawn from nothing as
    a set.
    """
    samples, address = request.samples, _captions_source(request)
    if "captions" not in request.metrics or samples is None or address is None or ranks.rank:
        return []
    loaded = load(samples.checkpoint, samples.weights, autoencoder=samples.autoencoder, size=samples.size)
    codecs = codecs_of(loaded)
    source = ShuffledSamples(address, loaded.data, loaded.model)
    depends = {**of_data(address), **drawn_by(request.out)}
    captions, references = [], []
    for record in records_in(Path(request.out)):
        name = next((name for name, entry in record["generated"].items() if "text" in entry), None)
        codec = codecs.get(name or "")
        if name is None or not isinstance(codec, CaptionCodec):
            raise UserError(f"--task {samples.task} draws no captions, which the metric captions is of")
        captions.append(record["generated"][name]["text"])
        if samples.data is not None:
            references.append(codec.read_all(source.members(record["number"])))
        elif len(references) < len(source):  # as many as captions, since distinct-n falls with their number
            references.append(codec.read_all(source.members(len(references))))
    if samples.data is not None:
        return caption_metrics(captions, references, depends)
    return diversity_metrics(captions, [own[0] for own in references], {**depends, "references": len(references)})


def _likelihood(request: EvaluateRequest, pieces: Pieces, device: torch.device) -> list[Metric]:
    if LIKELIHOOD not in request.metrics:
        return []
    loaded = load(request.source, request.weights_kind, device)
    pairs = read_held_out(str(request.reference), loaded.data, loaded.model, request.pairs)
    if len(pairs.ids) < 2:
        raise UserError(f"{request.reference} has one pair, and {LIKELIHOOD} takes two or more")
    depends = {"weights": loaded.fingerprint, "kind": request.weights_kind, **of_data(str(request.reference))}
    return likelihood_metrics(loaded, pairs.states, pieces, depends, rows=request.batch)


def drawn_by(folder: str) -> dict[str, Any]:
    """How the samples of a folder were drawn, by its request.json; empty for other pictures."""
    path = Path(folder) / REQUEST
    tree = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "contents" in tree:
        tree["contents"] = list(tree["contents"].values())  # hashes, without the paths
    return leaves({key: value for key, value in tree.items() if key not in WITHOUT_EFFECT}, "drawn.")
