"""`megadiff status`: how far a run is, wherever it runs."""

from __future__ import annotations

import argparse

from megadiff.cli.arguments import Verbs, add_verb, launched_run
from megadiff.launcher.status import status, table


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "status",
        "how far a run is",
        "Show a line per stage of a launched run: its state and job, step, loss, speed and time left, newest checkpoint,\n"
        "restarts of the job and why the last one happened. Reads the run's folder, and Slurm's queue where there is one.",
        "  megadiff status runs/quickstart\n",
    )
    parser.add_argument("run_place", metavar="RUN", help="the run's folder, or its YAML file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    loaded = launched_run(arguments.run_place)
    print(f"run {loaded.name}, folder {loaded.folder}")
    print(table(status(loaded)))
    return 0
