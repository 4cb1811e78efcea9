"""Pictures of a data set: a sheet of its samples, and its numbers drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from megadiff.config.errors import UserError
from megadiff.config.schema import GridSpace, PixelField
from megadiff.data.buckets import Bucket
from megadiff.data.codecs.base import LATENTS, Array, array_of
from megadiff.data.codecs.latents import load_autoencoder
from megadiff.data.codecs.pictures import PixelCodec
from megadiff.data.errors import SampleError
from megadiff.data.inspection.show import ShownSample, load_picture, picture_member, row_of, texts_of, tokens_of
from megadiff.data.inspection.stats import Stats, aspect_ratios, lengths_of
from megadiff.data.pictures import flat, plain
from megadiff.report.sheet import Cell

Decode = Callable[[Array], Image.Image]
"""Latents [C, H, W] to a picture."""

COLOUR, ACCENT = "#2563eb", "#dc2626"
_MOST_BUCKETS = 40
_MOST_POINTS = 3000
"""Most resolutions that are drawn; the most frequent ones."""


def decoder(folder: str, scale: float = 1.0) -> Decode:
    """Latents that were stored times `scale` to pictures, by a diffusers AutoencoderKL.

    Raises:
        ConfigError: the folder holds none. UserError, when it decodes: it is not the one that made the latents.
    """
    network = load_autoencoder(folder, "--autoencoder")
    pixels = PixelCodec(PixelField(member="png"), GridSpace(channels=3, height=1, width=1))

    def decode(latents: Array) -> Image.Image:
        channels = int(network.config.latent_channels)
        if len(latents) != channels:
            raise UserError(f"--autoencoder {folder} has {channels} latent channels, and the shards' latents {len(latents)}")
        with torch.no_grad():
            state = torch.from_numpy(latents.astype(np.float32))[None].to(network.device) / scale
            return pixels.decode(network.decode(state).sample[0])

    return decode


def sample_cell(sample: ShownSample, decode: Decode | None = None, tokenizer: Tokenizer | None = None) -> Cell:
    """A sample's cell of the sheet: its picture, first caption and key, and a note of damaged members.

    Args:
        decode: draws latents, even of samples that have a picture too; without it they show as their first channels.
        tokenizer: spells token ids out, even of samples that have texts too.
    """
    notes = [sample.key]
    picture, caption = None, ""
    try:
        picture, note = _picture(sample, decode)
        notes += [note] if note else []
    except SampleError as error:
        notes.append(str(error))
    try:
        caption = _caption(sample, tokenizer)
    except SampleError as error:
        notes.append(str(error))
    return Cell(None if picture is None else flat(plain(picture)), caption, "\n".join(notes))


def _picture(sample: ShownSample, decode: Decode | None) -> tuple[Image.Image | None, str]:
    ending = picture_member(sample.members)
    if LATENTS in sample.members and (decode or ending is None):
        latents = array_of(sample.members, LATENTS)
        if latents.ndim not in (3, 4) or latents.dtype.kind != "f" or not latents.size or not np.isfinite(latents).all():
            raise SampleError(
                f"its .{LATENTS} member holds no finite latents [C, H, W] ({latents.dtype} {list(latents.shape)})"
            )
        mean = latents if latents.ndim == 3 else latents[0]
        if decode:
            return decode(mean), ""
        return channels_picture(mean), f"first {min(3, len(mean))} of {len(mean)} latent channels"
    if ending is None:
        return None, ""
    return load_picture(sample.members[ending]), ""


def channels_picture(latents: Array) -> Image.Image:
    """The first three channels of [C, H, W] as red, green and blue (of fewer the first as grey), each stretched to 0..255."""
    shown = latents[:3] if len(latents) >= 3 else latents[:1]
    values = shown.astype(np.float64)
    low, high = np.quantile(values, [0.01, 0.99], axis=(1, 2), keepdims=True)
    stretched = (values - low) / np.where(high > low, high - low, 1)
    pixels = (stretched.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels if len(shown) == 3 else pixels[..., 0])


def _caption(sample: ShownSample, tokenizer: Tokenizer | None) -> str:
    """The first caption, or the columns of a table's row."""
    tokens = tokens_of(sample.members)
    if tokens and tokenizer is not None:
        return str(tokenizer.decode(tokens[0], skip_special_tokens=False))
    if texts := texts_of(sample.members):
        return texts[0]
    if tokens:
        return f"({len(tokens[0])} tokens)"
    row = row_of(sample.members) if "json" in sample.members else None
    if isinstance(row, Mapping):
        return ", ".join(f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in row.items())
    return ""


