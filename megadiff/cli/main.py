"""`megadiff <verb>`: find the verb, run it, turn a user's mistake into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Sequence

from megadiff import __version__
from megadiff.cli import (
    check_config,
    checkpoint,
    data,
    ema,
    errors,
    evaluate,
    export,
    export_paper,
    import_paper,
    launch,
    logs,
    plan,
    profile,
    report,
    sample,
    showcase,
    status,
    stop,
    train,
)
from megadiff.config.errors import UserError
from megadiff.launcher.children import end_with_launcher

VERBS = (
    *(check_config, plan, profile, launch, status, logs, stop, report, train, sample, evaluate, showcase),
    *(export, checkpoint, ema, data, import_paper, export_paper),
)
"""Modules with `add(verbs)`; each parser that they add sets `run`, a function: parsed arguments -> exit code."""

EXAMPLES = """\
examples:
  megadiff check-config configs/run/quickstart.yaml
  megadiff launch configs/run/quickstart.yaml --deepspeed ds_configs/zero3.json
  megadiff sample --checkpoint runs/quickstart --task text-to-image --prompt "red heart" --out samples

A user's mistake ends with one sentence and exit code 2.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    end_with_launcher()
    parsed = parse(arguments)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except UserError as error:
        errors.say(error)
        return 2
    except BrokenPipeError:  # the reader (head, less) has gone
        _let_go_of_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or f"what it writes, or in {tempfile.gettempdir()}"
        errors.say(UserError(f"there is no room for {where} ({error.strerror}); make some, and give the command again"))
        _let_go_of_output()
        return 2
    except KeyboardInterrupt:
        print("megadiff: interrupted", file=sys.stderr)
        return 130
    return code


def _let_go_of_output() -> None:
    """Discard the rest of stdout, which cannot be written: the interpreter's flush at exit must not fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; exits with code 2 and the verb's usage if it cannot be."""
    own, command = launch.split(sys.argv[1:] if arguments is None else arguments)
    parsed, extras = parser().parse_known_args(own)
    if command:
        parsed.command = command
    # argparse ends a `*` positional at the first option; overrides after it arrive here.
    if hasattr(parsed, "overrides"):
        parsed.overrides += [extra for extra in extras if not extra.startswith("-")]
        extras = [extra for extra in extras if extra.startswith("-")]
    if extras:
        parsed.parser.error(f"unrecognized arguments: {' '.join(extras)}")
    return parsed


def parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    top = argparse.ArgumentParser(
        prog="megadiff",
        description="Train and sample one network that diffuses several modalities, each on its own clock.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"megadiff {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    return top
