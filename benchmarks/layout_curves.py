"""How far the layouts of ranks are apart: one run's curves in each, and checkpoints of each that go on in each other.

    python -m benchmarks.layout_curves [--steps N] [--json FILE]

tests/tiny.yaml in fp32 on the CPU, all three stages, every step clipped, four micro-batches a step, activations computed again;
the largest relative deviation from one rank's curve over all steps. Pairs: `KEPT_AT` steps in one layout, then in another to
`ENDS_AT`, beside one rank's uninterrupted curve. tests/engine/test_curves.py and test_checkpoints.py bound the same figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.engine.layouts import (
    ENDS_AT,
    KEPT_AT,
    LAYOUTS,
    ONE_RANK,
    PAIRS,
    PORTABLE,
    STAGES,
    deviations,
    go_on,
    samples_of,
    train,
    train_to,
)


def rounded(deviations: Mapping[str, float]) -> dict[str, float]:
    """To two digits: they are rounding noise."""
    return {curve: float(f"{value:.1e}") for curve, value in deviations.items()}


def curves(folder: Path, steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """By layout and stage."""
    found = {}
    for layout in LAYOUTS:
        report = train(layout, folder / layout, f"stages.*.steps={steps}")[0]
        if layout == ONE_RANK:
            reference = report
            continue
        found[layout] = {stage: rounded(deviations(report[stage], reference[stage])) for stage in STAGES}
        for stage, deviation in found[layout].items():
            print(f"| {layout} | {stage} | {deviation['loss']:.1e} | {deviation['grad_norm']:.1e} |", flush=True)
    return found


def pairs(folder: Path) -> list[dict[str, object]]:
    """Of every pair of layouts."""
    whole = train_to(ONE_RANK, folder / "whole", ENDS_AT)
    for layout in PORTABLE:
        train_to(layout, folder / layout, KEPT_AT)
    rows: list[dict[str, object]] = []
    for source, target in PAIRS:
        reports = go_on(folder / source, target, folder / f"{source} to {target}")
        deviation = rounded(deviations(reports[0], whole[0]))
        same = samples_of(reports) == samples_of(whole)[KEPT_AT:]
        rows.append({"from": source, "to": target, **deviation, "same_samples": same})
        print(f"| {source} | {target} | {deviation['loss']:.1e} | {deviation['grad_norm']:.1e} | {same} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps of each stage")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/layout_curves.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| from | to | loss | gradient norm | same samples |\n|---|---|---|---|---|", flush=True)
        checkpoints = pairs(Path(folder, "pairs"))
        print("\n| layout | stage | loss | gradient norm |\n|---|---|---|---|", flush=True)
        found = {
            "steps": arguments.steps,
            "curves": curves(Path(folder, "curves"), arguments.steps),
            "checkpoints": checkpoints,
        }
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
