"""`megadiff import-paper`: the released weights of "Diffuse Everything" as a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from megadiff.cli.arguments import Verbs, add_verb

_GO_ON = """\
To train on from them, write a run whose model is configs/model/paper.yaml and whose first stage has
  initialise: {source: OUT/released/checkpoints/step_00000000, weights: ema}
(and `new: [text]` if the weights have no text tower and the stage predicts text). Its data fields are those of OUT/run.yaml,
its data.train the manifest of your shards of latents and captions."""


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
    parser.add_argument("--use", choices=("ema", "raw"), default="ema", help="a snapshot's weights to take (default: ema)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from megadiff.interfaces import export, paper

    out = Path(arguments.out)
    with export.new_folder(out):
        predicted = paper.import_paper(
            arguments.weights, out, tokenizer=arguments.vocabulary, autoencoder=arguments.autoencoder, use=arguments.use
        )
    print(f"run: {out} (predicts {' and '.join(predicted)})")
    return 0
