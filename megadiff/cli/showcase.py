"""`megadiff showcase`: the sheet of samples and the conditioning gap of a trained run."""

from __future__ import annotations

import argparse

from megadiff.cli.arguments import Verbs, add_run, add_verb
from megadiff.config.load import load_run


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "showcase",
        "the sheet of samples and the conditioning gap of a trained run",
        "Draw samples for every task with the run's newest checkpoint, write FOLDER/samples.png, and print by how much the\n"
        "right condition lowers the loss against another sample's. Exit code 1 if an interval of that gap does not exclude 0.",
        "  megadiff showcase runs/quickstart/run.yaml\n",
    )
    add_run(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    loaded = load_run(arguments.run_file, arguments.overrides)
    from megadiff.evaluation.showcase import make_showcase

    return make_showcase(loaded)
