"""Buckets: the few sizes that pictures of many shapes are cropped to, so that a batch holds one size (NovelAI, 2022)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from megadiff.config.errors import UserError
from megadiff.data.errors import SampleError

LONGEST_PX = 2**15
"""Longest edge of a picture whose short edge was fitted; longer ones show nothing and could take all memory."""


class Bucket(NamedTuple):
    """A size in pixels; written HEIGHTxWIDTH."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Raises UserError if it is not two positive whole numbers with an x between, or one is no picture's edge."""
        edges = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
        if edges is None:
            raise UserError(f"{text!r} is no bucket; give HEIGHTxWIDTH in pixels, such as 512x768")
        if max(len(edges[1]), len(edges[2])) > len(str(LONGEST_PX)) or max(int(edges[1]), int(edges[2])) > LONGEST_PX:
            raise UserError(f"{text.strip()[:40]} is too large: no edge of a picture may have more than {LONGEST_PX} px")
        return cls(int(edges[1]), int(edges[2]))


class Buckets:
    """A choice of buckets, and which of them a picture belongs to."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        """Raises UserError if there are none, or one twice."""
        if not buckets:
            raise UserError("give at least one bucket")
        if len(set(buckets)) != len(buckets):
            raise UserError(f"a bucket is named twice: {', '.join(map(str, buckets))}")
        self.buckets = tuple(sorted(buckets))

    def of(self, height: int, width: int) -> Bucket:
        """The bucket of the nearest aspect ratio; of several the largest that needs no enlarging, else the smallest."""

        def preference(bucket: Bucket) -> tuple[float, bool, int]:
            distance = abs(math.log(height * bucket.width / (width * bucket.height)))
            enlarges = bucket.height > height or bucket.width > width
            area = bucket.height * bucket.width
            return round(distance, 9), enlarges, area if enlarges else -area

        return min(self.buckets, key=preference)


def area_buckets(edge_px: int, step_px: int = 64, max_ratio: float = 2.0) -> Buckets:
    """Buckets of about edge x edge pixels, their edges multiples of `step_px`, with every aspect ratio up to `max_ratio`.

    Raises:
        UserError: the step does not divide the edge, an edge is too long, or the ratio is below 1.
    """
    if edge_px > LONGEST_PX:
        raise UserError(f"buckets of {edge_px} px are too large: no edge may have more than {LONGEST_PX} px")
    if edge_px % step_px:
        raise UserError(f"the buckets' step ({step_px} px) must divide their edge ({edge_px} px)")
    if max_ratio < 1:
        raise UserError(f"the largest aspect ratio ({max_ratio:g}) must be at least 1")
    buckets = set()
    height = step_px
    while height <= edge_px:
        width = edge_px * edge_px // height // step_px * step_px
        if width <= max_ratio * height:
            buckets |= {Bucket(height, width), Bucket(width, height)}
        height += step_px
    return Buckets(sorted(buckets))


def fit(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale so that the picture covers the size, then crop the centre. Raises SampleError if it is far too thin."""
    if picture.size == (width, height):
        return picture
    factor = max(width / picture.width, height / picture.height)
    size = (max(width, round(picture.width * factor)), max(height, round(picture.height * factor)))
    if max(size) > max(LONGEST_PX, width, height):
        raise SampleError(f"it is {picture.width} x {picture.height} px, too thin to fill {width} x {height}")
    scaled = picture.resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))
