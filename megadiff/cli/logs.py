"""`megadiff logs`: what a rank or a job has written."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from megadiff.cli.arguments import Verbs, add_verb, launched_run, not_negative
from megadiff.launcher.status import log_of

_LOOK_S = 0.2


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "logs",
        "what a rank or a job of a run has written",
        "Print a log of a run's newest stage: the output of its newest job, or without one rank 0's log; or any rank's.",
        "  megadiff logs runs/quickstart -f\n  megadiff logs runs/quickstart --stage joint --rank 3\n",
    )
    parser.add_argument("run_place", metavar="RUN", help="the run's folder, or its YAML file")
    parser.add_argument("--stage", metavar="NAME", help="a stage (default: the one that wrote last)")
    parser.add_argument("--rank", metavar="R", type=not_negative, help="the log of a rank")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on, until Ctrl-C")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    path = log_of(launched_run(arguments.run_place), arguments.stage, arguments.rank)
    for text in _read(path, follow=arguments.follow):
        print(text, end="", flush=True)
    return 0


def _read(path: Path, *, follow: bool) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        while text := file.read(1 << 16):
            yield text
        while follow:
            time.sleep(_LOOK_S)
            if text := file.read():
                yield text
