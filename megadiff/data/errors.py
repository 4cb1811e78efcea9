"""Errors of the data room."""

from __future__ import annotations

from megadiff.config.errors import UserError


class DataError(UserError):
    """Shards, manifests or samples that cannot be used."""


class SampleError(DataError):
    """One sample that cannot be decoded; the loader skips and counts it."""
