"""`megadiff stop`: end a run in order, or at once."""

from __future__ import annotations

import argparse

from megadiff.cli.arguments import Verbs, add_verb, launched_run
from megadiff.launcher.status import stop


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "stop",
        "end a run after a checkpoint, or at once",
        "Ask the ranks of a run to save and end after the step in work, and take its jobs that have not started out of the\n"
        "queue. The same launch goes on from there.",
        "  megadiff stop runs/quickstart\n  megadiff stop runs/quickstart --now\n",
    )
    parser.add_argument("run_place", metavar="RUN", help="the run's folder, or its YAML file")
    parser.add_argument("--now", action="store_true", help="end it at once; what came after the newest checkpoint is lost")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for sentence in stop(launched_run(arguments.run_place), now=arguments.now):
        print(sentence)
    return 0
