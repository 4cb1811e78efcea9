"""`megadiff import-paper`: the released weights of "Diffuse Everything" as a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from megadiff.cli.arguments import Verbs, add_verb

_GO_ON = """\
A snapshot that holds AdamW's moments is imported whole: plain and averaged weights, moments, step, and the optimizer's
settings. Name the manifest of your shards of latents and captions under data.train in OUT/run.yaml, look at the stage's steps,
batch and losses there, and `megadiff launch OUT/run.yaml --deepspeed DS.json` goes on where the snapshot ended.

To train on from the weights alone, write a run whose model is that of OUT/run.yaml and whose first stage has
  initialise: {source: OUT/released/checkpoints/step_N, weights: ema}
(and `new: [text]` if the weights have no text tower and the stage predicts text). Its data fields are those of OUT/run.yaml."""


def add(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "import-paper",
        "the paper's released weights as a run's folder",
        "Write the released weights of the paper (a Hugging Face folder or repository with config.json and model.safetensors,\n"
        "or a snapshot of its code) to a new run folder, which `megadiff sample --checkpoint` and `megadiff export` take.\n\n"
        + _GO_ON,
        "  megadiff import-paper hf:KevinRojas1499/diffuse-everything runs/paper --vocabulary bpe_simple_vocab_16e6.txt.gz \\\n"
        "      --autoencoder weights/sd-vae-ft-mse\n"
        "  megadiff sample --checkpoint runs/paper --task text-to-image --prompt 'a red apple' --out samples\n",
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="a Hugging Face folder, hf:ORG/NAME, or a snapshot (.pt)")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="CLIP's bpe_simple_vocab_16e6.txt.gz, a tokenizer.json, or a folder with vocab.json and merges.txt "
        "(default: that of an installed open_clip or clip)",
    )
    parser.add_argument(
        "--autoencoder",
        metavar="FOLDER",
        help="a local folder with the latents' autoencoder (stabilityai/sd-vae-ft-mse), to read and show pictures",
    )
    parser.add_argument(
        "--use",
        choices=("ema", "raw"),
        help="take these weights of a snapshot and nothing else (default: all that it holds, where it has AdamW's moments; "
        "else ema)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from megadiff.interfaces import paper
    from megadiff.weights.loading import checkpoint_of

    out = Path(arguments.out)
    predicted = paper.import_paper(
        arguments.weights, out, tokenizer=arguments.vocabulary, autoencoder=arguments.autoencoder, use=arguments.use
    )
    step = checkpoint_of(arguments.out).manifest.progress["optimizer_step"]
    goes_on = f"; training goes on at step {step:,}" if step else ""
    print(f"run: {out} (predicts {' and '.join(predicted)}{goes_on})")
    return 0
