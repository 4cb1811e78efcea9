"""`megadiff data encode`: shards of pictures and captions to shards of latents and token ids."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from megadiff.cli.arguments import Verbs, add_verb, positive
from megadiff.cli.errors import enough_memory
from megadiff.launcher.children import several

if TYPE_CHECKING:
    from megadiff.data.packing.encoding import Encoding

EXAMPLES = """\
  megadiff data encode data/pairs data/latents --autoencoder models/sd-vae --tokenizer models/clip/tokenizer.json \\
      --cleaning clip --size 256
  megadiff launch -- data encode s3://bucket/pairs s3://bucket/latents --autoencoder models/sd-vae --size 256
  srun --ntasks-per-node=8 --gpus-per-task=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS \\
      megadiff data encode s3://bucket/pairs s3://bucket/latents --autoencoder models/sd-vae'
"""


def add(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "encode",
        "pictures to an autoencoder's latents, captions to token ids, once",
        "Write a shard for each shard of a manifest: latents.npy (mean and deviation, from which training draws), tokens.npy\n"
        "(ids of every caption) and features.npy. After a stop the same command continues, on any number of processes\n"
        "and machines; each shard is made once.",
        EXAMPLES,
    )
    parser.add_argument("source", metavar="SHARDS", help="a folder with manifest.json, or an address")
    parser.add_argument("out", metavar="OUT", help="a folder, or an s3:// address")
    parser.add_argument("--size", metavar="PX", type=positive, help="edge of the pictures, for shards without buckets")
    parser.add_argument("--keep", metavar="A,B", default="", help="members that are copied as they are, such as json")
    parser.add_argument("--processes", metavar="N", type=positive, default=1, help="processes on this machine (default: 1)")
    add_encoding(parser)
    parser.set_defaults(run=run)


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """The flags of encoding, which `data pack` has as well."""
    group = parser.add_argument_group("encoding")
    group.add_argument("--autoencoder", metavar="FOLDER", help="a diffusers AutoencoderKL, such as stabilityai/sd-vae-ft-mse")
    group.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json")
    group.add_argument("--cleaning", choices=("plain", "clip"), default="plain", help="cleaning of captions (default: plain)")
    group.add_argument("--caption-member", metavar="ENDING", default="json", help="member with the captions (default: json)")
    group.add_argument("--features", metavar="FOLDER", help="a transformers vision model (DINOv2): features for alignment")
    group.add_argument("--feature-stride", metavar="PX", type=positive, default=16, help="pixels per feature (default: 16)")
    group.add_argument("--batch", metavar="B", type=positive, default=32, help="pictures encoded at once (default: 32)")
    group.add_argument("--decode-threads", metavar="N", type=positive, default=4, help="threads that decode (default: 4)")
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the networks (default: fp32)"
    )


def encoding_of(arguments: argparse.Namespace) -> Encoding:
    from megadiff.data.packing.encoding import Encoding

    return Encoding(
        autoencoder=arguments.autoencoder,
        tokenizer=arguments.tokenizer,
        cleaning=arguments.cleaning,
        captions=arguments.caption_member,
        size=arguments.size,
        features=arguments.features,
        feature_stride=arguments.feature_stride,
        keep=tuple(ending.strip() for ending in getattr(arguments, "keep", "").split(",") if ending.strip()),
        batch=arguments.batch,
        threads=arguments.decode_threads,
        precision=arguments.precision,
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.processes > 1 and "RANK" not in os.environ:
        return several(arguments.processes, sys.argv[1:])
    from megadiff.data.packing.encoding import encode_shards
    from megadiff.distributed.ranks import Ranks
    from megadiff.storage import addresses

    ranks = Ranks.from_environment()
    with enough_memory("--size or --batch"):
        manifest = encode_shards(arguments.source, arguments.out, encoding_of(arguments), rank=ranks.rank, world=ranks.world)
    if manifest is not None:
        left = manifest.facts.get("counts", {}).get("left out", 0)
        note = f"; {left:,} left out, see left_out.jsonl" if left else ""
        numbers = f"{manifest.samples:,} samples in {len(manifest.shards):,} shards"
        print(f"encoded: {addresses.shown(arguments.out)} ({numbers}{note})")
    return 0
