"""Errors of the data room."""

from __future__ import annotations

from PIL import UnidentifiedImageError

from megadiff.config.errors import UserError


class DataError(UserError):
    """Shards, manifests or samples that cannot be used."""


class SampleError(DataError):
    """One sample that cannot be decoded; the loader skips and counts it."""


def in_one_line(error: Exception) -> str:
    """An error's message as one line, or its class's name if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def picture_fault(error: Exception) -> str:
    """Why Pillow could not read a picture. Its own message may name an object in memory instead."""
    return "its format is not known" if isinstance(error, UnidentifiedImageError) else in_one_line(error)
