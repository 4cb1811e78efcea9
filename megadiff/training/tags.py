"""The names of a run's curves, a fixed tree: TensorBoard groups them by what stands before the slash, in order of the digit.

docs/monitoring.md says what each is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megadiff.engine.api import StepResult

LOSS, BY_TIME, BY_SOURCE = "1 loss", "2 loss by time", "2 loss by source"
OPTIMIZER, GRADIENT, UPDATE, WEIGHT = "3 optimizer", "3 gradient norm", "3 update norm", "3 weight norm"
ACTIVATION = "3 largest activation"
SPEED, MEMORY, DATA, MEASURED = "4 speed", "5 memory", "6 data", "7 "
TOTAL = f"{LOSS}/total"
SKIPPED = f"{OPTIMIZER}/skipped steps"
EVALUATION_SHARE = f"{SPEED}/evaluation share"
COMMUNICATION_SHARE = f"{SPEED}/communication share"
CHECKPOINT_STALL, CHECKPOINT_TOOK = f"{SPEED}/checkpoint stall s", f"{SPEED}/checkpoint until published s"
INCIDENTS = "incidents"
QUARTERS = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")
HELD_OUT = re.compile(r"held-out (?P<target>[^/]+)/(?P<what>t [\d.]+|NELBO) given (?P<weights>\w+)")


def of_result(result: StepResult) -> dict[str, float]:
    """The numbers of a step, by name."""
    numbers = {
        TOTAL: result.total,
        f"{OPTIMIZER}/gradient norm": result.grad_norm,
        f"{OPTIMIZER}/learning rate": result.learning_rate,
    }
    for name, loss in result.losses.items():
        numbers[f"{LOSS}/{name}"] = loss
        numbers |= {by_time(name, q): value for q, value in zip(QUARTERS, result.quartiles[name], strict=True)}
    for name, losses in result.by_source.items():
        numbers |= {f"{BY_SOURCE}/{name} {source}": loss for source, loss in losses.items()}
    numbers |= {bound(name): value for name, value in result.nelbo.items()}
    if seen := result.inspection:
        groups = {GRADIENT: seen.gradients, UPDATE: seen.updates, WEIGHT: seen.weights, ACTIVATION: seen.activations}
        numbers |= {f"{group}/{place}": value for group, values in groups.items() for place, value in values.items()}
        numbers |= {f"{DATA}/{name} scored share": share for name, share in seen.scored.items()}
        numbers |= {f"{DATA}/{name} computed share": share for name, share in seen.computed.items()}
    return numbers


def by_time(modality: str, quarter: str) -> str:
    return f"{BY_TIME}/{modality} t {quarter}"


def bound(modality: str) -> str:
    return f"{LOSS}/{modality} NELBO"


def of_metric(name: str) -> str:
    """The name of a figure that was measured while training."""
    return f"{MEASURED}{name}" if "/" in name else f"{MEASURED}results/{name}"


def measurement(tag: str) -> tuple[str, str | None]:
    """A curve as metrics systems have it: the metric, and which curve of it where those of a group are of one quantity.

    `1 loss/image` is (loss, image), `4 speed/samples per s` is (speed_samples_per_s, None).
    """
    group, _, of = tag.partition("/")
    whole = group in (OPTIMIZER, SPEED, MEMORY, DATA)
    name = re.sub(r"[^a-z0-9]+", "_", (tag if whole else group).lower().lstrip("0123456789 ")).strip("_")
    return name, None if whole else of


def charts(losses: Sequence[str], measured: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Charts with several curves each, for TensorBoard's tab of custom scalars, by category and title.

    Args:
        losses: names of the training losses.
        measured: names of the figures that held-out losses have.
    """
    found: dict[str, dict[str, list[str]]] = {"training and held out": {}, "by time": {}, "network": {}}
    for name in losses:
        own: Mapping[str, list[str]] = {"NELBO": [], "t": []}
        matches = [match for metric in measured if (match := HELD_OUT.fullmatch(metric)) and match["target"] == name]
        averaged = any(match["weights"] == "ema" for match in matches)
        for match in matches:
            if not averaged or match["weights"] == "ema":  # of both kinds the averages, or there are too many curves
                own[match["what"].split()[0]].append(of_metric(match[0]))
        found["training and held out"][f"{name} loss, training and held out at each t"] = [f"{LOSS}/{name}", *own["t"]]
        if own["NELBO"]:
            title = f"{name} bound in nats per token, training and held out"
            found["training and held out"][title] = [bound(name), *own["NELBO"]]
        found["by time"][f"{name} loss by quarter of its clock"] = [by_time(name, quarter) for quarter in QUARTERS]
    for group in (GRADIENT, UPDATE, ACTIVATION):
        found["network"][f"{group.partition(' ')[2]} by place"] = [f"{group}/"]
    speeds = ("data-wait share", "evaluation share", "model FLOPs utilisation")
    found["time"] = {"where time goes, and what is used of the device": [f"{SPEED}/{name}" for name in speeds]}
    return found
