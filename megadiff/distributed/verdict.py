"""What the ranks' findings about their nodes mean. Pure: rank 0 judges, and all ranks hear of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from megadiff.config.schema import Preflight

_NAMED = 8


@dataclass(frozen=True)
class Findings:
    """What a rank has found out; travels as JSON.

    Attributes:
        clock_s: its node's, in seconds since 1970, when the ranks had met.
        versions: of what is not the same on all nodes by itself.
        faults: what is wrong with its node, each a sentence without its subject.
        bandwidths: by neighbour, bytes per second of the all-reduce between both nodes; 0 if it had no end.
        wrong: by rank, what came instead of its number in the all-reduce over all ranks; None if that had no end.
    """

    clock_s: float
    versions: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    bandwidths: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, float] | None = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What becomes of the run.

    Attributes:
        faults: why it must not start, in a sentence, or nothing.
        notes: what it starts in spite of.
        summary: for the log.
    """

    faults: str = ""
    notes: str = ""
    summary: str = ""


Fault = tuple[str, str]
"""A node, and a sentence about it without its subject."""


def judge(nodes: Sequence[str], findings: Mapping[int, Findings], rules: Preflight, *, slurm: bool) -> Verdict:
    """Judge an allocation.

    Args:
        nodes: by rank the name of its node.
        findings: by rank; a rank that gave no answer has none.
        slurm: the nodes are a Slurm allocation.
    """
    first: dict[str, Findings] = {}
    for rank, own in sorted(findings.items()):
        first.setdefault(nodes[rank], own)
    speeds = _speeds(nodes, findings)
    slow = list(_slow(speeds, rules))
    refused = [
        *_missing(nodes, findings),
        *((nodes[rank], fault) for rank, own in sorted(findings.items()) for fault in own.faults),
        *_versions(first),
        *_clocks(first, rules.clock_s),
        *_silent(speeds),
        *_sums(nodes, findings, speeds),
        *(slow if rules.slow_nodes == "refuse" else []),
    ]
    notes = slow if rules.slow_nodes == "report" else []
    faults, noted = (_sentences(found, len(set(nodes)), slurm) for found in (refused, notes))
    return Verdict(faults, noted, _summary(nodes, speeds))


def usual(values: Sequence[float]) -> float:
    """What most nodes have; of two, what rank 0's has."""
    return median(values) if len(values) > 2 else values[0]


def _missing(nodes: Sequence[str], findings: Mapping[int, Findings]) -> Iterator[Fault]:
    for node in dict.fromkeys(nodes):
        if silent := [str(rank) for rank, own in enumerate(nodes) if own == node and rank not in findings]:
            yield node, f"has no answer from rank{'s' * (len(silent) > 1)} {', '.join(silent)}; see their logs"


def _versions(first: Mapping[str, Findings]) -> Iterator[Fault]:
    for name in dict.fromkeys(name for own in first.values() for name in own.versions):
        counts = Counter(own.versions.get(name, "none") for own in first.values())
        most = counts.most_common(1)[0][0]  # of equally many, that of the lower rank
        for node, own in first.items():
            if (version := own.versions.get(name, "none")) != most:
                yield node, f"has {name} {version}, and others {most}; all nodes must have the same"


def _clocks(first: Mapping[str, Findings], most_s: float) -> Iterator[Fault]:
    middle = usual([own.clock_s for own in first.values()]) if first else 0.0
    for node, own in first.items():
        ahead = own.clock_s - middle
        if abs(ahead) > most_s:
            way = "ahead of" if ahead > 0 else "behind"
            yield node, f"has a clock {abs(ahead):.1f} s {way} the others; have it set (preflight.clock_s: {most_s:g})"


def _speeds(nodes: Sequence[str], findings: Mapping[int, Findings]) -> dict[str, float]:
    """By node the bandwidth with the better of its neighbours, as its slowest rank and theirs saw it.

    A slow node is slow with both; its neighbours are not, with their others.
    """
    pairs: dict[frozenset[str], float] = {}
    for rank, own in findings.items():
        for other, bandwidth in own.bandwidths.items():
            pair = frozenset((nodes[rank], other))
            pairs[pair] = min(bandwidth, pairs.get(pair, bandwidth))
    best: dict[str, float] = {}
    for pair, bandwidth in pairs.items():
        for node in pair:
            best[node] = max(bandwidth, best.get(node, 0.0))
    return {node: best[node] for node in dict.fromkeys(nodes) if node in best}


def _silent(speeds: Mapping[str, float]) -> Iterator[Fault]:
    for node, speed in speeds.items():
        if speed == 0:
            yield node, "got no all-reduce with its neighbours to its end; see its network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"


def _slow(speeds: Mapping[str, float], rules: Preflight) -> Iterator[Fault]:
    if len(speeds) < 3:
        return
    middle = median(speeds.values())
    for node, speed in speeds.items():
        if 0 < speed < rules.slow_below * middle:
            yield node, f"is slow: its all-reduce has {gigabytes(speed)}, and the median is {gigabytes(middle)}"


def _sums(nodes: Sequence[str], findings: Mapping[int, Findings], speeds: Mapping[str, float]) -> Iterator[Fault]:
    """Every rank sends a number of its own. One that is wrong everywhere was sent so, others were received so."""
    wrong = {rank: own.wrong for rank, own in findings.items() if own.wrong}
    sent = {int(rank) for rank in set[str]().union(*wrong.values()) if all(rank in own for own in wrong.values())}
    if len(wrong) == len(nodes):
        yield from (
            (nodes[rank], f"sends wrong numbers in an all-reduce (rank {rank}); take it out of service")
            for rank in sorted(sent)
        )
    for rank, own in sorted(wrong.items()):
        if len(wrong) < len(nodes) or not set(map(int, own)) <= sent:
            yield nodes[rank], f"gets wrong sums from an all-reduce (rank {rank}); take it out of service"
    if all(speeds.values()):  # else nodes that no number comes from are named already
        for node in dict.fromkeys(nodes[rank] for rank, own in sorted(findings.items()) if own.wrong is None):
            yield node, "got no all-reduce over all ranks to its end; see its network and its ranks' logs"


def _sentences(faults: Sequence[Fault], nodes: int, slurm: bool) -> str:
    """The faults, equal ones joined, and which nodes to leave out."""
    if not faults:
        return ""
    by_text: dict[str, list[str]] = {}
    for node, text in faults:
        by_text.setdefault(text, []).append(node)
    said = "; ".join(f"{_names(dict.fromkeys(named))} {text}" for text, named in by_text.items())
    bad = list(dict.fromkeys(node for node, _ in faults))
    if len(bad) == nodes:
        return said
    way = f"launch with cluster.exclude={','.join(bad)} (sbatch's --exclude)" if slurm else "name only the others under hosts"
    return f"{said}. Without {_names(bad)}: {way}"


def _names(nodes: Iterable[str]) -> str:
    names = list(nodes)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _summary(nodes: Sequence[str], speeds: Mapping[str, float]) -> str:
    said = f"{len(nodes)} ranks on {_names(dict.fromkeys(nodes))}"
    if not speeds:
        return said
    slowest = min(speeds, key=lambda node: speeds[node])
    middle = gigabytes(median(speeds.values()))
    return f"{said}; all-reduce {middle} in the median, {gigabytes(speeds[slowest])} on {slowest}"


def gigabytes(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.3g} GB/s"
