"""`megadiff export`: weights, configuration and tokenizers in one folder."""

from __future__ import annotations

import argparse

from megadiff.cli.arguments import Verbs, add_verb


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "export",
        "write a run's weights as one folder that needs nothing else",
        "Write the weights of a run's newest checkpoint (or of one checkpoint's folder) with configuration and tokenizers\n"
        "to a new folder, which `megadiff sample --checkpoint` takes.",
        "  megadiff export runs/quickstart exports/quickstart\n",
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder, or a checkpoint's")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or plain weights (default: ema)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from megadiff.weights.loading import export_run

    export_run(arguments.run_folder, arguments.out, arguments.weights)
    print(f"export: {arguments.out}")
    return 0