def stats_picture(stats: Stats) -> Image.Image:
    """Panels of caption lengths, resolutions with buckets, aspect ratios and samples per bucket, as far as there are any."""
    # Without pyplot, which would change the backend of a notebook that calls this.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Callable[[Any], None]] = []
    for unit, lengths in lengths_of(stats.seen).items():
        panels.append(partial(_draw_lengths, unit=unit, lengths=lengths))
    sizes = list(stats.seen.resolutions)
    if len(sizes) > 1 or (sizes and stats.buckets):
        panels.append(lambda axis: _draw_resolutions(axis, stats))
        panels.append(lambda axis: _draw_ratios(axis, stats))
    if stats.buckets:
        panels.append(lambda axis: _draw_buckets(axis, stats.buckets))
    if not panels:
        panels.append(lambda axis: _draw_members(axis, stats))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows + 0.5), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    same = f"; every picture {sizes[0][0]}x{sizes[0][1]}" if len(sizes) == 1 else ""
    title = f"{stats.samples:,} samples in {stats.shards:,} shards; {stats.seen.samples:,} read{same}"
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _draw_lengths(axis: Any, unit: str, lengths: Mapping[int, int]) -> None:
    values = np.array(sorted(lengths))
    counts = np.array([lengths[value] for value in values.tolist()])
    ends = np.cumsum(counts)
    usual, median = (int(values[np.searchsorted(ends, share * ends[-1])]) for share in (0.99, 0.5))
    longest = int(values[-1])
    last = max(1, longest if longest <= 2 * usual else usual)
    step = -(-(last + 1) // 50)
    edges = np.arange(0, last + step + 1, step) - 0.5
    # The last bin holds all longer captions.
    axis.hist(values.clip(max=edges[-1] - 0.5), edges, weights=counts / counts.sum(), color=COLOUR)
    axis.axvline(median, color=ACCENT, linewidth=1.2)
    axis.set_title(f"{unit} of a caption: median {median:,}", fontsize=10)
    axis.set_xlabel(
        unit if values.max() <= edges[-1] else f"{unit} (the longest, {values.max():,}, in the last bar)", fontsize=8
    )
    axis.set_ylabel("share of captions", fontsize=8)


def _draw_resolutions(axis: Any, stats: Stats) -> None:
    points = stats.seen.resolutions.most_common(_MOST_POINTS)
    sizes = np.array([size for size, _ in points])
    counts = np.array([count for _, count in points])
    area = 12 + 130 * counts / counts.max() if len(points) <= 30 else 5 + 45 * counts / counts.max()
    opacity = float(np.clip(20 / len(points), 0.35, 0.85))
    axis.scatter(sizes[:, 1], sizes[:, 0], s=area, color=COLOUR, alpha=opacity, linewidths=0, label="pictures")
    buckets = [Bucket.parse(text) for text in stats.buckets if "x" in text]
    if buckets:
        heights, widths = zip(*buckets, strict=True)
        axis.scatter(widths, heights, marker="+", s=60, color=ACCENT, linewidths=1.3, label="buckets")
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    top = 1.08 * max(sizes.max(), *(max(bucket) for bucket in buckets), 1)
    axis.plot([0, top], [0, top], color="#d4d4d8", linewidth=0.8, zorder=0)
    axis.set_xlim(0, top)
    axis.set_ylim(0, top)
    axis.set_aspect("equal")
    number = len(stats.seen.resolutions)
    rare = f", {number - len(points):,} rare ones not drawn" if number > len(points) else ""
    axis.set_title(f"resolutions: {number:,}{rare}", fontsize=10)
    axis.set_xlabel("width, px", fontsize=8)
    axis.set_ylabel("height, px", fontsize=8)


def _draw_ratios(axis: Any, stats: Stats) -> None:
    ratios = aspect_ratios(stats.seen.resolutions)
    values, counts = np.array(list(ratios)), np.array(list(ratios.values()))
    furthest = min(max(1.25, float(np.abs(np.log2(values)).max())), 3)
    places = np.log2(values).clip(-furthest, furthest)
    axis.hist(places, np.linspace(-furthest, furthest, 42), weights=counts / counts.sum(), color=COLOUR)
    ticks = {"1:4": -2, "1:2": -1, "2:3": np.log2(2 / 3), "1:1": 0, "3:2": np.log2(1.5), "2:1": 1, "4:1": 2}
    inside = {name: place for name, place in ticks.items() if abs(place) <= furthest}
    axis.set_xticks(list(inside.values()), list(inside))
    axis.set_title("aspect ratios", fontsize=10)
    axis.set_xlabel("width : height", fontsize=8)
    axis.set_ylabel("share of pictures", fontsize=8)


def _draw_buckets(axis: Any, buckets: Mapping[str, int]) -> None:
    shown = sorted(list(buckets.items())[:_MOST_BUCKETS], key=lambda item: _ratio(item[0]))
    places = np.arange(len(shown))
    axis.bar(places, [count for _, count in shown], 0.8, color=COLOUR)
    small = 8 if len(shown) <= 14 else 6
    axis.set_xticks(places, [name for name, _ in shown], rotation=90 if len(shown) > 4 else 0, fontsize=small)
    most = f", the {_MOST_BUCKETS} largest of {len(buckets)}" if len(buckets) > len(shown) else ""
    axis.set_title(f"samples per bucket (height x width){most}", fontsize=10)


def _ratio(bucket: str) -> float:
    height, _, width = bucket.partition("x")
    return int(width) / int(height) if width.isdigit() and height.isdigit() else 0.0


def _draw_members(axis: Any, stats: Stats) -> None:
    members = stats.seen.members.most_common(_MOST_BUCKETS)
    axis.barh([name for name, _ in members], [count for _, count in members], color=COLOUR)
    axis.invert_yaxis()
    axis.set_title("samples that have a member", fontsize=10)


def missing_members(samples: Sequence[ShownSample], ending: str) -> bool:
    """Whether no sample has a member."""
    return not any(ending in sample.members for sample in samples)
