"""`megadiff sample`: parse, check that the flags go together, hand over."""

from __future__ import annotations

import argparse
from typing import Any

from megadiff.cli.arguments import Verbs, add_verb, positive
from megadiff.config.errors import UserError

EXAMPLES = """\
  megadiff sample --checkpoint runs/quickstart --task text-to-image --prompt "red heart" --guidance 3 --out samples
  megadiff sample --checkpoint runs/quickstart --task image-to-text --image cat.png --out captions
  megadiff sample --checkpoint exports/quickstart --task joint -n 16 --seed 1 --out joint
  megadiff sample --checkpoint runs/quickstart --task text-to-image --data examples/emoji32/held_out -n 64 --out held_out
"""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "sample",
        "draw pictures, captions, or both from a checkpoint",
        "Draw samples and write them to a folder: pictures, captions (JSON lines) and one contact sheet. The same seed gives\n"
        "the same sample whatever the batch size and the number of processes.",
        EXAMPLES,
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--checkpoint",
        metavar="RUN|EXPORT|hf:ORG/NAME",
        required=True,
        help="a run's or an export's folder, or a Hugging Face repository",
    )
    what.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or plain weights (default: ema)")
    what.add_argument(
        "--task", metavar="TASK", required=True, help="GIVEN-to-WANTED, such as text-to-image or image-to-text; or joint"
    )
    what.add_argument("--out", metavar="DIR", required=True, help="where samples are written")
    condition = parser.add_argument_group("condition (one of them; none for joint)")
    condition.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a caption; repeat for more")
    condition.add_argument("--prompts", metavar="FILE.json", help='a list of captions, {"id": "caption"}, or {"text": [...]}')
    condition.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; repeat for more")
    condition.add_argument("--data", metavar="MANIFEST", help="take the conditions from this data set")
    condition.add_argument("--limit-context-len", metavar="L", type=positive, help="use at most L tokens of a caption")
    how = parser.add_argument_group("how")
    how.add_argument(
        "-n", metavar="N", type=positive, help="samples per prompt or picture; samples in all for joint and --data"
    )
    how.add_argument("--steps", metavar="N", type=positive, default=50, help="sampling steps (default: 50)")
    how.add_argument(
        "--guidance",
        metavar="W",
        type=float,
        default=1.0,
        help="W in W x conditional + (1 - W) x unconditional (default: 1, none)",
    )
    how.add_argument(
        "--guidance-interval",
        metavar=("A", "B"),
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        help="guide only at times A..B (default: 0 1)",
    )
    how.add_argument(
        "--guidance-final-time",
        metavar="S",
        type=float,
        default=1.0,
        help="below 1: noisy guidance, the unconditional branch sees the condition noised to time S (default: 1)",
    )
    how.add_argument("--seed", metavar="K", type=int, default=0, help="the same seed gives the same samples (default: 0)")
    how.add_argument(
        "--batch", metavar="B", type=positive, default=32, help="samples drawn at once; no effect on them (default: 32)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    from megadiff.interfaces.generate import GenerateRequest, generate

    flags = {key: value for key, value in vars(arguments).items() if key not in ("run", "parser")}
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
    print(f"samples: {generate(GenerateRequest(**fields))}")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Flags that do not go together.

    Raises:
        UserError: naming them, before anything is loaded.
    """
    task = arguments.task
    given = [flag for flag in ("--prompt", "--prompts", "--image", "--data") if getattr(arguments, flag[2:])]
    if task != "joint" and not all(task.partition("-to-")):
        raise UserError(f"--task {task}: write GIVEN-to-WANTED, such as text-to-image or image-to-text, or joint")
    if task == "joint" and given:
        raise UserError(f"--task joint makes everything from nothing and takes no condition; leave out {' and '.join(given)}")
    if task != "joint" and not given:
        raise UserError(f"--task {task} needs a condition: --prompt TEXT, --prompts FILE.json, --image FILE or --data MANIFEST")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one")
    if arguments.guidance < 0:
        raise UserError(f"--guidance {arguments.guidance:g} must be 0 or more (1 is none)")
    lower, upper = arguments.guidance_interval
    if not 0 <= lower <= upper <= 1:
        raise UserError(f"--guidance-interval {lower:g} {upper:g} must be two times with 0 <= A <= B <= 1")
    if not 0 <= arguments.guidance_final_time <= 1:
        raise UserError(f"--guidance-final-time {arguments.guidance_final_time:g} must lie between 0 and 1")
    if not 0 <= arguments.seed < 2**62:
        raise UserError(f"--seed {arguments.seed} must be a whole number from 0 to 2^62 - 1")
