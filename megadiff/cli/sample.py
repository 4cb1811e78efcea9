"""`megadiff sample`: parse, check that the flags go together, hand over."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megadiff.cli.arguments import Verbs, add_verb, positive
from megadiff.cli.errors import enough_memory
from megadiff.config.errors import UserError
from megadiff.config.schema import Sampling
from megadiff.generation.presets import INPAINT_RESAMPLE, PRESETS
from megadiff.launcher.children import several

EXAMPLES = """\
  megadiff sample --checkpoint runs/quickstart --task text-to-image --prompt "red heart" --guidance 3 --out samples
  megadiff sample --checkpoint runs/quickstart --task image-to-text --image cat.png --order confidence --out captions
  megadiff sample --checkpoint exports/quickstart --task joint -n 16 --seed 1 --out joint
  megadiff sample --checkpoint runs/quickstart --task text-to-image --data examples/emoji32/held_out --format tar --out held_out
  megadiff sample --checkpoint runs/quickstart --task inpaint --image cat.png --mask-image m.png --text "a ___ cat" --out filled
  megadiff sample --checkpoint runs/quickstart --task text-to-image --prompt "a cat" --image cat.png --strength 0.6 --out varied
  megadiff sample --checkpoint runs/diamonds --task impute --table rows.csv --out imputed
