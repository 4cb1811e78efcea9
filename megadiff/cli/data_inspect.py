"""`megadiff data verify`, `data stats` and `data show`: look into a data set."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megadiff.cli.arguments import Verbs, add_verb, positive
from megadiff.config.errors import UserError

if TYPE_CHECKING:
    from megadiff.data.inspection.stats import Stats
    from megadiff.data.inspection.verify import Fault

MOST_PRINTED = 20
"""Most faults of one kind that are printed."""
_MOST_NAMED = 5
"""Most resolutions, shapes and buckets that the table names."""


def add(actions: Verbs) -> None:
    _add_verify(actions)
    _add_stats(actions)
    _add_show(actions)


def _add_verify(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "verify",
        "compare shards with their manifest: missing, cut, corrupt, duplicated, incomplete",
        "Read every shard and print one line per fault: missing, truncated or of another size, corrupt (its hash differs, no\n"
        "whole tar), another number of samples, duplicates (a name, a hash, a key in two shards), tars that are not listed,\n"
        "samples without a member that most others have. Exit code 0 if there is none, 1 if there are some.",
        "  megadiff data verify data/pairs\n  megadiff data verify --quick s3://bucket/pairs\n"
        "  megadiff data verify --decode --json faults.json data/pairs/manifest.json\n",
    )
    _add_shards(parser)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="names and sizes alone; no shard is read")
    depth.add_argument("--decode", action="store_true", help="also open every picture, array, json and txt")
    parser.add_argument(
        "--workers", metavar="N", type=positive, default=8, help="shards checked at once, each whole in memory (default: 8)"
    )
    parser.add_argument("--json", metavar="FILE", help=f"write all faults; at most {MOST_PRINTED} of each kind are printed")
    parser.set_defaults(run=verify)


def _add_stats(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "stats",
        "count what a data set holds: resolutions, aspect ratios, caption lengths, buckets",
        "Read some shards, print a table of what they hold, and write it as OUT/stats.json and OUT/stats.png.",
        "  megadiff data stats data/pairs --tokenizer data/pairs/tokenizer.json --lanes 64\n"
        "  megadiff data stats --samples 0 s3://bucket/pairs --out stats\n",
    )
    _add_shards(parser)
    parser.add_argument(
        "--samples",
        metavar="N",
        type=_count,
        default=10_000,
        help="least number to read, in whole shards; 0: all (default: 10000)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json: counts captions' tokens (else those of tokens.npy)"
    )
    parser.add_argument("--lanes", metavar="L", type=positive, help="a run's data.lanes: how many samples an epoch leaves over")
    parser.add_argument(
        "--out", metavar="OUT", default="data-stats", help="a folder, or an s3:// address (default: data-stats)"
    )
    parser.set_defaults(run=stats)


def _add_show(actions: Verbs) -> None:
    parser = add_verb(
        actions,
        "show",
        "a sheet of samples drawn at random, with their captions",
        "Draw samples at random, the same for the same seed, and write them as one picture: each with its first caption and\n"
        "its key; or show those that are named. Latents show as pictures with an autoencoder, else as their first three\n"
        "channels.",
        "  megadiff data show data/pairs --out sheet.png\n"
        "  megadiff data show data/pairs --samples train-000003.tar/00001234 train-000003.tar/00001240\n"
        "  megadiff data show s3://bucket/latents --autoencoder models/sd-vae --tokenizer tokenizer.json --out sheet.png\n",
    )
    _add_shards(parser)
    parser.add_argument(
        "--samples", metavar="SHARD/KEY", nargs="+", help="these, as a run's logs and incidents name them, and none at random"
    )
    parser.add_argument("--count", metavar="N", type=positive, default=32, help="samples (default: 32)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="(default: 0)")
    parser.add_argument("--autoencoder", metavar="FOLDER", help="a diffusers AutoencoderKL: decodes latents.npy")
    parser.add_argument(
        "--scale",
        metavar="S",
        type=_factor,
        help="what latents were multiplied by when stored; `data encode` does not (default: 1)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json: spells tokens.npy out")
    parser.add_argument("--columns", metavar="N", type=positive, default=8, help="columns of the sheet (default: 8)")
    parser.add_argument("--out", metavar="SHEET.png", default="sheet.png", help="a file, or an address (default: sheet.png)")
    parser.set_defaults(run=show)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="a manifest or the folder it lies in, or an address (s3://...)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm

    with tqdm(desc=name, unit="shard", disable=None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


# ---------------------------------------------------------------------------------------------------------------- verify


def verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megadiff.data.inspection import verify as verification
    from megadiff.storage import addresses, store

    printed: Counter[str] = Counter()

    def report(fault: Fault) -> None:
        printed[fault.kind] += 1
        if printed[fault.kind] <= MOST_PRINTED:
            tqdm.write(str(fault))

    with _bar("shards") as progress:
        result = verification.verify(
            arguments.shards,
            quick=arguments.quick,
            decode=arguments.decode,
            workers=arguments.workers,
            keep=None if arguments.json else MOST_PRINTED,
            report=report,
            progress=progress,
        )
    for kind, count in result.counts.items():
        if count > MOST_PRINTED:
            print(f"{kind}: and {count - MOST_PRINTED:,} more" + ("" if arguments.json else "; --json FILE writes all"))
    if result.note:
        print(f"note: {result.note}")
    if arguments.json:
        tree = {
            "address": addresses.shown(result.address),
            "shards": result.shards,
            "samples": result.samples,
            "bytes": result.bytes,
            "quick": arguments.quick,
            "decode": arguments.decode,
            "note": result.note,
            "counts": result.counts,
            "faults": [vars(fault) for fault in result.faults],
        }
        store.write_bytes(arguments.json, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())
    listed = f"{result.shards:,} shards, {result.samples:,} samples, {_size(result.bytes)}"
    depth = "names and sizes" if arguments.quick else "every member" if arguments.decode else "every shard"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.counts.items())
    number = sum(result.counts.values())
    verdict = f"{number:,} fault{'s' if number > 1 else ''}: {kinds}" if kinds else "whole"
    print(f"verified: {addresses.shown(arguments.shards)} ({listed}; {depth}): {verdict}")
    return 0 if result.whole else 1


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


# ----------------------------------------------------------------------------------------------------------------- stats


def stats(arguments: argparse.Namespace) -> int:
    from megadiff.data.codecs.captions import load_tokenizer
    from megadiff.data.inspection import stats as counting
    from megadiff.data.inspection.pictures import stats_picture
    from megadiff.report.sheet import png_bytes
    from megadiff.storage import addresses, store

    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    with _bar("shards") as progress:
        numbers = counting.measure(
            arguments.shards, samples=arguments.samples, tokenizer=tokenizer, lanes=arguments.lanes, progress=progress
        )
    print("\n".join(f"{name.ljust(12)}  {text}".rstrip() for name, text in table(numbers)))
    tree = json.dumps(numbers.as_tree(), indent=1, ensure_ascii=False) + "\n"
    store.write_bytes(addresses.join(arguments.out, "stats.json"), tree.encode())
    store.write_bytes(addresses.join(arguments.out, "stats.png"), png_bytes(stats_picture(numbers)))
    print(f"\nstats: {addresses.join(arguments.out, 'stats.json')} and stats.png")
    return 0


def table(stats: Stats) -> Iterator[tuple[str, str]]:
    """(label, text) of every line that the data set has something for."""
    from megadiff.data.inspection.stats import QUANTILES, aspect_ratios, lengths_of, spread
    from megadiff.storage import addresses

    seen = stats.seen
    yield "data set", addresses.shown(stats.address)
    each = _size(stats.bytes / stats.samples)
    yield "samples", f"{stats.samples:,} in {stats.shards:,} shards, {_size(stats.bytes)}, {each} a sample"
    if seen.samples < stats.samples:
        yield "read", f"{seen.samples:,} samples of {stats.read_shards:,} shards, which is all that follows"
    yield "members", ", ".join(_share(ending, count, seen.samples) for ending, count in seen.members.most_common())
    if seen.unreadable:
        endings = ", ".join(f"{count:,} {what}" for what, count in seen.unreadable.most_common())
        yield "unreadable", f"{endings}; `megadiff data verify --decode` names them"
    if seen.resolutions:
        yield "pictures", _first({f"{h}x{w}": n for (h, w), n in seen.resolutions.items()}) + " (height x width)"
        ratios = spread(aspect_ratios(seen.resolutions))
        yield "aspect ratio", f"{ratios['least']:g} to {ratios['most']:g}, median {ratios['median']:g} (width / height)"
    for name in sorted({name for name, _ in seen.arrays}):
        yield name, _first({shape: count for (of, shape), count in seen.arrays.items() if of == name})
    if any(seen.captions):
        numbers = spread(seen.captions)
        yield "captions", f"{numbers['least']:g} to {numbers['most']:g} a sample, {numbers['mean']:g} in the mean"
        heads = [*QUANTILES, "mean"]
        lengths = {unit: spread(counts) for unit, counts in lengths_of(seen).items()}
        cells = {unit: [f"{numbers[head]:,g}" for head in heads] for unit, numbers in lengths.items()}
        widths = [max(len(head), *(len(row[place]) for row in cells.values())) for place, head in enumerate(heads)]
        yield "", "  ".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))
        for unit, row in cells.items():
            yield f"  {unit}", "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    if stats.buckets:
        yield "buckets", _first(stats.buckets) + " (of all shards)"
    if stats.left_over is not None:
        yield "epoch", f"with {stats.lanes:,} lanes it leaves {stats.left_over:,} samples over, others each time"


def _share(name: str, count: int, total: int) -> str:
    return f"{name} in all" if count == total else f"{name} in {count:,} ({100 * count / total:.3g} %)"


def _first(counts: Mapping[str, int]) -> str:
    """The most frequent ones, and the number of others."""
    ordered = Counter(counts).most_common()
    named = ", ".join(f"{name}: {count:,}" for name, count in ordered[:_MOST_NAMED])
    rest = ordered[_MOST_NAMED:]
    return named + (f", {len(rest):,} others: {sum(count for _, count in rest):,}" if rest else "")


# ------------------------------------------------------------------------------------------------------------------ show


def show(arguments: argparse.Namespace) -> int:
    if not arguments.out.lower().endswith(".png"):
        raise UserError(f"--out {arguments.out} must end with .png")
    if arguments.scale is not None and arguments.autoencoder is None:
        raise UserError("--scale goes with --autoencoder FOLDER")
    from megadiff.data.codecs.base import LATENTS, TOKENS
    from megadiff.data.codecs.captions import load_tokenizer
    from megadiff.data.inspection import pictures
    from megadiff.data.inspection.show import draw_samples, find_samples
    from megadiff.data.shards.shard import read_manifest
    from megadiff.report.sheet import SheetSection, contact_sheet, png_bytes
    from megadiff.storage import addresses, store

    manifest = read_manifest(arguments.shards)
    if arguments.tokenizer:
        _check_tokenizer(arguments.tokenizer, manifest.facts)
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    decode = pictures.decoder(arguments.autoencoder, arguments.scale or 1.0) if arguments.autoencoder else None
    if arguments.samples:
        samples, which = find_samples(arguments.shards, manifest, arguments.samples), "as named"
    else:
        samples = draw_samples(arguments.shards, manifest, arguments.count, arguments.seed)
        which = f"seed {arguments.seed}"
    for flag, ending in (("autoencoder", LATENTS), ("tokenizer", TOKENS)):
        if getattr(arguments, flag) and pictures.missing_members(samples, ending):
            raise UserError(f"--{flag} has no effect: no sample that was drawn has a {ending} member")
    cells = [pictures.sample_cell(sample, decode, tokenizer) for sample in samples]
    title = f"{addresses.shown(arguments.shards)}: {len(samples):,} of {manifest.samples:,} samples, {which}"
    sheet = contact_sheet(
        [SheetSection(title, cells)], columns=arguments.columns, cell_px=168, gap_px=16, text_px=13, caption_lines=4
    )
    store.write_bytes(arguments.out, png_bytes(sheet))
    print(f"sheet: {addresses.shown(arguments.out)} ({len(samples):,} of {manifest.samples:,} samples)")
    return 0


def _check_tokenizer(address: str, facts: Mapping[str, Any]) -> None:
    """Raises UserError if the tokens were made by another tokenizer."""
    from megadiff.data.codecs.base import TOKENS
    from megadiff.storage import store

    digest = facts.get("encoded", {}).get(TOKENS, {}).get("tokenizer")
    if digest and store.exists(address) and hashlib.sha256(store.read_bytes(address)).hexdigest() != digest:
        raise UserError(f"--tokenizer {address} is not the one that made the tokens")
