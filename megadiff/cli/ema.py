"""`megadiff ema`: weights averaged over a length that was not tracked."""

from __future__ import annotations

import argparse

from megadiff.cli.arguments import Verbs, add_verb

EXAMPLES = """\
  megadiff ema runs/mine --length 0.08 --out exports/ema_0.08
  megadiff ema runs/mine --length 0.02 --stage joint --out exports/ema_0.02
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "ema",
        "reconstruct an average of any length from a run's checkpoints",
        "Combine the averages that a stage's checkpoints hold (EDM2's power-function profiles) to one of another length,\n"
        "and write it as an export, which `megadiff sample --checkpoint` takes. The more checkpoints the stage kept\n"
        "(checkpoint.keep_every_steps), the closer it comes; the error is printed.",
        EXAMPLES,
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--length", metavar="S", type=float, required=True, help="relative standard deviation of the average, such as 0.05"
    )
    parser.add_argument("--stage", metavar="NAME", help="default: the last stage that has a checkpoint")
    parser.add_argument("--out", metavar="OUT", required=True, help="a new folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from megadiff.weights.loading import export_average

    average = export_average(arguments.run_folder, arguments.out, arguments.length, arguments.stage)
    used = f"{len(average.coefficients)} averages"
    print(f"export: {arguments.out} (length {arguments.length:g} out of {used}, profile within {average.error:.1%})")
    return 0
