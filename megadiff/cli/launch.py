"""`megadiff launch`: all stages of a run on this machine. Without torch; the ranks import it."""

from __future__ import annotations

import argparse
import sys

from megadiff.cli.arguments import Verbs, add_run, add_verb
from megadiff.config.deepspeed import load_deepspeed
from megadiff.config.load import load_run
from megadiff.launcher import folder, local

EXAMPLES = """\
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero2.json folder=runs/short stages.*.steps=20
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json --dry-run
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "launch",
        "train all stages of a run on this machine",
        "Check everything, then train the run's stages one after the other through DeepSpeed's launcher, on the GPUs of this\n"
        "machine (CUDA_VISIBLE_DEVICES chooses) or on its CPU, and make the sheet of samples at the end. On a folder that has\n"
        "checkpoints the run goes on where it stopped; the sections launch and showcase may differ then, other keys may not.",
        EXAMPLES,
    )
    add_run(parser)
    parser.add_argument("--deepspeed", metavar="DS.json", required=True, help="how ranks share the work")
    parser.add_argument("--dry-run", action="store_true", help="check, print the commands, and start nothing")
    parser.add_argument("--allow-changes", action="store_true", help="go on in a folder whose run had another configuration")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    plan = local.plan_launch(load_run(arguments.run_file, arguments.overrides), load_deepspeed(arguments.deepspeed))
    if not arguments.dry_run:
        return local.launch(plan, allow_changes=arguments.allow_changes, say=_say)
    if not arguments.allow_changes:
        folder.check_unchanged(plan.run)
    print(local.describe(plan))
    for missing in local.missing_files(plan.run):
        print(f"megadiff: note: not there yet: {missing}", file=sys.stderr)
    return 0


def _say(message: str) -> None:
    print(message, flush=True)
