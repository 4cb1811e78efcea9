"""Every task of a network scored on the same held-out pairs, and one page of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megadiff.config.errors import UserError
from megadiff.data.codecs.base import PICTURE, TEXT
from megadiff.data.reading.loader import ShuffledSamples
from megadiff.distributed.ranks import Ranks
from megadiff.evaluation import likelihood
from megadiff.evaluation.clip_score import PAIRS
from megadiff.evaluation.evaluate import EvaluateRequest, check, evaluate, is_manifest, networks_of, warning
from megadiff.evaluation.likelihood import LIKELIHOOD
from megadiff.evaluation.scores import DISTANCES
from megadiff.files import write_text
from megadiff.generation.loading import codecs_of, load
from megadiff.generation.request import GenerateRequest
from megadiff.generation.tasks import Task, tasks_of
from megadiff.generation.writing import SHEET
from megadiff.report.page import Rows, Section, sections_page
from megadiff.types import Metric
from megadiff.weights.loading import Loaded

PAGE = "report.html"
HASH, SHOWN = 64, 16
"""Letters of a hash, and of those how many the page shows."""
LESS = ("FID", "KID", "FD", "KD", "CMMD", "NELBO", "error", "length distance")
MORE = ("precision", "recall", "density", "coverage", "CLIP score", "R@", "BLEU", "chrF", "CIDEr", "likelihood gap")
"""What the names of figures begin with that are better the less, or the more, they are."""


def evaluate_all(request: EvaluateRequest) -> dict[str, list[Metric]]:
    """Score each task of a network in the folder `out`/TASK, with the metrics that apply to it, and write `out`/report.html.

    Args:
        request: its reference is a manifest of pairs, which gives conditions, captions and pictures to compare with; its
            samples are the request of the joint task.

    Returns:
        The metrics by the name of the folder; those of the likelihood, of all modalities, by "". Empty on ranks other than 0.

    Raises:
        UserError: as `evaluate`; or the reference is none of pairs.
    """
    if not is_manifest(request.reference):
        raise UserError("--task all takes its pairs from --reference: a manifest of held-out pairs in tar shards")
    assert request.samples is not None
    check(request)
    loaded = load(request.source, request.weights_kind)
    requests = dict(_requests(request, request.samples, loaded))
    if LIKELIHOOD in request.metrics:
        requests[""] = replace(request, metrics=(LIKELIHOOD,), samples=None, weights=None)
    found = {folder: evaluate(one) for folder, one in requests.items()}
    if Ranks.from_environment().rank:
        return {}
    write_text(Path(request.out) / PAGE, _page(request, loaded, found))
    return found


def _requests(request: EvaluateRequest, joint: GenerateRequest, loaded: Loaded) -> Iterator[tuple[str, EvaluateRequest]]:
    """By task the request to draw and score it; tasks that no metric applies to are left out."""
    reference = str(request.reference)
    media = {name: codec.medium for name, codec in codecs_of(loaded).items()}
    for task in tasks_of(list(media), loaded.predicted):
        drawn = {media[name] for name in task.generated}
        applying = (*(DISTANCES if PICTURE in drawn else ()), *(("captions",) if TEXT in drawn else ()), *PAIRS)
        metrics = tuple(name for name in request.metrics if name in applying)
        if not metrics:
            continue
        needed = networks_of(metrics, request.features)
        out = str(Path(request.out) / task.name)
        if task.given:
            samples = replace(joint, task=task.name, data=reference, out=out)
        else:
            samples = replace(joint, out=out, n=joint.n or len(ShuffledSamples(reference, loaded.data, loaded.model)))
        weights = {name: path for name, path in (request.weights or {}).items() if name in needed}
        own = replace(request, metrics=metrics, out=out, samples=samples, weights=weights)
        yield task.name, replace(own, features_out=request.out)  # the reference's are computed once


def _page(request: EvaluateRequest, loaded: Loaded, found: Mapping[str, Sequence[Metric]]) -> str:
    exact = {metric.name: metric for metric in found.get("", ())}
    sections = []
    for task in tasks_of(list(loaded.model.modalities), loaded.predicted):
        if task.name in found:
            metrics = [*found[task.name], *(exact[name] for name in _exact_names(task, loaded) if name in exact)]
            sections.append(_section(task, metrics, Path(request.out) / task.name / SHEET))
    if exact:
        note = "A modality's loss with its own condition given and absent; the gap is the next pair's condition less its own."
        sections.append(Section("Held-out pairs by quarter of time", note, _quarters(loaded, exact)))
    groups = {(folder or LIKELIHOOD): metrics for folder, metrics in found.items()}
    sections.append(Section("Settings", "What the figures depend on; hashes are cut.", _settings(groups)))
    return sections_page("Every task on held-out pairs", f"{loaded.source}, pairs of {request.reference}", sections)


def _exact_names(task: Task, loaded: Loaded) -> list[str]:
    """The names of the likelihood's metrics, over all times, that are about a task's only target."""
    return list(likelihood.names_of(loaded.model, task.generated[0]).values()) if task.given else []


def _section(task: Task, metrics: Sequence[Metric], sheet: Path) -> Section:
    rows = [("figure", "value", "95 % interval")]
    rows += [(f"{one.name}{_better(one.name)}", f"{one.value:.4g}", _interval(one)) for one in metrics]
    warnings = [f"{one.name} {warning(one)}." for one in metrics if warning(one)]
    given = f"{' and '.join(task.given)} given" if task.given else "nothing given"
    return Section(f"{task.name}: {' and '.join(task.generated)}, {given}", " ".join(warnings), rows, sheet)


def _better(name: str) -> str:
    """An arrow to the better side; none where that is the reference's own value."""
    return " ↓" if name.startswith(LESS) else " ↑" if name.startswith(MORE) else ""


def _quarters(loaded: Loaded, exact: Mapping[str, Metric]) -> Rows:
    names = [name for target in loaded.predicted for name in likelihood.names_of(loaded.model, target).values()]
    head = ("figure", "all times", *(span.strip() for span in likelihood.SPANS[1:]))
    return [head, *((name, *(_with_interval(exact[name + span]) for span in likelihood.SPANS)) for name in names)]


def _with_interval(metric: Metric) -> str:
    return f"{metric.value:.4g} {_interval(metric)}"


def _interval(metric: Metric) -> str:
    return "" if metric.low is None else f"[{metric.low:.4g}, {metric.high:.4g}]"


def _settings(groups: Mapping[str, Sequence[Metric]]) -> Rows:
    """What metrics depend on, and which groups of them; what was not asked for is left out."""
    values: dict[str, dict[str, dict[str, None]]] = {}
    for group, metrics in groups.items():
        for metric in metrics:
            for key, value in metric.depends.items():
                if value not in (None, []):
                    values.setdefault(key, {}).setdefault(_shown(value), {})[group] = None
    rows = [(key, shown, ", ".join(of)) for key, each in values.items() for shown, of in each.items()]
    return [("setting", "value", "of"), *rows]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:SHOWN] if len(text) == HASH else text
