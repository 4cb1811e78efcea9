"""`megadiff train`: one rank of one stage. A launcher starts it once per rank."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from pathlib import Path

from megadiff.cli import errors
from megadiff.cli.arguments import Verbs, add_run, add_sizes, add_verb, deepspeed_tree
from megadiff.config.errors import UserError
from megadiff.config.jobs import FAILED_AT
from megadiff.config.load import load_run
from megadiff.distributed.ranks import Ranks
from megadiff.launcher import folder


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "train",
        "one rank of one stage (launch starts it; so may torchrun)",
        "Train one stage as one rank. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say which; without them this\n"
        "is the only rank. Goes on from the stage's newest checkpoint.",
        "  torchrun --nproc-per-node 8 -m megadiff train runs/paper/run.yaml --stage joint --deepspeed ds_configs/zero2.json\n",
    )
    add_run(parser)
    parser.add_argument("--stage", metavar="NAME", required=True, help="the stage to train")
    parser.add_argument("--deepspeed", metavar="DS.json", required=True, help="how the ranks share the work")
    add_sizes(parser)
    parser.add_argument("--allow-changes", action="store_true", help="go on where the run was trained otherwise")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    loaded = load_run(arguments.run_file, arguments.overrides)
    tree = deepspeed_tree(arguments)
    ranks = Ranks.from_environment()
    stage = loaded.stage(arguments.stage)
    folder.join(loaded.paths)
    _log_to(loaded.paths.stage(stage.name).log(ranks.rank), ranks)
    try:
        from megadiff.evaluation.build import callbacks
        from megadiff.training.loop import train_stage

        failed_at = int(os.environ.get(FAILED_AT) or 0)
        allowed = arguments.allow_changes
        train_stage(loaded, stage.name, tree, callbacks(loaded, stage), failed_at=failed_at, allow_changes=allowed)
    except (UserError, OSError) as error:  # a full disk above all, and it names the file
        # The terminal gets it once, below or from the launcher.
        logging.getLogger("megadiff").info("stopped: %s", error, exc_info=isinstance(error, OSError))
        if ranks.world == 1:
            raise UserError(str(error)) from error
        errors.say(error)
        _leave_at_once(2)
    except Exception:
        logging.getLogger("megadiff").exception("rank %d of %d failed", ranks.rank, ranks.world)
        if ranks.world == 1:
            raise
        _leave_at_once(1)
    _leave_group()
    return 0


def _log_to(path: Path, ranks: Ranks) -> None:
    """This program's log goes to the rank's own file, which grows over restarts; rank 0's warnings to the terminal as well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another folder with folder=...") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("megadiff")
    logger.setLevel(logging.INFO)
    logger.addHandler(file)
    logging.raiseExceptions = False  # a full disk must not print a traceback for every line of a log
    if ranks.rank == 0:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(terminal)
    threading.excepthook = lambda ended: logger.info("a thread has failed: %s", ended.exc_value, exc_info=ended.exc_value)
    logger.info("process %d is rank %d of %d (local rank %d)", os.getpid(), ranks.rank, ranks.world, ranks.local_rank)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_at_once(code: int) -> None:
    """End a rank that has failed while others may wait for it in a collective: leaving in order could wait for them."""
    sys.stderr.flush()
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)