"""

REQUEST_FLAGS = (
    *(
        "task",
        "weights",
        "format",
        "limit_context_len",
        "n",
        "prompt",
        "prompts",
        "image",
        "mask_image",
        "blank_tokens",
        "table",
    ),
    *("data", "strength", "condition_time", "autoencoder", "size", "guide", "seed", "batch", "compile"),
)
"""Flags that are fields of a request as they are."""

NEEDS = {
    "grid_shift": ("grid", ("shifted",)),
    "threshold": ("order", ("threshold",)),
    "remask_strength": ("remask", ("cap", "conf", "loop")),
}
"""Flags that mean something only beside certain values of another."""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "sample",
        "draw pictures, captions, both, or rows of a table from a checkpoint",
        "Draw samples and write them to a folder: pictures, captions (JSON lines) and one contact sheet. The same seed gives\n"
        "the same sample whatever the batch size and the number of processes. After a stop the same command continues.",
        EXAMPLES,
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--checkpoint",
        metavar="RUN|EXPORT|hf:ORG/NAME",
        required=True,
        help="a run's or an export's folder, or a Hugging Face repository",
    )
    what.add_argument("--out", metavar="DIR", required=True, help="where samples are written")
    add_flags(parser, what, needs_task=True)
    parser.set_defaults(run=run)


def add_flags(parser: argparse.ArgumentParser, what: Any, *, needs_task: bool) -> None:
    """The flags that say what is drawn and how; `what` is the group of those about the first."""
    _add_what(what, needs_task)
    _add_condition(parser.add_argument_group("condition"))
    how = parser.add_argument_group("how")
    how.add_argument("--preset", metavar="NAME", help="the paper's recipes: paper-t2i, paper-joint; other flags win over it")
    for name, field in Sampling.model_fields.items():
        _add_field(how, name, field)
    how.add_argument(
        "--guide", metavar="RUN|EXPORT", help="a weaker network, such as an earlier checkpoint, for --autoguidance"
    )
    how.add_argument("--seed", metavar="K", type=int, default=0, help="the same seed gives the same samples (default: 0)")
    how.add_argument(
        "--batch", metavar="B", type=positive, default=32, help="samples drawn at once; no effect on them (default: 32)"
    )
    how.add_argument(
        "--compile",
        action="store_true",
        help="compile the network first (torch.compile, on a GPU CUDA graphs); takes minutes at its first use",
    )
    how.add_argument("--processes", metavar="N", type=positive, default=1, help="processes on this machine (default: 1)")


def _add_field(group: Any, name: str, field: FieldInfo) -> None:
    """A flag that sets a field of `Sampling`; the schema says whether its value can be."""
    text, default = field.description or "", field.default
    how: dict[str, Any] = {"metavar": {int: "N", float: "X"}.get(type(default), "NAME"), "type": type(default)}
    if get_origin(field.annotation) is Literal:
        text = f"{', '.join(get_args(field.annotation))}. {text}"
    elif isinstance(default, tuple):
        how = {"metavar": ("A", "B"), "type": type(default[0]), "nargs": len(default)}
        default = " ".join(f"{value:g}" for value in default)
    if name == "resample":
        default = f"{default}, for inpaint {INPAINT_RESAMPLE}"
    text = f"{text[:1].lower()}{text[1:]}".removesuffix(".").replace("%", "%%")
    group.add_argument(f"--{name.replace('_', '-')}", **how, help=f"{text} (default: {default})")


def _add_what(group: Any, needs_task: bool) -> None:
    group.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or plain weights (default: ema)")
    group.add_argument(
        "--task",
        metavar="TASK",
        required=needs_task,
        help="GIVEN-to-WANTED, such as text-to-image or image-to-text; joint; inpaint; or impute (a table's empty cells)",
    )
    group.add_argument(
        "--format",
        choices=("folder", "tar"),
        default="folder",
        help="loose files, or tar shards with a manifest (default: folder)",
    )
    group.add_argument(
        "--limit-context-len", metavar="L", type=positive, help="at most L tokens of every caption, given or generated"
    )
    group.add_argument("-n", metavar="N", type=positive, help="samples per prompt or picture; in all for joint and --data")


def _add_condition(group: Any) -> None:
    group.add_argument(
        "--prompt",
        "--text",
        metavar="TEXT",
        action="append",
        default=[],
        help="a caption; repeat for more; inpaint: with ___ in it",
    )
    group.add_argument("--prompts", metavar="FILE.json", help='a list of captions, {"id": "caption"}, or {"text": [...]}')
    group.add_argument("--image", metavar="FILE", action="append", default=[], help="a picture; repeat for more")
    group.add_argument("--mask-image", metavar="FILE", help="inpaint: white is to be filled in")
    group.add_argument("--blank-tokens", metavar="N", type=positive, help="inpaint: tokens that a ___ takes (default: 2)")
    group.add_argument("--table", metavar="FILE.csv", help="impute: rows with empty cells")
    group.add_argument("--data", metavar="MANIFEST", help="take the conditions from this data set")
    group.add_argument(
        "--strength", metavar="T", type=float, help="start from the picture or text noised to time T: variations"
    )
    group.add_argument(
        "--condition-time", metavar="T", type=float, help="time to which conditions are noised (default: 0, clean)"
    )
    group.add_argument(
        "--repeat-prompt", action="store_true", default=None, help="give a caption ten times over, where it fits (the paper)"
    )
    group.add_argument("--autoencoder", metavar="FOLDER", help="a diffusers AutoencoderKL, for a model of latents")
    group.add_argument("--size", metavar="HxW", help="size of pictures in pixels, such as 512x768 (default: the model's)")


def run(arguments: argparse.Namespace) -> int:
    fields = request_fields(arguments)
    if arguments.processes > 1 and "RANK" not in os.environ:
        return several(arguments.processes, sys.argv[1:])
    from megadiff.generation.generate import generate
    from megadiff.generation.request import GenerateRequest

    with enough_memory("--size or --batch"):
        records = generate(GenerateRequest(checkpoint=arguments.checkpoint, out=arguments.out, **fields))
    print(f"samples: {records}")
    return 0


def request_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a GenerateRequest that `add_flags` has flags for.

    Raises:
        UserError: a flag is out of its range, or some do not go together.
    """
    check(arguments)
    sampling, repeat_prompt = how_to_sample(arguments)
    flags = {name: value for name in REQUEST_FLAGS if (value := getattr(arguments, name)) is not None}
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
    return {**fields, "sampling": sampling, "repeat_prompt": repeat_prompt}


