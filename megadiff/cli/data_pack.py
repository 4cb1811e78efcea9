"""`megadiff data pack`: parse, open the source, hand over."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import TYPE_CHECKING

from megadiff.cli.arguments import Verbs, add_verb, positive
from megadiff.cli.data_encode import add_encoding, encoding_of
from megadiff.config.errors import UserError
from megadiff.launcher.children import several

if TYPE_CHECKING:
    from megadiff.data.buckets import Buckets
    from megadiff.data.shards.shard import Manifest

EXAMPLES = """\
  megadiff data pack photos data/photos --size 512 --held-out-share 0.01
  megadiff data pack "s3://bucket/laion/{00000..00127}.tar" s3://bucket/packed --bucket-area 512 --processes 8
  megadiff data pack train-*.parquet data/pairs --image-column image --caption-column text
  megadiff data pack sa1b.txt data/sam --captions sam_llava.parquet --size 512 --processes 4
  megadiff data pack Diffuse-Everything/datasets data/sam
"""


def add(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "pack",
        "pictures with captions as tar shards: a folder, tables, WebDataset tars, SA-1B with LLaVA's captions",
        "Write pictures with captions as tar shards with a manifest. A sample without a caption or a readable picture is left\n"
        "out, counted, and named in OUT/left_out.jsonl. After a stop the same command continues.",
        EXAMPLES,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="a folder of pictures with .txt or .json beside them; Parquet or JSONL files; tars or a folder of them; a list of "
        "lines name.tar<TAB>URL; or a folder that the paper's scripts have encoded (images/, tokens/, all_indexes.npy)",
    )
    parser.add_argument("out", metavar="OUT", help="a folder, or an s3:// address")
    parser.add_argument(
        "--kind",
        choices=("auto", "folder", "table", "tars", "sam-llava", "paper"),
        default="auto",
        help="kind of SOURCE (default: auto); paper: encoded by the paper's scripts",
    )
    parser.add_argument("--captions", metavar="TABLE", help="sam-llava: JSON, JSONL or Parquet of pictures' names and captions")
    parser.add_argument(
        "--image-column", metavar="NAME", help="column of a table (default: image, image_path, path, url, jpg, png)"
    )
    parser.add_argument("--caption-column", metavar="NAME", help="column of a table (default: captions, caption, text, txt)")
    _add_pictures(parser.add_argument_group("pictures"))
    shards = parser.add_argument_group("shards")
    shards.add_argument(
        "--shard-samples", metavar="N", type=positive, default=1000, help="samples per tar shard (default: 1000)"
    )
    shards.add_argument(
        "--buckets", metavar="HxW,...", help="a shard holds pictures of one of these sizes' shapes, such as 512x512,448x576"
    )
    shards.add_argument("--bucket-area", metavar="PX", type=positive, help="buckets of about PX x PX pixels, of many shapes")
    shards.add_argument("--bucket-step", metavar="PX", type=positive, help="step of the buckets' edges (default: 64)")
    shards.add_argument("--bucket-ratio", metavar="R", type=float, help="largest ratio of the buckets' edges (default: 2)")
    shards.add_argument(
        "--held-out-share", metavar="S", type=_share, default=0.0, help="writes OUT/train and OUT/held_out (default: 0)"
    )
    shards.add_argument("--processes", metavar="N", type=positive, default=1, help="processes on this machine (default: 1)")
    shards.add_argument("--scratch", metavar="DIR", help="folder of downloads that are not used yet (default: in OUT, or /tmp)")
    add_encoding(parser)
    parser.set_defaults(run=run)


def _add_pictures(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--size", metavar="PX", type=positive, help="scale the shorter edge down to it (default: bytes are kept untouched)"
    )
    group.add_argument("--min-size", metavar="PX", type=positive, help="leave out pictures with a shorter edge")
    group.add_argument(
        "--format", choices=("jpg", "webp", "png"), default=None, help="format of pictures that --size scales (default: jpg)"
    )
    group.add_argument("--quality", metavar="Q", type=positive, help="quality of jpg and webp, 1 to 100 (default: 95)")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number from 0 to below 1, such as 0.01")
    return share


def run(arguments: argparse.Namespace) -> int:
    buckets = check(arguments)
    if arguments.processes > 1 and "RANK" not in os.environ:
        return several(arguments.processes, sys.argv[1:])
    from megadiff.data.packing import build, pack
    from megadiff.distributed.ranks import Ranks

    packing = pack.Packing(
        shard_samples=arguments.shard_samples,
        buckets=buckets,
        size_px=arguments.size,
        format=arguments.format or "jpg",
        quality=arguments.quality or 95,
        min_size_px=arguments.min_size or 1,
        held_out_share=arguments.held_out_share,
    )
    ranks = Ranks.from_environment()
    scratch = pack.scratch_of(arguments.out, arguments.scratch)
    source = build.open_source(
        arguments.kind,
        arguments.source,
        pack.unit_samples(packing),
        scratch,
        columns=build.Columns(arguments.image_column, arguments.caption_column),
        captions=arguments.captions,
    )
    encoder = None
    if arguments.autoencoder or arguments.tokenizer or arguments.features:
        from megadiff.data.packing.encoding import Encoder

        encoder = Encoder(encoding_of(arguments))
    manifest = pack.pack(
        source,
        arguments.out,
        packing,
        transform=encoder,
        identity=encoder.identity if encoder else None,
        facts=encoder.facts if encoder else None,
        rank=ranks.rank,
        world=ranks.world,
    )
    if manifest is not None:
        shutil.rmtree(scratch, ignore_errors=True)  # All units are done.
        print(summary(arguments.out, manifest))
    return 0


def check(arguments: argparse.Namespace) -> Buckets | None:
    """The buckets that the flags name.

    Raises:
        UserError: flags that do not go together, or have no effect.
    """
    from megadiff.data.buckets import Bucket, Buckets, area_buckets

    if arguments.size is None and (arguments.format or arguments.quality):
        raise UserError("--format and --quality are of pictures that --size scales down; give --size PX, or leave them out")
    if arguments.quality and arguments.quality > 100:
        raise UserError(f"--quality {arguments.quality} must lie between 1 and 100")
    if arguments.buckets and arguments.bucket_area:
        raise UserError("--buckets and --bucket-area exclude each other; give one")
    if arguments.bucket_area is None and (arguments.bucket_step or arguments.bucket_ratio):
        raise UserError("--bucket-step and --bucket-ratio go with --bucket-area PX")
    if arguments.buckets:
        return Buckets([Bucket.parse(text) for text in arguments.buckets.split(",")])
    if arguments.bucket_area:
        return area_buckets(arguments.bucket_area, arguments.bucket_step or 64, arguments.bucket_ratio or 2.0)
    return None


def summary(out: str, manifest: Manifest) -> str:
    """One line about the samples written and left out."""
    from megadiff.data.packing import pack
    from megadiff.data.packing.claims import HELD_OUT
    from megadiff.storage import addresses

    held_out = sum(entry.samples for entry in manifest.shards if entry.name.startswith(f"{HELD_OUT}/"))
    split = f", {held_out:,} of them held out" if any("/" in entry.name for entry in manifest.shards) else ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in pack.left_out(manifest).items())
    left = f"; left out: {reasons}, see left_out.jsonl" if reasons else ""
    return f"packed: {addresses.shown(out)} ({manifest.samples:,} samples in {len(manifest.shards):,} shards{split}{left})"
