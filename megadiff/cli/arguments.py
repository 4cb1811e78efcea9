"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadiff.config.deepspeed import Tree, check, load_deepspeed
from megadiff.config.errors import UserError
from megadiff.config.layouts import with_sizes
from megadiff.config.load import load_cluster, load_run
from megadiff.config.run_folder import RUN
from megadiff.config.schema import Cluster, Run

Verbs = Any
"""What argparse's add_subparsers returns (its class is private)."""
OF_CLUSTER = "cluster."
"""How an override of the cluster file starts."""


def add_verb(verbs: Verbs, name: str, summary: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """A verb's parser: a line for the list of verbs, a description and examples for its own help."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    return parser


def add_run(parser: argparse.ArgumentParser, *, overrides: bool = True, required: bool = True) -> None:
    """RUN.yaml and, after it, overrides."""
    parser.add_argument("run_file", metavar="RUN.yaml", nargs=None if required else "?", help="the run: model, data and stages")
    if overrides:
        parser.add_argument(
            "overrides",
            metavar="a.b=value",
            nargs="*",
            help="values that win over the file; stages by name (stages.joint.steps=100) or all at once (stages.*.steps=100)",
        )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Flags that win over the layout's sizes in the DeepSpeed JSON."""
    parser.add_argument(
        "--pipeline-stages",
        metavar="P",
        type=positive,
        help="cut the layers over P ranks (default: the JSON's pipeline.stages, or 1)",
    )
    parser.add_argument(
        "--tensor-parallel",
        metavar="T",
        type=positive,
        help="cut every layer over T ranks (default: the JSON's tensor_model_parallel_size, or 1)",
    )


def deepspeed_tree(arguments: argparse.Namespace) -> Tree:
    """The DeepSpeed JSON of --deepspeed with the sizes of `add_sizes`.

    Raises:
        ConfigError: see load_deepspeed; or a size does not go with the JSON.
    """
    tree = with_sizes(load_deepspeed(arguments.deepspeed), arguments.pipeline_stages, arguments.tensor_parallel)
    check(tree)
    return tree


def cluster_of(arguments: argparse.Namespace, overrides: Sequence[str]) -> Cluster | None:
    """The file of --cluster; None without it."""
    if arguments.cluster is not None:
        return load_cluster(arguments.cluster, overrides)
    if overrides:
        arguments.parser.error(f"{OF_CLUSTER}{overrides[0]} goes with --cluster CLUSTER.yaml")
    return None


def sort_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the cluster file, without their prefix, and the others."""
    of_cluster = [text.removeprefix(OF_CLUSTER) for text in overrides if text.startswith(OF_CLUSTER)]
    return of_cluster, [text for text in overrides if not text.startswith(OF_CLUSTER)]


def launched_run(place: str) -> Run:
    """The run of a launched folder, given by that folder or by the run's YAML file.

    Raises:
        UserError: nothing was launched there; see load_run.
    """
    given = Path(place)
    run = load_run(given / RUN if given.is_dir() else given)
    if not run.paths.launched:
        raise UserError(f"nothing was launched in {run.folder}")
    return load_run(run.paths.run) if run.paths.run.exists() else run


def positive(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number {'above 0' if least else 'from 0 on'}")
    return int(text)
