"""`megadiff profile`: where the time of a step goes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megadiff.cli.arguments import Verbs, add_run, add_sizes, add_verb, deepspeed_tree, positive
from megadiff.config.load import load_run
from megadiff.launcher.children import several


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "profile",
        "trace some steps: phases, the dearest operations, memory",
        "Train a fresh network for a few steps and print the shares of data, noise, forward, backward, reduce, optimizer\n"
        "and EMA in a step, and the ten dearest operations. OUT gets trace.json.gz (for ui.perfetto.dev), and on a GPU\n"
        "memory.pickle (for pytorch.org/memory_viz). Nothing is saved or resumed. Also under torchrun.",
        "  megadiff profile configs/run/quickstart.yaml --stage joint --deepspeed ds_configs/zero3.json --processes 2\n",
    )
    add_run(parser)
    parser.add_argument("--stage", metavar="NAME", help="the stage (default: the last one)")
    parser.add_argument("--deepspeed", metavar="DS.json", required=True, help="how the ranks share the work")
    add_sizes(parser)
    parser.add_argument("--steps", metavar="K", type=positive, default=5, help="steps in the trace (default: 5)")
    parser.add_argument("--out", metavar="OUT", default="profile", help="a folder (default: profile)")
    parser.add_argument("--processes", metavar="N", type=positive, default=1, help="ranks on this machine (default: 1)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    loaded = load_run(arguments.run_file, arguments.overrides)
    tree = deepspeed_tree(arguments)
    stage = loaded.stage(arguments.stage) if arguments.stage else loaded.stages[-1]
    if arguments.processes > 1 and "RANK" not in os.environ:
        return several(arguments.processes, sys.argv[1:])
    from megadiff.training.profiling import profile_stage

    found = profile_stage(loaded, stage, tree, arguments.steps, Path(arguments.out))
    if int(os.environ.get("RANK", 0)) == 0:
        print(found)
        print(f"trace: {arguments.out}/trace.json.gz")
    return 0
