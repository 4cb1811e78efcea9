"""`megadiff export-paper`: a run in the format of the released weights of "Diffuse Everything"."""

from __future__ import annotations

import argparse
from pathlib import Path

from megadiff.cli.arguments import Verbs, add_verb


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "export-paper",
        "a run's weights in the format of the paper's code",
        "Write the weights of a run (or of a checkpoint or an export) whose network is that of\n"
        "configs/model/paper.yaml, in any size, to a new folder with config.json and model.safetensors, which the paper's\n"
        "code loads.",
        "  megadiff export-paper runs/paper exports/paper\n",
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder, a checkpoint's, or an export's")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or plain weights (default: ema)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from megadiff.interfaces import paper

    paper.export_paper(arguments.run_folder, Path(arguments.out), arguments.weights)
    print(f"export: {arguments.out}")
    return 0
