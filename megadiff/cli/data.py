"""`megadiff data`: make data sets and index shards."""

from __future__ import annotations

import argparse
import sys

from megadiff.cli import data_encode, data_inspect, data_pack
from megadiff.cli.arguments import Verbs, add_verb, positive
from megadiff.config.errors import UserError

EMOJI_SETS = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji-3d")


def add(verbs: Verbs) -> None:
    parser = add_verb(verbs, "data", "make data sets and index shards", "Make data sets and index shards.")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_emoji(actions)
    _add_table(actions)
    data_pack.add(actions)
    data_encode.add(actions)
    _add_index(actions)
    data_inspect.add(actions)


def _add_table(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "table",
        "the rows of a CSV as tar shards, one modality a column",
        "Write the rows of a CSV as tar shards (train and held out) and columns.json, what a model must know of its columns,\n"
        "and print the sections of a run file that fit them.",
        "  megadiff data table people.csv data/people --classes postcode\n",
    )
    parser.add_argument("source", metavar="FILE.csv", help="a file or an address; its first line names the columns")
    parser.add_argument("out", metavar="OUT", help="a folder, or an s3:// address")
    parser.add_argument("--shard-rows", metavar="N", type=positive, default=5000, help="rows per tar shard (default: 5000)")
    parser.add_argument(
        "--held-out-share", metavar="SHARE", type=_share, default=0.1, help="share of held-out rows (default: 0.1)"
    )
    parser.add_argument(
        "--classes", metavar="A,B", type=_names, default=(), help="columns of categories that look like numbers"
    )
    parser.add_argument("--numbers", metavar="A,B", type=_names, default=(), help="columns that must be numbers")
    parser.add_argument(
        "--separator", metavar="NAME", type=_separator, help="separator of cells: comma, semicolon, tab, bar (default: comma)"
    )
    parser.set_defaults(run=make_table)
    parser = add_verb(
        actions,
        "diamonds",
        "a table to try: 53,940 diamonds, 7 columns of numbers and 3 of categories",
        "Fetch the diamonds of plotnine's wheel with pip and write them as `data table` does, for configs/run/diamonds.yaml.",
        "  megadiff data diamonds data/diamonds\n",
    )
    parser.add_argument("out", metavar="OUT", help="a folder, or an s3:// address")
    parser.set_defaults(run=make_diamonds)


def _add_emoji(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "emoji",
        "emoji pictures with captions as tar shards (npm packages with permissive licences)",
        "Fetch emoji art with `npm pack`, draw it at a size, caption it, and write tar shards, manifests (train and held out,\n"
        "split by base emoji) and a tokenizer. Deterministic; a second start continues the first.",
        "  megadiff data emoji --size 64 data/emoji64\n  megadiff data emoji --size 32 --sets noto s3://bucket/emoji32\n",
    )
    parser.add_argument("out", metavar="OUT", help="a folder, or an s3:// address")
    parser.add_argument("--size", metavar="PX", type=positive, default=64, help="edge of the pictures (default: 64)")
    parser.add_argument(
        "--sets", metavar="A,B", type=_sets, default=EMOJI_SETS, help=f"which sets (default: {','.join(EMOJI_SETS)})"
    )
    parser.add_argument(
        "--skin-tones",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="include variants in skin tones (default: yes)",
    )
    parser.add_argument("--shard-samples", metavar="N", type=positive, default=500, help="pairs per tar shard (default: 500)")
    parser.add_argument(
        "--held-out-share",
        metavar="SHARE",
        type=_share,
        default=0.08,
        help="share of the base emoji that is held out, with all their styles and variants (default: 0.08)",
    )
    parser.add_argument("--vocabulary", metavar="V", type=positive, default=2000, help="ids of the tokenizer (default: 2000)")
    parser.set_defaults(run=make_emoji)


def _add_index(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "index",
        "write the manifest of existing tar shards",
        "Read the tar shards of a folder (WebDataset: members of one sample share a name up to the first dot), count their\n"
        "samples, and write FOLDER/manifest.json, which a run's data.train names.",
        "  megadiff data index data/mine/train\n  megadiff data index s3://bucket/mine/train\n",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder, or an s3:// address")
    parser.set_defaults(run=index)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _separator(text: str) -> str:
    from megadiff.data.csv_text import SEPARATORS

    mark = SEPARATORS.get(text, "\t" if text == r"\t" else text)
    if mark not in SEPARATORS.values():
        raise argparse.ArgumentTypeError(f"{text!r} is no separator; known: {', '.join(SEPARATORS)}")
    return mark


def _sets(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in EMOJI_SETS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"unknown set {', '.join(unknown)}; known: {', '.join(EMOJI_SETS)}")
    return names


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number from 0 to below 1, such as 0.08")
    return share


def make_emoji(arguments: argparse.Namespace) -> int:
    from megadiff.data.recipes import emoji

    emoji.make_emoji(
        arguments.out,
        size=arguments.size,
        sets=arguments.sets,
        skin_tones=arguments.skin_tones,
        shard_samples=arguments.shard_samples,
        held_out_share=arguments.held_out_share,
        vocabulary=arguments.vocabulary,
    )
    return 0


def make_table(arguments: argparse.Namespace) -> int:
    import yaml

    from megadiff.data.recipes import table

    summary = table.make_table(
        arguments.source,
        arguments.out,
        shard_rows=arguments.shard_rows,
        held_out_share=arguments.held_out_share,
        classes=arguments.classes,
        numbers=arguments.numbers,
        separator=arguments.separator,
    )
    for note in summary.notes:
        print(f"note: {note}", file=sys.stderr)
    constant = [name for name, column in summary.columns.items() if len(column.values) == 1]
    note = f"; {', '.join(constant)} always the same" if constant else ""
    print(f"table: {arguments.out} ({summary.train:,} rows to train on, {summary.held_out:,} held out{note})\n")
    print(yaml.safe_dump(table.as_config(summary.columns, arguments.out), sort_keys=False, default_flow_style=None), end="")
    return 0


def make_diamonds(arguments: argparse.Namespace) -> int:
    from megadiff.data.recipes import table

    summary = table.make_diamonds(arguments.out)
    print(f"table: {arguments.out} ({summary.train:,} rows to train on, {summary.held_out:,} held out)")
    return 0


def index(arguments: argparse.Namespace) -> int:
    if not arguments.folder.removeprefix("file://").strip():
        raise UserError("the folder of the shards is empty; give a path or an address")
    from tqdm import tqdm

    from megadiff.data.shards import shard as shards
    from megadiff.storage import addresses

    with tqdm(desc="shards", unit="shard", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        manifest = shards.index_shards(arguments.folder, report)
    address = shards.write_manifest(arguments.folder, manifest)
    print(f"manifest: {addresses.shown(address)} ({len(manifest.shards):,} shards, {manifest.samples:,} samples)")
    return 0
