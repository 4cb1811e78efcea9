"""`megadiff evaluate`: parse, tell a network from a folder of pictures, hand over."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megadiff.cli import sample
from megadiff.cli.arguments import Verbs, add_verb, positive
from megadiff.cli.errors import enough_memory
from megadiff.config.errors import UserError
from megadiff.config.run_folder import EXPORT, MANIFEST, RUN
from megadiff.config.schema import Sampling
from megadiff.launcher.children import several

EXAMPLES = """\
  megadiff evaluate samples/ --reference coco/val2014 --metrics fid --inception inception-2015-12-05.pt
  megadiff evaluate runs/quickstart --task text-to-image --data examples/emoji32/held_out --out eval \\
      --reference examples/emoji32/held_out --metrics fd,kd,density-coverage --features effnet-lite0 --processes 2
  megadiff evaluate exports/coco --task text-to-image --preset paper-t2i --prompts coco-captions.json --out eval \\
      --reference coco-statistics.npz --metrics fid --inception inception-2015-12-05.pt
  megadiff evaluate runs/quickstart --task all --reference examples/emoji32/held_out --out eval \\
      --metrics fd,captions,likelihood --features effnet-lite0
  megadiff evaluate eval/ --reference coco/val2014 --metrics fid --inception FILE --against earlier/results.json
"""

ALL = "all"
"""The value of --task that stands for each task of a network."""
CONDITIONS = (
    *("prompt", "prompts", "image", "mask_image", "blank_tokens", "table", "data", "strength", "condition_time"),
    "repeat_prompt",
)
"""Flags of conditions and of where samples start, which `--task all` has no room for."""
LIKELIHOOD = "likelihood"
"""The metric that needs a network, and no samples."""
DRAWING = (*sample.REQUEST_FLAGS, *Sampling.model_fields, "preset", "repeat_prompt")
"""Flags that only a network needs."""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "evaluate",
        "score a network's samples, or a folder of pictures, against a reference",
        "Score pictures. A network's samples are drawn first, as `megadiff sample` draws them, with its flags. Every number\n"
        "stands in results.json with all that it depends on. After a stop the same command goes on, to the same numbers.\n"
        f"--task {ALL} scores each task on the pairs of --reference, and writes a page of it.",
        EXAMPLES,
    )
    score = parser.add_argument_group("score")
    score.add_argument(
        "source", metavar="RUN|EXPORT|FOLDER", help="a network as for sample, or a folder of pictures or samples"
    )
    score.add_argument(
        "--metrics",
        metavar="A,B",
        required=True,
        help="fid, kid (Inception), cmmd (CLIP); with any features: fd, kd, precision-recall, density-coverage; of pairs by "
        "CLIP: clip-score, retrieval; captions (with --data); likelihood (NELBO and conditioning gap of held-out pairs)",
    )
    score.add_argument(
        "--reference", metavar="REF", help="a folder of pictures, a manifest of tar shards, or statistics.npz (mu and sigma)"
    )
    score.add_argument(
        "--features", metavar="NAME", default="inception", help="inception, clip, dinov2 or effnet-lite0 (default: inception)"
    )
    score.add_argument("--inception", metavar="FILE", help="inception-2015-12-05.pt")
    score.add_argument("--clip", metavar="FOLDER", help="a CLIPModel of transformers")
    score.add_argument("--dinov2", metavar="FOLDER", help="a Dinov2Model of transformers")
    score.add_argument(
        "--square", action="store_true", help="crop the reference's pictures to their middle square, as training does"
    )
    score.add_argument("--pairs", metavar="N", type=positive, help="likelihood: most held-out pairs (default: 1000)")
    score.add_argument("--save-statistics", metavar="FILE.npz", help="keep the reference's statistics for later calls")
    score.add_argument(
        "--against", metavar="RESULTS", action="append", default=[], help="compare with other results; repeat for more"
    )
    score.add_argument("--out", metavar="DIR", help="of samples and results.json (default for pictures: their folder)")
    what = parser.add_argument_group(f"what is drawn (networks only; --task {ALL}: for each task)")
    sample.add_flags(parser, what, needs_task=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    network = _is_network(arguments.source)
    metrics = tuple(arguments.metrics.split(","))
    drawn = network and metrics != (LIKELIHOOD,)
    if network and not ((arguments.task or not drawn) and arguments.out):
        raise UserError(f"{arguments.source} is a network: say with --task what it is to draw, and with --out DIR where to")
    if not network and LIKELIHOOD in metrics:
        raise UserError(f"{LIKELIHOOD} is of a network, and {arguments.source} is none (no {RUN}, checkpoint or export)")
    if arguments.pairs and LIKELIHOOD not in metrics:
        raise UserError(f"--pairs goes with --metrics {LIKELIHOOD}")
    given = [name for name in DRAWING if getattr(arguments, name) != arguments.parser.get_default(name)]
    if not drawn and (idle := [name for name in given if not (network and name in ("weights", "batch"))]):
        raise UserError(f"--{idle[0].replace('_', '-')} is for what a network draws, and here nothing is drawn")
    every_task = drawn and arguments.task == ALL
    if every_task:
        if conditions := [name for name in CONDITIONS if getattr(arguments, name)]:
            flag = conditions[0].replace("_", "-")
            raise UserError(f"--task {ALL} takes its pairs from --reference, and samples start from noise; leave out --{flag}")
        arguments.task = "joint"
    fields = sample.request_fields(arguments) if drawn else {}
    if arguments.processes > 1 and "RANK" not in os.environ:
        return several(arguments.processes, sys.argv[1:])
    from megadiff.evaluation.all_tasks import PAGE, evaluate_all
    from megadiff.evaluation.evaluate import EvaluateRequest, evaluate, report
    from megadiff.generation.request import GenerateRequest

    out = arguments.out or arguments.source
    samples = GenerateRequest(checkpoint=arguments.source, out=out, **fields) if drawn else None
    request = EvaluateRequest(
        source=arguments.source,
        metrics=metrics,
        out=out,
        reference=arguments.reference,
        features=arguments.features,
        weights={name: getattr(arguments, name) for name in ("inception", "clip", "dinov2")},
        square=arguments.square,
        save_statistics=arguments.save_statistics,
        samples=samples,
        weights_kind=arguments.weights,
        batch=arguments.batch,
        **({"pairs": arguments.pairs} if arguments.pairs else {}),
    )
    with enough_memory("--size or --batch"):
        found = evaluate_all(request) if every_task else {"": evaluate(request)}
    for folder, scored in found.items():
        if folder:
            print(f"{folder}:")
        print(report(scored, tuple(str(Path(other) / folder) for other in arguments.against)))
    if every_task and found:
        print(f"page: {Path(out) / PAGE}")
    return 0


def _is_network(source: str) -> bool:
    """Whether the address is a run's, a checkpoint's or an export's, and not one of pictures."""
    folder = Path(source)
    if source.startswith("hf:") or any((folder / name).exists() for name in (RUN, EXPORT)):
        return True
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format") == "megadiff-checkpoint")
    except (OSError, ValueError, AttributeError):
        return False
