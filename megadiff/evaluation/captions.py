"""Metrics of generated captions: against references, among themselves, and by their lengths.

A caption's words are its lower-cased runs of letters, digits and inner apostrophes, as COCO's captions are compared without
punctuation.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megadiff.config.errors import UserError
from megadiff.types import Metric

CIDER_ORDER, CIDER_SIGMA, CIDER_SCALE = 4, 6.0, 10.0
DISTINCT = (1, 2)
NAMES = ("BLEU", "chrF", "CIDEr", "self-BLEU", *(f"distinct-{order}" for order in DISTINCT), "length distance")
"""Metrics by which networks compare."""
SELF_BLEU_MOST = 500
"""Captions that self-BLEU compares with each other: its cost is their square."""

Grams = Counter[tuple[str, ...]]


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]], depends: Mapping[str, Any]) -> list[Metric]:
    """All metrics of N captions; `references` are those of each, one or more.

    Raises:
        UserError: there are fewer than two captions.
    """
    _check_count(captions)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # sacrebleu takes the references by their place: all first ones, all second ones, ...; None where there is none.
    places = max(map(len, references))
    by_place: list[Any] = [[own[place] if place < len(own) else None for own in references] for place in range(places)]
    metrics = []
    for name, scorer in (("BLEU", BLEU(lowercase=True)), ("chrF", CHRF())):
        value = scorer.corpus_score(list(captions), by_place).score
        metrics.append(Metric(name, value, depends={"signature": str(scorer.get_signature())}))
    metrics.append(Metric("CIDEr", cider(captions, references)))
    metrics = [replace(one, depends={"captions": len(captions), **depends, **one.depends}) for one in metrics]
    return metrics + diversity_metrics(captions, [own[0] for own in references], depends)


def diversity_metrics(captions: Sequence[str], references: Sequence[str], depends: Mapping[str, Any]) -> list[Metric]:
    """Metrics of captions as a set, beside the same of references, which need not be theirs.

    Raises:
        UserError: there are fewer than two captions.
    """
    _check_count(captions)
    compared = captions[:SELF_BLEU_MOST]
    metrics = [Metric("self-BLEU", self_bleu(compared), depends={"compared": len(compared)})]
    metrics += [Metric(f"distinct-{order}", distinct(captions, order)) for order in DISTINCT]
    metrics += [Metric(f"distinct-{order} of references", distinct(references, order)) for order in DISTINCT]
    lengths, of_references = ([len(words(text)) for text in texts] for texts in (captions, references))
    metrics += [
        Metric("words a caption", float(np.mean(lengths))),
        Metric("words a reference", float(np.mean(of_references))),
        Metric("length distance", length_distance(lengths, of_references)),
    ]
    return [replace(one, depends={"captions": len(captions), **depends, **one.depends}) for one in metrics]


def _check_count(captions: Sequence[str]) -> None:
    if len(captions) < 2:
        raise UserError(f"there are {len(captions)} captions, and these metrics take two or more")


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def grams(text: str, order: int) -> Grams:
    """How often each run of `order` words occurs."""
    own = words(text)
    return Counter(tuple(own[start : start + order]) for start in range(len(own) - order + 1))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al., arXiv 1411.5726): 10 times the mean over orders 1 to 4 of the clipped cosine of TF-IDF vectors,
    less the farther lengths are apart. Document frequencies are the references'; words are as above, not stemmed.
    """
    orders = range(1, CIDER_ORDER + 1)
    appears: dict[int, Counter[tuple[str, ...]]] = {order: Counter() for order in orders}
    for own in references:
        for order in orders:
            appears[order].update(set().union(*(grams(text, order) for text in own)))
    log_count = math.log(len(references))

    def weighted(text: str, order: int) -> dict[tuple[str, ...], float]:
        weights = {gram: log_count - math.log(max(1, appears[order][gram])) for gram in grams(text, order)}
        return {gram: count * weights[gram] for gram, count in grams(text, order).items()}

    total = 0.0
    for caption, own in zip(captions, references, strict=True):
        vectors = {order: weighted(caption, order) for order in orders}
        for reference in own:
            length = len(words(caption)) - len(words(reference))
            penalty = math.exp(-(length**2) / (2 * CIDER_SIGMA**2))
            cosines = [_clipped_cosine(vectors[order], weighted(reference, order)) for order in orders]
            total += penalty * sum(cosines) / CIDER_ORDER / len(own)
    return CIDER_SCALE * total / len(captions)


def _clipped_cosine(one: Mapping[tuple[str, ...], float], other: Mapping[tuple[str, ...], float]) -> float:
    """The cosine of two vectors, no entry of `one` counted above that of `other`; 0 where either is zero."""
    norms = [math.sqrt(sum(value**2 for value in side.values())) for side in (one, other)]
    product = sum(min(value, other[gram]) * other[gram] for gram, value in one.items() if gram in other)
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


def self_bleu(captions: Sequence[str]) -> float:
    """The mean BLEU-4 of each caption with all others as references (Zhu et al., arXiv 1802.01886): 100 if all are equal."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(lowercase=True, effective_order=True)
    scores = [
        scorer.sentence_score(caption, [*captions[:place], *captions[place + 1 :]]).score
        for place, caption in enumerate(captions)
    ]
    return float(np.mean(scores))


def distinct(captions: Sequence[str], order: int) -> float:
    """Different runs of `order` words over all of them (Li et al., arXiv 1510.03055); 0 without any."""
    counts: Grams = Counter()
    for text in captions:
        counts.update(grams(text, order))
    return len(counts) / max(1, counts.total())


def length_distance(one: Sequence[int], other: Sequence[int]) -> float:
    """The Wasserstein distance of two distributions of lengths: by how many words a caption must change."""
    longest = max(*one, *other) + 1
    shares = [np.cumsum(np.bincount(side, minlength=longest)) / len(side) for side in (one, other)]
    return float(np.abs(shares[0] - shares[1]).sum())