def how_to_sample(arguments: argparse.Namespace) -> tuple[Sampling, bool]:
    """The preset's fields under the flags', and whether prompts are repeated.

    Raises:
        UserError: a value is out of its range.
    """
    if arguments.preset is not None and arguments.preset not in PRESETS:
        raise UserError(f"--preset {arguments.preset} is unknown; known: {', '.join(PRESETS)}")
    fields: dict[str, Any] = {"resample": INPAINT_RESAMPLE} if arguments.task == "inpaint" else {}
    fields |= PRESETS.get(arguments.preset, {})
    names = [*Sampling.model_fields, "repeat_prompt"]
    fields |= {name: value for name in names if (value := getattr(arguments, name)) is not None}
    repeat_prompt = bool(fields.pop("repeat_prompt", False))
    try:
        sampling = Sampling(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        named = [f"--{str(part).replace('_', '-')} {getattr(arguments, str(part), '')}: " for part in fault["loc"][:1]]
        raise UserError("".join(named) + fault["msg"].removeprefix("Value error, ")) from None
    for name, (partner, values) in NEEDS.items():
        if getattr(arguments, name) is not None and getattr(sampling, partner) not in values:
            choices = " or ".join(values)
            raise UserError(f"--{name.replace('_', '-')} goes with --{partner} {choices}, and has no effect without")
    if sampling.guidance == 1 and (arguments.guidance_interval or arguments.guidance_final_time is not None):
        raise UserError("--guidance-interval and --guidance-final-time go with a --guidance other than 1")
    return sampling, repeat_prompt


def check(arguments: argparse.Namespace) -> None:
    """Flags that do not go together.

    Raises:
        UserError: naming them, before anything is loaded.
    """
    task = arguments.task
    sources = ("--prompt", "--prompts", "--image", "--data", "--table")
    conditions = [flag for flag in sources if getattr(arguments, flag[2:])]
    single = ("joint", "inpaint", "impute")
    if task not in single and not all(task.partition("-to-")):
        raise UserError(
            f"--task {task}: write GIVEN-to-WANTED, such as text-to-image or image-to-text, joint, inpaint or impute"
        )
    if arguments.prompt and arguments.prompts:
        raise UserError("--prompt and --prompts exclude each other; give one")
    if arguments.data and len(conditions) > 1:
        raise UserError(f"{' and '.join(conditions)} exclude each other; give one")
    if task == "joint" and conditions and arguments.strength is None:
        raise UserError(
            f"--task joint makes everything from nothing; leave out {' and '.join(conditions)}, "
            "or vary what they give by --strength"
        )
    if task not in single and not conditions:
        raise UserError(f"--task {task} needs a condition: --prompt TEXT, --prompts FILE.json, --image FILE or --data MANIFEST")
    if (task == "impute") != bool(arguments.table):
        raise UserError("--task impute and --table FILE.csv go together")
    if arguments.mask_image and not (task == "inpaint" and len(arguments.image) == 1):
        raise UserError("--mask-image goes with --task inpaint and one --image")
    if task == "inpaint" and (len(arguments.prompt) > 1 or len(arguments.image) > 1 or arguments.prompts or arguments.data):
        raise UserError("--task inpaint takes one --image, one --text, or both")
    if task in ("inpaint", "impute") and arguments.strength is not None:
        raise UserError(f"--strength starts from a whole picture or text, which --task {task} does not; leave it out")
    useless = {
        "blank_tokens": task != "inpaint",
        "resample": task != "inpaint",
        "condition_time": task == "joint",
        "limit_context_len": task in ("inpaint", "impute"),
        "repeat_prompt": task in single,
    }
    for name, idle in useless.items():
        if idle and getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect on --task {task}; leave it out")
    if bool(arguments.guide) != (arguments.autoguidance not in (None, 1.0)):
        raise UserError("--guide RUN and --autoguidance V go together")
    for flag in ("strength", "condition_time"):
        value = getattr(arguments, flag)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{flag.replace('_', '-')} {value:g} must lie between 0 and 1")
    if not 0 <= arguments.seed < 2**62:
        raise UserError(f"--seed {arguments.seed} must be a whole number from 0 to 2^62 - 1")
