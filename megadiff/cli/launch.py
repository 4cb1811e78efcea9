"""`megadiff launch`: all stages of a run on this machine. Without torch; the ranks import it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megadiff.cli.arguments import Verbs, add_run, add_sizes, add_verb, deepspeed_tree, positive
from megadiff.config.errors import UserError
from megadiff.config.load import load_run
from megadiff.launcher import folder, job, local
from megadiff.launcher.children import several
from megadiff.launcher.devices import find_devices

EXAMPLES = """\
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero2.json folder=runs/short stages.*.steps=20
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json --dry-run
  megadiff launch --processes 8 -- data encode s3://bucket/pairs s3://bucket/latents --autoencoder models/sd-vae
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "launch",
        "train all stages of a run on this machine, or run another verb as several processes",
        "Check everything, then train the run's stages one after the other through DeepSpeed's launcher, on the GPUs of this\n"
        "machine (CUDA_VISIBLE_DEVICES chooses) or on its CPU, and make the sheet of samples at the end. In a folder with\n"
        "checkpoints the run continues; only its sections launch and showcase may have changed.\n"
        "Another verb may follow --; it is run once per GPU, or --processes times.",
        EXAMPLES,
    )
    add_run(parser, required=False)
    parser.add_argument("--deepspeed", metavar="DS.json", help="how ranks share the work")
    add_sizes(parser)
    parser.add_argument(
        "--processes", metavar="N", type=positive, help="processes of the verb after --; a run has launch.processes"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the commands, and start nothing")
    parser.add_argument("--allow-changes", action="store_true", help="continue in a folder whose run had another configuration")
    parser.set_defaults(run=run, command=[])


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's own part, and the verb and arguments after `launch ... --`."""
    if arguments[:1] != ["launch"] or "--" not in arguments:
        return list(arguments), []
    place = list(arguments).index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])


def run(arguments: argparse.Namespace) -> int:
    if arguments.command:
        return _launch_verb(arguments)
    if arguments.run_file is None or arguments.deepspeed is None:
        arguments.parser.error("give RUN.yaml and --deepspeed DS.json, or -- and another verb")
    if arguments.processes is not None:
        arguments.parser.error("--processes is of a verb after --; a run takes launch.processes=N")
    plan = job.plan_launch(load_run(arguments.run_file, arguments.overrides), deepspeed_tree(arguments))
    if not arguments.dry_run:
        return local.launch(plan, allow_changes=arguments.allow_changes, say=_say)
    if not arguments.allow_changes:
        folder.check_unchanged(plan.run)
    print(job.describe(plan))
    for missing in job.missing_files(plan.run):
        print(f"megadiff: note: not there yet: {missing}", file=sys.stderr)
    return 0


def _launch_verb(arguments: argparse.Namespace) -> int:
    of_a_run = ("run_file", "deepspeed", "pipeline_stages", "tensor_parallel", "dry_run", "allow_changes")
    if any(getattr(arguments, name) for name in of_a_run):
        arguments.parser.error("before -- only --processes N may stand")
    if arguments.command[0] in ("launch", "train"):
        raise UserError(f"launch starts {arguments.command[0]} by RUN.yaml and --deepspeed, not after --")
    processes = arguments.processes or max(find_devices().count, 1)
    return several(processes, arguments.command)


def _say(message: str) -> None:
    print(message, flush=True)
