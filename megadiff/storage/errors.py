"""Errors of the storage room."""

from __future__ import annotations

from megadiff.config.errors import UserError


class StorageError(UserError):
    """An object that is missing, forbidden, out of reach, or that changed while it was read."""


class MissingError(StorageError):
    """An object that does not exist."""


class AddressError(StorageError):
    """An address that no object can have."""


class FullError(StorageError):
    """The disk has no room for what is to be written."""
