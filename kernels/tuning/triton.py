"""Measure tile sizes on this GPU and write the fastest ones to its table.

    python -m megadiff.kernels.tuning.triton [--op NAME ...] [--table FILE]

Every kernel that an op's cases launch is timed by itself with each of its candidates, at the first case that has its bucket and
dtype. A candidate counts if the case's results are those of the configuration in force, and goes into the table if it takes at
most `WORTH` of its time. Of attention it also measures up to how many tokens its own kernels are the faster path. Commit the
table together with the GPU's rows of benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.testing import do_bench

from megadiff.kernels import toolchain, tuning
from megadiff.kernels.agreement import relative_error
from megadiff.kernels.joint_attention import op as attention
from megadiff.kernels.joint_attention import path
from megadiff.kernels.toolchain.triton import Case, Launch, ops, recording
from megadiff.kernels.tuning import Config, Entry, Question, Target

WORTH, LIMIT = 0.97, 0.02
Clock = Callable[[Launch], float]


def milliseconds(launch: Launch) -> float:
    """Median time of a launch, with an empty L2 cache."""
    median: float = do_bench(launch.make, return_mode="median")
    return median


def tuned(op: str, device: torch.device, clock: Clock = milliseconds) -> Iterator[Entry]:
    """The entries of an op on this device, beside its defaults, whatever its table holds; says what it measures."""
    module: Any = importlib.import_module(f"megadiff.kernels.{op}.triton")
    target, seen = tuning.target_of(device), set()
    with tuning.assumed(Target(target.architecture)):
        for case in module.cases():
            with tuning.listening() as answers:
                case.launch(device)
            for question, config in answers:
                if question not in seen:
                    seen.add(question)
                    candidates = list(module.candidates(question.kernel.partition(".")[2], target.architecture))
                    best = fastest(case, question, config, candidates, device, clock)
                    if best is not config:
                        yield entry(question, best, target)


def entry(question: Question, config: Config, target: Target) -> Entry:
    return Entry(*question, target.gpu, target.architecture, *toolchain.toolchain(), dict(config))


def fastest(
    case: Case, question: Question, config: Config, candidates: list[Config], device: torch.device, clock: Clock
) -> Config:
    """The candidate that takes the least time, or the configuration in force if none is worth it."""
    best, least = config, float("inf")
    expected = results(case, question, config, device)[1]
    for candidate in (config, *candidates):
        try:
            launches, found = results(case, question, candidate, device)
            if (error := disagreement(found, expected)) > LIMIT:
                print(f"{question} {candidate}: refused, its results differ by {error:.2g}", flush=True)
                continue
            taken = sum(clock(launch) for launch in launches)
        except Exception as fault:  # too much shared memory, a compiler that gives up: not a candidate
            print(f"{question} {candidate}: {type(fault).__name__}", flush=True)
            continue
        print(f"{question} {candidate}: {taken:.4f} ms", flush=True)
        if taken < least * (1 if best is not config or candidate is config else WORTH):
            best, least = candidate, taken
    return best


def results(case: Case, question: Question, config: Config, device: torch.device) -> tuple[list[Launch], list[Tensor]]:
    """A kernel's launches in a case that runs with a configuration, and what the case's launchers fill."""
    name = question.kernel.partition(".")[2]
    torch.manual_seed(0)
    with tuning.trying(question.kernel, config), recording(run=True) as launches:
        filled = case.launch(device)
    tensors = [leaf.clone() for leaf in tree_leaves(filled) if isinstance(leaf, Tensor)]
    return [launch for launch in launches if launch.kernel.__name__ == name], tensors


def disagreement(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error among a case's results."""
    return max(relative_error(one, other) for one, other in zip(found, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=ops(), default=ops())
    parser.add_argument("--table", type=Path, help="default: this GPU's in the folder of tables")
    arguments = parser.parse_args()
    if (fault := toolchain.fault()) is not None or toolchain.interpreted():
        parser.error(f"nothing can be measured here: {fault or 'Triton interprets its kernels'}")
    device = torch.device("cuda", torch.cuda.current_device())
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name())
    table = arguments.table or tuning.TABLES / f"{name}.json"
    kept = json.loads(table.read_text(encoding="utf-8")) if table.exists() else []
    found = {op: [each._asdict() for each in tuned(op, device)] for op in arguments.op}
    if "joint_attention" in found:
        answers = path.measured(attention._attended, device, lambda step: do_bench(step, return_mode="median"))
        found["joint_attention"] += [entry(*answer, tuning.target_of(device))._asdict() for answer in answers]
    others = [each for each in kept if each["kernel"].partition(".")[0] not in found]
    table.write_text(json.dumps([*others, *itertools.chain(*found.values())], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
