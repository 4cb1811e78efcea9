"""`megadiff checkpoint`: look at checkpoints, check them, compare them, and put one together in one file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from megadiff.cli.arguments import Verbs, add_verb

if TYPE_CHECKING:
    from megadiff.weights.checkpoint import WeightSource

WEIGHT = "weight"
EXAMPLES = """\
  megadiff checkpoint inspect runs/quickstart
  megadiff checkpoint verify runs/quickstart/joint/checkpoints/step_00000450
  megadiff checkpoint diff runs/quickstart/joint/checkpoints/step_00000300 runs/quickstart
  megadiff checkpoint consolidate runs/quickstart weights.safetensors --kind ema.main
  megadiff checkpoint consolidate runs/quickstart universal/step_450 --format universal
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "checkpoint",
        "look at, verify, compare or consolidate checkpoints",
        "Work on checkpoints, with one piece of a parameter in memory at a time (one parameter for --format universal).\n"
        "A run's folder means its newest checkpoint; a folder in DeepSpeed's universal format is a checkpoint as well.",
        EXAMPLES,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    inspect = add_verb(
        actions, "inspect", "what a checkpoint holds", "Show what a checkpoint holds; only its manifest is read."
    )
    inspect.add_argument("checkpoint", metavar="RUN|CHECKPOINT")
    inspect.add_argument("--parameters", action="store_true", help="list every parameter")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=run_inspect)

    verify = add_verb(
        actions,
        "verify",
        "is it whole?",
        "Compare every file with its hash, and check that every number is stored exactly once.",
    )
    verify.add_argument("checkpoint", metavar="RUN|CHECKPOINT")
    verify.set_defaults(run=run_verify)

    diff = add_verb(
        actions, "diff", "which parameters differ", "Show which parameters differ, and by how much; exit code 1 if any do."
    )
    diff.add_argument("one", metavar="A", help="a run's folder, or a checkpoint's")
    diff.add_argument("other", metavar="B")
    _add_kind(diff)
    diff.set_defaults(run=run_diff)

    consolidate = add_verb(
        actions,
        "consolidate",
        "one safetensors file, or DeepSpeed's universal format",
        "Write every parameter whole, float32: one kind of tensors to a safetensors file, or weights, moments and step\n"
        "to a folder that DeepSpeed loads with load_universal, on any number of ranks.",
    )
    consolidate.add_argument("checkpoint", metavar="RUN|CHECKPOINT")
    consolidate.add_argument("out", metavar="OUT", help="a new file, or for universal a new folder")
    consolidate.add_argument(
        "--format",
        choices=("megadiff", "universal"),
        default="megadiff",
        help="megadiff: a safetensors file; universal: a folder as deepspeed.checkpoint.ds_to_universal writes, and "
        "latest_universal beside it (default: megadiff)",
    )
    _add_kind(consolidate)
    consolidate.set_defaults(run=run_consolidate)


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        metavar="KIND",
        default=WEIGHT,
        help="weight, ema.PROFILE, exp_avg or exp_avg_sq (default: weight)",
    )


def run_inspect(arguments: argparse.Namespace) -> int:
    from megadiff.weights.checkpoint_tools import parameter_counts

    reader = _open(arguments.checkpoint)
    manifest = reader.manifest
    sizes = parameter_counts(reader)
    if arguments.json:
        tree = {
            "folder": str(reader.folder),
            "stage": manifest.stage,
            "progress": manifest.progress,
            "ema": manifest.ema,
            "parts": {name: {"trained": part.trained, "frozen": part.frozen} for name, part in sizes.items()},
            "files": {entry.name: entry.bytes for entry in manifest.files},
            "parameters": {name: list(shape) for name, (shape, _) in manifest.parameters.items()},
        }
        print(json.dumps(tree, indent=1))
        return 0
    print(reader.folder)
    if manifest.stage:  # DeepSpeed's universal format knows none
        print(f"stage       {manifest.stage}\nEMA         {', '.join(manifest.ema)}")
    for name, value in manifest.progress.items():
        print(f"{name:<11} {value}")
    total = sum(entry.bytes for entry in manifest.files)
    print(f"files       {len(manifest.files)}, {total / 2**20:,.1f} MiB")
    print("\n| part | trained | frozen |\n|---|---|---|")
    for name, part in sizes.items():
        print(f"| {name} | {part.trained:,} | {part.frozen:,} |")
    if arguments.parameters:
        print("\n| parameter | shape | trained | files |\n|---|---|---|---|")
        for name, (shape, trained) in manifest.parameters.items():
            files = sum(name in entry.extents for entry in manifest.files)
            print(f"| {name} | {' x '.join(map(str, shape))} | {'yes' if trained else 'no'} | {files} |")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megadiff.config.errors import UserError
    from megadiff.weights.checkpoint_tools import faults

    reader = _open(arguments.checkpoint)
    with tqdm(total=len(reader.manifest.files), unit="file", disable=None) as bar:
        sentences = faults(reader, bar.update)
    if sentences:
        more = f"; and {len(sentences) - 5} more" if len(sentences) > 5 else ""
        raise UserError(f"{reader.folder}: {'; '.join(sentences[:5])}{more}")
    print(f"{reader.folder} is whole: {len(reader.manifest.files)} files, {len(reader.manifest.parameters)} parameters")
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    from megadiff.weights.checkpoint_tools import differences

    one, other = _open(arguments.one), _open(arguments.other)
    for reader in (one, other):
        _check_kind(reader, arguments.kind)
    count = 0
    for difference in differences(one, other, arguments.kind):
        if not count:
            print("| parameter | relative difference | largest |\n|---|---|---|")
        count += 1
        cells = f"{difference.relative:.3e} | {difference.largest:.3e}" if not difference.reason else f"{difference.reason} | "
        print(f"| {difference.name} | {cells} |", flush=True)
    total = len({*one.manifest.parameters, *other.manifest.parameters})
    print(f"{count} of {total} parameters differ" if count else f"all {total} parameters are the same to the bit")
    return 1 if count else 0


def run_consolidate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from tqdm import tqdm

    from megadiff.config.errors import UserError
    from megadiff.weights.checkpoint_tools import consolidate
    from megadiff.weights.universal import is_universal, write

    reader = _open(arguments.checkpoint)
    _check_kind(reader, arguments.kind)
    universal = arguments.format == "universal"
    if universal and arguments.kind != WEIGHT:
        raise UserError(f"--kind {arguments.kind}: the universal format holds the weights and both moments, and nothing else")
    if universal and is_universal(reader.folder):
        raise UserError(f"{reader.folder} is in the universal format already; copy it")
    with tqdm(total=len(reader.manifest.parameters), unit="parameter", disable=None) as bar:
        if universal:
            write(reader, Path(arguments.out), bar.update)
        else:
            consolidate(reader, arguments.kind, Path(arguments.out), bar.update)
    held = "weights, moments and step" if universal else arguments.kind
    print(f"{held} of {reader.folder}: {arguments.out}")
    return 0


def _open(address: str) -> WeightSource:
    from megadiff.weights.loading import checkpoint_of

    return checkpoint_of(address)


def _check_kind(reader: WeightSource, kind: str) -> None:
    from megadiff.config.errors import UserError
    from megadiff.weights.checkpoint import MOMENTS

    kinds = [WEIGHT, *(f"ema.{profile}" for profile in reader.manifest.ema), *MOMENTS]
    if kind not in kinds:
        raise UserError(f"--kind {kind}: {reader.folder} has {', '.join(kinds)}")
